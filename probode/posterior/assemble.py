"""The ``Solution`` from the states that a solve has kept: calibrated, smoothed, evaluated at the times to save."""

import dataclasses

import jax
import jax.numpy as jnp

from ..algebra.linalg import is_finite
from ..algebra.normal import Normal
from ..stepping.adaptive import AdaptiveState
from ..stepping.events import Happening
from ..stepping.kept import Kept
from ..stepping.loops import AbstractLoop
from ..stepping.result import Result, has_failed
from ..stepping.step import Step
from .events import ended_at_event
from .leave_one_out import left_out_squares
from .solution import SaveAt, Solution
from .trajectory import column, rescale, rows_of_steps, trajectory


def answer(
    save_at: SaveAt, kept: Kept, ended: AdaptiveState, step: Step, loop: AbstractLoop
) -> tuple[Solution, Happening | None]:
    """The ``Solution`` at the times of ``save_at``, but for its events: ``t0``, ``ts`` or the ends of steps, ``t1``.

    - ``save_at``: which times; its ``ts`` have the dtype of the state.
    - ``kept``: the states that the loop has kept.
    - ``ended``: the adaptive solve after its last step.
    - ``step``: prior, calibration, layout and data of the solve.
    - ``loop``: for the number of attempts that were allowed.

    Also the states at the events that have happened, calibrated; ``None`` in a solve without.
    """
    if kept.events is not None:
        kept, ended = _at_last_event(kept, ended)
    happenings = kept.happenings
    rows, reached, layout, calibration = kept.rows, kept.reached, step.layout, step.calibration
    ts = None if save_at.ts is None else jnp.asarray(save_at.ts)
    statistics = ended.current.statistics
    if rows.influence is not None:
        squares, weights = left_out_squares(rows, reached, step.prior, layout)
        # Influences are kept for an AbstractLeaveOneOut alone.
        statistics = calibration.leave_one_out(statistics, squares, weights)  # type: ignore[attr-defined]
        # Without this line it would be a part of the trajectory in the solution, and take memory there.
        rows = dataclasses.replace(rows, influence=None)
    factor = calibration.finalise(statistics)
    if factor is not None:
        rows = rescale(rows, factor)
        if happenings is not None:
            x = happenings.distribution
            x = Normal(x.mean, x.factor * factor[None, ..., None, None])
            happenings = dataclasses.replace(happenings, distribution=x)
    path = trajectory(rows, reached, step.prior, layout, dense=kept.dense)

    def row(i):
        layout = None if path.rows.layout is None else path.layout_of(i)
        return path.rows.t[i], path.marginal(i), path.rows.output_scale[i], layout

    parts = [jax.tree.map(lambda x: x[None], row(0))] if save_at.t0 else []
    if ts is not None:
        parts.append((ts, *path.evaluate(ts)))
    elif save_at.steps:
        parts.append(jax.vmap(row)(rows_of_steps(rows, reached, kept.most)))
    if save_at.t1 and not save_at.steps:
        parts.append(jax.tree.map(lambda x: x[None], row(path.last)))
    t, marginals, output_scale, layouts = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    # Accepted states are finite, but the final factor and smoothing may overflow: NaN would be called successful.
    spoilt = ~has_failed(ended.result) & ~is_finite((marginals, output_scale, factor))
    result = Result.where(spoilt, Result.nonfinite, ended.result)
    if ts is not None:
        start = int(save_at.t0)
        # NaN at times that were not reached: there ``evaluate`` has extrapolated the prior. The direction is that of
        # the times themselves: a solve without an accepted step has none.
        beyond = (ts - ended.t) * jnp.sign(ts - path.rows.t[0]) > 0
        missing = jnp.zeros(t.size, bool).at[start : start + ts.size].set(beyond)
        marginals, output_scale = jax.tree.map(
            lambda x: jnp.where(column(missing, x), jnp.nan, x), (marginals, output_scale)
        )
    stats = {
        "num_steps": ended.num_steps,
        "num_accepted_steps": ended.num_accepted_steps,
        "num_rejected_steps": ended.num_steps - ended.num_accepted_steps,
        "max_steps": jnp.asarray(loop.max_steps, jnp.int32),
    }
    if step.constraint.iteration.is_gauss_newton:
        stats["last_move"] = ended.current.last_move
    ones = jnp.ones(layout.batch_shape, layout.dtype)
    log_likelihood = ended.current.evidence.log_likelihood(ones if factor is None else factor)
    kept_path = path if kept.dense or path.smoothed is not None else None
    solution = Solution(
        t,
        marginals,
        output_scale,
        log_likelihood,
        result,
        stats,
        ended,
        layout if layouts is None else layouts,
        kept_path,
        step.constraint.problem.num_initial_values,
        data_log_likelihood=None if step.data is None else ended.current.data_evidence,
    )
    return solution, happenings


def _at_last_event(kept, ended):
    """The rows and the end of a solve with the last state at the time of the event that has ended it, if one has."""
    if all(event.terminal is None for event in kept.events.events):
        return kept, ended
    ended = ended_at_event(kept.events, kept.happenings, ended)
    rows, t, mean = kept.rows, ended.t, ended.current.distribution.mean
    if rows.t.size == 2:
        # The start and the end alone: written so, the derivative is compiled in less time.
        ts, means = jnp.stack([rows.t[0], t]), jnp.stack([rows.distribution.mean[0], mean])
    else:
        last = (ended.result == Result.event) & (jnp.arange(rows.t.size) >= jnp.sum(kept.reached) - 1)
        ts = jnp.where(last, t, rows.t)
        means = jnp.where(column(last, rows.distribution.mean), mean[None], rows.distribution.mean)
    rows = dataclasses.replace(rows, t=ts, distribution=Normal(means, rows.distribution.factor))
    return dataclasses.replace(kept, rows=rows), ended
