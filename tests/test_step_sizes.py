"""The first step and how the steps after it settle: a plain Kalman filter, and solves from exact derivatives."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.step_sizes import sustained_share


def residuals_of_a_filter(m, steps):
    """Of an integrated Wiener process with ``m`` states, observed exactly in unit steps, on ``t^m / m!``."""
    i, j = np.indices((m, m))
    power = np.maximum(j - i, 0)
    factorial = np.vectorize(math.factorial)
    transition = np.where(j >= i, 1 / factorial(power), 0)
    a, b = m - 1 - i, m - 1 - j
    noise = 1 / ((a + b + 1) * factorial(a) * factorial(b))
    error, covariance, residuals = np.zeros(m), np.zeros((m, m)), []
    for _ in range(steps):
        error = transition @ error - 1 / factorial(m - np.arange(m))
        covariance = transition @ covariance @ transition.T + noise
        residuals.append(error[0])
        gain = covariance[:, 0] / covariance[0, 0]
        error = error - gain * error[0]
        covariance = covariance - np.outer(gain, covariance[0])
    return np.array(residuals)


@pytest.mark.parametrize("nu, order", [(1, 1), (2, 1), (3, 1), (5, 1), (7, 1), (2, 2), (4, 2), (6, 2), (3, 0)])
def test_what_a_filter_settles_at(nu, order):
    residuals = residuals_of_a_filter(nu + 1 - order, 60)
    growth = residuals[-1] / residuals[0]
    np.testing.assert_allclose(sustained_share(nu, order), growth ** (-1 / (nu + 1)), rtol=1e-6)


@pytest.mark.parametrize("nu", [2, 4, 6, 8])
def test_the_first_attempt_from_exact_derivatives_is_accepted(nu):
    solver = po.Solver(
        po.IWP(nu),
        po.TS0(po.ODE(lambda t, u, args: -u)),
        controller=po.IntegralController(1e-6, 1e-6),
        loop=po.ForwardLoop(1),
    )
    once = solver.solve(1.0, 0.0, 20.0, throw=False)
    assert once.stats["num_accepted_steps"] == 1
    assert once.state.t > 5e-3


def test_few_attempts_are_rejected():
    # Every second one was, growing after each error that happened to be small.
    def field(t, u, args):
        return jnp.stack([u[0] - u[0] * u[1], u[0] * u[1] - u[1]])

    solver = po.Solver(
        po.IWP(3),
        po.TS0(po.ODE(field)),
        factorisation=po.Isotropic(),
        controller=po.IntegralController(1e-7, 1e-7),
        loop=po.ForwardLoop(4096),
    )
    stats = solver.solve(jnp.array([2.0, 1.0]), 0.0, 20.0).stats
    assert stats["num_rejected_steps"] < 0.05 * stats["num_accepted_steps"]
