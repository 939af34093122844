"""Solutions and running states on disk, and going on from them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import first_of, lotka_volterra, name


U0 = jnp.array([20.0, 20.0])
STRATEGIES = (po.Filter(), po.FixedPointSmoother(), po.FixedIntervalSmoother())
strategies = pytest.mark.parametrize("strategy", first_of(*STRATEGIES[::-1]), ids=name)


def make(strategy, calibration):
    return po.Solver(
        po.IWP(3),
        po.TS1(po.ODE(lotka_volterra)),
        strategy=strategy,
        calibration=calibration,
        controller=po.PIController(1e-6, 1e-8),
        loop=po.BoundedLoop(128),
    )


def equal(a, b):
    a, b = jax.tree.leaves(eqx.filter(a, eqx.is_array)), jax.tree.leaves(eqx.filter(b, eqx.is_array))
    return len(a) == len(b) and all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


@pytest.mark.thorough
@strategies
def test_round_trip_of_a_solution(strategy, tmp_path):
    solver = make(strategy, po.MLECalibration())
    solution = solver.solve(U0, 0.0, 2.0, save_at=[0.5, 1.0])
    blank = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, solution)
    eqx.tree_serialise_leaves(tmp_path / "solution.eqx", solution)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "solution.eqx", blank)
    assert equal(loaded, solution)
    np.testing.assert_array_equal(loaded.mean, solution.mean)
    if not isinstance(strategy, po.Filter):
        key = jax.random.key(1)
        np.testing.assert_array_equal(loaded.sample(key, (3,)), solution.sample(key, (3,)))


@pytest.mark.thorough
@strategies
def test_going_on_from_disk_is_bit_equal(strategy, tmp_path):
    solver = make(strategy, po.MLECalibration())
    first = solver.solve(U0, 0.0, 1.0)
    blank = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, first.state)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", first.state)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", blank)
    ts = [1.5, 2.0]
    assert equal(solver.solve(loaded, 1.0, 2.0, save_at=ts), solver.solve(first.state, 1.0, 2.0, save_at=ts))


def stopping_at_one(solver):
    return eqx.tree_at(lambda s: s.controller.limits.stops, solver, jnp.array([1.0]))


@strategies
@pytest.mark.parametrize("calibration", first_of(po.DynamicCalibration(memory=0.5), po.NoCalibration()), ids=name)
@pytest.mark.thorough
def test_a_solve_with_a_stop_is_that_of_its_pieces(strategy, calibration):
    """The second one starts from the distribution of ``u`` with which the first one has ended."""
    solver = make(strategy, calibration)
    ts = [0.5, 1.0, 1.5, 2.0]
    whole = stopping_at_one(solver).solve(U0, 0.0, 2.0, save_at=ts)
    first = solver.solve(U0, 0.0, 1.0)
    factor = jnp.linalg.qr(first.marginals.factor[0, :, :2], mode="r")
    second = solver.solve(solver.initialise(po.Normal(first.mean[0], factor), 1.0), 1.0, 2.0, save_at=ts[1:])
    np.testing.assert_allclose(whole.mean[-1], second.mean[-1], rtol=1e-12)
    np.testing.assert_allclose(whole.std[-1], second.std[-1], rtol=1e-9)
    np.testing.assert_allclose(whole.mean[1:], second.mean, rtol=1e-12)
    np.testing.assert_allclose(whole.std[1:], second.std, rtol=1e-9)
    np.testing.assert_allclose(whole.log_likelihood, first.log_likelihood + second.log_likelihood, rtol=1e-9)
    steps = [s.stats["num_steps"] for s in (first, second, whole)]
    assert steps[0] + steps[1] == steps[2]


@pytest.mark.thorough
@strategies
@pytest.mark.parametrize("calibration", first_of(po.MLECalibration(), po.DynamicCalibration(memory=0.5)), ids=name)
def test_going_on_takes_the_steps_of_one_solve(strategy, calibration):
    # `stop_at` makes the single solve end a step where the first part ends, and start anew from there.
    solver = make(strategy, calibration)
    stopping = stopping_at_one(solver)
    whole = stopping.solve(U0, 0.0, 2.0)
    first = solver.solve(U0, 0.0, 1.0)
    second = stopping.solve(first.state, 1.0, 2.0)
    np.testing.assert_array_equal(second.mean, whole.mean)
    np.testing.assert_array_equal(second.std, whole.std)
    np.testing.assert_array_equal(second.output_scale, whole.output_scale)
    np.testing.assert_array_equal(second.log_likelihood, whole.log_likelihood)
    steps = [s.stats["num_accepted_steps"] for s in (first, second, whole)]
    assert steps[0] + steps[1] == steps[2]


@pytest.mark.thorough
def test_fixed_points_need_memory_for_themselves_alone():
    """The compiled program's temporary memory does not know how many steps there may be."""

    def memory(strategy, max_steps, times):
        solver = eqx.tree_at(lambda s: s.loop, make(strategy, po.NoCalibration()), po.ForwardLoop(max_steps))
        ts = np.linspace(0, 2, times)
        fn = jax.jit(lambda u0: solver.solve(u0, 0.0, 2.0, save_at=ts, throw=False).std)
        return fn.lower(U0).compile().memory_analysis().temp_size_in_bytes

    few = memory(po.FixedPointSmoother(), 100, 5)
    assert memory(po.FixedPointSmoother(), 100_000, 5) == few
    assert memory(po.FixedPointSmoother(), 100, 50) > 2 * few
    assert memory(po.FixedIntervalSmoother(), 10_000, 5) > 50 * few


@pytest.mark.parametrize("grid", first_of([1.0, 0.9, 0.8], [0.0, 0.1, 0.1], [0.0, 0.1, 0.2]))
def test_a_solve_goes_on_from_a_grid(grid):
    # With the length of its last step: backwards it was negative, of equal times zero.
    solver = make(po.Filter(), po.DynamicCalibration())
    kept = solver.solve_grid(U0, jnp.array(grid)).state
    t1 = grid[-1] + (0.5 if grid[-1] >= grid[0] else -0.5)
    solution = solver.solve(kept, kept.t, t1)
    exact = solver.solve(U0, grid[0], t1)
    np.testing.assert_allclose(solution.mean, exact.mean, rtol=1e-5)
    assert solution.stats["num_steps"] < exact.stats["num_steps"] + 10
    nowhere = solver.solve_grid(U0, jnp.zeros(2)).state
    with pytest.raises(ValueError, match=r"a grid of equal times.*pass dt0"):
        solver.solve(nowhere, 0.0, 0.5)
    np.testing.assert_allclose(
        solver.solve(nowhere, 0.0, 0.5, dt0=0.01).mean, solver.solve(U0, 0.0, 0.5).mean, rtol=1e-5
    )
