"""The result of a solve: the posterior at the saved times, how the solve ended, and what it cost."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from ..algebra.factorisations import Layout
from ..algebra.marginals import Moments, Posterior, joint, over_times, widen
from ..algebra.normal import Normal, deviation
from ..stepping.adaptive import AdaptiveState
from ..stepping.result import Result, has_failed, in_words
from ..util import describe
from ..util.checks import as_float, as_scalar, is_traced, require
from ..util.tracing import compiled
from ..util.words import hint_for_attribute
from .events import Occurrences
from .trajectory import AbstractPath, column


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

    def at(self, path: AbstractPath, t: Array) -> Array:
        """Derivatives of the means at the times ``t``, ``(N, *t.shape, *batch, dim, cols)``."""
        move = lambda tangent: eqx.filter_jvp(lambda path: _evaluate(path, t)[0].mean, (path,), (tangent,))[1]  # noqa: E731
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
    - ``result``: a ``Result``: ``Result.successful``, ``Result.event`` if an event has ended the solve, or the reason
      why it failed before ``t1``.
    - ``stats``: ``num_steps``, the number of attempted steps; ``num_accepted_steps`` and ``num_rejected_steps`` of
      them; ``max_steps``, the largest number allowed. Where linearisations are iterated also ``last_move``: how far the
      last iteration of a step moved an innovation, in its standard deviations, the largest over all steps; small if all
      iterations have converged.
    - ``state``: the state at the end, which can be passed as ``u0`` to a further solve; ``None`` for a boundary value
      problem.
    - ``layout``: how states are stored.
    - ``trajectory``: the kept states from which ``evaluate`` and ``sample`` compute; ``None`` where none are needed.
    - ``spread``: derivatives with respect to an uncertain initial value, whose share is already in ``marginals``;
      ``None`` elsewhere.
    - ``order``: ``k``, how many of ``u, u', ...`` an initial value has.
    - ``data_log_likelihood``: the log density of the data passed to the solve, each datum given those before it and
      the equation up to its time; ``None`` without data.
    - ``events``: the ``Occurrences`` of events, in the order in which they happened; ``None`` in a solve without.
    - ``parameters``: of ``solve_bvp``, the parameters that were unknown, a ``Normal``; ``None`` elsewhere.
    - ``period``: of ``solve_periodic``, the ``Moments`` of the period; ``None`` elsewhere.

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
    state: AdaptiveState | None
    layout: Layout
    trajectory: AbstractPath | None
    order: int = eqx.field(static=True)
    spread: Spread | None = None
    data_log_likelihood: Float[Array, ""] | None = None
    events: Occurrences | None = None
    parameters: Normal | None = None
    period: Moments | None = None

    def __repr__(self) -> str:
        kind = ("smoothed" if self.is_smoothed else "filtered") + (", dense" if self.is_dense else "")
        shapes = f"t={eqx.tree_pformat(self.t)}, u={describe.shape_of_u(self.layout)}"
        known = all(map(eqx.is_array_like, jax.tree.leaves(self.result))) and not is_traced(self.result)
        failed = known and bool(np.any(has_failed(self.result)))
        ending = f", {in_words(self.result).partition(':')[0]}" if failed else ""
        return f"Solution({shapes}, num_derivatives={self.layout.num_derivatives}, {kind}{ending})"

    if not TYPE_CHECKING:  # a type checker would believe that there is every attribute

        def __getattr__(self, name: str) -> Any:
            """Raises ``AttributeError``, for words of other packages with the one of this package."""
            hint = hint_for_attribute(name)
            if hint is None:
                return super().__getattribute__(name)  # raises what Python says
            raise AttributeError(f"A Solution has no attribute {name!r}: {hint}.", name=name, obj=self)

    def _repr_html_(self):
        return describe.as_html("Solution", describe.facts(self, in_words))

    @property
    def is_dense(self) -> bool:
        """True if every step was kept, so that ``evaluate`` returns the solution at any time of the interval."""
        return self.trajectory is not None and self.trajectory.is_dense

    @property
    def is_smoothed(self) -> bool:
        """Whether the posterior at every time is conditioned on the whole solve, as joint samples need it."""
        return self.trajectory is not None and self.trajectory.is_smoothed

    def summary(self) -> str:
        """Result, time span, steps, calibration, evidence and largest standard deviation, as text."""
        return describe.as_text(describe.facts(self, in_words))

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """The axes ``ax`` (new ones by default) with means, bands of standard deviations and samples over time.

        ``options``: ``components``, ``derivative``, ``std``, ``magnify``, ``samples``, ``key``, ``ts`` and ``labels``
        of ``probode.plots.plot``, which raises the same errors. ``probode.plots`` has further pictures.
        """
        # At the top of this file it would be an import from a folder that stands above this one (test_architecture).
        from ..diagnostics import plots

        return plots.plot(self, ax, **options)

    def check(self, solver: Any = None, *, args: PyTree = None, thorough: Any = False) -> Any:
        """Is it right? A ``CheckReport`` with reasons to doubt this solution; its ``str`` is a summary.

        The equation is evaluated inside of the steps, where the solver has not looked, and errors of the size of the
        tolerances grow along the solution, as the Jacobian has it. So are found: pulses that were stepped over, jumps
        and kinks, solutions that depend on every digit, standard deviations that are too small or too large, stiffness,
        events that may have been missed. Nothing is solved, unless the steps were not kept.

        - ``solver``, ``args``: those of the solve. They are known unless the solution was computed inside of
          ``jax.jit`` or ``jax.vmap``, or is a copy.
        - ``thorough``: whether the equation is solved again, with a tenth of the tolerances and shorter steps, and the
          solutions are compared.

        Raises ``TypeError`` for another kind of solver, ``ValueError`` for a batch of solutions.

        >>> import jax.numpy as jnp, probode
        >>> pulse = lambda t, u, args: jnp.exp(-(((t - 7.7) / 0.01) ** 2)) - u
        >>> report = probode.solve_ivp(pulse, (0.0, 10.0), 0.0, dense_output=True).check()
        >>> report.is_trusted, report.findings[0].kind
        (False, 'unseen')
        """
        from ..diagnostics.check import check  # as for plot

        return check(self, solver, args, thorough)

    def to_xarray(self, *, draws: Any = 0, key: Any = None) -> Any:
        """This solution as an ``xarray.Dataset`` with the dimensions ``(draw, time, component)``, for ArviZ and others.

        ``mean`` and ``std`` are ``(time, component)``; with ``draws`` there are joint samples ``u``, ``(draw, time,
        component)``. Components have the names of their places in the PyTree. Attributes tell how the solve ended. A
        batch of solutions has a first dimension ``lane``, and its times are the variable ``t``.

        - ``draws``: the number of samples. ``key``: a random key of JAX for them.

        Raises ``ImportError`` without xarray (the extra ``xarray``), ``ValueError`` for draws without a key, and for
        draws of what ``sample`` does not sample.
        """
        from ..diagnostics.labelled import to_dataset  # as for plot

        return to_dataset(self, draws, key)

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
        return self._saved.derivative(k)

    @property
    def covariance(self) -> Float[Array, "*time d d"]:
        """The covariance matrix of the components of ``u`` at every saved time.

        Components are in the order of ``jax.flatten_util.ravel_pytree(u)``. Raises as ``covariance_of``.
        """
        return self.covariance_of(0)

    def covariance_of(self, k: Any) -> Float[Array, "*time d d"]:
        """The covariance matrix of the components of ``u^(k)`` at every saved time, in the order of ``covariance``.

        Its diagonal is that of ``derivative(k).std`` squared. Components are independent under ``Isotropic`` and
        ``BlockDiagonal``, unless the initial value was uncertain. Raises ``ValueError`` unless ``k`` is an integer from
        zero to the number of derivatives of the prior, and under ``Subspace``.
        """
        return self._saved.covariance_of(k)

    def at(self, t: Any) -> Normal:
        """The distribution of ``(u, ..., u^(k-1))`` at one time as a ``Normal``, the ``u0`` of another solve.

        ``t``: a saved time, or any time of the interval if the steps were kept. For an equation of order one the mean
        is ``u``. The factor is the right square root of the covariance of all its numbers, with all correlations.
        (``Solution.state``, by contrast, resumes the same solve.) Raises ``ValueError`` for several times or one that
        is not known, for a batch of solutions, and under ``Subspace``.

        >>> import probode
        >>> first = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
        >>> then = probode.solve_ivp(lambda t, u, args: u - 1, (1.0, 2.0), first.at(1.0))
        """
        self.layout.require_shared_algebra("The distribution of the whole u")
        if self.is_dense:
            known = self.evaluate(t := as_scalar(t, "at(t)"))
        else:
            self._single("at")
            t = as_scalar(t, "at(t)").astype(self.t.dtype)
            xp = jnp if is_traced(t, self.t) else np
            # The last of equal times: at a jump the state behind it. NaN where a time was not reached.
            gap = xp.where(xp.isnan(self.t), xp.inf, xp.abs(xp.asarray(self.t) - t))
            i = self.t.size - 1 - xp.argmin(gap[::-1])
            near = gap[i] <= 4 * np.finfo(self.t.dtype).eps * abs(t)
            message = "at(t) needs a time that was saved, or a solve that keeps its steps (SaveAt(dense=True))"
            known = self._saved.at(i)
            # Of the numbers themselves: of a single row the index would not be looked at, and the check left out.
            known = dataclasses.replace(known, marginals=require(known.marginals, near, message, t=t))
        start = joint(known.layout, known.marginals, self.order, known.moves)
        means = tuple(self.layout.unravel(u) for u in start.mean)
        return Normal(means[0] if self.order == 1 else means, start.factor)

    @property
    def end(self) -> Normal:
        """The distribution at the time that was reached, ``t1`` if the solve was successful; see ``at``."""
        return self.at(self.t[-1] if self.state is None else self.state.t)

    @property
    def _saved(self) -> Posterior:
        # In a batch of solutions its axes come first.
        moves = None if self.spread is None else jnp.moveaxis(self.spread.means, self.t.ndim - 1, 0)
        return Posterior(self.t, self.marginals, self.layout, moves)

    def evaluate(self, t: Any) -> Posterior:
        """The posterior at any times of the interval (dense output), smoothed if the strategy is a smoother.

        ``t``: a time or an array of times, ``()`` or ``(time,)``, in any order; the result can be differentiated with
        respect to it. Raises ``ValueError`` if the solve has not kept its steps (``SaveAt(dense=True)``,
        ``FixedIntervalSmoother`` and ``solve_grid`` keep them), if a time lies outside the interval that was solved,
        and for a batch of solutions, ``TypeError`` for times that are not real. For a solve that has failed
        (``throw=False``) the posterior is NaN at times outside of what was reached.
        """
        if not self.is_dense:
            raise ValueError(
                "evaluate needs the steps of the solve, which were not kept: solve with strategy="
                "FixedIntervalSmoother(), or with save_at=SaveAt(dense=True) (solve_ivp: dense_output=True)."
            )
        t, near, reached = self._times(t, "evaluate(t)")
        (states, layout), moves = _evaluate(self.trajectory, near), self._moves(near)
        states = states if moves is None else widen(states, moves)
        return Posterior(t, states if reached is None else _where(reached, states), layout, moves)

    def sample(self, key: Any, shape: Any = (), *, ts: Any = None) -> PyTree[Float[Array, "..."]]:
        """Random draws of ``u`` at several times from their joint posterior: leaves ``(*shape, time, *leaf.shape)``.

        ``key``: a random key of JAX. ``shape``: leading axes of independent samples. ``ts``: times, ``(time,)``, in any
        order, for solves that have kept their steps; by default the saved times ``t``. Samples are NaN at times that
        were not reached. Raises ``ValueError`` for several times of a filter, which has no joint distribution over
        times; for ``ts`` without kept steps, of another shape or outside the interval; for a batch of solutions; and
        under ``Subspace``.
        """
        path = self.trajectory
        self.layout.require_shared_algebra("Sampling")
        shape = _check_draws(key, shape)
        reached: Array | None = None
        if ts is None:
            self._single("sample")
            ts = self.t
        else:
            ts = as_float(ts, "sample(ts)")
            if path is not None:
                _, ts, reached = self._times(ts, "sample(ts)")
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
            known = self if ts is self.t else self.evaluate(ts)
            marginals = known.marginals if reached is None else _where(reached, known.marginals)
            return _sample(marginals, known.layout, key, shape, self._moves(ts))
        missing = None if reached is None else ~reached
        if ts is self.t:
            missing = jnp.isnan(self.marginals.mean).any(axis=tuple(range(1, self.marginals.mean.ndim)))
        return _sample_path(path, key, shape, ts, missing, self._moves(ts))

    def _moves(self, ts):
        """Derivatives of the means at ``ts`` along the directions of an uncertain initial value, ``None`` if none."""
        if self.spread is None or ts is self.t:
            return None if self.spread is None else self.spread.means
        return _moves_at(self.spread, self.trajectory, ts)

    def _single(self, method):
        """Nothing; raises ``ValueError`` for a batch of solutions, as ``jax.vmap`` of a solve returns it."""
        if self.t.ndim != 1:
            raise ValueError(
                f"This is a batch of solutions: call {method} under jax.vmap, as in "
                f"jax.vmap(lambda solution: solution.{method}(...))(solutions)."
            )

    def _times(self, t, name):
        """Times of the interval that was solved; those outside by no more than round-off are moved to its ends.

        Of a solve that has failed any times may be asked for. Also returned are times in their place that were all
        reached, and which are the same; ``None`` if it is known that all are.
        """
        self._single(name.partition("(")[0])
        path = self.trajectory
        t = as_float(t, name).astype(self.t.dtype)
        if t.ndim > 1:
            raise ValueError(f"{name} must be a time or an array of times of shape (times,), got shape {t.shape}.")
        assert path is not None
        t0: Any = path.interval.t0
        t1: Any = path.interval.t1
        if not is_traced(t, t0, t1):
            t0, t1 = np.asarray(t0), np.asarray(t1)
            near = np.clip(t, min(t0, t1), max(t0, t1))
            t = np.where(abs(near - t) <= 4 * np.finfo(t.dtype).eps * abs(near), near, t)
        inside = (t - t0) * (t - t1) <= 0
        if not is_traced(inside) and np.all(inside):
            t = jnp.asarray(t)
            return t, t, None
        message = f"{name} must lie in the interval that was solved"
        t = require(t, inside | has_failed(self.result), message, t=t, interval=(t0, t1))
        # Derivatives of what is thrown away must be numbers, too.
        return jnp.asarray(t), jnp.where(inside, t, t1), jnp.asarray(inside)


def _check_draws(key, shape):
    """The leading axes of samples as a tuple; raises ``TypeError`` for a wrong ``key`` or ``shape``."""
    if not eqx.is_array(key):
        raise TypeError(f"sample(key) must be a random key of JAX, as jax.random.key(0), got {key!r}.")
    try:
        return tuple(shape)
    except TypeError:
        raise TypeError(f"sample(shape) must be a tuple of integers, as (10,), got {shape!r}.") from None


def _where(reached, states):
    """The states where they were reached, NaN elsewhere."""
    return jax.tree.map(lambda x: jnp.where(column(reached, x) if reached.ndim else reached, x, jnp.nan), states)


@compiled
def _evaluate(path, t):
    states, _, layouts = path.evaluate(jnp.atleast_1d(t))
    states, layouts = (states, layouts) if t.ndim else jax.tree.map(lambda x: x[0], (states, layouts))
    return states, path.layout if layouts is None else layouts


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
        states = mean + jax.vmap(deviation)(factor, noise)
        return _trajectory_of_u(_moved(states, moves, key), layout)

    return _draws(one, key, shape)


@compiled
def _sample_path(path, key, shape, ts, missing, moves):
    if missing is not None:
        # A time behind the end would be sampled by extrapolation, and those before it given that.
        ts = jnp.where(missing, path.interval.t1, ts)

    def one(key):
        states, layout = path.sample(key, ts)
        states = _moved(states, moves, key)
        if missing is not None:
            states = jnp.where(missing.reshape(-1, *[1] * (states.ndim - 1)), jnp.nan, states)
        return _trajectory_of_u(states, layout)

    return _draws(one, key, shape)


def _moved(states, moves, key):
    """The samples with the uncertainty of the initial value added to that of the solver.

    It is a combination of the ``moves`` with standard normal weights, the same at all times.
    """
    if moves is None:
        return states
    weights = jax.random.normal(jax.random.fold_in(key, 2), moves.shape[:1], states.dtype)
    return states + jnp.tensordot(weights, moves, axes=1)


def _trajectory_of_u(states, layout):
    return over_times(lambda layout, x: layout.unravel(layout.unpack(x)[0]), layout, states, 1)(layout, states)


def _draws(one, key, shape):
    samples = jax.vmap(one)(jax.random.split(key, math.prod(shape)))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), samples)
