"""Data with other densities than the normal: against Laplace's method in NumPy, and exact likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .. import oracles
from ..helpers import central_differences, first_of, name, relative
from ..inference.test_likelihoods import LIKELIHOODS, UNTIL, certain
from .test_observations import GRID, MASK, MATRIX, ROOT, SEEN, VALUES, joint, solver, start


COUNTS = np.array([[3.0, 1.0], [0.0, 2.0], [7.0, 4.0], [1.0, 0.0]])


def poisson(count, rate, args):
    """With the exponential of what is observed as its mean, up to a constant."""
    return count * rate - jnp.exp(rate)


def cauchy(value, centre, args):
    """Heavy tails: not log-concave beyond one width."""
    width = 0.1 if args is None else args
    return -jnp.log1p(((value - centre) / width) ** 2) - jnp.log(np.pi * width)


def normal(value, centre, args):
    return -(((value - centre) / 0.2) ** 2) / 2 - np.log(0.2 * np.sqrt(2 * np.pi))


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", first_of(*LIKELIHOODS), ids=lambda f: f.__name__)
def test_where_the_solution_is_certain_the_likelihood_is_exact(likelihood):
    ts = np.array([0.3, 0.31, 1.0, 2.0])
    data = po.Observations(ts, COUNTS, log_density=poisson, mask=MASK)
    u = jax.vmap(lambda t: jax.scipy.linalg.expm(t * MATRIX) @ jnp.array([1.0, 0.5]))(ts)
    expected = np.sum(np.where(MASK, poisson(COUNTS, u, None), 0))
    np.testing.assert_allclose(likelihood(certain(), jnp.array([1.0, 0.5]), 0.0, UNTIL, data), expected, rtol=1e-9)


@pytest.mark.thorough
def test_a_normal_density_is_noise():
    made, ts = solver(po.FixedIntervalSmoother()), GRID[SEEN]
    told = [po.Observations(ts, VALUES, 0.2, mask=MASK), po.Observations(ts, VALUES, log_density=normal, mask=MASK)]
    noise, density = (made.solve_grid(start(made), GRID, data=data) for data in told)
    assert relative(density.marginals.mean, noise.marginals.mean) < 1e-11
    assert relative(density.std, noise.std) < 1e-9
    np.testing.assert_allclose(density.data_log_likelihood, noise.data_log_likelihood, rtol=1e-11)


def laplace(mean, covariance, density, slope, curvature):
    """Mode, covariance and log evidence under a normal prior, by damped Newton iterations in NumPy."""
    x, root = mean.copy(), np.linalg.cholesky(covariance)
    w = np.zeros_like(x)
    for _ in range(200):
        x = mean + root @ w
        hessian = np.eye(x.size) - root.T @ curvature(x) @ root
        w = w + 0.5 * np.linalg.solve(hessian, root.T @ slope(x) - w)
    evidence = density(x) - w @ w / 2 - np.linalg.slogdet(hessian)[1] / 2
    return x, root @ np.linalg.inv(hessian) @ root.T, evidence


def of_counts(y, counts, offset=0.0):
    """The log density of counts of ``offset + y x``, its slope and curvature in ``x``."""
    return (
        lambda x: np.sum(counts * (offset + y @ x) - np.exp(offset + y @ x)),
        lambda x: y.T @ (counts - np.exp(offset + y @ x)),
        lambda x: -(y.T * np.exp(offset + y @ x)) @ y,
    )


@pytest.mark.thorough
def test_one_time_is_laplaces_method():
    made = solver()
    data = po.Observations(GRID[-1:], COUNTS[:1], log_density=poisson)
    solution = made.solve_grid(start(made), GRID, data=data)
    mean, covariance, z, _, _ = joint(made)
    x, p = oracles.condition(mean, covariance, z, z @ mean)
    # the last state without its derivatives
    x, p = x[-6:-4], p[-6:-4, -6:-4]
    x, p, evidence = laplace(x, p, *of_counts(np.eye(2), COUNTS[0]))
    np.testing.assert_allclose(solution.mean[-1], x, rtol=1e-8)
    np.testing.assert_allclose(solution.std[-1], np.sqrt(np.diag(p)), rtol=1e-8)
    np.testing.assert_allclose(solution.data_log_likelihood, evidence, rtol=1e-8)


@pytest.mark.thorough
def test_the_iterated_smoother_is_laplaces_method_of_all_data():
    made = solver(po.FixedIntervalSmoother())
    data = po.Observations(GRID[SEEN], COUNTS, log_density=poisson, mask=MASK)
    solution = po.solve_grid_iterated(made, start(made), GRID, data=data, tolerance=1e-12)
    assert solution.stats["num_iterations"] < 20
    mean, covariance, z, y, _ = joint(made, MASK)
    x, p = oracles.condition(mean, covariance, z, z @ mean)
    # in coordinates: the covariance given the equation is singular
    values, vectors = np.linalg.eigh(p)
    root = vectors * np.sqrt(np.maximum(values, 0))
    seen = y @ root
    w, _, evidence = laplace(np.zeros(x.size), np.eye(x.size), *of_counts(seen, COUNTS[MASK], y @ x))
    assert relative(solution.marginals.mean[..., 0].ravel(), x + root @ w) < 1e-8
    # log p(z) + log p(y | z), in the order in which the filter sees them
    total = oracles.log_density(0, z @ mean, z @ covariance @ z.T) + evidence
    np.testing.assert_allclose(solution.log_likelihood + solution.data_log_likelihood, total, rtol=1e-8)


def evidence_of(x):
    """A little problem, for derivatives with respect to state, spread, data and rate."""
    made = po.Solver(po.IWP(1), po.TS1(po.ODE(lambda t, u, args: args * u)), calibration=po.NoCalibration())
    counts = COUNTS[:2, :1] + x[2]
    data = po.Observations([0.5, 1.0], counts, log_density=lambda n, r, args: args * n * r - jnp.exp(r))
    u0 = po.InitialState((x[:1], x[:1]), jnp.diag(x[1:3]))
    return made.solve_grid(u0, [0.0, 0.5, 1.0], args=x[3], data=data).data_log_likelihood


PARAMETERS = np.array([1.0, 0.5, 1.3, 0.9])


@pytest.mark.thorough
def test_derivatives():
    value, gradient = jax.jit(evidence_of), jax.jit(jax.grad(evidence_of))
    expected = central_differences(lambda x: value(x)[None], PARAMETERS, 1e-3)[0]
    np.testing.assert_allclose(gradient(PARAMETERS), expected, rtol=1e-6)


@pytest.mark.thorough
def test_second_derivatives():
    gradient, hessian = jax.jit(jax.grad(evidence_of)), jax.jit(jax.jacfwd(jax.grad(evidence_of)))
    expected = central_differences(gradient, PARAMETERS, 1e-3)
    np.testing.assert_allclose(hessian(PARAMETERS), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", first_of(po.Dense(), po.BlockDiagonal()), ids=name)
def test_far_from_the_mode(factorisation):
    # exp(10) expected of exp(0): a whole Newton step would go to exp(22025)
    made = po.Solver(
        po.IWP(1),
        po.TS0(po.ODE(lambda t, u, args: 0 * u)),
        factorisation=factorisation,
        calibration=po.NoCalibration(),
    )
    u0 = made.initialise(po.Normal(jnp.zeros(2), 10 * jnp.ones(2)), 0.0)
    counts = np.exp([[10.0, -3.0]])
    state = made.solve_grid(u0, [0.0, 1e-3], data=po.Observations([0.0], counts, log_density=poisson))
    # slope zero: count - exp(x) - x / 100 = 0
    residual = counts[0] - np.exp(state.mean[0]) - state.mean[0] / 100
    assert np.max(np.abs(residual) / (1 + counts[0])) < 1e-8


@pytest.mark.thorough
def test_what_is_missing_has_no_derivative_that_is_none():
    # of values that are zero where nothing was measured, the density of this law is minus infinity
    def evidence(rate):
        data = po.Observations(
            [0.5, 1.0],
            np.array([[2.0, 0.0], [3.0, 4.0]]),
            mask=np.array([[True, False], [True, True]]),
            log_density=lambda y, u, args: -((jnp.log(y) - u) ** 2) - jnp.log(y),
        )
        made = po.Solver(po.IWP(1), po.TS0(po.ODE(lambda t, u, args: args * u)), calibration=po.NoCalibration())
        return made.solve_grid(jnp.ones(2), [0.0, 0.5, 1.0], args=rate, data=data).data_log_likelihood

    value, slope = jax.jit(jax.value_and_grad(evidence))(0.3)
    assert jnp.isfinite(value) and jnp.isfinite(slope)


@pytest.mark.thorough
def test_outliers_do_not_matter():
    made = solver(po.FixedIntervalSmoother())
    exact = made.solve_grid(jnp.array([1.0, 0.5]), GRID).mean[SEEN]
    values = np.array(exact)
    values[1] += 100.0
    told = [po.Observations(GRID[SEEN], values, log_density=cauchy), po.Observations(GRID[SEEN], values, 0.1)]
    robust, fooled = (made.solve_grid(start(made), GRID, data=data).mean[SEEN] for data in told)
    assert np.max(np.abs(robust - exact)) < 0.1 < 1 < np.max(np.abs(fooled - exact))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: po.Observations([0.0], VALUES[:1]), ValueError, "either a noise or a log_density"),
        (lambda: po.Observations([0.0], VALUES[:1], ROOT, log_density=poisson), ValueError, "not both"),
        (lambda: po.Observations([0.0], VALUES[:1], log_density=3), TypeError, "callable"),
        (lambda: run(lambda y, u, args: jnp.sum(y * u)), ValueError, "one number for every value"),
        (lambda: run(poisson, factorisation=po.Isotropic()), ValueError, "BlockDiagonal"),
    ],
)
def test_wrong_use(make, error, words):
    with pytest.raises(error, match=words):
        make()


def run(log_density, **parts):
    data = po.Observations([0.0], COUNTS[:1], log_density=log_density)
    return solver(**parts).solve(jnp.array([1.0, 0.5]), 0.0, 2.0, data=data)
