"""Derivatives of what smoothing and calibration add: smoothed moments, evidence, calibrated scales, times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .helpers import CONSTRAINTS, FACTORISATIONS, central_differences, left_to_nox, name, relative
from .test_gradients import PARAMETERS, rates_field


pytestmark = pytest.mark.thorough
GRID = np.linspace(0.0, 1.0, 9)
LONG = np.linspace(0.0, 4.0, 9)  # for high orders: residuals have to stay above round-off
SMOOTHERS = (po.FixedIntervalSmoother(), po.FixedPointSmoother())


@functools.cache
def posterior(constraint, factorisation, nu, strategy, calibration):
    """Smoothed means, log standard deviations in the middle, evidence and log scale, of u0 and args."""
    parts = {"factorisation": factorisation, "strategy": strategy, "calibration": calibration}
    solver = po.Solver(po.IWP(nu), constraint(po.ODE(rates_field)), **parts)

    def fn(x):
        solution = solver.solve_grid(x[:2], LONG if nu > 5 else GRID, args=x[2:])
        scale = jnp.log(jnp.ravel(solution.output_scale[4]))
        # u' has no uncertainty of its own under TS0
        high = solution.derivative(nu if nu > 1 else 0)
        log_std = jnp.log(jnp.stack([solution.std[4], high.std[4]])).ravel()
        means = jnp.stack([solution.mean[4], solution.derivative(1).mean[4]]).ravel()
        return jnp.concatenate([means, log_std, solution.log_likelihood[None], scale])

    return jax.jit(fn), jax.jit(jax.jacfwd(fn)), jax.jit(jax.jacrev(fn))


def differences(fn, nu):
    """Central differences; at high order the evidence is noisy, so wide ones, extrapolated to order six."""
    if nu <= 5:
        return central_differences(fn, PARAMETERS, 3e-4)
    return (16 * central_differences(fn, PARAMETERS, 3e-3) - central_differences(fn, PARAMETERS, 6e-3)) / 15


NONE = po.NoCalibration()
CASES = [(po.TS1, f, 3, SMOOTHERS[0], NONE) for f in FACTORISATIONS]
CASES += [(c, po.Dense(), 8, SMOOTHERS[0], NONE) for c in CONSTRAINTS]
CASES += [(c, po.Isotropic(), 2, SMOOTHERS[1], po.MLECalibration()) for c in CONSTRAINTS]
CASES += [(po.TS1, po.BlockDiagonal(), 2, SMOOTHERS[0], c) for c in (po.MLECalibration(), po.DynamicCalibration())]
CASES += [(po.TS1, po.Dense(), 2, SMOOTHERS[0], po.LeaveOneOutCalibration())]
CASES += left_to_nox((po.TS1, po.BlockDiagonal(), 2, SMOOTHERS[0], po.DynamicCalibration(memory=0.5)))


@pytest.mark.parametrize(
    ("constraint", "factorisation", "nu", "strategy", "calibration"),
    CASES,
    ids=lambda x: str(x) if isinstance(x, int) else name(x),
)
def test_posteriors_match_central_differences(constraint, factorisation, nu, strategy, calibration):
    fn, forward, reverse = posterior(constraint, factorisation, nu, strategy, calibration)
    x = jnp.asarray(PARAMETERS)
    expected, jacobian = differences(fn, nu), forward(x)
    for part in (slice(0, 4), slice(4, 8), slice(8, 9), slice(9, None)):
        size = np.max(np.abs(expected[part]))
        if size > 1e-8:
            assert relative(jacobian[part], expected[part]) < 1e-6, part
        else:
            assert np.max(np.abs(jacobian[part])) < 1e-8
    # At high order the residuals are the small difference of large numbers: eight digits are theirs.
    assert relative(reverse(x), jacobian) < (1e-9 if nu <= 5 else 1e-7)
    if constraint is po.TS1:
        assert np.max(np.abs(expected[4:8])) > 1e-3 and np.max(np.abs(expected[8])) > 1e-3


def test_calibrated_scales_can_be_held_constant():
    for calibration in (po.DynamicCalibration, po.MLECalibration, po.LeaveOneOutCalibration):
        solver = po.Solver(po.IWP(2), po.TS1(po.ODE(rates_field)), calibration=calibration(stop_gradient=True))

        def scale(x, solver=solver):
            return jnp.sum(solver.solve_grid(x[:2], GRID, args=x[2:]).output_scale[1:])

        value, gradient = jax.jit(jax.value_and_grad(scale))(jnp.asarray(PARAMETERS))
        assert value > 0
        if calibration is po.DynamicCalibration:  # the scale is that of the state, which moves
            np.testing.assert_array_equal(gradient, 0)


def test_adaptive_smoothed_solves_are_those_of_their_frozen_steps():
    """Save times between the steps, and the steps themselves held fixed through times of data that are not seen."""
    ts = np.array([0.11, 0.5, 0.52, 1.0])
    data = po.Observations(GRID[1:], jnp.zeros((len(GRID) - 1, 2)), 1.0, mask=np.zeros(len(GRID) - 1, bool))
    parts = {
        "strategy": po.FixedPointSmoother(),
        "calibration": NONE,
        "controller": po.IntegralController(1e3, 1e3, dt_min=1.0),
        "loop": po.BoundedLoop(16),
    }
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(rates_field)), **parts)

    def fn(x):
        solution = solver.solve(x[:2], 0.0, 1.0, args=x[2:6], save_at=x[6:], data=data)
        means = jnp.concatenate([solution.mean.ravel(), solution.derivative(2).mean.ravel()])
        return jnp.concatenate([means, jnp.log(solution.std[:, 0])])

    x = np.concatenate([PARAMETERS, ts[:3]])  # also in the save times
    fn = jax.jit(fn)
    expected, jacobian = central_differences(fn, x, 1e-3), jax.jit(jax.jacrev(fn))(x)
    for part in (slice(0, 12), slice(12, None)):
        assert relative(jacobian[part], expected[part]) < 1e-6
    assert relative(jax.jit(jax.jacfwd(fn))(x), jacobian) < 1e-9
