"""Is it right? Reasons to doubt a solution, from its steps and from the equation between them.

``Solution.check`` evaluates the equation inside of the steps, where the solver has not looked (the residual of a
continuous approximation is its defect: Enright 1989, "A new error-control for initial value solvers"), lets errors of
the size of the tolerances grow along the solution, and looks at the lengths of the steps. ``findings`` has the rules.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..equations.problems import ODE, Lifted
from ..estimation.strategies import Filter
from ..posterior.origin import Origin, origin_of
from ..posterior.reasons import reason
from ..posterior.solution import SaveAt, Solution
from ..posterior.trajectory import Trajectory
from ..requests import floats_to_arrays, smallest_rtol
from ..solver import Solver, solve_through
from ..stepping.controllers import IntegralController
from ..stepping.loops import ForwardLoop
from ..stepping.result import has_failed, in_words
from ..util.checks import require_flag
from ..util.components import columns, component_names
from .check_report import CheckReport, Finding
from .findings import Steps, all_findings, differs, of_events
from .inspection import inspect


# At how many times of each step the equation is evaluated, and at how many of the whole interval: events that are short
# beside a long step would fall between the former.
_IN_STEP, _IN_INTERVAL, _IN_LARGE = 6, 2048, 256
# Up to how many components, derivatives included, Jacobians are taken, and how many eigenvalues are computed.
_LARGEST, _EIGENVALUES, _ROWS = 64, 256, 24
# How much tighter the tolerances of a second solve are, how many steps it takes at least, at how many times it is
# compared, and how many times as many attempts it has.
_TIGHTER, _SHORTER, _COMPARED, _PATIENCE = 10.0, 64, 32, 8


def check(solution: Solution, solver: Any = None, args: Any = None, thorough: Any = False) -> CheckReport:
    """The ``CheckReport`` of ``Solution.check``, which describes it; arguments and errors are the same."""
    require_flag(thorough, "check(thorough)")
    if solution.t.ndim != 1:
        raise ValueError("This is a batch of solutions: check one of them, as jax.tree.map(lambda x: x[0], solutions).")
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"check(solver) must be the Solver of the solution, got {solver!r}.")
    origin = origin_of(solution)
    if origin is None and solver is not None and solution.state is not None:
        origin = Origin(solver, None, solution.t[0], solution.state.t, args, {})
    facts, found = _facts(solution), _ending(solution, origin)
    words = _why_not(solution, origin)
    if words is not None:
        return _without_steps(found, facts, words)
    assert origin is not None
    kept = solution
    if not _has_steps(solution):
        kept = _again(origin)
        facts.append(
            ("steps", "solved again to look at them, as they had not been kept (solve_ivp: dense_output=True)")
        )
    steps, skipped = _steps(kept, origin)
    if steps is None:
        return _without_steps(found, facts, "No step was accepted.")
    found += [*_without_numbers(solution), *all_findings(steps)]
    if solution.events is not None:
        found += of_events(solution.events)
    if thorough:
        found += _compared(steps, origin, skipped)
    found.sort(key=lambda finding: not finding.is_doubt)
    return CheckReport(
        tuple(found),
        tuple([*facts, *_spread(steps, solution), *_hardest(steps), *_growth(steps)]),
        tuple(skipped),
        steps.t,
        np.max(steps.std / steps.weight, axis=1),
        None if steps.growth is None else np.max(steps.growth / steps.weight, axis=1),
        steps.points_t,
        steps.defect,
        steps.t[steps.eigenvalues_row],
        steps.eigenvalues,
    )


def _has_steps(solution):
    return solution.is_dense and isinstance(solution.trajectory, Trajectory)


def _why_not(solution, origin):
    """The reason, in words, why the steps of a solution cannot be looked at; ``None`` if they can."""
    if solution.state is None:
        return "A boundary value problem is checked by the error estimate that it reports as its standard deviation."
    if solution.layout.factorisation.own_algebra:
        return f"{type(solution.layout.factorisation).__name__} has an algebra of its own."
    if origin is None:
        return (
            "It is not known from what this solution was computed: it is a copy, or comes out of jax.jit or jax.vmap. "
            "Pass the solver, and what else it was called with: solution.check(solver, args=args)."
        )
    if not _has_steps(solution) and origin.u0 is None:
        return "Its steps were not kept: solve with save_at=SaveAt(dense=True) (solve_ivp: dense_output=True)."
    return None


def _without_steps(findings, facts, words):
    nothing = np.zeros(0)
    empty = nothing, nothing, None, nothing, nothing, nothing, np.zeros((0, 0))
    return CheckReport(tuple(findings), tuple(facts), (words,), *empty)


def _ending(solution, origin):
    """A finding if the solve has failed."""
    if not np.any(has_failed(solution.result)):
        return []
    name, _, why = in_words(solution.result).partition(": ")
    if origin is not None and origin.grid is None and solution.state is not None:
        why = reason(solution, origin.solver, origin.t0, origin.t1)
    t = None if solution.state is None else float(solution.state.t)
    return [Finding("failed", True, t, f"{name}: {why}", "")]


def _facts(solution):
    """Pairs of a name and words about how the solve ended."""
    facts = [("result", in_words(solution.result))]
    if not solution.layout.factorisation.own_algebra and solution.state is not None:
        facts.append(
            ("log likelihood", f"{float(solution.log_likelihood) + 0.0:.6g} that the equation holds at all steps")
        )
    return facts


def _again(origin):
    """The ``Solution`` of the same problem by a filter, with the same steps, all of which are kept."""
    solver = dataclasses.replace(origin.solver, strategy=Filter())
    save_at = SaveAt(t0=True, dense=True)
    return solver.solve(
        origin.u0, origin.t0, origin.t1, args=origin.args, save_at=save_at, throw=False, **origin.options
    )


def _steps(solution: Solution, origin: Origin) -> tuple[Steps | None, list[str]]:
    """The steps of a solution with what is measured in them, ``None`` without any; and what could not be."""
    path, solver, skipped = solution.trajectory, origin.solver, []
    assert isinstance(path, Trajectory)
    number = int(np.sum(path.reached))
    if number < 2:
        return None, []
    # Programs are compiled for powers of two, and not for every number of steps.
    most = min(1 << math.ceil(math.log2(number)), path.rows.t.size)
    all_t = np.asarray(path.rows.t[:most])
    t = all_t[:number]
    equation = solver.constraint.problem
    ode = equation.ode if isinstance(equation, Lifted) else equation
    is_known = isinstance(ode, ODE)
    if not is_known:
        skipped.append(
            f"The equation inside of steps, and how errors grow: it is a {type(equation).__name__}, not an ODE."
        )
    size = path.layout.size * (ode.order if is_known else 1)
    jacobians = is_known and size <= _LARGEST
    if is_known and not jacobians:
        skipped.append(f"How errors grow, and stiffness: the Jacobian of {size} components is large.")
    step, since = _points(all_t, number, _IN_INTERVAL if size <= _LARGEST else _IN_LARGE)
    tolerances, args = solver.controller.tolerances.of(path.layout), floats_to_arrays(origin.args)
    frozen = not solver.constraint.first_order
    # Where each step has a scale that follows from its own residual these agree, whatever they are.
    is_local = solver.calibration.is_local or solver.constraint.evaluations > 1
    points = step, since
    measured = inspect(path, ode if is_known else None, tolerances, args, most, points, jacobians, frozen, is_local)
    measured = jax.tree.map(np.asarray, measured)
    real = np.flatnonzero(step < number - 1) if is_known else np.zeros(0, int)
    points_t, defect = (all_t[step] + since)[real], measured.defect[real]
    if not np.all(np.isfinite(defect)):
        # The prediction may leave the domain of the vector field, where the solution does not.
        first = np.min(points_t[~np.isfinite(defect)])
        skipped.append(
            f"The equation at t = {first:.6g} inside of a step, and perhaps elsewhere: it is infinite or NaN."
        )
        defect = np.where(np.isfinite(defect), defect, 0)
    growth, rows, values = None, np.zeros(0, int), np.zeros((0, size))
    if measured.jacobian is not None:
        finite = np.all(np.isfinite(measured.jacobian[:number]), axis=(1, 2))
        rows = _some_rows(number, size)
        rows = rows[finite[rows]]
        values = np.linalg.eigvals(measured.jacobian[rows])
        if np.all(finite):
            growth = np.where(np.isnan(measured.growth[:number]), np.inf, measured.growth[:number])  # too large
        else:
            skipped.append(f"How errors grow: the Jacobian is infinite or NaN at t = {t[np.argmin(finite)]:.6g}.")
    steps = Steps(
        t=t,
        dt=abs(np.diff(t)),
        u=measured.u[:number],
        std=measured.std[:number],
        rate=measured.rate[:number],
        weight=np.maximum(measured.weight[:number], np.finfo(t.dtype).tiny),
        growth=growth,
        seen=measured.seen[: number - 1],
        whitened=None if is_local else measured.whitened[: number - 1],
        points_t=points_t,
        points_step=step[real],
        defect=defect,
        eigenvalues_row=rows,
        eigenvalues=values,
        names=component_names(solution.layout.example, 0),
        stops=_stops(solution, origin),
        is_frozen=frozen,
        is_uncertain=solution.spread is not None or "data" in origin.options or bool(np.any(measured.std[0] > 0)),
        is_adaptive=origin.grid is None,
    )
    return steps, skipped


def _points(t, number, uniform):
    """Times inside of the steps, as the number of their step and the time since its start.

    Some in every step, and some spread over the whole interval. ``t``: the ends of ``number - 1`` steps, repeated.
    """
    steps, ends = t.size - 1, t[:number]
    step = np.repeat(np.arange(steps), _IN_STEP)
    since = np.tile((np.arange(_IN_STEP) + 0.5) / _IN_STEP, steps) * np.diff(t)[step]
    spread = (np.arange(uniform) + 0.5) / uniform * (ends[-1] - ends[0])
    behind = np.searchsorted(abs(ends - ends[0]), abs(spread), side="right") - 1
    behind = np.clip(behind, 0, number - 2)
    since = np.concatenate([since, spread - (ends[behind] - ends[0])]).astype(t.dtype)
    return np.concatenate([step, behind]), since


def _some_rows(number, size):
    return np.unique(np.linspace(0, number - 1, max(4, min(_ROWS, _EIGENVALUES // size))).astype(int))


def _stops(solution, origin):
    """The times at which steps had to end: stops of the controller, events, and times of data."""
    times = [np.asarray(origin.solver.controller.limits.stops)]
    if solution.events is not None:
        times.append(np.asarray(solution.events.t))
    if "data" in origin.options:
        times.append(np.asarray(origin.options["data"].ts))
    known = np.concatenate(times)
    return known[np.isfinite(known)]


def _without_numbers(solution):
    """A finding if a solve that calls itself successful has a mean or a standard deviation that is not finite."""
    if np.any(has_failed(solution.result)):
        return
    for name, values in (("mean", solution.mean), ("standard deviation", solution.std)):
        finite = np.all(np.isfinite(columns(values)), axis=1)
        if not np.all(finite):
            t = float(solution.t[np.argmin(finite)])
            yield Finding("nonfinite", True, t, f"The {name} is infinite or NaN at t = {t:.6g}.", "Do not use it.")
            return


def _spread(steps, solution):
    """The largest standard deviation, relative to its component: of all that is uncertain, and of the steps alone."""

    def largest(std):
        share = np.max(std, axis=0) / steps.size
        worst = int(np.argmax(share))
        name = steps.names[worst]
        return f"up to {np.max(std[:, worst]):.2g} in {name}, {share[worst]:.1g} of the largest {name}"

    if solution.spread is None:
        yield "standard deviation", largest(steps.std)
        return
    yield "standard deviation", f"{largest(columns(solution.std))}, at the times that were saved"
    yield "numerical part", f"{largest(steps.std)}: without the uncertainty of u0"


def _hardest(steps):
    """Where half of the steps lie."""
    half = -(-steps.dt.size // 2)
    spans = abs(steps.t[half:] - steps.t[:-half])
    first = int(np.argmin(spans))
    share = spans[first] / np.sum(steps.dt)
    lie = f"{share:.0%}" if share > 0.01 else "less than 1%"
    yield (
        "hardest",
        f"half of the {steps.dt.size} steps lie in {lie} of the interval, from t = {steps.t[first]:.6g} to "
        f"{steps.t[first + half]:.6g}",
    )


def _growth(steps):
    """How much errors have grown at the end, and the fastest decay and growth."""
    if steps.growth is not None:
        grown = np.max(steps.growth[-1] / steps.weight[-1])
        yield (
            "errors grown",
            f"to {grown:.2g} times the tolerances at t1, if every step errs by as much as they allow",
        )
    if steps.eigenvalues.size:
        left, right = np.min(steps.eigenvalues.real) + 0.0, np.max(steps.eigenvalues.real) + 0.0  # no -0
        yield "eigenvalues", f"real parts from {left:.2g} to {right:.2g}"


def _compared(steps, origin, skipped):
    """The finding, if any, that a second solve with tighter tolerances and shorter steps has another result."""
    if origin.u0 is None or origin.grid is not None:
        skipped.append("A second solve: it is not known how this one was started, or it is one on a grid.")
        return []
    if "data" in origin.options or "events" in origin.options:
        skipped.append("A second solve: it would meet data and events at other times.")
        return []
    solver, dtype = origin.solver, steps.t.dtype
    rows = np.unique(np.linspace(0, steps.t.size - 1, _COMPARED + 1).astype(int))[1:]
    rows = rows[np.append(np.diff(steps.t[rows]) != 0, True)]
    tighter = jax.tree.map(lambda x: x / _TIGHTER, solver.controller.tolerances)
    rtol = jax.tree.map(lambda x: np.where(x > 0, np.maximum(x, smallest_rtol(dtype)), x), tighter.rtol)
    limits = solver.controller.limits
    longest = min(float(limits.longest), float(np.sum(steps.dt)) / _SHORTER)
    stops = {"stop_at": limits.stops} if limits.stops.size else {}
    again = dataclasses.replace(
        solver,
        strategy=Filter(),
        controller=IntegralController(rtol, tighter.atol, dt_max=longest, **stops),
        loop=ForwardLoop(_PATIENCE * solver.loop.max_steps),
    )
    ts = steps.t[rows]
    other = solve_through(again, jnp.asarray(ts), origin.u0, origin.t0, steps.t[-1], origin.args, save_at=ts)
    return list(differs(steps, rows, columns(other.mean), steps.std[rows]))
