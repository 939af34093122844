"""Checks of the output scale of a prior."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..util.checks import as_float, as_numbers, is_traced, require


def as_positive(x: PyTree, name: str) -> PyTree:
    """The numbers of a PyTree as arrays; raises ``ValueError`` with ``name`` unless all are finite and positive."""
    kinds = "a number or a PyTree of numbers like u"
    return as_numbers(x, name, kinds, lambda x: (x > 0) & (x < np.inf), "finite and positive")


def as_output_scale(x: PyTree, name: str) -> PyTree:
    """An output scale as arrays: positive numbers, or a square matrix of any finite numbers that has full rank.

    Raises ``ValueError`` with ``name`` otherwise.
    """
    square = jax.tree.structure(x) == jax.tree.structure(0) and len(shape := np.shape(x)) == 2 and shape[0] == shape[1]
    if not square:
        return as_positive(x, name)
    x = as_float(x, name)
    x = require(x, abs(x) < np.inf, f"{name} must be finite", output_scale=x)
    # A square array of positive numbers may also hold one number for each component of a square u, which the first
    # step decides: its rank must not be checked here.
    if not is_traced(x) and not (x > 0).all():
        # The rank is that of the correlations: components may have different units.
        size = np.linalg.norm(x, axis=0)
        rank = np.linalg.matrix_rank(x / np.where(size > 0, size, 1))
        require(x, rank == len(x), f"{name}, a matrix, must have full rank", rank=rank, output_scale=x)
    return jnp.asarray(x)
