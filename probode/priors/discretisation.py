"""Transitions of processes ``x' = F x + e_nu w`` with white noise ``w`` and a companion matrix ``F``.

``F`` has ones above the diagonal and a last row. Its exponential and the square root of the noise come from Taylor and
Legendre series over a short step, which is doubled until it is long enough (Van Loan, 1978, "Computing integrals
involving the matrix exponential"; Stillfjord & Tronarp, 2023, "Computing the matrix exponential and the Cholesky factor
of a related finite horizon Gramian"). Axes: ``n`` derivatives; ``p`` components that the drift couples, one where they
are independent; ``m`` last blocks of the last row of ``F``, before which it is zero.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Real

from ..algebra.factorisations import Layout
from ..algebra.linalg import kron_apply_right, product, triangularise
from ..algebra.transition import Transition
from .powers import noise_units, powers_of_step


# A step is halved until the size of the drift over it is at most one. Then the coefficients y_m of the Taylor series
# below are O(1.45^m) (see _size), which leaves 1.45^22 / 22! < 1e-17, and polynomials of degree below nu + 7 leave of
# the root of the noise less than 5e-18 of its smallest pivot (nu <= 8; computed in 60 digits).
_TAYLOR_TERMS = 21
_MORE_POLYNOMIALS = 7
# Longer steps, of more than 1e12 time constants, become NaN, so that a solver rejects them.
_MOST_DOUBLINGS = 40


def companion_transition(
    row: Float[Array, "*blocks m p p"], dt: Real[Array, ""], scale: PyTree, layout: Layout
) -> Transition:
    """The transition over ``dt`` of the process whose ``F`` has the last row ``row``, for an output scale.

    ``row``: ``(m, p, p)`` for all components, or ``(d, m, 1, 1)``, one for each. ``scale``: see ``IWP``. In units
    ``T_i = dt^(nu-i)``, ``F dt = T M T^-1`` where ``M`` has ones above the diagonal, so ``A = T exp(M) T^-1`` and
    ``Q = |dt| T Qbar T``.
    """
    n, dt = layout.num_derivatives + 1, jnp.asarray(dt, layout.dtype)
    correlated = layout.output_scale(scale).ndim == 2
    if row.ndim == 4 and correlated:
        # Correlated noise couples the components, so one system holds them all: solved one by one they would have
        # independent noise.
        row = jnp.einsum("amij,ab->mab", row, jnp.eye(layout.size, dtype=row.dtype))
    p = row.shape[-1]
    doublings, fraction = _halvings(_size(row) * jnp.abs(dt))
    # Coupled components are discretised with their output scale; independent ones are multiplied by it afterwards.
    inputs = jnp.ones((1, 1), layout.dtype)
    inputs = inputs if p == 1 else layout.lift(inputs, scale).T
    # The units contain powers of 1 / dt. For dt = 0 they are replaced by ones: the matrix is the identity then, and the
    # noise is zero through its magnitude.
    columns, magnitude = noise_units(jnp.where(dt == 0, 1, dt), n)
    magnitude = jnp.where(dt == 0, 0, magnitude)

    def over_step(row):
        matrix, noise = _discretise(_in_steps(row, dt * fraction), inputs, n, doublings)
        return _in_time(matrix, row, dt, n), noise * jnp.repeat(columns, p)[None]

    matrix, noise = over_step(row) if row.ndim == 3 else jax.vmap(over_step)(row)
    if p > 1:
        return Transition(matrix, noise, magnitude)
    matrix = layout.broadcast(matrix) if row.ndim == 3 else lift_blocks(matrix, 1.0, layout)
    return Transition(matrix, lift_blocks(noise, scale, layout), magnitude)


def lift_blocks(matrix: Float[Array, "*blocks n n"], scale: PyTree, layout: Layout) -> Float[Array, "*batch dim dim"]:
    """A matrix over the derivatives, ``(n, n)`` or one for each component, ``(d, n, n)``, times an output scale.

    The scale must not be a matrix if each component has its own ``matrix``.
    """
    if matrix.ndim == 2:
        return layout.lift(matrix, scale)
    scales = layout.lift(jnp.ones((1, 1), layout.dtype), scale)
    if scales.ndim == 3:
        return scales * matrix
    d, n, _ = matrix.shape
    return jnp.reshape(jnp.einsum("aij,ab->iajb", matrix, scales), (n * d, n * d))


def _size(row: Float[Array, "*blocks m p p"]) -> Float[Array, ""]:
    """A norm of the drift in units of ``1 / time``: the smallest ``s`` with ``k! |L_(n-k)| <= s^k`` for all ``k``.

    Solutions of ``y^(n) = sum_k L_(n-k) y^(n-k)`` grow no faster than the root of ``x^n = sum_k |L_(n-k)| x^(n-k)``, at
    which ``sum_k (s / x)^k / k! >= 1``: it is at most ``s / log 2``. (IOUP: the rate; Matern: ``n lambda``.)
    """
    m = row.shape[-3]
    norms = jnp.max(jnp.sum(jnp.abs(lax.stop_gradient(row)), axis=-1), axis=-1)[..., ::-1]
    k = np.arange(1, m + 1)
    factors = np.array([math.factorial(i) ** (1 / i) for i in k])
    powers, units = (jnp.broadcast_to(jnp.asarray(x, row.dtype), norms.shape) for x in (1 / k, factors))
    return jnp.max(norms**powers * units)


def _in_steps(row: Float[Array, "m p p"], dt: Float[Array, ""]) -> Float[Array, "m p p"]:
    """``L_i dt^(n-i)``, one factor after the other: powers of a small ``dt`` would underflow beside a large ``L_i``."""
    m = row.shape[0]
    for k in range(m):
        row = jnp.concatenate([row[: m - k] * dt, row[m - k :]])
    return row


def _halvings(size: Float[Array, ""]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """How often to halve a step of ``size`` time constants until it is at most one, and the fraction that is left.

    The fraction is NaN for a step that is too long.
    """
    halves = np.arange(_MOST_DOUBLINGS + 1)
    number = jnp.sum(size > jnp.asarray(2.0**halves, size.dtype))
    return number, jnp.asarray([*(0.5**halves), np.nan], size.dtype)[number]


def _discretise(
    row: Float[Array, "m p p"], inputs: Float[Array, "p p"], n: int, doublings: Int[Array, ""]
) -> tuple[Float[Array, "dim dim"], Float[Array, "dim dim"]]:
    """``exp(M)`` and the upper triangular root of ``int_0^1 g g^T dr``, ``g(r) = exp(M r) e_nu inputs``.

    ``row``: the last blocks of ``M`` for a short step, which is then doubled ``doublings`` times. ``inputs``: a left
    square root of the covariance of the white noise, ``inputs inputs^T``.
    """
    (m, p, _), dtype = row.shape, row.dtype
    shift, tail, polynomials = (jnp.asarray(table, dtype) for table in _tables(n))
    eye = jnp.eye(p, dtype=dtype)

    # Row i of M^k is row 0 of M^(i+k). Row 0 of M^k is a unit vector up to k = nu: only higher powers are computed.
    def multiply(w, _):
        shifted = jnp.concatenate([jnp.zeros((1, p, p), dtype), w[:-1]])
        return shifted + jnp.einsum("ab,mbc->mac", w[-1], row), w

    _, w = lax.scan(multiply, row, length=_TAYLOR_TERMS)
    change = jnp.einsum("ij,ab->ijab", shift, eye).at[:, n - m :].add(product(tail, w))
    # g_i(r) = sum_k y_k r^(k-i) / (k-i)!, where y_k is the last block of that row, in orthonormal polynomials.
    g = product(polynomials, jnp.concatenate([inputs[None], w[:, -1] @ inputs]))

    dim = n * p
    change = jnp.reshape(jnp.swapaxes(change, 1, 2), (dim, dim))
    rows = jnp.reshape(jnp.transpose(jnp.reshape(g, (-1, n, p, p)), (0, 3, 1, 2)), (-1, dim))
    root = triangularise(None, rows)

    # A step of twice the length: exp(2 M) and exp(M) Q exp(M)^T + Q, in the units of that step.
    units = jnp.asarray(np.repeat(0.5 ** np.arange(n)[::-1], p), dtype)
    diagonal = jnp.eye(dim, dtype=bool)

    def double(matrix, change, root):
        longer = triangularise(root, kron_apply_right(root, matrix)) * (units / math.sqrt(2))[None]
        others = jnp.where(diagonal, 0, matrix)
        others = jnp.sum(others * others.T, axis=1)
        # The diagonal's distance to one is carried as well: for slow components beside fast ones it is below round-off
        # of the diagonal itself, and would be lost.
        change, kept = change * (2 + change) + others, jnp.diagonal(matrix) ** 2 + others
        slow = jnp.abs(change) < 0.5
        matrix = units[:, None] * product(matrix, matrix) / units[None]
        matrix = jnp.where(diagonal, jnp.where(slow, 1 + change, kept), matrix)
        return matrix, jnp.where(slow, change, kept - 1), longer

    def step(carry, k):
        return lax.cond(k < doublings, double, lambda *same: same, *carry), None

    def loop(*carry):
        return lax.scan(step, carry, jnp.arange(_MOST_DOUBLINGS + 1))[0]

    short = change + jnp.eye(dim, dtype=dtype), jnp.diagonal(change), root
    matrix, _, root = lax.cond(doublings > 0, loop, lambda *same: same, *short)
    return matrix, root


def _in_time(
    scaled: Float[Array, "dim dim"], row: Float[Array, "m p p"], dt: Float[Array, ""], n: int
) -> Float[Array, "dim dim"]:
    """``exp(F dt) = T exp(M) T^-1``, from ``exp(M)`` and the last row of ``F``."""
    m, p, _ = row.shape
    # This product is taken on and above the diagonal only: below it powers of 1 / dt would overflow.
    above = jnp.triu(powers_of_step(dt, n))
    blocks = jnp.reshape(scaled, (n, p, n, p)) * above[:, None, :, None]
    if m > 1:
        # Below the diagonal row i + 1 of exp(F dt) is row i times F. (With m = 1 all is zero there.)
        row = jnp.concatenate([jnp.zeros((n - m, p, p), row.dtype), row])
        rows = [blocks[0]]
        for i in range(1, n):
            before = jnp.concatenate([jnp.zeros((p, 1, p), scaled.dtype), rows[-1][:, :-1]], axis=1)
            below = before[:, :i] + jnp.einsum("ab,jbc->ajc", rows[-1][:, -1], row[:i])
            rows.append(jnp.concatenate([below, blocks[i, :, i:]], axis=1))
        blocks = jnp.stack(rows)
    return jnp.reshape(blocks, (n * p, n * p))


@ft.lru_cache
def _tables(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``1 / (k-i)!`` for ``i < k <= nu``; the same for ``k > nu``; coefficients of ``r^(k-i) / (k-i)!``, ``k >= nu``.

    The coefficients, with an axis for the polynomials and ``i`` and one for ``k``, are inner products with what
    Gram-Schmidt makes of the powers ``r^nu, ..., r, 1, r^n, r^(n+1), ...`` on ``[0, 1]`` (Muntz-Legendre polynomials):
    in this order ``i`` has no coefficients beyond the ``i``-th unless there is a drift.
    """
    factorials = np.array([float(math.factorial(k)) for k in range(n + _TAYLOR_TERMS + 1)])
    i, j = np.arange(n)[:, None], np.arange(n)
    shift = np.where(j > i, 1 / factorials[np.abs(j - i)], 0)
    powers = np.arange(n - 1, n + _TAYLOR_TERMS) - i
    coefficients, rest = [], 1 / factorials[powers]
    for power in [*range(n)[::-1], *range(n, n - 1 + _MORE_POLYNOMIALS)]:
        coefficients.append(math.sqrt(2 * power + 1) / (power + powers + 1) * rest)
        rest = rest * (power - powers) / (power + powers + 1)
    return shift, 1 / factorials[powers[:, 1:]], np.concatenate(coefficients)
