"""Drifts of linear stochastic differential equations, converted from what users may pass to blocks.

Users pass numbers, one number for each component, matrices, or linear functions. A block is ``(p, p)``: ``p = d`` where
the components are coupled, ``p = 1`` where they are not, and then there is one block for all components or, along a
leading axis of length ``d``, one for each of them.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..util.checks import as_numbers


def as_finite(x: PyTree, name: str) -> PyTree:
    """A PyTree of real numbers or arrays as arrays; raises ``ValueError`` with ``name`` unless they are finite."""
    return as_numbers(x, name, "numbers or a linear function", lambda x: abs(x) < np.inf, "finite")


def blocks_of(x: PyTree, name: str, layout: Layout) -> Float[Array, "*blocks p p"]:
    """A number, one for each component, or a ``(d, d)`` matrix as blocks; raises ``ValueError`` for other shapes."""
    d = layout.size
    if isinstance(x, Array) and x.shape == (d, d):
        layout.require_coupling(f"{name} is a matrix or a function, which couples the components")
        return x.astype(layout.dtype)
    shapes = f"a number, have the structure and shapes of u, or be a ({d}, {d}) matrix"
    return uncoupled_blocks_of(x, name, shapes, layout)


def uncoupled_blocks_of(x: PyTree, name: str, expected: str, layout: Layout) -> Float[Array, "*blocks 1 1"]:
    """A number, or one for each component, as blocks; raises ``ValueError`` for other shapes.

    ``expected``: the forms that the error message lists.
    """
    d = layout.size
    alike = jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, layout.example)
    flat = layout.ravel(x)
    scalar = isinstance(x, Array) and x.ndim == 0
    if flat.size == 1 and (scalar or d == 1):
        return jnp.reshape(flat, (1, 1))
    if not alike:
        raise ValueError(f"{name} must be {expected}: got {jax.tree.map(jnp.shape, x)}.")
    if layout.batch_shape != (d,) and not layout.couples:
        raise ValueError(
            f"{name} has one number for each component, but {type(layout.factorisation).__name__}() has one block for "
            "all of them. Pass a scalar, or use BlockDiagonal() or Dense()."
        )
    return jnp.reshape(flat, (d, 1, 1))


def matrices_of(fn: Callable, number: int, name: str, layout: Layout) -> Float[Array, "{number} d d"]:
    """The matrices of a linear function from ``number`` PyTrees like ``u`` to one like ``u``: its derivative at zero.

    Raises ``ValueError`` for a function that returns something else, or if components are kept independent.
    """
    layout.require_coupling(f"{name} is a matrix or a function, which couples the components")
    example = layout.example
    got = jax.tree.map(jnp.shape, eqx.filter_eval_shape(fn, *[example] * number))
    if got != jax.tree.map(jnp.shape, example):
        arguments = "a PyTree like u" if number == 1 else f"{number} PyTrees like u"
        raise ValueError(
            f"{name} must map {arguments} to one like u: expected {jax.tree.map(jnp.shape, example)}, got {got}."
        )

    def ravelled(us):
        return layout.ravel(fn(*[layout.unravel(u) for u in us]))

    return jnp.moveaxis(jax.jacfwd(ravelled)(jnp.zeros((number, layout.size), layout.dtype)), 0, 1)


def stack_blocks(blocks: list[Float[Array, "..."]], d: int) -> Float[Array, "*blocks m p p"]:
    """The last row of a companion matrix from its blocks, all widened to the smallest form that fits every one."""
    full, each = any(b.ndim == 2 and b.shape != (1, 1) for b in blocks), any(b.ndim == 3 for b in blocks)

    def widen(block):
        if full and block.shape != (d, d):
            return jnp.eye(d, dtype=block.dtype) * jnp.reshape(block, (-1, 1))
        return jnp.broadcast_to(block, (d, 1, 1)) if each and not full else block

    return jnp.stack([widen(block) for block in blocks], axis=-3)
