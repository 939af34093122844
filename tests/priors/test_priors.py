"""The integrated Wiener process against its closed formulas in fractions and 60 digits, and its semigroup laws."""

import functools as ft
import math
from fractions import Fraction

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import probode as po
from probode.algebra.factorisations import Layout

from .. import oracles
from ..helpers import FACTORISATIONS, name


ORDERS = (1, 2, 3, 5, 8, 11)


def layout_of(factorisation, nu, d=1, dtype=jnp.float64):
    return Layout(factorisation, nu, d, lambda u: u, jnp.dtype(dtype))


@ft.cache
def compiled(nu):
    layout = layout_of(po.Isotropic(), nu)
    prior = po.IWP(nu)

    @jax.jit
    def transition(dt):
        moved = prior.transition(dt, layout)
        return moved.matrix, root_of(moved)

    return transition


def root_of(transition):
    """The square root of ``Q`` in one piece."""
    return transition.magnitude * transition.noise


def transition(nu, dt):
    """``A`` and the square root of ``Q``, as NumPy arrays."""
    return tuple(np.asarray(x) for x in compiled(nu)(jnp.asarray(float(dt))))


def exact_transition(nu, dt):
    """Tables of fractions."""
    return oracles.iwp(nu, Fraction(dt))


def units(nu, dt):
    """``T``: standard deviations are of this size."""
    return np.array([math.sqrt(abs(dt)) * abs(dt) ** (nu - i) / math.factorial(nu - i) for i in range(nu + 1)])


@ft.cache
def exact_root(nu):
    """Upper Cholesky factor of ``Q`` for a step of one, in 60 digits."""
    with mpmath.workdps(60):
        _, q = exact_transition(nu, 1)
        lower = mpmath.cholesky(mpmath.matrix([[mpmath.mpf(x.numerator) / x.denominator for x in row] for row in q]))
        return np.array([[float(lower[j, i]) for j in range(nu + 1)] for i in range(nu + 1)])


@pytest.mark.parametrize("nu", range(1, 12))
def test_transition_is_the_closed_formula(nu):
    for dt in (1.0, 0.1, -0.3, 7.0, 1e-3, -1e-6):
        a, root = transition(nu, dt)
        exact_a, exact_q = exact_transition(nu, dt)
        np.testing.assert_allclose(a, np.array(exact_a, dtype=float), rtol=1e-14)
        q = root.T @ root
        exact_q = np.array(exact_q, dtype=float)
        std = np.sqrt(np.diagonal(exact_q))
        np.testing.assert_allclose(q / np.outer(std, std), exact_q / np.outer(std, std), rtol=1e-14)


@pytest.mark.parametrize("nu", range(1, 12))
def test_square_root_of_the_noise_has_all_digits(nu):
    # Qbar is a Hilbert matrix, condition number 1e16 at nu = 11: its Cholesky factor in double precision is not enough.
    _, root = transition(nu, 1.0)
    np.testing.assert_array_equal(np.tril(root, -1), 0)
    np.testing.assert_allclose(root, exact_root(nu), rtol=2e-15)


def test_such_digits_cannot_be_had_in_floating_point():
    # The test above can fail: the obvious implementation does.
    nu = 8
    q = np.array(exact_transition(nu, 1)[1], dtype=float)
    upper = np.triu_indices(nu + 1)
    naive = np.linalg.cholesky(q).T
    assert np.max(np.abs(naive[upper] / exact_root(nu)[upper] - 1)) > 1e-9


def test_matrices_are_the_solution_of_the_stochastic_differential_equation():
    # dX = F X dt + e_nu dW: A = expm(F dt), Q = int_0^dt expm(F s) e e^T expm(F s)^T ds, here by Gauss quadrature.
    nu, dt = 3, 0.7
    shift = np.diag(np.ones(nu), 1)

    def expm(s):
        return sum(np.linalg.matrix_power(shift * s, k) / math.factorial(k) for k in range(nu + 1))

    nodes, weights = np.polynomial.legendre.leggauss(8)
    columns = [expm(dt * (x + 1) / 2)[:, -1] for x in nodes]
    q = sum(dt / 2 * w * np.outer(c, c) for w, c in zip(weights, columns, strict=True))
    a, root = transition(nu, dt)
    np.testing.assert_allclose(a, expm(dt), rtol=1e-15)
    np.testing.assert_allclose(root.T @ root, q, rtol=1e-14)


# Dyadic steps: their sums are exact.
steps = st.builds(lambda k, e: math.ldexp(k, e), st.integers(1, 2**16), st.integers(-30, 4))


@hypothesis.given(st.sampled_from(ORDERS), steps, steps, st.sampled_from([1, -1]))
def test_two_steps_are_one(nu, s, t, sign):
    s, t = sign * s, sign * t
    hypothesis.assume(Fraction(s) + Fraction(t) == Fraction(s + t))
    (a_s, root_s), (a_t, root_t), (a, root) = (transition(nu, dt) for dt in (s, t, s + t))
    unit = units(nu, s + t)
    q_s, q_t, q = (r.T @ r for r in (root_s, root_t, root))
    np.testing.assert_allclose(a_t @ a_s, a, rtol=3e-14)
    np.testing.assert_allclose((a_t @ q_s @ a_t.T + q_t) / np.outer(unit, unit), q / np.outer(unit, unit), rtol=1e-13)


@hypothesis.given(st.sampled_from(ORDERS), steps)
def test_backwards_is_the_inverse_and_the_same_noise_up_to_signs(nu, dt):
    (a, root), (a_back, root_back) = transition(nu, dt), transition(nu, -dt)
    # sum_k binomial(j-i, k) (-1)^k = 0: terms of size 2^(j-i) cancel.
    unit = units(nu, dt)
    scaled = (a_back @ a) * unit[None, :] / unit[:, None]
    np.testing.assert_allclose(scaled, np.eye(nu + 1), rtol=0, atol=1e-15 * 4**nu)
    sign = (-1.0) ** np.add.outer(np.arange(nu + 1), np.arange(nu + 1))
    np.testing.assert_array_equal(root_back.T @ root_back, sign * (root.T @ root))


def test_time_reversal_of_the_process():
    # A step backwards in time is a step forwards of v(t) = u(-t), whose odd derivatives change sign.
    nu, dt = 4, 0.3
    (a, _), (a_back, root_back) = transition(nu, dt), transition(nu, -dt)
    flip = np.diag((-1.0) ** np.arange(nu + 1))
    np.testing.assert_allclose(a_back, flip @ a @ flip, rtol=1e-15)
    _, exact_q = exact_transition(nu, dt)
    np.testing.assert_allclose(root_back.T @ root_back, flip @ np.array(exact_q, dtype=float) @ flip, rtol=1e-13)


@pytest.mark.parametrize(("nu", "dt"), [(3, 1e-40), (3, -1e-40), (3, 1e40), (5, 1e-25), (11, 1e-20), (11, 1e20)])
def test_tiny_and_huge_steps_lose_nothing(nu, dt):
    a, root = transition(nu, dt)
    exact_a, _ = exact_transition(nu, dt)
    np.testing.assert_allclose(a, np.array(exact_a, dtype=float), rtol=1e-14)
    # In units of its own columns, the root is that of a step of one.
    powers = np.array(
        [math.copysign(1, dt) ** (nu - j) * abs(dt) ** (nu - j) * math.sqrt(abs(dt)) for j in range(nu + 1)]
    )
    np.testing.assert_allclose(root, exact_root(nu) * powers, rtol=1e-14)


@pytest.mark.parametrize(
    ("nu", "dt"), [(2, 1.0), (2, -1e-3), (2, 1e-8), (5, 1e-2), (5, 1e-4), (5, -1e-5), (8, 1.0), (8, 1e-2), (8, 1e3)]
)
def test_single_precision(nu, dt):
    moved = po.IWP(nu).transition(jnp.asarray(dt, jnp.float32), layout_of(po.Isotropic(), nu, 1, jnp.float32))
    a, root = moved.matrix, root_of(moved)
    assert a.dtype == moved.noise.dtype == moved.magnitude.dtype == jnp.float32
    exact_a, exact_q = exact_transition(nu, float(np.float32(dt)))
    np.testing.assert_allclose(a, np.array(exact_a, dtype=float), rtol=2e-6)
    root, std = np.asarray(root, float), np.sqrt(np.array([exact_q[i][i] for i in range(nu + 1)], dtype=float))
    q = (root / std).T @ (root / std)
    np.testing.assert_allclose(q, np.array(exact_q, dtype=float) / np.outer(std, std), rtol=5e-6)


@pytest.mark.parametrize("nu", [1, 4, 11])
def test_derivative_with_respect_to_the_step(nu):
    i, j = np.indices((nu + 1, nu + 1))
    for dt in (0.3, -0.3):
        da, droot = jax.jacfwd(compiled(nu))(jnp.asarray(dt))
        a, root = transition(nu, dt)
        np.testing.assert_allclose(da, np.where(j >= i, (j - i) * a / dt, 0), rtol=1e-13)
        np.testing.assert_allclose(droot, (nu - j + 0.5) * root / dt, rtol=1e-13)


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_layouts_and_output_scales(factorisation):
    nu, d, dt = 2, 3, jnp.asarray(0.4)
    layout = layout_of(factorisation, nu, d)
    _, q = exact_transition(nu, 0.4)
    q = np.array(q, dtype=float)
    scales = [2.0, jnp.asarray(3.0)]
    if not isinstance(factorisation, po.Isotropic):
        scales.append(jnp.asarray([1.0, 2.0, 3.0]))
    for scale in scales:
        moved = po.IWP(nu, output_scale=scale).transition(dt, layout)
        factor = np.asarray(root_of(moved))
        covariance = np.swapaxes(factor, -1, -2) @ factor
        per_component = np.broadcast_to(np.asarray(scale), (d,))
        if isinstance(factorisation, po.Dense):
            expected = np.kron(q, np.diag(per_component**2))
        elif isinstance(factorisation, po.BlockDiagonal):
            expected = per_component[:, None, None] ** 2 * q
        else:
            expected = per_component[0] ** 2 * q
        np.testing.assert_allclose(covariance, expected, rtol=1e-13, atol=1e-18)
        assert np.all(np.tril(factor, -1) == 0)
        assert moved.matrix.shape == (*layout.batch_shape, nu + 1, nu + 1)
        np.testing.assert_array_equal(moved.matrix, layout.broadcast(jnp.asarray(transition(nu, 0.4)[0])))


def test_output_scale_may_be_a_tree_and_isotropic_refuses_one_per_component():
    state = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    flat, unravel = jax.flatten_util.ravel_pytree(state)
    scale = {"a": [1.0, 2.0], "b": 3}
    prior = po.IWP(1, output_scale={"a": np.asarray(scale["a"]), "b": scale["b"]})
    layout = Layout(po.BlockDiagonal(), 1, flat.size, unravel, flat.dtype)
    factor = root_of(prior.transition(jnp.asarray(1.0), layout))
    np.testing.assert_allclose(factor, np.asarray([1.0, 2.0, 3.0])[:, None, None] * exact_root(1), rtol=1e-15)
    with pytest.raises(ValueError, match="one output scale for all components"):
        prior.transition(jnp.asarray(1.0), Layout(po.Isotropic(), 1, flat.size, unravel, flat.dtype))


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_marginals_of_the_process(factorisation):
    nu, times, scale = 3, np.array([1.0, 1.25, 1.25, 0.5 + 1, 9.0]), 2.0
    # from zero, and from a state that is known
    start = np.array([[1.0, -1.0], [2.0, 0.0], [0.0, 3.0], [6.0, 1.0]])
    prior, like = po.IWP(nu, output_scale=scale), np.zeros(2)
    mean = layout_of(factorisation, nu, 2).pack(jnp.asarray(start))
    initial = po.Normal(mean, jnp.zeros((*mean.shape[:-2], 0, mean.shape[-2])))
    for state, from_zero in ((None, 0), (initial, 1)):
        marginals = po.prior_marginals(prior, times, like, factorisation=factorisation, initial=state)
        for k in range(nu + 1):
            t, power = times - times[0], 2 * (nu - k) + 1
            std = scale * np.sqrt(t**power / power) / math.factorial(nu - k)
            polynomial = sum(t[:, None] ** (i - k) / math.factorial(i - k) * start[i] for i in range(k, nu + 1))
            u = marginals.derivative(k)
            np.testing.assert_allclose(u.std, np.stack([std, std], axis=-1), rtol=1e-12)
            np.testing.assert_allclose(u.mean, from_zero * polynomial, rtol=1e-13, atol=1e-13)


def test_derivative_with_respect_to_the_output_scale():
    layout = layout_of(po.BlockDiagonal(), 2, 2)

    def variance(scale):
        factor = root_of(po.IWP(2, output_scale=scale).transition(jnp.asarray(0.5), layout))
        return jnp.sum(factor**2, axis=1)

    jacobian = jax.jacrev(variance)(jnp.asarray([2.0, 3.0]))
    q = np.diagonal(np.array(exact_transition(2, 0.5)[1], dtype=float))
    expected = np.zeros((2, 3, 2))
    expected[0, :, 0], expected[1, :, 1] = 4 * q, 6 * q
    np.testing.assert_allclose(jacobian, expected, rtol=1e-13)


def test_priors_that_differ_in_values_share_one_compilation():
    layout = layout_of(po.Isotropic(), 2)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def factor(prior, dt):
        return root_of(prior.transition(dt, layout))

    one, two = (factor(po.IWP(2, output_scale=s), jnp.asarray(0.1)) for s in (1.0, 2.0))
    np.testing.assert_array_equal(two, 2 * one)


@pytest.mark.parametrize("nu", [0, -1, True, 1.5, "2", None])
def test_orders_that_are_none(nu):
    with pytest.raises((ValueError, TypeError), match="num_derivatives"):
        po.IWP(nu)


@pytest.mark.parametrize("scale", ["one", 1j, None, object()])
def test_output_scales_that_are_none(scale):
    with pytest.raises((ValueError, TypeError), match="output_scale"):
        po.IWP(2, output_scale=scale)
