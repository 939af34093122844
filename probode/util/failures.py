"""Errors that depend on values, also on those that are known only when a compiled program runs.

Their text is made on the host, from the values. A compiled program hands on a text alone, after the frames of all
callers, which fill pages in a notebook; equinox's ``error_if`` adds frames and advice. Here it is three lines.
"""

import os
import types
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import PyTree


T = TypeVar("T")


def stop_if(x: T, failed: Any, words: Callable, facts: PyTree, kind: type[Exception] = RuntimeError) -> T:
    """``x`` itself; raises ``kind(words(facts))`` if ``failed``, a bool, is true.

    Where ``failed`` is known, as outside of ``jax.jit``, it raises at once. Elsewhere the compiled program raises, if
    the ``x`` that is returned is used: JAX's ``RuntimeError``, or its ``ValueError`` where the program has run beside
    Python, which end in the same words. Under ``jax.vmap`` it raises if any lane has failed, for the first one.
    ``words`` gets the facts, a PyTree of arrays, as NumPy arrays; ``None`` where they are not known.
    """
    failed, facts = jax.tree.map(lambda v: lax.stop_gradient(v) if isinstance(v, Tracer) else v, (failed, facts))
    with jax.ensure_compile_time_eval():
        anywhere = eqxi.unvmap_any(failed) if isinstance(failed, Tracer) else np.any(failed)
    if not isinstance(anywhere, Tracer):
        if anywhere:
            raise kind(_text(words, *_known(failed, facts)))
        return x
    if os.environ.get("EQX_ON_ERROR", "raise") != "raise":
        return eqx.error_if(x, anywhere, words(None))
    arrays, rest = eqx.partition(x, eqx.is_array)
    values = jax.tree.map(jnp.asarray, (failed, facts))
    return eqx.combine(_guarded(arrays, anywhere, values, words=words, kind=kind), rest)


@eqx.filter_custom_jvp
def _guarded(arrays, anywhere, values, *, words, kind):
    like = jax.eval_shape(lambda: arrays)

    def tell(values):
        raise _without_callers(kind(_text(words, *values)))

    def stop(arrays, values):
        # All lanes at once, so that the words can say which have failed.
        return jax.pure_callback(tell, like, values, vmap_method="broadcast_all")

    return lax.cond(anywhere, stop, lambda arrays, values: arrays, arrays, values)


@_guarded.def_jvp
def _(primals, tangents, *, words, kind):
    # Also in a program that uses the derivative alone.
    one = _guarded(jnp.ones(()), *primals[1:], words=words, kind=kind)
    tangent = jax.tree.map(lambda dx: dx * one.astype(dx.dtype), tangents[0])
    return _guarded(*primals, words=words, kind=kind), tangent


def _known(failed, facts):
    """The values with those of all lanes of ``jax.vmap``, whose leading axes they have; ``None`` in a program."""
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((failed, facts))):
        return failed, facts
    seen = []

    def see(values):
        seen.append(values)
        return np.zeros(np.shape(values[0]), bool)

    # Outside of a compiled program it runs at once.
    done = jax.pure_callback(
        see, jax.ShapeDtypeStruct(jnp.shape(failed), bool), (failed, facts), vmap_method="broadcast_all"
    )
    with jax.ensure_compile_time_eval():
        jax.block_until_ready(eqxi.unvmap_any(done))
    return seen[0] if seen else (None, None)


def _text(words, failed, facts):
    """The words for the first lane that has failed, and which one that is."""
    if failed is None or np.ndim(failed) == 0:
        return words(facts if facts is None else jax.tree.map(np.asarray, facts))
    failed = np.asarray(failed)
    lane = tuple(int(i) for i in np.argwhere(failed)[0])
    number = lane[0] if len(lane) == 1 else lane
    words = words(jax.tree.map(lambda x: np.asarray(np.asarray(x)[lane]), facts))
    return f"{words} (In lane {number}; {int(np.sum(failed))} of {failed.size} lanes failed.)"


def _without_callers(raised):
    """The exception with a traceback that begins nowhere: JAX prints the last frame with all that have called it."""

    def compiled_program():
        yield

    frame = compiled_program().gi_frame
    return raised.with_traceback(types.TracebackType(None, frame, 0, frame.f_lineno))
