"""From the states that a solve has kept to its solution: calibrate, smooth, and read off what was asked for."""

import dataclasses

import jax
import jax.numpy as jnp

from ..algebra.linalg import is_finite
from ..stepping.adaptive import AdaptiveState
from ..stepping.kept import Kept
from ..stepping.loops import AbstractLoop
from ..stepping.result import Result
from ..stepping.step import Step
from ..stepping.times import direction_of
from .leave_one_out import left_out_squares
from .solution import SaveAt, Solution
from .trajectory import column, evaluate, rescale, rows_of_steps, trajectory


def answer(save_at: SaveAt, kept: Kept, ended: AdaptiveState, step: Step, loop: AbstractLoop) -> Solution:
    """The posterior at the rows asked for: ``t0``, then ``ts`` or every step, then ``t1``.

    ``save_at``: with times of the solve's dtype. ``kept``: the states to choose from.
    """
    rows, reached, ts, layout, calibration = kept.rows, kept.reached, save_at.ts, step.layout, step.calibration
    statistics = ended.current.statistics
    if rows.influence is not None:
        statistics = calibration.leave_one_out(statistics, *left_out_squares(rows, reached, step.prior, layout))
        # Has served its purpose.
        rows = dataclasses.replace(rows, influence=None)
    factor = calibration.finalise(statistics)
    if factor is not None:
        rows = rescale(rows, factor)
    path = trajectory(rows, reached, step.prior, layout, dense=kept.dense)

    def row(i):
        return path.rows.t[i], path.marginal(i), path.rows.output_scale[i]

    parts = [jax.tree.map(lambda x: x[None], row(0))] if save_at.t0 else []
    if ts is not None:
        parts.append((ts, *evaluate(path, ts)))
    elif save_at.steps:
        number = reached.size - 1 if rows.anew is None else loop.max_steps
        parts.append(jax.vmap(row)(rows_of_steps(rows, reached, number)))
    if save_at.t1 and not save_at.steps:
        parts.append(jax.tree.map(lambda x: x[None], row(path.last)))
    t, marginals, output_scale = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    # Every state on the way is finite; what a calibration or smoothing makes of them may not be.
    spoilt = (ended.result == Result.successful) & ~is_finite((marginals, output_scale, factor))
    result = Result.where(spoilt, Result.nonfinite, ended.result)
    if ts is not None:
        start = int(save_at.t0)
        # Times that were not reached have no answer.
        direction = direction_of(path.rows.t[0], ended.t)
        missing = jnp.zeros(t.size, bool).at[start : start + ts.size].set((ts - ended.t) * direction > 0)
        marginals, output_scale = jax.tree.map(
            lambda x: jnp.where(column(missing, x), jnp.nan, x), (marginals, output_scale)
        )
    stats = {
        "num_steps": ended.num_steps,
        "num_accepted_steps": ended.num_accepted_steps,
        "num_rejected_steps": ended.num_steps - ended.num_accepted_steps,
        "max_steps": jnp.asarray(loop.max_steps, jnp.int32),
    }
    if step.iterates:
        stats["last_move"] = ended.current.last_move
    ones = jnp.ones(layout.batch_shape, layout.dtype)
    log_likelihood = ended.current.evidence.log_likelihood(ones if factor is None else factor)
    kept_path = path if kept.dense or path.smoothed is not None else None
    return Solution(
        t,
        marginals,
        output_scale,
        log_likelihood,
        result,
        stats,
        ended,
        layout,
        kept_path,
        data_log_likelihood=None if step.data is None else ended.current.data_evidence,
    )
