"""Periodic orbits: their periods and the errors of these, orbits that are forced, and what is none."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.util.tracing import depends_on


VAN_DER_POL = po.ODE(lambda t, u, du, mu: mu * (1 - u**2) * du - u, order=2)
PERIOD = 6.66328685932313


def orbit(guess=(2.0, 0.0), period=6.5, tol=1e-6, **options):
    return po.solve_periodic(VAN_DER_POL, guess, period, args=1.0, rtol=tol, atol=1e-3 * tol, **options)


@pytest.mark.thorough
def test_the_limit_cycle_of_van_der_pol():
    """The error of the period is below the tolerance, and as large as it says; the orbit closes."""
    solution = orbit()
    error = abs(float(solution.period.mean) - PERIOD)
    assert 0.3 * error < float(solution.period.std) < 1e-6 and error < 1e-6
    np.testing.assert_allclose(solution.mean[0], solution.mean[-1], atol=1e-12)
    np.testing.assert_allclose(solution.derivative(1).mean[0], solution.derivative(1).mean[-1], atol=1e-11)
    # An initial value problem from a point of the orbit comes back to it.
    start = tuple(float(solution.evaluate(0.0).derivative(i).mean) for i in range(2))
    solver = po.Solver(po.IWP(5), po.TS1(VAN_DER_POL), controller=po.IntegralController(1e-11, 1e-11))
    end = solver.solve(start, 0.0, solution.period.mean, args=1.0)
    np.testing.assert_allclose(end.mean[0], start[0], atol=1e-8)
    t = jnp.linspace(0.0, float(solution.period.mean), 5)
    np.testing.assert_allclose(solution.evaluate(t).mean[::4], [start[0]] * 2, atol=1e-11)
    assert "period" in solution.summary()
    # The solution of one equation is a guess for a similar one.
    again = po.solve_periodic(VAN_DER_POL, solution, solution.period.mean, args=1.2)
    assert 6.7 < float(again.period.mean) < 6.9


@pytest.mark.thorough
def test_a_stiff_limit_cycle_by_continuation():
    solution, mu = orbit(), 1.0
    while mu < 100.0:
        mu = min(1.25 * mu, 100.0)
        solution = po.solve_periodic(VAN_DER_POL, solution, solution.period.mean, args=mu)
    np.testing.assert_allclose(solution.period.mean, 162.8370710924, rtol=1e-6)


@pytest.mark.thorough
def test_a_forced_orbit_keeps_its_period():
    solution = po.solve_periodic(
        lambda t, u, args: -u + jnp.sin(t) + jnp.cos(t), lambda t: 0.0 * t, 2 * math.pi, rtol=1e-8, atol=1e-8
    )
    t = np.linspace(0, 2 * math.pi, 9)
    np.testing.assert_allclose(solution.evaluate(t).mean, np.sin(t), atol=1e-9)
    assert float(solution.period.mean) == 2 * math.pi and float(solution.period.std) == 0.0


@pytest.mark.thorough
def test_what_has_any_period_is_singular():
    """An equilibrium, and a closed orbit among others with other periods that are not told apart."""
    assert orbit((0.0, 0.0), throw=False).result == po.Result.singular
    volterra = lambda t, u, args: jnp.stack([u[0] * (1 - u[1]), u[1] * (u[0] - 1)])  # noqa: E731
    solution = po.solve_periodic(volterra, jnp.array([1.5, 1.0]), 6.5, throw=False)
    assert solution.result == po.Result.singular


def test_a_period_is_positive():
    with pytest.raises(ValueError, match="period must be positive"):
        orbit(period=-1.0)


@pytest.mark.thorough
def test_derivatives_of_the_period():
    """For a small ``mu`` the period is ``2 pi (1 + mu^2 / 16 - 5 mu^4 / 3072)``, to order six."""

    def period(mu):
        return po.solve_periodic(VAN_DER_POL, (2.0, 0.0), 6.3, args=mu).period.mean

    expected = 2 * math.pi * (0.2 / 8 - 5 * 4 * 0.2**3 / 3072)
    np.testing.assert_allclose(jax.grad(period)(0.2), expected, rtol=1e-3)


def test_whether_a_function_depends_on_its_argument():
    assert depends_on(lambda t: t + 1, 0.0) and not depends_on(lambda t: 1.0, 0.0)
    assert not depends_on(lambda t: jax.jit(lambda t, u: 2 * u)(t, 1.0), 0.0)
    assert depends_on(lambda t: jax.jit(lambda t, u: t * u)(t, 1.0), 0.0)
    assert depends_on(lambda t: jax.lax.fori_loop(0, 3, lambda i, x: x * 2, t), 0.0)
