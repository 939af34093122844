"""Groups of components: a step against full covariances in NumPy, and what lies on either side of groups."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import probode as po
from probode.algebra.coupling import Coupling

from .. import oracles
from ..helpers import central_differences, first_of, name, relative


RATES = np.random.default_rng(0).normal(size=(5, 5))
U0 = np.arange(1.0, 6.0) / 5


def whole(t, u, args):
    return jnp.sin(jnp.asarray(RATES, u.dtype) @ u) - u


def glued(t, u, args):
    """Two systems that know nothing of each other, of the components 0, 3 and 1, 2, 4."""
    apart = np.array([0, 1, 1, 0, 1])
    return jnp.sin(jnp.asarray(RATES * (apart[:, None] == apart), u.dtype) @ u) - u


def accelerated(t, u, du, args):
    return jnp.sin(jnp.asarray(RATES, u.dtype) @ u) - 0.5 * du


def solver(factorisation, field=whole, *, order=1, nu=3, constraint=po.TS1, **parts):
    return po.Solver(po.IWP(nu), constraint(po.ODE(field, order=order)), factorisation=factorisation, **parts)


def filter_of_blocks(field, order, labels, u0, grid, nu):
    """The filter with the unit output scale, on full covariances of which the blocks are kept after every step."""
    d, n = len(labels), nu + 1
    same = np.tile(np.asarray(labels)[:, None] == np.asarray(labels), (n, n))
    start = solver(po.Dense(), field, order=order, nu=nu).initialise(u0, grid[0])
    mean, covariance = np.ravel(start.mean), np.zeros((n * d, n * d))
    flat = jax.jit(lambda t, us: field(t, *us, None))
    jacobian = jax.jit(jax.jacfwd(flat, argnums=1))
    means, stds, evidence = [mean[:d]], [np.zeros(d)], 0.0
    for t, dt in zip(grid[1:], np.diff(grid), strict=True):
        a, q = oracles.iwp_transition(nu, dt, d)
        mean, covariance = a @ mean, a @ covariance @ a.T + q
        us = mean[: order * d].reshape(order, d)
        z = mean[order * d : (order + 1) * d] - np.asarray(flat(t, us))
        h = np.zeros((d, n * d))
        h[:, : order * d] = -np.asarray(jacobian(t, us)).reshape(d, order * d)
        h[:, order * d : (order + 1) * d] = np.eye(d)
        evidence += oracles.log_density(z, 0, h @ covariance @ h.T)
        mean, covariance = oracles.condition(mean, covariance, h, z)
        covariance = covariance * same
        means.append(mean[:d])
        stds.append(np.sqrt(np.diag(covariance)[:d]))
    return np.array(means), np.array(stds), evidence


@pytest.mark.parametrize(
    ("labels", "order"),
    first_of(([0, 1, 0, 2, 1], 1), ([0, 1, 0, 2, 1], 2), ([0, 1, 2, 3, 4], 1), ([1, 1, 0, 0, 0], 2)),
)
def test_a_filter_is_that_of_full_covariances_cut_into_blocks(labels, order):
    field, u0 = (whole, U0) if order == 1 else (accelerated, (U0, 0 * U0))
    grid = np.linspace(0.0, 1.0, 6)
    own = solver(po.Blocks(labels), field, order=order, calibration=po.NoCalibration()).solve_grid(u0, grid)
    mean, std, evidence = filter_of_blocks(field, order, labels, u0, grid, nu=3)
    assert relative(own.mean, mean) < 1e-13
    np.testing.assert_allclose(own.std[1:], std[1:], rtol=1e-10)
    np.testing.assert_allclose(own.log_likelihood, evidence, rtol=1e-10)


@pytest.mark.parametrize(
    ("partition", "field", "strategy"),
    first_of(
        (5, whole, po.Filter()),
        ([0, 1, 1, 0, 1], glued, po.FixedIntervalSmoother()),
        (5, whole, po.FixedPointSmoother()),
        ([0, 1, 1, 0, 1], glued, po.FixedPointSmoother()),
    ),
    ids=name,
)
def test_groups_that_do_not_influence_each_other_are_dense(partition, field, strategy):
    times = np.linspace(0.0, 1.0, 4)
    ours, dense = (solver(f, field, strategy=strategy) for f in (po.Blocks(partition), po.Dense()))
    if partition == 5:
        own, expected = (s.solve(U0, 0.0, 1.0, save_at=times) for s in (ours, dense))
        assert own.stats["num_steps"] == expected.stats["num_steps"]
    else:
        # The estimate of an error is that of the equation of each group alone, but the norm is that of all.
        own, expected = (s.solve_grid(U0, np.linspace(0.0, 1.0, 7)) for s in (ours, dense))
    for k in range(3):
        assert relative(own.derivative(k).mean, expected.derivative(k).mean) < 1e-11
        assert relative(own.derivative(k).std, expected.derivative(k).std) < 1e-9
    assert relative(own.covariance, expected.covariance) < 1e-10
    np.testing.assert_allclose(own.output_scale[..., 0], expected.output_scale, rtol=1e-9)
    np.testing.assert_allclose(own.log_likelihood, expected.log_likelihood, rtol=1e-9)


@pytest.mark.parametrize("stiffness", [1e3, 1e9])
def test_a_stiff_direction_keeps_its_digits(stiffness):
    rng = np.random.default_rng(1)
    jacobian = np.array([[-stiffness, 1.0, 0.3], [0.5, -2.0, 0.1], [0.2, 0.7, -1.0]])
    roots = np.triu(rng.normal(size=(3, 2, 2))) + 2 * np.eye(2)
    matrix = np.stack([np.stack([-jacobian[:, i], np.eye(3)[i]], 1) for i in range(3)])
    coupling = Coupling(jnp.asarray(matrix), (0, 1, 2), 1)
    given = np.asarray(coupling.conditioned(jnp.asarray(roots)))
    with mpmath.workdps(60):
        a = np.concatenate([oracles.precise(r) @ oracles.precise(h).T for r, h in zip(roots, matrix, strict=True)])
        _, expected = oracles.condition(oracles.precise(np.zeros(6)), oracles.precise(np.eye(6)), a.T, np.zeros(3))
        blocks = [expected[2 * i : 2 * i + 2, 2 * i : 2 * i + 2].astype(float) for i in range(3)]
    for root, block in zip(given, blocks, strict=True):
        # Every entry, the variance of 1e-18 among them.
        np.testing.assert_allclose(root.T @ root, block, rtol=1e-6)


@pytest.mark.thorough
def test_partitions_are_like_u():
    cells = {"a": np.array([0, 1, 0]), "b": 1}
    u0 = {"a": U0[:3], "b": U0[3:]}

    def field(t, u, args):
        return jax.tree.map(lambda x: -x + jnp.sum(u["a"]) * 0.1, u)

    grid = np.linspace(0.0, 0.5, 3)
    own = solver(po.Blocks(cells), field).solve_grid(u0, grid)
    flat = solver(po.Blocks(np.array([5, 9, 5, 9, 9])), lambda t, u, args: -u + jnp.sum(u[:3]) * 0.1)
    expected = flat.solve_grid(U0, grid)
    assert own.marginals.mean.shape == (3, 2, 4 * 3, 1)  # of two groups the larger has three components
    np.testing.assert_allclose(jnp.concatenate([own.std["a"], own.std["b"]], axis=1), expected.std, rtol=1e-12)
    assert po.Blocks(2).batch_shape(5) == (3,)
    with pytest.raises(
        ValueError, match=r"Blocks\(partition\) must be an integer, or integers with the structure of u"
    ):
        solver(po.Blocks(cells)).solve(U0, 0.0, 1.0)
    with pytest.raises(ValueError, match="must be an integer, or integers"):
        solver(po.Blocks([0, 1])).solve(U0, 0.0, 1.0)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=r"Blocks\(partition\)"):
            po.Blocks(wrong)
    for wrong in (None, "cells", [0.0, 1.0], 1.5):
        with pytest.raises(TypeError, match="must be an integer or a PyTree of integers"):
            po.Blocks(wrong)


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", [po.Filter(), po.FixedIntervalSmoother()], ids=name)
def test_derivatives(strategy):
    own = solver(po.Blocks(2), lambda t, u, args: args * whole(t, u, None), strategy=strategy)

    def run(rate):
        solution = own.solve_grid(U0, jnp.linspace(0.0, 1.0, 5), args=rate[0])
        return jnp.concatenate([solution.mean.ravel(), 1e2 * solution.std[1:].ravel()])

    expected = central_differences(jax.jit(run), np.ones(1), 1e-4)
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(run))(np.ones(1)), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.thorough
def test_it_works_with_everything_else():
    calibrations = po.NoCalibration(), po.MLECalibration(), po.DynamicCalibration(memory=0.5)
    exact = solver(po.Dense(), nu=5, controller=po.IntegralController(1e-10, 1e-12)).solve(U0, 0.0, 1.0).mean[-1]
    for calibration in calibrations:
        solution = solver(po.Blocks(2), calibration=calibration).solve(U0, 0.0, 1.0)
        assert relative(solution.mean[-1], exact) < 1e-3
        assert np.ptp(solution.output_scale[-1]) < 1e-12 * np.max(solution.output_scale[-1])  # one for all groups
    for prior in (po.RelativeScale(po.IWP(3)), po.IOUP(3, -1.0), po.Matern(3, 1.0)):
        own = po.Solver(prior, po.TS1(po.ODE(whole)), factorisation=po.Blocks([0, 1, 0, 1, 1]))
        assert relative(own.solve(U0, 0.0, 1.0).mean[-1], exact) < 1e-3
    for constraint in (po.SLR1, po.TS0):
        own = solver(po.Blocks(2), constraint=constraint, initialisation=po.Diffuse(1), error=po.StateError())
        assert relative(own.solve(U0, 0.0, 1.0).mean[-1], exact) < 1e-2
    uncertain = po.Normal(U0, np.full(5, 0.01))
    own, expected = (solver(f, glued).solve(uncertain, 0.0, 1.0) for f in (po.Blocks([0, 1, 1, 0, 1]), po.Dense()))
    np.testing.assert_allclose(own.std, expected.std, rtol=1e-6)
    data = po.Observations(np.array([0.3, 0.7]), np.stack([U0, 0.5 * U0]), noise=0.1)
    own, expected = (solver(f, glued).solve(U0, 0.0, 1.0, data=data) for f in (po.Blocks([0, 1, 1, 0, 1]), po.Dense()))
    np.testing.assert_allclose(own.data_log_likelihood, expected.data_log_likelihood, rtol=1e-3)
    np.testing.assert_allclose(own.std, expected.std, rtol=0.2)  # with other steps
    single = solver(po.Blocks(2)).solve(jnp.asarray(U0, jnp.float32), 1.0, 0.0)
    assert single.std.dtype == jnp.float32 and np.all(np.isfinite(single.std)) and np.all(single.std > 0)
