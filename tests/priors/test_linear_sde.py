"""Priors with a linear drift against matrix exponentials in 150 digits, their laws, and linear equations."""

import functools as ft
import math

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree

import probode as po
from probode.algebra.factorisations import Layout

from .. import oracles
from ..helpers import FACTORISATIONS, central_differences, covariance, first_of, logistic, name


ORDERS = first_of(3, 1, 8, 2, 4, 5)
LENGTHS = (1e-3, 0.3, 1.0, 7.0, 100.0)  # of a step, in time constants


def layout_of(factorisation, nu, d=1, dtype=jnp.float64):
    return Layout(factorisation, nu, d, lambda u: u, jnp.dtype(dtype))


@ft.cache
def compiled(make, nu, factorisation=po.Isotropic(), d=1, dtype=jnp.float64):
    layout = layout_of(factorisation, nu, d, dtype)
    return jax.jit(lambda parameter, dt: make(nu, parameter).transition(dt, layout))


def transition(make, nu, parameter, dt, factorisation=po.Isotropic(), d=1, dtype=jnp.float64):
    return compiled(make, nu, factorisation, d, dtype)(jnp.asarray(parameter, dtype), jnp.asarray(dt, dtype))


def ioup_drift(nu, rate):
    """``F`` and ``e_nu e_nu^T`` for a matrix rate, ``(n d, n d)``, derivative by derivative."""
    rate = np.atleast_2d(rate)
    d, n = rate.shape[0], nu + 1
    drift, noise = mpmath.zeros(n * d), mpmath.zeros(n * d)
    for i in range(nu * d):
        drift[i, i + d] = 1
    for a in range(d):
        noise[nu * d + a, nu * d + a] = 1
        for b in range(d):
            drift[nu * d + a, nu * d + b] = mpmath.mpf(float(rate[a, b]))
    return drift, noise


def matern_drift(nu, length_scale):
    drift, noise = ioup_drift(nu, 0.0)
    decay = mpmath.sqrt(2 * nu + 1) / mpmath.mpf(float(length_scale))
    for j in range(nu + 1):
        drift[nu, j] = -mpmath.binomial(nu + 1, j) * decay ** (nu + 1 - j)
    return drift, noise


def exact_transition(drift, noise, dt):
    """``A`` and ``Q`` from the exponential of one block matrix (Van Loan, 1978)."""
    dim, dt = drift.rows, mpmath.mpf(float(dt))
    block = mpmath.zeros(2 * dim)
    block[:dim, :dim], block[:dim, dim:], block[dim:, dim:] = -drift, noise, drift.T
    exponential = mpmath.expm(block * dt)
    a = exponential[dim:, dim:].T
    return a, a * exponential[:dim, dim:] * mpmath.sign(dt)


def errors(moved, a, q, units):
    """Of ``A`` relative to its norm in the given units, or to one; of ``Q`` and its root to standard deviations."""
    dim = a.rows
    diagonal = [mpmath.sqrt(q[i, i]) for i in range(dim)]

    def scaled(matrix, left, right):
        entries = [[mpmath.mpf(float(matrix[i, j])) * left[i] * right[j] for j in range(dim)] for i in range(dim)]
        return np.array(entries, dtype=float)

    ones, inverse = [1] * dim, [1 / x for x in diagonal]
    a_got = scaled(moved.matrix, [1 / x for x in units], units)
    a_exact = np.array([[a[i, j] / units[i] * units[j] for j in range(dim)] for i in range(dim)], dtype=float)
    correlation = mpmath.matrix([[q[i, j] * inverse[i] * inverse[j] for j in range(dim)] for i in range(dim)])
    root = scaled(moved.noise, ones, [float(moved.magnitude) * x for x in inverse])
    np.testing.assert_array_equal(np.tril(moved.noise, -1), 0)
    root *= np.sign(np.diagonal(root))[:, None]
    exact_root = np.array(mpmath.cholesky(correlation).T.tolist(), dtype=float)
    of_q = np.max(np.abs(root.T @ root - np.array(correlation.tolist(), dtype=float)))
    return np.max(np.abs(a_got - a_exact)) / max(1.0, np.max(np.abs(a_exact))), of_q, np.max(np.abs(root - exact_root))


def step_units(nu, dt, d=1):
    return [mpmath.mpf(abs(dt)) ** (nu - i // d) for i in range((nu + 1) * d)]


def stable_rate(d, size, dt, seed):
    """A random matrix with ``|rate dt| = size``, neither symmetric nor normal, stable in the direction of the step."""
    rng = np.random.default_rng(seed)
    root, skew = rng.standard_normal((2, d, d))
    rate = -(root @ root.T) - 0.1 * np.eye(d) + 3 * (skew - skew.T)
    return rate * size / np.max(np.sum(np.abs(rate), axis=1)) / dt


@pytest.mark.parametrize("nu", ORDERS)
def test_ioup_is_the_matrix_exponential(nu):
    with mpmath.workdps(150):
        for dt in (0.4, -0.01):
            for length in LENGTHS:
                rate = -length / dt
                exact = exact_transition(*ioup_drift(nu, rate), dt)
                assert max(errors(transition(po.IOUP, nu, rate, dt), *exact, step_units(nu, dt))) < 1e-12
        # a mild instability
        exact = exact_transition(*ioup_drift(nu, 2.0), 1.0)
        assert max(errors(transition(po.IOUP, nu, 2.0, 1.0), *exact, step_units(nu, 1.0))) < 1e-12


@pytest.mark.parametrize("nu", first_of(3, 1, 5))
def test_matrix_rates(nu):
    d = 2
    with mpmath.workdps(150):
        for seed, (dt, length) in enumerate([(0.4, 1e-3), (-0.4, 1.0), (0.01, 7.0), (-3.0, 100.0)]):
            rate = stable_rate(d, length, dt, seed)
            exact = exact_transition(*ioup_drift(nu, rate), dt)
            moved = transition(po.IOUP, nu, rate, dt, po.Dense(), d)
            assert max(errors(moved, *exact, step_units(nu, dt, d))) < 1e-12


@pytest.mark.parametrize("nu", ORDERS)
def test_matern_is_the_matrix_exponential(nu):
    with mpmath.workdps(150):
        for dt, length in [(0.4, 1e-3), (-0.4, 0.3), (0.01, 1.0), (0.4, 7.0), (0.1, 100.0)]:
            scale = abs(dt) * math.sqrt(2 * nu + 1) / length
            a, q = exact_transition(*matern_drift(nu, scale), dt)
            moved = transition(po.Matern, nu, scale, dt)
            # Its own time constant is the unit in which it is of order one, until it decays.
            units = [mpmath.mpf(length / abs(dt)) ** i for i in range(nu + 1)]
            assert max(errors(moved, a, q, units)) < 1e-12


@pytest.mark.thorough
def test_a_long_step_forgets():
    for nu in (1, 4, 8):
        prior, layout = po.Matern(nu, 1.0), layout_of(po.Isotropic(), nu)
        moved = transition(po.Matern, nu, 1.0, 1000.0)
        root = moved.magnitude * moved.noise
        p, q = covariance(prior.stationary(layout).factor), covariance(root)
        std = np.sqrt(np.diagonal(p))
        np.testing.assert_allclose(q / np.outer(std, std), p / np.outer(std, std), rtol=0, atol=1e-13)
        np.testing.assert_allclose(moved.matrix, 0, atol=1e-100)


def test_more_time_constants_than_can_be_resolved_are_not_a_number():
    moved = transition(po.IOUP, 2, -1e13, 1.0)
    assert np.all(np.isnan(moved.noise[:, -1]))
    assert np.all(np.isfinite(transition(po.IOUP, 2, -1e12, 1.0).noise))


@pytest.mark.parametrize("nu", ORDERS)
def test_without_a_rate_it_is_the_integrated_wiener_process(nu):
    for dt in (0.3, -1e-4):
        moved = transition(po.IOUP, nu, 0.0, dt)
        wiener = po.IWP(nu).transition(jnp.asarray(dt), layout_of(po.Isotropic(), nu))
        np.testing.assert_allclose(moved.matrix, wiener.matrix, rtol=1e-15)
        assert moved.magnitude == wiener.magnitude
        size = np.linalg.norm(wiener.noise, axis=0)
        sign = np.sign(np.diagonal(moved.noise) * np.diagonal(wiener.noise))
        np.testing.assert_allclose(sign[:, None] * moved.noise / size, wiener.noise / size, rtol=0, atol=1e-13)


dyadic = st.builds(math.ldexp, st.integers(1, 2**10), st.integers(-14, -4))


@hypothesis.given(st.sampled_from([(po.IOUP, 3, -1.0), (po.Matern, 4, 1.0)]), dyadic, dyadic)
def test_two_steps_are_one(case, s, t):
    make, nu, parameter = case
    first, second, both = (transition(make, nu, parameter, dt) for dt in (s, t, s + t))
    unit = np.array([(s + t) ** (nu - i) for i in range(nu + 1)])
    if make is po.Matern:
        unit = 3.0 ** np.arange(nu + 1)  # lambda^i: these steps are up to hundreds of time constants long
    scale = unit[None, :] / unit[:, None]
    np.testing.assert_allclose((second.matrix @ first.matrix) * scale, both.matrix * scale, rtol=0, atol=1e-12)
    q_s, q_t, q = (np.asarray(covariance(x.magnitude * x.noise)) for x in (first, second, both))
    std = np.sqrt(np.diagonal(q))
    two = second.matrix @ q_s @ second.matrix.T + q_t
    np.testing.assert_allclose(two / np.outer(std, std), q / np.outer(std, std), rtol=0, atol=1e-12)


@pytest.mark.parametrize("nu", ORDERS)
def test_matern_keeps_its_stationary_distribution(nu):
    scale = 0.7
    prior = po.Matern(nu, scale)
    state = prior.stationary(layout_of(po.Isotropic(), nu))
    np.testing.assert_array_equal(state.mean, 0)
    p = np.asarray(covariance(state.factor))
    with mpmath.workdps(60):
        drift, noise = matern_drift(nu, scale)
        flow = drift * mpmath.matrix(p.tolist())
        change = np.array((flow + flow.T + noise).tolist(), dtype=float)
        sizes = np.array([[float(sum(abs(drift[i, k] * p[k, j]) for k in range(nu + 1))) for j in range(nu + 1)]
                          for i in range(nu + 1)])  # fmt: skip
        np.testing.assert_array_less(np.abs(change), 1e-14 * (sizes + sizes.T + 1e-3))
    std = np.sqrt(np.diagonal(p))
    for dt in (1e-3, 0.2, 5.0):
        moved = transition(po.Matern, nu, scale, dt)
        kept = moved.matrix @ p @ moved.matrix.T + covariance(moved.magnitude * moved.noise)
        np.testing.assert_allclose(kept / np.outer(std, std), p / np.outer(std, std), rtol=0, atol=1e-13)


def test_matern_kernels():
    t, scale, sigma = 0.35, 0.7, 1.3
    shapes = {1: lambda x: 1 + x, 2: lambda x: 1 + x + x**2 / 3}
    for nu, shape in shapes.items():
        decay = math.sqrt(2 * nu + 1) / scale
        root = po.Matern(nu, scale, output_scale=sigma).stationary(layout_of(po.Isotropic(), nu)).factor
        p = np.asarray(covariance(root))
        variance = sigma**2 * math.factorial(2 * nu) / (math.factorial(nu) ** 2 * (2 * decay) ** (2 * nu + 1))
        np.testing.assert_allclose(p[0, 0], variance, rtol=1e-14)
        kernel = (transition(po.Matern, nu, scale, t).matrix @ p)[0, 0]
        np.testing.assert_allclose(kernel, variance * shape(decay * t) * math.exp(-decay * t), rtol=1e-13)


def components(moved, layout):
    """``A`` and ``Q`` as full matrices, derivative by derivative."""
    d = layout.size
    dim = (layout.num_derivatives + 1) * d

    def full(x):
        x = np.asarray(x)
        if x.ndim == 3:
            return np.einsum("aij,ab->iajb", x, np.eye(d)).reshape(dim, dim)
        return x if x.shape[0] == dim else np.kron(x, np.eye(d))

    return full(moved.matrix), full(covariance(moved.magnitude * moved.noise))


@pytest.mark.thorough
def test_layouts_agree_where_the_parameters_allow_it():
    nu, d, dt = 2, 3, jnp.asarray(0.4)
    scale, rates = jnp.asarray([1.0, 2.0, 0.5]), jnp.asarray([-1.0, -30.0, 0.0])
    dense, block = layout_of(po.Dense(), nu, d), layout_of(po.BlockDiagonal(), nu, d)
    priors = [
        lambda x: (po.IOUP(nu, -2.0, output_scale=x), po.IOUP(nu, -2.0 * jnp.eye(d), output_scale=x)),
        lambda x: (po.IOUP(nu, rates, output_scale=x), po.IOUP(nu, lambda u: rates * u, output_scale=x)),
        lambda x: (po.Matern(nu, 1.5, output_scale=x), po.Matern(nu, jnp.full(d, 1.5), output_scale=x)),
    ]

    @jax.jit
    def moves(x):
        out = []
        for make in priors:
            short, long = make(x)
            out.append((short.transition(dt, dense), short.transition(dt, block), long.transition(dt, dense)))
        return out

    for moved in moves(scale):
        for one in moved:
            np.testing.assert_array_equal(np.tril(one.noise, -1), 0)
        expected, *others = [components(*x) for x in zip(moved, (dense, block, dense), strict=True)]
        for other in others:
            for x, y in zip(other, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-16)
    # and one component is as if it were alone
    alone = transition(po.IOUP, nu, rates[1], 0.4)
    np.testing.assert_allclose(moves(scale)[1][1].matrix[1], alone.matrix, rtol=1e-14)
    stationary = [po.Matern(nu, 1.5 + rates**2, output_scale=scale).stationary(x).factor for x in (dense, block)]
    full = np.einsum("aij,ab->iajb", covariance(stationary[1]), np.eye(d)).reshape(9, 9)
    np.testing.assert_allclose(covariance(stationary[0]), full, rtol=1e-13)


class Linear(eqx.Module):
    """A linear function of a PyTree with a parameter of its own."""

    a: jax.Array

    def __call__(self, u):
        return {"x": -self.a * u["x"] + u["y"], "y": 2 * u["x"][0] - u["y"]}


def test_rates_of_trees():
    flat, unravel = ravel_pytree({"x": jnp.zeros(2), "y": jnp.zeros(())})
    layout = Layout(po.Dense(), 1, flat.size, unravel, flat.dtype)

    def matrix(rate):
        return po.IOUP(1, rate).transition(jnp.asarray(0.3), layout).matrix

    def of(a):
        return jnp.asarray([[-a, 0, 1], [0, -a, 1], [2, 0, -1]])

    fn = jax.jit(lambda a: (matrix(Linear(a)), matrix(of(a))))
    np.testing.assert_allclose(*fn(1.5), rtol=1e-15)
    np.testing.assert_allclose(*jax.jit(jax.jacrev(fn))(1.5), rtol=1e-13)
    tree = {"x": jnp.asarray([-1.0, -2.0]), "y": -3.0}
    both = jax.jit(lambda: (matrix(tree), matrix(np.diag([-1.0, -2.0, -3.0]))))()
    np.testing.assert_allclose(*both, rtol=1e-15)


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_of_one_component_any_rate_is_a_number(factorisation):
    layout = layout_of(factorisation, 1, 1)
    rates = (-2.0, jnp.asarray([-2.0]), jnp.asarray([[-2.0]]), lambda u: -2.0 * u)
    priors = [*(po.IOUP(1, rate) for rate in rates), po.Matern(1, jnp.asarray([2.0]))]
    first, *others, matern = jax.jit(lambda dt: [prior.transition(dt, layout) for prior in priors])(0.3)
    for other in others:
        jax.tree.map(ft.partial(np.testing.assert_allclose, rtol=1e-15), other, first)
    assert matern.matrix.shape == first.matrix.shape


# Derivatives: matrix and root as one vector, of everything they depend on.
CASES = {
    "scalar": (
        lambda x: po.IOUP(3, x[0], output_scale=x[1]),
        po.Isotropic(),
        1,
        [[-0.4, 2.0], [0.0, 2.0], [-9.0, 0.5]],
    ),
    "matrix": (
        lambda x: po.IOUP(1, x[:4].reshape(2, 2), output_scale=x[4:]),
        po.Dense(),
        2,
        [[-9.0, 3.0, -2.0, -1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]],
    ),
    "components": (lambda x: po.IOUP(2, x[:2], output_scale=x[2:]), po.BlockDiagonal(), 2, [[-9.0, 0.0, 1.0, 2.0]]),
    "matern": (lambda x: po.Matern(3, x[0], output_scale=x[1]), po.Isotropic(), 1, [[0.7, 2.0], [0.01, 2.0]]),
    "linear": (
        lambda x: po.LinearSDE(1, (x[:2], x[2]), output_scale=x[3:7].reshape(2, 2)),
        po.Dense(),
        2,
        [[-9.0, -1.0, -30.0, 1.0, 2.0, -1.0, 1.0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.5, 2.0]],
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", first_of("linear", *sorted(CASES.keys() - {"linear"})))
def test_derivatives(case):
    make, factorisation, d, points = CASES[case]
    nu = make(jnp.ones(7)).num_derivatives
    layout = layout_of(factorisation, nu, d)

    def fn(x):
        moved = make(x[:-1]).transition(x[-1], layout)
        return jnp.concatenate([moved.matrix.ravel(), (moved.magnitude * moved.noise).ravel()])

    values, forward, reverse = jax.jit(fn), jax.jit(jax.jacfwd(fn)), jax.jit(jax.jacrev(fn))
    for point in points:
        x = np.array([*point, 0.3])
        expected = central_differences(values, x, step=1e-4)
        size = np.max(np.abs(expected), axis=1, keepdims=True) + 1e-3
        for jacobian in (forward(x), reverse(x)):
            np.testing.assert_allclose(jacobian / size, expected / size, rtol=0, atol=1e-6)


@pytest.mark.thorough
def test_a_zero_step_stays_and_has_derivatives():
    layout = layout_of(po.Isotropic(), 3)
    for make in (po.IOUP, po.Matern):

        def fn(x, make=make):
            moved = make(3, x[0], output_scale=x[1]).transition(x[2], layout)
            return moved.matrix, moved.magnitude * moved.noise

        x = jnp.asarray([0.5, 2.0, 0.0])
        matrix, noise = jax.jit(fn)(x)
        np.testing.assert_array_equal(matrix, np.eye(4))
        np.testing.assert_array_equal(noise, 0)
        for mode in (jax.jacfwd, jax.jacrev):
            of_matrix, of_noise = jax.jit(mode(fn))(x)
            drift = np.eye(4, k=1)
            drift[3] = [0, 0, 0, 0.5] if make is po.IOUP else [-math.comb(4, j) * 28 ** ((4 - j) / 2) for j in range(4)]
            np.testing.assert_allclose(of_matrix[:, :, 2], drift, rtol=1e-13)
            np.testing.assert_array_equal(of_matrix[:, :, :2], 0)
            assert np.all(np.isfinite(of_noise))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("nu", "dt", "rate"), first_of((8, 0.1, -1e3), (8, 1e-4, -1.0), (8, -1e-3, 3.0), (2, 1.0, -5.0))
)
def test_single_precision(nu, dt, rate):
    dt = float(np.float32(dt))
    for make, parameter in ((po.IOUP, rate), (po.Matern, abs(float(np.float32(1 / rate))))):
        moved = transition(make, nu, parameter, dt, dtype=jnp.float32)
        assert moved.matrix.dtype == moved.noise.dtype == moved.magnitude.dtype == jnp.float32
        exact = transition(make, nu, parameter, dt)
        unit = abs(dt) if make is po.IOUP else min(abs(dt), parameter / math.sqrt(2 * nu + 1))
        units = unit ** -np.arange(nu + 1.0)
        a, a_exact = (np.asarray(x.matrix, float) / units[:, None] * units for x in (moved, exact))
        np.testing.assert_allclose(a, a_exact, rtol=0, atol=2e-6 * max(1.0, np.max(np.abs(a_exact))))
        root, exact_root = (np.asarray(x.noise, float) * float(x.magnitude) for x in (moved, exact))
        std = np.linalg.norm(exact_root, axis=0)
        np.testing.assert_allclose(covariance(root / std), covariance(exact_root / std), rtol=0, atol=5e-6)


def test_one_compilation_for_all_rates_and_a_batch_of_them():
    layout = layout_of(po.Dense(), 2, 2)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def noise(prior, dt):
        return prior.transition(dt, layout).noise

    rates = jnp.asarray([-100.0, 0.0, -0.5, -3.0])
    alone = [noise(po.IOUP(2, rate), jnp.asarray(0.5)) for rate in rates]
    together = jax.jit(jax.vmap(lambda rate: po.IOUP(2, rate).transition(jnp.asarray(0.5), layout).noise))(rates)
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-12, atol=1e-15)


# What it is for: equations with a linear part.
RATE = np.array([[-30.0, 5.0], [-5.0, -40.0]])


def grid(prior, f, u0, times, factorisation=po.Dense()):
    parts = {"factorisation": factorisation, "calibration": po.NoCalibration()}
    return po.Solver(prior=prior, constraint=po.TS1(po.ODE(f)), **parts).solve_grid(u0, times)


@pytest.mark.thorough
def test_linear_equations_are_solved_exactly_whatever_the_step():
    u0 = jnp.asarray([1.0, 2.0])
    prior = po.IOUP(3, RATE)
    for steps, t1 in ((1, 0.1), (25, 0.1), (1, -0.02)):
        solution = grid(prior, lambda t, u, args: RATE @ u, u0, jnp.linspace(0, t1, steps + 1))
        exact = scipy.linalg.expm(RATE * t1) @ u0
        # The state is (u, Ju, ..., J^3 u): terms up to |J dt|^3 / 3! |u|, which is 30, cancel.
        np.testing.assert_allclose(solution.mean[-1], exact, rtol=0, atol=1e-13)
    # Without the rate one such step is far off.
    wrong = grid(po.IWP(3), lambda t, u, args: RATE @ u, u0, jnp.linspace(0, 0.1, 2))
    assert np.max(np.abs(wrong.mean[-1] - scipy.linalg.expm(RATE * 0.1) @ u0)) > 1e-3


@pytest.mark.thorough
def test_the_same_marginals_in_all_factorisations():
    u0, times = jnp.asarray([1.0, 2.0]), jnp.linspace(0, 1.0, 9)
    prior = po.IOUP(2, -3.0, output_scale=2.0)

    def f(t, u, args):
        return -3.0 * u + jnp.sin(t)

    dense, *others = [grid(prior, f, u0, times, factorisation) for factorisation in FACTORISATIONS]
    for other in others:
        np.testing.assert_allclose(other.mean, dense.mean, rtol=1e-12)
        np.testing.assert_allclose(other.std, dense.std, rtol=1e-10, atol=1e-16)
    rates = jnp.asarray([-1.0, -20.0])
    prior = po.IOUP(2, rates, output_scale=jnp.asarray([1.0, 2.0]))
    dense, block = (
        grid(prior, lambda t, u, args: rates * u + jnp.sin(t), u0, times, factorisation)
        for factorisation in (po.Dense(), po.BlockDiagonal())
    )
    np.testing.assert_allclose(block.mean, dense.mean, rtol=1e-12)
    np.testing.assert_allclose(block.std, dense.std, rtol=1e-10, atol=1e-16)


@pytest.mark.thorough
def test_derivatives_through_a_solve():
    times = jnp.linspace(0, 1.0, 4)

    def fn(x):
        solution = grid(po.IOUP(2, x[0]), logistic, x[1], times)
        return jnp.stack([solution.mean[-1], jnp.log(solution.std[-1])])

    x = np.array([-4.0, 0.3])
    expected = central_differences(jax.jit(fn), x, step=1e-4)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(mode(fn)(x), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "prior",
    first_of(po.IOUP(3, jnp.asarray([[-0.5, 0.1], [0.0, -50.0]])), po.Matern(3, 2.0)),
    ids=name,
)
def test_adaptive_smoothing(prior):
    def f(t, u, args):
        return jnp.stack([0.5 * u[0] * (1 - u[0]), -50.0 * (u[1] - u[0])])

    solver = po.Solver(
        prior,
        po.TS1(po.ODE(f)),
        strategy=po.FixedPointSmoother(),
        controller=po.IntegralController(rtol=1e-6, atol=1e-9),
    )
    times = np.linspace(0.2, 2.0, 4)
    solution = solver.solve(jnp.asarray([0.1, 0.1]), 0.0, 2.0, save_at=times)
    exact = 0.1 * np.exp(0.5 * times) / (0.9 + 0.1 * np.exp(0.5 * times))
    np.testing.assert_allclose(solution.mean[:, 0], exact, rtol=1e-5)
    # v' = -50 (v - u) follows u with a delay of 1 / 50.
    delayed = exact - (slope := 0.5 * exact * (1 - exact)) / 50 + 0.5 * slope * (1 - 2 * exact) / 2500
    np.testing.assert_allclose(solution.mean[:, 1], delayed, rtol=1e-5)
    assert np.all(solution.std > 0)


# Any last row.
def row_drift(row):
    """``F`` and ``e_nu e_nu^T`` for a last row of matrices, ``(n, d, d)``."""
    drift, noise = ioup_drift(len(row) - 1, row[-1])
    d = len(row[0])
    for j, block in enumerate(row):
        for a, b in np.ndindex(d, d):
            drift[drift.rows - d + a, j * d + b] = mpmath.mpf(float(block[a, b]))
    return drift, noise


def doubled(drift, noise, dt):
    """As ``exact_transition``, for steps of 1e5 time constants."""
    doublings = max(0, math.ceil(math.log2(float(mpmath.mnorm(drift)) * abs(dt))))
    a, q = exact_transition(drift, noise, dt / 2**doublings)
    for _ in range(doublings):
        a, q = a * a, a * q * a.T + q
    return a, q


# Fast and slow together, decaying and turning.
ROWS = {
    "stiff and slow": [-1.0, -1e3],
    "stiff and very slow": [-1e-3, -1e3],
    "turning": [-9.0, -1.0],
    "fast pair and slow": [-1.0, -1e6, -1e3],
    "fast and turning": [-1e3, -1.0, -1e3],
    "five of them": [-1e-3, 0.0, -1.0, -1e2, -1e3],
    "coupled": [[[-1.0, 1.0], [-1.0, -1e-2]], np.zeros((2, 2)), [[-1.0, 0.5], [0.0, -1e3]]],
}


@pytest.mark.parametrize("case", ROWS)
def test_any_row_is_the_matrix_exponential(case):
    row = np.array([np.atleast_2d(x) for x in ROWS[case]], dtype=float)
    nu, d = len(row) - 1, len(row[0])
    size = max((math.factorial(nu + 1 - i) * np.max(np.sum(abs(x), axis=1))) ** (1 / (nu + 1 - i))
               for i, x in enumerate(row))  # fmt: skip
    moves = jax.jit(lambda dt: po.LinearSDE(nu, tuple(row)).transition(dt, layout_of(po.Dense(), nu, d)))
    with mpmath.workdps(150):
        for dt in (1e-8, 1e-2, 1.0, 100.0, -1e-3):
            # In units of the step while it is short, and of the fastest time constant when it is long.
            units = step_units(nu, min(abs(dt), 1 / size), d)
            of_a, of_q, of_root = errors(moves(dt), *doubled(*row_drift(row), dt), units)
            assert of_a < 1e-13 and of_q < 1e-13 and of_root < 1e-12, (dt, of_a, of_q, of_root)


def test_a_fast_oscillator():
    # 1e5 radians: round-off of the frequency alone is 1e-11.
    frequency, dt = 1e3, 100.0
    moved = jax.jit(
        lambda: po.LinearSDE(1, (-(frequency**2), 0.0)).transition(jnp.asarray(dt), layout_of(po.Isotropic(), 1))
    )()
    cos, sin = (float(f(mpmath.mpf(frequency) * dt)) for f in (mpmath.cos, mpmath.sin))
    units = frequency ** np.arange(2.0)
    np.testing.assert_allclose(moved.matrix * units / units[:, None], [[cos, sin], [-sin, cos]], rtol=0, atol=1e-10)


@pytest.mark.thorough
def test_it_contains_the_others():
    nu, rates, scales = 2, jnp.asarray([-1.0, -30.0]), jnp.asarray([1.0, 2.0])
    decay = math.sqrt(2 * nu + 1) / jnp.asarray([0.7, 3.0])
    binomial = tuple(-math.comb(nu + 1, j) * decay ** (nu + 1 - j) for j in range(nu + 1))
    matrix = jnp.asarray(RATE)
    pairs = [
        (po.LinearSDE(nu, (0, 0, 0.0)), po.IWP(nu), FACTORISATIONS),
        (po.LinearSDE(nu, [0, 0, -2.0]), po.IOUP(nu, -2.0), FACTORISATIONS),
        (po.LinearSDE(nu, (0, jnp.zeros(2), rates)), po.IOUP(nu, rates), (po.Dense(), po.BlockDiagonal())),
        (po.LinearSDE(nu, binomial, output_scale=scales), po.Matern(nu, jnp.asarray([0.7, 3.0]), output_scale=scales),
         (po.Dense(), po.BlockDiagonal())),
        (po.LinearSDE(nu, (0, jnp.zeros(2), matrix)), po.IOUP(nu, matrix), (po.Dense(),)),
        (po.LinearSDE(nu, lambda u, du, ddu: matrix @ ddu), po.IOUP(nu, matrix), (po.Dense(),)),
    ]  # fmt: skip

    @jax.jit
    def both(dt):
        layouts = [layout_of(f, nu, 2) for _, _, factorisations in pairs for f in factorisations]
        priors = [(a, b) for a, b, factorisations in pairs for _ in factorisations]
        return [[x.transition(dt, layout) for x in pair] for pair, layout in zip(priors, layouts, strict=True)]

    for moved, expected in both(0.4):
        np.testing.assert_array_equal(np.tril(moved.noise, -1), 0)
        units = np.repeat(0.4 ** (nu - np.arange(nu + 1.0)), moved.matrix.shape[-1] // (nu + 1))
        np.testing.assert_allclose(moved.matrix * units / units[:, None], expected.matrix * units / units[:, None],
                                   rtol=0, atol=1e-13)  # fmt: skip
        roots = [np.asarray(covariance(x.noise * x.magnitude)) for x in (moved, expected)]
        std = np.sqrt(np.diagonal(roots[1], axis1=-2, axis2=-1))
        scale = std[..., :, None] * std[..., None, :]
        np.testing.assert_allclose(roots[0] / scale, roots[1] / scale, rtol=0, atol=1e-13)


def test_parts_of_different_kinds():
    flat, unravel = ravel_pytree({"x": jnp.zeros(2), "y": jnp.zeros(())})
    layout = Layout(po.Dense(), 2, flat.size, unravel, flat.dtype)
    tree = {"x": jnp.asarray([-1.0, -2.0]), "y": -3.0}
    linear = Linear(jnp.asarray(1.5))
    matrix = np.array([[-1.5, 0, 1], [0, -1.5, 1], [2, 0, -1]])

    def drift(u, du, ddu):
        return jax.tree.map(lambda x, a, v, f: -0.5 * x + a * v + f, u, tree, du, linear(ddu))

    @jax.jit
    def moves():
        priors = po.LinearSDE(2, drift), po.LinearSDE(2, (-0.5, tree, matrix))
        return [prior.transition(jnp.asarray(0.3), layout).matrix for prior in priors]

    np.testing.assert_allclose(*moves(), rtol=1e-14)


@pytest.mark.parametrize(
    ("factorisation", "nu"),
    [
        *first_of((po.Dense(), 3), (po.Dense(), 2), (po.BlockDiagonal(), 2), (po.Isotropic(), 2)),
    ],
    ids=name,
)
def test_oscillators_are_solved_exactly_whatever_the_step(factorisation, nu):
    # u'' = -w^2 u - 2 g u' and its derivatives: u^(nu+1) = -w^2 u^(nu-1) - 2 g u^(nu).
    frequency, damping = 3.0, 0.4
    drift = (*[0.0] * (nu - 1), -(frequency**2), -2 * damping)
    ode = po.ODE(lambda t, u, du, args: -(frequency**2) * u - 2 * damping * du, order=2)
    solver = po.Solver(po.LinearSDE(nu, drift), po.TS1(ode), factorisation=factorisation)
    u0, v0, omega = np.array([1.0, -2.0]), np.array([0.5, 0.0]), math.sqrt(frequency**2 - damping**2)
    for times in ([0.0, 5.0], np.linspace(0, 5, 12)):
        t = np.asarray(times)[:, None]
        exact = np.exp(-damping * t) * (u0 * np.cos(omega * t) + (v0 + damping * u0) / omega * np.sin(omega * t))
        solution = solver.solve_grid((jnp.asarray(u0), jnp.asarray(v0)), times)
        np.testing.assert_allclose(solution.mean, exact, rtol=0, atol=1e-12)


# The process itself: samples and marginals.
def joint_covariance(prior, layout, times, initial):
    """Of ``u`` at all times, ``(time d, time d)``, written down with full matrices."""
    d, dim = layout.size, (layout.num_derivatives + 1) * layout.size
    moves = jax.jit(lambda dt: prior.transition(dt, layout))
    transitions = [components(moves(jnp.asarray(dt)), layout) for dt in np.diff(times)]
    _, out = oracles.joint_gaussian(np.zeros(dim), initial, transitions)
    of_u = [i * dim + c for i in range(len(times)) for c in range(d)]
    return out[np.ix_(of_u, of_u)]


SAMPLED = {
    "components": (po.IOUP(1, jnp.asarray([-1.0, -8.0]), output_scale=jnp.asarray([1.0, 2.0])), po.BlockDiagonal()),
    "isotropic": (po.Matern(2, 0.6), po.Isotropic()),
    "matrix": (po.IOUP(1, jnp.asarray([[-1.0, 2.0], [-2.0, -1.0]])), po.Dense()),
}


@pytest.mark.parametrize("case", first_of(*SAMPLED))
def test_samples_have_the_joint_covariance(case):
    prior, factorisation = SAMPLED[case]
    nu, d, number, times = prior.num_derivatives, 2, 20_000, np.array([0.0, 0.3, 0.4, 1.5])
    layout, dim = layout_of(factorisation, nu, d), (nu + 1) * d
    initial, p = None, np.zeros((dim, dim))
    if isinstance(prior, po.Matern):
        initial, p = prior.stationary, np.kron(covariance(prior.stationary(layout).factor), np.eye(d))
    samples = po.sample_prior(
        prior, jax.random.key(1), times, jnp.zeros(d), factorisation=factorisation, initial=initial, shape=(100, 200)
    )
    assert samples.shape == (100, 200, len(times), d)
    x = np.reshape(samples, (number, -1))
    expected = joint_covariance(prior, layout, times, p)
    var = np.diagonal(expected)
    error = np.sqrt((np.outer(var, var) + expected**2) / number)
    assert np.all(np.abs(x.T @ x / number - expected) <= 4 * error)
    assert np.all(np.abs(np.mean(x, axis=0)) <= 4 * np.sqrt(var / number))
    assert np.max(np.abs(expected)) > 0


@pytest.mark.parametrize("case", first_of(*SAMPLED))
def test_marginals_are_those_of_the_joint_covariance(case):
    prior, factorisation = SAMPLED[case]
    nu, d, times = prior.num_derivatives, 2, np.array([0.0, 0.3, 0.3, 0.4, 1.5])
    layout, dim = layout_of(factorisation, nu, d), (nu + 1) * d
    initial, p = None, np.zeros((dim, dim))
    if isinstance(prior, po.Matern):
        initial, p = prior.stationary, np.kron(covariance(prior.stationary(layout).factor), np.eye(d))
    marginals = po.prior_marginals(prior, times, jnp.zeros(d), factorisation=factorisation, initial=initial)
    std = np.sqrt(np.diagonal(joint_covariance(prior, layout, times, p))).reshape(-1, d)
    np.testing.assert_array_equal(marginals.mean, np.zeros((5, d)))
    np.testing.assert_allclose(marginals.std, std, rtol=1e-12, atol=1e-18)
    np.testing.assert_array_equal(marginals.t, times)
    # and of what is sampled
    samples = po.sample_prior(
        prior, jax.random.key(2), times, jnp.zeros(d), factorisation=factorisation, initial=initial, shape=(20_000,)
    )
    np.testing.assert_allclose(np.std(samples, axis=0), std, rtol=4 / math.sqrt(40_000), atol=1e-18)


@pytest.mark.thorough
def test_what_is_stationary_stays():
    for nu, factorisation in ((1, po.BlockDiagonal()), (4, po.Dense())):
        prior = po.Matern(nu, {"a": jnp.asarray([0.1, 2.0]), "b": 30.0})
        like = {"a": np.zeros(2), "b": 0.0}
        times = [3.0, 3.1, 3.1, 5.0, 90.0]
        marginals = po.prior_marginals(prior, times, like, factorisation=factorisation, initial=prior.stationary)
        for k in range(nu + 1):
            for std in jax.tree.leaves(marginals.derivative(k).std):
                np.testing.assert_allclose(std, np.broadcast_to(std[:1], std.shape), rtol=1e-12)


def test_samples_of_trees_repeated_times_and_single_precision():
    like = {"a": np.zeros((2, 1), np.float32), "b": np.zeros((), np.float32)}
    times = [1.0, 0.5, 0.5, 0.0]
    samples = po.sample_prior(po.IWP(2), jax.random.key(0), times, like, factorisation=po.Isotropic(), shape=(3,))
    assert samples["a"].shape == (3, 4, 2, 1) and samples["b"].shape == (3, 4)
    assert samples["b"].dtype == jnp.float32
    np.testing.assert_array_equal(samples["a"][:, 0], 0)
    np.testing.assert_array_equal(samples["a"][:, 1], samples["a"][:, 2])
    assert np.all(np.isfinite(samples["a"])) and np.all(samples["a"][:, 3] != samples["a"][:, 2])
    at_start = po.sample_prior(po.IWP(1), jax.random.key(0), [0.3], 1.0)
    assert at_start.shape == (1,) and at_start[0] == 0


DT = jnp.asarray(0.1)
KEY = jax.random.key(0)


def move(prior, factorisation=po.Dense(), d=2):
    return prior.transition(DT, layout_of(factorisation, prior.num_derivatives, d))


WRONG = [
    (lambda: po.IOUP(0, -1.0), ValueError, "IOUP.num_derivatives"),
    (lambda: po.Matern(1.5, 1.0), ValueError, "Matern.num_derivatives"),
    (lambda: po.IOUP(2, "fast"), TypeError, "IOUP.rate"),
    (lambda: po.IOUP(2, None), ValueError, "IOUP.rate.*got nothing"),
    (lambda: po.IOUP(2, np.nan), ValueError, "IOUP.rate. must be finite"),
    (lambda: po.IOUP(2, -1.0, output_scale=-1.0), ValueError, "IOUP.output_scale. must be finite and positive"),
    (lambda: po.Matern(2, 0.0), ValueError, "Matern.length_scale. must be finite and positive.*length_scale=0"),
    (lambda: po.Matern(2, 1.0, output_scale=()), ValueError, "Matern.output_scale.*got nothing"),
    (lambda: move(po.IOUP(2, jnp.ones(3))), ValueError, r"IOUP.rate. must be .*\(2, 2\) matrix: got \(3,\)"),
    (lambda: move(po.IOUP(2, {"a": 1.0, "b": 1.0})), ValueError, "IOUP.rate. must be .*structure and shapes of u"),
    (lambda: move(po.IOUP(2, lambda u: u[0])), ValueError, "IOUP.rate. must map a PyTree like u to one like u"),
    (
        lambda: move(po.IOUP(2, jnp.eye(2)), po.BlockDiagonal()),
        ValueError,
        r"IOUP.*matrix.*BlockDiagonal\(\).*Dense\(\)",
    ),
    (lambda: move(po.IOUP(2, jnp.eye(2)), po.Isotropic()), ValueError, r"IOUP.*matrix.*Isotropic\(\).*pass a number\."),
    (lambda: move(po.IOUP(2, lambda u: -u), po.Isotropic()), ValueError, r"IOUP.*function.*Isotropic\(\).*Dense\(\)"),
    (
        lambda: move(po.IOUP(2, jnp.ones(2)), po.Isotropic()),
        ValueError,
        r"IOUP.rate.*each component.*BlockDiagonal\(\)",
    ),
    (
        lambda: move(po.Matern(2, jnp.ones(2)), po.Isotropic()),
        ValueError,
        "Matern.length_scale.*each component.*scalar",
    ),
    (lambda: move(po.Matern(2, jnp.ones((2, 2)))), ValueError, "Matern.length_scale. must be a number"),
    (lambda: move(po.IOUP(2, jnp.eye(2), output_scale=jnp.ones(3))), ValueError, "output_scale must be a scalar"),
    (lambda: po.LinearSDE(0, (0.0,)), ValueError, "LinearSDE.num_derivatives"),
    (lambda: po.LinearSDE(1, (0, 1, 2)), ValueError, r"LinearSDE.drift. must be .*tuple of 2 parts.*got 3 of them"),
    (lambda: po.LinearSDE(1, -1.0), ValueError, r"LinearSDE.drift. must be .*tuple of 2 parts.*got -1\.0"),
    (lambda: po.LinearSDE(1, (0, np.inf)), ValueError, r"LinearSDE.drift\[1\]. must be finite"),
    (lambda: po.LinearSDE(1, (0, None)), ValueError, r"LinearSDE.drift\[1\]. must be numbers.*got nothing"),
    (lambda: move(po.LinearSDE(1, (jnp.ones(3), 0))), ValueError, r"LinearSDE.drift\[0\].*matrix: got \(3,\)"),
    (
        lambda: move(po.LinearSDE(1, lambda u, du: u[0])),
        ValueError,
        "LinearSDE.drift. must map 2 PyTrees like u to one like u",
    ),
    (
        lambda: move(po.LinearSDE(1, (0, jnp.eye(2))), po.BlockDiagonal()),
        ValueError,
        r"LinearSDE.drift\[1\].*couples.*BlockDiagonal\(\).*or one number for each component",
    ),
    (
        lambda: move(po.LinearSDE(1, lambda u, du: -u), po.Isotropic()),
        ValueError,
        r"LinearSDE.drift..*function.*Isotropic\(\).*pass a number\.",
    ),
    (
        lambda: move(po.LinearSDE(1, (jnp.ones(2), 0)), po.Isotropic()),
        ValueError,
        r"LinearSDE.drift\[0\].*each component.*BlockDiagonal\(\)",
    ),
    (lambda: po.prior_marginals(po.IWP, [0.0], 1.0), TypeError, r"prior_marginals.prior. must be a prior"),
    (lambda: po.prior_marginals(po.IWP(1), [0.0, np.nan], 1.0), ValueError, r"prior_marginals.ts. must be finite"),
    (
        lambda: po.prior_marginals(po.IWP(1), [0.0], 1.0).derivative(2),
        ValueError,
        r"derivative.k.*<= 1",
    ),
    (lambda: po.sample_prior(None, KEY, [0.0], 1.0), TypeError, "must be a prior"),
    (lambda: po.sample_prior(po.IWP(1), KEY, [0.0, 1.0, 0.5], 1.0), ValueError, "increasing or in decreasing"),
    (lambda: po.sample_prior(po.IWP(1), KEY, 0.0, 1.0), ValueError, "array of times"),
    (lambda: po.sample_prior(po.IWP(1), KEY, [0.0], 1), TypeError, "floating point"),
    (lambda: po.sample_prior(po.IWP(1), KEY, [0.0], (1.0, 1)), TypeError, "floating point"),
    (lambda: po.sample_prior(po.IWP(1), KEY, [0.0], 1j), TypeError, "must be real"),
    (lambda: po.sample_prior(po.IWP(1), KEY, [0.0], ()), ValueError, "has no numbers"),
    (
        lambda: po.sample_prior(
            po.Matern(1, 1.0), KEY, [0.0], 1.0, initial=po.Matern(2, 1.0).stationary(layout_of(po.Dense(), 2))
        ),
        ValueError,
        r"layout of Dense\(\).*\(2, 1\).*got \(3, 1\)",
    ),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_use(case):
    use, kind, message = WRONG[case]
    with pytest.raises(kind, match=f"(?s){message}"):
        use()


def test_a_traced_rate_is_checked_when_it_runs():
    with pytest.raises((RuntimeError, ValueError), match="finite"):
        jax.block_until_ready(eqx.filter_jit(lambda rate: po.IOUP(2, rate).rate)(jnp.asarray(jnp.inf)))
