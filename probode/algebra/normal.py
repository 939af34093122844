"""Gaussian distributions in square-root form.

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

from ..util.tracing import P, T
from .linalg import kron_apply, kron_apply_right, product, triangularise


class Normal(eqx.Module):
    """A Gaussian distribution: its mean and a right square root of its covariance, ``cov = factor^T factor``.

    An uncertain initial value, the ``u0`` of ``Solver.solve`` and ``Solver.solve_grid``:

    - ``mean``: as a certain ``u0``, a PyTree ``u``, or the tuple ``(u, ..., u^(k-1))`` for an equation of order ``k``.
    - ``factor``: a PyTree of standard deviations like ``mean``, in the units of ``u``; or, for a mean of ``d`` numbers,
      the ``(d, d)`` right square root of the covariance of the ravelled mean.

    Nothing is checked until it is used. A state inside the solvers, and ``Solution.marginals``, in the layout of the
    factorisation:

    - ``mean``: ``(*batch, dim, cols)``.
    - ``factor``: ``(*batch, rows, dim)``.

    >>> import probode
    >>> probode.Normal({"x": 1.0}, {"x": 0.1})  # a standard deviation
    Normal(mean={'x': 1.0}, factor={'x': 0.1})
    """

    mean: PyTree
    factor: PyTree


def batched(fn: Callable[P, T]) -> Callable[P, T]:
    """``fn``, written for one batch element, mapped over the leading axes of all its arguments.

    The axes are those of the first leaf of the first argument, a mean or a matrix, but for its last two.
    """

    @ft.wraps(fn)
    def wrapped(first, *rest):
        mapped: Callable = fn
        for _ in range(jax.tree.leaves(first)[0].ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(first, *rest)

    return wrapped  # type: ignore[return-value]  # it takes no keywords


@batched
def push(x: Normal, matrix: Float[Array, "p p"]) -> Normal:
    """The distribution of ``kron(A, I) x``, where ``matrix`` is ``A``; its factor is not triangular."""
    return Normal(kron_apply(matrix, x.mean), kron_apply_right(x.factor, matrix))


def pad_rows(factor: Float[Array, "*batch rows p"], rows: int) -> Float[Array, "*batch more p"]:
    """The factor with at least ``rows`` rows: zeros are appended, which leaves the covariance as it is."""
    missing = max(0, rows - factor.shape[-2])
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 2) + [(0, missing), (0, 0)])


def pad(x: Normal, rows: int) -> Normal:
    """The same distribution with at least ``rows`` rows in its factor; states in a loop must have one shape."""
    return Normal(x.mean, pad_rows(x.factor, rows))


@batched
def square(x: Normal) -> Normal:
    """The Gaussian ``x`` with an upper triangular factor of the same covariance, ``(dim, dim)``."""
    return Normal(x.mean, triangularise(None, x.factor))


def certain(mean: Float[Array, "*batch dim cols"]) -> Normal:
    """The Dirac distribution at ``mean``: a factor with zero rows."""
    return Normal(mean, jnp.zeros((*mean.shape[:-2], 0, mean.shape[-2]), mean.dtype))


@batched
def deviation(factor: Float[Array, "rows dim"], coordinates: Float[Array, "rows cols"]) -> Float[Array, "dim cols"]:
    """``factor^T w``: the deviation from the mean of a state with the standard normal coordinates ``w``."""
    return product(factor.T, coordinates)
