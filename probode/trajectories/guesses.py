"""First guesses of a solution, and the first mesh."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..posterior.solution import Solution
from ..posterior.trajectory import AbstractPath
from ..util.checks import as_float, is_traced, require
from .collocation import Mesh
from .path import MeshPath


# How many intervals the first mesh has if nothing else is said.
_INTERVALS = 10


class AbstractGuess(eqx.Module):
    """A guess of a solution at any time. A subclass defines ``at``."""

    @abstractmethod
    def at(self, t: Float[Array, ""], k: int, n: int) -> Float[Array, "n d"]:
        """The derivatives of ``u``, the zeroth included; those from the ``k``-th on may be zero if they are not known.

        ``k``: the order of the equation.
        """


class FromFunction(AbstractGuess):
    """The guess that a function of time returns."""

    fn: Callable

    def at(self, t: Float[Array, ""], k: int, n: int) -> Float[Array, "n d"]:
        fn, derivatives = lambda t: ravel_pytree(jax.tree.map(jnp.asarray, self.fn(t)))[0].astype(t.dtype), []

        def derivative(fn):
            return lambda t: jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]

        for _ in range(k):
            derivatives.append(fn(t))
            fn = derivative(fn)
        known = jnp.stack(derivatives)
        return jnp.pad(known, ((0, n - k), (0, 0)))


class FromNodes(AbstractGuess):
    """The guess that is linear between values at given times, which increase or decrease."""

    t: Float[Array, " nodes"]
    u: Float[Array, "nodes d"]

    def at(self, t: Float[Array, ""], k: int, n: int) -> Float[Array, "n d"]:
        sign = jnp.sign(self.t[-1] - self.t[0])
        i = jnp.clip(jnp.searchsorted(sign * self.t, sign * t, side="right") - 1, 0, self.t.size - 2)
        slope = (self.u[i + 1] - self.u[i]) / (self.t[i + 1] - self.t[i])
        value = self.u[i] + (t - self.t[i]) * slope
        known = jnp.stack([value, slope])[:k]
        return jnp.pad(known, ((0, n - known.shape[0]), (0, 0)))


class FromPath(AbstractGuess):
    """The mean of a posterior process, of which all derivatives are known that it has."""

    path: AbstractPath
    layout: Layout

    def at(self, t: Float[Array, ""], k: int, n: int) -> Float[Array, "n d"]:
        states, _, layouts = self.path.evaluate(t[None])
        layout = self.layout if layouts is None else jax.tree.map(lambda x: x[0], layouts)
        us = layout.unpack(states.mean[0])[:n]
        return jnp.pad(us, ((0, n - us.shape[0]), (0, 0)))


def as_guess(guess: Any, t_span: tuple[Any, Any], mesh: Any) -> tuple[PyTree, AbstractGuess]:
    """An example of ``u``, and the guess; raises ``TypeError`` or ``ValueError`` for one that is of no kind known."""
    if isinstance(guess, Solution):
        if not guess.is_dense or guess.t.ndim != 1:
            raise ValueError(
                "guess=Solution needs the steps of one solve, which were not kept: solve with "
                "save_at=SaveAt(dense=True)."
            )
        path, layout = guess.trajectory, guess.layout
        assert path is not None
        interval = path.interval
        if not is_traced(interval, t_span):
            low, high = sorted((float(interval.t0), float(interval.t1)))
            inside = all(low <= float(t) <= high for t in t_span)
            require(low, inside, "guess must be known on all of t_span", t_span=t_span, guess=(low, high))
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), layout.example)
        return example, FromPath(path, layout)
    if callable(guess):
        try:
            out = eqx.filter_eval_shape(lambda t: jax.tree.map(jnp.asarray, guess(t)), jnp.zeros(()))
        except TypeError as raised:
            raise TypeError(
                "guess must be a function of the time alone that returns u, an array, or a Solution."
            ) from raised
        return jax.tree.map(lambda x: jnp.zeros(x.shape, _float(x.dtype)), out), FromFunction(guess)
    leaves = jax.tree.leaves(guess)
    if not leaves:
        raise TypeError(f"guess must be a function of time, an array (nodes, *u.shape) or a Solution, got {guess!r}.")
    values = jax.tree.map(lambda x: jnp.asarray(as_float(x, "guess")), guess)
    numbers = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(values)}
    if len(numbers) != 1 or min(numbers) < 2:
        raise ValueError("guess must have a row for each of at least two nodes, in all of its leaves.")
    (number,) = numbers
    t = jnp.linspace(*t_span, number) if mesh is None else jnp.asarray(as_float(mesh, "mesh"))
    if t.shape != (number,):
        raise ValueError(f"guess has {number} rows, but mesh has shape {t.shape}: there must be a row for each node.")
    u = jax.vmap(lambda u: ravel_pytree(u)[0])(values)
    return jax.tree.map(lambda x: x[0], values), FromNodes(t.astype(u.dtype), u)


def _float(dtype):
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.zeros(()).dtype


def equidistant(t0: Float[Array, ""], t1: Float[Array, ""], number: Array, most: int) -> Mesh:
    """So many intervals of the same length, with room for ``most`` nodes."""
    share = jnp.minimum(jnp.arange(most, dtype=t0.dtype) / number.astype(t0.dtype), 1)
    return Mesh(jnp.where(share < 1, t0 + share * (t1 - t0), t1), jnp.asarray(number, jnp.arange(0).dtype))


def first_mesh(mesh: Any, guess: AbstractGuess, t0: Any, t1: Any, dtype: Any, most: int) -> Mesh:
    """The first mesh: the one given, or that of the guess, or one with nodes at equal distances.

    Raises ``ValueError`` unless a given one leads from ``t0`` to ``t1`` without repeating a time.
    """
    start, end = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    if mesh is not None:
        return _given(mesh, t0, t1, dtype, most)
    if isinstance(guess, FromPath) and isinstance(guess.path, MeshPath) and guess.path.mesh.t.size <= most:
        known = guess.path.mesh
        t = jnp.concatenate([known.t, jnp.broadcast_to(known.t[-1], (most - known.t.size,))])
        same = (known.t[0] == start) & (known.t[-1] == end)
        other = equidistant(start, end, jnp.asarray(_INTERVALS), most)
        return Mesh(jnp.where(same, t, other.t), jnp.where(same, known.number, other.number))
    number = guess.t.size - 1 if isinstance(guess, FromNodes) else _INTERVALS
    if number >= most:
        raise ValueError(f"guess has {number + 1} nodes, more than max_nodes={most}.")
    return equidistant(start, end, jnp.asarray(number), most)


def _given(mesh, t0, t1, dtype, most):
    """The mesh that a user has passed, checked."""
    t = as_float(mesh, "mesh")
    if t.ndim != 1 or not 2 <= t.size <= most:
        raise ValueError(f"mesh must be an array of 2 to max_nodes={most} times, got shape {t.shape}.")
    xp = jnp if is_traced(t, t0, t1) else np
    message = "mesh must lead from t0 to t1 without repeating a time"
    t = t.astype(dtype)
    ordered = (xp.diff(t) * xp.sign(t1 - t0) > 0).all() & (t[0] == t0) & (t[-1] == t1)
    t = jnp.asarray(require(t, ordered, message, mesh=mesh))
    return Mesh(jnp.concatenate([t, jnp.broadcast_to(t[-1], (most - t.size,))]), jnp.asarray(t.size - 1))
