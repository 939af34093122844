"""The result of a solve: the posterior at the saved times, how the solve ended, and what it cost."""

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
from ..stepping.adaptive import AdaptiveState
from ..stepping.result import Result
from ..util import describe
from ..util.checks import as_float, as_integer, is_traced, require
from .trajectory import Trajectory, evaluate, sample_at


class SaveAt(eqx.Module):
    """The times at which a solve keeps its posterior.

    - ``t0``, ``t1``: whether to keep the first, and the last, time of the interval.
    - ``ts``: further times, ``(times,)``, sorted in the direction of the solve. With ``t1`` as well, ``t1`` comes last.
    - ``steps``: whether to keep the end of every accepted step; that includes ``t1``. There are ``max_steps`` such
      entries; those after the last step repeat it.
    - ``dense``: whether to keep what ``Solution.evaluate`` needs at any time of the interval, which takes memory for
      ``max_steps`` states. If nothing else is set, ``t1`` is kept, too.

    Raises ``TypeError`` for a flag that is not ``True`` or ``False`` and for times that are not real, ``ValueError``
    for ``ts`` together with ``steps``, for an array ``ts`` that is empty or not of shape ``(times,)``, and if nothing
    is set.

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
    """Derivatives of the posterior with respect to an uncertain initial value, along the ``N`` rows of its factor.

    Their squares are what the initial value adds to the covariances of a ``Solution``.

    - ``means``: of the means in ``Solution.marginals``, ``(N, time, *batch, dim, cols)``.
    - ``trajectory``: of the kept states, a ``Trajectory`` of tangents with a leading axis ``N``; ``None`` where none
      are kept.
    """

    means: Float[Array, "N time *state"]
    trajectory: Any

    def at(self, path: Trajectory, t: Array) -> Array:
        """Derivatives of the means at the times ``t``, ``(N, *t.shape, *batch, dim, cols)``."""
        move = lambda tangent: eqx.filter_jvp(lambda path: _evaluate(path, t).mean, (path,), (tangent,))[1]  # noqa: E731
        return eqx.filter_vmap(move)(self.trajectory)


class Solution(eqx.Module):
    """The posterior of a solve at the saved times, with its result and statistics, as ``Solver.solve`` returns it.

    ``mean`` and ``std`` are those of ``u``; the fields hold the whole state:

    - ``t``: the saved times, ``(time,)``.
    - ``marginals``: the Gaussians over ``(u, u', ..., u^(nu))`` at these times, in the layout of the factorisation:
      ``mean`` is ``(time, *batch, dim, cols)`` and ``factor`` is ``(time, *batch, rows, dim)``. NaN at times that were
      not reached.
    - ``output_scale``: the calibrated factor on the prior's own output scale in the step that holds each time,
      ``(time,)``, or ``(time, d)`` under ``BlockDiagonal``; 1 without calibration.
    - ``log_likelihood``: the log marginal likelihood of the equation holding at every step, under the covariances that
      are reported; NaN under ``Subspace``.
    - ``result``: a ``Result``, ``Result.successful`` or the reason why the solve ended before ``t1``.
    - ``stats``: ``num_steps``, the number of attempted steps; ``num_accepted_steps`` and ``num_rejected_steps`` of
      them; ``max_steps``, the largest number allowed. Where linearisations are iterated also ``last_move``: how far the
      last iteration of a step moved an innovation, in its standard deviations, the largest over all steps; small if all
      iterations have converged.
    - ``state``: the state at the end, which can be passed as ``u0`` to a further solve.
    - ``layout``: how states are stored.
    - ``trajectory``: the kept states from which ``evaluate`` and ``sample`` compute; ``None`` where none are needed.
    - ``spread``: derivatives with respect to an uncertain initial value, whose share is already in ``marginals``;
      ``None`` elsewhere.
    - ``data_log_likelihood``: the log density of the data passed to the solve, each datum given those before it and
      the equation up to its time; ``None`` without data.

    >>> import probode
    >>> probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
    Solution(t=f64[1], u=f64[], num_derivatives=4, filtered)
    """

    t: Float[Array, " time"]
    marginals: Normal
    output_scale: Float[Array, "time *batch"]
    log_likelihood: Float[Array, ""]
    result: Result
    stats: dict[str, Num[Array, ""]]
    state: AdaptiveState
    layout: Layout
    trajectory: Trajectory | None
    spread: Spread | None = None
    data_log_likelihood: Float[Array, ""] | None = None

    def __repr__(self) -> str:
        kind = ("smoothed" if self.is_smoothed else "filtered") + (", dense" if self.is_dense else "")
        shapes = f"t={eqx.tree_pformat(self.t)}, u={describe.shape_of_u(self.layout)}"
        return f"Solution({shapes}, num_derivatives={self.layout.num_derivatives}, {kind})"

    def _repr_html_(self):
        return describe.as_html("Solution", describe.facts(self, Result))

    @property
    def is_dense(self) -> bool:
        """True if every step was kept, so that ``evaluate`` returns the solution at any time of the interval."""
        return self.trajectory is not None and self.trajectory.dense

    @property
    def is_smoothed(self) -> bool:
        """Whether the posterior at every time is conditioned on the whole solve, as joint samples need it."""
        return self.trajectory is not None and self.trajectory.smoothed is not None

    def summary(self) -> str:
        """Result, time span, steps, calibration, evidence and largest standard deviation, as text."""
        return describe.as_text(describe.facts(self, Result))

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """The axes ``ax`` (new ones by default) with means, bands of standard deviations and samples over time.

        ``options``: ``components``, ``derivative``, ``std``, ``magnify``, ``samples``, ``key``, ``ts`` and ``labels``
        of ``probode.plots.plot``, which raises the same errors. ``probode.plots`` has further pictures.
        """
        # At the top of this file it would be an import from a folder that stands above this one (test_architecture).
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
        """Posterior mean and standard deviation of ``u^(k)``: ``Moments`` with leaves ``(time, *leaf.shape)``.

        Under ``TS0`` the posterior covariance of the derivative that the equation gives is zero at the ends of steps,
        since its linearisation freezes the field. The standard deviation returned there is an estimate, from that of
        the derivative below and the rate at which the solution changes. Raises ``ValueError`` unless ``k`` is an
        integer from 0 to the ``num_derivatives`` of the prior.
        """
        k = as_integer(k, "derivative(k)", 0, self.layout.num_derivatives)
        return moments(self.layout, self.marginals, k)

    def evaluate(self, t: Any) -> Posterior:
        """The posterior at any times of the interval (dense output), smoothed if the strategy is a smoother.

        ``t``: a time or an array of times, ``()`` or ``(time,)``, in any order; the result can be differentiated with
        respect to it. Raises ``ValueError`` if the solve has not kept its steps (``SaveAt(dense=True)``,
        ``FixedIntervalSmoother`` and ``solve_grid`` keep them), if a time lies outside the interval that was solved,
        and for a batch of solutions, ``TypeError`` for times that are not real.
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
        """Joint samples of ``u`` at several times under the posterior: leaves ``(*shape, time, *leaf.shape)``.

        ``key``: a random key of JAX. ``shape``: leading axes of independent samples. ``ts``: times, ``(time,)``, in any
        order, for solves that have kept their steps; by default the saved times ``t``. Samples are NaN at times that
        were not reached. Raises ``ValueError`` for several times of a filter, which has no joint distribution over
        times; for ``ts`` without kept steps, of another shape or outside the interval; for a batch of solutions; and
        under ``Subspace``.
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
        unreached = jnp.isnan(self.marginals.mean).any(axis=tuple(range(1, self.marginals.mean.ndim)))
        missing = unreached if ts is self.t else None
        return _sample_path(path, self.layout, key, tuple(shape), ts, missing, self._moves(ts))

    def _moves(self, ts):
        """Derivatives of the means at ``ts`` along the directions of an uncertain initial value, ``None`` if none."""
        if self.spread is None or ts is self.t:
            return None if self.spread is None else self.spread.means
        return _moves_at(self.spread, self.trajectory, ts)

    def _single(self, method):
        """Raises ``ValueError`` for a batch of solutions, as ``jax.vmap`` of a solve returns it."""
        if self.t.ndim != 1:
            raise ValueError(
                f"This is a batch of solutions: call {method} under jax.vmap, as in "
                f"jax.vmap(lambda solution: solution.{method}(...))(solutions)."
            )

    def _times(self, t, name):
        """Times of the interval that was solved; those outside by no more than round-off are moved to its ends."""
        self._single(name.partition("(")[0])
        path = self.trajectory
        t = as_float(t, name).astype(self.t.dtype)
        if t.ndim > 1:
            raise ValueError(f"{name} must be a time or an array of times of shape (times,), got shape {t.shape}.")
        assert path is not None
        t0: Any = path.rows.t[0]
        t1: Any = self.state.t
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
    # The last rows of the factor are the moves. They need the same weight for all components, also where the
    # factorisation draws components independently: ``_moved`` adds them.
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
    """Samples plus a random combination of the moves, with the same standard normal weights at all times."""
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
    """The solution itself; raises ``RuntimeError`` with the reason and the time if it did not reach ``t1``.

    Under a transformation of JAX the error is raised when the compiled program runs.
    """
    failed = solution.result != Result.successful
    if isinstance(failed, jax.core.Tracer):
        return solution.result.error_if(solution, failed)
    if np.any(failed):
        state, stats = solution.state, solution.stats
        words: str = Result[solution.result]  # type: ignore[misc]  # equinox's enumerations have words
        raise RuntimeError(
            f"{words} It stopped at t = {state.t} after {stats['num_accepted_steps']} accepted and "
            f"{stats['num_rejected_steps']} rejected steps; throw=False returns what was reached."
        )
    return solution
