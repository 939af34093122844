"""Conditional distributions of an earlier state given a later one (backward kernels of smoothers), in coordinates.

The coordinates of a state are the standard normal ``w`` in ``x = mean + factor^T w``. A smoother keeps the distribution
of an earlier state's coordinates given those of a later one, by blocks of orthogonal matrices.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .linalg import is_written_out, product, safe_norm, substitute, triangularise
from .normal import Normal, batched, pad_rows


class Conditional(eqx.Module):
    """The Gaussian distribution of an earlier state's coordinates given a later one's: a backward kernel of a smoother.

    This is ``p(earlier | later)`` in whitened coordinates. Those of a state are the ``w`` in ``x = mean + factor^T w``:
    given the equations and data up to its time they are standard normal, and there are as many as its factor has rows
    (fewer than ``dim`` where the equation has removed some). Means and factors of the two states are not stored here,
    but in a ``Normal`` each. With the ``p`` coordinates ``w`` of the earlier state and the ``rows`` coordinates ``v``
    of the later one, ``w | v ~ N(shift + cross^T v, noise^T noise)``:

    - ``shift``: the mean of ``w`` for ``v = 0``, ``(*batch, p, cols)``. Equations and data after the earlier state
      change it.
    - ``cross``: its transpose is the matrix of regression coefficients of ``w`` on ``v``; ``(*batch, rows, p)``.
    - ``noise``: right square root of the covariance of ``w`` given ``v``, ``(*batch, q, p)``. It has no rows where
      ``v`` determines ``w``; ``q`` may exceed ``p``, with rows that are not triangularised or zeros as padding.

    In terms of the states, where ``factor'`` can be inverted (a prime marks the later one), this is the kernel of a
    Rauch-Tung-Striebel smoother, ``x | x' ~ N(m + factor^T shift + G (x' - m'), L)`` with the gain
    ``G = factor^T cross^T factor'^-T`` and ``L = (noise factor)^T (noise factor)``. Neither is formed.

    ``*batch``: the axes of the blocks of the factorisation (none under ``Dense``, the components of ``u`` under
    ``BlockDiagonal``). ``cols``: independent columns that share a covariance (the components under ``Isotropic``,
    otherwise one).

    ``cross`` and ``noise`` are blocks of an orthogonal matrix, so that no covariance is inverted, however small it is:
    ``cross^T cross + noise^T noise`` is the identity, or less, as matrices, where later equations or data say something
    of the earlier state (Paige & Saunders 1977, "Least squares estimation of discrete linear dynamic systems
    using orthogonal transformations").

    >>> import jax.numpy as jnp, probode
    >>> state = probode.Normal(jnp.zeros((2, 1)), jnp.eye(2))
    >>> past = probode.Conditional.identity(state)
    >>> past.cross.shape, past.noise.shape  # the later state is the earlier one
    ((2, 2), (0, 2))
    """

    shift: Float[Array, "*batch p cols"]
    cross: Float[Array, "*batch rows p"]
    noise: Float[Array, "*batch q p"]

    @staticmethod
    def identity(x: Normal) -> "Conditional":
        """The conditional of a state given itself, ``w = v``: that of a state which a smoother has just kept."""

        @batched
        def of_one(x):
            rows, cols = x.factor.shape[0], x.mean.shape[1]
            eye = jnp.eye(rows, dtype=x.factor.dtype)
            return Conditional(jnp.zeros((rows, cols), x.mean.dtype), eye, eye[:0])

        return of_one(x)

    def rescaled(self, factor: Float[Array, "*batch 1 1"]) -> "Conditional":
        """The same for states with all covariances multiplied by ``factor^2``."""
        # ``shift`` is in units of standard deviations: divided by the factor it moves the mean by the same amount.
        return Conditional(self.shift / jnp.where(factor > 0, factor, 1), self.cross, self.noise)


def updated_noise(past: Conditional, left: Float[Array, "rows p"]) -> Float[Array, "more p"]:
    """The square root of ``Cov(w | v)`` after a step: that before it, with the rows that its elimination left over."""
    # For few columns, rows that are not triangularised cost less than their elimination.
    few = past.noise.shape[0] == 0 and is_written_out(left.shape[1])
    return left if few else root_of_sum(past.noise, left)


def root_of_sum(root: Float[Array, "q p"], rows: Float[Array, "rows p"]) -> Float[Array, "p p"]:
    """The upper triangular right square root of ``root^T root + rows^T rows``."""
    p = rows.shape[1]
    if root.shape[0] == p and not is_written_out(p):
        return triangularise(root, rows)
    return triangularise(None, jnp.concatenate([root, rows]))


def pad_noise(past: Conditional, rows: int) -> Conditional:
    """``past`` with at least ``rows`` rows in ``noise``: zeros are appended, which leaves the covariance as it is."""
    return Conditional(past.shift, past.cross, pad_rows(past.noise, rows))


def with_square_noise(past: Conditional | None) -> Conditional | None:
    """``past`` with a square ``noise``: the shape that a loop needs, since steps do not change it."""
    return None if past is None else pad_noise(past, past.noise.shape[-1])


@batched
def standard(x: Normal) -> Normal:
    """The standard normal distribution, which the coordinates of ``x`` have given all equations and data so far."""
    rows, cols = x.factor.shape[0], x.mean.shape[1]
    return Normal(jnp.zeros((rows, cols), x.mean.dtype), jnp.eye(rows, dtype=x.factor.dtype))


@batched
def marginalise(later: Normal, past: Conditional) -> Normal:
    """The marginal distribution of the earlier state's coordinates if those of the later one have the given one.

    ``past`` is the conditional between them: this is the backward step of a Rauch-Tung-Striebel smoother.
    """
    mean = past.shift + product(past.cross.T, later.mean)
    return Normal(mean, root_of_sum(past.noise, product(later.factor, past.cross)))


@batched
def draw(past: Conditional, noise: Float[Array, "q cols"], later: Float[Array, "rows cols"]) -> Float[Array, "p cols"]:
    """A sample of the earlier state's coordinates given those of the later one: ``shift + cross^T v + noise^T w``."""
    return past.shift + product(past.cross.T, later) + product(past.noise.T, noise)


@batched
def from_coordinates(coordinates: Normal, x: Normal) -> Normal:
    """The distribution of ``x.mean + x.factor^T w`` for ``w`` with the distribution ``coordinates``.

    It turns what a smoother, or data, have made of the coordinates of a state into the state's own distribution.
    """
    return Normal(x.mean + product(x.factor.T, coordinates.mean), product(coordinates.factor, x.factor))


@batched
def in_coordinates(past: Conditional, coordinates: Normal) -> Conditional:
    """``past`` given new coordinates ``v'`` of the later state, ``v = coordinates.mean + coordinates.factor^T v'``.

    Data give the old coordinates ``v`` the distribution ``coordinates``; the new ones are standard normal again.
    """
    shift = past.shift + product(past.cross.T, coordinates.mean)
    return Conditional(shift, product(coordinates.factor, past.cross), past.noise)


@batched
def coordinates_of(state: Normal, x: Normal) -> Normal:
    """The distribution of the coordinates of ``x`` under which it has the distribution ``state``.

    The inverse of ``from_coordinates``.

    The factor of ``x`` has to be square and upper triangular.
    """
    cols = x.mean.shape[1]
    right = jnp.concatenate([state.mean - x.mean, state.factor.T], axis=1)
    w = substitute(x.factor, right)
    return Normal(w[:, :cols], w[:, cols:].T)


@batched
def determined_coordinates(state: Normal, x: Normal) -> Normal:
    """``coordinates_of`` where the covariance of ``x`` may be singular, as that of a state given an equation is.

    Coordinates that say nothing of the state beyond those before them are zero: they would be round-off, divided by
    round-off.
    """
    pivots, sizes = jnp.abs(jnp.diagonal(x.factor)), safe_norm(x.factor, axis=0)
    told = pivots > jnp.finfo(sizes.dtype).eps ** 0.5 * sizes
    return coordinates_of(state, Normal(x.mean, jnp.where(jnp.diag(~told), 0, x.factor)))
