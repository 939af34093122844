"""Equations in other coordinates: the same solutions, and posteriors that stay where they can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import first_of, lotka_volterra, pendulum


CONTROLLER = po.IntegralController(1e-9, 1e-9)


def solver(ode, nu=5):
    return po.Solver(po.IWP(nu), po.TS1(ode), controller=CONTROLLER, loop=po.BoundedLoop(1024))


@pytest.mark.thorough
def test_logarithms_have_the_same_solution():
    ode, u0 = po.ODE(lotka_volterra), jnp.array([20.0, 20.0])
    log = po.transformed(ode, "log")
    one, two = solver(ode).solve(u0, 0.0, 5.0), solver(log.ode).solve(log.start(u0), 0.0, 5.0)
    np.testing.assert_allclose(log.moments(two).mean, one.mean, rtol=1e-7)
    np.testing.assert_allclose(log.moments(two).std / one.mean, two.std, rtol=1e-6)


@pytest.mark.parametrize("std", first_of(1.0, 0.1))
def test_moments_are_those_of_a_lognormal(std):
    log = po.transformed(po.ODE(lambda t, u, args: -u), "log")
    start = po.Normal(0.0, std)
    solution = solver(log.ode, 2).solve(start, 0.0, 1.0)
    known = log.moments(solution)
    mean = np.exp(-1 + std**2 / 2)
    np.testing.assert_allclose(known.mean[-1], mean, rtol=1e-7)
    np.testing.assert_allclose(known.std[-1], mean * np.sqrt(np.expm1(std**2)), rtol=1e-6)
    low, high = log.interval(solution, 2.0)
    np.testing.assert_allclose([low[-1], high[-1]], np.exp([-1 - 2 * std, -1 + 2 * std]), rtol=1e-6)


@pytest.mark.thorough
def test_equations_of_second_order_and_named_coordinates():
    ode = po.ODE(pendulum, order=2)
    cubic = po.transformed(ode, lambda u: u + u**3, _cubic)
    u0 = (jnp.array(0.5), jnp.array(0.3))
    two = solver(cubic.ode).solve(cubic.start(u0), 0.0, 3.0)
    np.testing.assert_allclose(cubic.moments(two).mean, solver(ode).solve(u0, 0.0, 3.0).mean, rtol=1e-6)
    logit = po.transformed(po.ODE(lambda t, u, args: u * (1 - u)), "logit")
    end = logit.moments(solver(logit.ode).solve(logit.start(0.1), 0.0, 4.0)).mean[-1]
    np.testing.assert_allclose(end, 1 / (1 + 9 * np.exp(-4.0)), rtol=1e-8)


def _cubic(v):
    """The real root of ``u + u^3 = v``."""
    a = jnp.cbrt(v / 2 + jnp.sqrt(v**2 / 4 + 1 / 27))
    return a - 1 / (3 * a)


@pytest.mark.thorough
def test_polar_coordinates_carry_the_covariance():
    to = lambda u: jnp.stack([jnp.hypot(u[0], u[1]), jnp.arctan2(u[1], u[0])])  # noqa: E731
    back = lambda v: v[0] * jnp.stack([jnp.cos(v[1]), jnp.sin(v[1])])  # noqa: E731
    ode = po.ODE(lambda t, u, args: jnp.stack([-u[1], u[0]]) - 0.1 * u)
    polar = po.transformed(ode, to, back, elementwise=False)
    u0 = jnp.array([1.0, 0.5])
    slope = jax.jacfwd(to)(u0)
    root = 1e-4 * jnp.array([[1.0, 0.3], [0.0, 0.5]])
    one = solver(ode).solve(po.Normal(u0, root), 0.0, 2.0)
    two = solver(polar.ode).solve(po.Normal(polar.start(u0), root @ slope.T), 0.0, 2.0)
    np.testing.assert_allclose(polar.moments(two).mean, one.mean, rtol=1e-7)
    np.testing.assert_allclose(polar.moments(two).std, one.std, rtol=1e-3)
    with pytest.raises(ValueError, match="every number alone"):
        polar.interval(two)


def test_wrong_use():
    ode = po.ODE(lambda t, u, args: -u)
    with pytest.raises(ValueError, match="one of"):
        po.transformed(ode, "exp")
    with pytest.raises(TypeError, match="back"):
        po.transformed(ode, jnp.log)
    with pytest.raises(TypeError, match=r"probode\.ODE"):
        po.transformed(ode.lifted(1), "log")
    with pytest.raises(TypeError, match="certain u0"):
        po.transformed(ode, "log").start(po.Normal(1.0, 0.1))
