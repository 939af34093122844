"""Data: noisy observations of the solution at given times, and what a Gaussian state learns from them.

An observation of ``x = mean + factor^T w`` is one of the standard normal coordinates ``w``: in these, and with noise,
nothing is ever singular, whatever the covariance of ``x``. (The square-root form of the Kalman update: Kaminski, Bryson
& Schmidt 1971.) Axes: ``times`` of the data, ``m`` numbers seen at each of them.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .checks import as_float, as_integer, require
from .factorisations import Layout
from .gaussians import Linearisation, Normal, batched
from .jacobians import ExactJacobian
from .linalg import eliminate, product, substitute


class Observations(eqx.Module):
    """Values ``y_i = h(t_i, u(t_i), args) + noise`` seen at the times ``ts``.

    ``values``: an array, or a PyTree of arrays, with a leading axis of times. ``noise``: the standard deviation of all
    numbers, or one for each as a PyTree like the values of one time, or the ``(m, m)`` right square root of their
    covariance. ``observe``: what is seen, called as ``h(t, u, args)``, with ``order=1`` as ``h(t, u, du, args)`` and so
    on; ``u`` itself by default. It is linearised where the solver believes the solution to be. ``mask``: which values
    there are, of shape ``(times,)`` or like ``values``; the others are ignored.

    Times are increasing or decreasing, as in the solve that uses them; what was seen at one time goes into one row.
    Raises ``TypeError`` or ``ValueError`` for times that are not such, values or masks of other shapes, values that are
    neither finite nor masked, noise that is not positive.
    """

    ts: Float[Array, " times"]
    values: Float[Array, "times m"]
    noise: Float[Array, "..."]
    mask: Bool[Array, "times m"]
    observe: Callable | None
    order: int = eqx.field(static=True)
    structure: Any = eqx.field(static=True)
    whole_times: bool = eqx.field(static=True)

    def __init__(
        self,
        ts: Any,
        values: PyTree,
        noise: Any,
        *,
        observe: Any = None,
        order: Any = 0,
        mask: Any = None,
    ):
        ts = as_float(ts, "Observations(ts)")
        if ts.ndim != 1 or ts.size == 0:
            raise ValueError(f"Observations(ts) must be an array of times of shape (times,), got shape {ts.shape}.")
        steps = ts[1:] - ts[:-1]
        ordered = ((steps > 0).all() | (steps < 0).all()) & (abs(ts) < np.inf).all()
        message = "Observations(ts) must be finite and increasing or decreasing; what is seen at one time is one row"
        self.ts = jnp.asarray(require(ts, ordered, message))
        values = jax.tree.map(lambda x: as_float(x, "Observations(values)"), values)
        shapes = jax.tree.map(np.shape, values)
        if not jax.tree.leaves(values) or any(x.shape[:1] != ts.shape for x in jax.tree.leaves(values)):
            raise ValueError(f"Observations(values) must have a leading axis of {ts.size} times, got shapes {shapes}.")
        self.structure = _structure(jax.tree.map(lambda x: x[0], values))
        self.whole_times = mask is None or np.shape(mask) == ts.shape
        self.mask = _rows(_full_mask(mask, values, ts.size), ts.size).astype(bool)
        flat = _rows(values, ts.size)
        message = "Observations(values) must be finite; leave out what is missing with mask"
        self.values = jnp.where(self.mask, require(flat, jnp.isfinite(flat) | ~self.mask, message), 0)
        self.noise = _as_noise(noise, jax.tree.map(lambda x: x[0], values), flat.shape[1])
        if observe is not None and not callable(observe):
            raise TypeError(f"Observations(observe) must be callable as h(t, u, args), got {observe!r}.")
        self.observe, self.order = observe, as_integer(order, "Observations(order)", 0)

    def find(self, t: Float[Array, ""]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """The number of the time nearest to ``t``, and whether it is that time."""
        ts, t = lax.stop_gradient(self.ts).astype(t.dtype), lax.stop_gradient(t)
        i = jnp.argmin(jnp.abs(ts - t))
        return i, ts[i] == t

    def linearise(self, i: Array, mean: Float[Array, "*batch dim cols"], layout: Layout, args: PyTree) -> Linearisation:
        """The ``i``-th observation about a mean; what is missing is an observation of nothing.

        Raises ``ValueError`` if ``observe`` returns other shapes, or where the factorisation cannot keep what is seen.
        """
        d, t, seen = layout.size, self.ts[i].astype(layout.dtype), self.mask[i].astype(layout.dtype)

        def flat_observe(t, us):
            us = [layout.unravel(u) for u in us]
            out = us[0] if self.observe is None else self.observe(t, *us, args)
            if _structure(out) != self.structure:
                raise ValueError(
                    "What is observed must look like the values of one time, in structure and shapes: expected "
                    f"{self.structure}, got {_structure(out)}."
                )
            return layout.ravel(out)

        us = layout.unpack(mean)[: self.order + 1]
        value, jacobian = ExactJacobian().evaluate(flat_observe, t, us, layout, args)
        residual = (value - self.values[i].astype(layout.dtype)) * seen
        matrix = jnp.concatenate([layout.project(block) for block in jacobian], axis=-1)
        noise = self.noise.astype(layout.dtype)
        if layout.couples:
            rows = noise if noise.ndim == 2 else jnp.diag(jnp.broadcast_to(noise, seen.shape))
            rows = jnp.concatenate([rows * seen, jnp.diag(1 - seen)])
            return Linearisation(matrix * seen[:, None], residual[:, None], noise=rows)
        name, shared = type(layout.factorisation).__name__, layout.pack(us[:1]).shape[-1] > 1
        if shared and (noise.ndim > 0 or not self.whole_times):
            raise ValueError(
                f"{name}() has one covariance for all components: data need one standard deviation, and a mask of "
                "shape (times,). Use BlockDiagonal() or Dense()."
            )
        if noise.ndim == 2:
            raise ValueError(f"{name}() keeps no correlations: data need standard deviations. Use Dense().")
        seen = jnp.all(self.mask[i]).astype(layout.dtype) if shared else seen
        std = layout.factorisation.lift(jnp.ones((1, 1), layout.dtype), jnp.where(seen > 0, noise, 1), d)
        present = seen if shared else layout.pack(seen[None])
        return Linearisation(matrix * present, layout.pack(residual[None]), noise=std)

    def learn(self, i: Array, x: Normal, layout: Layout, args: PyTree) -> tuple[Normal, Float[Array, ""]]:
        """The coordinates of ``x``, so far standard normal, given the ``i``-th observation; and its log density."""
        coordinates, whitened, pivots = observe(x, self.linearise(i, x.mean, layout, args))
        log_det = whitened.shape[-1] * jnp.sum(jnp.log(jnp.abs(pivots)))
        number = jnp.sum(self.mask[i]).astype(layout.dtype)
        return coordinates, -jnp.sum(whitened**2) / 2 - log_det - number * np.log(2 * np.pi) / 2


@batched
def observe(x: Normal, equation: Linearisation) -> tuple[Normal, Float[Array, "m cols"], Float[Array, " m"]]:
    """The coordinates of ``x`` given an equation with noise, the whitened innovation, and the pivots of its factor."""
    (m, p), rows, dtype = equation.matrix.shape, x.factor.shape[0], x.mean.dtype
    noise = jnp.pad(equation.noise, ((0, 0), (0, rows)))
    own = jnp.concatenate([product(x.factor[:, :p], equation.matrix.T), jnp.eye(rows, dtype=dtype)], axis=1)
    triangle, _ = eliminate(jnp.zeros((m + rows, m + rows), dtype), jnp.concatenate([noise, own]))
    whitened = substitute(triangle[:m, :m], equation.residual)
    return Normal(-product(triangle[:m, m:].T, whitened), triangle[m:, m:]), whitened, jnp.diagonal(triangle)[:m]


def _structure(tree):
    return jax.tree.structure(tree), tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(tree))


def _rows(tree, times):
    """All leaves with a leading axis of times, side by side."""
    return jnp.concatenate([jnp.reshape(jnp.asarray(leaf), (times, -1)) for leaf in jax.tree.leaves(tree)], axis=1)


def _full_mask(mask, values, times):
    if mask is None:
        return jax.tree.map(lambda x: jnp.ones(x.shape, bool), values)
    if np.shape(mask) == (times,):
        mask = jnp.asarray(mask)
        return jax.tree.map(lambda x: jnp.broadcast_to(jnp.reshape(mask, (-1, *[1] * (x.ndim - 1))), x.shape), values)
    if jax.tree.map(np.shape, mask) != jax.tree.map(np.shape, values):
        raise ValueError("Observations(mask) must have the shape (times,), or structure and shapes of the values.")
    return mask


def _as_noise(noise, like, m):
    """A standard deviation, one for each number, or the root of a covariance."""
    name = "Observations(noise)"
    if jax.tree.map(np.shape, noise) == jax.tree.map(np.shape, like):
        noise = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(as_float(x, name)), noise))[0]
    else:
        noise = as_float(noise, name)
        if noise.shape not in ((), (m, m)):
            raise ValueError(
                f"{name} must be a number, a PyTree like the values of one time, or the root of a covariance of shape "
                f"{(m, m)}, got shape {noise.shape}."
            )
        if noise.ndim == 2:
            return jnp.asarray(require(noise, abs(noise) < np.inf, f"{name} must be finite"))
    return jnp.asarray(require(noise, (noise > 0) & (noise < np.inf), f"{name} must be finite and positive"))
