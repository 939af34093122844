"""A controller written outside the package."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import probode as po

from ..helpers import lotka_volterra


class Constant(po.AbstractController):
    """Every step as long as the first one."""

    tolerances: po.Tolerances = eqx.field(default_factory=po.Tolerances)
    limits: po.Limits = eqx.field(default_factory=po.Limits)

    def init(self, dtype):
        return None

    def propose(self, dt, error_norm, order, state):
        return error_norm < jnp.inf, dt, None


def test_a_controller():
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(lotka_volterra)), controller=Constant())
    u0 = jnp.array([20.0, 20.0])
    adaptive = solver.solve(u0, 0.0, 0.5, dt0=0.05)
    assert adaptive.stats["num_steps"] == 10
    grid = solver.solve_grid(u0, np.linspace(0, 0.5, 11))
    np.testing.assert_allclose(adaptive.mean[0], grid.mean[-1], rtol=1e-12)
