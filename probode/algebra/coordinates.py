"""The coordinates of Gaussian states: what an earlier state is, given a later one.

The coordinates of a state are the standard normal ``w`` in ``x = mean + factor^T w``. A smoother keeps those of an
earlier state given those of a later one, by blocks of orthogonal matrices.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .linalg import is_written_out, product, substitute, triangularise
from .normal import Normal, batched, pad_rows


class Conditional(eqx.Module):
    """The Gaussian distribution of an earlier state's coordinates given a later one's, for smoothers.

    The coordinates of a state are the ``w`` in ``x = mean + factor^T w``, standard normal given the data up to its
    time; means and factors are kept elsewhere. With ``w`` those of the earlier state, ``p`` of them, and ``v`` those of
    the later one, ``w | v ~ N(shift + cross^T v, own^T own)``:

    - ``shift``: ``(*batch, p, cols)``; what the data after the earlier state have moved.
    - ``cross``: ``(*batch, rows, p)``, for as many coordinates ``v``.
    - ``own``: ``(*batch, q, p)``, without rows where ``v`` determines ``w``.

    ``cross`` and ``own`` are blocks of an orthogonal matrix, ``cross^T cross + own^T own <= I``: nothing is ever
    inverted, however small a covariance (Paige & Saunders 1977, "Least squares estimation of discrete linear dynamic
    systems using orthogonal transformations").

    >>> import jax.numpy as jnp, probode
    >>> state = probode.Normal(jnp.zeros((2, 1)), jnp.eye(2))
    >>> past = probode.Conditional.identity(state)
    >>> past.cross.shape, past.own.shape  # the later state is the earlier one
    ((2, 2), (0, 2))
    """

    shift: Float[Array, "*batch p cols"]
    cross: Float[Array, "*batch rows p"]
    own: Float[Array, "*batch q p"]

    @staticmethod
    def identity(x: Normal) -> "Conditional":
        """The coordinates of ``x`` given themselves: what a smoother knows of a state that it has just left."""

        @batched
        def of_one(x):
            rows, cols = x.factor.shape[0], x.mean.shape[1]
            eye = jnp.eye(rows, dtype=x.factor.dtype)
            return Conditional(jnp.zeros((rows, cols), x.mean.dtype), eye, eye[:0])

        return of_one(x)


def more_left_over(past, left):
    """Square root of Cov(w given v), with the rows that the elimination of a step has left over of it."""
    # A few rows more cost less than their elimination.
    few = past.own.shape[0] == 0 and is_written_out(left.shape[1])
    return left if few else both(past.own, left)


def both(own, rows):
    """Upper triangular square root of ``own^T own + rows^T rows``."""
    p = rows.shape[1]
    if own.shape[0] == p and not is_written_out(p):
        return triangularise(own, rows)
    return triangularise(None, jnp.concatenate([own, rows]))


def pad_own(past: Conditional, rows: int) -> Conditional:
    """``past`` with at least so many rows in ``own``, the new ones zero."""
    return Conditional(past.shift, past.cross, pad_rows(past.own, rows))


def carried(past: Conditional | None) -> Conditional | None:
    """``past`` with as many rows in ``own`` as it has columns: its shape after any number of steps."""
    return None if past is None else pad_own(past, past.own.shape[-1])


@batched
def standard(x: Normal) -> Normal:
    """``N(0, I)``, the distribution of the coordinates of ``x`` given the data up to its time."""
    rows, cols = x.factor.shape[0], x.mean.shape[1]
    return Normal(jnp.zeros((rows, cols), x.mean.dtype), jnp.eye(rows, dtype=x.factor.dtype))


@batched
def look_back(later: Normal, past: Conditional) -> Normal:
    """The distribution of the earlier state's coordinates, from that of the later one's: marginalises ``past``."""
    mean = past.shift + product(past.cross.T, later.mean)
    return Normal(mean, both(past.own, product(later.factor, past.cross)))


@batched
def realise(coordinates: Normal, x: Normal) -> Normal:
    """The distribution of ``x`` when its coordinates are no longer standard normal but ``coordinates``."""
    return Normal(x.mean + product(x.factor.T, coordinates.mean), product(coordinates.factor, x.factor))


@batched
def in_coordinates(past: Conditional, coordinates: Normal) -> Conditional:
    """``past`` given new standard normal coordinates of the later state, whose old ones have this distribution."""
    shift = past.shift + product(past.cross.T, coordinates.mean)
    return Conditional(shift, product(coordinates.factor, past.cross), past.own)


@batched
def coordinates_of(state: Normal, x: Normal) -> Normal:
    """The coordinates in which ``x``, whose factor is square and upper triangular, has the distribution ``state``."""
    cols = x.mean.shape[1]
    right = jnp.concatenate([state.mean - x.mean, state.factor.T], axis=1)
    w = substitute(x.factor, right)
    return Normal(w[:, :cols], w[:, cols:].T)
