"""Leave-one-out residuals: the residual of each step given the equation at all other steps, earlier and later ones.

One pass backwards over the kept steps, without the vector field: the disturbance smoother of de Jong (1988, "A
cross-validation filter for time series models"). With ``S^(-1/2) z`` the whitened innovation of a step, ``H'`` its
derivative ``S^(-1/2) H``, ``K`` the gain (the mean moves by ``-K^T S^(-1/2) z``) and ``A`` the transition of the step,
the score ``r`` of all later residuals and their information ``N`` about the state are, before the step, ::

    r' = A^T (r - H'^T (S^(-1/2) z + K r)),    N' = A^T (H'^T H' + (I - K^T H')^T N (I - K^T H')) A

The leave-one-out residual is ``-(S^(-1/2) z + K r)``, and its variance ``I + K N K^T``.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..algebra.conditioning import Influence
from ..algebra.factorisations import Layout
from ..algebra.linalg import kron_apply, kron_apply_right, product, substitute, triangularise
from ..algebra.normal import batched
from ..priors.prior import AbstractPrior, AbstractPriorFamily
from ..stepping.kept import Row
from .trajectory import backwards, column


class _Later(eqx.Module):
    """The score of later residuals (the gradient of their log density) and a right square root of their information."""

    score: Float[Array, "*batch dim cols"]
    root: Float[Array, "*batch dim dim"]


def left_out_squares(
    rows: Row, reached: Bool[Array, " rows"], prior: AbstractPrior | AbstractPriorFamily, layout: Layout
) -> tuple[Float[Array, "rows *batch"], Float[Array, "rows *batch"]]:
    """The squared leave-one-out residual of the step that ends at each row, over its variance, and its weight.

    Both are ``(rows, *batch)``; the square is the mean over the components. The weight is that of ``Influence``: zero
    where no step ends or its residual is round-off, and where the square is not finite.
    """
    assert rows.influence is not None
    dt = jnp.diff(rows.t, prepend=rows.t[:1])

    def matrix(dt, own):
        one: Any = prior if own is None else own
        return one.transition(jnp.where(dt == 0, 1, dt), layout).matrix

    matrices = jax.vmap(matrix)(dt, rows.prior)
    mean, factor = rows.distribution.mean[0], rows.distribution.factor[0]
    nothing = _Later(jnp.zeros_like(mean), jnp.zeros((*factor.shape[:-2], mean.shape[-2], mean.shape[-2]), mean.dtype))

    def before(x, later):
        influence, matrix, restarted = x
        new = _before(influence, matrix, later)
        # A restart behind a jump is no step: there is no transition with which the score could be carried across it.
        return new if restarted is None else jax.tree.map(lambda a, b: jnp.where(restarted, a, b), nothing, new)

    later = backwards(before, nothing, (rows.influence, matrices, rows.restarted), reached)
    weight = jnp.where(column(reached, rows.influence.weight), rows.influence.weight, 0)
    squares = jax.vmap(_square)(rows.influence, later)
    # A single NaN would make the mean of all squares NaN.
    known = jnp.isfinite(squares)
    return jnp.where(known, squares, 0), jnp.where(known, weight, 0)


def _pull(influence, later):
    """The leave-one-out residual before it is divided by its standard deviation."""
    return -influence.whitened - product(influence.gain, later.score)


@batched
def _before(influence: Influence, matrix: Float[Array, "p p"], later: _Later) -> _Later:
    """Score and information, about the state before a step, of the residuals of this step and all later ones."""
    score = later.score + product(influence.matrix.T, _pull(influence, later))
    rest = later.root - product(product(later.root, influence.gain.T), influence.matrix)
    stack = jnp.concatenate([influence.matrix, rest])
    return _Later(kron_apply(matrix.T, score), _triangle(kron_apply_right(stack, matrix.T)))


def _triangle(rows):
    """An upper triangular matrix ``R`` with ``R^T R = rows^T rows``; columns are scaled to one before they are squared.

    Unscaled, the squares overflow where an innovation has almost no variance, so that its information is very large.
    """
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=0))
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    return triangularise(None, rows / size[None]) * size[None]


@batched
def _square(influence: Influence, later: _Later) -> Float[Array, ""]:
    """The squared leave-one-out residual over its variance ``I + K N K^T``, the mean over its components."""
    root = product(later.root, influence.gain.T)
    spread = triangularise(jnp.eye(root.shape[1], dtype=root.dtype), root)
    residual = substitute(spread, _pull(influence, later))
    return jnp.mean(residual**2)
