"""The adaptive solve: one attempt of a step after the other, from prediction to decision.

The controller decides on values without derivatives; an accepted attempt gets its derivative back. So gradients are
those of the accepted steps, frozen, and nothing of a rejected or non-finite attempt reaches them.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ..algebra.linalg import choose, detach, is_finite
from .attempt import Attempt
from .loops import AbstractLoop
from .progress import tell
from .residuals import defect_inside, scale_inside, with_defects, with_scale_inside
from .result import Result
from .state import State
from .step import Step
from .step_sizes import (
    Control,
    defect_norm,
    error_norm,
    next_time,
    shortest_near_zero,
    spread_norm,
    surprise,
    tolerance_in_range,
    trusted,
)
from .times import Interval, beside


# By which factor the error lets the next step grow where the residual is looked at inside this one, too.
_LONGER = 1.5
# How many tolerances the mean may move beyond what the noise of a step explains, under a scale that does not follow.
_SURPRISE = 10.0


class Start(eqx.Module):
    """The last restart at a jump: its time, and for which batch elements all residuals since were zero."""

    t: Float[Array, ""]
    unseen: Bool[Array, "*batch"]


class AdaptiveState(eqx.Module):
    """A running adaptive solve: the solver's state, the next step's length, and the controller's memory.

    ``anew``: the last stop at which the state has started anew; ``None`` in a solve without stops.

    >>> import probode
    >>> probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0).state.t.item()
    1.0
    """

    current: State
    dt: Float[Array, ""]
    controller: Any
    num_steps: Int[Array, ""]
    num_accepted_steps: Int[Array, ""]
    result: Result
    anew: Start | None = None

    def __repr__(self) -> str:
        return f"AdaptiveState(current={self.current!r})"

    @property
    def t(self) -> Float[Array, ""]:
        """The time reached."""
        return self.current.t


def begin(control: Control, state: State, dt: Float[Array, ""]) -> AdaptiveState:
    """A solve before its first attempt."""
    zero = jnp.zeros((), jnp.int32)
    result = Result.where(is_finite(state.distribution), Result.successful, Result.initial_state_nonfinite)
    anew = None
    if control.stops(dt.dtype) is not None:
        anew = Start(jnp.full((), jnp.nan, dt.dtype), jnp.zeros(state.layout.batch_shape, bool))
    return AdaptiveState(state, lax.stop_gradient(dt), control.controller.init(dt.dtype), zero, zero, result, anew)


def end(solve: AdaptiveState, interval: Interval) -> AdaptiveState:
    """The solve with its result, which the end of a loop does not tell."""
    unfinished = (solve.t != interval.t1) & (solve.result == Result.successful)
    return dataclasses.replace(solve, result=Result.where(unfinished, Result.max_steps_reached, solve.result))


def is_running(solve: AdaptiveState, interval: Interval, loop: AbstractLoop) -> Bool[Array, ""]:
    """Whether a solve goes on: it has neither arrived nor failed, and attempts are left."""
    unfinished = interval.remaining(solve.t) > 0
    return unfinished & (solve.num_steps < loop.max_steps) & (solve.result == Result.successful)


def is_usable(state: State) -> Bool[Array, ""]:
    """Whether a state, and what is told of it, holds no number that is infinite or NaN.

    (Statistics are the calibration's own business, and data that cannot be are told by their evidence. A factorisation
    with an algebra of its own need not know the evidence.)
    """
    evidence = None if state.layout.factorisation.own_algebra else state.evidence
    return is_finite((state.distribution, state.output_scale, evidence))


class Leg(eqx.Module):
    """Where an attempt goes: from the time of the state to ``t``, over the signed length ``dt``.

    ``seen_at``: the time at which the equation is evaluated at the end: where it jumps at ``t`` a unit of round-off
    before that. ``since``: likewise where the step starts, a unit of round-off after a jump; ``None`` in a solve
    without stops. ``clipped``: whether the length was cut to hit a time. ``floor``: the shortest length there.
    """

    t: Float[Array, ""]
    dt: Float[Array, ""]
    seen_at: Float[Array, ""]
    since: Float[Array, ""] | None
    clipped: Bool[Array, ""]
    floor: Float[Array, ""]


class Taken(eqx.Module):
    """What is left when an attempt has been conditioned or rejected.

    ``past``: an earlier state given ``current``, as one flat array. ``influence``: of the equation, where it is kept.
    ``fine``: whether conditioning has returned finite numbers. ``likely``: whether the scale explains the residual.
    """

    current: State
    past: Float[Array, " flat"]
    influence: Any
    fine: Bool[Array, ""]
    likely: Bool[Array, ""]


class Stepper:
    """Attempts of steps in an interval, for the body of a loop.

    (No module: it holds a function that was traced once, with what the user's functions close over as inputs.)
    """

    def __init__(self, step: Step, control: Control, solve: AdaptiveState, interval: Interval):
        self.step, self.control, self.interval, t1 = step, control, interval, interval.t1
        self.layout = solve.current.layout
        self.stops, self.smallest = control.stops(t1.dtype), shortest_near_zero(solve.dt)
        # The length of a step that is not taken, in lanes of a vmap: short, but with powers that are numbers.
        self.harmless = interval.direction * jnp.finfo(t1.dtype).eps * lax.stop_gradient(solve.dt)
        # Traced once; what the user's functions close over becomes an input that can be differentiated.
        times = [t1] * (2 if self.stops is None else 3)
        attempt = ft.partial(step.attempt, known=solve.current.derivatives_known)
        self.attempt = eqx.filter_closure_convert(attempt, solve.current.distribution, *times)

    def running(self, solve: AdaptiveState) -> Bool[Array, ""]:
        """Whether a solve goes on."""
        return is_running(solve, self.interval, self.control.loop)

    def advance(
        self, solve: AdaptiveState, past: Array, leaving: Callable, influence: Any = None
    ) -> tuple[AdaptiveState, Array, Any, Bool[Array, ""]]:
        """One attempt of a step: the solve after it, its past, the influence of the equation, whether it was accepted.

        1. Predict: ``m = A mean``, ``P = A cov A^T + s^2 Q``.
        2. Linearise and compare: ``z(t + dt, x) ~ z + H (x - m)``, whitened by ``S = H Q H^T``; the local scale
           ``s^2 = z^T S^-1 z / size(z)``.
        3. Measure: the norm of the estimated error over ``atol + rtol max(|u|, |m|)``.
        4. Decide: the controller accepts a norm up to one, and proposes the next length.
        5. If accepted, condition on ``z = 0``: ``K = P H^T (H P H^T)^-1``, ``mean = m - K z``,
           ``cov = (I - K H) P``; and refuse after all what is not finite, or what the scale does not explain.

        ``past``, ``influence``: before the attempt, the first as one flat array. ``leaving(past, t)``: the
        ``Conditional`` that a step to ``t`` carries on, if any: of the state kept last, or of the one that it leaves.
        """
        active, before = self.running(solve), solve.current
        leg = self.leg(solve, active)
        attempted = detach(self.attempt(*detach(self.inputs(before, leg))))
        norm, attempted, unseen = self.measure(solve, leg, attempted)
        length, order = jnp.abs(detach(leg.dt)), self.step.order_of_error(attempted)
        good, proposed, memory = self.control.controller.propose(length, norm, order, solve.controller)
        good = good & jnp.isfinite(norm) & active
        # A rejected attempt leaves the state as it was.
        rejected = lambda *_: Taken(before, past, influence, jnp.array(True), jnp.array(True))  # noqa: E731
        accepted = lambda before, past, left, influence: self.condition(  # noqa: E731
            before, leg, good, attempted, unseen, (past, left, influence)
        )
        taken = lax.cond(good, accepted, rejected, before, past, leaving(past, leg.t), influence)
        new, good = self.decide(solve, leg, active, good, norm, taken, attempted, unseen, (proposed, memory))
        return new, taken.past, taken.influence, good

    def inputs(self, before: State, leg: Leg) -> tuple[Any, ...]:
        """What the prediction of an attempt is a function of."""
        return before.distribution, leg.seen_at, leg.dt, *(() if self.stops is None else (leg.since,))

    def leg(self, solve: AdaptiveState, active: Bool[Array, ""]) -> Leg:
        """Where the next attempt goes."""
        t_now = solve.t
        t, dt, clipped, floor = next_time(self.control, t_now, solve.dt, self.interval, self.smallest)
        direction = self.interval.direction
        dt = jnp.where(active, dt, direction)
        if self.stops is None:
            return Leg(t, dt, t, None, clipped, floor)
        # Where the equation jumps it is that of the step's own side.
        seen_at, since = beside(t, -direction, self.stops), beside(t_now, direction, self.stops)
        return Leg(t, dt, seen_at, since, clipped, floor)

    def measure(
        self, solve: AdaptiveState, leg: Leg, attempted: Attempt
    ) -> tuple[Float[Array, ""], Attempt, Bool[Array, "*batch"] | None]:
        """The norm of an attempt's error, the attempt with what had to be looked at for it, and ``Start.unseen``."""
        now, step, control = solve.current, self.step, self.control

        def size(attempted):
            return error_norm(control, self.layout, detach(now), detach(leg.dt), attempted)

        def seen(_):
            # Only lengths are decided from it: a derivative would be computed, and compiled, for nothing.
            constraint, prior, args = detach((step.constraint, step.member(attempted.prior), step.args))
            before, at, dt = detach((now.distribution, leg.seen_at, leg.dt))
            if attempted.correction is not None:
                defect = defect_inside(constraint, prior, before, at, dt, attempted, self.layout, args)
                inside = defect_norm(control, self.layout, detach(now), dt, attempted, defect)
                return jnp.maximum(size(attempted), inside), nothing
            looked = with_defects(constraint, prior, before, at, dt, attempted, self.layout, args)
            return size(looked), scale_inside(looked.innovation, looked.equation, self.layout)

        nothing = jnp.zeros_like(attempted.innovation.scale)
        if not control.error.needs_defects:
            norm, inside = size(attempted), nothing
        elif attempted.equation.whole or attempted.equation.gives is None:
            norm, inside = seen(None)
        else:
            # Without a Jacobian evaluations are most of the cost: the residual inside is looked at only where the error
            # is so small that the next step will be longer by half or more, and might skip over something.
            blind = size(attempted)
            quiet = blind < _LONGER ** -step.order_of_error(attempted)
            norm, inside = lax.cond(quiet, seen, lambda _: (blind, nothing), None)
        norm, inside = detach((norm, inside))
        unseen = None if solve.anew is None else solve.anew.unseen
        if now.is_spread:
            ahead = step.ahead(now, leg.seen_at, attempted)
            norm = jnp.maximum(norm, detach(spread_norm(control, self.layout, now, leg.dt, attempted, ahead)))
            unseen = None if unseen is None else unseen & (ahead.scale == 0)
        innovation = with_scale_inside(attempted.innovation, inside)
        return norm, dataclasses.replace(attempted, innovation=innovation), unseen

    def condition(
        self,
        before: State,
        leg: Leg,
        good: Bool[Array, ""],
        attempted: Attempt,
        unseen: Bool[Array, "*batch"] | None,
        others: tuple[Array, Any, Any],
    ) -> Taken:
        """An attempt that was accepted, conditioned on the equation; the state before it if that is of no use."""
        past, left, influence = others
        # Rejected lanes of a vmap come here too: they must differentiate at a point that is known to be fine.
        t = jnp.where(good, leg.t, before.t)
        seen_at = t if leg.since is None else jnp.where(good, leg.seen_at, leg.since)
        at = dataclasses.replace(leg, seen_at=seen_at, dt=jnp.where(good, leg.dt, self.harmless))
        values = jax.tree.map(lambda x: jnp.where(good, x, 0), attempted)
        mean = jnp.where(good, attempted.mean, detach(before.distribution.mean))
        known = _with_derivative(dataclasses.replace(values, mean=mean), self.attempt, self.inputs(before, at))

        def conditioned(before, t, known, left, *sides):
            stepped = self.step.accept(before, known, t, left, *sides)
            likely: Array | bool = True
            if self.control.refuses_unexplained:
                moved = surprise(self.control, self.layout, *detach((before, known, stepped.influence)))
                likely = moved <= _SURPRISE
            effect = None if influence is None else stepped.influence
            return stepped.state, ravel_pytree(stepped.past)[0], effect, likely

        inputs = before, t, known, left, *(() if self.stops is None else (seen_at, unseen))
        (*after, likely), fine = _with_verdict(eqx.filter_closure_convert(conditioned, *inputs), inputs)
        likely = jnp.asarray(likely)
        current, after_past, effect = choose(fine & likely, tuple(after), (before, past, influence))
        return Taken(current, after_past, effect, fine, likely)

    def decide(
        self,
        solve: AdaptiveState,
        leg: Leg,
        active: Bool[Array, ""],
        good: Bool[Array, ""],
        norm: Float[Array, ""],
        taken: Taken,
        attempted: Attempt,
        unseen: Bool[Array, "*batch"] | None,
        proposal: tuple[Float[Array, ""], Any],
    ) -> tuple[AdaptiveState, Bool[Array, ""]]:
        """The solve after an attempt, with the length of the next one and a result where there is none; whether it was
        accepted."""
        (proposed, memory), length = proposal, jnp.abs(detach(leg.dt))
        usable = taken.fine & taken.likely
        spoilt, good, finite = good & ~usable, good & usable, jnp.isfinite(norm) & taken.fine
        proposed = trusted(self.step.caution(attempted) * proposed, length)
        # A step cut short by t1 or stop_at says little about the next one.
        kept = jnp.where(leg.clipped, jnp.maximum(proposed, solve.dt), proposed)
        # A few units of round-off times 0.95 are rounded to the same length again: shorter by at least two of them.
        shorter = jnp.where(spoilt, length / 2, length - leg.floor / 2)
        proposed = jnp.where(good, kept, jnp.minimum(proposed, shorter))
        longest = self.control.controller.limits.longest.astype(length.dtype)
        proposed = jnp.clip(lax.stop_gradient(proposed), leg.floor, longest)
        # What was asked for, too: the length of the shortest step is rounded to one between two times.
        stuck = active & ~good & (jnp.minimum(solve.dt, length) <= leg.floor)
        failure = Result.where(taken.likely, Result.step_size_too_small, Result.scale_mismatch)
        failure = Result.where(finite, failure, Result.nonfinite)
        tiny = good & ~tolerance_in_range(self.control, detach(self.layout.unpack(attempted.mean)[0]))
        anew = None
        if solve.anew is not None and unseen is not None:
            anew = Start(solve.anew.t, jnp.where(good, unseen & attempted.innovation.is_zero, solve.anew.unseen))
        new = AdaptiveState(
            taken.current,
            proposed,
            choose(active & usable, lax.stop_gradient(memory), solve.controller),
            solve.num_steps + 1,
            solve.num_accepted_steps + good.astype(jnp.int32),
            Result.where(stuck | tiny, Result.where(stuck, failure, Result.tolerance_out_of_range), solve.result),
            anew,
        )
        if self.control.progress is not None:
            share = self.interval.share
            tell(self.control.progress, share(solve.t), jnp.where(self.running(new), share(new.t), 1))
        return new, good


@eqx.filter_custom_jvp
def _with_derivative(values, fn, inputs):
    """``values``, known to be ``fn(*inputs)``, with the derivative of ``fn``: nothing is computed twice forwards."""
    return values


@_with_derivative.def_jvp
def _(primals, tangents):
    values, fn, inputs = primals
    _, t_fn, t_inputs = tangents
    _, tangent = eqx.filter_jvp(lambda fn, inputs: fn(*inputs), (fn, inputs), (t_fn, t_inputs))
    # Not `values` themselves: a second derivative has to see the first one.
    return _with_derivative(values, fn, inputs), tangent


@eqx.filter_custom_jvp
def _with_verdict(fn, inputs):
    """What conditioning returns, the state first, and whether this is finite: only then it has a derivative.

    An attempt can be fine where what conditioning makes of it is not: a further evaluation of the equation may leave
    its domain, a covariance the range of floating-point numbers.
    """
    out = fn(*inputs)
    return out, lax.stop_gradient(is_usable(out[0]))


@_with_verdict.def_jvp
def _(primals, tangents):
    # Zero times NaN is NaN: what is not to count must neither come out of the derivative nor, backwards, go into it.
    def is_none(x):
        return x is None

    moving = jax.tree.map(lambda t, x: None if t is None else x, tangents, primals, is_leaf=is_none)
    still = jax.tree.map(lambda t, x: x if t is None else None, tangents, primals, is_leaf=is_none)

    def run(moving):
        fn, inputs = eqx.combine(moving, still)
        return fn(*inputs)

    out, derivative = jax.linearize(run, moving)
    fine = lax.stop_gradient(is_usable(out[0]))

    def where_fine(tree):
        return jax.tree.map(lambda x: jnp.where(fine, x, 0) if eqx.is_inexact_array(x) else None, tree)

    return (out, fine), (where_fine(derivative(where_fine(tangents))), None)
