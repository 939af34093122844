"""Loops over the first rows of arrays that have room for more.

A mesh has as many nodes as a problem needs, its arrays as many rows as it may have at most. ``differentiable``: whether
the loop has a derivative in both modes. Such a loop skips blocks of rows that are not needed; otherwise it ends at the
last row, which costs less.
"""

from collections.abc import Callable

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree


_BLOCK = 16


def scan_rows(
    fn: Callable,
    init: PyTree,
    xs: PyTree,
    number: Int[Array, ""],
    *,
    reverse: bool = False,
    differentiable: bool = False,
) -> tuple[PyTree, PyTree]:
    """``lax.scan(fn, init, xs)`` over the first ``number`` rows of ``xs``; the other rows of its output are zero."""
    rows = jax.tree.leaves(xs)[0].shape[0]
    row = lambda tree, i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)  # noqa: E731
    out = jax.tree.map(lambda y: jnp.zeros((rows, *y.shape), y.dtype), jax.eval_shape(lambda: fn(init, row(xs, 0))[1]))
    if differentiable:
        return _scan_in_blocks(fn, init, xs, number, out, reverse)

    def body(k, carry):
        state, ys = carry
        i = number - 1 - k if reverse else k
        state, y = fn(state, row(xs, i))
        return state, jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, i, 0), ys, y)

    return lax.fori_loop(0, jnp.minimum(number, rows), body, (init, out))


def map_rows(fn: Callable, xs: PyTree, number: Int[Array, ""], *, differentiable: bool = False) -> PyTree:
    """``jax.vmap(fn)(xs)`` for the first ``number`` rows of ``xs``; others are zero, or as if they were among these."""
    rows = jax.tree.leaves(xs)[0].shape[0]
    xs, blocks = _in_blocks(xs, rows)
    needed = (number + _BLOCK - 1) // _BLOCK
    _, out = scan_rows(lambda c, x: (c, jax.vmap(fn)(x)), None, xs, needed, differentiable=differentiable)
    return jax.tree.map(lambda y: jnp.reshape(y, (blocks * _BLOCK, *y.shape[2:]))[:rows], out)


def _in_blocks(xs, rows):
    blocks = -(-rows // _BLOCK)

    def one(x):
        # The last row is repeated: zeros need not be arguments at which a function is finite.
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (blocks * _BLOCK - rows, *x.shape[1:]))])
        return jnp.reshape(x, (blocks, _BLOCK, *x.shape[1:]))

    return jax.tree.map(one, xs), blocks


def _scan_in_blocks(fn, init, xs, number, out, reverse):
    rows = jax.tree.leaves(xs)[0].shape[0]
    (xs, real), blocks = _in_blocks((xs, jnp.arange(rows)), rows)
    padded = jnp.arange(blocks * _BLOCK).reshape(blocks, _BLOCK) >= rows
    real = (real < number) & ~padded
    nothing = jax.tree.map(lambda y: jnp.zeros_like(y[0]), out)

    # Of several lanes all do what one of them has to: a ``cond`` of a batch would become a ``select``.
    def one(state, x):
        x, is_real = x

        def do(state):
            return jax.tree.map(lambda a, b: jnp.where(is_real, a, b), fn(state, x), (state, nothing))

        return lax.cond(eqxi.unvmap_any(is_real), do, lambda state: (state, nothing), state)

    def block(state, x):
        skipped = jax.tree.map(lambda y: jnp.zeros((_BLOCK, *y.shape), y.dtype), nothing)
        return lax.cond(
            eqxi.unvmap_any(x[1]),
            lambda state: lax.scan(one, state, x, reverse=reverse),
            lambda state: (state, skipped),
            state,
        )

    state, ys = lax.scan(block, init, (xs, real), reverse=reverse)
    return state, jax.tree.map(lambda y: jnp.reshape(y, (blocks * _BLOCK, *y.shape[2:]))[:rows], ys)
