"""Triangularisation, substitution and small products: the only place that knows about QR and its derivative.

A covariance is held by any right square root ``F`` with ``cov = F^T F``; reducing ``F`` to an upper triangle is all
that filtering needs. The elimination below is smooth where a pivot vanishes, so plain differentiation of it is exact.
"""

import functools as ft
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ..util.xla import compiles_small_loops


# Above this many columns LAPACK's blocked QR wins over the column-by-column elimination (measured, see benchmarks).
_LAPACK_COLUMNS = 90
# A triangle of up to so many entries is written out column by column: that is faster, and still quick to compile.
_UNROLLED_ENTRIES = 100
# Beyond that a loop over the columns, in panels of at most so many.
_PANEL = 24
# From this length on rows are combined as vectors.
_LONG = 8
# Up to so many of them are written out one by one.
_MANY = 256
# Products of at most this many multiplications are written as a fused sum instead of a call into a matrix library.
_SMALL_PRODUCT = 2**14
# Products with at most so many rows, of at least this length, are written out row by row.
_FEW_ROWS, _LONG_ROW = 12, 128


def safe_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Square root whose derivative at zero is zero instead of infinite."""
    zero = x <= 0  # not the opposite of x > 0: NaN has to stay NaN
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def safe_norm(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """Euclidean length along axes (or of all entries), with derivative zero at zero."""
    if jnp.finfo(x.dtype).bits >= 64:
        return safe_sqrt(jnp.sum(x**2, axis=axis))
    # Squares under- and overflow in single precision.
    size = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    length = size * safe_sqrt(jnp.sum((x / size) ** 2, axis=axis, keepdims=True))
    return jnp.squeeze(length, axis)


def root_mean_square(x: Float[Array, "..."], axis: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """Root mean square along axes (or of all entries), with derivative zero at zero."""
    number = x.size if axis is None else math.prod(x.shape[i] for i in axis)
    return safe_norm(x, axis) / math.sqrt(number)


def safe_divide(x: Array, y: Array) -> Array:
    """``x / y``, and zero where ``y`` is zero: a singular direction carries no information."""
    nonzero = y != 0
    return jnp.where(nonzero, x / jnp.where(nonzero, y, 1), 0)


def detach(tree: PyTree) -> PyTree:
    """The same numbers, without derivatives."""
    return jax.tree.map(lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def choose(flag: Bool[Array, ""], these: PyTree, those: PyTree) -> PyTree:
    """The numbers of one tree or those of another."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), these, those)


def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no number of a tree is infinite or NaN."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return ft.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in numbers], jnp.array(True))


def compiled(fn: Callable) -> Callable:
    """``equinox.filter_jit``, with all products of matrices in the full precision of their numbers.

    GPUs and TPUs round the factors of a product to ten bits or less by default. In a vector field of a linear equation
    that is noise which no step is short enough for. What a user has chosen (``jax.default_matmul_precision``) stays.
    """

    @ft.wraps(fn)
    def precise(*args, **kwargs):
        chosen = jax.config.jax_default_matmul_precision
        with jax.default_matmul_precision("highest" if chosen is None else chosen):
            return fn(*args, **kwargs)

    return eqx.filter_jit(precise)


def product(a: Float[Array, "i j"], x: Float[Array, "j *rest"]) -> Float[Array, "i *rest"]:
    """``a @ x`` over the leading axis of ``x``."""
    wide = jnp.reshape(a, a.shape + (1,) * (x.ndim - 1))
    if 0 < x.shape[0] <= _FEW_ROWS and x.size >= _LONG_ROW * x.shape[0]:
        # A few long rows: one pass over memory, which melts into what comes before and after it.
        return sum(wide[:, j] * x[j] for j in range(x.shape[0]))
    if a.shape[0] * x.size <= _SMALL_PRODUCT:
        return jnp.sum(wide * x, axis=1)
    return jnp.tensordot(a, x, axes=1)


def kron_apply(a: Float[Array, "p p"], x: Float[Array, "dim cols"]) -> Float[Array, "dim cols"]:
    """``kron(a, I) @ x`` with the identity that makes the sizes fit; with ``p = dim`` this is ``a @ x``."""
    blocks = jnp.reshape(x, (a.shape[0], x.shape[0] // a.shape[0], x.shape[1]))
    return jnp.reshape(product(a, blocks), x.shape)


def kron_apply_right(factor: Float[Array, "rows dim"], a: Float[Array, "p p"]) -> Float[Array, "rows dim"]:
    """``factor @ kron(a, I)^T``: the right square root after a linear map."""
    rows, dim = factor.shape
    blocks = jnp.reshape(factor, (rows, a.shape[0], dim // a.shape[0]))
    if blocks.size * a.shape[0] <= _SMALL_PRODUCT:
        out = jnp.sum(a[None, :, :, None] * blocks[:, None, :, :], axis=2)
    else:
        out = jnp.einsum("ij,rjb->rib", a, blocks)
    return jnp.reshape(out, (rows, dim))


def triangularise(upper: Float[Array, "dim dim"] | None, dense: Float[Array, "rows dim"]) -> Float[Array, "dim dim"]:
    """Upper-triangular ``R`` with ``R^T R = upper^T upper + dense^T dense``, ``None`` for zero; see ``eliminate``."""
    dim = dense.shape[1]
    if upper is None and dense.dtype.itemsize == 8 and is_written_out(dim):
        return _written_out(None, dense)[0]
    triangle, _ = eliminate(jnp.zeros((dim, dim), dense.dtype) if upper is None else upper, dense)
    return triangle


def eliminate(
    upper: Float[Array, "n width"], dense: Float[Array, "rows width"]
) -> tuple[Float[Array, "n width"], Float[Array, "rows_left extra"]]:
    """The first ``n`` columns of the stack ``[upper; dense]`` made upper triangular by an orthogonal map of its rows.

    ``upper`` is upper triangular (its rows may vanish), ``dense`` anything. Returns the triangle's rows and what is
    left of ``dense`` in the ``extra = width - n`` columns behind them. Columns are eliminated one by one with a
    reflection that maps ``(s, b)`` to ``(r, 0)``, ``s = |upper_jj|``, ``r = sqrt(s^2 + b.b)``; it needs no choice of
    sign, hence no branch. Where ``r = 0`` the column is zero and is passed over with zero derivative.
    """
    sign = jnp.where(jnp.diagonal(upper) < 0, -1, 1).astype(upper.dtype)
    upper = upper * sign[:, None]
    if jnp.finfo(upper.dtype).bits < 64:
        # Squares of entries below 1e-19 underflow in float32; scaling columns commutes with the elimination.
        size = jnp.maximum(jnp.max(jnp.abs(upper), axis=0), jnp.max(jnp.abs(dense), axis=0, initial=0))
        size = lax.stop_gradient(jnp.where((size > 0) & jnp.isfinite(size), size, 1))
        triangle, left = _eliminate(upper / size, dense / size)
        return triangle * size, left * size[upper.shape[0] :]
    return _eliminate(upper, dense)


def is_written_out(n: int) -> bool:
    """Whether ``n`` columns are eliminated one by one in the program, which costs operations rather than arithmetic."""
    return n**2 <= _UNROLLED_ENTRIES


def _eliminate(upper, dense):
    n = upper.shape[0]
    if n > _LAPACK_COLUMNS:
        return _lapack(upper, dense)
    if upper.size <= _UNROLLED_ENTRIES:
        return _written_out(upper, dense)
    # Columns that are done need no more work: panels of columns, each narrower than the one before.
    panels = []
    for start in range(0, n, _PANEL):
        panel, dense = _eliminate_panel(upper[start : start + _PANEL, start:], dense)
        panels.append(jnp.pad(panel, ((0, 0), (start, 0))))
    return jnp.triu(jnp.concatenate(panels)), dense


def _eliminate_panel(upper, dense):
    n, width = upper.shape
    if n % 2:
        step, xs = _eliminate_one, (jnp.arange(n), upper)
    else:
        step, xs = _eliminate_two, (jnp.arange(0, n, 2), jnp.reshape(upper, (n // 2, 2, width)))
    left, rows = lax.scan(step, dense, xs)
    return jnp.reshape(rows, (n, width)), left[:, n:]


def _written_out(upper, dense):
    rows, n = [], dense.shape[1] if upper is None else upper.shape[0]
    for j in range(n):
        b = dense[:, j]
        u = _combine_rows(b, dense)
        row, g = _project(u, u[j]) if upper is None else _reflect(upper[j], upper[j, j], u, u[j])
        rows.append(row)
        dense = dense - b[:, None] * g
    return jnp.triu(jnp.stack(rows)), dense[:, n:]


@jax.custom_jvp
def _combine_rows(b, dense):
    # Sums, not a product of matrices, which would not melt into its neighbours. In native loops the terms one by one,
    # which add rows as vectors, beat a reduction, which adds numbers; elsewhere they are only more operations.
    if compiles_small_loops() and 0 < dense.shape[0] <= _MANY and dense.shape[1] >= _LONG:
        return sum(b[i] * dense[i] for i in range(dense.shape[0]))
    return jnp.sum(b[:, None] * dense, axis=0)


@_combine_rows.defjvp
def _(primals, tangents):
    # The transpose of a reduction is one operation, that of the terms one by one is many.
    (b, dense), (t_b, t_dense) = primals, tangents
    tangent = jnp.sum(t_b[:, None] * dense + b[:, None] * t_dense, axis=0)
    return _combine_rows(b, dense), tangent


def _reflect(t, s, u, bb):
    """Row ``j`` of ``R`` and the row ``g`` in ``B <- B - b g^T``: ``t`` is the row of ``T``, ``u = b^T B``."""
    square = s**2 + bb
    empty = square == 0
    inverse = jnp.where(empty, 0, 1 / jnp.sqrt(jnp.where(empty, 1, square)))  # 1 / r
    # Without a pivot there is nothing to eliminate: what else the row holds stays.
    row = jnp.where(empty, t, (s * t + u) * inverse)
    return row, (t + row) * (inverse / (1 + s * inverse))


def _project(u, bb):
    """The same for a row of zeros, ``t = 0``."""
    empty = bb == 0
    inverse = jnp.where(empty, 0, 1 / jnp.sqrt(jnp.where(empty, 1, bb)))
    row = u * inverse
    return row, row * inverse


def _eliminate_one(dense, x):
    j, t = x
    b = dense[:, j]
    u = b @ dense
    row, g = _reflect(t, t[j], u, u[j])
    return dense - b[:, None] * g, row


def _eliminate_two(dense, x):
    # Two columns per pass over `dense`: the second gemv acts on the matrix that the first column would leave.
    j, (t1, t2) = x
    b1 = dense[:, j]
    row1, g1 = _reflect(t1, t1[j], b1 @ dense, b1 @ b1)
    b2 = dense[:, j + 1] - b1 * g1[j + 1]
    row2, g2 = _reflect(t2, t2[j + 1], b2 @ dense - (b1 @ b2) * g1, b2 @ b2)
    return dense - b1[:, None] * g1 - b2[:, None] * g2, jnp.stack([row1, row2])


def _lapack(upper, dense):
    n, width = upper.shape
    # JAX's QR derivative needs full column rank; a column of zeros (exact initial value, zero noise) has none. The
    # columns behind the triangle are not factorised, only transformed.
    empty = (jnp.all(upper == 0, axis=0) & jnp.all(dense == 0, axis=0))[:n]
    leading = jnp.concatenate([jnp.where(jnp.diag(empty), 1, upper[:, :n]), dense[:, :n]])
    if width == n:
        r = jnp.linalg.qr(leading, mode="r")
        return jnp.where(jnp.diag(empty), 0, r), dense[:, n:]
    q, r = jnp.linalg.qr(leading, mode="reduced")
    behind = jnp.concatenate([upper[:, n:], dense[:, n:]])
    rows = q.T @ behind
    left = behind - q @ rows
    return jnp.concatenate([jnp.where(jnp.diag(empty), 0, r), jnp.where(empty[:, None], 0, rows)], axis=1), left


def substitute(upper: Float[Array, "m m"], z: Float[Array, "m cols"]) -> Float[Array, "m cols"]:
    """``upper^-T z``: with ``upper^T upper`` the covariance of ``z``, its standard normal coordinates.

    Directions with a zero pivot contribute nothing.
    """
    m = upper.shape[0]
    if m > _LAPACK_COLUMNS:
        singular = jnp.diagonal(upper)[:, None] == 0
        triangle = jnp.where(singular, jnp.eye(m, dtype=upper.dtype), upper)
        return jnp.where(singular, 0, jax.scipy.linalg.solve_triangular(triangle, z, trans="T"))
    if m == 1:
        return safe_divide(z, upper)

    def step(x, j_row):
        j, row = j_row
        w = safe_divide(x[j], row[j])
        return x - row[:, None] * w, w

    _, w = lax.scan(step, z, (jnp.arange(m), upper), unroll=upper.size <= _UNROLLED_ENTRIES)
    return w
