"""Covariances of all components, and the distribution at one time as the start of another solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import probode as po

from ..helpers import first_of, name


MATRIX = np.array([[-1.0, 2.0, 0.0], [-1.0, -0.5, 0.3], [0.2, 0.0, -0.4]])
FACTOR = np.array([[0.1, 0.05, 0.0], [0.0, 0.2, -0.1], [0.0, 0.0, 0.1]])


def linear(t, u, args):
    du = MATRIX @ jnp.append(u["x"], u["y"])
    return {"x": du[:2], "y": du[2]}


U0 = {"x": jnp.array([1.0, 0.5]), "y": jnp.array(-1.0)}
CASES = [
    (po.Dense(), po.TS1, po.FixedIntervalSmoother()),
    (po.BlockDiagonal(), po.TS0, po.FixedIntervalSmoother()),
    (po.Isotropic(), po.TS0, po.FixedPointSmoother()),
    (po.Dense(), po.TS0, po.Filter()),
]


def flat(tree):
    return np.asarray(jax.vmap(lambda u: ravel_pytree(u)[0])(tree))


@pytest.mark.parametrize(("factorisation", "constraint", "strategy"), first_of(*CASES), ids=name)
def test_covariances_of_components(factorisation, constraint, strategy):
    solver = po.Solver(po.IWP(3), constraint(po.ODE(linear)), factorisation=factorisation, strategy=strategy)
    solution = solver.solve(U0, 0.0, 1.0, save_at=[0.3, 1.0])
    for k in range(4):
        std, covariance = flat(solution.derivative(k).std), solution.covariance_of(k)
        assert covariance.shape == (2, 3, 3)
        np.testing.assert_allclose(np.diagonal(covariance, axis1=1, axis2=2), std**2, rtol=1e-10, atol=1e-300)
        np.testing.assert_array_equal(covariance, np.swapaxes(covariance, 1, 2))
    np.testing.assert_array_equal(solution.covariance, solution.covariance_of(0))
    for i, t in enumerate((0.3, 1.0)):
        start = solution.at(t)
        np.testing.assert_allclose(start.factor.T @ start.factor, solution.covariance[i], rtol=1e-9, atol=1e-22)
        np.testing.assert_array_equal(ravel_pytree(start.mean)[0], flat(solution.mean)[i])
    if solution.is_dense:
        np.testing.assert_array_equal(solution.evaluate(0.3).covariance, solution.covariance[0])
        np.testing.assert_array_equal(solution.at(0.5).mean["x"], solution.evaluate(0.5).mean["x"])
    else:
        with pytest.raises(ValueError, match=r"saved.*keeps its steps"):
            solution.at(0.5)


@pytest.mark.thorough
def test_a_dense_covariance_is_that_of_the_samples():
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(linear)), strategy=po.FixedPointSmoother())
    solution = solver.solve(U0, 0.0, 1.0, save_at=[0.6, 1.0])
    draws = flat(jax.tree.map(lambda x: x[:, 0], solution.sample(jax.random.key(0), (50_000,))))
    sampled, covariance = np.cov(draws.T), solution.covariance[0]
    scale = np.sqrt(np.outer(np.diagonal(covariance), np.diagonal(covariance)))
    np.testing.assert_allclose(sampled / scale, covariance / scale, atol=0.03)
    assert np.max(np.abs((covariance / scale)[~np.eye(3, dtype=bool)])) > 0.1


@pytest.mark.parametrize(
    ("factorisation", "constraint"), first_of((po.Dense(), po.TS1), (po.BlockDiagonal(), po.TS0)), ids=name
)
def test_nothing_of_an_uncertain_start_is_lost_between_two_solves(factorisation, constraint):
    controller, loop = po.IntegralController(1e-9, 1e-9), po.ForwardLoop(300)
    parts = {"factorisation": factorisation, "controller": controller, "loop": loop}
    solver = po.Solver(po.IWP(5), constraint(po.ODE(linear)), **parts)
    half = solver.solve(po.Normal(U0, FACTOR), 0.0, 0.5)
    end = solver.solve(half.end, 0.5, 1.0)
    flow = np.asarray(jax.scipy.linalg.expm(MATRIX))
    np.testing.assert_allclose(end.covariance[0], flow @ FACTOR.T @ FACTOR @ flow.T, rtol=1e-7, atol=1e-11)
    np.testing.assert_allclose(end.end.factor.T @ end.end.factor, end.covariance[0], rtol=1e-9, atol=1e-13)


@pytest.mark.thorough
def test_covariances_of_a_batch_of_uncertain_starts():
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(linear)), loop=po.ForwardLoop(100))
    solve = lambda size: solver.solve(po.Normal(U0, size * FACTOR), 0.0, 0.5)  # noqa: E731
    lanes = jax.vmap(solve)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(lanes.covariance[1], solve(2.0).covariance, rtol=1e-8)


def test_the_start_of_an_equation_of_second_order_has_the_velocity():
    solver = po.Solver(po.IWP(4), po.TS1(po.ODE(lambda t, u, du, args: -u, order=2)))
    end = solver.solve((jnp.ones(2), jnp.zeros(2)), 0.0, 1.0).end
    np.testing.assert_allclose(end.mean[0], np.cos(1.0), atol=1e-3)
    np.testing.assert_allclose(end.mean[1], -np.sin(1.0), atol=1e-2)
    assert end.factor.shape == (4, 4)


@pytest.mark.thorough
def test_under_transformations():
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(lambda t, u, rate: -rate * u)))
    solve = lambda rate: solver.solve(jnp.ones(2), 0.0, 1.0, args=rate)  # noqa: E731
    jitted = jax.jit(lambda rate: ((solution := solve(rate)).end.factor, solution.covariance))(1.0)
    np.testing.assert_allclose(jitted[0].T @ jitted[0], jitted[1][0], rtol=1e-10)
    lanes = jax.vmap(solve)(jnp.array([1.0, 2.0]))
    assert lanes.covariance.shape == (2, 1, 2, 2)
    np.testing.assert_allclose(lanes.covariance[0], solve(1.0).covariance, rtol=1e-8)
    with pytest.raises(ValueError, match=r"batch of solutions.*jax.vmap"):
        lanes.at(1.0)
    failed = jax.jit(lambda rate: solve(rate).at(0.5).factor)
    with pytest.raises(Exception, match="at\\(t\\) needs a time that was saved"):
        failed(1.0)


def test_a_subspace_has_no_covariance_of_all_components():
    basis = jnp.eye(4)[:, :1]
    parts = {"factorisation": po.Subspace(basis), "loop": po.ForwardLoop(200)}
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(lambda t, u, args: -u)), **parts)
    solution = solver.solve(jnp.ones(4), 0.0, 0.1)
    for question in (lambda: solution.covariance, lambda: solution.end):
        with pytest.raises(ValueError, match="not available under Subspace"):
            question()
