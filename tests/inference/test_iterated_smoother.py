"""The iterated smoother: its limit is the most probable trajectory, and it says whether it got there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .. import oracles
from ..helpers import central_differences, first_of, lotka_volterra, name, relative


GRID = np.linspace(0.0, 2.0, 6)
U0 = jnp.array([1.0, 0.5])


def field(t, u, args):
    rate = 1.0 if args is None else args
    return jnp.stack([-rate * u[0] ** 3 + jnp.sin(t), u[0] * u[1]])


def solver(constraint=po.TS1, nu=2, **parts):
    parts = {"strategy": po.FixedIntervalSmoother(), "calibration": po.NoCalibration()} | parts
    return po.Solver(po.IWP(nu), constraint(po.ODE(field)), **parts)


def square(t, u, args):
    return u[:1] ** 2


SEEN = np.array([2, 4])
DATA = po.Observations(GRID[SEEN], np.array([[0.4], [1.0]]), 0.1, observe=square)


@pytest.mark.parametrize("data", first_of(DATA, None), ids=["data", "equation"])
def test_the_limit_is_the_most_probable_trajectory(data):
    # It minimises the prior's quadratic form where the equation holds: z(x) = 0 and x - m = C H(x)^T multiplier; with
    # data it minimises that and their squares: x - m = C (H^T multiplier + h'(x)^T (y - h(x)) / noise^2).
    solution = po.solve_grid_iterated(solver(), U0, GRID, data=data, tolerance=1e-12, max_iterations=60)
    assert solution.stats["last_move"] < 1e-12 and 2 < solution.stats["num_iterations"] < 60
    steps, d, size = GRID.size - 1, 2, 6
    x = np.asarray(solution.marginals.mean[..., 0])
    transitions = [oracles.iwp_transition(2, dt, d) for dt in np.diff(GRID)]
    prior, covariance = oracles.joint_gaussian(x[0], np.zeros((size, size)), transitions)
    prior, covariance = prior[size:], covariance[size:, size:]
    jacobian = np.zeros((steps * d, steps * size))
    for i in range(steps):
        u, du = x[i + 1, :d], x[i + 1, d : 2 * d]
        np.testing.assert_allclose(du, field(GRID[i + 1], u, None), rtol=1e-11, atol=1e-12)
        rows = slice(i * d, (i + 1) * d)
        jacobian[rows, i * size : i * size + d] = -jax.jacobian(field, argnums=1)(GRID[i + 1], u, None)
        jacobian[rows, i * size + d : i * size + 2 * d] = np.eye(d)
    moved = x[1:].ravel() - prior
    if data is not None:
        slopes = np.zeros((SEEN.size, steps * size))
        slopes[np.arange(SEEN.size), (SEEN - 1) * size] = 2 * x[SEEN, 0]
        misfit = np.asarray(data.values)[:, 0] - x[SEEN, 0] ** 2
        assert np.max(np.abs(misfit)) > 0.05
        moved = moved - covariance @ slopes.T @ misfit / 0.1**2
    gain = covariance @ jacobian.T
    multiplier = np.linalg.solve(jacobian @ gain, jacobian @ moved)
    np.testing.assert_allclose(gain @ multiplier, moved, rtol=1e-8, atol=1e-9)
    # and the extended filter's smoother is not there
    once = solver().solve_grid(U0, GRID, data=data)
    assert relative(once.mean, solution.mean) > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("factorisation", "calibration"),
    first_of(
        (po.Dense(), po.MLECalibration()),
        (po.BlockDiagonal(), po.DynamicCalibration()),
        (po.Isotropic(), po.LeaveOneOutCalibration()),
    ),
    ids=name,
)
def test_it_works_with_everything(factorisation, calibration):
    parts = {"factorisation": factorisation, "calibration": calibration}
    u0 = {"a": jnp.asarray(20.0), "b": jnp.asarray(15.0)}
    ode = po.ODE(lambda t, u, args: dict(zip("ab", lotka_volterra(t, (u["a"], u["b"]), args), strict=True)))
    made = po.Solver(po.IWP(2), po.TS1(ode), strategy=po.FixedIntervalSmoother(), **parts)
    solution = po.solve_grid_iterated(made, u0, np.linspace(1.0, 0.0, 5), max_iterations=60)
    assert solution.stats["last_move"] < 1e-8
    residual = jax.tree.map(
        lambda a, b: a - b,
        solution.derivative(1).mean,
        jax.vmap(lambda u: ode.vector_field(0.0, u, None))(solution.mean),
    )
    # A Jacobian of another structure converges more slowly, to the same kind of point.
    assert all(jnp.max(jnp.abs(leaf)) < 1e-5 for leaf in jax.tree.leaves(residual))
    assert solution.evaluate(0.3).mean["a"].shape == ()


@pytest.mark.thorough
@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_an_uncertain_initial_value_is_linearised_again(order):
    # u' = -u^2, u(0) = 2 and u(1) = 2/3, and as u'' = 2 u^3; the prior of u(0) is one standard deviation off. With
    # derivatives linearised at its mean 41 points found u(0) = 1.64 +- 5e-6, and 161 points 1.11.
    if order == 1:
        ode, u0 = po.ODE(lambda t, u, args: -(u**2)), po.Normal(1.0, 1.0)
    else:
        ode, u0 = po.ODE(lambda t, u, du, args: 2 * u**3, order=2), po.Normal((1.0, -1.0), (1.0, 5.0))
    data = po.Observations([0.5, 1.0], np.array([1.0, 2 / 3]), 1e-6)
    made = po.Solver(po.IWP(3), po.TS1(ode), strategy=po.FixedIntervalSmoother(), calibration=po.NoCalibration())
    solution = po.solve_grid_iterated(made, u0, np.linspace(0, 1, 41), data=data)
    assert solution.stats["last_move"] < 1e-8
    for k, right in enumerate((2.0, -4.0, 16.0)):
        found = solution.derivative(k)
        assert abs(found.mean[0] - right) < max(4 * found.std[0], 1e-3 * abs(right))
        assert found.std[0] < 1e-3 * abs(right)


@pytest.mark.thorough
def test_derivatives_are_those_of_the_limit():
    made = solver(nu=1)

    @jax.jit
    def means(rate):
        solution = po.solve_grid_iterated(made, U0, GRID[:4], args=rate[0], tolerance=1e-12, max_iterations=16)
        return solution.mean[1:].ravel()

    rate = np.array([0.8])
    expected = central_differences(means, rate, 1e-3)
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert relative(jax.jit(jacobian(means))(jnp.asarray(rate)), expected) < 1e-6


@pytest.mark.thorough
def test_it_says_when_it_has_not_converged_and_what_it_needs():
    short = po.solve_grid_iterated(solver(), U0, GRID, max_iterations=1)
    assert short.stats["num_iterations"] == 1 and short.stats["last_move"] > 1e-3
    with pytest.raises(ValueError, match="FixedIntervalSmoother"):
        po.solve_grid_iterated(solver(strategy=po.Filter()), U0, GRID)
    with pytest.raises(ValueError, match="evaluations=1"):
        po.solve_grid_iterated(solver(lambda ode: po.TS1(ode, evaluations=2)), U0, GRID)
    with pytest.raises(ValueError, match="positive"):
        po.solve_grid_iterated(solver(), U0, GRID, tolerance=0.0)
