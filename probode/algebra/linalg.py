"""Triangularisation (QR), triangular substitution and small products; QR is used in this module only.

A covariance is given by any right square root ``F`` with ``cov = F^T F``; square-root filtering needs the upper
triangle of ``F``. The elimination below is differentiable where a pivot is zero, and gives a column of zeros, as of an
exact initial value, the derivative zero. It is differentiated as JAX differentiates a loop over single columns.
"""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ..util.tracing import full_precision
from ..util.xla import compiles_small_loops


# Above this many columns LAPACK's blocked QR is faster than the column-by-column elimination (measured, see
# benchmarks).
_LAPACK_COLUMNS = 90
# The elimination of a triangle of at most so many entries is unrolled; the larger limit is that of the one elimination
# with which a step conditions: as a loop it costs a filter a fifth more time. Unrolled ones take longer to compile.
_UNROLLED_ENTRIES, _UNROLLED_IN_EVERY_STEP = 36, 100
# Larger triangles are eliminated by loops over panels of at most so many columns.
_PANEL = 24
# Rows of at least this length, and at most so many of them, are summed by unrolled vector operations.
_LONG = 8
_MANY = 256
# Products of at most this many multiplications are written as a fused sum instead of a call into a matrix library.
_SMALL_PRODUCT = 2**14
# A product with a factor of at most so many rows, each of at least this length, is a sum of scaled rows.
_FEW_ROWS, _LONG_ROW = 12, 128


def safe_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The square root of ``x``, zero for ``x <= 0``, and with derivative zero there instead of infinite."""
    zero = x <= 0  # ~(x > 0) would turn NaN into zero, and hide it
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def safe_norm(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The Euclidean norm along the given axes, or of all entries; its derivative at zero is zero."""
    if jnp.finfo(x.dtype).bits >= 64:
        return safe_sqrt(jnp.sum(x**2, axis=axis))
    # In single precision squares under- and overflow: the entries are divided by the largest first.
    size = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    length = size * safe_sqrt(jnp.sum((x / size) ** 2, axis=axis, keepdims=True))
    return jnp.squeeze(length, axis)


def root_mean_square(x: Float[Array, "..."], axis: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The root mean square along axes, or of all entries, with derivative zero at zero."""
    number = x.size if axis is None else math.prod(x.shape[i] for i in axis)
    return safe_norm(x, axis) / math.sqrt(number)


def safe_divide(x: Array, y: Array) -> Array:
    """``x / y``, and zero where ``y`` is zero: directions without variance contribute zero instead of NaN."""
    nonzero = y != 0
    return jnp.where(nonzero, x / jnp.where(nonzero, y, 1), 0)


def detach(tree: PyTree) -> PyTree:
    """The tree with ``stop_gradient`` applied to all its floating-point arrays."""
    return jax.tree.map(lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def detach_first(tree: PyTree) -> PyTree:
    """The tree with a derivative of zero for the first that is taken of it; a derivative of the result is not zero.

    So a function may be differentiated along some directions with a part of it held fixed, and what comes out still
    depends on that part.
    """
    return jax.tree.map(lambda x: _detach_first(x) if eqx.is_inexact_array(x) else x, tree)


@jax.custom_jvp
def _detach_first(x):
    return x


@_detach_first.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return x, jnp.zeros_like(t)


def choose(flag: Bool[Array, ""], these: PyTree, those: PyTree) -> PyTree:
    """``jnp.where`` on trees: the leaves of ``these`` if ``flag`` is true, otherwise those of ``those``."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), these, those)


def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no floating-point number of a tree is infinite or NaN."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return ft.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in numbers], jnp.array(True))


def product(a: Float[Array, "i j"], x: Float[Array, "j *rest"]) -> Float[Array, "i *rest"]:
    """``a @ x``, summed over the leading axis of ``x``."""
    wide = jnp.reshape(a, a.shape + (1,) * (x.ndim - 1))
    if 0 < x.shape[0] <= _FEW_ROWS and x.size >= _LONG_ROW * x.shape[0]:
        # A sum of scaled rows is one pass over memory, and XLA fuses it with its neighbours, unlike a matrix product.
        return sum(wide[:, j] * x[j] for j in range(x.shape[0]))  # type: ignore[return-value]  # there are some
    if a.shape[0] * x.size <= _SMALL_PRODUCT:
        return jnp.sum(wide * x[None], axis=1)
    return jnp.tensordot(a, x, axes=1)


def kron_apply(a: Float[Array, "q p"], x: Float[Array, "dim cols"]) -> Float[Array, "more cols"]:
    """``kron(a, I) @ x`` with the identity that makes the sizes fit; with ``p = dim`` this is ``a @ x``."""
    blocks = jnp.reshape(x, (a.shape[1], x.shape[0] // a.shape[1], x.shape[1]))
    return jnp.reshape(product(a, blocks), (-1, x.shape[1]))


def kron_apply_right(factor: Float[Array, "rows dim"], a: Float[Array, "p p"]) -> Float[Array, "rows dim"]:
    """The matrix ``factor @ kron(a, I)^T``.

    It is a right square root of the covariance of ``kron(a, I) x``, if ``factor`` is one of the covariance of ``x``.
    """
    rows, dim = factor.shape
    blocks = jnp.reshape(factor, (rows, a.shape[0], dim // a.shape[0]))
    if blocks.size * a.shape[0] <= _SMALL_PRODUCT:
        out = jnp.sum(a[None, :, :, None] * blocks[:, None, :, :], axis=2)
    else:
        out = jnp.einsum("ij,rjb->rib", a, blocks)
    return jnp.reshape(out, (rows, dim))


def triangularise(upper: Float[Array, "dim dim"] | None, dense: Float[Array, "rows dim"]) -> Float[Array, "dim dim"]:
    """Upper triangular ``R`` with ``R^T R = upper^T upper + dense^T dense``, where ``upper`` is upper triangular.

    ``None`` stands for an ``upper`` of zeros, which takes fewer operations. See ``eliminate``.
    """
    dim = dense.shape[1]
    if upper is None and dense.dtype.itemsize == 8 and is_written_out(dim):
        return _written_out(None, dense)[0]
    triangle, _ = eliminate(jnp.zeros((dim, dim), dense.dtype) if upper is None else upper, dense)
    return triangle


@jax.custom_jvp
def triangularise_tall(dense: Float[Array, "rows dim"]) -> Float[Array, "dim dim"]:
    """``triangularise(None, dense)`` for many more rows than columns, by LAPACK, which is several times faster then.

    Its derivative is that of the elimination: that of LAPACK's QR is NaN where columns depend on each other.
    """
    size = jnp.max(jnp.abs(dense), axis=0, initial=0)
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    rows = jnp.pad(dense / size[None], ((0, max(0, dense.shape[1] - dense.shape[0])), (0, 0)))
    triangle = _qr(rows, "r")
    return jnp.where(jnp.diagonal(triangle) < 0, -1, 1)[:, None] * triangle * size[None]


@triangularise_tall.defjvp
@full_precision()
def _(primals, tangents):
    return jax.jvp(lambda dense: triangularise(None, dense), primals, tangents)


def eliminate(
    upper: Float[Array, "n width"], dense: Float[Array, "rows width"], *, in_every_step: bool = False
) -> tuple[Float[Array, "n width"], Float[Array, "rows_left extra"]]:
    """The stack ``[upper; dense]`` with its first ``n`` columns made upper triangular by an orthogonal map of the rows.

    ``upper``: upper triangular, and its rows may be zero; ``dense``: any matrix. Returns the ``n`` rows of the
    triangle, and the other rows in the ``extra = width - n`` columns behind it (before it they are zero). Columns are
    eliminated one by one with a reflection that maps ``(s, b)`` to ``(r, 0)``, where ``s = |upper_jj|``, ``b`` is the
    column of ``dense`` and ``r = sqrt(s^2 + b.b)``; it needs no choice of sign, hence no branch. A column with
    ``r = 0`` is zero and stays, with derivative zero. Large triangles are left to LAPACK. ``in_every_step``: whether
    speed counts more than the time to compile.
    """
    most = _UNROLLED_IN_EVERY_STEP if in_every_step else _UNROLLED_ENTRIES
    sign = jnp.where(jnp.diagonal(upper) < 0, -1, 1).astype(upper.dtype)
    upper = upper * sign[:, None]
    if jnp.finfo(upper.dtype).bits < 64:
        # Squares of entries below 1e-19 underflow in float32; scaling columns commutes with the elimination.
        size = jnp.maximum(jnp.max(jnp.abs(upper), axis=0), jnp.max(jnp.abs(dense), axis=0, initial=0))
        size = lax.stop_gradient(jnp.where((size > 0) & jnp.isfinite(size), size, 1))
        triangle, left = _eliminate(upper / size[None], dense / size[None], most)
        return triangle * size[None], left * size[None, upper.shape[0] :]
    return _eliminate(upper, dense, most)


def is_written_out(n: int) -> bool:
    """Whether the elimination of ``n`` columns is unrolled, so that the number of operations determines its cost."""
    return n**2 <= _UNROLLED_ENTRIES


def _eliminate(upper, dense, most):
    n = upper.shape[0]
    if n > _LAPACK_COLUMNS:
        return _lapack(upper, dense)
    if upper.size <= most:
        return _written_out(upper, dense)
    # In one loop over all columns every iteration would work on the whole width; each panel is narrower than the last.
    panels = []
    for start in range(0, n, _PANEL):
        panel, dense = _eliminate_panel(upper[start : start + _PANEL, start:], dense)
        panels.append(jnp.pad(panel, ((0, 0), (start, 0))))
    return jnp.triu(jnp.concatenate(panels)), dense


@jax.custom_jvp
def _eliminate_panel(upper, dense):
    n, width = upper.shape
    if n % 2:
        return _column_by_column(upper, dense)
    left, rows = lax.scan(_eliminate_two, dense, (jnp.arange(0, n, 2), jnp.reshape(upper, (n // 2, 2, width))))
    return jnp.reshape(rows, (n, width)), left[:, n:]


@_eliminate_panel.defjvp
@full_precision()
def _(primals, tangents):
    return jax.jvp(_column_by_column, primals, tangents)


def _column_by_column(upper, dense):
    # Of all ways to eliminate columns this has the smallest derivative: otherwise the derivatives of eliminations are
    # most of what there is to compile of a gradient.
    n = upper.shape[0]
    left, rows = lax.scan(_eliminate_one, dense, (jnp.arange(n), upper))
    # Under vmap the results of a loop have the axis of lanes second, those of the other forms first; JAX mistakes one
    # for the other where a function and its custom derivative do not agree. Reshaped they have it first, too.
    return jnp.reshape(jnp.ravel(rows), rows.shape), left[:, n:]


@jax.custom_jvp
def _written_out(upper, dense):
    rows, n = [], dense.shape[1] if upper is None else upper.shape[0]
    for j in range(n):
        b = dense[:, j]
        u = _combine_rows(b, dense)
        row, g = _project(u, u[j]) if upper is None else _reflect(upper[j], upper[j, j], u, u[j])
        rows.append(row)
        dense = dense - b[:, None] * g[None]
    return jnp.triu(jnp.stack(rows)), dense[:, n:]


@_written_out.defjvp
@full_precision()
def _(primals, tangents):
    def in_a_loop(upper, dense):
        n = dense.shape[1] if upper is None else upper.shape[0]
        rows, left = _column_by_column(jnp.zeros((n, n), dense.dtype) if upper is None else upper, dense)
        return jnp.triu(rows), left

    # Both of the same: where rank is lost up to round-off, later divisions need a derivative of just these numbers.
    return jax.jvp(in_a_loop, primals, tangents)


def _combine_rows(b, dense):
    # ``b @ dense`` as a sum: XLA does not fuse a matrix product with its neighbours. In loops compiled to native code
    # (``compile_small_loops``) an unrolled sum adds rows as vectors and is faster than a reduction, which adds number
    # by number; elsewhere it is only more operations.
    if compiles_small_loops() and 0 < dense.shape[0] <= _MANY and dense.shape[1] >= _LONG:
        return sum(b[i] * dense[i] for i in range(dense.shape[0]))
    return jnp.sum(b[:, None] * dense, axis=0)


def _reflect(t, s, u, bb):
    """Row ``j`` of the triangle, and the vector ``g`` of the update ``B <- B - b g^T`` that eliminates column ``j``.

    ``B`` is the dense part, ``b`` its column ``j``, ``u = b^T B`` and ``bb = b^T b``; ``t`` is row ``j`` of the upper
    part and ``s`` its pivot.
    """
    square = s**2 + bb
    empty = square == 0
    inverse = jnp.where(empty, 0, 1 / jnp.sqrt(jnp.where(empty, 1, square)))  # 1 / r
    # The column is zero already: the row has to stay, or the variance in its other columns would be lost.
    row = jnp.where(empty, t, (s * t + u) * inverse)
    return row, (t + row) * (inverse / (1 + s * inverse))


def _project(u, bb):
    """Row ``j`` of the triangle, and the vector ``g`` of the update: those of ``_reflect`` for ``t = 0``."""
    empty = bb == 0
    inverse = jnp.where(empty, 0, 1 / jnp.sqrt(jnp.where(empty, 1, bb)))
    row = u * inverse
    return row, row * inverse


def _eliminate_one(dense, x):
    j, t = x
    b = dense[:, j]
    # No matrix product: XLA would not compile its derivative along several directions into a native loop.
    u = product(b[None], dense)[0]
    row, g = _reflect(t, t[j], u, u[j])
    return dense - b[:, None] * g[None], row


def _eliminate_two(dense, x):
    # Two columns per pass over `dense`, for half the traffic to memory. The second product is that with the matrix
    # which the elimination of the first column would leave.
    j, (t1, t2) = x
    b1 = dense[:, j]
    row1, g1 = _reflect(t1, t1[j], b1 @ dense, b1 @ b1)
    b2 = dense[:, j + 1] - b1 * g1[j + 1]
    row2, g2 = _reflect(t2, t2[j + 1], b2 @ dense - (b1 @ b2) * g1, b2 @ b2)
    return dense - b1[:, None] * g1[None] - b2[:, None] * g2[None], jnp.stack([row1, row2])


def _lapack(upper, dense):
    n, width = upper.shape
    # The derivative of JAX's QR is NaN without full column rank, as with a column of zeros (exact initial value, zero
    # noise): its pivot is set to one here, and to zero below. Columns behind the triangle are only transformed.
    empty = (jnp.all(upper == 0, axis=0) & jnp.all(dense == 0, axis=0))[:n]
    leading = jnp.concatenate([jnp.where(jnp.diag(empty), 1, upper[:, :n]), dense[:, :n]])
    if width == n:
        return jnp.where(jnp.diag(empty), 0, _triangle(leading)), dense[:, n:]
    q, r = _orthonormal(leading)
    behind = jnp.concatenate([upper[:, n:], dense[:, n:]])
    rows = q.T @ behind
    left = behind - q @ rows
    return jnp.concatenate([jnp.where(jnp.diag(empty), 0, r), jnp.where(empty[:, None], 0, rows)], axis=1), left


def _qr(matrix, mode):
    """What ``jnp.linalg.qr`` returns. On CPU lanes are taken one after the other.

    Where several calls of LAPACK with many matrices each run side by side, as many as XLA has threads, each occupies a
    thread and waits for the others forever (jaxlib before 0.11.2).
    """
    call = ft.partial(jnp.linalg.qr, mode=mode)
    return lax.platform_dependent(matrix, cpu=jax.custom_batching.sequential_vmap(call), default=call)


@jax.custom_jvp
def _triangle(matrix):
    return _qr(matrix, "r")


@_triangle.defjvp
@full_precision()
def _(primals, tangents):
    (_, r), (_, moved) = jax.jvp(_orthonormal, primals, tangents)
    return r, moved


@jax.custom_jvp
def _orthonormal(matrix):
    """Orthonormal columns ``Q`` and the triangle ``R`` of ``matrix = Q R``, which has full column rank."""
    return tuple(_qr(matrix, "reduced"))


@_orthonormal.defjvp
@full_precision()
def _(primals, tangents):
    q, r = _orthonormal(*primals)
    return (q, r), _moved(q, r, *tangents)[:2]


@jax.custom_jvp
def orthogonal(matrix: Float[Array, "n m"]) -> tuple[Float[Array, "n n"], Float[Array, "m m"]]:
    """The whole orthogonal matrix ``Q`` and the triangle ``R`` of ``matrix = Q [R; 0]``, which has full column rank.

    JAX has no derivative of the columns of ``Q`` behind the first ``m``. They may be any basis of their space, so one
    derivative is chosen, ``-Q1 R^-T dA^T Q2``, with which all that does not depend on the basis is right.
    """
    q, r = _qr(matrix, "complete")
    return q, r[: matrix.shape[1]]


@orthogonal.defjvp
@full_precision()
def _(primals, tangents):
    q, r = orthogonal(*primals)
    first, rest = jnp.split(q, [r.shape[1]], axis=1)
    along, moved, slope = _moved(first, r, *tangents)
    return (q, r), (jnp.concatenate([along, -first @ (slope.T @ rest)], axis=1), moved)


def _moved(q, r, moved):
    """The derivatives of ``Q`` and ``R`` along ``dA``, and ``dA R^-1``."""
    slope = substitute(r, moved.T).T
    turn = q.T @ slope
    skew = jnp.tril(turn, -1) - jnp.tril(turn, -1).T
    return q @ (skew - turn) + slope, jnp.triu((turn - skew) @ r), slope


@jax.custom_jvp
def substitute(upper: Float[Array, "m m"], z: Float[Array, "m cols"]) -> Float[Array, "m cols"]:
    """``upper^-T z``: the whitened ``z``, if its covariance is ``upper^T upper``.

    Entries with a zero pivot are zero: the covariance has no variance there.
    """
    m = upper.shape[0]
    if m > _LAPACK_COLUMNS:
        # In halves most of the work is a product of matrices. (Not by LAPACK, for the reason given in ``_qr``.)
        half = m // 2
        first = substitute(upper[:half, :half], z[:half])
        second = substitute(upper[half:, half:], z[half:] - product(upper[:half, half:].T, first))
        return jnp.concatenate([first, second])
    if m == 1:
        return safe_divide(z, upper)

    def step(x, j_row):
        j, row = j_row
        w = safe_divide(x[j], row[j])
        return x - row[:, None] * w[None], w

    _, w = lax.scan(step, z, (jnp.arange(m), upper), unroll=upper.size <= _UNROLLED_ENTRIES)
    return w


@substitute.defjvp
@full_precision()
def _(primals, tangents):
    # U^T w = z. The derivative of what is written out would be several times as much to compile.
    (upper, _), (t_upper, t_z) = primals, tangents
    w = substitute(*primals)
    return w, substitute(upper, t_z - product(jnp.triu(t_upper).T, w))


def solve_upper(upper: Float[Array, "m m"], z: Float[Array, "m cols"]) -> Float[Array, "m cols"]:
    """``upper^-1 z``; entries with a zero pivot are zero."""
    # ``substitute`` solves with the transpose of an upper triangle. Reversed and transposed, ``upper`` is one again.
    return substitute(upper[::-1, ::-1].T, z[::-1])[::-1]


def solve(matrix: Float[Array, "n n"], z: Float[Array, "n cols"]) -> Float[Array, "n cols"]:
    """``matrix^-1 z``, by reflections: they need no pivots, so that many systems are solved side by side.

    LAPACK takes them one by one. Entries with a zero pivot are zero.
    """
    n = len(matrix)
    # Reflections mix all rows: of one that is small beside others the digits would be lost.
    size = lax.stop_gradient(jnp.max(jnp.abs(matrix), axis=1, keepdims=True))
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    matrix, z = matrix / size, z / size
    rows, _ = eliminate(jnp.zeros((n, n + z.shape[1]), z.dtype), jnp.concatenate([matrix, z], axis=1))
    return solve_upper(rows[:, :n], rows[:, n:])
