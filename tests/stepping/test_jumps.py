"""Times at which the equation jumps: steps see their own side, derivatives start anew, the distribution of u stays."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .. import oracles
from ..helpers import FACTORISATIONS, first_of, left_to_nox, lotka_volterra, name


STRATEGIES = (po.Filter(), po.FixedPointSmoother(), po.FixedIntervalSmoother())
HEIGHTS = jnp.array([1.0, -2.0])


def pulse(t, u, args):
    # open: at 5 and 6 themselves it is off
    return jnp.where((t > 5.0) & (t < 6.0), HEIGHTS, 0.0).astype(u.dtype) - u


def of_pulse(ts):
    ts = np.asarray(ts, float)[:, None]
    during = np.minimum(ts, 6.0)
    return np.where(ts > 5, np.asarray(HEIGHTS) * (1 - np.exp(5 - during)) * np.exp(during - ts), 0)


def solver(field, stops, rtol=1e-6, constraint=po.TS1, prior=None, order=1, **parts):
    controller = po.IntegralController(rtol, rtol * 1e-3, stop_at=stops)
    parts = {"controller": controller, "loop": po.ForwardLoop(1024)} | parts
    return po.Solver(po.IWP(4) if prior is None else prior, constraint(po.ODE(field, order=order)), **parts)


IN_EVERY_RUN = [
    (po.TS1, po.Dense(), po.Filter(), 1e-3),
    (po.TS0, po.BlockDiagonal(), po.FixedPointSmoother(), 1e-6),
    (po.TS1, po.Isotropic(), po.FixedIntervalSmoother(), 1e-9),
]


EVERY = itertools.product((po.TS0, po.TS1), FACTORISATIONS, STRATEGIES, (1e-3, 1e-6, 1e-9))
OTHERS = [case for case in EVERY if case not in IN_EVERY_RUN]


@pytest.mark.parametrize(
    ("constraint", "factorisation", "strategy", "rtol"),
    first_of(*IN_EVERY_RUN, *OTHERS),
    ids=lambda x: str(x) if isinstance(x, float) else name(x),
)
def test_an_open_pulse_between_two_stops(constraint, factorisation, strategy, rtol):
    made = solver(pulse, [5.0, 6.0], rtol, constraint, factorisation=factorisation, strategy=strategy)
    ts = np.array([3.0, 5.0, 5.3, 6.0, 6.7, 10.0])
    solution = made.solve(jnp.zeros(2), 0.0, 10.0, save_at=ts)
    error, std = abs(np.asarray(solution.mean) - of_pulse(ts)), np.asarray(solution.std)
    assert np.all(std[:2] == 0) and np.all(std[2:] > 0)
    assert np.max(error) < 2 * rtol and np.all(error <= 5 * std + 1e-15)
    # right-continuous
    slopes = np.stack([HEIGHTS, -of_pulse([6.0])[0]])
    np.testing.assert_allclose(solution.derivative(1).mean[1::2][:2], slopes, atol=20 * rtol)


def test_an_open_pulse_from_the_right_in_single_precision():
    for dtype, rtol in ((jnp.float32, 1e-4), (jnp.float64, 1e-6)):
        # time runs backwards in v(s) = u(11 - s)
        made = solver(lambda t, u, args: -pulse(11.0 - t, u, args), np.array([5.0, 6.0]), rtol)
        solution = made.solve(jnp.zeros(2, dtype), 11.0, 1.0)
        assert solution.mean.dtype == dtype
        error = abs(np.asarray(solution.mean[0]) - of_pulse([10.0])[0])
        assert np.all(error < 10 * rtol * 1e-2) and np.all(error < 5 * solution.std[0])


@pytest.mark.thorough
@pytest.mark.parametrize("strict", first_of(True, False))
@pytest.mark.parametrize("strategy", first_of(*STRATEGIES), ids=name)
def test_derivatives_with_respect_to_a_switch(strict, strategy):
    def end(tau):
        def field(t, u, tau):
            return -jnp.where(t < tau if strict else t <= tau, 1.2, 0.0) * u

        made = solver(field, jnp.stack([tau]), 1e-7, loop=po.BoundedLoop(128), prior=po.IWP(3), strategy=strategy)
        solution = made.solve(1.0, 0.0, 3.0, args=tau, save_at=[0.3, 2.0])
        return solution.mean

    right, jitted = [0.0, -1.2 * np.exp(-0.6)], jax.jit(end)
    np.testing.assert_allclose(jitted(jnp.array(0.5)), np.exp([-0.36, -0.6]), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(end))(0.5), right, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacrev(end))(0.5), right, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("rtol", first_of(1e-5, 1e-3))
def test_knots_of_interpolated_data(rtol):
    number = 60
    ts = np.arange(number + 1.0)
    ys = 20 + 5 * np.sin(2 * np.pi * ts / 24) + np.random.default_rng(0).normal(size=number + 1)

    def field(t, u, args):
        return 0.3 * (jnp.interp(t, jnp.asarray(ts), jnp.asarray(ys)) - u)

    right = 20.0
    for a, b in zip(ys[:-1], np.diff(ys), strict=True):
        right = (a - b / 0.3 + b) + (right - (a - b / 0.3)) * np.exp(-0.3)
    attempts = []
    for stops in (None, ts[1:-1]):
        controller = po.IntegralController(rtol, rtol * 1e-2, stop_at=stops)
        made = solver(field, None, controller=controller, loop=po.ForwardLoop(10_000))
        solution = made.solve(20.0, 0.0, float(number))
        attempts.append(int(solution.stats["num_steps"]))
    assert attempts[1] < attempts[0] / {1e-3: 2, 1e-5: 5}[rtol]
    error = abs(solution.mean[0] - right)
    assert error < rtol * 20 and error < 3 * solution.std[0]


KINKS = jnp.array([0.3, 0.9])


def triangles(ts):
    return np.where(ts[:, None] < KINKS, ts[:, None], 2 * KINKS - ts[:, None])


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", first_of(*STRATEGIES[:0:-1]), ids=name)
def test_smoothers_at_kinks(strategy):
    def field(t, u, args):
        return jnp.sign(KINKS - t) + 0 * u

    ts = np.sort(np.append(np.linspace(0.02, 1.0, 50), KINKS))
    solution = solver(field, KINKS, strategy=strategy, prior=po.IWP(2)).solve(jnp.zeros(2), 0.0, 1.0, save_at=ts)
    np.testing.assert_allclose(solution.mean, triangles(ts), atol=1e-12)
    assert np.all(solution.std < 1e-6)
    np.testing.assert_allclose(solution.derivative(1).mean, np.where(ts[:, None] < KINKS, 1, -1), atol=1e-9)


@pytest.mark.thorough
def test_every_step_is_kept_once():
    made = solver(pulse, [5.0, 6.0], strategy=po.FixedIntervalSmoother())
    solution = made.solve(jnp.zeros(2), 0.0, 10.0, save_at=po.SaveAt(t0=True, steps=True))
    number = int(solution.stats["num_accepted_steps"])
    t = np.asarray(solution.t)
    assert t.shape == (1025,) and np.all(np.diff(t[: number + 1]) > 0) and np.all(t[number:] == 10.0)
    np.testing.assert_allclose(solution.mean[: number + 1], of_pulse(t[: number + 1]), atol=1e-6)
    points = np.linspace(0.0, 10.0, 81)
    dense = solution.evaluate(points)
    np.testing.assert_allclose(dense.mean, of_pulse(points), atol=1e-6)
    at = solution.evaluate(t[: number + 1])
    np.testing.assert_allclose(at.mean, solution.mean[: number + 1], rtol=1e-12)
    np.testing.assert_allclose(at.derivative(1).mean, solution.derivative(1).mean[: number + 1], atol=1e-12)
    np.testing.assert_allclose(solution.evaluate([5.0]).derivative(1).mean, [HEIGHTS], rtol=1e-6)
    samples = solution.sample(jax.random.key(0), (200,), ts=np.array([5.0, 5.5, 6.0, 8.0]))
    spread = np.std(samples, axis=0)
    np.testing.assert_allclose(spread, solution.evaluate([5.0, 5.5, 6.0, 8.0]).std, rtol=0.2)


# --- the whole posterior against one joint Gaussian, with an affine map from before the stop to behind it


NU, SIZE = 2, 6
GRID = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
STOP = 0.5
# Every time, and whether it is that behind the stop.
TIMES = [(0.0, 0), (0.25, 0), (0.375, 0), (0.5, 0), (0.5, 1), (0.625, 0), (0.75, 0), (1.0, 0)]
U0 = np.array([1.0, 0.5])
# what each factorisation has of a Jacobian, before and behind the stop
MATRICES = [
    (np.array([[0.0, 1.0], [-2.0, -0.25]]), np.array([[-1.0, 0.5], [0.3, 0.2]])),
    (np.diag([-1.5, 0.5]), np.diag([0.3, -1.0])),
    (np.diag([-1.25, -1.25]), np.diag([0.75, 0.75])),
]
UNKNOWN = 0.7


def joint(index, known):
    """Mean and covariance of the states at all times given u' = L u on the grid."""
    before, behind = MATRICES[index]
    known_before, known_behind = (
        np.concatenate([np.linalg.matrix_power(matrix, k) * (k <= known) for k in range(NU + 1)])
        for matrix in (before, behind)
    )
    unknown = UNKNOWN**2 * np.diag([0.0] * (SIZE - 2) + [1.0] * 2) * (known < NU)
    start_anew = np.pad(known_behind, ((0, 0), (0, SIZE - 2))), unknown
    transitions = [
        start_anew if again else oracles.iwp_transition(NU, t - s, 2)
        for (s, _), (t, again) in itertools.pairwise(TIMES)
    ]
    mean, cov = oracles.joint_gaussian(known_before @ U0, unknown, transitions)
    h = np.zeros((2 * (len(GRID) - 1), len(mean)))
    for row, t in enumerate(GRID[1:]):
        # at the stop itself the equation is that before it
        at = SIZE * TIMES.index((t, 0))
        h[2 * row : 2 * row + 2, at : at + 2] = -(before if t <= STOP else behind)
        h[2 * row : 2 * row + 2, at + 2 : at + 4] = np.eye(2)
    return *oracles.condition(mean, cov, h, h @ mean), oracles.log_density(h @ mean, 0, h @ cov @ h.T)


@functools.cache
def with_a_jump(index, strategy, known):
    before, behind = (jnp.asarray(matrix) for matrix in MATRICES[index])
    # So loose that steps end where data would be, and at the stop.
    controller = po.IntegralController(1e3, 1e3, stop_at=[STOP], dt_min=1.0)
    initialisation = po.TaylorMode() if known == NU else po.Diffuse(known, scale=UNKNOWN)
    made = solver(
        lambda t, u, args: jnp.where(t < STOP, before, behind) @ u,
        None,
        prior=po.IWP(NU),
        controller=controller,
        factorisation=FACTORISATIONS[index],
        strategy=strategy,
        initialisation=initialisation,
        calibration=po.NoCalibration(),
    )
    nothing = po.Observations(GRID[1:], jnp.zeros((4, 2)), 1.0, mask=np.zeros(4, bool))
    ts = np.array([t for t, again in TIMES if not again])
    return ts, made.solve(jnp.asarray(U0), 0.0, 1.0, save_at=ts, data=nothing)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("strategy", "known"),
    [
        (po.FixedPointSmoother(), NU),
        *left_to_nox((po.FixedIntervalSmoother(), 1), (po.FixedIntervalSmoother(), NU), (po.FixedPointSmoother(), 1)),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else name(x),
)
@pytest.mark.parametrize("index", first_of(*range(3)))
def test_the_posterior_is_that_of_the_joint_gaussian(index, strategy, known):
    mean, cov, evidence = joint(index, known)
    ts, solution = with_a_jump(index, strategy, known)
    assert solution.stats["num_accepted_steps"] == len(GRID) - 1
    # right-continuous: of two states at one time the second
    rows = [max(i for i, (s, _) in enumerate(TIMES) if s == t) for t in ts]
    mean, std = mean.reshape(len(TIMES), NU + 1, 2)[rows], np.sqrt(np.maximum(np.diagonal(cov), 0))
    std = std.reshape(len(TIMES), NU + 1, 2)[rows]
    for k in range(NU + 1):
        np.testing.assert_allclose(solution.derivative(k).mean, mean[:, k], rtol=0, atol=1e-11)
        np.testing.assert_allclose(solution.derivative(k).std ** 2, std[:, k] ** 2, rtol=0, atol=1e-11)
    np.testing.assert_allclose(solution.log_likelihood, evidence, rtol=1e-9)
    if strategy.keeps_steps and known == NU:
        dense = solution.evaluate(ts)
        np.testing.assert_allclose(dense.mean, mean[:, 0], rtol=0, atol=1e-11)
    samples = np.asarray(solution.sample(jax.random.key(0), (20_000,)))
    of_u = [r * SIZE + c for r in rows for c in range(2)]
    expected = cov[np.ix_(of_u, of_u)]
    got = np.cov(samples.reshape(20_000, -1).T)
    deviation = np.sqrt(np.maximum(np.diagonal(expected), 0))
    error = np.sqrt((expected**2 + np.outer(deviation, deviation) ** 2) / 20_000)
    assert np.all(abs(got - expected) <= 5 * error + 1e-12)


# --- other parts


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS[::-1]), ids=name)
@pytest.mark.parametrize("constraint", first_of(po.TS1, po.TS0))
def test_a_stop_does_not_tell_about_u(constraint, factorisation):
    """Derivatives that moved with ``u`` otherwise than the linearisation would lose the uncertainty of ``u``."""
    u0, stds = jnp.array([20.0, 20.0]), []
    for stops in (None, np.linspace(0.5, 9.5, 10)):
        # Steps of one length: what they leave uncertain depends on it.
        made = solver(lotka_volterra, stops, 1e-4, constraint, factorisation=factorisation)
        made = eqx.tree_at(lambda s: s.controller.limits.longest, made, jnp.asarray(0.02))
        stds.append(np.asarray(made.solve(u0, 0.0, 10.0).std[0]))
    assert np.all((stds[1] > 0.3 * stds[0]) & (stds[1] < 3 * stds[0]))


@pytest.mark.thorough
def test_of_second_order():
    def force(t, u, du, args):
        return jnp.where((t > 1.0) & (t < 2.0), 3.0, 0.0) + 0 * u - du

    made = solver(force, [2.0, 1.0], order=2, strategy=po.FixedIntervalSmoother())
    solution = made.solve((0.0, 1.0), 0.0, 3.0)
    v1 = np.exp(-1.0)
    x1, v2 = 1 - v1, 3 + (v1 - 3) * np.exp(-1.0)
    x2 = x1 + 3 + (v1 - 3) * (1 - np.exp(-1.0))
    np.testing.assert_allclose(solution.mean[0], x2 + v2 * (1 - np.exp(-1.0)), rtol=1e-6)
    at = solution.evaluate([1.0, 2.0])
    np.testing.assert_allclose(at.mean, [x1, x2], rtol=1e-6)
    np.testing.assert_allclose(at.derivative(1).mean, [v1, v2], rtol=1e-6)
    np.testing.assert_allclose(at.derivative(2).mean, [3 - v1, -v2], rtol=1e-5)


@pytest.mark.thorough
def test_an_algebraic_equation():
    # u' = s(t) - y, y = 2 u + c s(t): where c is not zero y jumps, and no state that goes on satisfies that
    def residual(t, u, du, c):
        s = jnp.where(t < 1.0, 1.0, 4.0)
        return jnp.stack([du[0] - s + u[1], u[1] - 2 * u[0] - c * s])

    controller = po.IntegralController(1e-7, 1e-9, stop_at=[1.0])
    made = po.Solver(po.IWP(3), po.TS1(po.Residual(residual)), controller=controller, loop=po.ForwardLoop(1024))
    solution = made.solve(jnp.array([0.0, 0.0]), 0.0, 3.0, args=0.0)
    right = 2 + ((1 - np.exp(-2.0)) / 2 - 2) * np.exp(-4.0)
    np.testing.assert_allclose(solution.mean[0], [right, 2 * right], rtol=1e-7)
    jumping = made.solve(jnp.array([0.0, 0.25]), 0.0, 3.0, args=0.25, throw=False)
    assert jumping.result == po.Result.step_size_too_small and abs(jumping.state.t - 1) < 1e-12


@pytest.mark.thorough
@pytest.mark.parametrize("slopes", first_of(False, True))
def test_lanes_and_steps_of_a_vmap(slopes):
    made = solver(pulse, [5.0, 6.0], rtol=1e-4, loop=po.BoundedLoop(128), strategy=po.FixedPointSmoother())

    def end(u):
        return made.solve(jnp.stack([u, 0.0]), 0.0, 10.0, save_at=[5.5, 10.0]).mean

    us = jnp.array([1.0, 3.0])
    if slopes:
        found = jax.jit(jax.vmap(jax.jacrev(end)))(us)
        np.testing.assert_allclose(found[:, :, 0], [np.exp([-5.5, -10.0])] * 2, rtol=1e-3)
        return
    together = jax.jit(jax.vmap(end))(us)
    for i, u in enumerate(us):
        np.testing.assert_allclose(together[i], end(u), rtol=1e-9)


@pytest.mark.thorough
def test_leaving_one_out_and_other_scales():
    for calibration in (po.LeaveOneOutCalibration(), po.DynamicCalibration(memory=0.5)):
        made = solver(pulse, [5.0, 6.0], calibration=calibration, strategy=po.FixedIntervalSmoother())
        solution = made.solve(jnp.zeros(2), 0.0, 10.0)
        error = abs(solution.mean[0] - of_pulse([10.0])[0])
        assert np.all(error < 1e-6) and np.all(error < 5 * solution.std[0]) and np.all(solution.std[0] < 1e-5)


@pytest.mark.thorough
def test_a_prior_of_each_step_sees_its_own_side():
    # The rate of the prior is that of the equation where the step starts: exact on both sides.
    def field(t, u, args):
        return jnp.where(t <= 1.0, -1.0, 2.0) * u

    named, not_told = (
        solver(field, stops, prior=po.RosenbrockIOUP(2)).solve(jnp.ones(1), 0.0, 2.0) for stops in ([1.0], None)
    )
    np.testing.assert_allclose(named.mean[0], [np.exp(1.0)], rtol=1e-9)
    assert named.stats["num_steps"] < not_told.stats["num_steps"] / 3


@pytest.mark.thorough
def test_data_do_not_start_anew():
    data = po.Observations([0.5, 1.0], jnp.zeros((2, 2)), 1e3)
    u0 = jnp.array([20.0, 20.0])
    plain = solver(lotka_volterra, None)
    stopping = solver(lotka_volterra, [1.0])
    one, other = (made.solve(u0, 0.0, 2.0, data=data) for made in (plain, stopping))
    # what is behind a stop is not what is behind a datum, but no less right
    assert np.all(one.std != other.std)
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)


def test_a_start_and_an_end_at_a_stop():
    def field(t, u, args):
        return jnp.where((t > 0.0) & (t < 1.0), 1.0, 100.0) - 0 * u

    solution = solver(field, [0.0, 1.0]).solve(0.0, 0.0, 1.0)
    np.testing.assert_allclose(solution.mean, [1.0], rtol=1e-12)
    # a sum of round-off where the start is meant
    solution = solver(field, [0.0, 1.0]).solve(0.0, 1e-17, 1.0 - 1e-16)
    np.testing.assert_allclose(solution.mean, [1.0], rtol=1e-12)


def test_not_for_an_algebra_of_its_own():
    made = po.Solver(
        po.IWP(2),
        po.TS1(po.ODE(lotka_volterra)),
        factorisation=po.Subspace(jnp.eye(2, 1)),
        controller=po.IntegralController(stop_at=[0.5]),
    )
    with pytest.raises(ValueError, match=r"stop_at is not available under Subspace\(\): use Dense"):
        made.solve(jnp.ones(2), 0.0, 1.0)


@pytest.mark.thorough
@pytest.mark.parametrize("constraint", first_of(po.SLR0, po.SLR1))
def test_ensembles_and_uncertain_starts(constraint):
    def field(t, u, tau):
        return -jnp.where(t < tau, 1.2, 0.1) * u

    made = solver(field, [0.5], constraint=constraint, prior=po.IWP(3))
    decay = np.exp(-0.6 - 0.15)
    lanes = po.solve_ensemble(made, jnp.array([1.0, 2.0, 3.0]), 0.0, 2.0, args=0.5)
    np.testing.assert_allclose(lanes.mean[:, 0], decay * np.array([1.0, 2.0, 3.0]), rtol=1e-6)
    uncertain = made.solve(po.Normal(1.0, 0.1), 0.0, 2.0, args=0.5)
    np.testing.assert_allclose(uncertain.std[0], 0.1 * decay, rtol=1e-5)
