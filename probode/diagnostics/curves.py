"""What is drawn of a solution: at which times it is known, and how these are joined."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from ..algebra.marginals import Posterior, widen
from ..util.components import columns


# How many times are drawn where any time can be had, or about how many where cubics join a few.
_POINTS = 400


class Curves(NamedTuple):
    """Means and standard deviations of ``u``, or of one of its derivatives, over time.

    - ``t``: the times that are drawn, ``(time,)``.
    - ``mean``, ``std``: of all components, side by side, ``(time, d)``.
    - ``known``: the posterior at the times at which it is known.
    - ``each``: at every how many of the times ``t`` it is known.
    - ``chosen``: the times at which ``Solution.sample`` draws the same; ``None`` for those that were saved.
    - ``predicted``: whether these are predictions of a filter between its steps.
    """

    t: Float[np.ndarray, " time"]
    mean: Float[np.ndarray, "time d"]
    std: Float[np.ndarray, "time d"]
    known: Posterior
    each: int
    chosen: Any
    predicted: bool


def curves(solution: Any, k: int, ts: Any) -> Curves:
    """What is drawn of ``u^(k)`` of a ``Solution`` at the times ``ts``, or at those that ``plots.plot`` describes."""
    if ts is None and solution.is_dense and solution.is_smoothed:
        ts = many_times(solution)
    known, slopes = _known(solution, ts)
    here, t = known.derivative(k), np.asarray(known.t)
    mean, std = columns(here.mean), columns(here.std)
    if slopes is None or t.size == 1:
        return Curves(t, mean, std, known, 1, ts, not solution.is_smoothed and t.size > 1)
    each = max(1, round(_POINTS / (t.size - 1)))
    left = np.append(np.repeat(np.arange(t.size - 1), each), t.size - 2)
    s = np.append(np.tile(np.arange(each) / each, t.size - 1), 1.0)[:, None]

    def line(x):
        return np.where(s < 1, x[left] + s * (x[left + 1] - x[left]), x[left + 1])

    drawn = line(mean)
    if k < solution.layout.num_derivatives:
        # What a cubic with these values and slopes has beside the straight line.
        slope, step = columns(slopes.derivative(k + 1).mean), np.diff(t)[left, None]
        rise = mean[left + 1] - mean[left]
        drawn += s * (1 - s) * ((1 - s) * (step * slope[left] - rise) - s * (step * slope[left + 1] - rise))
    return Curves(line(t[:, None])[:, 0], drawn, line(std), known, each, ts, False)


def _known(solution, ts):
    """The posterior at the times to draw, and one with the slopes there; ``None`` unless these are the ends of steps.

    At a jump there are two rows at one time: the state before, and the one behind it.
    """
    if ts is not None:
        return solution.evaluate(ts), None
    if not solution.is_dense:
        return Posterior(solution.t, solution.marginals, solution.layout), None
    path = solution.trajectory
    real = np.flatnonzero(path.reached)
    kept = path.rows.t, path.rows.distribution, path.rows.layout
    t, rows, layouts = jax.tree.map(lambda x: x[real], kept)
    moves = None if solution.spread is None else solution.spread.trajectory.rows.distribution.mean[:, real]
    states = rows if moves is None else widen(rows, moves)
    known = Posterior(t, states, path.layout if layouts is None else layouts, moves)
    return known, known


def many_times(solution: Any) -> Float[np.ndarray, " time"]:
    """Equidistant times from the start of the solve to its end, independent of the times that were saved."""
    return np.linspace(float(solution.trajectory.interval.t0), float(solution.trajectory.interval.t1), _POINTS)
