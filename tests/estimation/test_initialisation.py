"""States that are not known at the start: diffuse derivatives, and how soon the equation makes up for them."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import FACTORISATIONS, check_jacobians, first_of, lotka_volterra, name, pendulum, relative


U0 = jnp.array([20.0, 20.0])


def solver(initialisation, nu=3, constraint=None, **parts):
    constraint = po.TS1(po.ODE(lotka_volterra)) if constraint is None else constraint
    return po.Solver(po.IWP(nu), constraint, initialisation=initialisation, **parts)


@pytest.mark.parametrize("known", [0, 1, 2, 3])
@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_what_is_known_is_exact_and_the_rest_is_diffuse(factorisation, known):
    exact = solver(po.TaylorMode()).initialise(U0, 0.0).mean
    own = solver(po.Diffuse(known, scale=7.0), factorisation=factorisation)
    for state in (own.initialise(U0, 0.0), own.init(U0, 0.0)):
        if isinstance(state, po.InitialState):
            mean = state.mean
        else:
            mean = [state.derivative(k).mean for k in range(4)]
            std = [state.derivative(k).std for k in range(4)]
            np.testing.assert_array_equal(std, np.where(np.arange(4) > known, 7.0, 0.0)[:, None] * np.ones(2))
        np.testing.assert_allclose(mean[: known + 1], exact[: known + 1], rtol=1e-13)
        np.testing.assert_array_equal(np.reshape(mean[known + 1 :], (-1, 2)), np.zeros((3 - known, 2)))


def test_an_equation_of_second_order_counts_from_what_it_is_given():
    own = solver(po.Diffuse(1), constraint=po.TS1(po.ODE(pendulum, order=2)))
    mean = own.initialise((1.0, 0.5), 0.3).mean
    np.testing.assert_allclose(mean, [1.0, 0.5, pendulum(0.3, 1.0, 0.5, None), 0.0], rtol=1e-14)


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
@pytest.mark.parametrize("constraint", first_of(po.TS1, po.TS0), ids=name)
def test_the_steps_find_the_derivatives(constraint, factorisation):
    parts = {"factorisation": factorisation, "controller": po.IntegralController(1e-7, 1e-7)}
    own = solver(po.Diffuse(1, scale=10.0), constraint=constraint(po.ODE(lotka_volterra)), **parts)
    solution = own.solve(U0, 0.0, 10.0)
    reference = np.array([11.86150846, 2.63118858])  # SciPy's DOP853 at 1e-13
    assert relative(solution.mean[0], reference) < 1e-5


def test_the_smoother_tells_the_derivatives_at_the_start():
    strategy = po.FixedIntervalSmoother()
    exact = solver(po.TaylorMode()).initialise(U0, 0.0).mean
    own = solver(po.Diffuse(1, scale=100.0), strategy=strategy, calibration=po.NoCalibration())
    solution = own.solve_grid(U0, np.linspace(0, 0.5, 26))
    for k in (2, 3):
        start = solution.derivative(k)
        assert jnp.all(start.std[0] < 10) and jnp.all(jnp.abs(start.mean[0] - exact[k]) < 3 * start.std[0])


@pytest.mark.thorough
def test_a_field_that_cannot_be_differentiated_often():
    def field(t, u, args):
        return -u + jnp.sort(jnp.clip(u, 0.2, 0.3))[::-1]  # no Taylor rule, and no derivative in places

    for nu in (3, 9):
        solution = solver(po.Diffuse(), nu, po.TS1(po.ODE(field))).solve(jnp.array([1.0, 0.25]), 0.0, 1.0)
        assert relative(solution.mean[0], [0.3 + 0.7 * np.exp(-1), 0.25]) < 1e-2
    with pytest.raises(ValueError, match="Diffuse"):
        solver(po.TaylorMode(), 9, po.TS1(po.ODE(field))).solve(jnp.array([1.0, 0.25]), 0.0, 1.0)


def drag(t, u, args):
    velocity = u[1]
    return jnp.stack([velocity, -9.81 - 0.1 * jnp.sqrt(velocity**2) * velocity])


# Fields that are finite at the start, with derivatives that are not.
KINKS = {
    "drag from rest": (
        drag,
        np.array([100.0, 0.0]),
        3.0,
        [77.19162433, -9.81 / np.sqrt(0.981) * np.tanh(3 * np.sqrt(0.981))],
    ),
    "sqrt(t)": (lambda t, u, args: jnp.sqrt(t) - u, np.array(0.0), 1.0, 0.4619204930872),
    "Hill": (lambda t, u, args: 1 / (1 + u**2.5), np.array(0.0), 1.0, 0.8429061387953),
}


@pytest.mark.parametrize(
    ("constraint", "factorisation"), first_of((po.TS1, po.Dense()), (po.TS0, po.Isotropic())), ids=name
)
@pytest.mark.parametrize("case", KINKS)
def test_derivatives_that_do_not_exist_are_not_needed(case, constraint, factorisation):
    field, u0, t1, right = KINKS[case]
    own = solver(po.TaylorMode(), 4, constraint(po.ODE(field)), factorisation=factorisation)
    own = eqx.tree_at(lambda s: s.controller.tolerances, own, po.Tolerances(1e-6, 1e-9))
    solution, right = own.solve(u0, 0.0, t1), np.array(right)
    np.testing.assert_allclose(solution.mean[0], right, rtol=1e-6)
    assert np.all(np.abs(solution.mean[0] - right) < 10 * solution.std[0] + 1e-8 * np.abs(right))


@pytest.mark.thorough
def test_what_is_lost_is_no_more_than_must_be():
    """The first derivative always, higher ones up to the first that does not exist; not those of a lifted equation."""

    def known(field, u0):
        return solver(po.TaylorMode(), 4, po.TS0(po.ODE(field))).initialise(u0, 0.0).mean

    np.testing.assert_allclose(known(lambda t, u, args: t**1.5 - u, 1.0), [1.0, -1.0, 1.0, 0.0, 0.0], rtol=1e-12)
    np.testing.assert_allclose(known(lambda t, u, args: -u, 1.0), [1.0, -1.0, 1.0, -1.0, 1.0], rtol=1e-12)
    lifted = solver(po.TaylorMode(), 4, po.TS0(po.ODE(lambda t, u, args: jnp.sqrt(t) - u).lifted(3)))
    nowhere = solver(po.TaylorMode(), 4, po.TS0(po.ODE(lambda t, u, args: 1 / t - u)))
    for own in (lifted, nowhere):
        assert own.solve(1.0, 0.0, 1.0, throw=False).result == po.Result.initial_state_nonfinite


@pytest.mark.thorough
def test_gradients_with_respect_to_the_scale_and_the_start():
    def quantities(x):
        own = solver(po.Diffuse(1, scale=x[2]), 2, calibration=po.NoCalibration())
        solution = own.solve_grid(x[:2], np.linspace(0, 1, 6))
        return jnp.concatenate([solution.mean[-1], jnp.log(solution.std[-1]), solution.log_likelihood[None]])

    x = jnp.array([20.0, 20.0, 3.0])
    check_jacobians(quantities, x)


@pytest.mark.thorough
def test_a_residual_whose_derivatives_are_left_unknown():
    def residual(t, u, du, args):
        return du[0] + u[0], u[0] + u[1] - 2.0

    own = solver(po.Diffuse(0, scale=5.0), constraint=po.TS1(po.Residual(residual)))
    solution = own.solve(jnp.array([1.0, 1.0]), 0.0, 1.0)
    np.testing.assert_allclose(solution.mean[0], [np.exp(-1), 2 - np.exp(-1)], rtol=1e-3)


def test_errors():
    with pytest.raises(ValueError, match="num_derivatives_known"):
        po.Diffuse(-1)
    with pytest.raises(ValueError, match="positive"):
        po.Diffuse(1, scale=0.0)
    with pytest.raises(ValueError, match="derivatives up to order 4, but the prior has num_derivatives=3"):
        solver(po.Diffuse(4)).solve(U0, 0.0, 1.0)
