"""Events: where they are found, resets, what ends a solve; against closed forms."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from tests.helpers import first_of, left_to_nox


GRAVITY, LOSS = 9.81, 0.8
TIGHT = po.IntegralController(rtol=1e-9, atol=1e-11)


def fall(t, u, args):
    return {"x": u["v"], "v": jnp.full_like(u["v"], -GRAVITY)}


def swing(t, u, args):
    return jnp.stack([u[1], -u[0]])


def bounce(t, u, args):
    return {"x": u["x"], "v": -LOSS * u["v"]}


GROUND = po.Event(lambda t, u, args: u["x"], direction=-1)
BOUNCE = po.Event(lambda t, u, args: u["x"], direction=-1, reset=bounce)
LEVEL = po.Event(lambda t, u, args: u[0] - args, terminal=False)


def impacts(number, height=1.0):
    """The times at which a ball hits the ground that falls from a height."""
    first = np.sqrt(2 * height / GRAVITY)
    return np.asarray([first * (1 + 2 * sum(LOSS**j for j in range(1, k + 1))) for k in range(number)])


def ball_at(t):
    """The position of the ball that falls from a height of one."""
    ts = impacts(20)
    k = int(np.sum(ts <= t))
    if k == 0:
        return 1 - GRAVITY * t**2 / 2
    speed = np.sqrt(2 * GRAVITY) * LOSS**k
    return speed * (t - ts[k - 1]) - GRAVITY * (t - ts[k - 1]) ** 2 / 2


def solver(field=fall, nu=3, constraint=po.TS1, order=1, controller=TIGHT, **parts):
    return po.Solver(po.IWP(nu), constraint(po.ODE(field, order=order)), controller=controller, **parts)


START = {"x": jnp.asarray(1.0), "v": jnp.asarray(0.0)}


@pytest.mark.parametrize(
    ("factorisation", "constraint", "strategy"),
    [
        (po.Dense(), po.TS1, po.FixedIntervalSmoother()),
        *left_to_nox(
            (po.BlockDiagonal(), po.TS0, po.FixedPointSmoother()),
            (po.Dense(), po.TS0, po.FixedPointSmoother()),
            (po.Dense(), po.TS1, po.Filter()),
            (po.BlockDiagonal(), po.TS1, po.FixedIntervalSmoother()),
            (po.BlockDiagonal(), po.TS0, po.Filter()),
        ),
    ],
)
def test_a_bouncing_ball(factorisation, constraint, strategy):
    ts = jnp.linspace(0.1, 2.2, 15)
    parts = {"factorisation": factorisation, "constraint": constraint, "strategy": strategy}
    solution = solver(**parts).solve(START, 0.0, 2.3, events=BOUNCE, save_at=po.SaveAt(ts=ts, t1=True))
    events, expected = solution.events, impacts(4)
    assert solution.result == po.Result.successful and events.count == 4
    np.testing.assert_allclose(events.t[:4], expected, rtol=1e-13)
    speeds = np.sqrt(2 * GRAVITY) * LOSS ** np.arange(4)
    np.testing.assert_allclose(events.mean["v"][:4], -speeds, rtol=1e-12)
    np.testing.assert_allclose(events.mean_after["v"][:4], LOSS * speeds, rtol=1e-12)
    np.testing.assert_allclose(events.mean["x"][:4], 0, atol=1e-14)
    np.testing.assert_allclose(solution.mean["x"], [ball_at(t) for t in [*ts, 2.3]], atol=1e-12)
    assert np.all(np.isnan(events.t[4:])) and np.all(np.asarray(events.which[4:]) == -1)


@pytest.mark.thorough
def test_output_is_continuous_from_the_right():
    ball = solver(strategy=po.FixedIntervalSmoother())
    for height in (0.7, 1.3, 1.9):
        solution = ball.solve({"x": height, "v": 0.0}, 0.0, 2.0, events=BOUNCE)
        at = solution.evaluate(solution.events.t[: int(solution.events.count)])
        assert np.all(np.asarray(at.mean["v"]) > 0)
    solution = ball.solve(START, 0.0, 1.0, events=BOUNCE)
    t, speed = solution.events.t[0], np.sqrt(2 * GRAVITY)
    assert abs(float(solution.evaluate(t).mean["v"]) - LOSS * speed) < 1e-9
    assert abs(float(solution.evaluate(t - 1e-9).mean["v"]) + speed) < 1e-6
    draws = solution.sample(jax.random.key(0), (3,), ts=jnp.asarray([0.4, 0.5]))
    np.testing.assert_allclose(draws["x"], jnp.asarray([[ball_at(0.4), ball_at(0.5)]] * 3), atol=1e-7)


@pytest.mark.thorough
def test_a_second_order_equation():
    ball = solver(lambda t, u, du, args: jnp.full_like(u, -GRAVITY), order=2)
    event = po.Event(lambda t, u, du, args: u, direction=-1, reset=lambda t, u, du, args: (u, -LOSS * du))
    solution = ball.solve((1.0, 0.0), 0.0, 2.3, events=event)
    np.testing.assert_allclose(solution.events.t[:4], impacts(4), rtol=1e-13)
    np.testing.assert_allclose(solution.mean[-1], ball_at(2.3), atol=1e-12)
    top = po.Event(lambda t, u, du, args: du, direction=-1, terminal=2)
    solution = ball.solve((1.0, 3.0), 0.0, 2.3, events=[event, top])
    assert solution.result == po.Result.event
    np.testing.assert_allclose(solution.events.t[0], 3 / GRAVITY, rtol=1e-12)
    assert list(np.asarray(solution.events.which[:4])) == [1, 0, 1, -1]


@pytest.mark.parametrize("forward", first_of(True, False))
def test_all_crossings_of_an_oscillator_in_both_directions(forward):
    level, end = 0.3, 10.0 if forward else -10.0
    up = po.Event(lambda t, u, args: u[0] - args, direction=1, terminal=False)
    solution = solver(swing, nu=5).solve(jnp.asarray([1.0, 0.0]), 0.0, end, args=level, events={"all": LEVEL, "up": up})
    w = np.arccos(level)
    expected = np.asarray([w, 2 * np.pi - w, 2 * np.pi - w, 2 * np.pi + w])
    np.testing.assert_allclose(solution.events.t[:4], np.sign(end) * expected, atol=2e-8)
    assert list(np.asarray(solution.events.which[:5])) == [0, 0, 1, 0, -1]


@pytest.mark.thorough
def test_every_root_in_one_long_step():
    """A cubic that one step crosses: all three roots, although the ends have opposite signs."""
    value = lambda t: (t + 6) * (t + 2) * (t - 2)  # noqa: E731
    cubic = solver(lambda t, u, args: 3 * t**2 + 12 * t - 4 + 0 * u)
    event = po.Event(lambda t, u, args: u, terminal=False)
    solution = cubic.solve(value(-8.0), -8.0, 4.0, events=event, dt0=12.0)
    np.testing.assert_allclose(solution.events.t[:3], [-6, -2, 2], atol=1e-12)
    assert solution.events.count == 3
    downwards = po.Event(lambda t, u, args: u, direction=-1)
    solution = cubic.solve(value(-8.0), -8.0, 4.0, events=downwards, dt0=12.0)
    np.testing.assert_allclose(solution.t, [-2.0], atol=1e-12)


def test_the_earliest_event_of_a_step_wins_not_the_first_of_the_list():
    line = solver(lambda t, u, args: jnp.ones_like(u))
    late, early = (po.Event(lambda t, u, args, level=level: u - level) for level in (0.7, 0.4))
    solution = line.solve(0.0, 0.0, 1.0, events=[late, early], dt0=1.0)
    assert solution.events.which[0] == 1
    np.testing.assert_allclose(solution.t, [0.4], rtol=1e-14)


@pytest.mark.thorough
def test_events_at_one_time_all_happen():
    """Both, in the order of the list, with both resets."""
    line = solver(lambda t, u, args: jnp.ones_like(u))
    event = lambda i: po.Event(  # noqa: E731
        lambda t, u, args: u[i] - 0.5, reset=lambda t, u, args: u.at[i].set(0.0)
    )
    solution = line.solve(jnp.zeros(2), 0.0, 0.75, events=[event(0), event(1)])
    np.testing.assert_allclose(solution.events.t[:2], 0.5, rtol=1e-14)
    assert list(np.asarray(solution.events.which[:3])) == [0, 1, -1]
    np.testing.assert_allclose(solution.mean[-1], 0.25, rtol=1e-13)


def test_a_root_at_the_start_or_behind_a_reset_does_not_happen():
    level = 0.3
    u0 = jnp.asarray([level, -np.sqrt(1 - level**2)])
    solution = solver(swing, nu=5).solve(u0, 0.0, 10.0, args=level, events=LEVEL)
    w = np.arccos(level)
    np.testing.assert_allclose(solution.events.t[:2], [2 * np.pi - 2 * w, 2 * np.pi], atol=2e-8)
    assert solution.events.count == 2


@pytest.mark.thorough
def test_a_clock_that_starts_on_its_surface_a_thousand_times():
    """Every reset ends where the function is zero but for round-off."""
    tick = po.Event(lambda t, u, args: jnp.sin(jnp.pi * u), direction=-1, reset=lambda t, u, args: u - 1.0)
    clock = solver(lambda t, u, args: jnp.ones_like(u), loop=po.BoundedLoop(16_384))
    solution = clock.solve(0.0, 0.0, 1000.5, events=tick, max_events=1001)
    assert solution.events.count == 1000
    np.testing.assert_allclose(solution.events.t[:1000], np.arange(1, 1001), rtol=1e-12)


@pytest.mark.parametrize("loss", first_of(0.5, 0.3, 0.7))
@pytest.mark.thorough
def test_a_ball_that_comes_to_rest_ends_with_a_code(loss):
    """Infinitely many bounces in finite time: it must not fall through the floor."""
    back = po.Event(
        lambda t, u, args: u["x"], direction=-1, reset=lambda t, u, args: {"x": u["x"], "v": -loss * u["v"]}
    )
    solution = solver().solve(START, 0.0, 5.0, events=back, max_events=200, throw=False)
    assert solution.result == po.Result.max_events_reached
    limit = np.sqrt(2 / GRAVITY) * (1 + loss) / (1 - loss)
    np.testing.assert_allclose(solution.state.t, limit, rtol=1e-11)
    with pytest.raises(RuntimeError, match="more events happened than max_events"):
        solver().solve(START, 0.0, 5.0, events=back, max_events=3)


@pytest.mark.thorough
def test_how_many_occurrences_end_a_solve():
    solution = solver().solve(
        START,
        0.0,
        5.0,
        events=po.Event(BOUNCE.g, direction=-1, reset=bounce, terminal=3),
        save_at=po.SaveAt(steps=True),
    )
    assert solution.result == po.Result.event and solution.events.count == 3
    # The reset has been made.
    np.testing.assert_allclose(solution.mean["v"][-1], np.sqrt(2 * GRAVITY) * LOSS**3, rtol=1e-12)
    np.testing.assert_allclose(solution.t[-1], impacts(3)[-1], rtol=1e-13)


def test_a_terminal_event_is_a_success():
    ts = jnp.linspace(0.1, 1.0, 10)
    solution = solver(strategy=po.FixedPointSmoother()).solve(
        START, 0.0, 5.0, events=GROUND, save_at=po.SaveAt(ts=ts, t1=True)
    )
    end = impacts(1)[0]
    assert solution.result == po.Result.event
    np.testing.assert_allclose(solution.t[-1], end, rtol=1e-13)
    reached = np.asarray(ts) < end
    np.testing.assert_allclose(solution.mean["x"][:-1][reached], [ball_at(t) for t in ts[reached]], atol=1e-12)
    assert np.all(np.isnan(solution.mean["x"][:-1][~reached]))
    np.testing.assert_allclose(solution.mean["v"][-1], -np.sqrt(2 * GRAVITY), rtol=1e-12)
    # The solve goes on from there, and the same event does not happen again.
    further = solver().solve(solution.state, solution.state.t, 1.0, events=GROUND)
    assert further.result == po.Result.successful and further.events.count == 0
    np.testing.assert_allclose(further.mean["x"][-1], 1 - GRAVITY / 2, rtol=1e-11)


@pytest.mark.thorough
def test_an_event_of_a_mean_that_is_not_polynomial_is_as_accurate_as_the_solve():
    """The state at the event is that of a step which ends there, not of an interpolation."""
    event = po.Event(lambda t, u, args: u - 0.5)
    solution = solver(lambda t, u, args: -u, nu=4).solve(1.0, 0.0, 9.0, events=event)
    assert abs(float(solution.t[0]) - np.log(2)) < 1e-9
    assert abs(float(solution.mean[0]) - 0.5) < 1e-15


@pytest.mark.thorough
def test_known_times():
    rate, amount, ts = 0.5, 2.0, np.asarray([1.0, 2.0, 3.5])
    doses = po.Event(ts, reset=lambda t, u, args: u + amount)
    decay = solver(lambda t, u, args: -rate * u, nu=4)
    solution = decay.solve(1.0, 0.0, 5.0, events=doses)
    expected = np.exp(-5 * rate) + amount * np.sum(np.exp(-rate * (5 - ts)))
    np.testing.assert_allclose(solution.mean[-1], expected, rtol=1e-8)
    np.testing.assert_array_equal(solution.events.t[:3], ts)
    np.testing.assert_allclose(solution.events.mean_after[:3] - solution.events.mean[:3], amount, rtol=1e-14)
    assert np.all(np.asarray(solution.events.t_std[:3]) == 0)
    # Times outside of the interval do not occur, and without a reset nothing ends.
    solution = decay.solve(1.0, 0.0, 3.0, events=po.Event([-1.0, 2.0, 7.0]))
    assert solution.result == po.Result.successful and solution.events.count == 1
    # The second occurrence ends the solve; a dose at the end is taken.
    assert decay.solve(1.0, 0.0, 3.0, events=po.Event([1.0, 2.0], terminal=2)).t[-1] == 2.0
    at_end = decay.solve(1.0, 0.0, 1.0, events=doses)
    np.testing.assert_allclose(at_end.mean[-1], np.exp(-rate) + amount, rtol=1e-8)


@pytest.mark.thorough
def test_known_times_and_functions_together():
    rate = 1.0
    dose = po.Event([0.5, 1.0], reset=lambda t, u, args: u + 1.0)
    low = po.Event(lambda t, u, args: u - 0.7, terminal=False)
    solution = solver(lambda t, u, args: -rate * u, nu=4).solve(1.0, 0.0, 1.2, events=(low, dose))
    first, second = np.log(1 / 0.7), 0.5 + np.log((np.exp(-0.5) + 1) / 0.7)
    np.testing.assert_allclose(solution.events.t[:4], [first, 0.5, 1.0, np.nan], rtol=1e-8)
    assert second > 1.0


@pytest.mark.thorough
def test_ensembles_and_lanes_have_their_own_events():
    heights = jnp.asarray([0.5, 1.0, 2.0, 40.0])
    ball = solver(controller=po.IntegralController(rtol=1e-6, atol=1e-8))
    starts = {"x": heights, "v": jnp.zeros(4)}
    lanes = jax.vmap(lambda u0: ball.solve(u0, 0.0, 2.3, events=BOUNCE).events)(starts)
    ensemble = po.solve_ensemble(ball, starts, 0.0, 2.3, events=BOUNCE).events
    for events in (lanes, ensemble):
        assert list(np.asarray(events.count)) == [7, 4, 2, 0]
        for i, h in enumerate([0.5, 1.0, 2.0]):
            n = int(events.count[i])
            np.testing.assert_allclose(events.t[i, :n], impacts(n, h), rtol=1e-12)


@pytest.mark.thorough
def test_single_precision():
    decay = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: -u)), controller=po.IntegralController(1e-5, 1e-6))
    solution = decay.solve(jnp.float32(1.0), 0.0, 9.0, events=po.Event(lambda t, u, args: u - 0.5))
    assert solution.events.t.dtype == jnp.float32
    assert abs(float(solution.t[0]) - np.log(2)) < 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize(
    "parts",
    [
        {"factorisation": po.Isotropic(), "constraint": po.TS0},
        {"factorisation": po.Modal()},
        *left_to_nox({"factorisation": po.Blocks({"x": 0, "v": 1})}),
    ],
)
def test_factorisations_without_resets_have_events(parts):
    solution = solver(**parts).solve(START, 0.0, 5.0, events=GROUND)
    np.testing.assert_allclose(solution.t, impacts(1), rtol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "parts",
    first_of(
        {"calibration": po.MLECalibration()},
        {"calibration": po.LeaveOneOutCalibration(), "strategy": po.FixedIntervalSmoother()},
        {"initialisation": po.Diffuse(1)},
        {"initialisation": po.Diffuse(1), "strategy": po.FixedIntervalSmoother()},
        {"loop": po.CheckpointedLoop()},
    ),
)
def test_other_parts(parts):
    rate = 0.7
    oscillator = lambda t, u, args: {"x": u["v"], "v": -(rate**2) * u["x"]}  # noqa: E731
    ball = solver(oscillator, nu=4, controller=po.IntegralController(rtol=1e-7, atol=1e-8), **parts)
    solution = ball.solve(START, 0.0, 8.0, events=BOUNCE)
    expected = (np.pi / 2 + np.pi * np.arange(2)) / rate
    np.testing.assert_allclose(solution.events.t[:2], expected, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "parts", [{"factorisation": po.BlockDiagonal()}, {"constraint": ft.partial(po.TS0, evaluations=3)}]
)
def test_lifted_equations(parts):
    options = {"factorisation": po.BlockDiagonal(), "constraint": ft.partial(po.TS0, evaluations=3)} | parts
    constraint = options.pop("constraint")(po.ODE(fall).lifted(3))
    ball = po.Solver(po.IWP(4), constraint, controller=TIGHT, **options)
    solution = ball.solve(START, 0.0, 2.3, events=BOUNCE)
    np.testing.assert_allclose(solution.events.t[:4], impacts(4), rtol=1e-13)
    np.testing.assert_allclose(solution.mean["x"][-1], ball_at(2.3), atol=1e-12)


STEEP = {
    "kink": lambda t, u, args: jnp.where(u < 0.5, 100 * (u - 0.5), 0.01 * (u - 0.5)),
    "other kink": lambda t, u, args: jnp.where(u < 0.5, 0.01 * (u - 0.5), 100 * (u - 0.5)),
    "cubic root": lambda t, u, args: jnp.cbrt(u - 0.5),
    "jump": lambda t, u, args: jnp.where(u > 0.5, 3.0, -1.0),
}


@pytest.mark.parametrize("kind", first_of(*reversed(STEEP)))
def test_functions_that_no_polynomial_is_close_to(kind):
    """The time between two signs is halved; of one that jumps the time is known, but not how sure it is."""
    line = solver(lambda t, u, args: jnp.ones_like(u), controller=po.IntegralController(1e-6, 1e-8))
    solution = line.solve(0.0, 0.0, 1.0, events=po.Event(STEEP[kind], terminal=False))
    assert solution.events.count == 1 and solution.stats["num_steps"] < 200
    np.testing.assert_allclose(solution.events.t[0], 0.5, atol=1e-12)
    assert kind != "jump" or np.isinf(solution.events.t_std[0])


@pytest.mark.thorough
def test_a_function_that_oscillates_within_a_step():
    """The covariance is that of a solve without events: no step is so short that its round-off counts."""
    line = solver(lambda t, u, args: jnp.ones_like(u), nu=4, controller=po.IntegralController(1e-3, 1e-3))
    event = po.Event(lambda t, u, args: jnp.sin(40 * u), terminal=False)
    solution = line.solve(0.0, 0.0, 2.0, events=event, dt0=2.0)
    np.testing.assert_allclose(solution.events.t[:25], np.pi / 40 * np.arange(1, 26), rtol=1e-12)
    assert solution.events.count == 25 and np.all(np.asarray(solution.events.t_std[:25]) < 1e-12)


@pytest.mark.thorough
def test_data_that_move_the_solution_across_zero():
    """The time is that of the datum, and nothing tells how sure it is."""
    line = po.Solver(
        po.IWP(2, output_scale=3.0),
        po.TS1(po.ODE(lambda t, u, args: -0.5 * jnp.ones_like(u))),
        calibration=po.NoCalibration(),
        controller=po.IntegralController(1e-4, 1e-4),
    )
    data = po.Observations([0.8], jnp.asarray([-1.0]), 0.01)
    event = po.Event(lambda t, u, args: u - 0.2, terminal=False)
    solution = line.solve(1.0, 0.0, 3.0, events=event, data=data)
    assert solution.events.count == 1
    np.testing.assert_allclose(solution.events.t[0], 0.8, rtol=1e-9)


@pytest.mark.thorough
def test_an_event_that_only_watches_does_not_change_a_reset_at_the_same_time():
    line = solver(lambda t, u, args: jnp.ones_like(u))
    watch = po.Event(lambda t, u, args: u[0] - 0.5, terminal=False)
    known = po.Event([0.5], reset=lambda t, u, args: u * jnp.asarray([2.0, 0.5]))
    end = lambda u0: line.solve(u0, 0.0, 0.75, events=[watch, known]).mean[-1]  # noqa: E731
    jacobian = jax.jit(jax.jacfwd(end))(jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose(jacobian, [[2, 0], [0, 0.5]], atol=1e-12)


@pytest.mark.thorough
def test_a_solve_that_goes_on_with_other_parameters_has_other_events():
    osc = solver(swing, nu=5)
    first = osc.solve(jnp.asarray([1.0, 0.0]), 0.0, 2.0, args=0.3, events=LEVEL)
    for level in (0.9, -0.9):
        further = osc.solve(first.state, 2.0, 4.0, args=level, events=LEVEL)
        expected = np.asarray([np.pi - np.arccos(0.9), np.pi + np.arccos(0.9)]) if level < 0 else np.zeros(0)
        assert int(further.events.count) == len(expected)
        np.testing.assert_allclose(further.events.t[: len(expected)], expected, atol=1e-7)


@pytest.mark.thorough
def test_a_function_that_is_not_a_number_ends_the_solve():
    line = solver(lambda t, u, args: -jnp.ones_like(u))
    event = po.Event(lambda t, u, args: jnp.log(u) + 5.0)
    solution = line.solve(1.0, 0.0, 0.9, events=event, throw=False)
    assert solution.result == po.Result.successful
    solution = line.solve(1.0, 0.0, 2.0, events=po.Event(lambda t, u, args: jnp.log(u) - 5.0), throw=False)
    assert solution.result == po.Result.nonfinite


@pytest.mark.thorough
def test_a_reset_to_infinity_ends_the_solve():
    line = solver(lambda t, u, args: jnp.ones_like(u))
    event = po.Event(lambda t, u, args: u - 0.5, reset=lambda t, u, args: u / 0)
    assert line.solve(0.0, 0.0, 1.0, events=event, throw=False).result == po.Result.nonfinite


@pytest.mark.thorough
def test_steps_are_those_without_events_where_none_happens():
    never = po.Event(lambda t, u, args: u["x"] - 100.0)
    ball = solver(controller=po.IntegralController(rtol=1e-6, atol=1e-8))
    with_it, without = (ball.solve(START, 0.0, 2.0, **kw) for kw in ({"events": never}, {}))
    assert with_it.stats["num_steps"] == without.stats["num_steps"]
    np.testing.assert_allclose(with_it.mean["x"], without.mean["x"], rtol=1e-14)
    assert with_it.events.count == 0 and np.all(np.isnan(with_it.events.t))
