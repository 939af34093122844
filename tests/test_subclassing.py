"""Parts written by users, outside the package: each is a subclass of one abstract class and works with the rest."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.gaussians import Transition

from .helpers import FACTORISATIONS, lotka_volterra, name


class OrnsteinUhlenbeck(po.AbstractPrior):
    """``du^(nu) = rate u^(nu) dt + dW``: Van Loan's matrix exponential and a Cholesky factor."""

    num_derivatives: int = eqx.field(static=True)
    rate: jax.Array = eqx.field(converter=jnp.asarray)

    def transition(self, dt, layout):
        n = self.num_derivatives + 1
        drift = jnp.eye(n, k=1).at[-1, -1].set(self.rate)
        noise = jnp.zeros((n, n)).at[-1, -1].set(1.0)
        block = jax.scipy.linalg.expm(dt * jnp.block([[-drift, noise], [jnp.zeros((n, n)), drift.T]]))
        matrix = block[n:, n:].T
        root = jnp.linalg.cholesky(matrix @ block[:n, n:]).T
        return Transition(layout.broadcast(matrix), layout.lift(root, 1.0), jnp.ones(()))


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_a_prior_that_knows_the_equation_is_exact(factorisation):
    solver = po.Solver(
        OrnsteinUhlenbeck(2, -1.5), po.TS1(po.ODE(lambda t, u, args: -1.5 * u)), factorisation=factorisation
    )
    solution = solver.solve_grid(jnp.array([1.0, -2.0]), np.array([0.0, 1.0, 3.0]))
    expected = np.exp(-1.5 * np.array([0.0, 1.0, 3.0]))[:, None] * np.array([1.0, -2.0])
    np.testing.assert_allclose(solution.mean, expected, rtol=1e-12)


class MaximumLikelihood(po.AbstractCalibration):
    """One scale for the whole solve: the mean of the whitened residuals squared (Tronarp et al. 2019)."""

    def init(self, shape, dtype):
        return jnp.zeros(shape, dtype), jnp.zeros((), dtype)

    def scale(self, innovation):
        return innovation.unit

    def update(self, statistics, whitened, informative):
        total, count = statistics
        return total + jnp.where(informative, jnp.mean(whitened**2, axis=(-2, -1)), 0), count + informative

    def finalise(self, statistics):
        total, count = statistics
        return jnp.sqrt(total / count)


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_a_calibration_that_collects_statistics(factorisation):
    def solve(calibration, scale=1.0):
        prior = po.IWP(2, output_scale=scale)
        constraint = po.TS1(po.ODE(lambda t, u, args: -u))
        solver = po.Solver(prior, constraint, factorisation=factorisation, calibration=calibration)
        return solver.solve_grid(jnp.array([1.0]), np.linspace(0, 1, 11))

    calibrated, plain = solve(MaximumLikelihood()), solve(po.NoCalibration())
    np.testing.assert_allclose(calibrated.output_scale**2, 0.0428314233992825, rtol=1e-12)
    np.testing.assert_array_equal(calibrated.mean, plain.mean)
    np.testing.assert_allclose(calibrated.std, plain.std * jnp.sqrt(0.0428314233992825), rtol=1e-12)
    # whatever the prior's own scale, the calibrated uncertainty is the same
    np.testing.assert_allclose(solve(MaximumLikelihood(), 7.0).std, calibrated.std, rtol=1e-11)


class Constant(po.AbstractController):
    """Every step as long as the first one."""

    rtol: jax.Array = eqx.field(converter=jnp.asarray, default=1e-3)
    atol: jax.Array = eqx.field(converter=jnp.asarray, default=1e-6)
    dt_min: None = None
    dt_max: None = None
    stop_at: None = None

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
