"""After ``throw=False`` nothing raises: a solution that has failed is NaN where it has not been."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import first_of, left_to_nox, name


KEY = jax.random.key(1)


def square(t, u, args):
    return u**2  # from 1 at time 0: 1 / (1 - t)


def solve(u0, strategy, t0=0.0, t1=2.0, ts=None):
    parts = {"strategy": strategy, "loop": po.ForwardLoop(150), "controller": po.IntegralController(1e-4, 1e-4)}
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(lambda t, u, args: square(t, u, args) * jnp.sign(t1 - t0))), **parts)
    return solver.solve(u0, t0, t1, save_at=po.SaveAt(ts=ts, dense=True), throw=False)


STRATEGIES = (po.FixedIntervalSmoother(), po.Filter())


@ft.cache
def failed(smooths, t1=2.0):
    return solve(1.0, STRATEGIES[not smooths], 0.0, t1, ts=np.sign(t1) * jnp.array([0.25, 0.5, 1.5]))


@pytest.mark.parametrize(("smooths", "t1"), first_of((True, 2.0), (False, 2.0), (True, -2.0)))
def test_it_is_nan_at_times_that_were_not_reached(smooths, t1):
    one, direction = failed(smooths, t1), np.sign(t1)
    assert one.result != po.Result.successful and 0.9 < direction * one.state.t < 1.1
    ts = direction * jnp.array([1.5, 0.5, -0.5, 0.0])
    right, none = np.array([False, True, False, True]), np.isnan
    for moments in (one.evaluate(ts), one.evaluate(ts).derivative(1)):
        np.testing.assert_array_equal(none(moments.mean), ~right)
        np.testing.assert_array_equal(none(moments.std), ~right)
    np.testing.assert_allclose(one.evaluate(ts).mean[right], [2.0, 1.0], rtol=1e-3)
    np.testing.assert_array_equal(one.evaluate(ts).t, ts)
    assert none(one.evaluate(direction * 1.5).mean)
    np.testing.assert_array_equal(none(one.mean), [False, False, True])
    compiled = jax.jit(lambda one, ts: one.evaluate(ts).mean)(one, ts)
    np.testing.assert_array_equal(none(compiled), ~right)
    np.testing.assert_allclose(compiled[right], [2.0, 1.0], rtol=1e-3)


@pytest.mark.thorough
def test_samples_before_the_end_do_not_depend_on_times_behind_it():
    one = failed(True)
    last = float(one.trajectory.rows.t[one.trajectory.last - 1])
    inside = last + 0.5 * (float(one.state.t) - last)  # in the last step, as what lies behind it would be
    draws = one.sample(KEY, (200,), ts=jnp.array([0.5, inside, 1.5]))
    assert np.all(np.isnan(draws[:, 2])) and np.all(np.isfinite(draws[:, :2]))
    there = one.evaluate(jnp.array([0.5, inside]))
    assert np.all(np.abs(draws[:, :2].mean(0) - there.mean) < 5 * there.std / np.sqrt(200) + 1e-12)
    assert np.all(np.abs(draws[:, :2].std(0) / there.std - 1) < 0.3)
    saved = one.sample(KEY, (200,))
    assert np.all(np.isnan(saved[:, 2])) and np.all(np.abs(saved[:, :2].mean(0) - one.mean[:2]) < one.std[:2])


@pytest.mark.parametrize("strategy", first_of(*reversed(STRATEGIES)), ids=name)
def test_a_lane_that_fails_leaves_the_others_alone(strategy):
    lanes = jax.vmap(lambda u0: solve(u0, strategy))(jnp.array([0.1, 1.0]))
    ts = jnp.array([0.5, 1.5])
    mean = jax.vmap(lambda one: one.evaluate(ts).mean)(lanes)
    np.testing.assert_allclose(mean[0], 0.1 / (1 - 0.1 * ts), rtol=1e-3)
    np.testing.assert_array_equal(np.isnan(mean[1]), [False, True])
    if strategy.smooths:
        draws = jax.vmap(lambda one: one.sample(KEY, (3,), ts=ts))(lanes)
        np.testing.assert_array_equal(np.isnan(draws).any(1), [[False, False], [False, True]])
    # Times outside of the interval are still wrong for the lane that did not fail.
    with pytest.raises(ValueError, match=r"evaluate\(t\) must lie in the interval.*In lane 0; 1 of 2"):
        jax.vmap(lambda one: one.evaluate(2.5).mean)(lanes)


@pytest.mark.thorough
def test_times_that_a_fixed_point_smoother_did_not_reach():
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(square)), strategy=po.FixedPointSmoother(), loop=po.ForwardLoop(150))
    one = solver.solve(1.0, 0.0, 2.0, save_at=[0.25, 0.5, 1.5], throw=False)
    draws = one.sample(KEY, (50,))
    np.testing.assert_array_equal(np.isnan(draws).any(0), [False, False, True])
    np.testing.assert_allclose(draws[:, :2].mean(0), [4 / 3, 2.0], rtol=1e-2)


@pytest.mark.thorough
def test_what_is_masked_has_no_derivative():
    """Zero times NaN is NaN: where a lane that fails is left out of a loss, its derivative must be, too."""

    def loss(u0s):
        lanes = jax.vmap(lambda u0: solve(u0, STRATEGIES[0]))(u0s)
        values = jax.vmap(lambda one: one.evaluate(1.5).mean)(lanes)
        return jnp.sum(jnp.where(lanes.result == po.Result.successful, values, 0.0))

    gradient = jax.jacfwd(loss)(jnp.array([0.1, 1.0]))
    np.testing.assert_allclose(gradient, [1 / (1 - 0.15) ** 2, 0.0], rtol=1e-2)


@pytest.mark.parametrize("strategy", left_to_nox(*STRATEGIES), ids=name)
def test_a_start_that_is_not_a_number_is_drawn_and_sampled(strategy):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    nowhere = solve(jnp.nan, strategy)
    assert nowhere.result == po.Result.initial_state_nonfinite
    assert np.all(np.isnan(nowhere.evaluate([0.0, 1.0]).mean)) and np.all(np.isnan(nowhere.sample(KEY, ts=[1.0])))
    for one in (nowhere, failed(strategy.smooths)):
        one.plot()
        assert "result" in one.summary() and "Solution" in one._repr_html_()
    pyplot.close("all")
