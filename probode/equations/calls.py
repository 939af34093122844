"""The first call of a user's function: what it returns, and words for what goes wrong in it.

An error inside of a vector field is the user's own and stays as it is; a note says how the function was called and, for
the mistakes that are made most often under JAX, what to write.
"""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


_BRANCH = "The value of t or u is not known when the program is made: write jnp.where(condition, a, b), not `if`."
_NUMPY = "NumPy knows no traced arrays: write jax.numpy, as jnp.sin(u), jnp.array([...]) or jnp.stack([...])."
_NUMBER = "t and u are no Python numbers: write jnp.sin(u), not math.sin(u), and leave out float(), int() and .item()."
_INDEX = "t and u cannot be an index or a length: write jnp.take, jnp.where or jax.lax.fori_loop."
# The first kind that fits; all of JAX's but the last one are subclasses of it.
_ADVICE = (
    (jax.errors.TracerBoolConversionError, _BRANCH),
    (jax.errors.TracerArrayConversionError, _NUMPY),
    (jax.errors.TracerIntegerConversionError, _INDEX),
    (jax.errors.ConcretizationTypeError, _NUMBER),
)


def output_of(fn: Callable, name: str, letter: str, t0: Any, values: tuple[PyTree, ...], args: PyTree) -> PyTree:
    """Shapes and dtypes of ``fn(t0, *values, args)``, of which nothing is computed.

    Raises ``TypeError`` unless it can be called so; errors from within get a note. ``name``: of the function;
    ``letter``: in the formula of its call.
    """
    form = _form(letter, len(values))
    _require_signature(fn, name, form, t0, values, args)
    try:
        out = eqx.filter_eval_shape(fn, t0, *values, args)
    except Exception as raised:
        raised.add_note(f"{name} was called as {form} with {_given(t0, values, args)}.{_advice(raised, values, args)}")
        raise
    for leaf in jax.tree.leaves(out):
        if not eqx.is_array_like(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{name} must return arrays, got {leaf!r}.")
    return out


def require_like(x: PyTree, like: PyTree, name: str, like_name: str, scalar: str = "") -> None:
    """Raises ``ValueError`` unless a tree has the structure, shapes and dtypes of another.

    ``name``, ``like_name``: for the words. ``scalar``: what is added to them for a number in place of an array.
    """
    structure, expected = jax.tree.structure(x), jax.tree.structure(like)
    if structure != expected:
        remedy = ""
        if x is None:
            remedy = " Does the function return anything?"
        elif expected == jax.tree.structure(0):
            remedy = " Return one array, as jnp.stack([...])."
        elif structure == jax.tree.structure(0):
            remedy = f" Return {_shapes(like)}, or make {like_name} one array, as jnp.asarray({like_name})."
        elif isinstance(x, list | tuple) and isinstance(like, list | tuple):
            remedy = f" A product with a list repeats it: make {like_name} one array, as jnp.asarray({like_name})."
        got = f"expected {_shapes(like)}, got {_shapes(x)}"
        raise ValueError(f"{name} must have the structure of {like_name}: {got}.{remedy}")
    for leaf, model in zip(jax.tree.leaves(x), jax.tree.leaves(like), strict=True):
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if shape != jnp.shape(model):
            got = f"expected {jnp.shape(model)}, got {shape}.{'' if shape else scalar}"
            raise ValueError(f"{name} must have the shape of {like_name}: {got}")
        weak = getattr(leaf, "weak_type", isinstance(leaf, float)) and jnp.issubdtype(dtype, jnp.floating)
        if dtype != jnp.result_type(model) and not weak:
            raise ValueError(
                f"{name} must have the dtype of {like_name}: expected {jnp.result_type(model)}, got {dtype}. "
                "Cast constants and args to the dtype of the state."
            )


def _form(letter, number):
    names = ["t", "u", "du", "ddu"][: number + 1] if number <= 3 else ["t", "u", "..."]
    return f"{letter}({', '.join(names)}, args)"


def _require_signature(fn, name, form, t0, values, args):
    try:
        inspect.signature(fn).bind(t0, *values, args)
    except TypeError as error:
        remedy = " Parameters are one argument, args, which may stay unused."
        if isinstance(fn, eqx.Module):
            remedy = f" Wrap it: lambda {form[2:-1]}: {type(fn).__name__.lower()}(...)."
        raise TypeError(f"{name} is called as {form}, but: {error}.{remedy}") from None
    except ValueError:  # a builtin without a signature
        pass


def _given(t0, values, args):
    names = ["u", "du", "ddu"] if len(values) <= 3 else [f"u^({i})" for i in range(len(values))]
    words = [f"{name}={_shapes(value)}" for name, value in zip(names, values, strict=False)]
    return ", ".join([f"t={_shapes(t0)}", *words, f"args={_shapes(args)}"])


def _shapes(tree):
    return " ".join(eqx.tree_pformat(tree, struct_as_array=True).split())


def _advice(error, values, args):
    found = [words for kind, words in _ADVICE if isinstance(error, kind)][:1]
    if args is None and isinstance(error, TypeError) and "None" in str(error):
        found = ["Nothing was passed for args: solve(..., args=...)."]
    elif isinstance(error, TypeError | IndexError) and isinstance(values[0], list | tuple):
        found = ["u has the structure of u0: for an array, pass u0 = jnp.asarray(u0)."]
    elif isinstance(error, TypeError) and isinstance(args, list | tuple) and type(args).__name__ in str(error):
        found = ["args is passed as it is, in one argument: unpack it, as in `rate, scale = args`."]
    elif isinstance(error, IndexError) and jnp.ndim(jax.tree.leaves(values[0])[0]) > 0:
        found = ["The time comes first, then u."]
    elif "setting an array element" in str(error):
        found = [_NUMPY]
    elif "converted to a scalar index" in str(error):
        found = [_INDEX]
    return "".join(f" {words}" for words in found)
