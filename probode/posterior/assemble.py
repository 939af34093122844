"""From the states that a solve has kept to its solution: calibrate, smooth, and read off what was asked for."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..algebra.factorisations import Layout
from ..estimation.calibration import AbstractCalibration
from ..priors.prior import AbstractPrior
from ..stepping.adaptive import AdaptiveState, is_finite
from ..stepping.kept import Row
from ..stepping.loops import AbstractLoop
from ..stepping.result import Result
from .leave_one_out import left_out_squares
from .solution import Solution
from .trajectory import column, evaluate, rescale, rows_of_steps, trajectory


class Keep(eqx.Module):
    """Flags for the times at which the solution is stored, known at compile time; see ``SaveAt``."""

    t0: bool = eqx.field(static=True)
    ts: bool = eqx.field(static=True)
    steps: bool = eqx.field(static=True)
    t1: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)


def answer(
    keep: Keep,
    ts: Float[Array, " times"] | None,
    rows: Row,
    reached: Bool[Array, " rows"],
    ended: AdaptiveState,
    layout: Layout,
    prior: AbstractPrior,
    calibration: AbstractCalibration,
    loop: AbstractLoop,
    *,
    dense: bool,
) -> Solution:
    """The posterior at the rows asked for: ``t0``, then ``ts`` or every step, then ``t1``.

    ``rows``: the states kept, of which ``reached`` are real; ``dense``: whether these are all steps.
    """
    statistics = ended.current.statistics
    if rows.influence is not None:
        statistics = calibration.leave_one_out(statistics, *left_out_squares(rows, reached, prior, layout))
        # Has served its purpose.
        rows = eqx.tree_at(lambda r: r.influence, rows, None)
    factor = calibration.finalise(statistics)
    if factor is not None:
        rows = rescale(rows, factor)
    path = trajectory(rows, reached, prior, layout, dense=dense)

    def row(i):
        return path.rows.t[i], path.marginal(i), path.rows.output_scale[i]

    kept = [jax.tree.map(lambda x: x[None], row(0))] if keep.t0 else []
    if keep.ts:
        kept.append((ts, *evaluate(path, ts)))
    elif keep.steps:
        number = reached.size - 1 if rows.anew is None else loop.max_steps
        kept.append(jax.vmap(row)(rows_of_steps(rows, reached, number)))
    if keep.t1 and not keep.steps:
        kept.append(jax.tree.map(lambda x: x[None], row(path.last)))
    t, marginals, output_scale = jax.tree.map(lambda *xs: jnp.concatenate(xs), *kept)
    # Every state on the way is finite; what a calibration or smoothing makes of them may not be.
    spoilt = (ended.result == Result.successful) & ~is_finite((marginals, output_scale, factor))
    result = Result.where(spoilt, Result.nonfinite, ended.result)
    if keep.ts:
        start = int(keep.t0)
        # Times that were not reached have no answer.
        direction = jnp.where(ended.t >= path.rows.t[0], 1, -1)
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
    if ended.current.last_move is not None:
        stats["last_move"] = ended.current.last_move
    ones = jnp.ones(layout.batch_shape, layout.dtype)
    log_likelihood = ended.current.evidence.log_likelihood(ones if factor is None else factor)
    kept_path = path if dense or path.smoothed is not None else None
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
        data_log_likelihood=ended.current.data_evidence,
    )
