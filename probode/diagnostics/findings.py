"""The rules by which ``Solution.check`` finds reasons to doubt a solution.

Each is a function of the ``Steps`` of a solve that yields its ``Finding``s. The bounds were chosen between what
``benchmarks.checks`` measures on solutions that are right, and on those that are not.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from .check_report import Finding


# A standard deviation, or a grown error, of this share of a component's size leaves it not even one digit or two, ...
_UNKNOWN = 0.05
# ... if it does so at the end, or for this share of the interval: where a solution jumps it is uncertain for a moment.
_LASTING = 0.02
# Below so many times what the tolerances allow an error is what was asked for.
_BEYOND = 10.0
# Standard deviations of this share of a component's size begin to be too small where errors have grown.
_SUSPECT = 0.002
# How many times as large as the tolerances, and as the residuals that the solver has seen, one is that it has not.
_UNSEEN, _MORE = 30.0, 10.0
# Residuals of so many standard deviations on average say that these are too small, whatever the model.
_UNEXPLAINED = 10.0
# How short a step is, compared with the longest on both sides, that was cut by a jump of the equation or a derivative;
# among how many neighbours: more of them are short where the solution is fast and smooth.
_CUT, _NEIGHBOURS = 0.02, 25
# What share of its range nearby a derivative changes by where steps were cut, most of it in one of them, if it jumps.
_JUMPED = 0.2
# How many times as fast as the solution something decays that keeps the steps of an explicit method short, ...
_STIFF = 20.0
# ... how long steps are compared with its time, and how many there have to be to speak of it.
_BOUND, _MANY = 0.03, 100
# Steps of so few units of round-off of the time.
_ROUND_OFF = 1e3
# A difference of two solves of so many standard deviations, and so many times what the tolerances allow.
_DIFFERENT, _FAR = 6.0, 30.0


@dataclasses.dataclass(frozen=True)
class Steps:
    """The accepted steps of a solve, and what was measured in them, as NumPy arrays.

    - ``t``: the ends of steps, from the start on, ``(rows,)``; ``dt``: the lengths of the steps, positive.
    - ``u``, ``std``, ``rate``, ``weight``, ``growth``, ``seen``, ``whitened``: see ``Inspection``, without padding.
    - ``points_t``, ``points_step``, ``defect``: the times inside of steps, the number of their step, the residuals.
    - ``eigenvalues_row``, ``eigenvalues``: those of the Jacobian at some ends of steps, ``(some, p)``.
    - ``stops``: times at which steps had to end: of stops, events and data.
    - ``is_frozen``: whether the constraint does not use a Jacobian.
    - ``is_uncertain``: whether the start was uncertain, or there are data, so that the tolerances are no measure of the
      standard deviations.
    - ``is_adaptive``: whether the steps were chosen by tolerances.
    """

    t: Float[np.ndarray, " rows"]
    dt: Float[np.ndarray, " steps"]
    u: Float[np.ndarray, "rows d"]
    std: Float[np.ndarray, "rows d"]
    rate: Float[np.ndarray, "rows d"]
    weight: Float[np.ndarray, "rows d"]
    growth: Float[np.ndarray, "rows d"] | None
    seen: Float[np.ndarray, " steps"]
    whitened: Float[np.ndarray, "steps d"] | None
    points_t: Float[np.ndarray, " points"]
    points_step: Int[np.ndarray, " points"]
    defect: Float[np.ndarray, " points"]
    eigenvalues_row: Int[np.ndarray, " some"]
    eigenvalues: np.ndarray
    names: list[str]
    stops: np.ndarray
    is_frozen: bool
    is_uncertain: bool
    is_adaptive: bool

    @property
    def size(self) -> Float[np.ndarray, " d"]:
        """The largest value of each component, but not less than what the tolerances allow."""
        return np.maximum(np.max(abs(self.u), axis=0), np.max(self.weight, axis=0))

    def lasting(self, error: Float[np.ndarray, "rows d"], bound: float) -> tuple[float, int]:
        """The share of the interval in which an error is large, and the component in which it is largest.

        Large is more than ``bound`` of the component's size, and more than ``_BEYOND`` times what a step may err. The
        share counts as one if the error is large at the end.
        """
        share = np.where(error > _BEYOND * self.weight, error / self.size, 0)
        worst = np.max(share, axis=1)
        lasting = np.sum(self.dt * (worst[1:] > bound)) / np.sum(self.dt)
        return (1.0 if worst[-1] > bound else float(lasting)), int(np.argmax(share[np.argmax(worst)]))


def all_findings(steps: Steps) -> list[Finding]:
    """What the steps of a solve give reason to say, doubts first."""
    found = [finding for rule in _RULES for finding in rule(steps)]
    return sorted(found, key=lambda finding: not finding.is_doubt)


def _unseen(steps: Steps) -> Iterator[Finding]:
    """Residuals inside of a step, far above those at its end: the equation does there what the solver has not seen."""
    if not steps.defect.size:
        return
    excess = steps.defect / np.maximum(_UNSEEN, _MORE * steps.seen[steps.points_step])
    worst = int(np.argmax(excess))
    if excess[worst] > 1:
        step = steps.points_step[worst]
        yield Finding(
            "unseen",
            True,
            float(steps.points_t[worst]),
            f"At t = {steps.points_t[worst]:.6g}, inside of the step from {steps.t[step]:.6g} to "
            f"{steps.t[step + 1]:.6g}, the equation asks for a change {steps.defect[worst]:.1g} times as large as the "
            "tolerances, which the solver has not seen: it looks at the ends of steps.",
            "Pass the time as stop_at to the controller, or dt_max (solve_ivp: max_step) below the width of what "
            "happens there.",
        )


def _uncertain(steps: Steps) -> Iterator[Finding]:
    if steps.is_uncertain:
        return
    share, worst = steps.lasting(steps.std, _UNKNOWN)
    if share > _LASTING:
        row = int(np.argmax(steps.std[:, worst]))
        std = steps.std[row, worst]
        yield Finding(
            "uncertain",
            True,
            float(steps.t[row]),
            f"The standard deviation of {steps.names[worst]} reaches {std / steps.size[worst]:.0%} of its size, "
            f"{std / steps.weight[row, worst]:.1g} times what one step may err: errors have grown.",
            "Tighten rtol and atol until it is small enough, or shorten the interval.",
        )


def _sensitive(steps: Steps) -> Iterator[Finding]:
    """Errors as large as those of a step grow to be as large as the solution."""
    if steps.growth is None or steps.is_uncertain or not steps.is_adaptive:
        return
    share, worst = steps.lasting(steps.growth, _UNKNOWN)
    # A covariance that knows the Jacobian grows likewise, until the equation holding at many steps is taken for
    # evidence that the error is small. Before that it is right, and follows what is stiff better than the growth does.
    seen = steps.is_frozen or steps.lasting(steps.std, _SUSPECT)[0] > _LASTING
    if share <= _LASTING or not seen:
        return
    row = int(np.argmax(np.max(steps.growth / steps.size, axis=1) > _UNKNOWN))
    silent = np.max(steps.std[row:] / steps.size) < _UNKNOWN
    remedy = "Tighten rtol and atol, or end the solve before; if it is chaotic, only statistics of it mean something."
    yield Finding(
        "sensitive",
        True,
        float(steps.t[row]),
        f"The equation makes errors grow: from t = {steps.t[row]:.6g} on they may be {_UNKNOWN:.0%} of "
        f"{steps.names[worst]} or more." + (" The standard deviations do not show it." if silent else ""),
        remedy + (" TS1 (method='EK1') knows how errors grow." if silent and steps.is_frozen else ""),
    )


def _miscalibrated(steps: Steps) -> Iterator[Finding]:
    if steps.whitened is None or not steps.whitened.size:
        return
    size = float(np.sqrt(np.mean(steps.whitened**2)))
    if size > _UNEXPLAINED:
        yield Finding(
            "miscalibrated",
            True,
            None,
            f"Residuals are {size:.1g} standard deviations large on average: those that are reported are too small.",
            "Use a calibration, as DynamicCalibration(), or a larger output_scale of the prior.",
        )


def _jumps(steps: Steps) -> Iterator[Finding]:
    """Steps that were cut far below their neighbours on both sides: there the equation is not smooth."""
    for first, last in _cut_steps(steps.dt):
        inside, t = slice(first, last + 2), float(steps.t[first])
        if np.any((steps.stops >= np.min(steps.t[inside])) & (steps.stops <= np.max(steps.t[inside]))):
            continue
        near = slice(max(0, first - _NEIGHBOURS), last + _NEIGHBOURS + 2)
        rate, span = steps.rate[max(0, first - 1) : last + 3], np.ptp(steps.rate[near], axis=0)
        changed, at_once = np.ptp(rate, axis=0), np.max(abs(np.diff(rate, axis=0)), axis=0)
        large = (span > 0) & (changed > _JUMPED * span)
        jumps = np.any(large & (at_once > changed / 2))
        if np.any(large) and not jumps:
            continue  # a fast but smooth change
        what = "The vector field" if jumps else "A derivative of the vector field"
        yield Finding(
            "jump" if jumps else "kink",
            True,
            t,
            f"{what} jumps near t = {t:.6g}, where steps were cut to {np.min(steps.dt[first : last + 1]):.1g}: the "
            "prior expects a smooth solution, and standard deviations there say little.",
            "If the time is known, pass it as stop_at to the controller; if it depends on the solution, use an Event.",
        )


def _cut_steps(dt):
    """The first and the last of steps that are far shorter than some among their neighbours on both sides."""
    around = np.concatenate([np.zeros(_NEIGHBOURS), dt, np.zeros(_NEIGHBOURS)])
    longest = np.max(np.lib.stride_tricks.sliding_window_view(around, _NEIGHBOURS), axis=1)
    bound = _CUT * np.minimum(longest[: dt.size], longest[_NEIGHBOURS + 1 :])
    short = np.flatnonzero((dt > 0) & (dt < bound))
    found: list[tuple[int, int]] = []
    for i in short[(short >= 2) & (short < dt.size - 2)]:
        if found and i <= found[-1][1]:
            continue
        first = last = i
        while first > 0 and dt[first - 1] < bound[i]:
            first -= 1
        while last < dt.size - 1 and dt[last + 1] < bound[i]:
            last += 1
        if found and first <= found[-1][1]:
            first = min(first, found.pop()[0])  # the same cut: its last step has longer ones near it
        found.append((int(first), int(last)))
    return found


def _tolerance(steps: Steps) -> Iterator[Finding]:
    largest = np.max(abs(steps.u), axis=0)
    small = (largest > 0) & (largest < np.max(steps.weight, axis=0))
    if steps.is_adaptive and np.any(small):
        i = int(np.argmax(small))
        yield Finding(
            "tolerance",
            True,
            None,
            f"{steps.names[i]} is never larger than {largest[i]:.1g}, and the tolerances allow errors of "
            f"{np.max(steps.weight[:, i]):.1g} in it: no digit was asked for.",
            "Pass a smaller atol, or one for each component.",
        )


def _round_off(steps: Steps) -> Iterator[Finding]:
    eps = np.finfo(steps.u.dtype).eps
    unit = eps * np.maximum(abs(steps.t[1:]), abs(steps.t[:-1]))
    near = (steps.dt > 0) & (steps.dt < _ROUND_OFF * unit)
    if np.sum(near) > 2:
        i = int(np.argmax(near))
        yield Finding(
            "round_off",
            True,
            float(steps.t[i]),
            f"Steps near t = {steps.t[i]:.6g} are as short as {steps.dt[i]:.1g}, less than {_ROUND_OFF:.0f} units of "
            "round-off of the time: forcing there is known to a few digits.",
            "Measure time from the start of the interval, or use float64.",
        )


def _stiff(steps: Steps) -> Iterator[Finding]:
    """Steps of an explicit method that are bounded by stability: something decays that the solution does not show."""
    rows = steps.eigenvalues_row
    if not steps.is_frozen or not rows.size or steps.dt.size < _MANY:
        return
    fastest = np.maximum(-np.min(steps.eigenvalues.real, axis=1), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        pace = np.linalg.norm(steps.rate[rows], axis=1) / np.linalg.norm(steps.u[rows], axis=1)
    dt = steps.dt[np.minimum(rows, steps.dt.size - 1)]
    bound = (fastest > _STIFF * pace) & (fastest * dt > _BOUND)
    if np.mean(bound) > 0.5:
        i = int(np.argmax(np.where(bound, fastest, 0)))
        yield Finding(
            "stiff",
            False,
            float(steps.t[rows[i]]),
            f"The equation is stiff: parts of it decay within {1 / fastest[i]:.1g}, and keep the {steps.dt.size} steps "
            "as short, although the solution changes more slowly.",
            "TS1 (method='EK1') takes longer steps.",
        )


def differs(steps: Steps, rows: np.ndarray, other: np.ndarray, std: np.ndarray) -> Iterator[Finding]:
    """Whether a second solve, with tighter tolerances, differs by more than the first one says.

    ``rows``: the ends of steps at which it is known; ``other``, ``std``: its mean there, and the standard deviation of
    the first solve, ``(some, d)``.
    """
    gap = abs(other - steps.u[rows])
    excess = np.minimum(gap / (_DIFFERENT * std + np.finfo(float).tiny), gap / (_FAR * steps.weight[rows]))
    excess = np.maximum(excess, gap / (_UNKNOWN * steps.size)) if not steps.is_uncertain else excess
    excess = np.where(np.isfinite(other), excess, np.inf)
    row, worst = np.unravel_index(np.argmax(excess), excess.shape)
    if excess[row, worst] > 1:
        times = gap[row, worst] / max(std[row, worst], np.finfo(float).tiny)
        yield Finding(
            "differs",
            True,
            float(steps.t[rows[row]]),
            f"A solve with a tenth of the tolerances, and shorter steps, differs by {gap[row, worst]:.1g} in "
            f"{steps.names[worst]} at t = {steps.t[rows[row]]:.6g}, {times:.1g} of its standard deviations.",
            "Tighten rtol and atol, and check again.",
        )


def of_events(events: Any) -> Iterator[Finding]:
    """Whether the uncertainty of a solution expects another number of events than have happened."""
    which = np.asarray(events.which)
    for i, expected in enumerate(np.asarray(events.expected_crossings)):
        happened = int(np.sum(which == i))
        if np.isfinite(expected) and abs(expected - happened) > 0.5:
            yield Finding(
                "events",
                True,
                None,
                f"Event {i} has happened {happened} times, and the uncertainty of the solution expects {expected:.3g}: "
                "some were perhaps missed, or seen where there are none.",
                "Tighten rtol and atol.",
            )


_RULES = (_unseen, _sensitive, _uncertain, _miscalibrated, _jumps, _tolerance, _round_off, _stiff)
