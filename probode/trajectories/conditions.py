"""The conditions at the ends of a boundary value problem, as functions of flat arrays."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from ..algebra.factorisations import Layout
from ..algebra.normal import Normal
from .collocation import Course


class Conditions(eqx.Module):
    """The residuals ``boundary(ua, ub, args)`` of an equation of order ``k``, and the noise of those that have any."""

    function: Callable
    with_parameters: Callable
    layout: Layout
    k: int = eqx.field(static=True)

    def __call__(
        self, first: tuple[Float[Array, " d"], ...], last: tuple[Float[Array, " d"], ...], p: Float[Array, " P"]
    ) -> tuple[Float[Array, " c"], Float[Array, "N c"]]:
        """The residuals, and a right square root of the covariance of those that hold up to a deviation."""
        values, roots = [], []
        for leaf in jax.tree.leaves(self._returned(first, last, p), is_leaf=_is_normal):
            value = ravel_pytree(leaf.mean if _is_normal(leaf) else leaf)[0]
            values.append(value.astype(self.layout.dtype))
            roots.append(_root(leaf, value.size).astype(self.layout.dtype))
        c = sum(value.size for value in values)
        rows, at = [], 0
        for root in roots:
            rows.append(jnp.pad(root, ((0, 0), (at, c - at - root.shape[1]))))
            at += root.shape[1]
        return jnp.concatenate(values), jnp.concatenate(rows)

    def noise(self, course: Course, number: Int[Array, ""]) -> Float[Array, "N c"]:
        """A right square root of the covariance of the conditions, at the ends of a course."""
        x = course.states
        return self(tuple(x[0, : self.k]), tuple(x[number, : self.k]), course.parameters)[1]

    def check(self, p: Float[Array, " P"]) -> None:
        """Raises ``ValueError`` unless there are as many conditions as unknowns, ``TypeError`` unless they are real."""
        zeros = (jnp.zeros(self.layout.size, self.layout.dtype),) * self.k
        try:
            out = eqx.filter_eval_shape(self._returned, zeros, zeros, p)
        except Exception as raised:
            given = "u at both ends" if self.k == 1 else f"tuples of u and {self.k - 1} derivatives at both ends"
            raised.add_note(f"boundary was called as boundary(ua, ub, args), with {given}.")
            raise
        leaves = [x.mean if _is_normal(x) else x for x in jax.tree.leaves(out, is_leaf=_is_normal)]
        numbers = jax.tree.leaves(leaves)
        if not all(hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) for x in numbers):
            raise TypeError("boundary must return a PyTree of real arrays, each zero where its condition holds.")
        got, needed = sum(x.size for x in numbers), self.k * self.layout.size + p.size
        if got != needed:
            what = f"{self.layout.size} numbers in u" + (f", times order {self.k}" if self.k > 1 else "")
            what += f", and {p.size} in parameters" if p.size else ""
            raise ValueError(
                f"boundary must return as many numbers as there are conditions, {needed} ({what}), got {got}."
            )

    def _returned(self, first, last, p):
        ua, ub = (tuple(self.layout.unravel(u) for u in us) for us in (first, last))
        if self.k == 1:
            ua, ub = ua[0], ub[0]
        return self.function(ua, ub, self.with_parameters(p))


def _is_normal(x):
    return isinstance(x, Normal)


def _root(leaf, size):
    """A right square root of the covariance of a leaf, ``(rows, size)``."""
    if not _is_normal(leaf):
        return jnp.zeros((0, size))
    mean, factor = leaf.mean, leaf.factor
    if jax.tree.structure(factor) == jax.tree.structure(mean):
        pairs = list(zip(jax.tree.leaves(factor), jax.tree.leaves(mean), strict=True))
        if all(jnp.ndim(std) == 0 or jnp.shape(std) == jnp.shape(m) for std, m in pairs):
            stds = [jnp.ravel(jnp.broadcast_to(jnp.asarray(std, float), jnp.shape(m))) for std, m in pairs]
            return jnp.diag(jnp.concatenate(stds))
    root = jnp.asarray(factor)
    if root.ndim != 2 or root.shape[1] != size:
        raise ValueError(
            "Normal(residual, factor) in boundary: factor must be standard deviations like the residual, or a right "
            f"square root (rows, {size}) of its covariance, got shape {root.shape}."
        )
    return root
