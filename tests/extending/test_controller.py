"""A controller written outside the package."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import probode as po

from ..helpers import lotka_volterra


class Halving(po.AbstractController):
    """Halves the step after a rejection, and never lengthens it."""

    tolerances: po.Tolerances = eqx.field(default_factory=po.Tolerances)
    limits: po.Limits = eqx.field(default_factory=po.Limits)

    def init(self, dtype):
        return None

    def propose(self, dt, error_norm, order, state):
        good = error_norm <= 1
        return good, jnp.where(good, dt, dt / 2), None


class Constant(po.AbstractController):
    """Every step as long as the first one, whatever its error.

    It breaks a law: a controller has to reject an error above one, and ``check_controller`` says so
    (``tests/testing``). A solver takes it all the same.
    """

    tolerances: po.Tolerances = eqx.field(default_factory=po.Tolerances)
    limits: po.Limits = eqx.field(default_factory=po.Limits)

    def init(self, dtype):
        return None

    def propose(self, dt, error_norm, order, state):
        return error_norm < jnp.inf, dt, None


def test_a_controller():
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)), controller=Halving(po.Tolerances(1e-6, 1e-6)))
    solution = solver.solve(jnp.array([20.0, 20.0]), 0.0, 0.5, dt0=0.5, save_at=po.SaveAt(t0=True, steps=True))
    lengths = np.diff(solution.t[: int(solution.stats["num_accepted_steps"]) + 1])
    halvings = np.log2(0.5 / lengths)
    np.testing.assert_allclose(halvings, np.round(halvings), atol=1e-9)
    assert np.all(np.diff(halvings) >= -1e-9) and halvings[0] >= 1


def test_one_that_does_not_control():
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(lotka_volterra)), controller=Constant())
    u0 = jnp.array([20.0, 20.0])
    adaptive = solver.solve(u0, 0.0, 0.5, dt0=0.05)
    assert adaptive.stats["num_steps"] == 10
    grid = solver.solve_grid(u0, np.linspace(0, 0.5, 11))
    np.testing.assert_allclose(adaptive.mean[0], grid.mean[-1], rtol=1e-12)
