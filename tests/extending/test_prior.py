"""A prior written outside the package."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import FACTORISATIONS, first_of, name


class OrnsteinUhlenbeck(po.AbstractPrior):
    """``du^(nu) = rate u^(nu) dt + dW``: Van Loan's matrix exponential and a Cholesky factor."""

    num_derivatives: int = eqx.field(static=True)
    rate: jax.Array = eqx.field(converter=jnp.asarray)

    def transition(self, dt, layout):
        n = self.num_derivatives + 1
        drift = jnp.eye(n, k=1, dtype=dt.dtype).at[-1, -1].set(self.rate.astype(dt.dtype))
        noise = jnp.zeros((n, n), dt.dtype).at[-1, -1].set(1.0)
        block = jax.scipy.linalg.expm(dt * jnp.block([[-drift, noise], [jnp.zeros_like(noise), drift.T]]))
        matrix = block[n:, n:].T
        # The integral of a covariance over a step back in time is negative.
        root = jnp.linalg.cholesky(jnp.sign(dt) * matrix @ block[:n, n:]).T
        return po.Transition(layout.broadcast(matrix), layout.lift(root, 1.0), jnp.ones_like(dt))


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_a_prior_that_knows_the_equation_is_exact(factorisation):
    solver = po.Solver(
        OrnsteinUhlenbeck(2, -1.5), po.TS1(po.ODE(lambda t, u, args: -1.5 * u)), factorisation=factorisation
    )
    solution = solver.solve_grid(jnp.array([1.0, -2.0]), np.array([0.0, 1.0, 3.0]))
    expected = np.exp(-1.5 * np.array([0.0, 1.0, 3.0]))[:, None] * np.array([1.0, -2.0])
    np.testing.assert_allclose(solution.mean, expected, rtol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "strategy", first_of(po.FixedIntervalSmoother(), po.FixedPointSmoother(), po.Filter()), ids=name
)
def test_it_is_the_prior_of_the_package(strategy):
    def solve(prior):
        solver = po.Solver(prior, po.TS1(po.ODE(lambda t, u, args: -u * (1 + u))), strategy=strategy)
        return solver.solve(jnp.array([1.0]), 0.0, 2.0, save_at=np.array([0.5, 2.0]))

    own, ours = solve(OrnsteinUhlenbeck(2, -1.5)), solve(po.IOUP(2, -1.5))
    np.testing.assert_allclose(own.mean, ours.mean, rtol=1e-9)
    np.testing.assert_allclose(own.std, ours.std, rtol=1e-6)
