"""The whole posterior: against one joint Gaussian written down in NumPy, and one strategy against the other."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .. import oracles
from ..helpers import FACTORISATIONS, first_of, left_to_nox, lotka_volterra, name


GRID = np.array([0.0, 0.25, 0.5, 0.625, 1.0])
BETWEEN = np.array([0.3125, 0.375, 0.875])
TIMES = np.sort(np.concatenate([GRID, BETWEEN]))
U0 = np.array([1.0, 0.5])
NU = 2
# what each factorisation has of a Jacobian
MATRICES = (np.array([[0.0, 1.0], [-2.0, -0.25]]), np.diag([-1.5, 0.5]), np.diag([-1.25, -1.25]))
NAMES = [name(f) for f in FACTORISATIONS]
factorisations = pytest.mark.parametrize("index", range(3), ids=NAMES)
first_factorisation = pytest.mark.parametrize("index", first_of(*range(3)), ids=NAMES)


@functools.cache
def joint(index):
    """Mean and covariance of the states at all times given u' = L u on the grid, and the evidence."""
    matrix, size, n = MATRICES[index], 2 * (NU + 1), len(TIMES)
    start = np.concatenate([np.linalg.matrix_power(matrix, k) @ U0 for k in range(NU + 1)])
    transitions = [oracles.iwp_transition(NU, h, 2) for h in np.diff(TIMES)]
    mean, cov = oracles.joint_gaussian(start, np.zeros((size, size)), transitions)
    h = np.zeros((2 * (len(GRID) - 1), n * size))
    for row, t in enumerate(GRID[1:]):
        at = size * int(np.flatnonzero(TIMES == t)[0])
        h[2 * row : 2 * row + 2, at : at + 2] = -matrix
        h[2 * row : 2 * row + 2, at + 2 : at + 4] = np.eye(2)
    return *oracles.condition(mean, cov, h, h @ mean), oracles.log_density(h @ mean, 0, h @ cov @ h.T)


def solver(index, strategy, **parts):
    ode = po.ODE(lambda t, u, args: jnp.asarray(MATRICES[index]) @ u)
    parts = {"factorisation": FACTORISATIONS[index], "calibration": po.NoCalibration(), **parts}
    return po.Solver(po.IWP(NU), po.TS1(ode), strategy=strategy, **parts)


@functools.cache
def on_the_grid(index):
    return solver(index, po.FixedIntervalSmoother()).solve_grid(jnp.asarray(U0), GRID)


SAVED = np.array([0.0, 0.0, 0.25, 0.3125, 0.375, 0.375, 0.625, 0.875, 1.0])


@functools.cache
def fixed_points(index):
    # so tolerant that only the times of data, of which nothing is seen, bound a step
    parts = {"controller": po.IntegralController(1e3, 1e3, dt_min=1.0), "loop": po.ForwardLoop(16)}
    data = po.Observations(GRID[1:], jnp.zeros((len(GRID) - 1, 2)), 1.0, mask=np.zeros(len(GRID) - 1, bool))
    return solver(index, po.FixedPointSmoother(), **parts).solve(jnp.asarray(U0), 0.0, 1.0, save_at=SAVED, data=data)


def rows(ts):
    return [int(np.flatnonzero(TIMES == t)[0]) for t in ts]


@first_factorisation
def test_smoothed_moments_are_those_of_the_joint_gaussian(index):
    mean, cov, evidence = joint(index)
    mean = mean.reshape(len(TIMES), NU + 1, 2)
    std = np.sqrt(np.maximum(np.diagonal(cov), 0)).reshape(mean.shape)
    grid, points = on_the_grid(index), fixed_points(index)
    assert points.stats["num_accepted_steps"] == len(GRID) - 1
    for posterior, ts in ((grid, GRID), (grid.evaluate(TIMES), TIMES), (points, SAVED)):
        for k in range(NU + 1):
            moments = posterior.derivative(k)
            # NumPy forms covariances: their square roots are good to the root of its round-off where they vanish
            np.testing.assert_allclose(moments.mean, mean[rows(ts), k], rtol=0, atol=1e-11)
            np.testing.assert_allclose(moments.std**2, std[rows(ts), k] ** 2, rtol=0, atol=1e-12)
    for solution in (grid, points):
        np.testing.assert_allclose(solution.log_likelihood, evidence, rtol=1e-10)


@pytest.mark.thorough
@first_factorisation
def test_samples_have_the_joint_covariance(index):
    mean, cov, _ = joint(index)
    of_u = [i * 2 * (NU + 1) + c for i in rows(SAVED) for c in range(2)]
    mean, cov = mean[of_u], cov[np.ix_(of_u, of_u)]
    number, std = 100_000, np.sqrt(np.maximum(np.diagonal(cov), 0))
    error = np.sqrt((cov**2 + np.outer(std, std) ** 2) / number)
    dense = on_the_grid(index).sample(jax.random.key(1), (number,), ts=SAVED[::-1])[:, ::-1]
    for samples in (dense, fixed_points(index).sample(jax.random.key(2), (number,))):
        samples = np.asarray(samples).reshape(number, -1)
        assert np.all(abs(samples.mean(axis=0) - mean) <= 4.5 * std / np.sqrt(number) + 1e-12)
        assert np.all(abs(np.cov(samples.T) - cov) <= 4.5 * error + 1e-14)
        np.testing.assert_allclose(samples[:, 8:10], samples[:, 10:12], atol=1e-12)  # the same time twice


IN_EVERY_RUN = [(3, po.TS1, 0)]
OTHERS = [c for c in itertools.product((1, 3, 5, 8), (po.TS0, po.TS1), range(3)) if c not in IN_EVERY_RUN]
TS = np.array([0.0, 0.11, 0.5, 0.51, 0.515, 1.3, 2.0])


def lotka(nu, constraint, factorisation, strategy, rtol, save_at=TS):
    # At high order the first residuals are round-off, and a scale made of them is a matter of how programs round.
    calibration = po.DynamicCalibration() if nu < 8 else po.NoCalibration()
    parts = {"factorisation": factorisation, "strategy": strategy, "calibration": calibration}
    parts["loop"] = po.ForwardLoop(512)
    controller = po.IntegralController(rtol, rtol)
    made = po.Solver(po.IWP(nu), constraint(po.ODE(lotka_volterra)), controller=controller, **parts)
    return made.solve(jnp.array([20.0, 20.0]), 0.0, 2.0, save_at=save_at)


def same(one, other, nu, at=slice(None), tolerance=1e-9):
    # Derivatives in units of the step: round-off of u moves the k-th one by that times k! / dt^k.
    dt = 2.0 / int(one.stats["num_accepted_steps"])
    for k in range(nu + 1):
        a, b = one.derivative(k), other.derivative(k)
        unit = math.factorial(k) / dt**k
        size = max(np.max(np.abs(b.mean)), np.max(b.std), 1e-3 * unit * np.max(np.abs(other.mean)))
        np.testing.assert_allclose(a.mean[at], b.mean[at], rtol=0, atol=tolerance * size)
        np.testing.assert_allclose(a.std[at], b.std[at], rtol=0, atol=tolerance * size)


@pytest.mark.parametrize(
    ("nu", "constraint", "index"),
    [*IN_EVERY_RUN, *left_to_nox(*OTHERS)],
    ids=[f"{nu}-{name(constraint)}-{NAMES[index]}" for nu, constraint, index in IN_EVERY_RUN + OTHERS],
)
def test_strategies_agree(nu, constraint, index):
    # Without the whole Jacobian order eight is unstable: whatever the length of the steps, errors (and round-off) of
    # the eighth derivative double in each. Sixteen steps do not make 1e-9 of round-off, a hundred do; and after thirty
    # the solve ends with Result.scale_mismatch.
    stable = nu < 8 or (constraint is po.TS1 and index == 0)
    tolerance = (1e-6 if nu > 1 else 1e-3) if stable else 1e-4
    solutions = [
        lotka(nu, constraint, FACTORISATIONS[index], strategy, tolerance)
        for strategy in (po.Filter(), po.FixedPointSmoother(), po.FixedIntervalSmoother())
    ]
    filtered, points, interval = solutions
    assert len({int(s.stats["num_steps"]) for s in solutions}) == 1
    same(points, interval, nu)
    same(points, filtered, nu, at=-1)
    same(interval, interval.evaluate(TS), nu)
    # There is something to smooth; with u' alone, which the equation has told already, only between the steps.
    assert np.mean(interval.std[1:-1]) < (0.99 if nu > 1 else 0.999) * np.mean(filtered.std[1:-1])


@pytest.mark.thorough
def test_high_order_and_tight_tolerance():
    # exact: Lotka-Volterra conserves this
    def energy(u):
        return 0.05 * u[..., 0] - 0.5 * jnp.log(u[..., 0]) + 0.05 * u[..., 1] - 0.5 * jnp.log(u[..., 1])

    points, interval = (
        lotka(11, po.TS1, po.Dense(), strategy, 1e-12)
        for strategy in (po.FixedPointSmoother(), po.FixedIntervalSmoother())
    )
    same(points, interval, 11)
    np.testing.assert_allclose(energy(interval.mean), energy(jnp.array([20.0, 20.0])), rtol=1e-11)
    assert np.all(np.isfinite(interval.marginals.factor))


@pytest.mark.thorough
def test_a_filter_is_dense_too():
    kept = lotka(3, po.TS1, po.Dense(), po.Filter(), 1e-6, po.SaveAt(ts=TS, dense=True))
    plain = lotka(3, po.TS1, po.Dense(), po.Filter(), 1e-6)
    same(kept, plain, 3)
    same(plain, kept.evaluate(TS), 3)


@pytest.mark.thorough
def test_trees_scalars_and_time_running_backwards():
    def field(t, u, args):
        return {"a": -u["a"], "b": (0.5 * u["b"][0] * jnp.cos(t),)}

    parts = {"strategy": po.FixedIntervalSmoother(), "loop": po.ForwardLoop(1024)}
    made = po.Solver(po.IWP(5), po.TS1(po.ODE(field)), controller=po.IntegralController(1e-8, 1e-8), **parts)
    solution = made.solve({"a": jnp.ones((2, 2)), "b": (1.0,)}, 1.0, -1.0)
    t = jnp.array([0.5, -0.25])
    posterior, samples = solution.evaluate(t), solution.sample(jax.random.key(0), (3, 2), ts=t)
    assert jax.tree.map(jnp.shape, samples) == {"a": (3, 2, 2, 2, 2), "b": ((3, 2, 2),)}
    np.testing.assert_allclose(posterior.mean["a"][:, 0, 1], np.exp(1 - t), rtol=1e-7)
    np.testing.assert_allclose(posterior.mean["b"][0], np.exp(0.5 * (np.sin(t) - np.sin(1))), rtol=1e-7)
    assert solution.evaluate(0.0).mean["b"][0].shape == ()
    slope = jax.jit(jax.jacfwd(lambda t: solution.evaluate(t).mean["b"][0]))(0.3)
    np.testing.assert_allclose(slope, solution.evaluate(0.3).derivative(1).mean["b"][0], rtol=1e-11)


@pytest.mark.thorough
def test_times_not_reached_have_no_answer():
    for strategy in (po.Filter(), po.FixedPointSmoother(), po.FixedIntervalSmoother()):
        parts = {"strategy": strategy, "loop": po.ForwardLoop(256), "controller": po.IntegralController(1e-5, 1e-5)}
        made = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: u**2)), **parts)
        solution = made.solve(1.0, 0.0, 2.0, save_at=[0.5, 1.5], throw=False)
        assert solution.result != po.Result.successful
        np.testing.assert_allclose(solution.mean[0], 2.0, rtol=1e-3)
        assert np.isnan(solution.mean[1]) and np.isnan(solution.std[1])


@pytest.mark.parametrize("t1", first_of(1.0, -1.0))
def test_a_solve_without_an_accepted_step_has_no_answers(t1):
    """Also where time runs backwards, which only the times asked for tell then."""
    parts = {"strategy": po.FixedIntervalSmoother(), "loop": po.ForwardLoop(1)}
    made = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: -(u**3))), **parts)
    solution = made.solve(5.0, 0.0, t1, save_at=[0.0, 0.5 * t1, t1], dt0=t1, throw=False)
    assert solution.stats["num_accepted_steps"] == 0
    assert solution.mean[0] == 5.0 and np.all(np.isnan(solution.mean[1:])) and np.all(np.isnan(solution.std[1:]))
