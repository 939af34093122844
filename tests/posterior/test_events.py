"""What is known of events: distributions of their times, states before and after, derivatives, missed crossings."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from tests.helpers import central_differences, first_of
from tests.stepping.test_events import BOUNCE, GRAVITY, GROUND, LOSS, START, impacts, solver, swing


LINE = solver(lambda t, u, args: jnp.ones_like(u))
LEVEL = po.Event(lambda t, u, args: u - args)
CYCLE = po.Event(lambda t, u, args: u - args, reset=lambda t, u, args: 0 * u)


@eqx.filter_jit
def ball(height, t1=2.3, events=BOUNCE, **options):
    return solver().solve({"x": height, "v": 0 * height}, 0.0, t1, events=events, **options)


@pytest.mark.thorough
def test_the_time_at_which_a_line_crosses_a_level():
    """``t* = q``: its derivative is exactly one, the second derivative zero."""
    time = jax.jit(lambda q: LINE.solve(0.0, 0.0, 2.0, args=q, events=LEVEL).events.t[0])
    assert float(time(0.7)) == 0.7
    for derivative in (jax.grad(time), jax.jacfwd(time)):
        np.testing.assert_allclose(derivative(0.7), 1.0, rtol=1e-14)
    np.testing.assert_allclose(jax.jacfwd(jax.grad(time))(0.7), 0.0, atol=1e-12)


@pytest.mark.thorough
def test_the_state_after_a_reset_moves_with_the_level():
    end = jax.jit(lambda p: LINE.solve(0.0, 0.0, 1.0, args=p, events=CYCLE).mean[0])
    np.testing.assert_allclose(end(0.7), 0.3, rtol=1e-13)
    for derivative in (jax.grad(end), jax.jacfwd(end)):
        np.testing.assert_allclose(derivative(0.7), -1.0, rtol=1e-13)


@pytest.mark.thorough
def test_derivatives_through_ten_resets():
    """Of the last time and the last state, in both modes; the second one forward over reverse."""

    def last(height):
        solution = ball(height, 3.68)
        return jnp.stack([solution.events.t[9], solution.mean["x"][-1], solution.mean["v"][-1]])

    def exact(h):
        first = jnp.sqrt(2 * h / GRAVITY)
        t = first * (1 + 2 * sum(LOSS**j for j in range(1, 10)))
        v, s = LOSS**10 * jnp.sqrt(2 * GRAVITY * h), 3.68 - t
        return jnp.stack([t, v * s - GRAVITY * s**2 / 2, v - GRAVITY * s])

    h = jnp.asarray(1.03)
    assert int(ball(h, 3.68).events.count) == 10
    np.testing.assert_allclose(last(h), exact(h), rtol=1e-11)
    expected = jax.jacfwd(exact)(h)
    np.testing.assert_allclose(jax.jacfwd(last)(h), expected, rtol=1e-9)
    np.testing.assert_allclose(jax.jacrev(last)(h), expected, rtol=1e-9)


@pytest.mark.thorough
def test_second_derivatives_through_resets():
    time = lambda h: ball(h).events.t[3]  # noqa: E731
    expected = -impacts(4)[3] / 4
    np.testing.assert_allclose(jax.jacfwd(jax.grad(time))(jnp.asarray(1.0)), expected, rtol=1e-8)


@pytest.mark.thorough
@pytest.mark.parametrize("forward", first_of(True, False))
def test_derivatives_of_a_nonlinear_problem_are_those_of_differences(forward):
    """A curved surface that moves, and a reset that depends on time, state and parameters."""
    surface = po.Event(
        lambda t, u, args: u[0] ** 2 + args[0] * u[1] - 0.3 * jnp.cos(t),
        direction=1,
        reset=lambda t, u, args: jnp.stack([0.3 * u[0] * u[1] + args[1] * t, u[1] - 0.2]),
    )
    osc = solver(swing, nu=5)
    end = 4.0 if forward else -4.0

    @jax.jit
    def outcome(x):
        solution = osc.solve(x[:2], 0.0, end, args=x[2:], events=surface, max_events=8)
        return jnp.append(solution.mean[-1], solution.events.t[0])

    x = jnp.asarray([0.1, 0.2, 0.5, 0.3])
    expected = central_differences(outcome, x, 1e-3)
    assert np.all(np.isfinite(expected))
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(outcome))(x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.thorough
def test_a_gradient_is_finite_where_nothing_happens():
    """The empty places must not poison it; nor a function that is not defined at zero."""
    event = po.Event(lambda t, u, args: jnp.log(u) + args, terminal=False)
    decay = solver(lambda t, u, args: -u, nu=4)
    loss = lambda u0: decay.solve(u0, 0.0, 1.0, args=5.0, events=event).mean[0]  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(1.0), np.exp(-1), rtol=1e-8)

    def with_times(u0):
        events = decay.solve(u0, 0.0, 1.0, args=0.5, events=event).events
        return jnp.sum(jnp.where(jnp.arange(64) < events.count, events.t, 0.0))

    np.testing.assert_allclose(jax.jit(jax.grad(with_times))(1.0), 1.0, rtol=1e-7)


@pytest.mark.thorough
def test_the_first_impact_of_a_ball_that_falls_from_an_uncertain_height():
    """``std(t) = s / sqrt(2 g h)``; after the impact the covariance is that of the saltation matrix."""
    s, strategy = 1e-3, {"strategy": po.FixedPointSmoother()}
    start = po.Normal(START, {"x": jnp.asarray(s), "v": jnp.asarray(0.0)})
    solution = solver(**strategy).solve(start, 0.0, 1.0, events=BOUNCE)
    events, speed = solution.events, np.sqrt(2 * GRAVITY)
    np.testing.assert_allclose(events.t_std[0], s / speed, rtol=1e-9)
    # At the event the position is known, and the speed moves with the time.
    np.testing.assert_allclose(events.std["x"][0], 0, atol=1e-12)
    np.testing.assert_allclose(events.std["v"][0], GRAVITY * s / speed, rtol=1e-9)
    np.testing.assert_allclose(events.std_after["x"][0], 0, atol=1e-12)
    np.testing.assert_allclose(events.std_after["v"][0], LOSS * GRAVITY * s / speed, rtol=1e-9)
    # S of the state (x, v) just before the impact at a fixed time, then free flight.
    matrix = np.asarray([[-LOSS, 0], [(1 + LOSS) * GRAVITY / speed, -LOSS]])
    before, flight = impacts(1)[0], 1.0 - impacts(1)[0]
    fly = lambda t: np.asarray([[1, t], [0, 1]])  # noqa: E731
    moved = fly(flight) @ matrix @ fly(before) @ np.asarray([s, 0])
    np.testing.assert_allclose([solution.std["x"][-1], solution.std["v"][-1]], np.abs(moved), rtol=1e-8)


DRAG = lambda t, u, args: (u[1], -GRAVITY - 0.1 * u[1] * jnp.abs(u[1]))  # noqa: E731
IMPACT = po.Event(lambda t, u, args: u[0], direction=-1, reset=lambda t, u, args: (u[0], -LOSS * u[1]))


def falling(height, rtol, atol=1e-6, **options):
    """A ball with drag, whose impacts have no closed form: the derivative of the field has a kink where it turns."""
    at_rest = po.Normal((height, 0.0), (0.02, 0.0)) if options.pop("uncertain", False) else (height, 0.0)
    span = 0.0, options.pop("t1", 2.0)
    return po.solve_ivp(DRAG, span, at_rest, rtol=rtol, atol=atol, events=IMPACT, max_events=16, **options)


def test_the_spread_of_impacts_is_right_at_loose_tolerances():
    """Four impacts; in small steps behind a reset residuals are round-off, and must not tell about the state."""
    exact = lambda height: np.asarray(falling(height, 1e-9, 1e-9).events.t[:4])  # noqa: E731
    for height in (0.85, 1.0, 1.15):
        expected = np.abs(exact(height + 1e-4) - exact(height - 1e-4)) / 2e-4 * 0.02
        for rtol, error in ((1e-2, 0.1), (1e-3, 0.02), (1e-5, 5e-3)):
            events = falling(height, rtol, uncertain=True).events
            np.testing.assert_allclose(events.t_std[:4], expected, rtol=error)
    assert repr(events).startswith("Occurrences(count=3, t=[0.49353") and "nan" not in repr(events)


@pytest.mark.thorough
def test_derivatives_and_errors_behind_resets_at_loose_tolerances():
    """The filter's own covariance behind a reset must not be learnt away either: errors stay within it."""
    exact = eqx.filter_jit(lambda height: falling(height, 1e-9, 1e-9).events.t[:3])
    derivative = eqx.filter_jit(jax.jacfwd(lambda height, rtol: falling(height, rtol).events.t[:3]))
    heights = np.random.default_rng(0).uniform(0.8, 1.2, 12)
    for height in heights:
        expected = (exact(height + 1e-4) - exact(height - 1e-4)) / 2e-4
        np.testing.assert_allclose(derivative(height, 1e-3), expected, rtol=0.03)
        np.testing.assert_allclose(derivative(height, 1e-5), expected, rtol=0.01)
    for rtol in (1e-2, 1e-3, 1e-4):
        squares = []
        for height in heights:
            loose, tight = falling(height, rtol, t1=1.9), falling(height, 1e-9, 1e-9, t1=1.9)
            off = (np.asarray(loose.mean) - np.asarray(tight.mean)) / np.asarray(loose.std)
            squares.append(np.mean(off**2))
        assert 1e-4 < np.median(squares) < 2
        assert np.quantile(squares, 0.9) < 5


@pytest.mark.parametrize("factorisation", [po.Dense(), po.BlockDiagonal()])
@pytest.mark.thorough
def test_numerical_uncertainty_goes_through_a_reset(factorisation):
    """A state with a covariance, one reset, and no further noise: ``S P S^T``, of ``BlockDiagonal`` its diagonal."""
    ball = solver(
        factorisation=factorisation, calibration=po.NoCalibration(), controller=po.IntegralController(1e-3, 1e-3)
    )
    solution = ball.solve(START, 0.0, 1.0, events=BOUNCE, save_at=po.SaveAt(dense=True))
    path = solution.trajectory
    (i,) = np.flatnonzero(np.asarray(path.rows.restarted))
    before, after = (solution.layout.unpack(path.rows.distribution.mean[j]) for j in (i - 1, i))
    roots = [path.rows.distribution.factor[j] for j in (i - 1, i)]
    # Components in the order of ravel_pytree: v, x.
    v = float(before[0, 0])
    matrix = np.asarray([[-LOSS, (1 + LOSS) * GRAVITY / v * -1], [0, -LOSS]])
    if factorisation == po.Dense():
        first, second = (np.asarray(root[:, :2].T @ root[:, :2]) for root in roots)
        np.testing.assert_allclose(second, matrix @ first @ matrix.T, rtol=1e-9)
    else:
        first, second = (np.sum(np.asarray(root[:, :, 0]) ** 2, axis=1) for root in roots)
        np.testing.assert_allclose(second, np.diag(matrix @ np.diag(first) @ matrix.T), rtol=1e-9)
    np.testing.assert_allclose(after[0], [-LOSS * v, 0], atol=1e-12)


@pytest.mark.thorough
def test_the_distribution_of_a_time_is_not_normal():
    """``u' = -u`` from a normal ``u0``: ``P(t* <= t) = Phi((e^t / 2 - 1) / s)``, to the fourth order in ``t - t*``."""
    s, ts = 0.1, jnp.linspace(0.4, 1.0, 7)
    decay = solver(lambda t, u, args: -u, nu=5)
    solution = decay.solve(po.Normal(1.0, jnp.asarray(s)), 0.0, 3.0, events=po.Event(lambda t, u, args: u - 0.5))
    expected = jax.scipy.stats.norm.cdf((jnp.exp(ts) / 2 - 1) / s)
    np.testing.assert_allclose(solution.events.cdf(ts)[0], expected, atol=1e-4)
    assert np.all(np.isnan(solution.events.cdf(ts)[1:]))
    assert solution.events.cdf(0.5).shape == (64,)
    # A known time has a step.
    solution = decay.solve(1.0, 0.0, 1.0, events=po.Event([0.5]))
    np.testing.assert_array_equal(solution.events.cdf(jnp.asarray([0.4, 0.6]))[0], [0.0, 1.0])


@pytest.mark.thorough
def test_the_deviation_of_a_time_is_differentiated_at_the_time_of_the_event():
    """``std(t) = s / |u'|`` of an oscillator that starts at an uncertain phase: by the level."""
    s, osc = 1e-2, solver(swing, nu=5)
    event = po.Event(lambda t, u, args: u[0] - args)

    def deviation(level):
        start = po.Normal(jnp.asarray([1.0, 0.0]), jnp.asarray([s, 2 * s]))
        return osc.solve(start, 0.0, 5.0, args=level, events=event).events.t_std[0]

    def exact(level):
        t = jnp.arccos(level)
        return s * jnp.sqrt(jnp.cos(t) ** 2 + 4 * jnp.sin(t) ** 2) / jnp.sin(t)

    np.testing.assert_allclose(deviation(0.3), exact(0.3), rtol=1e-7)
    for derivative in (jax.jacfwd, jax.grad):
        np.testing.assert_allclose(jax.jit(derivative(deviation))(0.3), jax.grad(exact)(0.3), rtol=1e-5)


@pytest.mark.thorough
def test_intervals_of_event_times_hold_the_times():
    """1000 uncertain starts of an oscillator; closed forms of the true times."""
    s, level, draws = 0.02, 0.3, 1000
    osc = po.Solver(po.IWP(5), po.TS1(po.ODE(swing)), controller=po.IntegralController(1e-6, 1e-8))
    event = po.Event(lambda t, u, args: u[0] - level, direction=-1)
    mean = jnp.asarray([1.0, 0.2])
    keys = jax.random.split(jax.random.key(0), draws)
    starts = mean + s * jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)

    def centred(start):
        events = osc.solve(po.Normal(start, jnp.full(2, s)), 0.0, 5.0, events=event).events
        return events.t[0], events.t_std[0]

    # The truth starts at the mean, beliefs at draws about it: as likely as the other way round.
    t, std = eqx.filter_jit(lambda starts: jax.lax.map(centred, starts))(starts)
    amplitude, phase = np.hypot(1.0, 0.2), np.arctan2(0.2, 1.0)
    true = phase + np.arccos(level / amplitude)
    inside = np.mean(np.abs(np.asarray(t) - true) < 1.645 * np.asarray(std))
    assert 0.85 < inside < 0.95


@pytest.mark.thorough
def test_after_a_reset_the_covariance_is_that_of_many_balls():
    s, number = 2e-3, 100_000
    start = po.Normal(START, {"x": jnp.asarray(s), "v": jnp.asarray(s)})
    solution = solver().solve(start, 0.0, 1.0, events=BOUNCE)
    rng = np.random.default_rng(0)
    h, v = 1 + s * rng.normal(size=number), s * rng.normal(size=number)
    t = (v + np.sqrt(v**2 + 2 * GRAVITY * h)) / GRAVITY
    up, rest = -LOSS * (v - GRAVITY * t), 1.0 - t
    samples = np.stack([up - GRAVITY * rest, up * rest - GRAVITY * rest**2 / 2])
    np.testing.assert_allclose(solution.covariance[-1], np.cov(samples), rtol=0.02)


@pytest.mark.thorough
@pytest.mark.parametrize("uncertain", first_of(True, False))
def test_expected_crossings(uncertain):
    """Of crossings that are sure one each, by resets and ends of a solve too."""
    start = po.Normal(START, {"x": jnp.asarray(1e-3), "v": jnp.asarray(0.0)}) if uncertain else START
    keeps = {"save_at": po.SaveAt(dense=True)}
    events = solver().solve(start, 0.0, 2.3, events=BOUNCE, **keeps).events
    np.testing.assert_allclose(events.expected_crossings, [4.0], atol=1e-6)
    both = po.Event(BOUNCE.g, reset=BOUNCE.reset)
    ending = solver().solve(start, 0.0, 2.3, events=[GROUND, po.Event([0.3])], **keeps).events
    np.testing.assert_allclose(ending.expected_crossings, [1.0, np.nan], atol=1e-6)
    assert np.all(np.isnan(solver().solve(START, 0.0, 2.3, events=BOUNCE).events.expected_crossings))
    events = solver().solve(start, 0.0, 2.3, events=both, **keeps).events
    np.testing.assert_allclose(events.expected_crossings, [4.0], atol=1e-6)


@pytest.mark.thorough
def test_expected_crossings_of_a_function_that_nearly_touches_zero():
    """Against the crossings of many sampled solutions: the mean does not cross."""
    s, number = 0.05, 100_000
    osc = solver(swing, nu=4, strategy=po.FixedIntervalSmoother(), controller=po.IntegralController(1e-7, 1e-9))
    event = po.Event(lambda t, u, args: u[0] - 1.0, terminal=False)
    solution = osc.solve(po.Normal(jnp.asarray([0.97, 0.0]), jnp.full(2, s)), 0.0, 10.0, events=event)
    rng = np.random.default_rng(0)
    x, v = 0.97 + s * rng.normal(size=number), s * rng.normal(size=number)
    size, phase = np.hypot(x, v), np.arctan2(v, x)
    # x cos t + v sin t = size cos(t - phase): twice for every maximum, but for one before the start.
    angle = np.arccos(np.minimum(1.0, 1.0 / size))
    times = np.concatenate([phase[:, None] + 2 * np.pi * k + s * angle[:, None] for k in range(3) for s in (-1, 1)], 1)
    crossings = np.sum((times > 0) & (times < 10) & (size > 1)[:, None]) / number
    assert solution.events.count == 0
    np.testing.assert_allclose(solution.events.expected_crossings[0], crossings, rtol=0.02)


@pytest.mark.thorough
def test_a_terminal_event_and_what_goes_on_from_it():
    """The state that is resumed has the spread of a fixed time: two pieces give what one solve gives."""
    s = 1e-3
    start = po.Normal(START, {"x": jnp.asarray(s), "v": jnp.asarray(0.0)})
    crossing = po.Event(lambda t, u, args: u["x"] - 0.5, direction=-1)
    first = solver().solve(start, 0.0, 1.0, events=crossing)
    assert first.result == po.Result.event
    second = solver().solve(first.state, first.state.t, 0.44)
    whole = solver().solve(start, 0.0, 0.44)
    for name in ("x", "v"):
        np.testing.assert_allclose(second.mean[name], whole.mean[name], atol=1e-12)
        np.testing.assert_allclose(second.std[name], whole.std[name], rtol=1e-7, atol=1e-12)


@pytest.mark.thorough
def test_a_calibration_that_rescales_rescales_the_events():
    rate = lambda t, u, args: -u * (1 + 0.5 * jnp.sin(5 * t))  # noqa: E731
    event = po.Event(lambda t, u, args: u - 0.5, terminal=False)
    parts = {"controller": po.IntegralController(1e-5, 1e-7)}
    rescaled = solver(rate, calibration=po.MLECalibration(), **parts).solve(1.0, 0.0, 2.0, events=event)
    fixed = po.Solver(
        po.IWP(3, output_scale=float(rescaled.output_scale[-1])),
        po.TS1(po.ODE(rate)),
        calibration=po.NoCalibration(),
        loop=po.BoundedLoop(),
        **parts,
    ).solve(1.0, 0.0, 2.0, events=event)
    np.testing.assert_allclose(rescaled.events.t_std[0], fixed.events.t_std[0], rtol=1e-6)
