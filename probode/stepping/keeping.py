"""What an adaptive solve keeps: every step, or those that hold the times asked for; and all events.

At a jump, a stop of the controller or an event with a reset, the state is restarted: such a time has two rows, the
state before the jump and the one behind it.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ..algebra.coordinates import pad_noise, with_square_noise
from ..estimation.strategies import AbstractStrategy
from .adaptive import AdaptiveState, Move, Stepper
from .events import Happening
from .kept import Row
from .passing import AbstractKeeping, Tables, Written, pass_all
from .result import Result
from .state import State
from .step import Step
from .step_sizes import Control
from .stops import restart_at_jumps
from .times import Interval


def _count_events(control, move):
    """The solve after the events of an attempt have been counted, and their rows.

    It ends if one of them is terminal, or if there are too many.
    """
    solve, events, happen = move.solve, control.events, move.note.happen
    if events is None:
        return solve, []
    watch, ends, too_many = events.counted(solve.watch, solve.t, happen)
    result = Result.where(ends & (solve.result == Result.successful), Result.event, solve.result)
    result = Result.where(too_many, Result.max_events_reached, result)
    places = solve.watch.number + jnp.cumsum(happen) - 1
    kept = events.happenings(solve.current, happen, move.note.near)
    written = [
        Written(ravel_pytree(row)[0], places[i], happen[i] & (places[i] < events.most), table=1)
        for i, row in enumerate(kept)
    ]
    return dataclasses.replace(solve, watch=watch, result=result), written


def _tables(control: Control, state: State, rows: Float[Array, "rows flat"]) -> Tables:
    """The arrays in which a solve writes its ``rows``, and, if it looks for events, zeros for their rows."""
    if control.events is None:
        return (rows,)
    flat, _ = ravel_pytree(control.events.example(state))
    return rows, jnp.zeros((control.events.most, flat.size), flat.dtype)


def _happenings(control: Control, state: State, tables: Tables) -> Happening | None:
    """All events of a solve, stacked; ``None`` in a solve without them."""
    if control.events is None:
        return None
    _, unpack = ravel_pytree(control.events.example(state))
    return jax.vmap(unpack)(tables[1])


class _Steps(eqx.Module):
    solve: AdaptiveState
    restarts: Int[Array, ""]


class KeepingSteps(AbstractKeeping):
    """Every accepted step is kept, and every state that was restarted."""

    stepper: Stepper
    number: int = eqx.field(static=True)
    accepted_before: Int[Array, ""]
    strategy: AbstractStrategy
    no_past: Any
    no_influence: Any
    pass_jump: Any

    def is_running(self, carry: _Steps) -> Bool[Array, ""]:
        has_room = self.place(carry.solve, carry.restarts) < self.number - 1
        return self.stepper.running(carry.solve) & has_room

    def place(self, solve: AdaptiveState, restarts: Int[Array, ""]) -> Int[Array, ""]:
        """The row of the present state."""
        return solve.num_accepted_steps + restarts - self.accepted_before

    def attempt(self, carry: _Steps, take: Callable) -> tuple[_Steps, list[Written], Move]:
        solve, restarts = carry.solve, carry.restarts
        left = self.strategy.remember(solve.current.distribution)
        flat_past, unpack_past = ravel_pytree(self.no_past)
        move = take(solve, flat_past, lambda past, t: left, self.no_influence)
        new, events = _count_events(self.stepper.control, move)
        row, _ = ravel_pytree(Row.of(new.current, unpack_past(move.past), move.influence))
        written = [Written(row, self.place(new, restarts), move.accepted), *events]
        if self.pass_jump is not None:
            past = with_square_noise(self.strategy.remember(new.current.distribution))
            new, past, restarted, note = self.pass_jump(new, past, move.accepted, move.note)
            move = dataclasses.replace(move, note=note)
            if self.no_past is not None:
                past = pad_noise(past, self.no_past.noise.shape[-2])
            row, _ = ravel_pytree(Row.of(new.current, past, self.no_influence))
            restarts = restarts + restarted.astype(jnp.int32)
            written.append(Written(row, self.place(new, restarts), restarted))
        return _Steps(new, restarts), written, move


def solve_keeping_steps(
    step: Step,
    control: Control,
    strategy: AbstractStrategy,
    solve: AdaptiveState,
    interval: Interval,
    *,
    influence: bool = False,
    room: int | None = None,
) -> tuple[AdaptiveState, Row, Bool[Array, " rows"], Happening | None]:
    """The solve at its end; rows of the start and after every accepted step; which of them are real; the events.

    There are ``max_steps + 1`` rows, and one more for every jump: the state before it and the restarted one
    (``Row.restarted``). Those not reached repeat the last one. With ``influence`` the rows have that of the equation.
    With ``room`` for fewer rows (not in a solve with jumps) it pauses when these are full. Raises ``ValueError``
    if the rows cannot have a place in memory.
    """
    left = strategy.remember(solve.current.distribution)
    no_past, none = step.nothing(solve.current, left, influence=influence)
    first, unpack = ravel_pytree(Row.of(solve.current, no_past, none))
    number = room or control.loop.max_steps + 1
    _require_memory(number, first)
    stops, events = control.stops(interval.t1.dtype), control.events
    if stops is not None:
        number += stops.size
    if events is not None and any(event.reset is not None for event in events.functions):
        number += events.most

    def keeping_with(step):
        return KeepingSteps(
            Stepper.of(step, control, solve, interval, left, none),
            number,
            solve.num_accepted_steps,
            strategy,
            no_past,
            none,
            restart_at_jumps(step, control, solve, interval, with_square_noise(left)),
        )

    keeping, moving = _and_with_fixed_gains(keeping_with, step, solve)
    begun, table = _Steps(solve, jnp.zeros((), jnp.int32)), jnp.zeros((number, first.size), first.dtype)
    carry, tables = pass_all(keeping, begun, _tables(control, solve.current, table), moving)
    flat, reached = _repeat_last(tables[0].at[0].set(first), keeping.place(carry.solve, carry.restarts))
    rows = jax.vmap(unpack)(flat)
    if control.jumps:
        again = jnp.append(False, (rows.t[1:] == rows.t[:-1]) & reached[1:])
        rows = dataclasses.replace(rows, restarted=again)
    return carry.solve, rows, reached, _happenings(control, solve.current, tables)


class _Times(eqx.Module):
    solve: AdaptiveState
    past: Float[Array, " flat"]  # the conditional of the last state kept given the current one
    passed: Int[Array, ""]  # how many of the times have been passed
    kept: Int[Array, ""]  # how many steps have been written


class KeepingTimes(AbstractKeeping):
    """The steps that hold a time are kept; what lies between them is marginalised as it is passed.

    ``signed_ts``: the times with the sign that makes them grow (``Interval.signed``), and infinity.
    """

    stepper: Stepper
    signed_ts: Float[Array, " times"]
    strategy: AbstractStrategy
    pass_jump: Any

    def is_running(self, carry: _Times) -> Bool[Array, ""]:
        return self.stepper.running(carry.solve)

    def remember(self, state: State) -> tuple[Float[Array, " flat"], Callable]:
        """The conditional of a state that has just been kept, as one flat array, and how it is put together again."""
        return ravel_pytree(with_square_noise(self.strategy.remember(state.distribution)))

    def start(self, solve: AdaptiveState) -> _Times:
        """A solve before its first attempt."""
        past, _ = self.remember(solve.current)
        return _Times(solve, past, self.passed(solve.t), jnp.zeros((), jnp.int32))

    def passed(self, t: Float[Array, ""]) -> Int[Array, ""]:
        """How many times have been passed at ``t``."""
        t = self.stepper.interval.signed(lax.stop_gradient(t))
        return jnp.searchsorted(self.signed_ts, t, side="right", method="scan_unrolled").astype(jnp.int32)

    def attempt(self, carry: _Times, take: Callable) -> tuple[_Times, list[Written], Move]:
        solve, (_, unpack_past) = carry.solve, self.remember(carry.solve.current)

        def jump(solve, past, move):
            solve, past, _, note = self.pass_jump(solve, unpack_past(past), move.accepted, move.note)
            return solve, ravel_pytree(past)[0], dataclasses.replace(move, note=note)

        if self.signed_ts.size == 1:  # infinity alone
            move = take(solve, carry.past, lambda past, t: unpack_past(past))
            (new, events), past = _count_events(self.stepper.control, move), move.past
            if self.pass_jump is not None:
                new, past, move = jump(new, past, move)
            return dataclasses.replace(carry, solve=new, past=past), events, move

        def leaving(past, t):
            holds = self.signed_ts[carry.passed] <= self.stepper.interval.signed(lax.stop_gradient(t))
            return unpack_past(jnp.where(holds, self.remember(solve.current)[0], past))

        def row_with(state, past):
            return Row.of(state, unpack_past(past))

        move = take(solve, carry.past, leaving)
        (new, events), past = _count_events(self.stepper.control, move), move.past
        passed = self.passed(new.t)
        keep = passed > carry.passed
        # One flat row: every operation of an iteration costs time, however little it copies.
        kept = [row_with(solve.current, carry.past), row_with(new.current, past)]
        past = jnp.where(keep, self.remember(new.current)[0], past)
        if self.pass_jump is not None:
            new, past, move = jump(new, past, move)
            kept.append(row_with(new.current, past))
            past = jnp.where(keep, self.remember(new.current)[0], past)
        row, _ = ravel_pytree(tuple(kept))
        after = _Times(new, past, passed, carry.kept + keep.astype(jnp.int32))
        return after, [Written(row, carry.kept, keep), *events], move


def solve_keeping_times(
    step: Step,
    control: Control,
    strategy: AbstractStrategy,
    solve: AdaptiveState,
    interval: Interval,
    ts: Float[Array, " times"],
) -> tuple[AdaptiveState, Row, Bool[Array, " rows"], Happening | None]:
    """The solve at its end; rows of the start, both ends of steps that hold one of ``ts``, and the end; events.

    Between the rows and the events: which rows are real.

    The prior tells what happens inside a step; what lies between the steps kept is marginalised as it is passed. There
    are two rows for every step that may hold a time, and two more; those not reached, as the flags say, repeat the last
    one. In a solve with jumps a step that is kept has a third row, with which the next one starts.
    """
    past = with_square_noise(strategy.remember(solve.current.distribution))
    start, unpack_past = ravel_pytree(past)

    def row_with(state, past):
        return Row.of(state, unpack_past(past))

    at_start = row_with(solve.current, start)
    first, unpack = ravel_pytree(at_start)
    # No more steps than these can hold a time.
    number, width = min(ts.size, control.loop.max_steps), 3 if control.jumps else 2
    signed_ts = jnp.append(interval.signed(lax.stop_gradient(ts)), jnp.inf)

    def keeping_with(step):
        stepper = Stepper.of(step, control, solve, interval, past)
        return KeepingTimes(stepper, signed_ts, strategy, restart_at_jumps(step, control, solve, interval, past))

    keeping, moving = _and_with_fixed_gains(keeping_with, step, solve)
    table = jnp.zeros((number, width * first.size), first.dtype)
    carry, tables = pass_all(keeping, keeping.start(solve), _tables(control, solve.current, table), moving)
    happenings, rows = _happenings(control, solve.current, tables), tables[0]
    solve = carry.solve
    if ts.size == 0:
        # Stacked leaf by leaf, not as one array: XLA would hand that to other threads, which costs 30 us.
        ends = at_start, row_with(solve.current, carry.past)
        return solve, jax.tree.map(lambda *xs: jnp.stack(xs), *ends), jnp.ones(2, bool), happenings
    last, _ = ravel_pytree(row_with(solve.current, carry.past))
    rows = jnp.concatenate([first[None], rows.reshape(-1, first.size), last[None]])
    rows, reached = _repeat_last(rows.at[width * carry.kept + 1].set(last), width * carry.kept + 1)
    return solve, jax.vmap(unpack)(rows), reached, happenings


def _require_memory(number, row):
    """Raises ``ValueError`` unless so many rows, and what is computed of them, have a place in memory."""
    needed = 2 * number * row.size * row.dtype.itemsize
    if jax.default_backend() == "cpu" and needed > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise ValueError(
            f"To keep up to {number - 1} steps takes {needed / 1e9:.0f} GB, of {memory / 1e9:.0f} GB that there are. "
            "Pass a loop with fewer max_steps, as BoundedLoop(max_steps=200); or solve outside of jit, vmap and grad, "
            "where only the steps that are taken need memory."
        )


def _and_with_fixed_gains(keeping_with, step, solve):
    """``keeping_with(step)``, and the same with fixed gains, for the derivative along an uncertain start.

    The second is ``None`` for a certain start.
    """
    return keeping_with(step), keeping_with(step.with_fixed_gains()) if solve.current.is_spread else None


def _repeat_last(rows, last):
    """The rows, those behind the last real one replaced by it, and which are real."""
    reached = jnp.arange(rows.shape[0], dtype=last.dtype) <= last
    return jnp.where(reached[:, None], rows, rows[last]), reached
