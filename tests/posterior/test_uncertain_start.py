"""Uncertain initial values: the exact push-forward on linear equations, to first order on others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import central_differences, check_jacobians, first_of, lotka_volterra, name, relative


MATRIX = jnp.array([[0.0, 1.0], [-2.0, -0.3]])
MEAN = jnp.array([1.0, 0.5])
FACTOR = np.array([[0.3, 0.1], [0.0, 0.2]])
TS = np.linspace(0.0, 3.0, 4)


def linear(t, u, args):
    return MATRIX @ u


def fitzhugh_nagumo(t, u, args):
    return jnp.stack([u[0] - u[0] ** 3 / 3 + u[1], -(u[0] - 0.2 + 0.2 * u[1]) / 3])


def solver(field=linear, **parts):
    parts = {"controller": po.IntegralController(1e-9, 1e-9), "loop": po.ForwardLoop(256)} | parts
    return po.Solver(po.IWP(5), po.TS1(po.ODE(field)), **parts)


def exact(ts):
    flow = np.stack([np.asarray(jax.scipy.linalg.expm(MATRIX * t)) for t in ts])
    return flow, flow @ (FACTOR.T @ FACTOR) @ np.swapaxes(flow, 1, 2)


@pytest.mark.parametrize(
    ("factorisation", "strategy"),
    first_of(
        (po.Dense(), po.Filter()),
        # Mapped along directions and components at once, the derivative of an elimination mixed up the two axes.
        (po.BlockDiagonal(), po.FixedPointSmoother()),
        (po.Dense(), po.FixedPointSmoother()),
        (po.Dense(), po.FixedIntervalSmoother()),
    ),
    ids=name,
)
def test_the_push_forward_of_a_linear_equation(factorisation, strategy):
    own = solver(factorisation=factorisation, strategy=strategy)
    solution = own.solve(po.Normal(MEAN, FACTOR), 0.0, 3.0, save_at=TS)
    flow, covariance = exact(TS)
    np.testing.assert_allclose(solution.mean, flow @ MEAN, rtol=1e-7)
    np.testing.assert_allclose(solution.std**2, np.diagonal(covariance, axis1=1, axis2=2), rtol=1e-7)
    if isinstance(strategy, po.Filter):
        end = own.solve(po.Normal(MEAN, FACTOR), 0.0, 3.0)
        draws = end.sample(jax.random.key(1), (100_000,))[:, 0]
        error = np.cov(draws.T) - covariance[-1]
        assert np.max(np.abs(error)) < 4 * np.max(covariance[-1]) * np.sqrt(2 / 100_000)
        return
    # A draw passes through all rows, of which a fixed-interval smoother has 257.
    number = 500 if strategy.keeps_steps else 100_000
    draws = np.asarray(solution.sample(jax.random.key(0), (number,)))
    draws = draws - draws.mean(axis=0)
    for i, j in [(1, 1), (1, 3), (0, 2)]:
        expected = flow[i] @ (FACTOR.T @ FACTOR) @ flow[j].T
        assert np.max(np.abs(draws[:, i].T @ draws[:, j] / number - expected)) < 4 * 0.5 * np.sqrt(2 / number)
    if strategy.keeps_steps:
        between = exact([0.7])[1][0]
        std = solution.evaluate([*TS, 0.7]).std
        np.testing.assert_allclose(std[:-1], solution.std, rtol=1e-12)
        np.testing.assert_allclose(std[-1] ** 2, np.diagonal(between), rtol=1e-6)
        again = solution.sample(jax.random.key(0), (500,), ts=np.array([0.7]))
        np.testing.assert_allclose(np.std(again[:, 0], axis=0), np.sqrt(np.diagonal(between)), rtol=4 / np.sqrt(1000))


@pytest.mark.thorough
def test_standard_deviations_and_trees():
    u0 = {"x": jnp.array(1.0), "v": jnp.array([0.5])}
    stds = {"x": 0.3, "v": jnp.array([0.2])}

    def field(t, u, args):
        return {"x": u["v"][0], "v": -2 * u["x"] - 0.3 * u["v"]}

    tree = solver(field).solve_grid(po.Normal(u0, stds), TS)
    flat = solver().solve_grid(po.Normal(MEAN, np.diag([0.3, 0.2])), TS)
    np.testing.assert_allclose(tree.std["x"], flat.std[:, 0], rtol=1e-9)
    np.testing.assert_allclose(tree.std["v"][:, 0], flat.std[:, 1], rtol=1e-9)


@pytest.mark.thorough
def test_of_second_order_and_of_a_scalar():
    def spring(t, u, du, args):
        return -2 * u - 0.3 * du

    own = po.Solver(po.IWP(5), po.TS1(po.ODE(spring, order=2)), controller=po.IntegralController(1e-9, 1e-9))
    solution = own.solve(po.Normal((1.0, 0.5), (0.3, 0.2)), 0.0, 3.0)
    flow = np.asarray(jax.scipy.linalg.expm(3.0 * MATRIX))
    np.testing.assert_allclose(solution.std[0], np.sqrt((flow @ np.diag([0.09, 0.04]) @ flow.T)[0, 0]), rtol=1e-7)


@pytest.mark.thorough
def test_a_nonlinear_equation_to_first_order():
    # The spread is that of the flow's Jacobian, which finite differences of the solver itself tell.
    def end(u0):
        return solver(lotka_volterra).solve(u0, 0.0, 5.0).mean[0]

    jacobian = central_differences(jax.jit(end), jnp.array([20.0, 20.0]), 1e-4)
    own = solver(lotka_volterra).solve(po.Normal(jnp.array([20.0, 20.0]), FACTOR), 0.0, 5.0)
    covariance = jacobian @ (FACTOR.T @ FACTOR) @ jacobian.T
    np.testing.assert_allclose(own.std[0] ** 2, np.diagonal(covariance), rtol=1e-6)


def spring(t, u, args):
    return jnp.stack([u[1], -u[0]])


def rest(constraint=po.TS1, problem=po.ODE(spring), **parts):
    parts = {"controller": po.IntegralController(1e-6, 1e-9), "loop": po.ForwardLoop(256)} | parts
    return po.Solver(po.IWP(4), constraint(problem), **parts)


AT_REST = {
    "TS1": rest(),
    "TS0": rest(po.TS0, factorisation=po.BlockDiagonal()),
    "with stops": rest(controller=po.IntegralController(1e-6, 1e-9, stop_at=[1.0, 2.5])),
    "the diagonal": rest(factorisation=po.BlockDiagonal()),
    "a residual": rest(problem=po.Residual(lambda t, u, du, args: du - spring(t, u, args))),
    "cubature": rest(po.SLR1),
    "a constant scale": rest(calibration=po.NoCalibration(), error=po.StateError()),
    "smoothed": rest(strategy=po.FixedIntervalSmoother()),
    "TS0 in stops": rest(po.TS0, controller=po.IntegralController(1e-6, 1e-9, stop_at=[1.0, 2.5])),
}


@pytest.mark.parametrize("name", first_of("TS0", *(name for name in AT_REST if name != "TS0")))
@pytest.mark.thorough
def test_where_the_mean_is_at_rest_steps_are_those_that_the_spread_needs(name):
    own, flow = AT_REST[name], np.asarray(jax.scipy.linalg.expm(5.0 * jnp.array([[0.0, 1.0], [-1.0, 0.0]])))
    uncertain = po.Normal(jnp.zeros(2), FACTOR)
    solution = own.solve(uncertain, 0.0, 5.0)
    expected = np.sqrt(np.diagonal(flow @ (FACTOR.T @ FACTOR) @ flow.T))
    np.testing.assert_allclose(solution.std[0], expected, rtol=1e-5)
    # Going on from a piece, with error control or without, and what a state says of itself.
    piece = own.solve(uncertain, 0.0, 2.0)
    np.testing.assert_allclose(piece.state.current.std, piece.std[0], rtol=1e-12)
    np.testing.assert_allclose(own.solve(piece.state, 2.0, 5.0).std[0], expected, rtol=1e-5)
    if name == "TS1":
        state = piece.state.current
        for _ in range(40):
            state = own.step(state, 3.0 / 40)
        np.testing.assert_allclose(state.std, expected, rtol=1e-6)
        # The directions are columns of the Jacobian, which the steps of the mean alone know nothing about.
        whole = own.solve(po.Normal(jnp.zeros(2), np.eye(2)), 0.0, 5.0)
        np.testing.assert_allclose(whole.spread.means[:, 0, :2, 0].T, flow, atol=1e-5)


@pytest.mark.thorough
def test_a_room_as_warm_as_it_will_be():
    room = rest(problem=po.ODE(lambda t, u, args: -(u - 20.0)), controller=po.IntegralController(1e-9, 1e-12))
    solution = room.solve(po.Normal(20.0, 1.0), 0.0, 10.0)
    np.testing.assert_allclose(solution.std[0], np.exp(-10.0), rtol=1e-4)
    # On the way there as well, and backwards.
    np.testing.assert_allclose(room.solve(po.Normal(20.0, 1.0), 0.0, -1.0).std[0], np.exp(1.0), rtol=1e-7)


@pytest.mark.thorough
def test_gradients_with_respect_to_mean_and_spread():
    def std(x):
        u0 = po.Normal(x[:2], x[2] * jnp.asarray(FACTOR))
        own = po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)), calibration=po.NoCalibration())
        return own.solve_grid(u0, np.linspace(0.0, 1.0, 6)).std[-1]

    x = jnp.array([20.0, 20.0, 1.0])
    check_jacobians(std, x, atol=0)


@pytest.mark.parametrize("stops", first_of([0.5, 1.0, 2.0], None), ids=["stops", "none"])
def test_at_loose_tolerances(stops):
    """Gains depend on residuals, steeply where these are small: a spread that saw this was 3 times too large."""
    own = po.Solver(
        po.RelativeScale(po.IWP(4)),
        po.TS1(po.ODE(fitzhugh_nagumo)),
        controller=po.IntegralController(1e-2, 1e-6, stop_at=stops),
    )
    precise = po.Solver(
        po.IWP(5), po.TS0(po.ODE(fitzhugh_nagumo).lifted(4)), controller=po.IntegralController(1e-9, 1e-9)
    )
    derivative = jax.jit(jax.jacfwd(lambda u0: precise.solve(u0, 0.0, 3.0).mean[-1]))
    for shift in (-0.17, -0.09, 0.02, 0.13):
        start = jnp.array([0.0, 1.0 + shift])
        moves = derivative(start)
        solution = own.solve(po.Normal(start, jnp.array([0.1, 0.1])), 0.0, 3.0)
        np.testing.assert_allclose(solution.std[-1], 0.1 * np.linalg.norm(moves, axis=1), rtol=0.05)


def test_gradients_of_the_numerical_uncertainty():
    """The derivative along the spread has fixed gains, one of the result has not: almost certain is as certain."""

    def deviation(rate, start):
        solution = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, rate: -rate * u * (2 - u)))).solve(
            start, 0.0, 1.0, args=rate
        )
        return solution.std[-1]

    certain, almost = (jax.grad(deviation)(1.3, start) for start in (1.0, po.Normal(1.0, 1e-13)))
    assert certain > 0
    np.testing.assert_allclose(almost, certain, rtol=1e-4)


@pytest.mark.thorough
def test_errors():
    uncertain = po.Normal(MEAN, FACTOR)
    with pytest.raises(ValueError, match=r"Use Dense\(\) or BlockDiagonal\(\)"):
        solver(factorisation=po.Isotropic()).solve(uncertain, 0.0, 1.0)
    for calibration in (po.MLECalibration(), po.LeaveOneOutCalibration()):
        with pytest.raises(ValueError, match="rescales all covariances"):
            solver(calibration=calibration).solve(uncertain, 0.0, 1.0)
    with pytest.raises(ValueError, match="standard deviations like its mean"):
        solver().solve(po.Normal(MEAN, np.ones((3, 3))), 0.0, 1.0)
    with pytest.raises(TypeError, match="u0 is a Normal"):
        solver().init(uncertain, 0.0)
    ended = solver().solve(uncertain, 0.0, 1.0)
    with pytest.raises(ValueError, match="learns nothing from data"):
        solver().solve(ended.state, 1.0, 2.0, data=po.Observations([1.5], MEAN[None], 0.1))
    # Another program: equal up to round-off.
    assert relative(solver(loop=po.CheckpointedLoop(512)).solve(uncertain, 0.0, 1.0).std, ended.std) < 1e-14
    assert relative(ended.mean[0], solver().solve(MEAN, 0.0, 1.0).mean[0]) < 1e-12
