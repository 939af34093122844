"""Checks of arguments that users pass, with errors that name the argument and say what it must be.

Known values raise at once, before anything is computed; traced ones raise when the compiled program runs.
"""

import functools as ft
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .failures import stop_if


T = TypeVar("T")


def is_traced(*xs: Any) -> bool:
    """Whether any array in the trees is a tracer, so that its value is not known yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(xs))


def as_float(x: Any, name: str) -> Array | np.ndarray:
    """A real number or array as a floating-point array, a NumPy array where its value is known.

    Raises ``TypeError`` with ``name`` for anything else.
    """
    try:
        x = jnp.asarray(x) if is_traced(x) else np.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or an array, got {x!r}.") from None
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(float)
    raise TypeError(f"{name} must be real, got {x!r}.")


def as_scalar(x: Any, name: str, remedy: str = "") -> Array | np.ndarray:
    """A real number as a floating-point scalar; raises as ``as_float`` does, and ``ValueError`` for other shapes.

    ``remedy``: what is added to the words about the shape.
    """
    x = as_float(x, name)
    if x.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got shape {x.shape}.{remedy}")
    return x


def as_numbers(x: PyTree, name: str, kinds: str, holds: Callable, words: str) -> PyTree:
    """A PyTree of real numbers as arrays; raises ``ValueError`` without any, or unless ``holds`` is true of all.

    ``name``: of the argument, as ``IWP(output_scale)``. ``kinds``: what it may be. ``words``: what ``holds`` means.
    """
    if not jax.tree.leaves(x):
        raise ValueError(f"{name} must be {kinds}, got nothing.")
    field = name[name.index("(") + 1 : -1]

    def checked(x):
        x = as_float(x, name)
        return jnp.asarray(require(x, holds(x), f"{name} must be {words}", **{field: x}))

    return jax.tree.map(checked, x)


def as_integer(x: Any, name: str, smallest: int, largest: int = 2**31 - 1) -> int:
    """``x`` as a Python integer; raises ``ValueError`` unless it is an integer in the range, and not a bool."""
    try:
        value = None if isinstance(x, bool) else operator.index(x)
    except TypeError:
        value = None
    if value is None or not smallest <= value <= largest:
        raise ValueError(f"{name} must be an integer >= {smallest} and <= {largest}, got {x!r}.")
    return value


def require_flag(x: Any, name: str) -> None:
    """Raises ``TypeError`` unless ``x`` is ``True`` or ``False``."""
    if not isinstance(x, bool | np.bool_):
        traced = f" Under jax.jit it is static: jax.jit(..., static_argnames={name!r})." if is_traced(x) else ""
        raise TypeError(f"{name} must be True or False, got {x!r}.{traced}")


def require(x: T, condition: Any, message: str, **got: Any) -> T:
    """``x`` if ``condition`` holds everywhere; raises ``ValueError`` with ``message`` otherwise.

    A traced condition raises when the compiled program runs, if the ``x`` that is returned is used. ``got``: the values
    at fault by name, which are added to the message where they are known.
    """
    if is_traced(condition):
        words = ft.partial(_with_values, message, tuple(got))
        return stop_if(x, jnp.logical_not(jnp.all(condition)), words, tuple(got.values()), ValueError)
    if not np.all(condition):
        raise ValueError(_with_values(message, tuple(got), None if is_traced(got) else tuple(got.values())))
    return x


def _with_values(message, names, values):
    """The message with the values at fault, if there are any and they are known."""
    known = zip(names, values, strict=True) if values else ()
    got = ", ".join(f"{name}={_short(value)}" for name, value in known)
    return f"{message}{', got ' if got else ''}{got}."


def _short(value):
    return f"({', '.join(map(str, value))})" if isinstance(value, tuple) else value


def as_returned(returned: T, kind: type, method: str) -> T:
    """What a method of a part has returned; raises ``TypeError`` with its name unless it is a ``kind``."""
    if not isinstance(returned, kind):
        raise TypeError(f"{method} must return a {kind.__name__}, got {type(returned).__name__}.")
    return returned


def as_triple(returned: Any, method: str, words: str) -> tuple[Any, Any, Any]:
    """The three values that a method of a part has returned; raises ``TypeError`` for anything else."""
    if not (isinstance(returned, tuple) and len(returned) == 3):
        got = f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__
        raise TypeError(f"{method} must return three values ({words}), got {got}.")
    return returned
