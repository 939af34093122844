"""Linearisations, evaluated once or several times in a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .. import oracles
from ..helpers import (
    CONSTRAINTS,
    FACTORISATIONS,
    check_jacobians,
    first_of,
    left_to_nox,
    lotka_volterra,
    name,
    pendulum,
    relative,
)


U0 = jnp.array([20.0, 20.0])
GRID = jnp.linspace(0.0, 1.0, 6)


def solver(constraint, nu=3, factorisation=po.Dense(), field=lotka_volterra, order=1, evaluations=2, **parts):
    ode = po.ODE(field, order=order)
    parts = {"calibration": po.NoCalibration()} | parts
    return po.Solver(po.IWP(nu), constraint(ode, evaluations=evaluations), factorisation=factorisation, **parts)


def twice_evaluated(nu, dt, steps):
    """EK0 in the mode P(EC)^2 for one component, u' = cos(t) - u^2, with covariances and ordinary gains."""
    a, q = oracles.iwp_transition(nu, dt)
    u = [0.5]
    # Derivatives of u' = cos(t) - u^2 at t = 0: 0.75, -0.75, ...
    u += [1 - u[0] ** 2, -2 * u[0] * (1 - u[0] ** 2)]
    mean, covariance = np.array(u[: nu + 1]), np.zeros((nu + 1, nu + 1))
    for k in range(1, steps + 1):
        mean = predicted = a @ mean
        prior = a @ covariance @ a.T + q
        for _ in range(2):
            z = predicted[1:2] - np.cos(k * dt) + mean[0] ** 2
            mean, covariance = oracles.condition(predicted, prior, np.eye(nu + 1)[1:2], z)
    return mean, covariance


def test_two_evaluations_are_the_update_made_twice():
    field = po.ODE(lambda t, u, args: jnp.cos(t) - u**2)
    own = po.Solver(po.IWP(2), po.TS0(field, evaluations=2), calibration=po.NoCalibration())
    solution = own.solve_grid(0.5, jnp.linspace(0.0, 1.0, 11))
    mean, covariance = twice_evaluated(2, 0.1, 10)
    np.testing.assert_allclose(solution.marginals.mean[-1, :, 0], mean, rtol=1e-13)
    factor = solution.marginals.factor[-1]
    np.testing.assert_allclose(factor.T @ factor, covariance, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("constraint", first_of(*CONSTRAINTS), ids=name)
@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_many_evaluations_solve_the_equation_at_the_posterior(constraint, factorisation):
    solution = solver(constraint, factorisation=factorisation, evaluations=40).solve_grid(U0, GRID)
    velocity = jax.vmap(lambda u: lotka_volterra(0.0, u, None))(solution.mean)
    assert relative(solution.derivative(1).mean, velocity) < 1e-12
    once = solver(constraint, factorisation=factorisation, evaluations=1).solve_grid(U0, GRID)
    assert relative(once.derivative(1).mean, velocity) > 1e-9  # there was something to solve


def test_programs_do_not_grow_with_the_number_of_evaluations():
    def size(evaluations):
        own = solver(po.TS0, evaluations=evaluations)
        return len(str(jax.make_jaxpr(lambda u: own.solve_grid(u, GRID).mean)(U0)))

    assert size(30) < size(3) + 10


def test_the_equation_of_second_order_too():
    many = solver(po.TS0, field=pendulum, order=2, evaluations=30).solve_grid((1.0, 0.0), GRID)
    acceleration = jax.vmap(lambda t, u: pendulum(t, u, None, None))(many.t, many.mean)
    assert relative(many.derivative(2).mean, acceleration) < 1e-12


def test_factorisations_agree_on_the_mean():
    means = [solver(po.TS0, factorisation=f).solve_grid(U0, GRID).mean for f in FACTORISATIONS]
    assert relative(means[0], means[1]) < 1e-12 and relative(means[0], means[2]) < 1e-12


@pytest.mark.thorough
def test_high_orders_are_stable():
    """Order seven, limited by stability when evaluated once, takes the steps that its accuracy asks for."""
    steps = {}
    for evaluations in (1, 2):
        controller = po.IntegralController(1e-6, 1e-6)
        own = solver(
            po.TS0,
            7,
            po.Isotropic(),
            evaluations=evaluations,
            controller=controller,
            calibration=po.DynamicCalibration(),
        )
        solution = own.solve(U0, 0.0, 10.0)
        steps[evaluations] = int(solution.stats["num_accepted_steps"])
        reference = np.array([11.86150846, 2.63118858])  # SciPy's DOP853 at 1e-13
        assert relative(solution.mean[0], reference) < 1e-6
    assert steps[2] < steps[1] / 5


@pytest.mark.parametrize(
    ("constraint", "evaluations"),
    left_to_nox((po.TS0, 2), (po.TS1, 4), (po.TS1, 2)),
    ids=str,
)
def test_gradients_through_evaluations(constraint, evaluations):
    own = solver(constraint, evaluations=evaluations)

    def quantities(x):
        solution = own.solve_grid(x[:2], GRID, args=(x[2], 0.05, 0.5, 0.05))
        return jnp.concatenate([solution.mean[-1], jnp.log(solution.std[-1]), solution.log_likelihood[None]])

    x = jnp.array([20.0, 20.0, 0.5])
    check_jacobians(quantities, x)


@pytest.mark.thorough
def test_lanes_that_reject_have_finite_gradients():
    """A vector field that is infinite at zero, where a careless implementation would evaluate rejected lanes."""
    own = solver(
        po.TS0,
        field=lambda t, u, args: -args / jnp.sqrt(u),
        factorisation=po.Isotropic(),
        controller=po.IntegralController(1e-4, 1e-6),
        loop=po.BoundedLoop(256),
        calibration=po.DynamicCalibration(),
    )
    end = jax.jit(jax.vmap(jax.value_and_grad(lambda a: own.solve(1.0, 0.0, 1.0, args=a, throw=False).mean[0])))
    rates = jnp.array([0.1, 0.3, 0.6])
    values, slopes = end(rates)
    exact = jax.vmap(jax.value_and_grad(lambda a: (1 - 1.5 * a) ** (2 / 3)))(rates)
    np.testing.assert_allclose(values, exact[0], rtol=1e-4)
    np.testing.assert_allclose(slopes, exact[1], rtol=1e-2)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_evaluations(value):
    with pytest.raises(ValueError, match="evaluations must be an integer >= 1"):
        po.TS0(po.ODE(lotka_volterra), evaluations=value)


def test_a_stack_iterates_as_often_as_its_most_demanding_member():
    once, often = po.TS1(po.ODE(lotka_volterra)), po.TS1(po.ODE(lotka_volterra), evaluations=3, relinearise=True)
    assert po.Stack(once, often).iteration == often.iteration
    assert po.Stack(once, often, evaluations=2, relinearise=False).iteration.evaluations == 2
    assert not po.Stack(once, often, evaluations=2, relinearise=False).iteration.relinearise
    assert po.Noisy(often, 0.1).iteration == often.iteration
