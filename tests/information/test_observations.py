"""Data in the solve: against the joint Gaussian of equation and data, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .. import oracles
from ..helpers import check_jacobians, first_of, lotka_volterra, name, relative


MATRIX = np.array([[-0.3, 1.0], [-1.2, 0.1]])
GRID = np.linspace(0.0, 2.0, 9)
SEEN = np.array([0, 2, 3, 8])  # which points of the grid have data: the first and the last one too
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(SEEN.size, 2))
ROOT = np.array([[0.3, 0.1], [0.0, 0.2]])


def linear(t, u, args):
    return jnp.asarray(MATRIX) @ u


def start(solver, spread=0.5):
    """An uncertain initial value that data can tell about."""
    state = solver.initialise(jnp.array([1.0, 0.5]), 0.0)
    n = state.factor.shape[-1]
    factor = np.zeros((n, n))
    factor[:2, :2] = [[spread, 0.1], [0.0, spread]]
    return po.InitialState(state.mean, jnp.asarray(factor))


def solver(strategy=po.Filter(), nu=2, **parts):
    parts = {"calibration": po.NoCalibration(), "strategy": strategy} | parts
    return po.Solver(po.IWP(nu), po.TS1(po.ODE(linear)), **parts)


def joint(made, mask=None):
    """Mean and covariance of all states, ``z`` and ``y`` as linear maps of them, and the noise of ``y``."""
    state, root0 = start(made), np.asarray(start(made).factor)
    transitions = [oracles.iwp_transition(2, h, 2) for h in np.diff(GRID)]
    mean, covariance = oracles.joint_gaussian(np.concatenate(state.mean), root0.T @ root0, transitions)
    z = np.kron(np.eye(GRID.size)[1:], np.concatenate([-MATRIX, np.eye(2), np.zeros((2, 2))], axis=1))
    y = np.kron(np.eye(GRID.size)[SEEN], np.eye(2, 6))
    r = np.kron(np.eye(SEEN.size), ROOT.T @ ROOT)
    if mask is not None:
        y, r = y[mask.ravel()], r[np.ix_(mask.ravel(), mask.ravel())]
    return mean, covariance, z, y, r


MASK = np.array([[True, True], [False, True], [False, False], [True, True]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
def test_the_posterior_given_equation_and_data(mask):
    made = solver(po.FixedIntervalSmoother())
    data = po.Observations(GRID[SEEN], VALUES, ROOT, mask=mask)
    solution = made.solve_grid(start(made), GRID, data=data)
    mean, covariance, z, y, r = joint(made, mask)
    values = VALUES.ravel() if mask is None else VALUES[mask]
    x, p = oracles.condition(mean, covariance, z, z @ mean)
    x, p = oracles.condition(x, p, y, y @ x - values, r)
    np.testing.assert_allclose(solution.marginals.mean[..., 0].ravel(), x, rtol=1e-9, atol=1e-10)
    std = np.sqrt(np.maximum(np.diag(p), 0)).reshape(GRID.size, 3, 2)
    np.testing.assert_allclose(solution.std, std[:, 0], rtol=1e-7)
    # log p(y, z), in the order in which the filter sees them
    both = np.concatenate([z, y])
    noise = np.zeros((both.shape[0],) * 2)
    noise[z.shape[0] :, z.shape[0] :] = r
    s = both @ covariance @ both.T + noise
    expected = oracles.log_density(np.concatenate([np.zeros(z.shape[0]), values]), both @ mean, s)
    np.testing.assert_allclose(solution.log_likelihood + solution.data_log_likelihood, expected, rtol=1e-10)


@pytest.mark.thorough
def test_each_datum_given_those_before_it():
    made = solver()
    data = po.Observations(GRID[SEEN], VALUES, ROOT)
    solution = made.solve_grid(start(made), GRID, data=data)
    x, p, z, y, r = joint(made)
    total = 0.0
    for k, i in enumerate(SEEN):
        done = SEEN[k - 1] if k else 0
        rows = slice(2 * done, 2 * i)
        x, p = oracles.condition(x, p, z[rows], z[rows] @ x)
        seen = slice(2 * k, 2 * k + 2)
        s = y[seen] @ p @ y[seen].T + r[seen, seen]
        total += oracles.log_density(VALUES[k], y[seen] @ x, s)
        x, p = oracles.condition(x, p, y[seen], y[seen] @ x - VALUES[k], r[seen, seen])
    np.testing.assert_allclose(solution.data_log_likelihood, total, rtol=1e-10)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "strategy",
    first_of(po.Filter(), po.FixedIntervalSmoother(), po.FixedPointSmoother()),
    ids=name,
)
def test_adaptive_solves_stop_at_the_data(strategy):
    ts, until = np.array([0.0, 0.7, 0.75, 2.0]), 2.0
    made = solver(strategy, nu=3, controller=po.IntegralController(1e-4, 1e-6))
    data = po.Observations(ts, VALUES, 0.2)
    u0 = start(made)
    solution = made.solve(u0, 0.0, until, data=data, save_at=np.array([0.5, 0.7, 1.9, 2.0]))
    steps = made.solve(u0, 0.0, until, data=data, save_at=po.SaveAt(t0=True, steps=True))
    grid = steps.t[: int(steps.stats["num_accepted_steps"]) + 1]
    assert set(ts) <= set(np.asarray(grid).tolist())
    on_grid = made.solve_grid(u0, grid, data=data)
    np.testing.assert_allclose(solution.data_log_likelihood, on_grid.data_log_likelihood, rtol=1e-9)
    assert relative(solution.marginals.mean, on_grid.evaluate(solution.t).marginals.mean) < 1e-8
    assert relative(solution.std, on_grid.evaluate(solution.t).std) < 1e-6


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", first_of(po.Isotropic(), po.BlockDiagonal(), po.Dense()), ids=name)
def test_components_that_do_not_depend_on_each_other(factorisation):
    # the same numbers in all three factorisations, time running backwards
    field = po.ODE(lambda t, u, args: -u * jnp.sin(t))
    grid = GRID[::-1]
    results = []
    for kind in (factorisation, po.Dense()):
        made = po.Solver(
            po.IWP(2),
            po.TS1(field),
            factorisation=kind,
            strategy=po.FixedIntervalSmoother(),
            calibration=po.NoCalibration(),
        )
        exact = made.initialise(jnp.array([1.0, 0.5]), 2.0)
        factor = jnp.zeros_like(exact.factor)
        size = factor.shape[-1] // 3
        factor = factor.at[..., jnp.arange(size), jnp.arange(size)].set(0.5)
        data = po.Observations(GRID[SEEN[::-1]], VALUES, 0.1, mask=np.array([True, False, True, True]))
        results.append(made.solve_grid(po.InitialState(exact.mean, factor), grid, data=data))
    own, dense = results
    assert relative(own.mean, dense.mean) < 1e-11 and relative(own.std, dense.std) < 1e-9
    np.testing.assert_allclose(own.data_log_likelihood, dense.data_log_likelihood, rtol=1e-10)


@pytest.mark.thorough
def test_functions_of_derivatives_and_derivatives_of_the_evidence():
    # observed: the square of the first component and the velocity of the second; of parameters, times, values, noise
    def seen(t, u, du, args):
        return {"square": u[0] ** 2, "velocity": du[1:] * args[4]}

    ts = np.array([0.3, 0.9])
    made = po.Solver(po.IWP(2), po.TS1(po.ODE(lotka_volterra_of)), calibration=po.NoCalibration())

    def quantities(x):
        values = {"square": x[7:9], "velocity": x[9:11, None]}
        data = po.Observations(ts, values, {"square": x[5], "velocity": x[6:7]}, observe=seen, order=1)
        solution = made.solve_grid(x[11:13], jnp.linspace(0.0, 1.2, 5), args=x[:5], data=data)
        return jnp.concatenate([solution.data_log_likelihood[None], solution.mean[-1], jnp.log(solution.std[-1])])

    x = np.array([2.0, 1.5, 0.5, 0.3, 1.3, 0.1, 0.2, 4.0, 3.0, -0.1, 0.1, 2.0, 1.5])
    check_jacobians(quantities, x)


def lotka_volterra_of(t, u, args):
    return lotka_volterra(t, u, tuple(args[:4]))


@pytest.mark.thorough
def test_lanes_and_failures():
    made = solver(controller=po.IntegralController(1e-4, 1e-6))
    u0 = start(made)

    def evidence(values):
        return made.solve(u0, 0.0, 2.0, data=po.Observations([0.5, 1.5], values, 0.2)).data_log_likelihood

    lanes = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 2)))
    np.testing.assert_allclose(jax.vmap(evidence)(lanes), [evidence(lane) for lane in lanes], rtol=1e-10)


ODD = {"mask": np.array([[True, False], [True, True]])}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: po.Observations([0.0, 0.0], VALUES[:2], 0.1), ValueError, "increasing or decreasing"),
        (lambda: po.Observations([0.0, 1.0, 2.0], VALUES[:2], 0.1), ValueError, "leading axis of 3"),
        (lambda: po.Observations([0.0, 1.0], VALUES[:2], -0.1), ValueError, "positive"),
        (lambda: po.Observations([0.0, 1.0], VALUES[:2], np.ones(3)), ValueError, "root of a covariance"),
        (lambda: po.Observations([0.0, 1.0], VALUES[:2] * np.nan, 0.1), ValueError, "mask"),
        (lambda: po.Observations([0.0, 1.0], VALUES[:2], 0.1, mask=[True]), ValueError, "mask"),
        (lambda: po.Observations([0.0, 1.0], VALUES[:2], 0.1, observe=3), TypeError, "callable"),
        (lambda: run(po.Observations([0.0, 1.0], VALUES[:2, :1], 0.1)), ValueError, "must look like"),
        (lambda: run(po.Observations([0.0, 3.0], VALUES[:2], 0.1)), ValueError, r"lie in \[t0, t1\]"),
        (lambda: run(po.Observations([1.0, 0.0], VALUES[:2], 0.1)), ValueError, "sorted"),
        (lambda: run(po.Observations([0.5, 0.5 + 1e-15], VALUES[:2], 0.1)), ValueError, "further apart"),
        (lambda: run(VALUES), TypeError, "Observations"),
        (lambda: run(po.Observations([0.0], VALUES[:1], 0.1), calibration=po.MLECalibration()), ValueError, "rescales"),
        (lambda: run(po.Observations([0.0], VALUES[:1], ROOT), factorisation=po.BlockDiagonal()), ValueError, "Dense"),
        (
            lambda: run(po.Observations([0.0, 1.0], VALUES[:2], 0.1, **ODD), factorisation=po.Isotropic()),
            ValueError,
            "BlockDiagonal",
        ),
        (lambda: grid_run(po.Observations([0.1], VALUES[:1], 0.1)), ValueError, "points of the grid"),
        (lambda: run(po.Observations([0.0], VALUES[:1], 0.1), po.Normal(U0, U0)), ValueError, "InitialState"),
    ],
)
def test_wrong_use(make, error, words):
    with pytest.raises(error, match=words):
        make()


U0 = jnp.array([1.0, 0.5])


def run(data, u0=U0, **parts):
    return solver(**parts).solve(u0, 0.0, 2.0, data=data)


def grid_run(data):
    return solver().solve_grid(U0, GRID, data=data)


@pytest.mark.thorough
def test_a_solve_with_data_goes_on():
    made = solver(controller=po.IntegralController(1e-4, 1e-6))
    ts, u0 = np.array([0.0, 0.5, 1.0, 1.6]), start(made)
    whole = made.solve(u0, 0.0, 2.0, data=po.Observations(ts, VALUES, 0.2))
    first = made.solve(u0, 0.0, 1.0, data=po.Observations(ts[:3], VALUES[:3], 0.2))
    second = made.solve(first.state, 1.0, 2.0, data=po.Observations(ts[3:], VALUES[3:], 0.2))
    assert relative(second.mean, whole.mean) < 1e-12
    np.testing.assert_allclose(second.data_log_likelihood, whole.data_log_likelihood, rtol=1e-12)
    with pytest.raises(ValueError, match="solve before"):
        made.solve(first.state, 1.0, 2.0, data=po.Observations(ts[2:], VALUES[2:], 0.2))
