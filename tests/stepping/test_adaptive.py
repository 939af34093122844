"""The adaptive loop: which times are kept, which steps are taken, how it ends."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import equations, first_of, left_to_nox, lotka_volterra, name


U0 = jnp.array([20.0, 20.0])


def make(constraint=po.TS1, factorisation=po.Dense(), nu=3, loop=po.BoundedLoop(256), field=lotka_volterra, **control):
    control = {"rtol": 1e-5, "atol": 1e-7} | control
    return po.Solver(
        po.IWP(nu),
        constraint(po.ODE(field)),
        factorisation=factorisation,
        controller=po.IntegralController(**control),
        loop=loop,
    )


# --- what is kept ---


def test_rows_and_shapes():
    solver = make()
    ts = np.array([0.0, 0.7, 0.7, 2.0])
    everything = solver.solve(U0, 0.0, 2.0, save_at=po.SaveAt(t0=True, ts=ts, t1=True))
    np.testing.assert_array_equal(everything.t, [0.0, *ts, 2.0])
    assert everything.mean.shape == everything.std.shape == (6, 2)
    np.testing.assert_array_equal(everything.mean[:2], jnp.stack([U0, U0]))
    np.testing.assert_array_equal(everything.mean[2], everything.mean[3])
    np.testing.assert_array_equal(everything.mean[4], everything.mean[5])
    end = solver.solve(U0, 0.0, 2.0)
    assert end.t.shape == (1,) and end.mean.shape == (1, 2) and end.output_scale.shape == (1,)
    np.testing.assert_array_equal(end.mean[0], everything.mean[-1])
    assert end.marginals.mean.shape == (1, 8, 1) and end.marginals.factor.shape == (1, 8, 8)


def test_save_times_never_change_the_steps():
    solver = make()
    end = solver.solve(U0, 0.0, 2.0)
    for save_at in (np.linspace(0, 2, 41), po.SaveAt(t0=True, steps=True), po.SaveAt(t0=True, t1=True)):
        other = solver.solve(U0, 0.0, 2.0, save_at=save_at)
        np.testing.assert_array_equal(other.mean[-1], end.mean[0])
        assert other.stats["num_steps"] == end.stats["num_steps"]


@pytest.mark.parametrize("strategy", [po.Filter(), po.FixedPointSmoother(), po.FixedIntervalSmoother()], ids=name)
def test_the_loop_carries_few_arrays(strategy):
    # Each is an operation more in every iteration, and ten of them at once wake another thread.
    solver = eqx.tree_at(lambda s: s.strategy, make(loop=po.ForwardLoop(256)), strategy)
    program = jax.make_jaxpr(lambda u0: solver.solve(u0, 0.0, 2.0, save_at=[0.5, 1.0], throw=False).mean)(U0)
    loops = [equation for equation in equations(program.jaxpr) if equation.primitive.name == "while"]
    assert max(len(loop.outvars) for loop in loops) <= 10


@pytest.mark.parametrize(("levels", "uncertain"), [(2, False), *left_to_nox((0, False), (0, True), (2, True))])
def test_a_state_has_all_its_numbers(levels, uncertain):
    """Only the prior of a family is in some states alone."""
    ode = po.ODE(lotka_volterra)
    constraint, start = po.TS0(ode.lifted(levels)) if levels else po.TS1(ode), jnp.array([20.0, 20.0])
    if uncertain:
        start = po.Normal(start, jnp.ones(2))
    state = po.Solver(po.IWP(3), constraint).solve(start, 0.0, 0.1).state.current
    missing = {field.name for field in dataclasses.fields(state) if getattr(state, field.name) is None}
    # What a calibration collects is its own business, and may be nothing.
    assert missing <= {"prior", "statistics"}
    assert po.Solver(po.RelativeScale(po.IWP(3)), po.TS1(ode)).init(jnp.ones(2), 0.0).prior is not None


def test_steps_are_kept_and_padded():
    solver = make(loop=po.BoundedLoop(100))
    solution = solver.solve(U0, 0.0, 2.0, save_at=po.SaveAt(t0=True, steps=True))
    n = int(solution.stats["num_accepted_steps"])
    assert solution.t.shape == (101,)
    assert solution.t[0] == 0 and solution.t[n] == 2.0 and np.all(np.diff(solution.t[: n + 1]) > 0)
    np.testing.assert_array_equal(solution.t[n:], 2.0)
    np.testing.assert_array_equal(solution.mean[n:], jnp.broadcast_to(solution.mean[n], solution.mean[n:].shape))
    # the same steps, unconditionally
    grid = solver.solve_grid(U0, solution.t[: n + 1])
    np.testing.assert_allclose(grid.mean, solution.mean[: n + 1], rtol=1e-12)
    np.testing.assert_allclose(grid.output_scale, solution.output_scale[: n + 1], rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", first_of(po.BlockDiagonal(), po.Dense(), po.Isotropic()), ids=name)
def test_between_steps_the_filter_predicts_from_the_left(factorisation):
    solver = make(po.TS0, factorisation)
    steps = solver.solve(U0, 0.0, 2.0, save_at=po.SaveAt(t0=True, steps=True))
    n = int(steps.stats["num_accepted_steps"])
    k = n // 2
    t = 0.3 * float(steps.t[k]) + 0.7 * float(steps.t[k + 1])
    inside = solver.solve(U0, 0.0, 2.0, save_at=[t, float(steps.t[k + 1])])
    h = t - float(steps.t[k])
    taylor = sum(steps.derivative(j).mean[k] * h**j / [1, 1, 2, 6][j] for j in range(4))
    np.testing.assert_allclose(inside.mean[0], taylor, rtol=1e-12)
    np.testing.assert_allclose(inside.mean[1], steps.mean[k + 1], rtol=1e-12)
    np.testing.assert_allclose(inside.std[1], steps.std[k + 1], rtol=1e-9)
    # variance: A P A^T + s^2 Q by hand, with the scale of the step that holds the time
    scale = np.broadcast_to(np.asarray(steps.output_scale[k + 1]), (2,))
    a = np.array([1, h, h**2 / 2, h**3 / 6])
    for i in range(2):
        factor = np.asarray(steps.marginals.factor[k])
        if isinstance(factorisation, po.Dense):
            factor = factor[:, i::2]
        elif isinstance(factorisation, po.BlockDiagonal):
            factor = factor[i]
        variance = np.sum((factor @ a) ** 2) + scale[i] ** 2 * h**7 / (7 * 36)
        np.testing.assert_allclose(inside.std[0, i], np.sqrt(variance), rtol=1e-9)
    np.testing.assert_allclose(inside.output_scale[0], steps.output_scale[k + 1])


def test_the_loops_take_the_same_steps():
    ts = np.linspace(0.1, 1.9, 5)
    solutions = [
        make(loop=loop).solve(U0, 0.0, 2.0, save_at=ts)
        for loop in (po.BoundedLoop(256), po.CheckpointedLoop(256), po.ForwardLoop(256))
    ]
    for other in solutions[1:]:
        np.testing.assert_allclose(other.mean, solutions[0].mean, rtol=1e-10)
        assert other.stats["num_steps"] == solutions[0].stats["num_steps"]


def test_lanes_are_independent():
    solver = make()
    u0s = jnp.array([[20.0, 20.0], [5.0, 1.0], [60.0, 2.0]])
    ts = np.array([0.4, 1.1, 2.0])
    lanes = jax.vmap(lambda u0: solver.solve(u0, 0.0, 2.0, save_at=ts))(u0s)
    assert lanes.mean.shape == lanes.std.shape == (3, 3, 2)
    assert len(set(np.asarray(lanes.stats["num_steps"]).tolist())) > 1
    for i, u0 in enumerate(u0s):
        alone = solver.solve(u0, 0.0, 2.0, save_at=ts)
        np.testing.assert_allclose(lanes.mean[i], alone.mean, rtol=1e-9)
        assert lanes.stats["num_steps"][i] == alone.stats["num_steps"]


def test_everything_can_be_swept():
    # tolerances, output scale, times and dt0 are arrays: one vmap, no recompilation
    def end(rtol, scale, t1, dt0):
        solver = po.Solver(
            po.IWP(2, output_scale=scale), po.TS0(po.ODE(lotka_volterra)), controller=po.IntegralController(rtol, 1e-6)
        )
        return solver.solve(U0, 0.0, t1, dt0=dt0).stats["num_steps"]

    steps = jax.vmap(end)(jnp.array([1e-3, 1e-5]), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]), jnp.array([0.1, 0.1]))
    assert steps[0] < steps[1]


# --- which steps ---


def test_tolerances_control_the_error():
    exact = make(rtol=1e-11, atol=1e-11, nu=5, loop=po.ForwardLoop()).solve(U0, 0.0, 5.0).mean
    errors = []
    for rtol in (1e-3, 1e-5, 1e-7):
        solution = make(rtol=rtol, atol=rtol, loop=po.ForwardLoop()).solve(U0, 0.0, 5.0)
        errors.append(float(jnp.max(jnp.abs(solution.mean - exact))) / 20)
    assert errors[0] < 1e-2 and errors[1] < 1e-4 and errors[2] < 1e-6


def test_bounds_on_the_step():
    solution = make(dt_max=0.05, loop=po.BoundedLoop(256)).solve(
        U0, 0.0, 2.0, dt0=1.0, save_at=po.SaveAt(t0=True, steps=True)
    )
    n = int(solution.stats["num_accepted_steps"])
    assert n >= 40 and np.max(np.diff(solution.t[: n + 1])) < 0.05 + 1e-12
    failed = make(dt_min=0.5, rtol=1e-9).solve(U0, 0.0, 2.0, throw=False)
    assert failed.result == po.Result.step_size_too_small


def test_stops_are_hit():
    stops = jnp.array([1.3, 0.4, 1.9999999999999999, 7.0, -1.0])
    solution = make(stop_at=stops).solve(U0, 0.0, 2.0, save_at=po.SaveAt(t0=True, steps=True))
    t = np.asarray(solution.t)
    assert 0.4 in t and 1.3 in t
    n = int(solution.stats["num_accepted_steps"])
    assert np.min(np.diff(t[: n + 1])) > 1e-6  # no slivers
    back = make(stop_at=stops).solve(U0, 2.0, 0.0, save_at=po.SaveAt(steps=True))
    assert 0.4 in np.asarray(back.t) and 1.3 in np.asarray(back.t)


@pytest.mark.thorough
@pytest.mark.parametrize("direction", [1, -1])
def test_two_equal_steps_go_to_a_datum(direction):
    # No step has an error, so each is as long as it may be.
    solver = make(po.TS0, nu=2, field=lambda t, u, args: jnp.ones_like(u), dt_max=0.1)
    data, steps = po.Observations([0.301 * direction], jnp.ones((1, 1)), 1.0), po.SaveAt(t0=True, steps=True)
    t = solver.solve(jnp.zeros(1), 0.0, 1.0 * direction, dt0=0.1, data=data, save_at=steps).t
    expected = [0, 0.1, 0.2, 0.2505, 0.301, 0.401, 0.501, 0.601, 0.701, 0.801, 0.9005, 1]
    np.testing.assert_allclose(t[: len(expected)] * direction, expected, rtol=1e-12)
    assert np.all(t[len(expected) :] == direction)


def test_a_jump_in_the_forcing():
    # u' = 1 for t < 1, then -1: with the stop the corner is exact
    def field(t, u, args):
        return jnp.where(t < 1.0, 1.0, -1.0) * jnp.ones_like(u)

    solver = make(po.TS0, nu=2, field=field, stop_at=jnp.array([1.0]), rtol=1e-6, atol=1e-8)
    assert abs(solver.solve(jnp.array([0.0]), 0.0, 2.0).mean[0, 0]) < 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", first_of(po.Dense(), po.BlockDiagonal(), po.Isotropic()), ids=name)
def test_nothing_to_see(factorisation):
    # constant field, zero start, no absolute tolerance: 0/0 lurks in scale, error and weight
    solver = make(po.TS0, factorisation, field=lambda t, u, args: 0 * u, rtol=1e-3, atol=0.0)
    solution = solver.solve(jnp.array([0.0, 1.0]), 0.0, 3.0, save_at=[1.0, 3.0])
    np.testing.assert_array_equal(solution.mean, [[0.0, 1.0], [0.0, 1.0]])
    np.testing.assert_array_equal(solution.std, 0)
    ramp = make(po.TS1, factorisation, field=lambda t, u, args: jnp.ones_like(u)).solve(jnp.zeros(2), 0.0, 3.0)
    np.testing.assert_allclose(ramp.mean, [[3.0, 3.0]], rtol=1e-12)
    assert np.all(np.isfinite(ramp.std))


# --- how it ends ---


def blow_up(t, u, args):
    return u**2


@pytest.mark.parametrize("constraint", first_of(po.TS1, po.TS0), ids=name)
def test_blow_up_ends_with_a_result(constraint):
    solver = make(constraint, field=blow_up, loop=po.ForwardLoop(4096))
    solution = solver.solve(jnp.array([1.0]), 0.0, 2.0, throw=False, save_at=po.SaveAt(ts=[0.5, 1.5], t1=True))
    assert solution.result in (po.Result.step_size_too_small, po.Result.nonfinite)
    assert abs(solution.mean[0, 0] - 2.0) < 1e-3
    assert np.isnan(solution.mean[1, 0])
    assert 0.99 < solution.t[-1] < 1.01 and np.isfinite(solution.mean[-1, 0])
    with pytest.raises(RuntimeError, match=r"t = (0\.99|1\.0)"):
        solver.solve(jnp.array([1.0]), 0.0, 2.0)


def test_not_a_number_is_rejected_and_named():
    solver = make(po.TS0, nu=2, field=lambda t, u, args: jnp.where(t > 0.5, jnp.nan, 1.0) * jnp.ones_like(u))
    solution = solver.solve(jnp.array([0.0]), 0.0, 1.0, throw=False)
    assert solution.result == po.Result.nonfinite
    assert abs(solution.t[0] - 0.5) < 1e-10 and abs(solution.mean[0, 0] - solution.t[0]) < 1e-10
    start = solver.solve(jnp.array([jnp.nan]), 0.0, 1.0, throw=False)
    assert start.result == po.Result.initial_state_nonfinite and start.t[0] == 0


@pytest.mark.thorough
def test_a_field_that_is_defined_on_one_side():
    # u = exp(-5 t) stays positive, the attempts of a low order do not
    def field(t, u, args):
        return jnp.where(u < 0, jnp.nan, -5 * u)

    solution = make(po.TS1, nu=1, field=field, rtol=1e-2, atol=1e-4).solve(jnp.array([1.0]), 0.0, 1.0, dt0=0.5)
    assert solution.stats["num_rejected_steps"] > 0
    np.testing.assert_allclose(solution.mean[0, 0], np.exp(-5), rtol=2e-2)
    # one component of many is enough to reject
    half = make(po.TS0, nu=2, field=lambda t, u, args: jnp.where(jnp.arange(3) * t > 1.0, jnp.nan, -u))
    stopped = half.solve(jnp.ones(3), 0.0, 1.0, throw=False)
    assert stopped.result == po.Result.nonfinite and abs(stopped.t[0] - 0.5) < 1e-9
    assert np.all(np.isfinite(stopped.mean)) and np.all(np.isfinite(stopped.std))


@pytest.mark.thorough
def test_too_few_steps():
    solver = make(loop=po.BoundedLoop(10))
    solution = solver.solve(U0, 0.0, 50.0, throw=False, save_at=po.SaveAt(ts=[1e-3, 49.0], t1=True))
    assert solution.result == po.Result.max_steps_reached
    assert solution.stats["num_steps"] == 10 == solution.stats["max_steps"]
    assert np.all(np.isfinite(solution.mean[0])) and np.all(np.isnan(solution.mean[1]))
    assert 0 < solution.t[-1] < 50
    with pytest.raises(RuntimeError, match="max_steps"):
        solver.solve(U0, 0.0, 50.0)
    # save times do not count as steps
    enough = make(loop=po.BoundedLoop(100))
    needed = enough.solve(U0, 0.0, 1.0).stats["num_steps"]
    exact = make(loop=po.BoundedLoop(int(needed)))
    assert exact.solve(U0, 0.0, 1.0, save_at=np.linspace(0, 1, 50)).result == po.Result.successful


@pytest.mark.thorough
def test_one_failing_lane():
    solver = make(po.TS1, field=blow_up, loop=po.BoundedLoop(512))
    lanes = jax.vmap(lambda u0: solver.solve(u0, 0.0, 0.9, throw=False))(jnp.array([[1.0], [2.0], [0.5]]))
    assert (lanes.result == po.Result.successful).tolist() == [True, False, True]
    alone = solver.solve(jnp.array([0.5]), 0.0, 0.9)
    np.testing.assert_allclose(lanes.mean[2], alone.mean, rtol=1e-12)


def test_errors_inside_jit():
    solver = make(po.TS0, field=blow_up, nu=2)
    with pytest.raises(Exception, match="stopped because"):
        jax.block_until_ready(eqx.filter_jit(lambda u0: solver.solve(u0, 0.0, 2.0).mean)(jnp.array([1.0])))


# --- compilation ---


def test_new_values_do_not_retrace():
    traces = []

    def field(t, u, args):
        traces.append(1)
        return -args["rate"] * u

    def solve(rate, u0, t1, rtol, scale, dt0, ts):
        solver = po.Solver(  # equal solvers, built anew
            po.IWP(2, output_scale=scale),
            po.TS1(po.ODE(field)),
            controller=po.IntegralController(rtol=rtol, atol=1e-6),
        )
        return solver.solve(u0, 0.0, t1, args={"rate": rate}, dt0=dt0, save_at=ts)

    solve(0.5, jnp.array([1.0]), 1.0, 1e-3, 1.0, 0.1, np.array([0.5]))
    first = len(traces)
    solve(0.7, jnp.array([2.0]), 2, 1e-4, 3, 0.2, jnp.array([0.6]))
    solve(np.float64(0.7), np.array([2.0]), jnp.asarray(3.0), np.float64(1e-4), jnp.asarray(3.0), 0.2, [0.6])
    assert len(traces) == first
    assert first < 20  # and the field is traced a few times only
