"""The adaptive loop: every iteration attempts a step; what it has to keep of it depends on the times asked for.

The controller decides on values without derivatives; an accepted attempt gets its derivative back. So gradients are
those of the accepted steps, frozen, and nothing of a rejected or non-finite attempt reaches them. At the times in
the controller's ``stop_at``, where the equation may jump, the state starts anew: such a time has two rows, the state
before the jump and the one behind it.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..algebra.conditioning import Influence
from ..algebra.coordinates import Conditional, carried
from ..algebra.linalg import detach
from ..algebra.normal import Normal, pad_rows
from ..estimation.strategies import AbstractStrategy
from .kept import Row
from .loops import repeat
from .progress import tell
from .residuals import not_silent, scale_inside, with_defects
from .restarts import beside, is_jump, start_anew
from .result import Result
from .spread import value_and_moves
from .step import State, Step, accept, ahead_of, attempt, no_influence, nothing_of_the_past
from .step_sizes import (
    Control,
    bounded_step,
    error_norm,
    first_step,
    nearest,
    next_time,
    shortest_near_zero,
    spread_norm,
    surprise,
    tolerance_in_range,
    trusted,
)


# An error so far below the tolerance is followed by a step that is longer by half or more.
_QUIET = 0.1
# How many tolerances the mean may move beyond what the noise of a step explains, under a scale that does not follow.
_SURPRISE = 10.0


class Start(eqx.Module):
    """Where a state has started anew last: the time, and for which batch elements no residual has been seen since."""

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

    def __repr__(self):
        return f"AdaptiveState(current={self.current!r})"

    @property
    def t(self) -> Float[Array, ""]:
        """The time reached."""
        return self.current.t


def row_of(state: State, past: Conditional | None, influence: Influence | None = None) -> Row:
    """What is kept of a state."""
    return Row(state.t, state.distribution, state.output_scale, past, influence, state.prior)


def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of a tree is a real one."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return ft.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in numbers], jnp.array(True))


def is_usable(state: State) -> Bool[Array, ""]:
    """Whether the state and what is told of it are real numbers. (Statistics are the calibration's own business, and
    data that cannot be are told by their evidence. An algebra of a factorisation's own need not know the evidence.)"""
    evidence = None if state.layout.factorisation.own_algebra else state.evidence
    return is_finite((state.distribution, state.output_scale, evidence))


def begin(control: Control, state: State, dt: Float[Array, ""]) -> AdaptiveState:
    """A solve before its first attempt."""
    zero = jnp.zeros((), jnp.int32)
    result = Result.where(is_finite(state.distribution), Result.successful, Result.initial_state_nonfinite)
    anew = None
    if control.controller.stop_at is not None:
        anew = Start(jnp.full((), jnp.nan, dt.dtype), jnp.zeros(state.layout.batch_shape, bool))
    return AdaptiveState(state, lax.stop_gradient(dt), control.controller.init(dt.dtype), zero, zero, result, anew)


def solve_keeping_steps(
    parts: Step,
    control: Control,
    strategy: AbstractStrategy,
    solve: AdaptiveState,
    t1: Float[Array, ""],
    args: PyTree,
    *,
    influence: bool = False,
) -> tuple[AdaptiveState, Row, Bool[Array, " rows"]]:
    """Solve to ``t1``; the rows at the start and after every accepted step, and which of them are real.

    There are ``max_steps + 1`` rows, and one more for every stop, at which a row of its own follows on that of the step
    (``Row.anew``); those not reached repeat the last one. With ``influence`` the rows have theirs.
    """
    running, try_step = _stepping(parts, control, solve, t1, args)
    passing_stop = starting_anew(parts, control, solve, t1, args)
    none = no_influence(parts, solve.current, args) if influence else None
    no_past = nothing_of_the_past(parts, strategy.remember(solve.current.distribution), solve.current, args)
    first, unpack = ravel_pytree(row_of(solve.current, no_past, none))
    like_past, (no_past, unpack_past) = no_past, ravel_pytree(no_past)

    def step(solve, rows, number):
        """The solve and the rows after one attempt, and whether the attempt was accepted."""
        left = strategy.remember(solve.current.distribution)
        new, past, effect, moved = try_step(solve, no_past, lambda past, t: left, none)
        row, _ = ravel_pytree(row_of(new.current, unpack_past(past), effect))
        return new, rows.at[number(new)].set(row, pred=moved), moved

    def body(solve, rows):
        return step(solve, rows, lambda new: new.num_accepted_steps)[:2]

    def body_with_stops(carry, rows):
        solve, stops = carry
        new, rows, moved = step(solve, rows, lambda new: new.num_accepted_steps + stops)
        new, past, anew = passing_stop(new, carried(strategy.remember(new.current.distribution)), moved)
        if past is not None:
            past = Conditional(past.shift, past.cross, pad_rows(past.own, like_past.own.shape[-2]))
        row, _ = ravel_pytree(row_of(new.current, past, none))
        stops = stops + anew.astype(jnp.int32)
        return (new, stops), rows.at[new.num_accepted_steps + stops].set(row, pred=anew)

    def start(number):
        return jnp.zeros((number, first.size), first.dtype).at[0].set(first)

    number = control.loop.max_steps + 1
    if passing_stop is None:
        solve, rows = repeat(control.loop, running, body, solve, start(number))
        rows, reached = _repeat_last(rows, solve.num_accepted_steps)
        return _ended(solve, t1), jax.vmap(unpack)(rows), reached
    number += control.controller.stop_at.size
    init = solve, jnp.zeros((), jnp.int32)
    (solve, stops), rows = repeat(control.loop, lambda carry: running(carry[0]), body_with_stops, init, start(number))
    rows, reached = _repeat_last(rows, solve.num_accepted_steps + stops)
    rows = jax.vmap(unpack)(rows)
    again = jnp.append(False, (rows.t[1:] == rows.t[:-1]) & reached[1:])
    return _ended(solve, t1), eqx.tree_at(lambda r: r.anew, rows, again, is_leaf=lambda x: x is None), reached


class _Passing(eqx.Module):
    solve: AdaptiveState
    past: Float[Array, " flat"]  # of the last state kept, in the coordinates of the current one
    passed: Int[Array, ""]  # how many of the times lie behind
    kept: Int[Array, ""]  # in how many steps


def solve_keeping_times(
    parts: Step,
    control: Control,
    strategy: AbstractStrategy,
    solve: AdaptiveState,
    t1: Float[Array, ""],
    args: PyTree,
    ts: Float[Array, " times"],
) -> tuple[AdaptiveState, Row, Bool[Array, " rows"]]:
    """Solve to ``t1``; the rows at the start, at both ends of the steps that hold one of ``ts``, and at the end.

    The prior tells what happens inside a step; what lies between the steps kept is marginalised as it is passed. There
    are ``2 times + 2`` rows; those not reached, as the flags say, repeat the last one. In a solve with stops there are
    ``3 times + 2``: a step that is kept has a third row, with which the next one starts.
    """
    direction = _direction(solve, t1)
    running, try_step = _stepping(parts, control, solve, t1, args)
    passing_stop = starting_anew(parts, control, solve, t1, args)
    width = 2 if passing_stop is None else 3

    def remember(state):
        return ravel_pytree(carried(strategy.remember(state.distribution)))

    def row_with(state, past):
        return row_of(state, unpack_past(past))

    start, unpack_past = remember(solve.current)
    first, unpack = ravel_pytree(row_with(solve.current, start))
    ahead = jnp.append(lax.stop_gradient(ts) * direction, jnp.inf)

    def passing(solve, past, moved):
        solve, past, _ = passing_stop(solve, unpack_past(past), moved)
        return solve, ravel_pytree(past)[0]

    def passed(t):
        t = lax.stop_gradient(t) * direction
        return jnp.searchsorted(ahead, t, side="right", method="scan_unrolled").astype(jnp.int32)

    def body(carry, rows):
        solve = carry.solve
        if ts.size == 0:
            new, past, _, moved = try_step(solve, carry.past, lambda past, t: unpack_past(past))
            if passing_stop is not None:
                new, past = passing(new, past, moved)
            return _Passing(new, past, carry.passed, carry.kept), rows

        def leaving(past, t):
            holds = ahead[carry.passed] <= lax.stop_gradient(t) * direction
            return unpack_past(jnp.where(holds, remember(solve.current)[0], past))

        new, past, _, moved = try_step(solve, carry.past, leaving)
        behind = passed(new.t)
        keep = behind > carry.passed
        # One flat row: the price of an iteration is that of its instructions.
        kept = [row_with(solve.current, carry.past), row_with(new.current, past)]
        past = jnp.where(keep, remember(new.current)[0], past)
        if passing_stop is not None:
            new, past = passing(new, past, moved)
            kept.append(row_with(new.current, past))
            past = jnp.where(keep, remember(new.current)[0], past)
        row, _ = ravel_pytree(tuple(kept))
        rows = rows.at[carry.kept].set(row.reshape(width, -1), pred=keep)
        return _Passing(new, past, behind, carry.kept + keep.astype(jnp.int32)), rows

    init = _Passing(solve, start, passed(solve.t), jnp.zeros((), jnp.int32))
    rows = jnp.zeros((ts.size, width, first.size), first.dtype)
    carry, rows = repeat(control.loop, lambda carry: running(carry.solve), body, init, rows)
    solve = _ended(carry.solve, t1)
    last, _ = ravel_pytree(row_with(solve.current, carry.past))
    rows = jnp.concatenate([first[None], rows.reshape(-1, first.size), last[None]])
    rows, reached = _repeat_last(rows.at[width * carry.kept + 1].set(last), width * carry.kept + 1)
    return solve, jax.vmap(unpack)(rows), reached


def _repeat_last(rows, last):
    """The rows, those behind the last real one replaced by it, and which are real."""
    reached = jnp.arange(rows.shape[0]) <= last
    return jnp.where(reached[:, None], rows, rows[last]), reached


def _stepping(parts, control, solve, t1, args):
    """Whether a solve goes on, and its next attempt: the solve after it, its past, its influence, whether it moved.

    ``past``: flat, before and after; ``leaving(past, t)``: what to take along on a step to ``t``.
    """
    t0, direction, layout = solve.t, _direction(solve, t1), solve.current.layout
    max_steps, stops, smallest = control.loop.max_steps, control.stops(t1.dtype), shortest_near_zero(solve.dt)
    # The length of a step that is not taken, in lanes of a vmap: short, but with powers that are numbers.
    harmless = direction * jnp.finfo(t1.dtype).eps * lax.stop_gradient(solve.dt)

    # Traced once; what the user's functions close over becomes an input that can be differentiated.
    attempting = eqx.filter_closure_convert(
        lambda distribution, t, dt, *since: attempt(parts, distribution, t, dt, layout, args, *since),
        solve.current.distribution,
        *[t1] * (2 if stops is None else 3),
    )

    def measured(now, t, dt, attempted):
        """The size of an attempt's error, and its innovation as far as it had to be looked at for that."""

        def size(innovation):
            return error_norm(control, layout, now, dt, attempted, innovation)

        def seen(_):
            # Only lengths are decided from it: a derivative would be computed, and compiled, for nothing.
            constraint, prior = detach((parts.constraint, parts.prior if attempted.prior is None else attempted.prior))
            at = attempted.transition, attempted.equation, attempted.innovation
            innovation = with_defects(constraint, prior, now.distribution, t, dt, *at, layout, detach(args))
            return size(innovation), scale_inside(innovation, attempted.equation, layout)

        unseen = jnp.zeros_like(attempted.innovation.scale)
        if not control.error.needs_defects:
            return size(attempted.innovation), unseen
        if attempted.equation.whole:
            return seen(None)
        # Where the field is frozen its evaluations are most of the cost; where the residual is as large as usual, the
        # step is no longer than its neighbours, and sees as much.
        blind = size(attempted.innovation)
        return lax.cond(blind < _QUIET, seen, lambda _: (blind, unseen), None)

    def running(solve):
        unfinished = (t1 - solve.t) * direction > 0
        return unfinished & (solve.num_steps < max_steps) & (solve.result == Result.successful)

    def try_step(solve, past, leaving, influence=None):
        active = running(solve)
        now = solve.current
        t, dt, clipped, floor = next_time(control, now.t, solve.dt, t1, direction, smallest)
        dt = jnp.where(active, dt, direction)
        # Where the equation jumps it is that of the step's own side.
        seen_at, since = t, ()
        if stops is not None:
            seen_at = beside(t, -direction, stops)
            since = (beside(now.t, direction, stops),)

        attempted = detach(attempting(*detach((now.distribution, seen_at, dt, *since))))
        norm, inside = detach(measured(detach(now), detach(seen_at), detach(dt), attempted))
        unseen = None if stops is None else solve.anew.unseen
        if now.spread is not None:
            ahead = ahead_of(parts, now, seen_at, attempted, args)
            norm = jnp.maximum(norm, detach(spread_norm(control, layout, now, dt, attempted, ahead)))
            unseen = None if stops is None else unseen & (ahead.scale == 0)
        attempted = eqx.tree_at(lambda a: a.innovation, attempted, not_silent(attempted.innovation, inside))
        length = jnp.abs(detach(dt))
        good, proposed, memory = control.controller.propose(length, norm, layout.num_derivatives + 1, solve.controller)
        finite = jnp.isfinite(norm)
        good = good & finite & active

        left = leaving(past, t)

        def accepted(now, past, left, influence):
            # Rejected lanes of a vmap come here too: they must differentiate at a point that is known to be fine.
            when = jnp.where(good, t, now.t)
            at = when if stops is None else jnp.where(good, seen_at, since[0])
            inputs = (now.distribution, at, jnp.where(good, dt, harmless), *since)
            values = jax.tree.map(lambda x: jnp.where(good, x, 0), attempted)
            mean = jnp.where(good, attempted.mean, detach(now.distribution.mean))
            values = eqx.tree_at(lambda a: a.mean, values, mean)
            known = _with_derivative(values, attempting, inputs)

            def conditioned(now, t, known, left, *sides):
                state, update = accept(parts, now, t, known, left, args, *sides)
                likely = True
                if control.doubts_scale:
                    likely = surprise(control, layout, detach(now), detach(known), detach(update)) <= _SURPRISE
                effect = None if influence is None else update.influence
                return state, ravel_pytree(update.past)[0], effect, likely

            inputs = now, when, known, left, *(() if stops is None else (at, unseen))
            (*after, likely), fine = _with_verdict(eqx.filter_closure_convert(conditioned, *inputs), inputs)
            return *_choose(fine & likely, tuple(after), (now, past, influence)), fine, likely

        def rejected(now, past, left, influence):
            return now, past, influence, True, True

        current, past, influence, fine, likely = lax.cond(good, accepted, rejected, now, past, left, influence)
        spoilt, good, finite = good & ~(fine & likely), good & fine & likely, finite & fine
        proposed = trusted(proposed, length)
        # A step cut short by t1 or stop_at says little about the next one.
        kept = jnp.where(clipped, jnp.maximum(proposed, solve.dt), proposed)
        # A few units of round-off times 0.95 are rounded to the same length again: shorter by at least two of them.
        shorter = jnp.where(spoilt, length / 2, length - floor / 2)
        proposed = jnp.where(good, kept, jnp.minimum(proposed, shorter))
        proposed = jnp.clip(lax.stop_gradient(proposed), floor, _dt_max(control.controller, dt.dtype))
        # What was asked for, too: the length of the shortest step is rounded to one between two times.
        stuck = active & ~good & (jnp.minimum(solve.dt, length) <= floor)
        failure = Result.where(likely, Result.step_size_too_small, Result.scale_mismatch)
        failure = Result.where(finite, failure, Result.nonfinite)
        tiny = good & ~tolerance_in_range(control, detach(layout.unpack(attempted.mean)[0]))
        new = AdaptiveState(
            current,
            proposed,
            _choose(active & fine & likely, lax.stop_gradient(memory), solve.controller),
            solve.num_steps + 1,
            solve.num_accepted_steps + good.astype(jnp.int32),
            Result.where(stuck | tiny, Result.where(stuck, failure, Result.tolerance_out_of_range), solve.result),
            None
            if stops is None
            else Start(solve.anew.t, jnp.where(good, unseen & attempted.innovation.silent, solve.anew.unseen)),
        )
        if control.progress is not None:
            tell(control.progress, _share(now.t, t0, t1), jnp.where(running(new), _share(current.t, t0, t1), 1))
        return new, past, influence, good

    return running, try_step


def starting_anew(
    parts: Step, control: Control, solve: AdaptiveState, t1: Float[Array, ""], args: PyTree
) -> Callable | None:
    """What happens after an attempt, ``None`` in a solve without stops: from a solve, the coordinates of an earlier
    state, and whether to look, the solve that starts anew if it is at a stop, these coordinates, and whether it does.
    """
    stops, begun, direction = control.stops(t1.dtype), solve, _direction(solve, t1)
    if stops is None:
        return None
    layout, constraint = solve.current.layout, parts.constraint

    def spread_anew(now, t):
        problem, initialise = constraint.problem, control.initialisation.initialise
        u, *moves = (layout.unpack(x)[: problem.num_initial_values] for x in (now.distribution.mean, *now.spread))
        start = lambda u: initialise(problem, t, u, layout, detach(args)).mean  # noqa: E731
        return value_and_moves(start, u, jnp.stack(moves))[1]

    def pass_stop(solve, past, moved):
        now = solve.current
        here = moved & is_jump(now.t, stops) & ((t1 - now.t) * direction > 0)

        def start(now, past):
            # Lanes of a vmap come here wherever they are: they differentiate at a point that is known to be fine.
            t = jnp.where(here, now.t, begun.t)
            mean = jnp.where(here, now.distribution.mean, begun.current.distribution.mean)
            x = Normal(mean, now.distribution.factor)
            behind = beside(t, direction, stops)
            return start_anew(constraint, control.initialisation, behind, x, past, layout, args)

        x, new_past = lax.cond(here, start, lambda now, past: (now.distribution, past), now, past)
        # Where no derivatives satisfy the equation together with u, as an algebraic one that jumps, the state goes on.
        anew = here & is_finite(x)
        x, past = _choose(anew, (x, new_past), (now.distribution, past))
        current = eqx.tree_at(lambda s: s.distribution, now, x)
        if now.spread is not None:
            spread = jnp.where(anew, spread_anew(*detach((now, beside(now.t, direction, stops)))), now.spread)
            current = eqx.tree_at(lambda s: s.spread, current, spread)
        until = nearest(stops, now.t, t1, direction) - now.t
        prior = parts.prior if current.prior is None else current.prior
        # As in a solve that starts here: so one with stops takes the steps of its pieces.
        dt = first_step(control, detach(current), detach(prior), until, constraint.order)
        dt = bounded_step(control, dt)
        return (
            AdaptiveState(
                current,
                jnp.where(anew, lax.stop_gradient(dt), solve.dt),
                _choose(anew, control.controller.init(t1.dtype), solve.controller),
                solve.num_steps,
                solve.num_accepted_steps,
                solve.result,
                _choose(anew, Start(lax.stop_gradient(now.t), jnp.ones_like(solve.anew.unseen)), solve.anew),
            ),
            past,
            anew,
        )

    return pass_stop


def _ended(solve, t1):
    """The solve with its result, which the end of a loop does not tell."""
    unfinished = (solve.t != t1) & (solve.result == Result.successful)
    return eqx.tree_at(lambda s: s.result, solve, Result.where(unfinished, Result.max_steps_reached, solve.result))


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


def _choose(flag, these, those):
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), these, those)


def _share(t, t0, t1):
    return jnp.clip((t - t0) / (t1 - t0), 0, 1)


def _direction(solve, t1):
    return jnp.where(t1 >= solve.t, 1, -1).astype(t1.dtype)


def _dt_max(controller, dtype):
    return jnp.inf if controller.dt_max is None else controller.dt_max.astype(dtype)
