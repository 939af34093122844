"""One attempt of a step of an adaptive solve, from prediction to decision; the loop of attempts is in `passing`.

Attempts are not differentiated: for a derivative the accepted steps are taken once more (``Stepper.repeat``), with the
lengths that they had. So nothing of a rejected or non-finite attempt reaches it.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ..algebra.linalg import choose, detach, is_finite
from ..algebra.normal import Normal
from ..util.checks import as_triple
from ..util.tracing import traced_once
from .attempt import Attempt
from .events import Seen, Watch
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
    tolerance_in_range,
    trusted,
    unexplained_norm,
)
from .times import Interval, beside


# If the error would let the next step grow by this factor, the residual inside this step is evaluated, too. With a
# larger one the next step may jump over a pulse that begins in this one; a smaller one costs evaluations.
_LONGER = 1.5
# If the output scale is not that of the step (`is_local` is false), an update may move the mean by this many tolerances
# more than the noise of the step explains. With more, wrong means pass as successful, since the past is moved to fit;
# with less, solves fail with `scale_mismatch` whose means are right.
_UNEXPLAINED = 10.0


class Restart(eqx.Module):
    """The last restart at a jump: its time, and for which batch elements all residuals since were zero."""

    t: Float[Array, ""]
    zero_so_far: Bool[Array, "*batch"] | None


class AdaptiveState(eqx.Module):
    """A running adaptive solve: the solver's state, the next step's length, and the controller's memory.

    ``last_restart``: at a jump; ``None`` in a solve without stops and resets. ``watch``: what is known of events;
    ``None`` in a solve without events.

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
    last_restart: Restart | None = None
    watch: Watch | None = None

    def __repr__(self) -> str:
        return f"AdaptiveState(current={self.current!r})"

    @property
    def t(self) -> Float[Array, ""]:
        """The time reached."""
        return self.current.t


def begin(control: Control, state: State, dt: Float[Array, ""]) -> AdaptiveState:
    """A solve before its first attempt."""
    zero = jnp.zeros((), jnp.int32)
    fine = is_finite(state.distribution)
    result = Result.where(fine, Result.successful, Result.initial_state_nonfinite)
    # Of a start that is not finite no covariance is known. Its mean says which numbers are to blame.
    factor = jnp.where(fine, state.distribution.factor, jnp.nan)
    state = dataclasses.replace(state, distribution=Normal(state.distribution.mean, factor))
    last_restart, watch = None, None if control.events is None else control.events.start(state)
    if control.jumps:
        last_restart = Restart(jnp.full((), jnp.nan, dt.dtype), jnp.zeros(state.layout.batch_shape, bool))
    return AdaptiveState(
        state, lax.stop_gradient(dt), control.controller.init(dt.dtype), zero, zero, result, last_restart, watch
    )


def end(solve: AdaptiveState, interval: Interval) -> AdaptiveState:
    """The solve with the result code ``max_steps_reached`` if its loop has ended before ``t1``."""
    unfinished = (solve.t != interval.t1) & (solve.result == Result.successful)
    return dataclasses.replace(solve, result=Result.where(unfinished, Result.max_steps_reached, solve.result))


def is_running(solve: AdaptiveState, interval: Interval, loop: AbstractLoop) -> Bool[Array, ""]:
    """Whether a solve goes on: it has neither arrived nor failed, and attempts are left."""
    unfinished = interval.remaining(solve.t) > 0
    return unfinished & (solve.num_steps < loop.max_steps) & (solve.result == Result.successful)


def is_usable(state: State) -> Bool[Array, ""]:
    """Whether the distribution, output scale and evidence of a state hold no number that is infinite or NaN.

    Statistics may: they are the calibration's own business. Impossible data show as an evidence of their own that is
    not finite. A factorisation with an algebra of its own need not know the evidence.
    """
    evidence = None if state.layout.factorisation.own_algebra else state.evidence
    return is_finite((state.distribution, state.output_scale, evidence))


class Leg(eqx.Module):
    """Where an attempt goes: from the time of the state to ``t``, over the signed length ``dt``.

    ``seen_at``: the time at which the equation is evaluated at the end: ``t``, or just before it at a jump.
    ``since``: likewise where the step starts, just after a jump; ``None`` in a solve without stops. ``clipped``:
    whether the length was changed to hit a time. ``floor``: the shortest length there.
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
    ``zero_so_far``: whether all residuals since the last restart are zero. ``fine``: whether all numbers are finite.
    ``explained``: whether the scale explains the residual. (Both are true if the controller rejects.) ``seen``: of the
    events, if there are any.
    """

    current: State
    past: Float[Array, " flat"]
    influence: Any
    zero_so_far: Bool[Array, "*batch"] | None
    fine: Bool[Array, ""]
    explained: Bool[Array, ""]
    seen: Seen | None

    @property
    def cut(self) -> Bool[Array, ""]:
        """Whether the next attempt ends inside of the step: at an event, or half-way."""
        return jnp.array(False) if self.seen is None else self.seen.cut

    @property
    def coarse(self) -> Bool[Array, ""]:
        """Whether the step is too long to see all events."""
        return jnp.array(False) if self.seen is None else self.seen.coarse


class Note(eqx.Module):
    """What has to be known of an accepted attempt to take its step again: nothing that is differentiated.

    ``dt``: the length that was asked for, before it was cut to hit a time. ``inside``: the scale of the residual at a
    time inside the step. ``target``: the time of an event to which the step went, or infinite; ``happen``: which events
    are at its end, up to ``near``; ``None`` in a solve without events. Behind a reset ``near`` is infinite if the
    function crossed zero there, and negative otherwise.
    """

    dt: Float[Array, ""]
    inside: Float[Array, "*batch"]
    target: Float[Array, ""] | None
    happen: Bool[Array, " events"] | None
    near: Float[Array, ""] | None

    @staticmethod
    def before(solve: AdaptiveState, inside: Any = None, seen: Seen | None = None) -> "Note":
        """The note on the step from here; without the other arguments, an example."""
        inside = jnp.zeros_like(solve.current.output_scale) if inside is None else inside
        if solve.watch is None:
            return Note(solve.dt, inside, None, None, None)
        seen = Seen.nothing(solve.watch) if seen is None else seen
        return Note(solve.dt, inside, solve.watch.target, seen.happen, seen.near)


class Move(eqx.Module):
    """What an attempt leaves: the solve, the past and the influence of the equation after it; whether it was accepted.

    ``note``: what has to be known to take the step again.
    """

    solve: AdaptiveState
    past: Float[Array, " flat"]
    influence: Any
    accepted: Bool[Array, ""]
    note: Note


class Stepper(eqx.Module):
    """Attempts of steps in an interval, for the body of a loop; and accepted ones once more, for their derivative.

    ``attempt``, ``measure``, ``condition`` and ``look`` call functions that users have written, ``look`` those of
    events (``None`` without events). Each was traced once; what a user's function closes over has become one of the
    inputs, so that it can be differentiated.
    """

    control: Control
    interval: Interval
    stops: Float[Array, " times"] | None
    smallest: Float[Array, ""]
    placeholder_dt: Float[Array, ""]
    attempt: Any
    measure: Any
    condition: Any
    look: Any
    order: int = eqx.field(static=True)
    caution: float = eqx.field(static=True)

    @staticmethod
    def of(
        step: Step, control: Control, solve: AdaptiveState, interval: Interval, left: Any, influence: Any = None
    ) -> "Stepper":
        """The stepper of a solve before its first attempt.

        ``left``: an example of the ``Conditional`` that a step updates; ``influence``: of what is kept of its equation,
        if anything is.
        """
        t1, now = interval.t1, solve.current
        stops = control.stops(t1.dtype)
        known = now.derivatives_known
        attempt = lambda layout, x, *times: step.within(layout).attempt(x, *times, known=known)  # noqa: E731
        inputs = now.layout, now.distribution, *[t1] * (2 if stops is None else 3)
        attempt = traced_once(attempt, *inputs)
        attempted = eqx.filter_eval_shape(attempt, *inputs)
        measure = traced_once(ft.partial(_measure, step, control), now, t1, t1, attempted)
        sides = () if solve.last_restart is None else (t1, solve.last_restart.zero_so_far)
        condition = ft.partial(_condition, step, control, influence is not None)
        condition = traced_once(condition, now, t1, attempted, left, *sides)
        look = None
        if control.events is not None:
            look = traced_once(ft.partial(control.events.look, interval), solve.watch, now, now, solve.dt)
        return Stepper(
            control,
            interval,
            stops,
            shortest_near_zero(solve.dt),
            # The length of a step that is not taken, in lanes of a vmap: short, but with powers that are numbers.
            interval.direction * jnp.finfo(t1.dtype).eps * lax.stop_gradient(solve.dt),
            attempt,
            measure,
            condition,
            look,
            step.order_of_error(attempted),
            step.caution(attempted),
        )

    def running(self, solve: AdaptiveState) -> Bool[Array, ""]:
        """Whether a solve goes on."""
        return is_running(solve, self.interval, self.control.loop)

    def advance(self, solve: AdaptiveState, past: Array, leaving: Callable, influence: Any = None) -> Move:
        """The state of the solve after one attempted step, accepted or rejected, and what else the attempt leaves.

        1. Predict the mean: ``m = A mean``.
        2. Linearise and compare: ``z(t + dt, x) ~ z + H (x - m)``, whitened by ``S = H Q H^T``; the local scale
           ``s^2 = z^T S^-1 z / size(z)``.
        3. Measure: the norm of the estimated error over ``atol + rtol max(|u|, |m|)``.
        4. Decide: the controller accepts a norm up to one, and proposes the next length.
        5. If it does, predict the covariance, ``P = A cov A^T + sigma^2 Q``, and condition on ``z = 0``:
           ``K = P H^T (H P H^T)^-1``, ``mean = m - K z``, ``cov = (I - K H) P``. The output scale ``sigma`` is that of
           the calibration (``s`` under ``DynamicCalibration()``). Where the equation gives all highest derivatives,
           ``condition_corrected`` gets the same without forming ``P``.
        6. Refuse that result if it is not finite, if the scale does not explain the residual (under
           ``Control.refuses_unexplained``), or if the step is too long to see all events: the next attempt goes half
           the way; or if the step goes beyond an event: it goes to the event. The controller's memory stays.

        A step counts as accepted, in ``Move.accepted`` and ``num_accepted_steps``, if the controller accepts the
        attempt and its result is not refused.

        ``past``, ``influence``: before the attempt, the first as one flat array. ``leaving(past, t)``: the
        ``Conditional`` that a step to ``t`` updates: ``past``, or that of the state before it if that is kept.
        """
        active, before = self.running(solve), solve.current
        leg = self.leg(solve, active)
        attempted = self.attempt(*self.inputs(before, leg))
        norm, inside = self.measure(before, leg.seen_at, leg.dt, attempted)
        attempted = _with_inside(attempted, inside)
        controller = self.control.controller
        proposal = controller.propose(jnp.abs(leg.dt), norm, self.order, solve.controller)
        accepts, proposed, memory = as_triple(proposal, f"{type(controller).__name__}.propose", "accept, dt, state")
        accepts = accepts & jnp.isfinite(norm) & active
        # A rejected attempt leaves the state as it was.
        zero_so_far = None if solve.last_restart is None else solve.last_restart.zero_so_far
        if_rejected = lambda *_: self.nothing_taken(solve, past, zero_so_far, influence)  # noqa: E731
        if_accepted = lambda *given: self.taken(leg, attempted, solve, zero_so_far, influence, *given)  # noqa: E731
        taken = lax.cond(accepts, if_accepted, if_rejected, before, past, leaving(past, leg.t))
        new, accepted = self.decide(solve, leg, active, accepts, norm, taken, attempted, (proposed, memory))
        return Move(new, taken.past, taken.influence, accepted, Note.before(solve, inside, taken.seen))

    def repeat(
        self,
        note: Note,
        active: Bool[Array, ""],
        solve: AdaptiveState,
        past: Array,
        leaving: Callable,
        influence: Any = None,
    ) -> Move:
        """The state of the solve after a step that was accepted before, as a differentiable function of that before it.

        The length of the step is known: nothing is searched for or decided.

        ``active``: whether there is a step; where there is none, in lanes of a vmap, it is differentiated at a point
        that is known to be fine, and what is returned has no meaning.
        """
        before = solve.current
        watch = solve.watch
        if watch is not None and note.target is not None:
            watch = dataclasses.replace(watch, target=note.target)
        leg = self.leg(dataclasses.replace(solve, dt=note.dt, watch=watch), active)
        t = jnp.where(active, leg.t, before.t)
        seen_at = t if leg.since is None else jnp.where(active, leg.seen_at, leg.since)
        leg = dataclasses.replace(leg, t=t, seen_at=seen_at, dt=jnp.where(active, leg.dt, self.placeholder_dt))
        attempted = _with_inside(self.attempt(*self.inputs(before, leg)), note.inside)
        sides = () if solve.last_restart is None else (leg.seen_at, solve.last_restart.zero_so_far)
        (current, past, influence, zero_so_far), _ = self.condition(
            before, leg.t, attempted, leaving(past, leg.t), *sides
        )
        last_restart = None if solve.last_restart is None else Restart(solve.last_restart.t, zero_so_far)
        new = dataclasses.replace(
            solve, current=current, last_restart=last_restart, num_accepted_steps=solve.num_accepted_steps + 1
        )
        return Move(new, past, influence, active, note)

    def inputs(self, before: State, leg: Leg) -> tuple[Any, ...]:
        """What the prediction of an attempt is a function of."""
        return before.layout, before.distribution, leg.seen_at, leg.dt, *(() if self.stops is None else (leg.since,))

    def leg(self, solve: AdaptiveState, active: Bool[Array, ""]) -> Leg:
        """Where the next attempt goes."""
        t_now = solve.t
        target = None if solve.watch is None else solve.watch.target
        t, dt, clipped, floor = next_time(self.control, t_now, solve.dt, self.interval, self.smallest, target)
        direction = self.interval.direction
        dt = jnp.where(active, dt, direction)
        if self.stops is None:
            return Leg(t, dt, t, None, clipped, floor)
        # Where the equation jumps it is that of the step's own side.
        seen_at, since = beside(t, -direction, self.stops), beside(t_now, direction, self.stops)
        return Leg(t, dt, seen_at, since, clipped, floor)

    def nothing_taken(self, solve: AdaptiveState, past: Array, zero_so_far: Any, influence: Any) -> Taken:
        """What is left of an attempt that the controller has rejected: the state before it."""
        true, seen = jnp.array(True), None
        if solve.watch is not None:
            seen = Seen.nothing(solve.watch)
        return Taken(solve.current, past, influence, zero_so_far, true, true, seen)

    def taken(
        self,
        leg: Leg,
        attempted: Attempt,
        solve: AdaptiveState,
        zero_so_far: Any,
        influence: Any,
        before: State,
        past: Array,
        left: Any,
    ) -> Taken:
        """The posterior after an attempt that the controller accepts; the state before it if the posterior is refused.

        It is refused if it is not finite, if the output scale does not explain the residual, or if the step goes beyond
        an event or is too long to see all events. ``decide`` then rejects the attempt.
        """
        sides = () if zero_so_far is None else (leg.seen_at, zero_so_far)
        after, explained = self.condition(before, leg.t, attempted, left, *sides)
        # An attempt can be fine where what conditioning makes of it is not: a further evaluation of the equation may
        # leave its domain, a covariance the range of floating-point numbers.
        fine, seen = is_usable(after[0]), None
        use = fine & explained
        if self.look is not None:
            seen = self.look(solve.watch, before, after[0], solve.dt)
            fine = fine & seen.finite
            use = fine & explained & ~seen.cut
            seen = dataclasses.replace(
                seen, watch=choose(fine & explained, seen.watch, solve.watch), happen=seen.happen & use
            )
        new, past, influence, zero_so_far = choose(use, after, (before, past, influence, zero_so_far))
        return Taken(new, past, influence, zero_so_far, fine, explained, seen)

    def decide(
        self,
        solve: AdaptiveState,
        leg: Leg,
        active: Bool[Array, ""],
        accepts: Bool[Array, ""],
        norm: Float[Array, ""],
        taken: Taken,
        attempted: Attempt,
        proposal: tuple[Float[Array, ""], Any],
    ) -> tuple[AdaptiveState, Bool[Array, ""]]:
        """The state of the solve after an attempt, and whether the attempt is accepted.

        ``accepts``: whether the controller accepts it. It is accepted if ``taken`` has not refused its result either.
        The state of the solve holds the length of the next attempt, and the result code if the solve ends here.
        """
        (proposed, memory), length = proposal, jnp.abs(leg.dt)
        usable = taken.fine & taken.explained
        cut = accepts & usable & taken.cut
        accepted, refused, finite = accepts & usable & ~cut, accepts & ~usable, jnp.isfinite(norm) & taken.fine
        proposed = trusted(self.caution * proposed, length)
        # A step cut short by t1 or stop_at says little about the next one.
        kept = jnp.where(leg.clipped, jnp.maximum(proposed, solve.dt), proposed)
        # Near round-off a step that is 5 % shorter is rounded to the same length: half of the shortest is taken off.
        shorter = jnp.where(refused, length / 2, length - leg.floor / 2)
        proposed = jnp.where(accepted, kept, jnp.minimum(proposed, shorter))
        longest = self.control.controller.limits.longest.astype(length.dtype)
        proposed = jnp.clip(proposed, leg.floor, longest)
        # The smaller one: a step of the shortest length may be longer than that, as a difference of two rounded times.
        stuck = active & ~accepted & ~cut & (jnp.minimum(solve.dt, length) <= leg.floor)
        failure = Result.where(taken.explained, Result.step_size_too_small, Result.scale_mismatch)
        failure = Result.where(finite, failure, Result.nonfinite)
        tiny = accepted & ~tolerance_in_range(self.control, solve.current.layout.unpack(attempted.mean)[0])
        last_restart = None if solve.last_restart is None else Restart(solve.last_restart.t, taken.zero_so_far)
        new = AdaptiveState(
            taken.current,
            jnp.where(cut, jnp.where(taken.coarse, length / 2, solve.dt), proposed),
            choose(active & usable & ~cut, memory, solve.controller),
            solve.num_steps + 1,
            solve.num_accepted_steps + accepted.astype(jnp.int32),
            Result.where(stuck | tiny, Result.where(stuck, failure, Result.tolerance_out_of_range), solve.result),
            last_restart,
            None if taken.seen is None else taken.seen.watch,
        )
        if self.control.progress is not None:
            share = self.interval.share
            tell(self.control.progress, share(solve.t), jnp.where(self.running(new), share(new.t), 1))
        return new, accepted


def _with_inside(attempted, inside):
    innovation = with_scale_inside(attempted.innovation, inside)
    return dataclasses.replace(attempted, innovation=innovation)


def _measure(step, control, now, seen_at, dt, attempted):
    """The norm of an attempt's error, and the scale of the residual inside where that was looked at."""
    step = step.within(now.layout)
    constraint, prior, args = step.constraint, step.member(attempted.prior), step.args
    given = constraint, prior, now.distribution, seen_at, dt, attempted, step.layout, args

    def size(attempted):
        return error_norm(control, step.layout, now, dt, attempted)

    def seen(_):
        if attempted.correction is not None:
            inside = defect_norm(control, step.layout, now, dt, attempted, defect_inside(*given))
            return jnp.maximum(size(attempted), inside), nothing
        looked = with_defects(*given)
        return size(looked), scale_inside(looked.innovation, looked.equation, step.layout)

    nothing = jnp.zeros_like(attempted.innovation.scale)
    if not control.error.needs_defects:
        norm, inside = size(attempted), nothing
    elif attempted.equation.whole or attempted.equation.gives is None:
        norm, inside = seen(None)
    else:
        # Without a Jacobian evaluations are most of the cost: the residual inside is looked at only where the error is
        # so small that the next step will be longer by half or more, and might skip over something.
        blind = size(attempted)
        quiet = blind < _LONGER ** -step.order_of_error(attempted)
        norm, inside = lax.cond(quiet, seen, lambda _: (blind, nothing), None)
    if now.is_spread:
        predicted = step.predicted_spread(now, seen_at, attempted)
        norm = jnp.maximum(norm, spread_norm(control, step.layout, now, dt, attempted, predicted))
    return norm, inside


def _condition(step, control, influence, before, t, attempted, left, *sides):
    """What an attempt that the controller accepts leaves, and whether the scale explains the residual.

    Its past is one flat array. ``influence``: whether that of the equation is kept; otherwise it would be carried for
    nothing.
    """
    step = step.within(before.layout)
    stepped = step.accept(before, attempted, t, left, *sides)
    explained = jnp.array(True)
    if control.refuses_unexplained:
        unexplained = unexplained_norm(control, step.layout, *detach((before, attempted, stepped.influence)))
        explained = unexplained <= _UNEXPLAINED
    after = stepped.state, ravel_pytree(stepped.past)[0], stepped.influence if influence else None, stepped.zero_so_far
    return after, explained
