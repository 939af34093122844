"""States of many components: with TS0 nothing on the way has more entries than a few derivatives of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode

from .helpers import equations


D = 1000
ADVECTION = probode.ODE(lambda t, u, args: 0.1 * (jnp.roll(u, 1) - u))


def sizes(jaxpr):
    """The sizes of all arrays that a program makes."""
    outs = [out.aval for equation in equations(jaxpr) for out in equation.outvars]
    return [np.prod(aval.shape, dtype=int) for aval in outs if hasattr(aval, "shape")]


def solver(constraint, factorisation, **parts):
    return probode.Solver(probode.IWP(3), constraint(ADVECTION), factorisation=factorisation, **parts)


@pytest.mark.parametrize("factorisation", [probode.Isotropic(), probode.BlockDiagonal()])
@pytest.mark.parametrize("error", [probode.ResidualError(), probode.StateError()])
def test_no_array_is_quadratic_in_the_dimension(factorisation, error):
    own = solver(probode.TS0, factorisation, error=error)
    u0 = jnp.linspace(0.0, 1.0, D)
    program = jax.make_jaxpr(lambda u0: own.solve(u0, 0.0, 1.0, save_at=jnp.array([0.5, 1.0]), throw=False).std)(u0)
    largest = max(sizes(program.jaxpr))
    assert D <= largest < 200 * D  # blocks of 8 x 4 for each component, and a few rows that are kept
    dense = jax.make_jaxpr(lambda u0: solver(probode.TS0, probode.Dense()).solve(u0, 0.0, 1.0, throw=False).mean)(u0)
    assert max(sizes(dense.jaxpr)) > D**2  # what the test is able to see


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", [probode.Isotropic(), probode.BlockDiagonal()])
def test_a_hundred_thousand_components(factorisation):
    rates = jnp.linspace(0.5, 1.5, 100_000)
    decay = probode.TS0(probode.ODE(lambda t, u, rates: -rates * u))
    own = probode.Solver(
        probode.IWP(3), decay, factorisation=factorisation, controller=probode.IntegralController(1e-4, 1e-6)
    )
    solution = own.solve(jnp.ones(100_000), 0.0, 1.0, args=rates)
    np.testing.assert_allclose(solution.mean[0], jnp.exp(-rates), rtol=1e-4)
    assert solution.std.shape == (1, 100_000) and (solution.std > 1e-12).all()
