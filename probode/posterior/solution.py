"""What a solve returns: the posterior at the times asked for, how it ended, and what it cost."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from ..algebra.factorisations import Layout
from ..algebra.linalg import compiled
from ..algebra.marginals import Moments, Posterior, moments, widen
from ..algebra.normal import Normal, spread
from ..stepping.result import Result
from ..util import describe
from ..util.checks import as_float, as_integer, is_traced, require
from .trajectory import Trajectory, evaluate, sample_at


class SaveAt(eqx.Module):
    """Which times to keep: ``t0``, ``t1``, ``ts`` (sorted in the direction of time), or every accepted step.

    ``steps`` includes ``t1`` and excludes ``ts``. ``dense`` keeps what ``Solution.evaluate`` needs (memory for
    ``max_steps`` states); alone it also keeps ``t1``. Raises ``ValueError`` if nothing or both are asked for.

    >>> import probode
    >>> probode.SaveAt(t0=True, steps=True).steps
    True
    """

    t0: bool = eqx.field(static=True)
    t1: bool = eqx.field(static=True)
    ts: Float[Array | np.ndarray, " times"] | None
    steps: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)

    def __init__(self, *, t0: Any = False, t1: Any = False, ts: Any = None, steps: Any = False, dense: Any = False):
        for name, flag in {"t0": t0, "t1": t1, "steps": steps, "dense": dense}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"SaveAt({name}) is a flag, True or False, got {flag!r}; times go into ts.")
        if ts is not None and steps:
            raise ValueError("SaveAt(ts=..., steps=True): keep either the times ts or every step, not both.")
        if ts is None and not (t0 or t1 or steps or dense):
            raise ValueError("SaveAt() keeps nothing: set t0, t1, ts, steps or dense.")
        if ts is not None:
            ts = as_float(ts, "SaveAt(ts)")
            if ts.ndim != 1 or ts.size == 0:
                raise ValueError(f"save_at must be a non-empty array of times of shape (times,), got shape {ts.shape}.")
        t1 = t1 or (dense and ts is None and not (t0 or steps))
        self.t0, self.t1, self.ts, self.steps, self.dense = t0, t1, ts, steps, dense


class Spread(eqx.Module):
    """How the posterior means move with an uncertain initial value, along the ``N`` rows of its factor.

    ``means``: those in ``Solution.marginals``, ``(N, time, *batch, dim, cols)``; ``trajectory``: tangents of the kept
    states behind ``evaluate``.
    """

    means: Float[Array, "N time *state"]
    trajectory: Any

    def at(self, path: Trajectory, t: Array) -> Array:
        """Of the means at any times."""
        move = lambda tangent: eqx.filter_jvp(lambda path: _evaluate(path, t).mean, (path,), (tangent,))[1]  # noqa: E731
        return eqx.filter_vmap(move)(self.trajectory)


class Solution(eqx.Module):
    """The posterior over a solution.

    ``t``: times, ``(time,)``. ``marginals``: the state distributions over ``(u, u', ..., u^(nu))`` with a leading time
    axis. ``output_scale``: the calibrated factor on the prior's scale, ``(time,)`` or ``(time, d)``, 1 without
    calibration. ``log_likelihood``: the log marginal likelihood of the equation holding at every step, under the
    covariances reported. ``result``: a ``Result``. ``stats``: ``num_steps`` attempts, of which ``num_accepted_steps``
    and ``num_rejected_steps``, and ``max_steps``; where linearisations are iterated also ``last_move``, how far the
    last iteration moved an innovation, at most, in its standard deviations: small if all have converged. ``state``:
    the running state at the end, to go on from. ``trajectory``: the kept states behind ``evaluate`` and ``sample``, if
    any. ``spread``: what an uncertain initial value adds, which is already in ``marginals``. ``data_log_likelihood``:
    the log density of the data that the solve was given, each given those before it and the equation up to its time.

    >>> import probode
    >>> probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
    Solution(t=f64[1], u=f64[], num_derivatives=4, filtered)
    """

    t: Float[Array, " time"]
    marginals: Normal
    output_scale: Float[Array, "time *batch"]
    log_likelihood: Float[Array, ""]
    result: Any
    stats: dict[str, Num[Array, ""]]
    state: Any
    layout: Layout
    trajectory: Trajectory | None
    spread: Spread | None = None
    data_log_likelihood: Float[Array, ""] | None = None

    def __repr__(self):
        kind = ("smoothed" if self.is_smoothed else "filtered") + (", dense" if self.is_dense else "")
        shapes = f"t={eqx.tree_pformat(self.t)}, u={describe.shape_of_u(self.layout)}"
        return f"Solution({shapes}, num_derivatives={self.layout.num_derivatives}, {kind})"

    def _repr_html_(self):
        return describe.as_html("Solution", describe.facts(self, Result))

    @property
    def is_dense(self) -> bool:
        """Whether every step was kept, so that the solution can be evaluated at any time of the interval."""
        return self.trajectory is not None and self.trajectory.dense

    @property
    def is_smoothed(self) -> bool:
        """Whether every time is estimated from the whole solve, so that joint samples can be drawn."""
        return self.trajectory is not None and self.trajectory.smoothed is not None

    def summary(self) -> str:
        """Result, time span, steps, calibration, evidence and largest standard deviation, as text to be printed."""
        return describe.as_text(describe.facts(self, Result))

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw means with bands of uncertainty, and samples, over time; returns the axes. Needs the ``plot`` extra.

        ``options``: ``components``, ``derivative``, ``std``, ``samples``, ``key``, ``ts``, ``labels``, see
        ``probode.plots.plot``. Other pictures are in ``probode.plots``.
        """
        # Pictures are made of solutions: at the top of this file the import would close a circle.
        from ..diagnostics import plots

        return plots.plot(self, ax, **options)

    @property
    def mean(self) -> PyTree[Float[Array, "..."]]:
        """Posterior mean of ``u``: leaves ``(time, *leaf.shape)``."""
        return self.derivative(0).mean

    @property
    def std(self) -> PyTree[Float[Array, "..."]]:
        """Posterior standard deviation of ``u``: leaves ``(time, *leaf.shape)``."""
        return self.derivative(0).std

    def derivative(self, k: Any) -> Moments:
        """Posterior of ``u^(k)``: an object with ``.mean`` and ``.std``. Raises ``ValueError`` above the prior's.

        ``TS0`` takes the derivative that the equation gives for exact: at the ends of steps, where its standard
        deviation would be zero, it is estimated from that of the derivative below and the rate at which the solution
        changes.
        """
        k = as_integer(k, "derivative(k)", 0, self.layout.num_derivatives)
        return moments(self.layout, self.marginals, k)

    def evaluate(self, t: Any) -> Posterior:
        """The posterior at any ``t`` of the interval, of shape ``()`` or ``(time,)``; smoothed if the strategy is.

        Differentiable in ``t``. Raises ``ValueError`` if the solve has not kept its steps (``SaveAt(dense=True)``, a
        ``FixedIntervalSmoother`` or ``solve_grid`` do), or if a time lies outside what was solved.
        """
        if not self.is_dense:
            raise ValueError(
                "evaluate needs the steps of the solve, which were not kept: solve with strategy="
                "FixedIntervalSmoother(), or with save_at=SaveAt(dense=True)."
            )
        t = self._times(t, "evaluate(t)")
        states = _evaluate(self.trajectory, t)
        if self.spread is not None:
            states = widen(states, self._moves(t))
        return Posterior(t, states, self.layout)

    def sample(self, key: Any, shape: tuple[int, ...] = (), *, ts: Any = None) -> PyTree[Float[Array, "..."]]:
        """Joint samples of the trajectory of ``u``: leaves ``(*shape, time, *leaf.shape)``.

        At the times ``.t``, or at any ``ts`` of shape ``(time,)`` where the solve has kept its steps. A filter's
        marginals do not say how times belong together: more than one is a ``ValueError``.
        """
        path = self.trajectory
        self.layout.require_shared_algebra("Sampling")
        if ts is None:
            self._single("sample")
            ts = self.t
        else:
            ts = self._times(ts, "sample(ts)") if path is not None else as_float(ts, "sample(ts)")
            if ts.ndim != 1:
                raise ValueError(f"sample(ts) must be an array of times of shape (times,), got shape {ts.shape}.")
            if not self.is_dense:
                raise ValueError(
                    "sample(ts) needs the steps of the solve, which were not kept: solve with strategy="
                    "FixedIntervalSmoother(), or without ts for the times that were saved."
                )
        if not self.is_smoothed:
            if ts.size > 1:
                raise ValueError(
                    "A filter cannot be sampled at more than one time: its marginals do not say how times belong "
                    "together. Solve with strategy=FixedPointSmoother() or FixedIntervalSmoother()."
                )
            marginals = self.marginals if ts is self.t else self.evaluate(ts).marginals
            return _sample(marginals, self.layout, key, tuple(shape), self._moves(ts))
        missing = jnp.isnan(self.marginals.mean).any(axis=tuple(range(1, self.marginals.mean.ndim)))
        missing = missing if ts is self.t else None
        return _sample_path(path, self.layout, key, tuple(shape), ts, missing, self._moves(ts))

    def _moves(self, ts):
        if self.spread is None or ts is self.t:
            return None if self.spread is None else self.spread.means
        return _moves_at(self.spread, self.trajectory, ts)

    def _single(self, method):
        if self.t.ndim != 1:
            raise ValueError(
                f"This is a batch of solutions: call {method} under jax.vmap, as in "
                f"jax.vmap(lambda solution: solution.{method}(...))(solutions)."
            )

    def _times(self, t, name):
        self._single(name.partition("(")[0])
        path = self.trajectory
        t = as_float(t, name).astype(self.t.dtype)
        if t.ndim > 1:
            raise ValueError(f"{name} must be a time or an array of times of shape (times,), got shape {t.shape}.")
        t0, t1 = path.rows.t[0], self.state.t
        if not is_traced(t, t0, t1):
            t0, t1 = np.asarray(t0), np.asarray(t1)
            near = np.clip(t, min(t0, t1), max(t0, t1))
            t = np.where(abs(near - t) <= 4 * np.finfo(t.dtype).eps * abs(near), near, t)
        inside = (t - t0) * (t - t1) <= 0
        message = f"{name} must lie in the interval that was solved"
        return jnp.asarray(
            require(t, inside, message, t=t, interval=(t0, t1) if is_traced(t0) else (float(t0), float(t1)))
        )


@compiled
def _evaluate(path, t):
    states, _ = evaluate(path, jnp.atleast_1d(t))
    return states if t.ndim else jax.tree.map(lambda x: x[0], states)


@compiled
def _moves_at(spread, path, t):
    return spread.at(path, t)


@compiled
def _sample(marginals, layout, key, shape, moves):
    mean, factor = marginals.mean, marginals.factor
    # The initial value moves all components together, whatever the factorisation keeps.
    factor = factor if moves is None else factor[..., : factor.shape[-2] - moves.shape[0], :]

    def one(key):
        noise = jax.random.normal(key, (*factor.shape[:-1], mean.shape[-1]), mean.dtype)
        states = mean + jax.vmap(spread)(factor, noise)
        return _trajectory_of_u(_moved(states, moves, key), layout)

    return _draws(one, key, shape)


@compiled
def _sample_path(path, layout, key, shape, ts, missing, moves):
    def one(key):
        states = _moved(sample_at(path, key, ts), moves, key)
        if missing is not None:
            states = jnp.where(missing.reshape(-1, *[1] * (states.ndim - 1)), jnp.nan, states)
        return _trajectory_of_u(states, layout)

    return _draws(one, key, shape)


def _moved(states, moves, key):
    if moves is None:
        return states
    weights = jax.random.normal(jax.random.fold_in(key, 2), moves.shape[:1], states.dtype)
    return states + jnp.tensordot(weights, moves, axes=1)


def _trajectory_of_u(states, layout):
    return jax.vmap(lambda x: layout.unravel(layout.unpack(x)[0]))(states)


def _draws(one, key, shape):
    samples = jax.vmap(one)(jax.random.split(key, math.prod(shape)))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), samples)


def raise_unless_successful(solution: Solution) -> Solution:
    """The solution itself if it reached ``t1``; otherwise raises ``RuntimeError`` with the reason and the time."""
    failed = solution.result != Result.successful
    if isinstance(failed, jax.core.Tracer):
        return solution.result.error_if(solution, failed)
    if np.any(failed):
        state, stats = solution.state, solution.stats
        raise RuntimeError(
            f"{Result[solution.result]} It stopped at t = {state.t} after {stats['num_accepted_steps']} accepted and "
            f"{stats['num_rejected_steps']} rejected steps; throw=False returns what was reached."
        )
    return solution
