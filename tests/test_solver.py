"""Whole solves against oracles: known numbers, known orders, and equivalent routes that must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from . import oracles
from .helpers import (
    CONSTRAINTS,
    FACTORISATIONS,
    covariance,
    equations,
    first_of,
    left_to_nox,
    logistic,
    lotka_volterra,
    name,
    pendulum,
    relative,
)


def decay(t, u, args):
    return -u


# --- numbers known from several independent implementations ---


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_linear_decay_oracle(factorisation):
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(decay)), factorisation=factorisation, calibration=po.NoCalibration())
    grid = np.linspace(0.0, 1.0, 11)
    sliver = np.insert(grid, 10, np.nextafter(1.0, 0.0))
    for times in (grid, sliver):
        solution = solver.solve_grid(jnp.array([1.0]), times)
        assert abs(solution.mean[-1, 0] - 0.367870580482900) < 1e-14
        assert abs(solution.std[-1, 0] ** 2 / 7.983526359079e-08 - 1) < 1e-12


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)
def test_schober_first_step(constraint):
    # EK0 with IWP(1) is a Runge-Kutta method for one step: the trapezoidal rule about an Euler prediction.
    def field(t, u, args):
        return jnp.sin(u) + t

    y0, h = 0.7, 0.1
    z0 = np.sin(y0)
    euler = y0 + h * z0
    solver = po.Solver(po.IWP(1), po.TS0(po.ODE(field)), calibration=po.NoCalibration())
    state = solver.step(solver.init(jnp.array([y0]), 0.0), h)
    assert abs(state.mean[0] - (y0 + h / 2 * (z0 + np.sin(euler) + h))) < 1e-14
    assert abs(state.derivative(1).mean[0] - (np.sin(euler) + h)) < 1e-14


def test_against_a_plain_numpy_kalman_filter():
    # Full covariances, textbook update, by hand: EK1 with IWP(3) on Lotka-Volterra, ten steps.
    nu, d, h = 3, 2, 0.05
    rates = 0.5, 0.05, 0.5, 0.05
    solver = po.Solver(po.IWP(nu, output_scale=2.0), po.TS1(po.ODE(lotka_volterra)), calibration=po.NoCalibration())
    start = solver.initialise(jnp.array([20.0, 10.0]), 0.0)

    def linearise(_, m):
        u, v = m[0], m[1]
        f = np.array([rates[0] * u - rates[1] * u * v, -rates[2] * v + rates[3] * u * v])
        jacobian = np.array([[rates[0] - rates[1] * v, -rates[1] * u], [rates[3] * v, -rates[2] + rates[3] * u]])
        return np.concatenate([-jacobian, np.eye(d), np.zeros((d, (nu - 1) * d))], axis=1), m[d : 2 * d] - f

    a, q = oracles.iwp_transition(nu, h, d)
    m = np.concatenate([np.asarray(x) for x in start.mean])
    m, p, _ = oracles.kalman_filter(m, np.zeros_like(q), [(a, 4.0 * q)] * 10, linearise)

    solution = solver.solve_grid(start, h * np.arange(11))
    last = solution.marginals
    assert relative(last.mean[-1, :, 0], m) < 1e-12
    spread = np.sqrt(np.diag(p))
    np.testing.assert_allclose(
        covariance(last.factor[-1]) / np.outer(spread, spread), p / np.outer(spread, spread), atol=1e-7
    )
    np.testing.assert_allclose(solution.std[-1], spread[:2], rtol=1e-7)


# --- convergence ---


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)
@pytest.mark.parametrize("nu", [2, 5, *left_to_nox(1, 3, 4)])
def test_convergence_order_on_grids(constraint, nu):
    solver = po.Solver(
        po.IWP(nu), constraint(po.ODE(logistic)), factorisation=po.Isotropic(), calibration=po.NoCalibration()
    )
    exact = 0.1 * np.exp(4.0) / (0.9 + 0.1 * np.exp(4.0))
    steps = (160, 320) if nu <= 2 else (48, 96)  # asymptotic, and well above round-off
    errors = [abs(solver.solve_grid(jnp.asarray(0.1), np.linspace(0, 8, k + 1)).mean[-1] - exact) for k in steps]
    assert abs(np.log2(errors[0] / errors[1]) - (nu + 1)) < 0.3


@pytest.mark.parametrize("nu", [1, 11, *left_to_nox(2, 3, 4, 5, 6, 7, 8, 9, 10)])
def test_every_order_solves(nu):
    solver = po.Solver(
        po.IWP(nu),
        po.TS1(po.ODE(logistic)),
        factorisation=po.Isotropic(),
        controller=po.IntegralController(rtol=1e-6, atol=1e-8),
        loop=po.ForwardLoop(),
    )
    solution = solver.solve(jnp.asarray(0.1), 0.0, 2.0)
    exact = 0.1 * np.exp(1.0) / (0.9 + 0.1 * np.exp(1.0))
    assert abs(solution.mean[0] - exact) < 1e-6
    assert np.all(np.isfinite(solution.std))


# --- factorisations agree where the mathematics says so ---


GRID = np.linspace(0.0, 1.0, 8)


@pytest.mark.parametrize("order", first_of(1, 2))
def test_zeroth_order_means_agree_in_all_factorisations(order):
    u0 = jnp.array([0.5, 1.2])
    problem = po.ODE(lotka_volterra) if order == 1 else po.ODE(pendulum, order=2)
    value = u0 if order == 1 else (u0, 0.1 * u0)
    solutions = [
        po.Solver(po.IWP(3), po.TS0(problem), factorisation=f, calibration=po.NoCalibration()).solve_grid(value, GRID)
        for f in FACTORISATIONS
    ]
    for other in solutions[1:]:
        for k in range(4):
            assert relative(other.derivative(k).mean, solutions[0].derivative(k).mean) < 1e-11
            np.testing.assert_allclose(other.derivative(k).std, solutions[0].derivative(k).std, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("calibration", first_of(po.NoCalibration(), po.DynamicCalibration()), ids=name)
def test_first_order_equals_dense_where_the_jacobian_has_the_structure(calibration):
    u0 = jnp.array([0.3, 0.8])

    def uniform(t, u, args):  # Jacobian t I
        return t * u + 1

    def solve(field, factorisation, u0=u0):
        solver = po.Solver(po.IWP(3), po.TS1(po.ODE(field)), factorisation=factorisation, calibration=calibration)
        return solver.solve_grid(u0, GRID)

    dense, isotropic = solve(uniform, po.Dense()), solve(uniform, po.Isotropic())
    assert relative(isotropic.mean, dense.mean) < 1e-11
    np.testing.assert_allclose(isotropic.std, dense.std, rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(isotropic.output_scale, dense.output_scale, rtol=1e-6)

    diagonal = solve(logistic, po.BlockDiagonal())  # Jacobian diagonal: one scalar problem per component
    for i in range(2):
        alone = solve(logistic, po.Dense(), u0[i])
        np.testing.assert_allclose(diagonal.mean[:, i], alone.mean, rtol=1e-11)
        np.testing.assert_allclose(diagonal.std[:, i], alone.std, rtol=1e-6, atol=1e-14)
        np.testing.assert_allclose(diagonal.output_scale[:, i], alone.output_scale, rtol=1e-6)


def test_output_scale_moves_the_uncertainty_only():
    def solve(scale, factorisation=po.Dense()):
        solver = po.Solver(
            po.IWP(3, output_scale=scale),
            po.TS1(po.ODE(lotka_volterra)),
            factorisation=factorisation,
            calibration=po.NoCalibration(),
        )
        return solver.solve_grid(jnp.array([20.0, 20.0]), GRID)

    one, seven = solve(1.0), solve(7.0)
    assert relative(seven.mean, one.mean) < 1e-12
    np.testing.assert_allclose(seven.std, 7 * one.std, rtol=1e-9)
    np.testing.assert_array_equal(one.output_scale, 1)
    # per component: with a diagonal Jacobian each keeps its own
    for factorisation in (po.Dense(), po.BlockDiagonal()):
        solver = po.Solver(
            po.IWP(3, output_scale=jnp.array([1.0, 7.0])),
            po.TS0(po.ODE(lotka_volterra)),
            factorisation=factorisation,
            calibration=po.NoCalibration(),
        )
        mixed = solver.solve_grid(jnp.array([20.0, 20.0]), GRID)
        np.testing.assert_allclose(mixed.std[1:, 1], 7 * mixed.std[1:, 0], rtol=1e-9)


def test_dynamic_scale_is_the_local_estimate():
    # By hand, one step of EK0: s^2 = mean z^2 / (H Q H^T)
    solver = po.Solver(po.IWP(2), po.TS0(po.ODE(lotka_volterra)), factorisation=po.Isotropic())
    h, u0 = 0.1, jnp.array([20.0, 10.0])
    start = solver.initialise(u0, 0.0)
    u, du, ddu = start.mean
    predicted, slope = u + h * du + h**2 / 2 * ddu, du + h * ddu
    z = slope - lotka_volterra(h, predicted, None)
    expected = np.sqrt(np.mean(np.asarray(z) ** 2) / (h**3 / 3))
    solution = solver.solve_grid(u0, np.array([0.0, h]))
    np.testing.assert_allclose(solution.output_scale, [1.0, expected], rtol=1e-11)


# --- time ---


@pytest.mark.parametrize("order", first_of(1, 2))
def test_backwards_is_the_reversed_problem(order):
    def reverse(field):
        if order == 1:
            return lambda s, u, args: -field(-s, u, args)
        return lambda s, u, du, args: field(-s, u, -du, args)

    field = (lambda t, u, args: jnp.sin(t) * u + t**2) if order == 1 else pendulum
    u0 = jnp.array([0.7, -0.3])
    forward_value = u0 if order == 1 else (u0, 0.2 * u0)
    reversed_value = u0 if order == 1 else (u0, -0.2 * u0)

    def solver(field):
        return po.Solver(
            po.IWP(4), po.TS1(po.ODE(field, order=order)), controller=po.IntegralController(rtol=1e-7, atol=1e-9)
        )

    ts = np.array([0.9, 0.3, -0.4])
    back = solver(field).solve(forward_value, 1.0, -0.5, save_at=po.SaveAt(ts=ts, t1=True))
    mirror = solver(reverse(field)).solve(reversed_value, -1.0, 0.5, save_at=po.SaveAt(ts=-ts, t1=True))
    assert back.stats["num_steps"] == mirror.stats["num_steps"] > 2
    np.testing.assert_array_equal(back.t, -mirror.t)
    for k in range(5):
        np.testing.assert_allclose(back.derivative(k).mean, (-1) ** k * mirror.derivative(k).mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(back.derivative(k).std, mirror.derivative(k).std, rtol=1e-5, atol=1e-12)


def test_there_and_back_again():
    solver = po.Solver(
        po.IWP(4), po.TS1(po.ODE(lotka_volterra)), controller=po.IntegralController(rtol=1e-9, atol=1e-9)
    )
    u0 = jnp.array([20.0, 15.0])
    u1 = solver.solve(u0, 0.0, 3.0).mean[0]
    np.testing.assert_allclose(solver.solve(u1, 3.0, 0.0).mean[0], u0, rtol=1e-8)


@pytest.mark.parametrize("span", first_of(1e6, 5e-9, 1e-3))
@pytest.mark.parametrize("start", first_of(1.0, 0.0))
def test_units_of_time_do_not_matter(span, start):
    # u' = -rate u with rate span = 1 : nothing in the solver may know what a second is
    if start and span < 1e-6:
        start = 1e-3  # keep the interval well above the round-off of the time
    solver = po.Solver(
        po.IWP(3),
        po.TS1(po.ODE(lambda t, u, args: -args * u)),
        controller=po.IntegralController(rtol=1e-7, atol=1e-9),
    )
    solution = solver.solve(jnp.array([1.0]), start, start + span, args=1 / span)
    reference = solver.solve(jnp.array([1.0]), 0.0, 1.0, args=1.0)
    assert abs(solution.mean[0, 0] - np.exp(-1)) < 1e-7
    assert abs(int(solution.stats["num_steps"]) - int(reference.stats["num_steps"])) <= 2


# --- stepping by hand, continuing ---


def test_steps_are_the_grid():
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)))
    grid = np.cumsum([0.0, 0.1, 0.05, 0.2])
    solution = solver.solve_grid(jnp.array([20.0, 20.0]), grid)
    state = solver.init(jnp.array([20.0, 20.0]), 0.0)
    for i, t in enumerate(grid[1:], start=1):
        state = solver.step(state, t - state.t)
        np.testing.assert_allclose(state.mean, solution.mean[i], rtol=1e-12)
        np.testing.assert_allclose(state.std, solution.std[i], rtol=1e-6, atol=1e-14)
    np.testing.assert_array_equal(solution.t, grid)


@pytest.mark.thorough
def test_a_zero_step_changes_nothing():
    solver = po.Solver(po.IWP(2), po.TS0(po.ODE(lotka_volterra)))
    state = solver.step(solver.init(jnp.array([20.0, 20.0]), 0.0), 0.1)
    again = solver.step(state, 0.0)
    np.testing.assert_array_equal(again.mean, state.mean)
    np.testing.assert_array_equal(again.std, state.std)
    gradient = jax.jit(jax.grad(lambda dt: jnp.sum(solver.step(state, dt).mean)))(0.0)
    np.testing.assert_allclose(gradient, jnp.sum(state.derivative(1).mean), rtol=1e-12)


@pytest.mark.thorough
def test_going_on_is_bitwise_the_uninterrupted_solve():
    def solver(max_steps, stop_at=(2.5,)):
        return po.Solver(
            po.IWP(3),
            po.TS1(po.ODE(lotka_volterra)),
            controller=po.PIController(rtol=1e-5, atol=1e-7, stop_at=jnp.array(stop_at)),
            loop=po.BoundedLoop(max_steps=max_steps),
        )

    u0 = jnp.array([20.0, 20.0])
    whole = solver(256).solve(u0, 0.0, 5.0)
    part = solver(17).solve(u0, 0.0, 5.0, throw=False)
    assert part.result == po.Result.max_steps_reached
    rest = solver(256).solve(part.state, part.state.t, 5.0)
    np.testing.assert_array_equal(rest.mean, whole.mean)
    np.testing.assert_array_equal(rest.std, whole.std)
    assert part.stats["num_steps"] + rest.stats["num_steps"] == whole.stats["num_steps"]
    # a stop in between is where a second solve may take over, on either side of it
    first = solver(256).solve(u0, 0.0, 2.5)
    just_behind = solver(int(first.stats["num_steps"])).solve(u0, 0.0, 5.0, throw=False)
    assert just_behind.state.t == 2.5
    np.testing.assert_array_equal(solver(256).solve(just_behind.state, 2.5, 5.0).mean, whole.mean)
    second = solver(256).solve(first.state, 2.5, 5.0)
    np.testing.assert_array_equal(second.mean, whole.mean)


# --- what is solved ---


def test_pytrees_scalars_and_args():
    def field(t, u, args):
        return {"a": (args["rate"] * u["a"][0],), "b": -u["b"] + jnp.sum(u["a"][0])}

    u0 = {"a": (jnp.ones((2, 1)),), "b": jnp.asarray(3.0)}
    solution = po.Solver(po.IWP(3), po.TS1(po.ODE(field))).solve(u0, 0.0, 1.0, args={"rate": -0.5}, save_at=[0.5, 1.0])
    assert jax.tree.structure(solution.mean) == jax.tree.structure(u0) == jax.tree.structure(solution.std)
    assert solution.mean["a"][0].shape == (2, 2, 1) and solution.mean["b"].shape == (2,)
    np.testing.assert_allclose(solution.mean["a"][0][-1], np.exp(-0.5) * np.ones((2, 1)), rtol=1e-3)

    scalar = po.Solver(po.IWP(3), po.TS0(po.ODE(decay)), factorisation=po.Isotropic()).solve(1.0, 0.0, 1.0)
    assert scalar.mean.shape == (1,) == scalar.std.shape
    assert abs(scalar.mean[0] - np.exp(-1)) < 1e-3


def test_higher_orders_against_the_first_order_system():
    def third(t, u, du, ddu, args):  # u''' = -u' + t
        return -du + t

    u0 = (jnp.array([1.0]), jnp.array([0.5]), jnp.array([-0.2]))
    controller = po.IntegralController(rtol=1e-10, atol=1e-12)
    native = po.Solver(po.IWP(5), po.TS1(po.ODE(third, order=3)), controller=controller).solve(u0, 0.0, 2.0)
    system = po.Solver(
        po.IWP(4), po.TS1(po.ODE(lambda t, u, args: (u[1], u[2], -u[1] + t))), controller=controller
    ).solve(u0, 0.0, 2.0)
    for k in range(3):
        np.testing.assert_allclose(native.derivative(k).mean, system.mean[k], rtol=1e-7)


def test_solve_ivp():
    for method in ("EK0", "EK1"):
        solution = po.solve_ivp(
            lotka_volterra, (0.0, 2.0), jnp.array([20.0, 20.0]), method=method, t_eval=[1.0, 2.0], rtol=1e-6, atol=1e-8
        )
        end = po.solve_ivp(lotka_volterra, (0.0, 2.0), jnp.array([20.0, 20.0]), method=method, rtol=1e-6, atol=1e-8)
        assert solution.t.shape == (2,) and end.t.shape == (1,)
        np.testing.assert_allclose(solution.mean[-1], end.mean[0], rtol=1e-12)


@pytest.mark.thorough
def test_known_save_times_inside_a_jit():
    solver = po.Solver(po.IWP(2), po.TS0(po.ODE(logistic)))
    ts = np.array([0.5, 1.0])
    inside = jax.jit(lambda: solver.solve(jnp.array([0.1]), 0.0, 1.0, save_at=ts).mean)()
    np.testing.assert_allclose(inside, solver.solve(jnp.array([0.1]), 0.0, 1.0, save_at=ts).mean, rtol=1e-14)


@pytest.mark.thorough
def test_the_one_liner_smooths():
    u0, ts, field = jnp.array([20.0, 20.0]), np.linspace(0, 2, 5), po.ODE(lotka_volterra)
    one = po.solve_ivp(lotka_volterra, (0.0, 2.0), u0, t_eval=ts)
    smoother = po.Solver(po.RelativeScale(po.IWP(4)), po.TS1(field), strategy=po.FixedPointSmoother())
    np.testing.assert_allclose(one.std, smoother.solve(u0, 0.0, 2.0, save_at=ts).std, rtol=1e-12, atol=1e-16)
    assert po.solve_ivp(lotka_volterra, (0.0, 2.0), u0).t.shape == (1,)
    dense = po.solve_ivp(lotka_volterra, (0.0, 2.0), u0, dense_output=True)
    assert dense.t.shape == (1,)
    np.testing.assert_allclose(dense.evaluate(ts).mean, one.mean, rtol=1e-9)
    both = po.solve_ivp(lotka_volterra, (0.0, 2.0), u0, t_eval=ts, dense_output=True)
    np.testing.assert_allclose(both.std, dense.evaluate(ts).std, rtol=1e-9, atol=1e-16)
    assert np.all(both.std <= one.std)  # less of it, by the residuals that the steps predict of each other


@pytest.mark.thorough
@pytest.mark.parametrize("constraint", first_of(po.TS1, po.TS0), ids=name)
def test_products_of_matrices_have_the_precision_of_their_numbers(constraint):
    """GPUs round factors to ten bits by default: noise in a linear field that no step is short enough for."""
    a = jnp.linspace(-1, 0, 400, dtype=jnp.float32).reshape(20, 20)
    ode = po.ODE(lambda t, u, args: a @ u)
    solver = po.Solver(po.IWP(2), constraint(ode), strategy=po.FixedIntervalSmoother(), loop=po.BoundedLoop(16))

    def solve(u0):
        solution = solver.solve(u0, 0.0, 1.0, save_at=po.SaveAt(t1=True, dense=True), throw=False)
        on_a_grid = solver.solve_grid(u0, np.linspace(0.0, 1.0, 3, dtype=np.float32)).std
        return solution.evaluate(0.5).std, solution.sample(jax.random.key(0), (3,)), on_a_grid

    def precisions():
        program = jax.make_jaxpr(jax.vmap(jax.jacrev(solve)))(jnp.ones((2, 20), jnp.float32))
        products = [x for x in equations(program.jaxpr) if x.primitive.name == "dot_general"]
        return {None if x.params["precision"] is None else x.params["precision"][0] for x in products}

    assert precisions() == {jax.lax.Precision.HIGHEST}
    with jax.default_matmul_precision("high"):
        assert precisions() == {jax.lax.Precision.HIGH}
