"""How functions are traced: compiled in full precision, once for all iterations of a loop, again for a derivative."""

import functools as ft
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
from jaxtyping import PyTree


P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def full_precision() -> Iterator[None]:
    """A context, or a decorator, in which matrix products have the full precision of their numbers.

    GPUs and TPUs round the factors of a product to ten bits or less by default. In the vector field of a linear
    equation these errors exceed the tolerance however short the step. A precision that the user has set
    (``jax.default_matmul_precision``) is kept. Rules of custom derivatives need it, too: JAX traces them later.
    """
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # made when JAX is imported
    with jax.default_matmul_precision("highest" if chosen is None else chosen):
        yield


def compiled(fn: Callable[P, T]) -> Callable[P, T]:
    """``equinox.filter_jit(fn)`` in ``full_precision``."""

    @ft.wraps(fn)
    def precise(*args, **kwargs):
        with full_precision():
            args, kwargs = _within_mesh((args, kwargs))
            return fn(*args, **kwargs)

    return eqx.filter_jit(precise)


def traced_once(fn: Callable, *args: PyTree) -> Any:
    """The function as a PyTree that holds what it closes over: for arguments of these shapes, traced here.

    So it goes through a custom derivative, with a derivative for what users' functions close over, too.
    """
    # In a mesh of devices arguments that are constants, or shapes alone, would not have the type of those in a loop.
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, args)
    converted = eqx.filter_closure_convert(fn, *_within_mesh(like))
    return eqx.Partial(_with_arrays, converted)


def _with_arrays(fn, *args):
    # Results that are known when the function is traced would be numbers of NumPy.
    return jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, fn(*args))


def _within_mesh(tree):
    """The tree, where a mesh of devices is at hand (``jax.set_mesh``, ``shard_map``, ``pmap``), with all arrays in it.

    An array from outside of the mesh has another type than what operations return, also for itself as the initial value
    of a loop, and for functions that were traced with it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    outside = lambda x: eqx.is_array(x) and jax.typeof(x).sharding.mesh.empty  # noqa: E731
    return jax.tree.map(lambda x: jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if outside(x) else x, tree)


def computed_again(fn: Callable) -> Callable:
    """The function, of which a derivative in reverse mode keeps nothing but the inputs, and computes the rest again."""
    # In the body of a loop nothing can be merged with what was computed before: barriers would only cost time.
    return jax.checkpoint(fn, prevent_cse=False)


def depends_on(fn: Callable, x: PyTree) -> bool:
    """Whether the value of ``fn(x)`` may depend on ``x``: whether any operation on its way uses it."""
    jaxpr = jax.make_jaxpr(fn)(x)
    return any(_reaches(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.invars)))


def _reaches(jaxpr, inputs):
    """Which results of a program depend on those of its inputs that are marked."""
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    is_marked = lambda atom: not isinstance(atom, jax.extend.core.Literal) and atom in marked  # noqa: E731
    for eqn in jaxpr.eqns:
        inside = [is_marked(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(inside) and len(inner.outvars) == len(eqn.outvars):
            # A function that is called, as one under jax.jit, may not use all that it is given. (A loop hands on.)
            called = eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
            outside = _reaches(inner, inside) if called else [any(inside)] * len(eqn.outvars)
        else:
            outside = [any(inside)] * len(eqn.outvars)
        marked.update(var for var, mark in zip(eqn.outvars, outside, strict=True) if mark)
    return [is_marked(atom) for atom in jaxpr.outvars]
