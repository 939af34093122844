"""Why a solve has not reached ``t1``, and what would help: from the numbers of the solve and the parts of its solver.

Remedies are named in the order in which they should be tried. All are arguments of ``Solver`` and of ``solve_ivp``.
"""

import dataclasses
import functools as ft
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..estimation.calibration import returns_factor
from ..priors.prior import AbstractPriorFamily
from ..stepping.result import has_failed, in_words
from ..util.checks import is_traced
from ..util.failures import stop_if
from .solution import Solution


# A solve that would need more attempts than that, or that many times as many, needs another method first.
_TOO_MANY = 1e6
_MANY_TIMES = 16
# So few attempts say nothing about the pace.
_FEW = 100
# Components whose sizes differ by more than this need a scale each.
_UNEQUAL = 1e3
# How large a solution has become if it seems to blow up.
_GROWN = 1e8
# How short the last step then is, compared with all others.
_SHORTENED = 1e-2

# Estimates whose solutions come out better than asked for.
_STRICT = ("ResidualError",)

_NO_THROW = "throw=False returns what was reached."


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is known of a solver before it runs: names of parts, and what decides which remedies there are."""

    loop: str
    controller: str
    calibration: str
    prior: str
    num_derivatives: int
    order: int
    is_explicit: bool
    first_order: bool
    evaluations: int
    error: str
    is_relative: bool
    is_lifted: bool
    has_events: bool
    shares_scale: bool
    can_couple: bool
    rescales: bool
    dtype: str


class Facts(NamedTuple):
    """The numbers of a solve that has ended, on the host or in a program.

    ``us``: the last derivatives, ``(n, d)``; ``rtol``: the tightest of all components.
    """

    result: Any
    t: Any
    t0: Any
    t1: Any
    dt: Any
    num_steps: Any
    num_accepted: Any
    us: Any
    rtol: Any
    longest: Any
    shortest: Any


def raise_unless_successful(solution: Solution, solver: Any, t0: Any, t1: Any) -> Solution:
    """The solution unchanged, if it has reached ``t1``; otherwise raises ``RuntimeError``.

    The error says why the solve has stopped, and what would help; in a compiled program it is raised when that runs.
    ``solver``, ``t0``, ``t1``: of the solve.
    """
    failed = has_failed(solution.result)
    if not is_traced(failed) and not np.any(failed):
        return solution
    return stop_if(solution, failed, *_known(solution, solver, t0, t1))


def reason(solution: Solution, solver: Any, t0: Any, t1: Any) -> str:
    """Why a solve has not reached ``t1``, and what would help; for a single solution with known numbers."""
    explained, facts = _known(solution, solver, t0, t1)
    return explained(jax.tree.map(np.asarray, facts)).removesuffix(_NO_THROW).rstrip()


def _known(solution, solver, t0, t1):
    """``explain`` with the parts of the solver, and the facts that it needs."""
    state, stats, limits = solution.state, solution.stats, solver.controller.limits
    assert state is not None
    rtol = solver.controller.tolerances.of(solution.layout).rtol
    facts = Facts(
        solution.result,
        state.t,
        t0,
        t1,
        state.dt,
        stats["num_steps"],
        stats["num_accepted_steps"],
        state.current.layout.unpack(state.current.distribution.mean),
        rtol if rtol.ndim == 0 else jnp.min(rtol),
        limits.longest,
        limits.shortest,
    )
    parts = _parts(solver, solution.layout, has_events=solution.events is not None)
    return ft.partial(explain, parts), facts


def _parts(solver, layout, *, has_events):
    constraint, prior, problem = solver.constraint, solver.prior, solver.constraint.problem
    return Parts(
        loop=type(solver.loop).__name__,
        controller=type(solver.controller).__name__,
        calibration=type(solver.calibration).__name__,
        prior=type(prior).__name__,
        num_derivatives=prior.num_derivatives,
        order=problem.num_initial_values,
        is_explicit=problem.is_explicit,
        first_order=constraint.first_order,
        evaluations=constraint.evaluations,
        error=type(solver.error).__name__,
        is_relative=isinstance(prior, AbstractPriorFamily) or not hasattr(prior, "output_scale"),
        is_lifted=problem.num_rows > 1,
        has_events=has_events,
        shares_scale=layout.batch_shape == () or layout.factorisation.couples_equations,
        can_couple=layout.couples or (layout.factorisation.couples_equations and not layout.factorisation.adapts),
        rescales=returns_factor(solver.calibration, layout.batch_shape) or not solver.calibration.is_local,
        dtype=str(layout.dtype),
    )


def explain(parts: Parts, facts: Facts | None) -> str:
    """Why a solve has failed, how far it came, and what would help; ``facts``: NumPy arrays, ``None`` if not known."""
    if facts is None:
        return "The solve stopped before t1."
    name, _, why = in_words(facts.result).partition(": ")
    steps, rejected = int(facts.num_steps), int(facts.num_steps) - int(facts.num_accepted)
    span = f"[{_shown(facts.t0)}, {_shown(facts.t1)}]"
    reached = f"It reached t = {facts.t} of {span} in {steps} attempts, {rejected} of them rejected."
    return " ".join([why, *([reached] if steps else []), *_REMEDIES[name](parts, facts), _NO_THROW])


def _shown(t):
    """A time in six digits, or in all that it has if these are not it: intervals may be short."""
    short = f"{t:.6g}"
    return short if np.asarray(t).dtype.type(short) == t else str(t)


def _too_many_steps(parts, facts):
    """What would make the steps longer, and how many there would have to be."""
    steps, needed = int(facts.num_steps), _attempts_to_the_end(facts)
    others = list(_longer_steps(parts, facts))
    # The first steps are short, and say little about the others.
    if steps >= _FEW and needed > _TOO_MANY:
        yield f"At this pace t1 is {needed:.0e} attempts away: more of them alone would not do."
        yield from others or ["Loosen the tolerances or shorten the interval."]
        return
    enough = max(2 * steps, min(1.3 * needed, _TOO_MANY), 4096 if steps < _FEW else 1)
    number = 2 ** math.ceil(math.log2(enough))
    more = [f"Pass loop={parts.loop}(max_steps={number}), or to solve_ivp max_steps={number}."]
    yield from others + more if needed > _MANY_TIMES * steps and steps >= _FEW else more + others


def _longer_steps(parts, facts):
    steps, rtol = int(facts.num_steps), float(facts.rtol)
    if steps > 1 and abs(facts.dt) >= 0.99 * facts.longest:
        yield f"The steps are as long as dt_max={facts.longest:.3g} allows: raise it."
    if not parts.first_order:
        yield 'If the equation is stiff, TS1 in place of TS0 (method="EK1") takes longer steps.'
    if parts.shares_scale and not parts.is_relative and _is_unequal(facts):
        # Isotropic() has one scale, and RelativeScale needs one for each component.
        dense = "" if parts.can_couple else "factorisation=Dense(), "
        yield (
            "The components differ in size by orders of magnitude: "
            f"{dense}prior=RelativeScale({parts.prior}({parts.num_derivatives})) has a scale for each."
        )
    digits = -math.log10(rtol) if rtol > 0 else 0.0
    if digits > 2 * parts.num_derivatives and not parts.is_lifted:
        more = min(8, max(parts.num_derivatives + 1, math.ceil(digits / 2)))
        yield f"rtol={rtol:.1g} is tight for num_derivatives={parts.num_derivatives}: {more} makes the steps longer."
    elif digits > 3:
        yield f"A tolerance looser than rtol={rtol:.1g} makes the steps longer."
    if _has_grown(facts) and facts.dt < _SHORTENED * abs(facts.t - facts.t0) / steps:
        yield from _singular(facts)
    if parts.error in _STRICT:
        # Measured on oscillators: seven tenths and half of the attempts.
        less = "LocalError" if parts.first_order else "StateError"
        yield f"error={parts.error}() is stricter than the tolerance: error={less}() makes the steps longer."
    if parts.first_order and parts.evaluations == 1 and _share_of_rejected(facts) > 0.3:
        yield "Many attempts were rejected: if the equation is far from linear, TS1(evaluations=4, relinearise=True)."


def _bad_start(parts, facts):
    bad = ~np.all(np.isfinite(facts.us), axis=1)
    first = int(np.argmax(bad))
    if not parts.is_explicit:
        yield "It may be that no derivatives satisfy a Residual together with u0: pass another, or an InitialState."
    elif first < parts.order:
        yield f"u0 itself is infinite or NaN, in the component {int(np.argmin(np.isfinite(facts.us[first])))}."
    elif first == parts.order:
        yield "The vector field is infinite or NaN at (t0, u0): start where it is finite, or guard it with jnp.where."
    else:
        known = first - parts.order
        yield (
            f"The vector field has no derivative of order {known} at (t0, u0). "
            f"initialisation=Diffuse({known}) needs none, nor does starting a little later."
        )


def _not_finite(parts, facts):
    if parts.has_events:
        yield "It may be the function of an event, or its reset, that is infinite or NaN there:"
        yield "guard that with jnp.where or jnp.maximum."
    yield from _singular(facts)
    if not _has_grown(facts):
        yield "Or it leaves the domain of the vector field: guard that with jnp.where or jnp.maximum."
    if parts.dtype == "float32":
        yield "Or its derivatives leave the range of float32: choose other units, or float64 (jax_enable_x64)."


def _too_short_steps(parts, facts):
    if facts.shortest > 0 and facts.dt <= 1.01 * facts.shortest:
        yield f"The shortest step allowed is dt_min={facts.shortest:.3g}: lower it."
        return
    yield from _singular(facts)
    if not _has_grown(facts):
        yield f"Where the equation jumps at known times, controller={parts.controller}(stop_at=[...])."
    if parts.dtype == "float32":
        yield "In float32 a step cannot be much shorter: use float64 (jax_enable_x64), or loosen the tolerances."
    elif float(facts.rtol) < 1e-10:
        yield f"rtol={float(facts.rtol):.1g} is near the round-off: loosen it."


def _singular(facts):
    if _has_grown(facts):
        yield f"u has grown to {np.max(np.abs(facts.us[0])):.1e}, and seems to blow up there:"
    else:
        yield "The solution may be singular there:"
    yield f"shorten the interval, to a t1 clearly before {facts.t:.6g}."


def _has_grown(facts):
    return np.max(np.abs(facts.us[0])) > _GROWN


def _wrong_scale(parts, facts):
    if parts.rescales:
        yield f"Use calibration=DynamicCalibration(), whose scale follows, in place of {parts.calibration}()."
    yield (
        "The equation jumps, or is far rougher in some places than in others: name the times of jumps with "
        f"controller={parts.controller}(stop_at=[...]), or tighten the tolerances."
    )


def _no_tolerance(parts, facts):
    yield f"Choose other units of u, or a larger atol: controller={parts.controller}(atol=...)."


def _too_many_events(parts, facts):
    yield "If so many are meant, pass a larger max_events, to solve or solve_ivp."
    yield (
        "Where they follow each other ever faster, as the bounces of a ball that comes to rest, end the solve after a "
        "number of them (Event(terminal=20)), or at an event of its own, as a speed that is small."
    )


_REMEDIES = {
    "max_steps_reached": _too_many_steps,
    "initial_state_nonfinite": _bad_start,
    "nonfinite": _not_finite,
    "step_size_too_small": _too_short_steps,
    "scale_mismatch": _wrong_scale,
    "tolerance_out_of_range": _no_tolerance,
    "max_events_reached": _too_many_events,
}


def _attempts_to_the_end(facts):
    """How many attempts reach ``t1``, by the pace so far or by that of the last step, whichever is better."""
    steps, done, left = int(facts.num_steps), float(abs(facts.t - facts.t0)), float(abs(facts.t1 - facts.t))
    per_step = max(done, float(facts.dt) * int(facts.num_accepted)) / steps
    return steps + left / per_step if per_step > 0 else math.inf


def _share_of_rejected(facts):
    return 1 - int(facts.num_accepted) / max(1, int(facts.num_steps))


def _is_unequal(facts):
    sizes = np.abs(facts.us[0])
    sizes = sizes[sizes > 0]
    return sizes.size > 1 and np.max(sizes) > _UNEQUAL * np.min(sizes)
