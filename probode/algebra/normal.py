"""Square-root Gaussians.

A Gaussian is a mean ``(dim, cols)`` and a right square root ``(rows, dim)`` of a covariance shared by the columns,
which are independent: ``x = mean + factor^T w`` with standard normal coordinates ``w``, ``(rows, cols)``. Functions
that are ``batched`` are written for one element of a batch, and mapped over the leading axes.
"""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .linalg import kron_apply, kron_apply_right, product, triangularise


class Normal(eqx.Module):
    """A Gaussian by its mean and a right square root of its covariance, ``cov = factor^T factor``.

    Over ``u``: ``mean`` is a PyTree like ``u``; ``factor`` is the ``(d, d)`` square root over the ravelled ``u``, or a
    PyTree of standard deviations like ``u``. Inside the solvers and in ``Solution.marginals``: ``mean`` is
    ``(*batch, dim, cols)`` and ``factor`` is ``(*batch, rows, dim)`` in the layout of the factorisation.

    >>> import probode
    >>> probode.Normal({"x": 1.0}, {"x": 0.1})  # a standard deviation
    Normal(mean={'x': 1.0}, factor={'x': 0.1})
    """

    mean: PyTree
    factor: PyTree


def batched(fn: Callable) -> Callable:
    """Map ``fn``, written for one batch element, over the leading axes of its arguments.

    The first leaf of the first argument, a mean or a matrix, tells how many axes there are.
    """

    @ft.wraps(fn)
    def wrapped(first, *rest):
        mapped = fn
        for _ in range(jax.tree.leaves(first)[0].ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(first, *rest)

    return wrapped


@batched
def push(x: Normal, matrix: Float[Array, "p p"]) -> Normal:
    """``A x``, without noise: the square root of ``A cov A^T`` is not triangularised."""
    return Normal(kron_apply(matrix, x.mean), kron_apply_right(x.factor, matrix))


def pad_rows(factor: Float[Array, "*batch rows p"], rows: int) -> Float[Array, "*batch more p"]:
    """A factor with at least as many rows, the new ones zero."""
    missing = max(0, rows - factor.shape[-2])
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 2) + [(0, missing), (0, 0)])


def pad(x: Normal, rows: int) -> Normal:
    """``x`` with at least as many rows in its factor."""
    return Normal(x.mean, pad_rows(x.factor, rows))


@batched
def square(x: Normal) -> Normal:
    """``x`` with a square, upper triangular factor."""
    return Normal(x.mean, triangularise(None, x.factor))


def certain(mean: Float[Array, "*batch dim cols"]) -> Normal:
    """The Dirac distribution at ``mean``: a factor with zero rows."""
    return Normal(mean, jnp.zeros((*mean.shape[:-2], 0, mean.shape[-2]), mean.dtype))


@batched
def spread(factor: Float[Array, "rows dim"], coordinates: Float[Array, "rows cols"]) -> Float[Array, "dim cols"]:
    """``factor^T w``: what the coordinates ``w`` of a state add to its mean."""
    return product(factor.T, coordinates)
