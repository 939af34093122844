"""Solutions over uncertain parameters: closed forms, sampling, the two parts of the variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po


SOLVER = po.Solver(
    po.IWP(4),
    po.TS1(po.ODE(lambda t, u, args: -args["rate"] * u)),
    controller=po.IntegralController(1e-7, 1e-9),
    loop=po.BoundedLoop(128),
)
TS = np.array([0.5, 1.0, 2.0])


def moments(rate, rate_std, u, u_std):
    """Of ``u exp(-rate t)`` with independent normal ``u`` and ``rate``: a product with a lognormal."""
    e = [np.exp(-k * rate * TS + (k * rate_std * TS) ** 2 / 2) for k in (1, 2)]
    return u * e[0], np.sqrt((u**2 + u_std**2) * e[1] - (u * e[0]) ** 2)


def test_moments_are_those_of_a_lognormal():
    marginal = po.marginalise(SOLVER, po.Normal(2.0, 0.1), 0.0, 2.0, args={"rate": po.Normal(1.0, 0.2)}, save_at=TS)
    mean, std = moments(1.0, 0.2, 2.0, 0.1)
    np.testing.assert_allclose(marginal.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(marginal.std, std, rtol=2e-4)
    assert marginal.points.shape == (25, 2) and marginal.solutions.mean.shape == (25, 3)
    np.testing.assert_array_equal(marginal.t, TS)
    total = marginal.parametric_std**2 + marginal.numerical_std**2
    np.testing.assert_allclose(marginal.std**2, total, rtol=1e-12)
    each = np.average(np.asarray(marginal.solutions.std) ** 2, axis=0, weights=marginal.weights)
    np.testing.assert_allclose(marginal.numerical_std**2, each, rtol=1e-12)


@pytest.mark.thorough
def test_derivatives_with_respect_to_the_uncertainty():
    def mean_of(rate_std):
        args = {"rate": po.Normal(1.0, rate_std)}
        return po.marginalise(SOLVER, po.Normal(2.0, 0.1), 0.0, 2.0, args=args, save_at=TS).mean[-1]

    # d/ds of 2 exp(-2 + 2 s^2)
    np.testing.assert_allclose(jax.grad(mean_of)(0.2), 2 * np.exp(-2 + 0.08) * 0.8, rtol=1e-5)


@pytest.mark.thorough
def test_correlated_parameters_against_sampling():
    root = jnp.array([[0.1, 0.05], [0.0, 0.05]])
    ode = po.ODE(lambda t, u, args: args[0] * u * (1 - u / args[1]))
    solver = po.Solver(po.IWP(4), po.TS1(ode), controller=po.IntegralController(1e-6, 1e-8))
    marginal = po.marginalise(solver, 0.1, 0.0, 6.0, args=po.Normal(jnp.array([1.0, 1.0]), root), save_at=[3.0, 6.0])
    draws = jnp.array([1.0, 1.0]) + jax.random.normal(jax.random.key(0), (200_000, 2)) @ root
    rate, most = draws[:, :1], draws[:, 1:]
    exact = most / (1 + (most / 0.1 - 1) * jnp.exp(-rate * jnp.array([3.0, 6.0])))
    np.testing.assert_allclose(marginal.mean, jnp.mean(exact, axis=0), atol=5 * np.max(np.std(exact, 0)) / 450)
    np.testing.assert_allclose(marginal.std, jnp.std(exact, axis=0), rtol=0.01)
    few = po.marginalise(
        solver, 0.1, 0.0, 6.0, args=po.Normal(jnp.array([1.0, 1.0]), root), cubature=po.SphericalCubature()
    )
    assert few.points.shape == (4, 2)
    np.testing.assert_allclose(few.mean, jnp.mean(exact[:, 1:], axis=0), rtol=1e-2)


def test_wrong_use():
    with pytest.raises(ValueError, match="needs a Normal"):
        po.marginalise(SOLVER, 1.0, 0.0, 1.0, args={"rate": 1.0})
    with pytest.raises(ValueError, match="SphericalCubature"):
        po.marginalise(SOLVER, po.Normal(jnp.ones(9), jnp.ones(9)), 0.0, 1.0, args={"rate": 1.0})
    with pytest.raises(TypeError, match="cubature"):
        po.marginalise(SOLVER, po.Normal(1.0, 0.1), 0.0, 1.0, args={"rate": 1.0}, cubature=5)
    with pytest.raises(ValueError, match="a Normal must be finite and not negative"):
        po.marginalise(SOLVER, po.Normal(1.0, -0.1), 0.0, 1.0, args={"rate": 1.0})


@pytest.mark.thorough
def test_a_solve_that_fails_is_told():
    wild = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: args * u**2)))
    with pytest.raises(RuntimeError, match="of the cubature"):
        po.marginalise(wild, 1.0, 0.0, 1.0, args=po.Normal(0.5, 0.5))
    assert np.isnan(po.marginalise(wild, 1.0, 0.0, 1.0, args=po.Normal(0.5, 0.5), throw=False).mean[-1])
