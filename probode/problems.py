"""What is solved: ordinary differential equations of any order on PyTree states.

Users write fields on their own PyTrees; the solvers see them through ``flat_field``, on one stack of real vectors.
"""

import inspect
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .checks import as_integer
from .factorisations import Layout


class ODE(eqx.Module):
    """``u^(k) = f(t, u, u', ..., u^(k-1), args)`` with ``k = order``.

    ``vector_field`` is a function or an ``eqx.Module`` called as ``f(t, u, args)`` for ``order=1``, as
    ``f(t, u, du, args)`` for ``order=2``, and so on; it returns a PyTree like ``u``. For ``order >= 2`` the initial
    value is the tuple ``(u, u', ..., u^(k-1))``. Raises ``TypeError`` if the field cannot be called, ``ValueError``
    unless ``order`` is a positive integer.
    """

    vector_field: Callable
    order: int = eqx.field(static=True, default=1, kw_only=True, converter=lambda k: as_integer(k, "ODE(order)", 1))

    def __check_init__(self):
        if not callable(self.vector_field):
            raise TypeError(f"ODE(vector_field) must be callable as f(t, u, args), got {self.vector_field!r}.")

    def split(self, u0: PyTree) -> tuple[PyTree, ...]:
        """The initial value as the tuple ``(u, u', ..., u^(k-1))``; checks structure, shapes and dtypes."""
        if self.order == 1:
            values = (u0,)
        elif isinstance(u0, tuple) and len(u0) == self.order:
            values = u0
        else:
            raise ValueError(
                f"An ODE of order {self.order} needs u0 = (u, u', ...), a tuple of {self.order} states, "
                f"got {type(u0).__name__}{f' of length {len(u0)}' if isinstance(u0, tuple) else ''}."
            )
        values = jax.tree.map(_as_state, values)
        if sum(leaf.size for leaf in jax.tree.leaves(values[0])) == 0:
            raise ValueError("u0 has no numbers in it: there is nothing to solve for.")
        for i, value in enumerate(values[1:], start=1):
            _require_like(value, values[0], f"entry {i} of u0", "entry 0 of u0")
        return values

    def check_field(self, t0: Float[Array, ""], values: tuple[PyTree, ...], args: PyTree):
        """Raises unless the field returns a PyTree like ``u``: structure, shapes and dtypes, without running it."""
        arguments = ", ".join(["t", "u", "du", "ddu"][: self.order + 1] if self.order <= 3 else ["t", "u", "..."])
        try:
            inspect.signature(self.vector_field).bind(t0, *values, args)
        except TypeError as error:
            message = (
                f"The vector field of an ODE of order {self.order} is called as f({arguments}, args), but: {error}."
            )
            raise TypeError(message) from None
        except ValueError:  # a builtin without a signature
            pass
        out = eqx.filter_eval_shape(self.vector_field, t0, *values, args)
        _require_like(out, values[0], "the vector field's output", "u0")


def flat_field(ode: ODE, layout: Layout, args: PyTree) -> Callable:
    """The field as ``f(t, us)`` on a stack ``us`` of shape ``(order, d)``, returning ``(d,)``."""

    def field(t: Float[Array, ""], us: Float[Array, "order d"]) -> Float[Array, " d"]:
        return layout.ravel(ode.vector_field(t, *(layout.unravel(u) for u in us), args))

    return field


def _as_state(x) -> Array:
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"u0 must hold real arrays, got {x!r}.") from None
    if x.dtype in (jnp.float16, jnp.bfloat16):
        raise TypeError(f"u0 has dtype {x.dtype}, which is too short for a solve: use float32 or float64.")
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(x, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError("u0 is complex. Solve for the real and the imaginary part, e.g. as a tuple of two real arrays.")
    raise TypeError(f"u0 has dtype {x.dtype}; states must be floating point, e.g. u0 = jnp.asarray(u0, float).")


def _require_like(x: PyTree, like: PyTree, name: str, like_name: str):
    structure, expected = jax.tree.structure(x), jax.tree.structure(like)
    if structure != expected:
        raise ValueError(f"{name} must have the structure of {like_name}: expected {expected}, got {structure}.")
    for leaf, model in zip(jax.tree.leaves(x), jax.tree.leaves(like), strict=True):
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if shape != jnp.shape(model):
            raise ValueError(f"{name} must have the shape of {like_name}: expected {jnp.shape(model)}, got {shape}.")
        weak = getattr(leaf, "weak_type", isinstance(leaf, float)) and jnp.issubdtype(dtype, jnp.floating)
        if dtype != jnp.result_type(model) and not weak:
            raise ValueError(
                f"{name} must have the dtype of {like_name}: expected {jnp.result_type(model)}, got {dtype}. "
                "Cast constants and args to the dtype of the state."
            )
