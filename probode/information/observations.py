"""Data: noisy observations of the solution at given times, and what a Gaussian state learns from them.

An observation of ``x = mean + factor^T w`` is one of the standard normal coordinates ``w``: in these, and with noise,
nothing is ever singular, whatever the covariance of ``x``. (The square-root form of the Kalman update: Kaminski, Bryson
& Schmidt 1971.) Other densities than the normal are replaced by the normal one that has their slope and curvature at
the most probable ``w`` (Laplace's method). Axes: ``times`` of the data, ``m`` numbers seen at each of them.
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

from ..algebra.coordinates import from_coordinates, standard
from ..algebra.factorisations import Layout
from ..algebra.linalg import detach, eliminate, product, safe_divide, safe_sqrt, substitute
from ..algebra.linearisation import Linearisation, residual_about
from ..algebra.normal import Normal, batched
from ..equations.jacobians import ExactJacobian
from ..util.checks import as_float, as_integer, require


# Fractions of a Newton step: densities may be steep far from the mode. And how many steps at most.
_SEARCH = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
_MAX_ITERATIONS = 50


class Observations(eqx.Module):
    """Values ``y_i = h(t_i, u(t_i), args) + noise`` seen at the times ``ts``.

    ``values``: an array, or a PyTree of arrays, with a leading axis of times. ``noise``: the standard deviation of all
    numbers, or one for each as a PyTree like the values of one time, or the ``(m, m)`` right square root of their
    covariance. ``observe``: what is seen, called as ``h(t, u, args)``, with ``order=1`` as ``h(t, u, du, args)`` and so
    on; ``u`` itself by default. It is linearised where the solver believes the solution to be. ``mask``: which values
    there are, of shape ``(times,)`` or like ``values``; the others are ignored.

    Counts, outcomes, data with outliers: instead of ``noise`` a function ``log_density(values, seen, args)`` with the
    log density of every number that was measured given the number that ``observe`` returns, both as at one time; it
    returns as many numbers, each a function of its own two. The posterior is then the normal one about its mode,
    likelihoods are Laplace's approximation; where a density is not log-concave, the square of its slope stands for the
    curvature. ``points``: means about which data are linearised instead, for ``solve_grid_iterated``.

    >>> import jax.numpy as jnp, probode
    >>> cases = probode.Observations(
    ...     [1.0, 2.0], jnp.array([[3.0], [5.0]]), log_density=lambda n, u, args: n * jnp.log(u) - u
    ... )

    Times are increasing or decreasing, as in the solve that uses them; what was seen at one time goes into one row.
    Raises ``TypeError`` or ``ValueError`` for times that are not such, values or masks of other shapes, values that are
    neither finite nor masked, noise that is not positive, noise and a log density together or none of them.
    """

    ts: Float[Array, " times"]
    values: Float[Array, "times m"]
    noise: Float[Array, "..."] | None
    mask: Bool[Array, "times m"]
    observe: Callable | None
    log_density: Callable | None
    points: Float[Array, "points *state"]
    order: int = eqx.field(static=True)
    structure: Any = eqx.field(static=True)
    whole_times: bool = eqx.field(static=True)

    def __init__(
        self,
        ts: Any,
        values: PyTree,
        noise: Any = None,
        *,
        observe: Any = None,
        order: Any = 0,
        mask: Any = None,
        log_density: Any = None,
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
            raise ValueError(
                f"Observations(values) must have one entry, or row, for each of the {ts.size} times in ts: a leading "
                f"axis of {ts.size}, got shapes {shapes}."
            )
        self.structure = _structure(jax.tree.map(lambda x: x[0], values))
        self.whole_times = mask is None or np.shape(mask) == ts.shape
        self.mask = _rows(_full_mask(mask, values, ts.size), ts.size).astype(bool)
        flat = _rows(values, ts.size)
        message = "Observations(values) must be finite; leave out what is missing with mask"
        # What is missing repeats the first that is there: a density of it is thrown away, but must have a derivative.
        first = jnp.take_along_axis(flat, jnp.argmax(self.mask, axis=0)[None], axis=0)
        fill = jnp.where(jnp.any(self.mask, axis=0), first, 0)
        self.values = jnp.where(self.mask, require(flat, jnp.isfinite(flat) | ~self.mask, message), fill)
        if (noise is None) == (log_density is None):
            raise ValueError("Observations need either a noise or a log_density(values, seen, args), and not both.")
        if log_density is not None and not callable(log_density):
            raise TypeError(f"Observations(log_density) must be callable, got {log_density!r}.")
        like = jax.tree.map(lambda x: x[0], values)
        self.noise = None if noise is None else _as_noise(noise, like, flat.shape[1])
        self.log_density, self.points = log_density, jnp.zeros((0,), self.ts.dtype)
        if observe is not None and not callable(observe):
            raise TypeError(f"Observations(observe) must be callable as h(t, u, args), got {observe!r}.")
        self.observe, self.order = observe, as_integer(order, "Observations(order)", 0)

    def find(self, t: Float[Array, ""]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """The number of the time nearest to ``t``, and whether it is that time."""
        ts, t = lax.stop_gradient(self.ts).astype(t.dtype), lax.stop_gradient(t)
        i = jnp.argmin(jnp.abs(ts - t))
        return i, ts[i] == t

    def linearise(self, i: Array, mean: Float[Array, "*batch dim cols"], layout: Layout, args: PyTree) -> Linearisation:
        """The observation at ``ts[i]``, linearised about a mean; the rows of missing values are zero.

        Raises ``ValueError`` if ``observe`` returns other shapes, or where the factorisation cannot keep what is seen.
        """
        t, seen = self.ts[i].astype(layout.dtype), self.mask[i].astype(layout.dtype)
        us = layout.unpack(mean)[: self.order + 1]
        value, jacobian = ExactJacobian().evaluate(self._flat_observe(layout, args), t, us, layout, args)
        matrix = jnp.concatenate([layout.project(block) for block in jacobian], axis=-1)
        shared = not layout.couples and layout.pack(us[:1]).shape[-1] > 1
        if self.log_density is None:
            return self._with_noise(i, value, matrix, seen, layout, shared)
        if shared:
            raise ValueError(
                f"{type(layout.factorisation).__name__}() has one covariance for all components, and a log density "
                "weighs each differently. Use BlockDiagonal() or Dense()."
            )
        slope, precision = self._slope_and_precision(i, value, args)
        weight = safe_sqrt(jnp.where((seen > 0) & (precision > 0), precision, 0))
        residual = -safe_divide(slope, weight)
        if layout.couples:
            noise = jnp.eye(seen.size, dtype=layout.dtype)
            return Linearisation(matrix * weight[:, None], residual[:, None], noise=noise)
        noise = layout.factorisation.lift(jnp.ones((1, 1), layout.dtype), jnp.ones_like(seen), layout.size)
        return Linearisation(matrix * layout.pack(weight[None]), layout.pack(residual[None]), noise=noise)

    def condition(self, i: Array, x: Normal, layout: Layout, args: PyTree) -> tuple[Normal, Float[Array, ""]]:
        """The coordinates of ``x``, so far standard normal, given the ``i``-th observation; and its log density."""
        if self.points.size > 0:
            point = self.points[i]
        elif self.log_density is None:
            point = x.mean
        else:
            point = self._mode(i, x, layout, args)
        equation = self.linearise(i, point, layout, args)
        coordinates, whitened, pivots = _observe_about(point, x, equation)
        # Where blocks differ in size there are rows that no component has, with pivots of zero.
        sizes = jnp.where(pivots == 0, 1, jnp.abs(pivots))
        log_density = -jnp.sum(whitened**2) / 2 - whitened.shape[-1] * jnp.sum(jnp.log(sizes))
        if self.log_density is None:
            return coordinates, log_density - jnp.sum(self.mask[i]).astype(layout.dtype) * np.log(2 * np.pi) / 2
        # The normal density that stands for this one has its own value where the two touch.
        return coordinates, log_density + jnp.sum(equation.residual**2) / 2 + self._log_density(i, point, layout, args)

    def _with_noise(self, i, value, matrix, seen, layout, shared):
        residual = (value - self.values[i].astype(layout.dtype)) * seen
        assert self.noise is not None
        noise = self.noise.astype(layout.dtype)
        if layout.couples:
            rows = noise if noise.ndim == 2 else jnp.diag(jnp.broadcast_to(noise, seen.shape))
            rows = jnp.concatenate([rows * seen[None], jnp.diag(1 - seen)])
            return Linearisation(matrix * seen[:, None], residual[:, None], noise=rows)
        name = type(layout.factorisation).__name__
        if shared and (noise.ndim > 0 or not self.whole_times):
            raise ValueError(
                f"{name}() has one covariance for all components: data need one standard deviation, and a mask of "
                "shape (times,). Use BlockDiagonal() or Dense()."
            )
        if noise.ndim == 2:
            raise ValueError(f"{name}() keeps no correlations: data need standard deviations. Use Dense().")
        seen = jnp.all(self.mask[i]).astype(layout.dtype) if shared else seen
        std = layout.factorisation.lift(jnp.ones((1, 1), layout.dtype), jnp.where(seen > 0, noise, 1), layout.size)
        present = seen if shared else layout.pack(seen[None])
        return Linearisation(matrix * present, layout.pack(residual[None]), noise=std)

    def _flat_observe(self, layout, args):
        def flat_observe(t, us):
            us = [layout.unravel(u) for u in us]
            out = us[0] if self.observe is None else self.observe(t, *us, args)
            if _structure(out) != self.structure:
                raise ValueError(
                    "What is observed must look like the values of one time, in structure and shapes: expected "
                    f"{self.structure}, got {_structure(out)}."
                )
            return layout.ravel(out)

        return flat_observe

    def _densities(self, i, value, args):
        """The log densities of all numbers of a datum given the observed quantity, as a vector."""
        assert self.log_density is not None
        tree, shapes = self.structure
        unravel = ravel_pytree(jax.tree.unflatten(tree, [jnp.zeros(shape, value.dtype) for shape in shapes]))[1]
        out = self.log_density(unravel(self.values[i].astype(value.dtype)), unravel(value), args)
        if _structure(out) != self.structure:
            raise ValueError(
                "log_density(values, seen, args) must return one number for every value, in structure and shapes: "
                f"expected {self.structure}, got {_structure(out)}."
            )
        return ravel_pytree(out)[0].astype(value.dtype)

    def _slope_and_precision(self, i, value, args):
        def gradient(value):
            return jax.grad(lambda v: jnp.sum(self._densities(i, v, args)))(value)

        # Every density depends on one number alone: one product with the Hessian is its diagonal.
        slope, curvature = jax.jvp(gradient, (value,), (jnp.ones_like(value),))
        return slope, jnp.where(curvature < 0, -curvature, slope**2)

    def _log_density(self, i, mean, layout, args):
        t, us = self.ts[i].astype(layout.dtype), layout.unpack(mean)[: self.order + 1]
        densities = self._densities(i, self._flat_observe(layout, args)(t, us), args)
        return jnp.sum(jnp.where(self.mask[i], densities, 0))

    def _mode(self, i, x, layout, args):
        """The most probable state: Newton's method in the coordinates, with a search along every move."""

        def state(w, x):
            return from_coordinates(Normal(w, standard(x).factor), x).mean

        def newton(w, data, x, args):
            point = state(w, x)
            return _observe_about(point, x, data.linearise(i, point, layout, args))[0].mean

        def search(data, x, args):
            def objective(w):
                log_density = data._log_density(i, state(w, x), layout, args)
                value = log_density - jnp.sum(w**2) / 2
                return jnp.where(jnp.isfinite(value), value, -jnp.inf)

            def body(carry):
                w, _, number = carry
                steps = jnp.asarray([0.0, *_SEARCH], w.dtype)
                moves = steps.reshape(-1, *[1] * w.ndim) * (newton(w, data, x, args) - w)[None]
                best = jnp.argmax(jax.vmap(lambda move: objective(w + move))(moves))
                return w + moves[best], jnp.max(jnp.abs(moves[best])), number + 1

            accuracy = jnp.sqrt(jnp.finfo(layout.dtype).eps)
            init = standard(x).mean, jnp.ones((), layout.dtype), 0
            return lax.while_loop(lambda c: (c[1] > accuracy) & (c[2] < _MAX_ITERATIONS), body, init)[0]

        w = search(*detach((self, x, args)))
        # Two more iterations at the mode have its first and second derivatives.
        for _ in range(2):
            w = newton(w, self, x, args)
        return state(w, x)


def _observe_about(point, x, equation):
    """``observe`` an equation that is linearised about another point than the mean of ``x``."""
    return observe(x, eqx.tree_at(lambda e: e.residual, equation, residual_about(x.mean, point, equation)))


@batched
def observe(x: Normal, equation: Linearisation) -> tuple[Normal, Float[Array, "m cols"], Float[Array, " m"]]:
    """The coordinates of ``x`` given an equation with noise, the whitened innovation, and the pivots of its factor."""
    (m, p), rows, dtype = equation.matrix.shape, x.factor.shape[0], x.mean.dtype
    assert equation.noise is not None
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
