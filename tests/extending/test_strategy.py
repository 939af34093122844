"""Strategies written outside the package: what they may be used for is asked of what they do."""

import jax.numpy as jnp
import numpy as np
import pytest

import probode as po


class Interval(po.AbstractStrategy):
    """Keeps every step, and coordinates of the state that it leaves."""

    keeps_steps = True

    def remember(self, kept):
        return po.Conditional.identity(kept)


class Points(po.AbstractStrategy):
    """Keeps the times asked for."""

    keeps_steps = False

    def remember(self, kept):
        return po.Conditional.identity(kept)


class Past(po.AbstractStrategy):
    """Looks at the past alone."""

    keeps_steps = False

    def remember(self, kept):
        return None


def solver(strategy, **parts):
    return po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: -(u**2))), strategy=strategy, **parts)


def test_what_they_do_is_known():
    own = [(part.smooths, part.keeps_steps) for part in (Interval(), Points(), Past())]
    given = (po.FixedIntervalSmoother(), po.FixedPointSmoother(), po.Filter())
    assert own == [(part.smooths, part.keeps_steps) for part in given] == [(True, True), (True, False), (False, False)]


@pytest.mark.thorough
def test_one_that_keeps_times_has_no_dense_output():
    with pytest.raises(ValueError, match=r"Points\(\) only the times asked for"):
        solver(Points()).solve(1.0, 0.0, 1.0, save_at=po.SaveAt(dense=True))
    dense = solver(Interval()).solve(1.0, 0.0, 1.0, save_at=po.SaveAt(dense=True))
    np.testing.assert_allclose(dense.evaluate(0.5).mean, 1 / 1.5, rtol=1e-3)


@pytest.mark.thorough
def test_one_that_smooths_intervals_can_be_iterated():
    grid = np.linspace(0, 1, 11)
    own, given = (po.solve_grid_iterated(solver(s), 1.0, grid) for s in (Interval(), po.FixedIntervalSmoother()))
    np.testing.assert_array_equal(own.mean, given.mean)
    for strategy in (Points(), Past()):
        with pytest.raises(ValueError, match="iterates a smoother"):
            po.solve_grid_iterated(solver(strategy), 1.0, grid)


def test_a_subspace_takes_filters_alone():
    parts = dict(factorisation=po.Subspace(np.eye(2)[:, :1]), error=po.StateError())
    np.testing.assert_allclose(solver(Past(), **parts).solve(jnp.ones(2), 0.0, 1.0).mean[-1], 0.5, rtol=1e-2)
    for strategy in (Interval(), Points()):
        with pytest.raises(ValueError, match="cannot smooth"):
            solver(strategy, **parts)
