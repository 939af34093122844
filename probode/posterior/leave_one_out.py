"""Leave-one-out residuals: how well each equation is predicted by all the others, earlier and later ones.

One pass backwards over the kept steps, without the vector field: the disturbance smoother of de Jong (1988). Its
variables are the information ``root^T root`` that later residuals carry about a state, and their pull ``score`` on it.
"""

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
    score: Float[Array, "*batch dim cols"]
    root: Float[Array, "*batch dim dim"]


def left_out_squares(
    rows: Row, reached: Bool[Array, " rows"], prior: AbstractPrior | AbstractPriorFamily, layout: Layout
) -> tuple[Float[Array, "rows *batch"], Float[Array, "rows *batch"]]:
    """The leave-one-out residual of the step that ends in each row, squared over its own variance (the mean over its
    components), and its weight: zero where there is none, or none above round-off."""
    dt = jnp.diff(rows.t, prepend=rows.t[:1])

    def matrix(dt, own):
        return (prior if own is None else own).transition(jnp.where(dt == 0, 1, dt), layout).matrix

    matrices = jax.vmap(matrix)(dt, rows.prior)
    mean, factor = rows.distribution.mean[0], rows.distribution.factor[0]
    nothing = _Later(jnp.zeros_like(mean), jnp.zeros((*factor.shape[:-2], mean.shape[-2], mean.shape[-2]), mean.dtype))

    def before(x, later):
        influence, matrix, anew = x
        new = _before(influence, matrix, later)
        # Behind a jump it is another equation, which is not told from before.
        return new if anew is None else jax.tree.map(lambda a, b: jnp.where(anew, a, b), nothing, new)

    later = backwards(before, nothing, (rows.influence, matrices, rows.anew), reached)
    weight = jnp.where(column(reached, rows.influence.weight), rows.influence.weight, 0)
    squares = jax.vmap(_square)(rows.influence, later)
    # One that is not a number would be the mean of all.
    known = jnp.isfinite(squares)
    return jnp.where(known, squares, 0), jnp.where(known, weight, 0)


def _pull(influence, later):
    return -influence.whitened - product(influence.gain, later.score)


@batched
def _before(influence: Influence, matrix: Float[Array, "p p"], later: _Later) -> _Later:
    """What residuals from this step on say about the state before it."""
    score = later.score + product(influence.matrix.T, _pull(influence, later))
    rest = later.root - product(product(later.root, influence.gain.T), influence.matrix)
    stack = jnp.concatenate([influence.matrix, rest])
    return _Later(kron_apply(matrix.T, score), _triangle(kron_apply_right(stack, matrix.T)))


def _triangle(rows):
    """The triangle of a root of information, whose squares overflow where an innovation has next to no variance."""
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=0))
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    return triangularise(None, rows / size) * size


@batched
def _square(influence: Influence, later: _Later) -> Float[Array, ""]:
    root = product(later.root, influence.gain.T)
    spread = triangularise(jnp.eye(root.shape[1], dtype=root.dtype), root)
    residual = substitute(spread, _pull(influence, later))
    return jnp.mean(residual**2)
