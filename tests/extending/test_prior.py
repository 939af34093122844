"""A prior written outside the package."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import probode as po

from ..helpers import FACTORISATIONS, first_of, name


class OrnsteinUhlenbeck(po.AbstractPrior):
    """``du^(nu) = rate u^(nu) dt + dW``."""

    num_derivatives: int = eqx.field(static=True)
    rate: jax.Array = eqx.field(converter=jnp.asarray)

    def transition(self, dt, layout):
        return po.linear_transition((self.rate,), dt, layout)


class Spring(po.AbstractPrior):
    """``u'' = -stiffness u - damping u' + output_scale * white noise``."""

    stiffness: jax.Array = eqx.field(converter=jnp.asarray)
    damping: jax.Array = eqx.field(converter=jnp.asarray)
    output_scale: jax.Array = eqx.field(converter=jnp.asarray, default=1.0)
    num_derivatives: int = eqx.field(static=True, default=1)

    def transition(self, dt, layout):
        return po.linear_transition((-self.stiffness, -self.damping), dt, layout, output_scale=self.output_scale)


def layout_of(u0, nu):
    return po.Solver(po.IWP(nu), po.TS0(po.ODE(lambda t, u, args: -u))).init(u0, 0.0).layout


@pytest.mark.parametrize("dt", first_of(-0.3, 0.3, 1e-12))
def test_transitions_are_exact_in_steps_of_any_length(dt):
    """Held against the exponential of the drift, and an integral of it by quadrature."""
    transition = Spring(4.0, 0.5, 3.0).transition(jnp.asarray(dt), layout_of(1.0, 1))
    drift = np.array([[0.0, 1.0], [-4.0, -0.5]])
    np.testing.assert_allclose(transition.matrix, scipy.linalg.expm(drift * dt), rtol=1e-13, atol=1e-13 * abs(dt))
    nodes, weights = np.polynomial.legendre.leggauss(12)
    columns = np.stack([scipy.linalg.expm(drift * dt * (1 + x) / 2)[:, 1] for x in nodes])
    expected = 9 * abs(dt) / 2 * (columns.T * weights) @ columns
    root = transition.magnitude * transition.noise
    np.testing.assert_allclose(root.T @ root, expected, rtol=1e-10)
    np.testing.assert_array_equal(root, np.triu(root))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_factors_that_are_left_out_are_zero(number):
    drift, dt = (0.3, -2.0, 1.0, -0.5)[-number:], 0.7
    transition = po.linear_transition(drift, jnp.asarray(dt), layout_of(1.0, 3))
    whole = np.eye(4, k=1)
    whole[-1, 4 - number :] = drift
    np.testing.assert_allclose(transition.matrix, scipy.linalg.expm(whole * dt), rtol=1e-12, atol=1e-15)


@pytest.mark.thorough
def test_a_transition_takes_what_a_prior_of_the_package_takes():
    layout, dt, coupled = layout_of(jnp.ones(2), 2), jnp.asarray(0.3), jnp.array([[-1.0, 1.0], [0.0, -2.0]])
    for drift, scale in (((0.5, -1.0, -2.0), jnp.array([1.0, 3.0])), ((coupled, -1.0, coupled), jnp.eye(2) - coupled)):
        own = po.linear_transition(drift, dt, layout, output_scale=scale)
        ours = po.LinearSDE(2, drift, output_scale=scale).transition(dt, layout)
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, own, ours)))
    for wrong in ((), (1.0, 1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="one to 3 factors"):
            po.linear_transition(wrong, dt, layout)
    with pytest.raises(ValueError, match=r"linear_transition\(drift\[0\]\)"):
        po.linear_transition((jnp.ones(3),), dt, layout)


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
