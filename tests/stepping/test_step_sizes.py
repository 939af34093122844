"""The first step and how the steps after it settle: a plain Kalman filter, and solves from exact derivatives."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.stepping.step_sizes import sustained_share

from .. import oracles
from ..helpers import first_of, left_to_nox


def residuals_of_a_filter(m, steps):
    """Of an integrated Wiener process with ``m`` states, observed exactly in unit steps, on ``t^m / m!``."""
    a, q = oracles.iwp_transition(m - 1, 1.0)
    missed = np.array([1 / math.factorial(m - i) for i in range(m)])
    error, covariance, residuals = np.zeros(m), np.zeros((m, m)), []
    for _ in range(steps):
        error, covariance = a @ error - missed, a @ covariance @ a.T + q
        residuals.append(error[0])
        error, covariance = oracles.condition(error, covariance, np.eye(1, m), error[:1])
    return np.array(residuals)


@pytest.mark.parametrize("nu, order", [(1, 1), (2, 1), (3, 1), (5, 1), (7, 1), (2, 2), (4, 2), (6, 2), (3, 0)])
def test_what_a_filter_settles_at(nu, order):
    residuals = residuals_of_a_filter(nu + 1 - order, 60)
    growth = residuals[-1] / residuals[0]
    np.testing.assert_allclose(sustained_share(nu, order), growth ** (-1 / (nu + 1)), rtol=1e-6)


@pytest.mark.parametrize("nu", first_of(4, 2, 6, 8))
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


# --- how short a step can be ---


@pytest.mark.parametrize("direction", first_of(1, -1))
@pytest.mark.parametrize("rate, span", first_of((1e6, 1e12), (1.0, 4.35e17)))
def test_near_zero_a_step_is_as_short_as_it_must_be(direction, rate, span):
    # Time has all its digits there, however long the interval is.
    ode = po.ODE(lambda t, u, args: -direction * rate * (u - 1))
    solver = po.Solver(po.IWP(4), po.TS1(ode), error=po.StateError(), loop=po.ForwardLoop(400))
    solution = solver.solve(0.0, 0.0, direction * span, save_at=np.array([direction / rate]))
    np.testing.assert_allclose(solution.mean[0], 1 - np.exp(-1), rtol=1e-3)


@pytest.mark.parametrize("direction", first_of(1, -1))
@pytest.mark.parametrize("t0", first_of(1.7e9, -1.7e9))
def test_far_from_zero_a_step_lies_between_two_times(t0, direction):
    # Milliseconds of Unix time, in which the times of a step are rounded to a thousandth of its length.
    w, t1 = 1e3, t0 + direction * 0.01

    def field(t, u, args):
        return jnp.stack([w * jnp.cos(w * (t - t0)), w * u[2], -w * u[1]])

    controller = po.IntegralController(1e-6, 1e-9)
    solution = po.Solver(po.IWP(4), po.TS1(po.ODE(field)), controller=controller).solve(jnp.eye(3)[1], t0, t1)
    phase = w * (t1 - t0)
    np.testing.assert_allclose(solution.mean[0], [np.sin(phase), np.cos(phase), -np.sin(phase)], atol=1e-6)


@pytest.mark.parametrize("dtype", first_of(jnp.float64, jnp.float32), ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("t0", "span"), first_of((-1.0, 2.0), (0.0, 1.0), (0.0, 1e-6), (0.0, 1e8), (1.0, 1.0), (-1.0, 1.0))
)
def test_a_field_that_fails_ends_the_solve(t0, span, dtype):
    # However short the shortest step is, few attempts lead to it, and none of them is repeated for ever.
    controller = po.IntegralController(1e-3, 1e-6 / span)
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: u**2)), controller=controller)
    bad = po.Solver(po.IWP(3), po.TS0(po.ODE(lambda t, u, args: jnp.where(t == t0, -u, jnp.nan))))
    stopped = bad.solve(jnp.ones(1, dtype), t0, t0 + span, throw=False)
    assert stopped.result == po.Result.nonfinite and stopped.t[0] == t0 and stopped.stats["num_steps"] < 60
    blown_up = solver.solve(jnp.full(1, 2 / span, dtype), t0, t0 + span, throw=False)  # at t0 + span / 2
    assert blown_up.result in (po.Result.nonfinite, po.Result.step_size_too_small)
    assert blown_up.stats["num_steps"] < 1000
    # In single precision the scale of the fourth derivative leaves the range of numbers a little earlier.
    np.testing.assert_allclose(blown_up.t[0], t0 + span / 2, atol=(1e-3 if dtype == jnp.float64 else 1e-2) * span)


@pytest.mark.parametrize("dtype", first_of(jnp.float64, jnp.float32), ids=["float64", "float32"])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (-1.0, 0.0), *left_to_nox((1.0, 3.0), (0.0, -1.0))])
@pytest.mark.parametrize("units", [-3.0, *left_to_nox(0.5, 8.0)])
def test_no_sliver_of_round_off_is_left(t0, t1, units, dtype):
    # Steps of a tenth, so that `units` of round-off would be left before t1.
    eps, steps = jnp.finfo(dtype).eps, po.SaveAt(t0=True, steps=True)
    length = abs(t1 - t0) / 10 - units * eps / 10
    controller = po.IntegralController(1e-3, 1e-3, dt_max=length)
    solver = po.Solver(po.IWP(2), po.TS0(po.ODE(lambda t, u, args: 0 * u)), controller=controller)
    solution = solver.solve(jnp.ones(1, dtype), t0, t1, save_at=steps, dt0=length * np.sign(t1 - t0))
    lengths = np.abs(np.diff(solution.t[: solution.stats["num_accepted_steps"] + 1]))
    assert solution.t[-1] == t1 and lengths.min() > 0.4 * length


def test_a_step_that_is_cut_short_by_round_off_is_not_repeated():
    # Four units of round-off times 0.95 are four units again.
    t0 = 2.0**20
    eps = np.finfo(float).eps
    controller = po.IntegralController(1e-3, 1e-6, safety=0.99)
    rough = po.ODE(lambda t, u, args: jnp.where(t == t0, 0.0, 1e30 * jnp.sin(1e30 * (t - t0))) * jnp.ones_like(u))
    stopped = po.Solver(po.IWP(2), po.TS0(rough), controller=controller).solve(
        jnp.ones(1), t0, t0 + 1, throw=False, dt0=30.4 * eps * t0
    )
    assert stopped.result == po.Result.step_size_too_small and stopped.stats["num_steps"] < 40


@pytest.mark.thorough
def test_data_lie_as_close_as_their_own_digits():
    # Near zero, in an interval whose round-off is longer than what lies between them.
    ts = jnp.array([0.5, 1.0])
    data = po.Observations(ts, jnp.array([0.6, 0.37]), noise=0.1, observe=lambda t, u, args: u)
    ode = po.ODE(lambda t, u, args: -u)
    parts = dict(calibration=po.NoCalibration(), error=po.StateError(), controller=po.IntegralController(1e-6, 1e-9))
    solver = po.Solver(po.IWP(3), po.TS1(ode), **parts)
    start = solver.initialise(po.Normal(1.0, 0.3), 0.0)
    near, far = (solver.solve(start, 0.0, t1, data=data, save_at=ts, dt0=0.02) for t1 in (1.0, 1e14))
    np.testing.assert_allclose(far.mean, near.mean, rtol=1e-6)
    np.testing.assert_allclose(far.std, near.std, rtol=1e-4)
