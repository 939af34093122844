"""Triangularisation against Gram matrices and Cholesky factors, its derivative against closed formulas."""

import functools as ft

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probode.algebra.linalg import (
    kron_apply,
    kron_apply_right,
    product,
    safe_divide,
    safe_sqrt,
    solve,
    substitute,
    triangularise,
)

from ..helpers import first_of


# (columns, dense rows): written out, scanned one by one (odd), in pairs (even), LAPACK.
UNROLLED = [(1, 3), (2, 2), (3, 2), (4, 2), (5, 1), (6, 6), (7, 0), (8, 5)]
SCANNED = [(9, 3), (13, 6), (10, 3), (12, 5)]
LAPACK = [(91, 30), (100, 40)]
SHAPES = UNROLLED + SCANNED + LAPACK
ONE_OF_EACH = [(3, 2), (9, 3), (12, 5), (91, 30)]

compiled = jax.jit(triangularise)


def random_stack(rng, shape):
    """A well-conditioned upper triangle over dense rows."""
    dim, rows = shape
    upper = np.triu(rng.uniform(-1, 1, (dim, dim)), 1) / np.sqrt(dim) + np.diag(rng.uniform(0.5, 2, dim))
    return upper, rng.standard_normal((rows, dim))


def gram(upper, dense):
    return upper.T @ upper + dense.T @ dense


def columnwise(r, upper, dense):
    """Deviation of the Gram matrix, each entry relative to the lengths of its two columns."""
    stack = np.concatenate([upper, dense])
    # Brought to length one first: the squares of what is compared may underflow.
    top = np.max(np.abs(stack), axis=0)
    top = np.where(top > 0, top, 1)
    stack, r = stack / top, np.asarray(r, float) / top
    length = np.linalg.norm(stack, axis=0)
    length = np.where(length > 0, length, 1)
    return np.max(np.abs(r.T @ r - stack.T @ stack) / np.outer(length, length))


def on_device(*xs):
    return tuple(jnp.asarray(x) for x in xs)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_cholesky_factor_of_the_gram_matrix(shape):
    upper, dense = random_stack(np.random.default_rng(1), shape)
    r = np.asarray(compiled(*on_device(upper, dense)))
    assert r.shape == upper.shape
    assert np.all(np.tril(r, -1) == 0)
    # A triangle is unique up to the signs of its rows; the elimination leaves all of them positive.
    sign = np.sign(np.diagonal(r))
    assert np.all(sign == 1) or shape in LAPACK
    np.testing.assert_allclose(sign[:, None] * r, np.linalg.cholesky(gram(upper, dense)).T, rtol=0, atol=1e-12)


@st.composite
def stacks(draw, shape, exponents):
    """Columns of any lengths in ``10^exponents``, diagonals of any sign, dense rows that may vanish."""
    dim, rows = shape
    numbers = st.floats(-1, 1, allow_subnormal=False)
    upper = np.triu(draw(hnp.arrays(np.float64, (dim, dim), elements=numbers)), 1)
    diagonal = draw(hnp.arrays(np.float64, (dim,), elements=st.floats(-8, 3)))
    sign = draw(hnp.arrays(np.float64, (dim,), elements=st.sampled_from([-1.0, 1.0])))
    dense = draw(hnp.arrays(np.float64, (rows, dim), elements=numbers))
    length = 10.0 ** draw(hnp.arrays(np.float64, (dim,), elements=st.floats(*exponents)))
    return (upper + np.diag(sign * np.exp(diagonal))) * length, dense * length


@hypothesis.given(st.data())
@pytest.mark.parametrize("shape", [(3, 2), (8, 5), (9, 3), (12, 5)])
def test_gram_matrix_to_round_off_in_every_column(shape, data):
    upper, dense = data.draw(stacks(shape, (-30, 0)))
    r = np.asarray(compiled(*on_device(upper, dense)))
    assert np.all(np.tril(r, -1) == 0)
    assert columnwise(r, upper, dense) < 2e-15 * sum(shape)


@pytest.mark.parametrize("exponent", [-30, -100, -150])
@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_graded_columns_keep_their_digits(shape, exponent):
    # Process noise of a short step: dt^(nu + 1/2) in the first column. Squares reach down to 1e-300.
    upper, dense = random_stack(np.random.default_rng(2), shape)
    length = 10.0 ** np.linspace(exponent, 0, shape[0])
    assert columnwise(compiled(*on_device(upper * length, dense * length)), upper * length, dense * length) < 1e-13


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_signs_of_the_rows_of_upper_do_not_matter(shape):
    upper, dense = random_stack(np.random.default_rng(3), shape)
    sign = np.where(np.arange(shape[0]) % 2 == 0, 1.0, -1.0)
    r = compiled(*on_device(upper, dense))
    flipped = compiled(*on_device(sign[:, None] * upper, dense))
    # LAPACK may flip rows of the result; the elimination sees identical numbers.
    np.testing.assert_allclose(np.abs(flipped), np.abs(r), rtol=0, atol=1e-12 if shape in LAPACK else 0)


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_zero_columns_rows_and_blocks(shape):
    dim, _ = shape
    upper, dense = random_stack(np.random.default_rng(4), shape)
    middle = dim // 2

    zero_dense = np.asarray(compiled(*on_device(upper, 0 * dense)))
    np.testing.assert_allclose(np.abs(zero_dense), np.abs(upper), rtol=1e-13, atol=1e-15)

    zero_upper = compiled(*on_device(0 * upper, dense))
    assert columnwise(zero_upper, 0 * upper, dense) < 1e-13

    everything = np.asarray(compiled(*on_device(0 * upper, 0 * dense)))
    np.testing.assert_array_equal(everything, 0)

    for column in (0, middle, dim - 1):
        mask = np.arange(dim) != column
        u, b = upper * mask * mask[:, None], dense * mask
        r = np.asarray(compiled(*on_device(u, b)))
        assert np.all(r[:, column] == 0)
        assert columnwise(r, u, b) < 1e-13

    # A row of the triangle without entries, as `condition` builds it above the derivatives that only the state has.
    u = upper * (np.arange(dim) != middle)[:, None]
    assert columnwise(compiled(*on_device(u, dense)), u, dense) < 1e-13


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_a_row_whose_pivot_underflowed_is_not_lost(shape):
    # Process noise of a very short step: dt^(nu + 1/2) is zero, the rest of the row is not.
    upper, dense = random_stack(np.random.default_rng(5), shape)
    mask = np.arange(shape[0]) != 0
    u, b = upper * mask, dense * mask
    assert np.any(u[0] != 0)
    assert columnwise(compiled(*on_device(u, b)), u, b) < 1e-13


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_single_precision_keeps_tiny_columns(shape):
    upper, dense = random_stack(np.random.default_rng(6), shape)
    length = 10.0 ** np.linspace(-25, 0, shape[0])
    upper, dense = (np.asarray(x * length, np.float32) for x in (upper, dense))
    r = compiled(*on_device(upper, dense))
    assert r.dtype == jnp.float32
    assert columnwise(r, np.asarray(upper, float), np.asarray(dense, float)) < 1e-5


# What the algebra reads off a triangle with `lead` leading columns: each with its exact directional derivative.


def read_off(lead, upper, dense):
    r = triangularise(upper, dense)
    leading = r[:lead, :lead]
    # A vanishing pivot counts as one here: its row is empty.
    pivots = jnp.diagonal(leading)
    extra = jnp.where(pivots == 0, 1, 0)
    gain = jax.scipy.linalg.solve_triangular(leading + jnp.diag(extra), r[:lead, lead:])
    return {
        "gram": r.T @ r,
        "leading": leading.T @ leading,
        "schur": r[lead:, lead:].T @ r[lead:, lead:],
        "gain": gain,
        "logdet": jnp.sum(jnp.log(jnp.abs(pivots + extra))),
    }


def read_off_exact(lead, upper, dense, d_upper, d_dense):
    g = gram(upper, dense)
    dg = upper.T @ d_upper + dense.T @ d_dense
    dg = dg + dg.T
    gain = np.linalg.solve(g[:lead, :lead], g[:lead, lead:])
    d_gain = np.linalg.solve(g[:lead, :lead], dg[:lead, lead:] - dg[:lead, :lead] @ gain)
    schur = g[lead:, lead:] - g[lead:, :lead] @ gain
    cross = dg[lead:, :lead] @ gain
    d_schur = dg[lead:, lead:] - cross - cross.T + gain.T @ dg[:lead, :lead] @ gain
    inverse = np.linalg.inv(g[:lead, :lead])
    value = {
        "gram": g,
        "leading": g[:lead, :lead],
        "schur": schur,
        "gain": gain,
        "logdet": np.linalg.slogdet(g[:lead, :lead])[1] / 2,
    }
    tangent = {
        "gram": dg,
        "leading": dg[:lead, :lead],
        "schur": d_schur,
        "gain": d_gain,
        "logdet": np.sum(inverse * dg[:lead, :lead]) / 2,
    }
    return value, tangent


@ft.cache
def both_modes(lead):
    def run(upper, dense, d_upper, d_dense, cotangent):
        fn = ft.partial(read_off, lead)
        value, tangent = jax.jvp(fn, (upper, dense), (d_upper, d_dense))
        _, pullback = jax.vjp(fn, upper, dense)
        return value, tangent, pullback(cotangent)

    return jax.jit(run)


def check_derivative(rng, lead, upper, dense, d_upper, d_dense, keys=("gram", "leading", "schur", "gain", "logdet")):
    value, tangent = read_off_exact(lead, upper, dense, d_upper, d_dense)
    weights = {key: rng.standard_normal(np.shape(value[key])) * (key in keys) for key in value}
    out = both_modes(lead)(*on_device(upper, dense, d_upper, d_dense), jax.tree.map(jnp.asarray, weights))
    got_value, got_tangent, (bar_upper, bar_dense) = jax.tree.map(np.asarray, out)
    size = np.max(np.abs(tangent["gram"]))
    for key in keys:
        np.testing.assert_allclose(got_value[key], value[key], rtol=0, atol=1e-11, err_msg=key)
        np.testing.assert_allclose(got_tangent[key], tangent[key], rtol=0, atol=1e-11 * (1 + size), err_msg=key)
    expected = sum(np.sum(weights[key] * tangent[key]) for key in keys)
    total = sum(np.sum(np.abs(weights[key] * tangent[key])) for key in keys)
    np.testing.assert_allclose(np.sum(bar_upper * d_upper) + np.sum(bar_dense * d_dense), expected, atol=1e-11 * total)


DERIVATIVES = [((4, 2), 2), ((9, 3), 4), ((12, 5), 2), ((91, 30), 5)]


@pytest.mark.parametrize(("shape", "lead"), first_of(*DERIVATIVES))
def test_derivative_of_every_block_in_both_modes(shape, lead):
    rng = np.random.default_rng(7)
    upper, dense = random_stack(rng, shape)
    d_upper, d_dense = np.triu(rng.standard_normal(upper.shape)), rng.standard_normal(dense.shape)
    check_derivative(rng, lead, upper, dense, d_upper, d_dense)
    # Zero initial covariance: the dense part vanishes and moves.
    check_derivative(rng, lead, upper, 0 * dense, d_upper, d_dense)
    # A negative row in the triangle.
    check_derivative(rng, lead, upper * np.where(np.arange(shape[0]) == 1, -1, 1)[:, None], dense, d_upper, d_dense)


@pytest.mark.parametrize(("shape", "lead"), DERIVATIVES)
def test_derivative_with_a_column_of_zeros(shape, lead):
    rng = np.random.default_rng(8)
    upper, dense = random_stack(rng, shape)
    d_upper, d_dense = np.triu(rng.standard_normal(upper.shape)), rng.standard_normal(dense.shape)
    # A derivative without noise and without uncertainty, and which stays so.
    mask = np.arange(shape[0]) != shape[0] - 1
    both = mask * mask[:, None]
    check_derivative(rng, lead, upper * both, dense * mask, d_upper * both, d_dense * mask)


@pytest.mark.parametrize(("shape", "lead"), DERIVATIVES)
def test_derivative_is_finite_and_zero_where_there_is_nothing(shape, lead):
    rng = np.random.default_rng(9)
    upper, dense = random_stack(rng, shape)
    d_upper, d_dense = np.triu(rng.standard_normal(upper.shape)), rng.standard_normal(dense.shape)
    shapes = {"gram": upper.shape, "leading": (lead,) * 2, "schur": (shape[0] - lead,) * 2}
    shapes |= {"gain": (lead, shape[0] - lead), "logdet": ()}
    weights = {key: jnp.asarray(rng.standard_normal(shapes[key])) for key in shapes}
    first = np.arange(shape[0]) != 0
    cases = {"all": (0 * upper, 0 * dense), "first column": (upper * first * first[:, None], dense * first)}
    for case, (u, b) in cases.items():
        _, tangent, cotangents = both_modes(lead)(*on_device(u, b, d_upper, d_dense), weights)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((tangent, cotangents))), case
        if case == "all":
            assert all(bool(jnp.all(tangent[key] == 0)) for key in ("gram", "leading", "schur"))


@pytest.mark.parametrize("shape", [(3, 2), (10, 3), (91, 91)])
def test_derivative_is_finite_at_rank_deficiency(shape):
    # Zero process noise (a residual of zero under dynamic calibration) over a covariance of low rank.
    rng = np.random.default_rng(10)
    dim, rows = shape
    low_rank = rng.standard_normal((rows, 1)) @ rng.standard_normal((1, dim))
    upper = jnp.zeros((dim, dim))

    def total(upper, dense):
        r = triangularise(upper, dense)
        return jnp.sum(r.T @ r)

    bar_upper, bar_dense = jax.jit(jax.grad(total, argnums=(0, 1)))(upper, jnp.asarray(low_rank))
    assert bool(jnp.all(jnp.isfinite(bar_upper)))
    np.testing.assert_allclose(bar_dense, 2 * low_rank.sum(1, keepdims=True) * np.ones(dim), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("m", "cols"), [(1, 3), (3, 1), (8, 2), (15, 1), (92, 2)])
def test_substitution_solves_the_transposed_triangle(m, cols):
    rng = np.random.default_rng(11)
    u, _ = random_stack(rng, (m, 0))
    z = rng.standard_normal((m, cols))
    np.testing.assert_allclose(substitute(*on_device(u, z)), np.linalg.solve(u.T, z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [3, 15, 92])
def test_substitution_passes_over_zero_pivots(m):
    # A direction with zero variance: the remaining equations are solved as if it were not there.
    rng = np.random.default_rng(12)
    u, _ = random_stack(rng, (m, 0))
    z = rng.standard_normal((m, 1))
    there = np.arange(m) != 1
    u[1], u[:, 1] = 0, 0

    @jax.jit
    def run(upper, z):
        value, pullback = jax.vjp(substitute, upper, z)
        return value, pullback(jnp.ones_like(value))

    value, cotangents = run(*on_device(u, z))
    expected = np.linalg.solve(u[there][:, there].T, z[there])
    np.testing.assert_allclose(value[there], expected, rtol=1e-12, atol=1e-12)
    assert value[1] == 0
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in cotangents)

    nothing, cotangents = run(jnp.zeros((m, m)), jnp.zeros((m, 1)))
    assert bool(jnp.all(nothing == 0)) and all(bool(jnp.all(jnp.isfinite(x))) for x in cotangents)


@pytest.mark.parametrize(("n", "cols"), [(1, 1), (2, 2), (3, 5), (6, 6), (9, 2)])
def test_solutions_of_many_systems_side_by_side(n, cols):
    rng = np.random.default_rng(13)
    matrices, z = rng.standard_normal((20, n, n)), rng.standard_normal((20, n, cols))
    matrices[0] = np.eye(n)[::-1]  # pivots of zero
    unit = 10.0 ** rng.uniform(-12, 12, size=(10, n, 1))
    matrices[10:], z[10:] = unit * matrices[10:], unit * z[10:]
    x = jax.jit(jax.vmap(solve))(*on_device(matrices, z))
    for matrix, right, found in zip(matrices, z, np.asarray(x), strict=True):
        size = np.abs(matrix) @ np.abs(found) + np.abs(right)
        assert np.all(np.abs(matrix @ found - right) <= 1e-14 * n * np.max(size, axis=1, keepdims=True))


# Sizes on both sides of the bounds between a fused sum, a sum over long rows, and a call into a matrix library.


@pytest.mark.parametrize(
    ("i", "j", "rest"), [(2, 3, ()), (3, 2, (4,)), (2, 2, (3, 4)), (3, 4, (200,)), (2, 3, (20, 30)), (30, 30, (30,))]
)
def test_product_is_matmul_over_the_leading_axis(i, j, rest):
    rng = np.random.default_rng(13)
    a, x = rng.standard_normal((i, j)), rng.standard_normal((j, *rest))
    np.testing.assert_allclose(product(*on_device(a, x)), np.einsum("ij,j...->i...", a, x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("p", "d", "cols"), [(3, 1, 2), (3, 2, 1), (4, 40, 30)])
def test_kronecker_products_are_never_formed_but_right(p, d, cols):
    rng = np.random.default_rng(14)
    a, x, factor = (rng.standard_normal(s) for s in ((p, p), (p * d, cols), (cols, p * d)))
    full = np.kron(a, np.eye(d))
    np.testing.assert_allclose(kron_apply(*on_device(a, x)), full @ x, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(kron_apply_right(*on_device(factor, a)), factor @ full.T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 2), (9, 3), (12, 5)])
def test_what_is_not_finite_is_not_swallowed(shape):
    upper, dense = random_stack(np.random.default_rng(15), shape)
    for bad in (np.nan, np.inf):
        dense[0, 1] = bad
        r = compiled(*on_device(upper, dense))
        assert not np.all(np.isfinite(r[:, 1])), bad


def test_safe_functions_pass_on_what_is_not_a_number():
    # A square root of NaN that is zero makes an error norm of zero: the step is accepted.
    assert np.isnan(safe_sqrt(jnp.asarray(np.nan)))
    assert np.isinf(safe_sqrt(jnp.asarray(np.inf)))
    assert np.isnan(safe_divide(jnp.asarray(np.nan), jnp.asarray(1.0)))
    assert np.isnan(safe_divide(jnp.asarray(1.0), jnp.asarray(np.nan)))


def test_safe_functions_and_their_derivatives_at_zero():
    x = jnp.asarray([0.0, 4.0, -1.0])
    np.testing.assert_array_equal(safe_sqrt(x), [0, 2, 0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(safe_sqrt(x)))(x), [0, 0.25, 0])
    y = jnp.asarray([0.0, 2.0, 4.0])
    np.testing.assert_array_equal(safe_divide(jnp.asarray([1.0, 1.0, 2.0]), y), [0, 0.5, 0.5])
    bars = jax.grad(lambda x, y: jnp.sum(safe_divide(x, y)), argnums=(0, 1))(jnp.asarray([1.0, 1.0, 2.0]), y)
    np.testing.assert_array_equal(bars, [[0, 0.5, 0.25], [0, -0.25, -0.125]])
