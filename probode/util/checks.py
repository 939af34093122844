"""Checks of what a user passes in: errors in words, before anything runs where the values are known.

Values that are known raise at once; traced ones become a run-time error through ``eqx.error_if``.
"""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def is_traced(*xs: Any) -> bool:
    """Whether any array in the trees is a tracer, whose value nobody knows yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(xs))


def as_float(x: Any, name: str) -> Array | np.ndarray:
    """A real number or array as floating point, on the host where its value is known; says which part is wrong."""
    try:
        x = jnp.asarray(x) if is_traced(x) else np.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or an array, got {x!r}.") from None
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(float)
    raise TypeError(f"{name} must be real, got {x!r}.")


def as_scalar(x: Any, name: str) -> Array | np.ndarray:
    """As ``as_float``, for one number."""
    x = as_float(x, name)
    if x.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got shape {x.shape}.")
    return x


def as_numbers(x: PyTree, name: str, kinds: str, holds: Callable, words: str) -> PyTree:
    """A number, or a PyTree of them, as arrays of which ``holds`` is true; a ``ValueError`` names the part."""
    if not jax.tree.leaves(x):
        raise ValueError(f"{name} must be {kinds}, got nothing.")
    field = name[name.index("(") + 1 : -1]

    def checked(x):
        x = as_float(x, name)
        return jnp.asarray(require(x, holds(x), f"{name} must be {words}", **{field: x}))

    return jax.tree.map(checked, x)


def as_integer(x: Any, name: str, smallest: int, largest: int = 2**31 - 1) -> int:
    """A Python or NumPy integer in a range; a bool is none."""
    try:
        value = None if isinstance(x, bool) else operator.index(x)
    except TypeError:
        value = None
    if value is None or not smallest <= value <= largest:
        raise ValueError(f"{name} must be an integer >= {smallest} and <= {largest}, got {x!r}.")
    return value


def require(x, condition, message: str, **got):
    """``x``; unless ``condition`` holds a ``ValueError`` with the message (a run-time error where it is traced).

    ``got`` names the values at fault, which are added to the message where they are known.
    """
    if is_traced(condition):
        return eqx.error_if(x, jnp.logical_not(jnp.all(condition)), f"{message}.")
    if not np.all(condition):
        known = "" if is_traced(got) else ", got " + ", ".join(f"{name}={value}" for name, value in got.items())
        raise ValueError(f"{message}{known if got else ''}.")
    return x
