"""The prior that takes its rate from the equation, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import FACTORISATIONS, check_jacobians, first_of, lotka_volterra, name, pendulum, relative


MATRIX = jnp.array([[-1.0, 1.0], [0.0, -100.0]])
U0 = jnp.array([1.0, 1.0])


def semilinear(t, u, args):
    return MATRIX @ u + 0.1 * jnp.stack([jnp.sin(u[1]), u[0] * u[1]])


ODE = po.ODE(semilinear)


def heat(size=8):
    """Reaction and diffusion on a line: stiff, and the reaction is part of the Jacobian."""
    x, laplace = jnp.arange(1, size + 1) / (size + 1), jnp.eye(size, k=1) + jnp.eye(size, k=-1) - 2 * jnp.eye(size)
    matrix = 0.1 * (size + 1) ** 2 * laplace
    return matrix, po.ODE(lambda t, u, args: matrix @ u + 3 * u * (1 - u)), jnp.sin(jnp.pi * x)


@pytest.mark.thorough
def test_the_more_a_method_knows_of_the_equation_the_better():
    matrix, ode, u0 = heat()
    reference = po.Solver(
        po.IWP(7), po.TS1(ode), controller=po.IntegralController(1e-12, 1e-12), loop=po.ForwardLoop(4096)
    )
    end, errors = reference.solve(u0, 0.0, 1.0).mean[0], []
    for prior, constraint in (
        (po.IWP(2), po.TS0(ode)),
        (po.IWP(2), po.TS1(ode)),
        (po.IOUP(2, matrix), po.TS1(ode)),
        (po.RosenbrockIOUP(2), po.TS1(ode)),
    ):
        solver = po.Solver(prior, constraint, calibration=po.NoCalibration())
        errors.append(float(jnp.max(jnp.abs(solver.solve_grid(u0, np.linspace(0, 1, 61)).mean[-1] - end))))
    assert errors == sorted(errors, reverse=True) and errors[3] < errors[1] / 10, errors


@pytest.mark.parametrize("grid", first_of([0.0, 3.0], np.linspace(0, 3, 20)))
def test_linear_equations_are_exact_in_any_number_of_steps(grid):
    matrix = jnp.array([[-0.5, 1.0], [-1.0, -0.2]])
    solver = po.Solver(po.RosenbrockIOUP(2), po.TS1(po.ODE(lambda t, u, args: matrix @ u)))
    end = solver.solve_grid(U0, grid).mean[-1]
    np.testing.assert_allclose(end, jax.scipy.linalg.expm(3.0 * matrix) @ U0, rtol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_it_solves_and_smooths_under_every_factorisation(factorisation):
    times, solutions = np.array([0.0, 0.013, 0.4, 1.0]), []
    for strategy in (po.FixedPointSmoother(), po.FixedIntervalSmoother()):
        solver = po.Solver(
            po.RosenbrockIOUP(3),
            po.TS1(ODE),
            factorisation=factorisation,
            strategy=strategy,
            controller=po.IntegralController(1e-5, 1e-5),
        )
        solutions.append(solver.solve(U0, 0.0, 1.0, save_at=times))
    point, interval = solutions
    reference = po.Solver(po.IWP(4), po.TS1(ODE), controller=po.IntegralController(1e-8, 1e-8))
    assert relative(point.mean, reference.solve(U0, 0.0, 1.0, save_at=times).mean) < 1e-4
    assert relative(point.mean, interval.mean) < 1e-10 and relative(point.std, interval.std) < 1e-8
    np.testing.assert_allclose(interval.evaluate(times).std, interval.std, rtol=1e-10)


@pytest.mark.thorough
def test_steps_are_as_long_as_the_nonlinear_part_allows():
    steps = [
        po.Solver(prior, po.TS1(ODE), controller=po.IntegralController(1e-6, 1e-6))
        .solve(U0, 0.0, 1.0)
        .stats["num_steps"]
        for prior in (po.IWP(3), po.RosenbrockIOUP(3))
    ]
    assert steps[1] < steps[0] / 5


@pytest.mark.thorough
def test_leaving_one_out_uses_the_prior_of_every_step():
    # With a linear equation all steps have the same rate, which a prior can be given beforehand.
    linear = po.ODE(lambda t, u, args: MATRIX @ u + jnp.cos(t))
    stds = []
    for prior in (po.IOUP(2, MATRIX), po.RosenbrockIOUP(2)):
        solver = po.Solver(prior, po.TS1(linear), calibration=po.LeaveOneOutCalibration())
        stds.append(solver.solve_grid(U0, np.linspace(0, 1, 11)).std)
    np.testing.assert_allclose(stds[1], stds[0], rtol=1e-9, atol=1e-18)


@pytest.mark.thorough
def test_gradients():
    def quantities(x):
        solver = po.Solver(
            po.RosenbrockIOUP(2, output_scale=x[3]), po.TS1(po.ODE(lotka_volterra)), calibration=po.NoCalibration()
        )
        solution = solver.solve_grid(x[:2], np.linspace(0, 1, 5), args=(x[2], 0.05, 0.5, 0.05))
        return jnp.concatenate([solution.mean[-1], jnp.log(solution.std[-1]), solution.log_likelihood[None]])

    x = jnp.array([20.0, 20.0, 0.5, 3.0])
    check_jacobians(quantities, x)


@pytest.mark.thorough
def test_a_solve_goes_on_with_it_and_without_it():
    controller = po.IntegralController(1e-6, 1e-6)
    plain, own = (po.Solver(prior, po.TS1(ODE), controller=controller) for prior in (po.IWP(3), po.RosenbrockIOUP(3)))
    half, whole = own.solve(U0, 0.0, 0.5), own.solve(U0, 0.0, 1.0)
    for solver in (own, plain):
        assert relative(solver.solve(half.state, 0.5, 1.0).mean, whole.mean) < 1e-5
    assert relative(own.solve(plain.solve(U0, 0.0, 0.5).state, 0.5, 1.0).mean, whole.mean) < 1e-5


def test_errors():
    with pytest.raises(TypeError, match="ODE of order one"):
        po.Solver(po.RosenbrockIOUP(3), po.TS1(po.ODE(pendulum, order=2))).solve_grid((1.0, 0.0), [0.0, 1.0])
    with pytest.raises(ValueError, match="without them pass a prior"):
        po.sample_prior(po.RosenbrockIOUP(3), jax.random.key(0), np.linspace(0, 1, 3), U0)
