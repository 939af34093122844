"""The whole posterior of a solve against one dense joint Gaussian; smoothers, dense output and samples agree."""

import functools as ft
import math
from fractions import Fraction
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import probode as po

from .helpers import FACTORISATIONS, central_differences, covariance, lotka_volterra, name, relative


# Halves and quarters: no time is rounded, so neither are the steps of the reference.
GRID = np.array([0.0, 0.1875, 0.5, 0.625, 1.0])
BETWEEN = np.array([0.0625, 0.3125, 0.375, 0.5625, 0.875])
TIMES = np.sort(np.concatenate([GRID, BETWEEN]))
U0 = np.array([1.0, 0.5])
FULL = np.array([[0.0, 1.0], [-2.0, -0.25]])
DIAGONAL = np.diag([-1.5, 0.5])
SCALAR = np.diag([-1.25, -1.25])
KEPT = {po.Dense: FULL, po.BlockDiagonal: DIAGONAL, po.Isotropic: SCALAR}  # what a factorisation has of a Jacobian


def linear(t, u, args):
    return args @ u


# --- The reference: all states at all times in one vector, conditioned on one equation after the other ---


def exact(x):
    """Forty digits."""
    return np.vectorize(mpmath.mpf, otypes=[object])(np.asarray(x, float))


def rounded(x):
    return np.asarray(x, float)


class Reference(NamedTuple):
    """Moments of the derivatives ``(times, n, d)``, and the covariance of ``u`` over ``(times, d, times, d)``."""

    t: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    of_u: np.ndarray
    filtered_mean: np.ndarray  # given the equations up to that time
    filtered_std: np.ndarray
    log_likelihood: float

    def rows(self, ts):
        return [int(np.flatnonzero(self.t == t)[0]) for t in np.asarray(ts)]


def transition(nu, h):
    """Of one component over the signed time ``h``."""
    n, h = nu + 1, Fraction(float(h))
    a = [[h ** (j - i) / math.factorial(j - i) if j >= i else Fraction(0) for j in range(n)] for i in range(n)]
    q = [[abs(h) * h ** (2 * nu - i - j) / (2 * nu + 1 - i - j) for j in range(n)] for i in range(n)]
    q = [[q[i][j] / (math.factorial(nu - i) * math.factorial(nu - j)) for j in range(n)] for i in range(n)]
    return (
        np.vectorize(lambda x: mpmath.mpf(x.numerator) / x.denominator, otypes=[object])(np.array(m)) for m in (a, q)
    )


@ft.cache
def reference(nu, constraint, matrices, grid, times, u0=tuple(U0), variance=0.0):
    """For ``u^(k) = sum_j matrices[j] u^(j)``, by the columns of one joint Gaussian; ``times`` hold the grid."""
    with mpmath.workdps(40):
        return _reference(nu, constraint, matrices, grid, times, u0, variance)


def _reference(nu, constraint, matrices, grid, times, u0, variance):
    matrices, n, order = [exact(m) for m in matrices], nu + 1, len(matrices)
    derivatives = list(exact(u0).reshape(order, -1))
    while len(derivatives) < n:
        derivatives.append(sum(m @ derivatives[len(derivatives) - order + j] for j, m in enumerate(matrices)))
    d = len(derivatives[0])
    size = n * d
    total = len(times) * size
    mean, cov = exact(np.zeros(total)), exact(np.zeros((total, total)))
    at = [slice(i * size, (i + 1) * size) for i in range(len(times))]
    mean[at[0]], cov[at[0], at[0]] = np.concatenate(derivatives), variance * exact(np.eye(size))
    for i in range(1, len(times)):
        a, q = transition(nu, times[i] - times[i - 1])
        a, q = np.kron(a, exact(np.eye(d))), np.kron(q, exact(np.eye(d)))
        end = i * size
        mean[at[i]] = a @ mean[at[i - 1]]
        cov[at[i], :end] = a @ cov[at[i - 1], :end]
        cov[:end, at[i]] = cov[at[i], :end].T
        cov[at[i], at[i]] = a @ cov[at[i - 1], at[i - 1]] @ a.T + q

    z_of_x = exact(np.zeros((d, size)))
    z_of_x[:, order * d : (order + 1) * d] = exact(np.eye(d))
    h = z_of_x.copy()
    for j, m in enumerate(matrices):
        z_of_x[:, j * d : (j + 1) * d] = -m
    h = z_of_x if constraint is po.TS1 else h

    def marginals(i):
        variances = np.array([cov[k, k] for k in range(*at[i].indices(total))])
        std = np.vectorize(lambda v: mpmath.sqrt(v) if v > 0 else mpmath.mpf(0), otypes=[object])(variances)
        return rounded(mean[at[i]]).reshape(n, d), rounded(std).reshape(n, d)

    log_likelihood, filtered = mpmath.mpf(0), {}
    for i in range(len(times)):
        if i > 0 and times[i] in grid:
            # TS0 takes the vector field at the prediction for a datum; TS1 of a linear equation is the equation itself.
            z, cross = z_of_x @ mean[at[i]], h @ cov[at[i], :]
            s = cross[:, at[i]] @ h.T
            (a, b), (_, c) = s
            det = a * c - b * b
            inverse = np.array([[c, -b], [-b, a]]) / det
            mean = mean - cross.T @ (inverse @ z)
            cov = cov - cross.T @ (inverse @ cross)
            log_likelihood -= (z @ inverse @ z + mpmath.log(det) + d * mpmath.log(2 * mpmath.pi)) / 2
        filtered[i] = marginals(i)
    filtered_mean, filtered_std = (np.stack(x) for x in zip(*filtered.values(), strict=True))
    smoothed_mean, smoothed_std = (np.stack(x) for x in zip(*map(marginals, range(len(times))), strict=True))
    of_u = rounded(cov).reshape(len(times), n, d, len(times), n, d)[:, 0, :, :, 0]
    ll = float(log_likelihood)
    return Reference(np.array(times), smoothed_mean, smoothed_std, of_u, filtered_mean, filtered_std, ll)


def as_key(matrix):
    return tuple(map(tuple, np.asarray(matrix).tolist()))


def of_config(nu, constraint, matrix, grid=GRID, times=TIMES, **options):
    return reference(nu, constraint, (as_key(matrix),), tuple(grid.tolist()), tuple(times.tolist()), **options)


# Standard deviations keep all their digits. Round-off of u comes back in its k-th derivative times dt^-k.
OF_MEANS = {1: 1e-14, 2: 1e-13, 3: 1e-12, 5: 1e-9}
OF_STDS = 1e-12


def check(posterior, ref, rows, *, filtered=False):
    """Mean, relative to its size over time, and standard deviation of every derivative."""
    means, stds = (ref.filtered_mean, ref.filtered_std) if filtered else (ref.mean, ref.std)
    nu = means.shape[1] - 1
    for k in range(nu + 1):
        moments, size = posterior.derivative(k), np.max(np.abs(means[:, k]))
        np.testing.assert_allclose(moments.mean, means[rows, k], rtol=0, atol=OF_MEANS[nu] * size)
        # What is certain is so up to forty digits in the reference.
        np.testing.assert_allclose(moments.std, stds[rows, k], rtol=OF_STDS, atol=1e-17 * np.max(stds[:, k]))


FORCED = po.IntegralController(1e3, 1e3, stop_at=GRID[1:])  # so tolerant that only the times to be hit bound a step


def make(nu, constraint, factorisation, strategy, *, ode=None, **options):
    ode = po.ODE(linear) if ode is None else ode
    options = {"calibration": po.NoCalibration(), "loop": po.ForwardLoop(64)} | options
    return po.Solver(po.IWP(nu), constraint(ode), factorisation=factorisation, strategy=strategy, **options)


@ft.cache
def on_grid(nu, constraint, factorisation, strategy=po.FixedIntervalSmoother()):
    matrix = jnp.asarray(kept_of(constraint, factorisation))
    return make(nu, constraint, factorisation, strategy).solve_grid(jnp.asarray(U0), GRID, args=matrix)


def kept_of(constraint, factorisation):
    """A Jacobian that the method treats exactly: TS0 takes any."""
    return FULL if constraint is po.TS0 else KEPT[type(factorisation)]


CONFIGURATIONS = [(nu, po.TS1, f) for nu in (1, 2, 3, 5) for f in FACTORISATIONS]
CONFIGURATIONS += [(1, po.TS0, FACTORISATIONS[2]), (2, po.TS0, FACTORISATIONS[1]), (3, po.TS0, FACTORISATIONS[2])]
CONFIGURATIONS += [(5, po.TS0, FACTORISATIONS[0])]
FEW = [(1, po.TS1, FACTORISATIONS[0]), (2, po.TS0, FACTORISATIONS[0]), (5, po.TS1, FACTORISATIONS[0])]
FEW += [(3, po.TS1, FACTORISATIONS[1]), (2, po.TS1, FACTORISATIONS[2]), (3, po.TS0, FACTORISATIONS[2])]


def parametrize(configurations):
    def ids(x):
        return str(x) if isinstance(x, int) else name(x)

    return pytest.mark.parametrize(("nu", "constraint", "factorisation"), configurations, ids=ids)


# --- Against the reference ---


@parametrize(CONFIGURATIONS)
def test_posterior_on_the_grid_and_between(nu, constraint, factorisation):
    ref = of_config(nu, constraint, kept_of(constraint, factorisation))
    solution = on_grid(nu, constraint, factorisation)
    check(solution, ref, ref.rows(GRID))
    np.testing.assert_allclose(solution.log_likelihood, ref.log_likelihood, rtol=0, atol=10 * OF_MEANS[nu])
    everywhere = solution.evaluate(TIMES)
    np.testing.assert_array_equal(everywhere.t, TIMES)
    check(everywhere, ref, slice(None))
    # At the ends of steps it is the same, to the bit.
    at_ends = jax.tree.map(lambda x: x[jnp.asarray(ref.rows(GRID))], everywhere.marginals)
    np.testing.assert_array_equal(at_ends.mean, solution.marginals.mean)
    np.testing.assert_array_equal(covariance(at_ends.factor), covariance(solution.marginals.factor))


@parametrize(FEW)
def test_a_filter_knows_the_past_alone(nu, constraint, factorisation):
    ref = of_config(nu, constraint, kept_of(constraint, factorisation))
    solution = on_grid(nu, constraint, factorisation, po.Filter())
    check(solution, ref, ref.rows(GRID), filtered=True)
    check(solution.evaluate(TIMES), ref, slice(None), filtered=True)
    np.testing.assert_allclose(solution.log_likelihood, ref.log_likelihood, rtol=0, atol=10 * OF_MEANS[nu])


SAVED = np.array([0.0, 0.0, 0.0625, 0.1875, 0.3125, 0.375, 0.375, 0.5625, 0.625, 0.875, 1.0])


@parametrize(FEW)
def test_fixed_points_are_smoothed_without_keeping_the_steps(nu, constraint, factorisation):
    # On the grid, off it, several in one step, twice the same, both ends.
    matrix = kept_of(constraint, factorisation)
    ref = of_config(nu, constraint, matrix)
    solver = make(nu, constraint, factorisation, po.FixedPointSmoother(), controller=FORCED)
    save_at = po.SaveAt(t0=True, ts=SAVED, t1=True)
    solution = solver.solve(jnp.asarray(U0), 0.0, 1.0, args=jnp.asarray(matrix), save_at=save_at)
    assert solution.stats["num_steps"] == solution.stats["num_accepted_steps"] == len(GRID) - 1
    ts = np.concatenate([[0.0], SAVED, [1.0]])
    np.testing.assert_array_equal(solution.t, ts)
    check(solution, ref, ref.rows(ts))
    np.testing.assert_allclose(solution.log_likelihood, ref.log_likelihood, rtol=0, atol=10 * OF_MEANS[nu])


@pytest.mark.parametrize("ts", [[0.3125], [0.1875, 0.5]], ids=str)
def test_any_choice_of_fixed_points_gives_the_same(ts):
    ref = of_config(2, po.TS1, FULL)
    solver = make(2, po.TS1, po.Dense(), po.FixedPointSmoother(), controller=FORCED)
    solution = solver.solve(jnp.asarray(U0), 0.0, 1.0, args=jnp.asarray(FULL), save_at=np.array(ts))
    check(solution, ref, ref.rows(ts))


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_an_uncertain_start_is_smoothed_too(factorisation):
    # An InitialState has a factor with more rows than a step leaves.
    matrix, nu, std = KEPT[type(factorisation)], 2, 0.125
    ref = of_config(nu, po.TS1, matrix, variance=std**2)
    assert np.max(ref.std[0, 0]) < 0.9 * std and np.max(np.abs(ref.mean[0, 0] - U0)) > 1e-6
    interval = make(nu, po.TS1, factorisation, po.FixedIntervalSmoother())
    args = jnp.asarray(matrix)
    start = interval.initialise(jnp.asarray(U0), 0.0, args=args)
    start = po.InitialState(start.mean, jnp.broadcast_to(std * jnp.eye(start.factor.shape[-1]), start.factor.shape))
    solution = interval.solve_grid(start, GRID, args=args)
    check(solution, ref, ref.rows(GRID))
    check(solution.evaluate(TIMES), ref, slice(None))
    np.testing.assert_allclose(solution.log_likelihood, ref.log_likelihood, rtol=0, atol=1e-12)
    fixed = make(nu, po.TS1, factorisation, po.FixedPointSmoother(), controller=FORCED)
    save_at = po.SaveAt(t0=True, ts=SAVED[2:-1], t1=True)
    check(fixed.solve(start, 0.0, 1.0, args=args, save_at=save_at), ref, ref.rows(SAVED[1:]))


def test_backwards_in_time():
    ref = of_config(3, po.TS1, FULL, GRID[::-1], TIMES[::-1])
    args = jnp.asarray(FULL)
    solution = make(3, po.TS1, po.Dense(), po.FixedIntervalSmoother()).solve_grid(
        jnp.asarray(U0), GRID[::-1], args=args
    )
    check(solution, ref, ref.rows(GRID[::-1]))
    check(solution.evaluate(TIMES), ref, ref.rows(TIMES))
    np.testing.assert_allclose(solution.log_likelihood, ref.log_likelihood, rtol=0, atol=1e-11)
    controller = po.IntegralController(1e3, 1e3, stop_at=GRID[:-1])
    fixed = make(3, po.TS1, po.Dense(), po.FixedPointSmoother(), controller=controller)
    check(fixed.solve(jnp.asarray(U0), 1.0, 0.0, args=args, save_at=SAVED[::-1]), ref, ref.rows(SAVED[::-1]))
    samples = solution.sample(jax.random.key(0), (3,), ts=np.array([0.875, 0.0625, 1.0, 0.5]))
    np.testing.assert_allclose(samples[:, 2], np.broadcast_to(U0, (3, 2)), rtol=1e-12)
    assert np.all(np.abs(samples - ref.mean[ref.rows([0.875, 0.0625, 1.0, 0.5]), 0]) < 6 * np.max(ref.std[:, 0]))


@parametrize([(2, po.TS1, FACTORISATIONS[0]), (3, po.TS0, FACTORISATIONS[2])])
def test_equations_of_second_order(nu, constraint, factorisation):
    matrices = {po.Dense: (FULL, DIAGONAL), po.BlockDiagonal: (DIAGONAL, SCALAR), po.Isotropic: (FULL, DIAGONAL)}
    matrices = matrices[type(factorisation)]
    grid, times = tuple(GRID.tolist()), tuple(TIMES.tolist())
    u0 = (1.0, 0.5, -0.25, 0.75)
    ref = reference(nu, constraint, tuple(map(as_key, matrices)), grid, times, u0)
    ode, args = po.ODE(lambda t, u, du, args: args[0] @ u + args[1] @ du, order=2), tuple(map(jnp.asarray, matrices))
    start = (jnp.asarray(u0[:2]), jnp.asarray(u0[2:]))
    interval = make(nu, constraint, factorisation, po.FixedIntervalSmoother(), ode=ode)
    solution = interval.solve_grid(start, GRID, args=args)
    check(solution, ref, ref.rows(GRID))
    check(solution.evaluate(TIMES), ref, slice(None))
    np.testing.assert_allclose(solution.log_likelihood, ref.log_likelihood, rtol=0, atol=10 * OF_MEANS[nu])
    fixed = make(nu, constraint, factorisation, po.FixedPointSmoother(), ode=ode, controller=FORCED)
    check(fixed.solve(start, 0.0, 1.0, args=args, save_at=SAVED), ref, ref.rows(SAVED))


def test_order_eight_keeps_the_digits_of_its_standard_deviations():
    # At the shortest step Q spans thirty orders of magnitude.
    ref, solution = of_config(8, po.TS1, FULL), on_grid(8, po.TS1, po.Dense())
    for posterior, rows in ((solution, ref.rows(GRID)), (solution.evaluate(TIMES), slice(None))):
        for k in range(9):
            np.testing.assert_allclose(posterior.derivative(k).std, ref.std[rows, k], rtol=1e-10)
        np.testing.assert_allclose(posterior.mean, ref.mean[rows, 0], rtol=1e-12)


def test_equal_neighbours_of_a_grid_are_one_time():
    once = on_grid(2, po.TS1, po.Dense())
    solver = make(2, po.TS1, po.Dense(), po.FixedIntervalSmoother())
    grid = np.repeat(GRID, [2, 1, 3, 1, 2])
    twice = solver.solve_grid(jnp.asarray(U0), grid, args=jnp.asarray(FULL))
    rows = np.searchsorted(GRID, grid)
    ref = of_config(2, po.TS1, FULL)
    check(twice, ref, ref.rows(grid))
    check(twice.evaluate(TIMES), ref, slice(None))
    np.testing.assert_allclose(twice.mean, once.mean[rows], rtol=1e-14)
    samples = twice.sample(jax.random.key(1), (5,))
    for i in np.flatnonzero(np.diff(grid) == 0):
        np.testing.assert_allclose(samples[:, i], samples[:, i + 1], rtol=1e-13)


@pytest.mark.parametrize("factorisation", FACTORISATIONS[:2], ids=name)
def test_one_scale_for_all_is_that_of_a_prior_with_it(factorisation):
    args, u0 = jnp.asarray(FULL), jnp.asarray(U0)
    interval = make(2, po.TS0, factorisation, po.FixedIntervalSmoother(), calibration=po.MLECalibration())
    solution = interval.solve_grid(u0, GRID, args=args)
    prior = po.IWP(2, output_scale=solution.output_scale[0])
    same = eqx.tree_at(lambda s: (s.prior, s.calibration), interval, (prior, po.NoCalibration()))
    same = same.solve_grid(u0, GRID, args=args)
    fixed = make(2, po.TS0, factorisation, po.FixedPointSmoother(), calibration=po.MLECalibration(), controller=FORCED)
    fixed = fixed.solve(u0, 0.0, 1.0, args=args, save_at=TIMES)
    assert np.all(np.abs(np.log(solution.output_scale[0])) > 0.1)
    for one in (solution.evaluate(TIMES), fixed):
        for k in range(3):
            expected = same.evaluate(TIMES).derivative(k)
            np.testing.assert_allclose(one.derivative(k).mean, expected.mean, rtol=0, atol=1e-12)
            np.testing.assert_allclose(one.derivative(k).std, expected.std, rtol=1e-11, atol=1e-17)
    np.testing.assert_allclose(solution.log_likelihood, same.log_likelihood, rtol=1e-11)
    np.testing.assert_allclose(fixed.log_likelihood, same.log_likelihood, rtol=1e-11)
    for one in (solution, same):
        np.testing.assert_array_equal(one.evaluate(GRID).mean, one.mean)


# --- Samples ---

NUMBER = 100_000


def check_samples(samples, mean, cov):
    """Means and all covariances within four standard errors; what is certain exactly."""
    samples = np.reshape(samples, (len(samples), -1))
    mean, cov = np.reshape(mean, -1), np.reshape(cov, (mean.size, mean.size))
    std = np.sqrt(np.diagonal(cov))
    certain = std < 1e-12
    np.testing.assert_allclose(samples[:, certain], np.broadcast_to(mean, samples.shape)[:, certain], rtol=1e-12)
    s = np.where(certain, 1, std)
    z = (samples - mean) / s
    assert np.max(np.abs(np.mean(z, axis=0))[~certain]) < 4 / np.sqrt(NUMBER)
    correlation = cov / np.outer(s, s)
    error = z.T @ z / len(z) - correlation
    standard_error = np.sqrt((1 + correlation**2) / NUMBER)
    assert np.max((np.abs(error) / standard_error)[np.ix_(~certain, ~certain)]) < 4


UNSORTED = np.array([0.875, 0.0, 0.3125, 0.375, 0.3125, 1.0, 0.1875])


@parametrize([(2, po.TS1, FACTORISATIONS[0]), (3, po.TS1, FACTORISATIONS[1]), (1, po.TS1, FACTORISATIONS[2])])
def test_samples_have_the_joint_distribution(nu, constraint, factorisation):
    matrix = kept_of(constraint, factorisation)
    ref = of_config(nu, constraint, matrix)
    # At any times in any order, some the same, from kept steps; and along the fixed points.
    rows = ref.rows(UNSORTED)
    samples = on_grid(nu, constraint, factorisation).sample(jax.random.key(3), (NUMBER,), ts=UNSORTED)
    check_samples(samples, ref.mean[rows, 0], ref.of_u[rows][:, :, rows])
    np.testing.assert_array_equal(samples[:, 2], samples[:, 4])
    solver = make(nu, constraint, factorisation, po.FixedPointSmoother(), controller=FORCED)
    ts = SAVED[1:-1]
    solution = solver.solve(jnp.asarray(U0), 0.0, 1.0, args=jnp.asarray(matrix), save_at=ts)
    rows = ref.rows(ts)
    served = solution.sample(jax.random.key(4), (NUMBER,))
    check_samples(served, ref.mean[rows, 0], ref.of_u[rows][:, :, rows])
    np.testing.assert_allclose(served[:, 4], served[:, 5], rtol=1e-12)
    if not isinstance(factorisation, po.Dense):
        # The reference says so, too: components know nothing of one another.
        np.testing.assert_allclose(ref.of_u[:, 0, :, 1], 0, rtol=0, atol=1e-20)
        for x in (samples, served):
            z = (x[:, 2] - np.mean(x[:, 2], axis=0)) / np.std(x[:, 2], axis=0)
            assert abs(np.mean(z[:, 0] * z[:, 1])) < 4 / np.sqrt(NUMBER)


# --- Adaptive solves ---

LV0 = np.array([20.0, 20.0])
TS = np.array([0.0, 0.11, 0.5, 0.5, 0.51, 0.515, 1.3, 2.0])
INTERVAL, FIXED = po.FixedIntervalSmoother(), po.FixedPointSmoother()
DENSE = po.Dense()


def lotka_solver(nu, constraint, factorisation, strategy, tolerance=1e-6, loop=po.ForwardLoop(400)):
    controller = po.IntegralController(tolerance, tolerance)
    options = {"calibration": po.DynamicCalibration(), "controller": controller, "loop": loop}
    return make(nu, constraint, factorisation, strategy, ode=po.ODE(lotka_volterra), **options)


@ft.cache
def lotka(nu, constraint, factorisation, strategy, tolerance=1e-6):
    solver = lotka_solver(nu, constraint, factorisation, strategy, tolerance)
    return solver.solve(jnp.asarray(LV0), 0.0, 2.0, save_at=TS)


def exact_lotka(ts):
    """By Taylor series of order forty."""
    a, b, c, d = (mpmath.mpf(x) for x in (0.5, 0.05, 0.5, 0.05))

    def advance(u, v, h):
        x, y = [u], [v]
        for k in range(40):
            xy = sum(x[j] * y[k - j] for j in range(k + 1))
            x.append((a * x[k] - b * xy) / (k + 1))
            y.append((d * xy - c * y[k]) / (k + 1))
        return sum(x[k] * h**k for k in range(41)), sum(y[k] * h**k for k in range(41))

    out, t, u = [], mpmath.mpf(0), (mpmath.mpf(20), mpmath.mpf(20))
    for end in ts:
        for _ in range(10):
            u = advance(*u, (mpmath.mpf(end) - t) / 10)
        t = mpmath.mpf(end)
        out.append([float(x) for x in u])
    return np.array(out)


def check_the_same(one, other, nu, tolerance=1e-9, rows=slice(None)):
    """All derivatives at all times, relative to their largest value or, where that is larger, their uncertainty."""
    for k in range(nu + 1):
        a, b = one.derivative(k), other.derivative(k)
        size = max(np.max(np.abs(b.mean[rows])), np.max(b.std[rows]))
        np.testing.assert_allclose(a.mean[rows], b.mean[rows], rtol=0, atol=tolerance * size, err_msg=f"mean {k}")
        np.testing.assert_allclose(a.std[rows], b.std[rows], rtol=0, atol=tolerance * size, err_msg=f"std {k}")


SMOOTHED = [(nu, po.TS1, DENSE) for nu in (1, 3, 5, 8)] + [(nu, po.TS0, f) for nu in (3, 5) for f in FACTORISATIONS]


@parametrize(SMOOTHED)
def test_both_smoothers_agree(nu, constraint, factorisation):
    tolerance = 1e-4 if nu == 1 else 1e-6
    interval, fixed = (lotka(nu, constraint, factorisation, strategy, tolerance) for strategy in (INTERVAL, FIXED))
    assert interval.stats["num_accepted_steps"] == fixed.stats["num_accepted_steps"] > 30
    check_the_same(fixed, interval, nu)
    np.testing.assert_allclose(fixed.output_scale, interval.output_scale, rtol=1e-9)
    np.testing.assert_allclose(fixed.log_likelihood, interval.log_likelihood, rtol=1e-9)


@parametrize([(3, po.TS1, DENSE), (8, po.TS1, DENSE), (3, po.TS0, FACTORISATIONS[1])])
def test_smoothers_end_where_the_filter_ends_and_know_more_before(nu, constraint, factorisation):
    filtered = lotka(nu, constraint, factorisation, po.Filter())
    for strategy in (INTERVAL, FIXED):
        smoothed = lotka(nu, constraint, factorisation, strategy)
        check_the_same(smoothed, filtered, nu, rows=[0, -1])
        np.testing.assert_allclose(smoothed.log_likelihood, filtered.log_likelihood, rtol=1e-9)
        for k in range(nu + 1):
            std, before = (x.derivative(k).std[1:-1] for x in (smoothed, filtered))
            # TS0 knows u' for sure where a step ends.
            assert np.all(std <= before * (1 + 1e-9)) and np.mean(std) < 0.99 * np.mean(before)


@parametrize([(8, po.TS1, DENSE), (11, po.TS1, DENSE)])
def test_high_orders_and_tight_tolerances(nu, constraint, factorisation):
    expected = exact_lotka(TS)
    filtered, interval, fixed = (
        lotka(nu, constraint, factorisation, strategy, 1e-12) for strategy in (po.Filter(), INTERVAL, FIXED)
    )
    for solution in (filtered, interval, fixed):
        leaves = jax.tree.leaves((solution.marginals, solution.output_scale, solution.log_likelihood))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
    path = interval.trajectory
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((path.rows.past, path.smoothed)))
    check_the_same(fixed, interval, nu)
    error = np.max(np.abs(filtered.mean - expected))
    assert error < 1e-11
    for smoothed in (interval, fixed):
        assert np.max(np.abs(smoothed.mean - expected)) < 2 * error
        np.testing.assert_array_less(smoothed.std[1:-1], filtered.std[1:-1])


# --- Dense output ---


def test_saved_times_are_the_dense_output():
    for strategy in (INTERVAL, FIXED):
        saved = lotka(3, po.TS1, DENSE, strategy)
        evaluated = lotka(3, po.TS1, DENSE, INTERVAL).evaluate(TS)
        check_the_same(saved, evaluated, 3, 1e-12 if strategy is INTERVAL else 1e-9)
    # A filter serves save times in its loop, and keeps its steps only if asked to.
    solver = lotka_solver(3, po.TS1, DENSE, po.Filter())
    dense = solver.solve(jnp.asarray(LV0), 0.0, 2.0, save_at=po.SaveAt(dense=True))
    check_the_same(lotka(3, po.TS1, DENSE, po.Filter()), dense.evaluate(TS), 3, 1e-12)
    np.testing.assert_allclose(dense.mean[0], lotka(3, po.TS1, DENSE, po.Filter()).mean[-1], rtol=1e-12)


def test_evaluate_takes_a_time_or_many_also_inside_jit():
    solution = on_grid(3, po.TS1, DENSE)
    many, one = solution.evaluate(TIMES), solution.evaluate(TIMES[4])
    assert one.t.shape == () and one.mean.shape == one.std.shape == (2,)
    assert many.mean.shape == many.derivative(3).std.shape == (len(TIMES), 2)
    assert one.marginals.factor.shape == (8, 8)
    np.testing.assert_allclose(one.mean, many.mean[4], rtol=1e-14)
    traced = jax.jit(lambda t: solution.evaluate(t).marginals)
    np.testing.assert_allclose(traced(jnp.asarray(TIMES)).mean, many.marginals.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        covariance(traced(jnp.asarray(TIMES)).factor), covariance(many.marginals.factor), rtol=1e-10, atol=1e-20
    )
    for outside in (-0.01, 1.01, [0.5, 2.0], np.nan):
        with pytest.raises(ValueError, match="interval that was solved"):
            solution.evaluate(outside)
    with pytest.raises(Exception, match="interval that was solved"):
        jax.block_until_ready(traced(jnp.full(len(TIMES), 1.5)))
    # Round-off outside counts as the end.
    np.testing.assert_array_equal(solution.evaluate(1.0 + 2e-16).mean, solution.mean[-1])
    with pytest.raises(ValueError, match="shape"):
        solution.evaluate(TIMES.reshape(2, -1))


def test_derivative_in_time():
    solution = on_grid(3, po.TS1, DENSE)

    def fn(t):
        posterior = solution.evaluate(t)
        means = [posterior.derivative(k).mean for k in range(4)]
        return jnp.stack(means), jnp.log(jnp.stack([posterior.std, posterior.derivative(1).std]))

    def raveled(t):
        return jnp.concatenate([jnp.ravel(x) for x in fn(t[0])])

    raveled = jax.jit(raveled)
    for t in BETWEEN:
        means, log_stds = jax.jit(jax.jacfwd(fn))(t)
        jacobian = np.concatenate([np.ravel(means), np.ravel(log_stds)])
        expected = central_differences(raveled, np.array([t]), 1e-3)[:, 0]
        assert relative(jacobian[:8], expected[:8]) < 1e-6 and relative(jacobian[8:], expected[8:]) < 1e-6
        assert relative(jax.jit(jax.jacrev(raveled))(np.array([t]))[:, 0], jacobian) < 1e-9
    # The mean of the k-th derivative has the derivative that is the mean of the next one, also where two steps meet.
    for t in TIMES:
        means, log_stds = jax.jit(jax.jacfwd(fn))(t)
        posterior = solution.evaluate(t)
        for k in range(3):
            expected = posterior.derivative(k + 1).mean
            np.testing.assert_allclose(means[k], expected, rtol=0, atol=1e-10 * np.max(np.abs(expected)))
        assert t == 0 or bool(jnp.all(jnp.isfinite(log_stds)))
        assert bool(jnp.all(jnp.isfinite(jax.jit(jax.jacrev(fn))(t)[0])))


# --- States of other shapes, and many at once ---


def tree_field(t, u, args):
    x, y, z = u["a"], *u["b"][0]
    return {"a": y - x, "b": (jnp.stack([-x * z, 0.5 * x * y - z]),)}


def flat_field(t, u, args):
    x, y, z = u
    return jnp.stack([y - x, -x * z, 0.5 * x * y - z])


def test_states_are_trees():
    tree = {"a": jnp.asarray(1.0), "b": (jnp.asarray([0.5, 0.25]),)}
    flat = jnp.asarray([1.0, 0.5, 0.25])
    ours, theirs = (
        make(2, po.TS1, DENSE, INTERVAL, ode=po.ODE(field)).solve_grid(u0, GRID)
        for field, u0 in ((tree_field, tree), (flat_field, flat))
    )

    def together(u):
        assert jax.tree.structure(u) == jax.tree.structure(tree)
        return np.concatenate([u["a"][..., None], u["b"][0]], axis=-1)

    np.testing.assert_allclose(together(ours.mean), theirs.mean, rtol=1e-13)
    np.testing.assert_allclose(together(ours.std), theirs.std, rtol=1e-12)
    one, other = ours.evaluate(0.3125), theirs.evaluate(0.3125)
    assert one.mean["a"].shape == () and one.mean["b"][0].shape == (2,)
    np.testing.assert_allclose(together(one.derivative(2).mean), other.derivative(2).mean, rtol=1e-12)
    key, ts = jax.random.key(5), np.array([0.875, 0.3125, 0.5])
    samples = ours.sample(key, (2, 3), ts=ts)
    assert samples["a"].shape == (2, 3, 3) and samples["b"][0].shape == (2, 3, 3, 2)
    np.testing.assert_allclose(together(samples), theirs.sample(key, (2, 3), ts=ts), rtol=1e-12)


def test_states_are_numbers():
    solver = make(2, po.TS1, po.Isotropic(), FIXED, ode=po.ODE(lambda t, u, args: -u), controller=FORCED)
    solution = solver.solve(1.0, 0.0, 1.0, save_at=np.array([0.25, 0.75]))
    assert solution.mean.shape == solution.std.shape == (2,)
    assert np.all(np.abs(solution.mean - np.exp([-0.25, -0.75])) < 4 * solution.std)
    samples = solution.sample(jax.random.key(6), (1000,))
    assert samples.shape == (1000, 2)
    assert np.all(np.abs(np.mean(samples, axis=0) - solution.mean) < 4 * solution.std / np.sqrt(1000))


@pytest.mark.parametrize("strategy", [INTERVAL, FIXED], ids=name)
def test_many_initial_values_at_once(strategy):
    solver = lotka_solver(3, po.TS1, DENSE, strategy)
    starts = jnp.asarray([[20.0, 20.0], [10.0, 30.0], [25.0, 2.0]])
    solutions = jax.vmap(lambda u0: solver.solve(u0, 0.0, 2.0, save_at=TS))(starts)
    numbers = np.asarray(solutions.stats["num_accepted_steps"])
    assert len(set(numbers)) > 1
    for i, u0 in enumerate(starts):
        alone = solver.solve(u0, 0.0, 2.0, save_at=TS)
        assert numbers[i] == alone.stats["num_accepted_steps"]
        np.testing.assert_allclose(solutions.mean[i], alone.mean, rtol=1e-9)
        np.testing.assert_allclose(solutions.std[i], alone.std, rtol=1e-9, atol=1e-20)
        np.testing.assert_allclose(solutions.log_likelihood[i], alone.log_likelihood, rtol=1e-9)
    with pytest.raises(ValueError, match="batch of solutions"):
        solutions.sample(jax.random.key(7))
    if strategy is INTERVAL:
        with pytest.raises(ValueError, match="batch of solutions"):
            solutions.evaluate(0.5)
        evaluated = jax.vmap(lambda solution: solution.evaluate(TS).mean)(solutions)
        np.testing.assert_allclose(evaluated, solutions.mean, rtol=1e-12)


# --- Solves that end early, and wrong use ---


def test_times_that_were_not_reached_have_no_answer():
    few = [lotka_solver(2, po.TS1, DENSE, s, loop=po.ForwardLoop(40)) for s in (po.Filter(), INTERVAL, FIXED)]
    save_at = po.SaveAt(t0=True, ts=TS, t1=True)
    solutions = [s.solve(jnp.asarray(LV0), 0.0, 2.0, save_at=save_at, throw=False) for s in few]
    for solution in solutions:
        assert solution.result == po.Result.max_steps_reached
        reached = np.concatenate([[True], TS <= solution.state.t, [True]])
        assert 3 < np.sum(reached) < len(TS) + 2
        np.testing.assert_array_equal(solution.t, [0.0, *TS, solution.state.t])
        for k in range(3):
            moments = solution.derivative(k)
            for x in (moments.mean, moments.std):
                np.testing.assert_array_equal(np.isfinite(x), np.broadcast_to(reached[:, None], x.shape))
        np.testing.assert_array_equal(solution.mean[-1], solution.state.current.mean)
    filtered, interval, fixed = solutions
    check_the_same(fixed, interval, 2, rows=reached)
    check_the_same(filtered, interval, 2, rows=[0, -1])
    evaluated = interval.evaluate(TS[reached[1:-1]])
    np.testing.assert_allclose(evaluated.mean, interval.mean[1:-1][reached[1:-1]], rtol=1e-12)
    with pytest.raises(ValueError, match="interval that was solved"):
        interval.evaluate(TS[-1])
    for smoothed in (interval, fixed):
        samples = smoothed.sample(jax.random.key(8), (4,))
        np.testing.assert_array_equal(np.isfinite(samples), np.broadcast_to(reached[:, None], samples.shape))
        close = np.abs(samples[:, reached] - smoothed.mean[reached]) <= 6 * smoothed.std[reached] + 1e-12
        assert np.all(close)


def test_samples_at_saved_times_have_the_saved_marginals():
    solution = lotka(3, po.TS1, DENSE, INTERVAL)
    samples = solution.sample(jax.random.key(9), (NUMBER,))
    certain = solution.std == 0
    assert np.all(certain[0]) and not np.any(certain[1:])
    z = (samples - solution.mean)[:, ~certain] / solution.std[~certain]
    assert np.max(np.abs(np.mean(z, axis=0))) < 4 / np.sqrt(NUMBER)
    assert np.max(np.abs(np.std(z, axis=0) - 1)) < 4 / np.sqrt(2 * NUMBER)
    np.testing.assert_array_equal(samples[:, 0], np.broadcast_to(LV0, samples[:, 0].shape))


def test_shapes_of_samples():
    solution = on_grid(2, po.TS1, DENSE)
    key = jax.random.key(10)
    assert solution.sample(key).shape == (len(GRID), 2)
    assert solution.sample(key, (3,)).shape == (3, len(GRID), 2)
    assert solution.sample(key, (3, 2), ts=[0.25, 0.125, 0.75]).shape == (3, 2, 3, 2)
    # The same key gives the same trajectories, also one time after the other.
    np.testing.assert_array_equal(solution.sample(key), solution.sample(key))
    assert np.all(solution.sample(key)[1:] != solution.sample(jax.random.key(11))[1:])
    draws = solution.sample(key, (3,))
    assert len({float(x) for x in draws[:, 2, 0]}) == 3


def test_a_filter_can_be_sampled_at_one_time():
    solution, ref = on_grid(2, po.TS1, DENSE, po.Filter()), of_config(2, po.TS1, FULL)
    i = ref.rows([0.3125])[0]
    samples = solution.sample(jax.random.key(12), (NUMBER,), ts=np.array([0.3125]))
    assert samples.shape == (NUMBER, 1, 2)
    z = (samples[:, 0] - ref.filtered_mean[i, 0]) / ref.filtered_std[i, 0]
    assert np.max(np.abs(np.mean(z, axis=0))) < 4 / np.sqrt(NUMBER)
    assert np.max(np.abs(np.std(z, axis=0) - 1)) < 4 / np.sqrt(2 * NUMBER)
    with pytest.raises(ValueError, match="filter cannot be sampled at more than one time"):
        solution.sample(jax.random.key(12))
    with pytest.raises(ValueError, match="filter cannot be sampled at more than one time"):
        solution.sample(jax.random.key(12), ts=np.array([0.3125, 0.5]))
    with pytest.raises(ValueError, match="filter cannot be sampled at more than one time"):
        lotka(3, po.TS1, DENSE, po.Filter()).sample(jax.random.key(12))


def test_wrong_use():
    key = jax.random.key(13)
    for strategy in (po.Filter(), FIXED):
        solution = lotka(3, po.TS1, DENSE, strategy)
        with pytest.raises(ValueError, match="evaluate needs the steps"):
            solution.evaluate(0.5)
        with pytest.raises(ValueError, match="needs the steps"):
            solution.sample(key, ts=np.array([0.5]))
    solution = on_grid(2, po.TS1, DENSE)
    with pytest.raises(ValueError, match="shape"):
        solution.sample(key, ts=0.5)
    with pytest.raises(ValueError, match="interval that was solved"):
        solution.sample(key, ts=np.array([0.5, 1.5]))
    for k in (-1, 3):
        with pytest.raises(ValueError, match="derivative"):
            solution.evaluate(0.5).derivative(k)
    with pytest.raises(ValueError, match="FixedIntervalSmoother"):
        lotka_solver(3, po.TS1, DENSE, FIXED).solve(jnp.asarray(LV0), 0.0, 2.0, save_at=po.SaveAt(dense=True))
