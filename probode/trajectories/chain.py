"""A chain of linear equations: each connects two neighbours, others its two ends, and some unknowns are common to all.

With unknowns ``x_0, ..., x_N`` of ``q`` numbers each and ``p`` common to all, ::

    left_i x_i + right_i x_(i+1) + border_i p = r_i  (i < N),      first x_0 + last x_N + shared p = g.

The inner unknowns are eliminated one after the other by orthogonal transformations, with ``x_0`` and ``p`` kept as a
border; then the system of ``x_N``, ``x_0`` and ``p`` remains. Elimination from one end by substitution (shooting) would
multiply round-off by the growth of solutions over the interval, orthogonal elimination does not, whatever the
conditions at the ends (Wright 1992, "Stable parallel algorithms for two-point boundary value problems"; Paige &
Saunders 1977, "Least squares estimation of discrete linear dynamic systems using orthogonal transformations").

Axes: ``rows``, room for intervals, of which there are ``number``; ``q``; ``p`` and ``b = q + p``; ``e = 2q + p``.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..algebra.linalg import orthogonal, product, solve, solve_upper, triangularise
from .rows import scan_rows


class Links(eqx.Module):
    """The equations between neighbours: their coefficients, without the right-hand sides."""

    left: Float[Array, "rows q q"]
    right: Float[Array, "rows q q"]
    border: Float[Array, "rows q p"]
    number: Int[Array, ""]


class Ends(eqx.Module):
    """The equations at the ends, as many as unknowns are left, ``c = q + p``."""

    first: Float[Array, "c q"]
    last: Float[Array, "c q"]
    shared: Float[Array, "c p"]


class Unknowns(eqx.Module):
    """A solution, or several as columns: ``inner`` at the nodes ``0 .. N``, ``common`` to all."""

    inner: Float[Array, "nodes q cols"]
    common: Float[Array, "p cols"]


class Chain(eqx.Module):
    """The eliminated equations, from which solutions for any right-hand sides follow.

    Row ``i`` eliminates node ``i + 1``. With the QR decomposition ``Q [R; 0]`` of its coefficients in the two equations
    that it is in, ``y = (x_0, p)`` and ``top`` the upper part of the rotated right-hand side of the two,
    ``x = R^-1 top - following x_next - border y``:

    - ``rotation``: ``Q^T``; ``inverse``: ``R^-1``.
    - ``following``, ``border``: ``R^-1`` times the upper parts of the rotated coefficients of the next node and of
      ``y``.
    - ``end``: the matrix of the last system, for ``(x_N, y)``.
    - ``conditioning``: the smallest over the largest pivot of that matrix, with rows of length one; zero for a singular
      problem.
    - ``number``: of intervals. ``differentiable``: as for ``eliminated``.
    """

    rotation: Float[Array, "rows two_q two_q"]
    inverse: Float[Array, "rows q q"]
    following: Float[Array, "rows q q"]
    border: Float[Array, "rows q b"]
    end: Float[Array, "e e"]
    conditioning: Float[Array, ""]
    number: Int[Array, ""]
    differentiable: bool = eqx.field(static=True)

    def solve(self, links: Float[Array, "rows q cols"], ends: Float[Array, "c cols"]) -> Unknowns:
        """The unknowns for right-hand sides; linear in these."""
        q, cols = links.shape[1:]

        def down(r, x):
            rotation, own = x
            both = product(rotation, jnp.concatenate([r, own]))
            return both[q:], both[:q]

        inner = self.number - 1
        rest, tops = scan_rows(down, links[0], (self.rotation, links[1:]), inner, differentiable=self.differentiable)
        end = solve(self.end, jnp.concatenate([rest, ends]))
        last, y = end[:q], end[q:]

        def up(later, x):
            inverse, following, border, top = x
            here = product(inverse, top) - product(following, later) - product(border, y)
            return here, here

        backwards = (self.inverse, self.following, self.border, tops)
        _, xs = scan_rows(up, last, backwards, inner, reverse=True, differentiable=self.differentiable)
        xs = jnp.concatenate([y[None, :q], xs, jnp.zeros((1, q, cols), xs.dtype)])
        xs = lax.dynamic_update_index_in_dim(xs, last, self.number, 0)
        return Unknowns(xs, y[q:])

    def roots(self) -> tuple[Float[Array, "rows more two_q"], Float[Array, "b b"]]:
        """Right square roots of covariances, if the equations between neighbours hold up to standard normal noise.

        Of the unknowns of every two neighbours, in the order of the chain, and of ``(x_0, p)``. The equations at the
        ends hold exactly.
        """
        q, e = self.inverse.shape[-1], self.end.shape[0]
        # The last q equations that were eliminated have noise, those at the ends none.
        shared = solve(self.end, jnp.eye(e, q, dtype=self.end.dtype)).T
        root = triangularise(None, jnp.concatenate([shared, jnp.zeros((e - q, e), shared.dtype)]))

        def up(root, x):
            inverse, following, border = x
            both = -product(root, jnp.concatenate([following, border], axis=1).T)
            pair = jnp.concatenate(
                [
                    jnp.concatenate([inverse.T, jnp.zeros_like(inverse)], axis=1),
                    jnp.concatenate([both, root[:, :q]], axis=1),
                ]
            )
            own = jnp.concatenate([inverse.T, jnp.zeros((q, e - q), inverse.dtype)], axis=1)
            return triangularise(None, jnp.concatenate([own, jnp.concatenate([both, root[:, q:]], axis=1)])), pair

        backwards = self.inverse, self.following, self.border
        root, pairs = scan_rows(up, root, backwards, self.number - 1, reverse=True, differentiable=self.differentiable)
        first = jnp.concatenate([root[:, q : 2 * q], root[:, :q]], axis=1)
        first = jnp.concatenate([first, jnp.zeros((q, 2 * q), first.dtype)])
        return jnp.concatenate([first[None], pairs]), triangularise(None, root[:, q:])


def eliminated(links: Links, ends: Ends, *, differentiable: bool = False) -> Chain:
    """The ``Chain`` of a system. ``differentiable``: whether it has derivatives with respect to the coefficients."""
    q = links.left.shape[-1]

    def down(carry, x):
        before, border = carry
        left, right, own = x
        rotation, triangle = orthogonal(jnp.concatenate([before, left]))
        rotation = rotation.T
        both = product(rotation, jnp.concatenate([jnp.zeros_like(right), right]))
        own = jnp.pad(own, ((0, 0), (q, 0)))
        borders = product(rotation, jnp.concatenate([border, own]))
        inverse = solve_upper(triangle, jnp.eye(q, dtype=triangle.dtype))
        kept = rotation, inverse, product(inverse, both[:q]), product(inverse, borders[:q])
        return (both[q:], borders[q:]), kept

    init = links.right[0], jnp.concatenate([links.left[0], links.border[0]], axis=1)
    inner = links.left[1:], links.right[1:], links.border[1:]
    (before, border), kept = scan_rows(down, init, inner, links.number - 1, differentiable=differentiable)
    condition = jnp.concatenate([ends.last, ends.first, ends.shared], axis=1)
    end = jnp.concatenate([jnp.concatenate([before, border], axis=1), condition])
    pivots = jnp.diagonal(triangularise(None, _with_unit_rows(lax.stop_gradient(end))))
    conditioning = jnp.min(pivots) / jnp.max(pivots)
    rotation, inverse, following, beside = kept
    return Chain(rotation, inverse, following, beside, end, conditioning, links.number, differentiable)


def _with_unit_rows(matrix):
    size = jnp.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / jnp.where(size > 0, size, 1)


def is_singular(chain: Chain, smallest: float = 0.0) -> Bool[Array, ""]:
    """Whether the conditions do not determine a solution: up to round-off, or to a ``smallest`` pivot."""
    return ~(chain.conditioning > max(100 * float(jnp.finfo(chain.end.dtype).eps), smallest))
