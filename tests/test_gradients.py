"""Derivatives of solves on a grid: against central differences, in both modes, through every part."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .helpers import (
    CONSTRAINTS,
    FACTORISATIONS,
    central_differences,
    first_of,
    left_to_nox,
    lotka_volterra,
    name,
    pendulum,
    relative,
)


GRID = np.linspace(0.0, 1.0, 9)


def rates_field(t, u, args):
    # non-autonomous and nonlinear, so that no term of the derivative vanishes
    return jnp.stack(
        [args[0] * u[0] - args[1] * u[0] * u[1] + 0.1 * jnp.sin(t), -args[2] * u[1] + args[3] * u[0] * u[1]]
    )


PARAMETERS = np.array([2.0, 1.5, 0.5, 0.3, 0.4, 0.2])  # u0, args


@functools.cache
def outputs(constraint, factorisation, nu):
    """Means and log standard deviations at the end and in the middle of a grid, as functions of u0 and args."""
    solver = po.Solver(
        po.IWP(nu),
        constraint(po.ODE(rates_field)),
        factorisation=factorisation,
        calibration=po.NoCalibration(),
    )

    def fn(x):
        solution = solver.solve_grid(x[:2], GRID, args=x[2:])
        return jnp.concatenate(
            [solution.mean[-1], solution.mean[4], jnp.log(solution.std[-1]), jnp.log(solution.std[4])]
        )

    return jax.jit(fn), jax.jit(jax.jacfwd(fn)), jax.jit(jax.jacrev(fn))


DENSE, BLOCKS, ISOTROPIC = FACTORISATIONS
# The first in every run.
CASES = first_of((po.TS1, DENSE, 3), (po.TS1, DENSE, 8), (po.TS1, DENSE, 1), (po.TS1, BLOCKS, 3))
CASES += left_to_nox(
    *((po.TS0, part, nu) for part, nu in ((BLOCKS, 3), (DENSE, 3), (DENSE, 1), (DENSE, 8), (ISOTROPIC, 3))),
    (po.TS1, ISOTROPIC, 3),
)


@pytest.mark.parametrize(
    ("constraint", "factorisation", "nu"), CASES, ids=lambda x: str(x) if isinstance(x, int) else name(x)
)
def test_grid_solves_match_central_differences(constraint, factorisation, nu):
    fn, forward, reverse = outputs(constraint, factorisation, nu)
    x = jnp.asarray(PARAMETERS)
    expected = central_differences(fn, PARAMETERS, 1e-3)
    jacobian = forward(x)
    assert relative(jacobian[:4], expected[:4]) < 1e-6
    if constraint is po.TS1:
        # with a Jacobian in it the covariance depends on the parameters: a derivative of zero would be a wrong rule
        assert np.max(np.abs(expected[4:])) > 1e-3
        assert relative(jacobian[4:], expected[4:]) < 1e-6
    else:
        assert np.max(np.abs(jacobian[4:])) < 1e-10
    assert relative(reverse(x), jacobian) < 1e-10


@pytest.mark.thorough
@pytest.mark.parametrize("constraint", first_of(*CONSTRAINTS[::-1]), ids=name)
def test_second_order_equations(constraint):
    solver = po.Solver(po.IWP(4), constraint(po.ODE(pendulum, order=2)), calibration=po.NoCalibration())

    @jax.jit
    def fn(x):
        solution = solver.solve_grid((x[:1], x[1:]), GRID)
        return jnp.concatenate([solution.mean[-1], solution.derivative(1).mean[-1], jnp.log(solution.std[-1])])

    x = np.array([0.7, -0.2])
    expected = central_differences(fn, x, 1e-3)
    assert relative(jax.jit(jax.jacrev(fn))(x)[:2], expected[:2]) < 1e-6
    np.testing.assert_allclose(jax.jit(jax.jacfwd(fn))(x), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.thorough
def test_output_scale_and_initial_state():
    # Dense factor: the scale moves neither mean; the initial factor moves both mean and covariance.
    def solver(scale):
        return po.Solver(po.IWP(2, output_scale=scale), po.TS1(po.ODE(lotka_volterra)), calibration=po.NoCalibration())

    u0 = jnp.array([20.0, 20.0])
    exact = solver(1.0).initialise(u0, 0.0)
    rng = np.random.default_rng(1)
    factor = 1e-2 * jnp.asarray(np.triu(rng.normal(size=(6, 6))))

    @jax.jit
    def fn(x):
        state = eqx.tree_at(lambda s: s.factor, exact, factor * x[1])
        solution = solver(x[0]).solve_grid(state, GRID)
        return jnp.concatenate([solution.mean[-1], jnp.log(solution.std[-1])])

    x = np.array([1.3, 0.8])
    expected = central_differences(fn, x, 1e-3)
    got = jax.jit(jax.jacrev(fn))(x)
    assert relative(got[:2], expected[:2]) < 1e-6
    assert relative(got[2:], expected[2:]) < 1e-6

    @jax.jit
    def mean(scale):
        return jnp.sum(solver(scale).solve_grid(u0, GRID).mean[-1])

    assert abs(jax.grad(mean)(1.7)) < 1e-10  # the mean does not depend on the scale
