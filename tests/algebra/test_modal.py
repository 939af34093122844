"""Pairs of directions of a Schur form: where they are dense, when they are turned, and how sure they are elsewhere."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.algebra import modal
from probode.algebra.factorisations import layout_of
from probode.algebra.modal import schur_directions
from probode.algebra.normal import Normal
from probode.algebra.turning import turn_state

from ..helpers import central_differences, covariance, first_of, name, relative


def _normal_matrix():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    pairs = np.zeros((5, 5))
    pairs[:2, :2], pairs[2, 2], pairs[3:, 3:] = [[-1, 3], [-3, -1]], -40, [[-0.2, 1], [-1, -0.2]]
    return turn @ pairs @ turn.T


NORMAL = _normal_matrix()
SYMMETRIC = NORMAL + NORMAL.T
U0 = np.arange(1.0, 6.0) / 5


def solver(factorisation, field, *, order=1, nu=3, **parts):
    return po.Solver(po.IWP(nu), po.TS1(po.ODE(field, order=order)), factorisation=factorisation, **parts)


def linear(matrix):
    return lambda t, u, args: jnp.asarray(matrix, u.dtype) @ u


def van_der_pol(t, u, args):
    rate = 5.0 if args is None else args
    return jnp.stack([u[1], rate * (1 - u[0] ** 2) * u[1] - u[0]])


@pytest.fixture
def eager(monkeypatch):
    """Directions are taken anew after nearly every step."""
    jax.clear_caches()
    monkeypatch.setattr(modal, "_TURN", 1e-3)
    yield
    jax.clear_caches()


def check_equal(own, expected, rtol):
    for k in range(3):
        assert relative(own.derivative(k).mean, expected.derivative(k).mean) < rtol
        assert relative(own.derivative(k).std, expected.derivative(k).std) < rtol
    assert relative(own.covariance, expected.covariance) < rtol
    np.testing.assert_allclose(own.log_likelihood, expected.log_likelihood, rtol=1e-9)


@pytest.mark.parametrize(
    ("matrix", "strategy"),
    first_of(
        (NORMAL, po.FixedIntervalSmoother()),
        (SYMMETRIC, po.Filter()),
        (SYMMETRIC, po.FixedPointSmoother()),
        (NORMAL, po.Filter()),
    ),
    ids=lambda x: name(x) if isinstance(x, po.AbstractStrategy) else "",
)
@pytest.mark.thorough
def test_a_constant_normal_jacobian_makes_it_dense(matrix, strategy):
    times = np.linspace(0.0, 1.0, 5)
    runs = [solver(f, linear(matrix), strategy=strategy) for f in (po.Modal(), po.Dense())]
    own, expected = (s.solve(U0, 0.0, 1.0, save_at=times) for s in runs)
    assert own.stats["num_steps"] == expected.stats["num_steps"]
    check_equal(own, expected, 2e-10)


@pytest.mark.thorough
def test_so_does_one_in_an_equation_of_second_order():
    stiffness = SYMMETRIC[:4, :4]
    field = lambda t, u, du, args: jnp.asarray(stiffness) @ u - 0.3 * du  # noqa: E731
    own, expected = (solver(f, field, order=2).solve((U0[:4], 0 * U0[:4]), 0.0, 1.0) for f in (po.Modal(), po.Dense()))
    check_equal(own, expected, 1e-10)


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", [po.Filter(), po.FixedIntervalSmoother(), po.FixedPointSmoother()], ids=name)
def test_turning_a_single_pair_changes_nothing(eager, strategy):
    times = np.linspace(0.0, 3.0, 7)
    runs = [solver(f, van_der_pol, strategy=strategy) for f in (po.Modal(), po.Dense())]
    u0 = np.array([2.0, 0.0])
    own, expected = (s.solve(u0, 0.0, 3.0, save_at=times) for s in runs)
    assert np.sum(np.abs(np.diff(own.layout.factorisation.basis, axis=0)).max((1, 2)) > 1e-3) > 3
    check_equal(own, expected, 1e-8)
    if expected.is_dense:
        between = np.linspace(0.1, 2.9, 5)
        own, expected = own.evaluate(between), expected.evaluate(between)
        assert relative(own.mean, expected.mean) < 1e-9 and relative(own.std, expected.std) < 1e-8


@pytest.mark.thorough
def test_samples_through_turns_have_the_moments_of_the_posterior(eager):
    own = solver(po.Modal(), van_der_pol, strategy=po.FixedIntervalSmoother())
    solution = own.solve(np.array([2.0, 0.0]), 0.0, 2.0, save_at=np.linspace(0.5, 2.0, 4))
    for ts in (None, np.linspace(0.3, 1.9, 5)):
        known = solution if ts is None else solution.evaluate(ts)
        samples = solution.sample(jax.random.key(0), (4000,), ts=ts)
        assert np.all(np.abs(samples.mean(0) - known.mean) < 5 * known.std / np.sqrt(4000))
        np.testing.assert_allclose(samples.std(0), known.std, rtol=0.06)


@hypothesis.given(seed=st.integers(0, 2**31), d=st.sampled_from([1, 2, 3, 6]), symmetric=st.booleans())
@hypothesis.settings(max_examples=30, deadline=None)
def test_schur_directions(seed, d, symmetric):
    matrix = np.random.default_rng(seed).normal(size=(d, d)) * 10.0 ** (seed % 7 - 3)
    matrix = matrix + matrix.T if symmetric else matrix
    directions, order = (np.asarray(x) for x in schur_directions(jnp.asarray(matrix)))
    np.testing.assert_allclose(directions.T @ directions, np.eye(d), atol=1e-13)
    turned = directions.T @ matrix @ directions
    assert np.max(np.abs(np.where(order[:, None] > order, turned, 0))) < 1e-12 * np.linalg.norm(matrix)
    number = np.sum(np.abs(np.linalg.eigvals(matrix).imag) > 0)
    for i in range(0, number, 2):
        assert order[i] == order[i + 1]
    assert len(set(order)) == d - number // 2


@pytest.mark.parametrize("d", [2, 5])
def test_turned_blocks_are_those_of_the_turned_covariance(d):
    rng = np.random.default_rng(0)
    layout = layout_of(jnp.ones(d), 2, po.Modal())
    mean = jnp.asarray(rng.normal(size=(3, d)))
    factor = layout.lift(jnp.asarray(np.triu(rng.normal(size=(3, 3)))), 1.0)
    factor = factor * rng.uniform(0.5, 2.0, size=(len(factor), 1, 1))
    turn, _ = np.linalg.qr(rng.normal(size=(d, d)))
    turned = turn_state(Normal(layout.pack(mean), factor), jnp.asarray(turn))
    np.testing.assert_allclose(layout.unpack(turned.mean), mean @ turn, atol=1e-13)
    assert np.all(np.tril(turned.factor, -1) == 0)
    # One derivative after the other: the covariance of all components, as blocks along its diagonal.
    old, new = (np.asarray(covariance(x)).reshape(len(factor), 3, 2, 3, 2) for x in (factor, turned.factor))
    for i, j in np.ndindex(3, 3):
        full = np.zeros((2 * len(factor), 2 * len(factor)))
        for b, block in enumerate(old):
            full[2 * b : 2 * b + 2, 2 * b : 2 * b + 2] = block[i, :, j]
        expected = turn.T @ full[:d, :d] @ turn
        for b, block in enumerate(new):
            size = min(2, d - 2 * b)
            here = slice(2 * b, 2 * b + size)
            np.testing.assert_allclose(block[i, :size, j, :size], expected[here, here], atol=1e-12)


def brusselator(cells):
    def field(t, y, args):
        u, v = y[:cells], y[cells:]
        diffusion = 0.02 * (cells + 1) ** 2
        laplacian = lambda x, edge: diffusion * jnp.diff(jnp.pad(x, 1, constant_values=edge), n=2)  # noqa: E731
        return jnp.concatenate([1 + u**2 * v - 4 * u + laplacian(u, 1.0), 3 * u - u**2 * v + laplacian(v, 3.0)])

    x = np.arange(1, cells + 1) / (cells + 1)
    return field, np.concatenate([1 + np.sin(2 * np.pi * x), np.full(cells, 3.0)])


@pytest.mark.thorough
def test_errors_are_as_large_as_they_say():
    field, u0 = brusselator(8)
    exact = solver(po.Dense(), field, nu=6, controller=po.IntegralController(1e-10, 1e-12)).solve(u0, 0.0, 5.0)
    for nu in (3, 4, 5):
        for tol in (1e-3, 1e-5):
            own = solver(po.Modal(), field, nu=nu, controller=po.IntegralController(tol, 1e-2 * tol))
            solution = own.solve(u0, 0.0, 5.0)
            error = solution.mean[-1] - exact.mean[-1]
            assert np.max(np.abs(error)) < 20 * tol
            assert 1e-4 < np.mean((error / solution.std[-1]) ** 2) < 10
            dense = solver(po.Dense(), field, nu=nu, controller=po.IntegralController(tol, 1e-2 * tol))
            assert solution.stats["num_steps"] < 1.5 * dense.solve(u0, 0.0, 5.0).stats["num_steps"]


@pytest.mark.thorough
def test_derivatives():
    def run(rate):
        own = solver(po.Modal(), van_der_pol, strategy=po.FixedIntervalSmoother())
        solution = own.solve_grid(np.array([2.0, 0.0]), jnp.linspace(0.0, 1.0, 9), args=rate[0])
        return jnp.concatenate([solution.mean.ravel(), solution.std[1:].ravel()])

    expected = central_differences(jax.jit(run), np.full(1, 2.0), 1e-4)
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(run))(np.full(1, 2.0)), expected, rtol=1e-5, atol=1e-7)

    def adaptive(rate, factorisation):
        own = solver(factorisation, van_der_pol, loop=po.BoundedLoop(128))
        solution = own.solve(np.array([2.0, 0.0]), 0.0, 2.0, args=rate)
        return jnp.sum(solution.mean) + jnp.sum(solution.std)

    own, expected = (jax.grad(adaptive)(2.0, f) for f in (po.Modal(), po.Dense()))
    np.testing.assert_allclose(own, expected, rtol=1e-5)


@pytest.mark.thorough
def test_lanes_have_directions_of_their_own():
    own = solver(po.Modal(), van_der_pol)
    u0, rates = np.array([2.0, 0.0]), jnp.array([1.0, 30.0])
    lanes = jax.vmap(lambda rate: own.solve(u0, 0.0, 2.0, args=rate))(rates)
    ensemble = po.solve_ensemble(own, u0, 0.0, 2.0, args=rates, in_axes=(None, None, None, 0))
    for i, rate in enumerate(rates):
        single = own.solve(u0, 0.0, 2.0, args=rate)
        for batch in (lanes, ensemble):
            assert relative(batch.mean[i], single.mean) < 1e-9 and relative(batch.std[i], single.std) < 1e-7


@pytest.mark.thorough
def test_reports_and_pictures():
    plt = pytest.importorskip("matplotlib.pyplot")
    (field, u0), strategy = brusselator(3), po.FixedIntervalSmoother()
    own = solver(po.Modal(), field, nu=4, strategy=strategy)
    tight = po.IntegralController(1e-10, 1e-12)
    reference = solver(po.Dense(), field, nu=6, strategy=strategy, controller=tight).solve(u0, 0.0, 2.0)
    report = po.calibration_report(
        own, lambda t: reference.evaluate(t).mean, u0=u0, t0=0.0, t1=2.0, tolerances=(1e-3, 1e-5), show=False
    )
    assert np.all(report.smoothed < 10) and np.all(report.smoothed > 1e-5)
    solution = own.solve(u0, 0.0, 2.0)
    solution.plot()
    po.plots.plot_phase(solution)
    po.plots.plot_local_error(solution)
    plt.close("all")


DEFECTIVE = np.array([[-1.0, 1, 0], [0, -1, 1], [0, 0, -1]])


@pytest.mark.thorough
@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), DEFECTIVE, np.diag([-1e9, -1.0, 0.0]), np.ones((1, 1))])
def test_jacobians_of_all_kinds(matrix):
    d = len(matrix)
    field = lambda t, u, args: jnp.asarray(matrix, u.dtype) @ (u - jnp.sin(t)) + jnp.cos(t)  # noqa: E731
    for span in (2.0, -0.5 if d == 1 else 2.0):
        solution = solver(po.Modal(), field).solve(np.zeros(d), 0.0, span)
        error = np.abs(solution.mean[-1] - np.sin(span))
        assert np.all(error < 1e-2) and np.all(error < 10 * solution.std[-1] + 1e-12)
    single = solver(po.Modal(), field).solve(jnp.zeros(d, jnp.float32), 0.0, 2.0)
    assert single.std.dtype == jnp.float32 and np.all(np.abs(single.mean[-1] - np.sin(2.0)) < 1e-2)


@pytest.mark.thorough
def test_a_jacobian_that_is_infinite_at_the_start():
    field = lambda t, u, args: jnp.stack([jnp.ones_like(t), jnp.sqrt(u[0])])  # noqa: E731
    solution = solver(po.Modal(), field).solve(np.zeros(2), 0.0, 1.0)
    np.testing.assert_allclose(solution.mean[-1], [1.0, 2 / 3], rtol=1e-3)
    assert np.all(np.isfinite(solution.std)) and np.all(solution.std[-1, 1] > 0)


@pytest.mark.thorough
def test_a_solve_goes_on_in_its_own_directions():
    own, u0 = solver(po.Modal(), van_der_pol), np.array([2.0, 0.0])
    first = own.solve(u0, 0.0, 1.0)
    then = own.solve(first.state, 1.0, 2.0)
    whole = own.solve(u0, 0.0, 2.0, save_at=po.SaveAt(steps=True))
    assert relative(then.mean[-1], whole.mean[-1]) < 1e-3
    start = own.initialise(u0, 0.0)
    assert relative(own.solve(start, 0.0, 1.0).mean, first.mean) < 1e-12
    with pytest.raises(ValueError, match="The state to go on from has the factorisation"):
        solver(po.Dense(), van_der_pol).solve(first.state, 1.0, 2.0)
    stepped = own.step(own.init(u0, 0.0), 0.01)
    expected = solver(po.Dense(), van_der_pol)
    expected = expected.step(expected.init(u0, 0.0), 0.01)
    assert relative(stepped.std, expected.std) < 1e-10
