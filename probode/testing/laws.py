"""Assertions for the conformance checks: equality up to round-off, and behaviour under the transformations of JAX."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class LawBroken(AssertionError):
    """The error that conformance checks raise; its message states the law that a part does not obey."""


def require_double() -> None:
    """Raises ``RuntimeError`` without double precision: most laws are checked to ten digits."""
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]  # made when JAX is imported
        raise RuntimeError('probode.testing needs double precision: jax.config.update("jax_enable_x64", True).')


def require_kind(part: Any, kind: type) -> None:
    """Raises ``TypeError`` unless ``part`` is an instance of ``kind``."""
    if not isinstance(part, kind):
        raise TypeError(f"This checks a subclass of {kind.__name__}; got {part!r}.")


def hold(condition: Any, law: str, found: str = "") -> None:
    """Raises ``LawBroken`` with the law, and what was found, unless all entries of the condition are true."""
    if not np.all(np.asarray(condition)):
        raise LawBroken(f"{law}." + (f" Found: {found}." if found else ""))


def works(fn: Callable, law: str, kind: type[Exception] = Exception) -> Any:
    """What ``fn()`` returns; raises ``LawBroken`` with the law, and what was found, for an error of that kind in it."""
    try:
        return fn()
    except kind as error:
        found = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise LawBroken(f"{law}. Found: {found}") from error


def equal(got: Any, want: Any, law: str, rtol: float = 1e-9, atol: float = 0.0, what: str = "") -> None:
    """Raises ``LawBroken`` unless two arrays have one shape, are finite, and differ by no more than a tolerance.

    ``rtol``: relative to the largest magnitude in ``want``. ``atol``: absolute; one of both has to be met.
    ``what``: was found, in words.
    """
    got, want = np.asarray(got), np.asarray(want)
    hold(got.shape == want.shape, law, f"shape {got.shape} instead of {want.shape}")
    finite(got, law, what)
    finite(want, law, what, name="what it is compared with")
    if got.size:
        largest, size = np.max(np.abs(got - want)), np.max(np.abs(want))
        absolute = f"an absolute deviation of {largest:.1e}, tolerance {atol:g}"
        if size == 0:
            hold(largest <= atol, law, f"{_then(what)}{absolute}, from zero, in {got.dtype}")
            return
        off = largest / size
        allowed = f"{_then(what)}a relative deviation of {off:.1e}, tolerance {rtol:g}"
        allowed += f", and {absolute}" if atol else ""
        hold(largest <= atol or off <= rtol, law, f"{allowed}, in {got.dtype}")


def finite(tree: Any, law: str, what: str = "", *, name: str = "") -> None:
    """Raises ``LawBroken`` unless all floating-point arrays of a PyTree are finite.

    ``what``: was found, in words. ``name``: of the PyTree, for the message.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if eqx.is_inexact_array_like(leaf):
            leaf, where = np.asarray(leaf), name + jax.tree_util.keystr(path)
            for kind, found in (("NaN", np.isnan(leaf)), ("infinite", np.isinf(leaf))):
                number = f"{np.sum(found)} of {leaf.size} entries" + (f" of {where}" if where else "")
                hold(~found, law, f"{_then(what)}{kind} in {number}, {leaf.dtype}")


def _then(what):
    """Words, and a comma for what follows them, if there are any."""
    return f"{what}, " if what else ""


def has_dtype(tree: Any, dtype: Any, law: str) -> None:
    """Raises ``LawBroken`` unless all floating-point arrays of a PyTree have the given dtype."""
    other = {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)} - {str(jnp.dtype(dtype))}
    hold(not other, law, f"{', '.join(sorted(other))} instead of {jnp.dtype(dtype)}")


def difference_quotient(fn: Callable, step: Any) -> np.ndarray:
    """The derivative at zero of an array-valued function of a number, by central differences of order four."""
    back, backwards, forwards, forth = (np.asarray(fn(k * step)) for k in (-2, -1, 1, 2))
    return np.asarray((back - 8 * backwards + 8 * forwards - forth) / (12 * float(step)))


def scaled(tree: Any, factor: Any) -> Any:
    """A PyTree with all floating-point numbers times a factor."""
    return jax.tree.map(lambda x: x * factor if eqx.is_inexact_array_like(x) else x, tree)


def survives(fn: Callable, part: Any, x: Any, name: str, *, differentiable: bool = True) -> None:
    """Raises ``LawBroken`` unless ``fn(part, x)`` works under ``jit``, ``vmap``, ``jacfwd`` and ``jacrev``.

    - Compiled, it returns the same array, and is traced once for all values of ``x`` and of the part's arrays.
    - A batch over ``x`` is what its members are one by one.
    - If ``differentiable``, derivatives with respect to ``x`` agree with finite differences, in both modes.

    ``x``: a number. ``name``: of what ``fn`` returns, for the messages.
    """
    leaves, tree = jax.tree.flatten(part)
    law = f"New values do not retrace {name}: fields with numbers are arrays (jnp.asarray), or static and never changed"
    for path, leaf in jax.tree_util.tree_leaves_with_path(part):
        hold(not isinstance(leaf, float), law, f"a Python float in the field {jax.tree_util.keystr(path).lstrip('.')}")
    traces = 0

    def counted(part, x):
        nonlocal traces
        traces += 1
        return fn(part, x)

    jitted = eqx.filter_jit(counted)
    plain = fn(part, x)
    branch = f"{name} works under jit, where numbers are not known: write jnp.where(condition, a, b) in place of `if`"
    compiled = works(lambda: jitted(part, x), branch, jax.errors.ConcretizationTypeError)
    equal(compiled, plain, f"{name} gives the same under jit as without", rtol=1e-10, atol=1e-300)
    for factor in (1.0 + 1e-6, 1.0 + 2e-6):
        jitted(scaled(part, factor), x * factor)
    hold(traces == 1, f"New values do not retrace {name}: numbers are arrays, not static fields", f"{traces} traces")
    hold(jax.tree.structure(jax.tree.unflatten(tree, leaves)) == tree, f"{name}: the part is a PyTree")
    xs = x * jnp.array([1.0, 1.1, 0.9])
    of_x = lambda x: fn(part, x)  # noqa: E731
    # Compilation takes most of the time: of a batch and of derivatives together it takes little more than of a batch.
    pushed = (lambda x: jax.jvp(of_x, (x,), (jnp.ones_like(x),))) if differentiable else lambda x: (of_x(x), None)
    lanes, forward = jax.jit(jax.vmap(pushed))(xs)
    alone = jnp.stack([jitted(part, x) for x in xs])
    equal(lanes, alone, f"A batch of {name} under vmap is what its members are alone", rtol=1e-8, atol=1e-12)
    if differentiable:
        expected = difference_quotient(lambda h: jitted(part, x + h), 1e-4 * x)
        scale = max(1.0, float(np.max(np.abs(plain))) / float(abs(x)))
        law = f"The derivative of {name} is that of finite differences"
        equal(forward[0], expected, f"{law}, in forward mode", rtol=1e-5, atol=1e-6 * scale)
        # Of a combination of all entries: the program for every entry by itself would be far larger.
        weights = jnp.reshape(jnp.cos(jnp.arange(plain.size, dtype=plain.dtype)), plain.shape)
        reverse = jax.jit(lambda x: jax.vjp(of_x, x)[1](weights)[0])(x)
        law = f"{law}, in reverse mode"
        equal(reverse, jnp.sum(weights * forward[0]), law, rtol=1e-7, atol=1e-9 * scale * plain.size)


def in_single(part: Any) -> Any:
    """A PyTree with all floating-point numbers as arrays in single precision."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if eqx.is_inexact_array_like(x) else x, part)
