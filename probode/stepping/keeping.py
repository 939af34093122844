"""What an adaptive solve keeps: every step, or those that hold the times asked for.

At the controller's stops, where the equation may jump, the state is restarted: such a time has two
rows, the state before the jump and the one behind it.
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
from .kept import Row
from .passing import AbstractKeeping, Written, pass_all
from .state import State
from .step import Step
from .step_sizes import Control
from .stops import restart_at_stops
from .times import Interval


class _Steps(eqx.Module):
    solve: AdaptiveState
    stops: Int[Array, ""]  # number of restarts


class KeepingSteps(AbstractKeeping):
    """Every accepted step is kept, and every state that was restarted."""

    stepper: Stepper
    number: int = eqx.field(static=True)
    before: Int[Array, ""]
    strategy: AbstractStrategy
    no_past: Any
    no_influence: Any
    passing_stop: Any

    def is_running(self, carry: _Steps) -> Bool[Array, ""]:
        has_room = carry.solve.num_accepted_steps + carry.stops - self.before < self.number - 1
        return self.stepper.running(carry.solve) & has_room

    def attempt(self, carry: _Steps, take: Callable) -> tuple[_Steps, list[Written], Move]:
        solve, stops = carry.solve, carry.stops
        left = self.strategy.remember(solve.current.distribution)
        flat_past, unpack_past = ravel_pytree(self.no_past)
        move = take(solve, flat_past, lambda past, t: left, self.no_influence)
        new = move.solve
        row, _ = ravel_pytree(Row.of(new.current, unpack_past(move.past), move.influence))
        written = [Written(row, new.num_accepted_steps + stops - self.before, move.accepted)]
        if self.passing_stop is not None:
            past = with_square_noise(self.strategy.remember(new.current.distribution))
            new, past, restarted = self.passing_stop(new, past, move.accepted)
            if self.no_past is not None:
                past = pad_noise(past, self.no_past.noise.shape[-2])
            row, _ = ravel_pytree(Row.of(new.current, past, self.no_influence))
            stops = stops + restarted.astype(jnp.int32)
            written.append(Written(row, new.num_accepted_steps + stops - self.before, restarted))
        return _Steps(new, stops), written, move


def solve_keeping_steps(
    step: Step,
    control: Control,
    strategy: AbstractStrategy,
    solve: AdaptiveState,
    interval: Interval,
    *,
    influence: bool = False,
    room: int | None = None,
) -> tuple[AdaptiveState, Row, Bool[Array, " rows"]]:
    """Solve to the end; the rows at the start and after every accepted step, and which of them are real.

    There are ``max_steps + 1`` rows, and one more for every stop: the state before it and the restarted one
    (``Row.restarted``). Those not reached repeat the last one. With ``influence`` the rows have that of the equation.
    With ``room`` for fewer rows (not in a solve with stops) the solve ends when these are full. Raises ``ValueError``
    if the rows cannot have a place in memory.
    """
    left = strategy.remember(solve.current.distribution)
    no_past, none = step.nothing(solve.current, left, influence=influence)
    first, unpack = ravel_pytree(Row.of(solve.current, no_past, none))
    number = room or control.loop.max_steps + 1
    _require_memory(number, first)
    jumps = control.stops(interval.t1.dtype) is not None
    if jumps:
        number += control.controller.limits.stops.size
    keeping = KeepingSteps(
        Stepper.of(step, control, solve, interval, left, none),
        number,
        solve.num_accepted_steps,
        strategy,
        no_past,
        none,
        restart_at_stops(step, control, solve, interval, with_square_noise(left)),
    )
    begun, rows = _Steps(solve, jnp.zeros((), jnp.int32)), jnp.zeros((number, first.size), first.dtype)
    carry, rows = pass_all(keeping, begun, rows)
    solve = carry.solve
    rows, reached = _repeat_last(rows.at[0].set(first), solve.num_accepted_steps + carry.stops - keeping.before)
    rows = jax.vmap(unpack)(rows)
    if jumps:
        again = jnp.append(False, (rows.t[1:] == rows.t[:-1]) & reached[1:])
        rows = dataclasses.replace(rows, restarted=again)
    return solve, rows, reached


class _Times(eqx.Module):
    solve: AdaptiveState
    past: Float[Array, " flat"]  # of the last state kept, in the coordinates of the current one
    passed: Int[Array, ""]  # how many of the times lie behind
    kept: Int[Array, ""]  # in how many steps


class KeepingTimes(AbstractKeeping):
    """The steps that hold a time are kept; what lies between them is marginalised as it is passed."""

    stepper: Stepper
    ahead: Float[Array, " times"]
    strategy: AbstractStrategy
    passing_stop: Any

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
        """How many times lie behind ``t``."""
        t = self.stepper.interval.ahead(lax.stop_gradient(t))
        return jnp.searchsorted(self.ahead, t, side="right", method="scan_unrolled").astype(jnp.int32)

    def attempt(self, carry: _Times, take: Callable) -> tuple[_Times, list[Written], Move]:
        solve, (_, unpack_past) = carry.solve, self.remember(carry.solve.current)

        def passing(solve, past, moved):
            solve, past, _ = self.passing_stop(solve, unpack_past(past), moved)
            return solve, ravel_pytree(past)[0]

        if self.ahead.size == 1:  # infinity alone
            move = take(solve, carry.past, lambda past, t: unpack_past(past))
            new, past = move.solve, move.past
            if self.passing_stop is not None:
                new, past = passing(new, past, move.accepted)
            return dataclasses.replace(carry, solve=new, past=past), [], move

        def leaving(past, t):
            holds = self.ahead[carry.passed] <= self.stepper.interval.ahead(lax.stop_gradient(t))
            return unpack_past(jnp.where(holds, self.remember(solve.current)[0], past))

        def row_with(state, past):
            return Row.of(state, unpack_past(past))

        move = take(solve, carry.past, leaving)
        new, past = move.solve, move.past
        behind = self.passed(new.t)
        keep = behind > carry.passed
        # One flat row: the price of an iteration is that of its instructions.
        kept = [row_with(solve.current, carry.past), row_with(new.current, past)]
        past = jnp.where(keep, self.remember(new.current)[0], past)
        if self.passing_stop is not None:
            new, past = passing(new, past, move.accepted)
            kept.append(row_with(new.current, past))
            past = jnp.where(keep, self.remember(new.current)[0], past)
        row, _ = ravel_pytree(tuple(kept))
        after = _Times(new, past, behind, carry.kept + keep.astype(jnp.int32))
        return after, [Written(row, carry.kept, keep)], move


def solve_keeping_times(
    step: Step,
    control: Control,
    strategy: AbstractStrategy,
    solve: AdaptiveState,
    interval: Interval,
    ts: Float[Array, " times"],
) -> tuple[AdaptiveState, Row, Bool[Array, " rows"]]:
    """Solve to the end; the rows at the start, at both ends of the steps that hold one of ``ts``, and at the end.

    The prior tells what happens inside a step; what lies between the steps kept is marginalised as it is passed. There
    are two rows for every step that may hold a time, and two more; those not reached, as the flags say, repeat the last
    one. In a solve with stops a step that is kept has a third row, with which the next one starts.
    """
    past = with_square_noise(strategy.remember(solve.current.distribution))
    start, unpack_past = ravel_pytree(past)

    def row_with(state, past):
        return Row.of(state, unpack_past(past))

    at_start = row_with(solve.current, start)
    first, unpack = ravel_pytree(at_start)
    passing_stop = restart_at_stops(step, control, solve, interval, past)
    # No more steps than these can hold a time.
    number, width = min(ts.size, control.loop.max_steps), 2 if passing_stop is None else 3
    ahead = jnp.append(interval.ahead(lax.stop_gradient(ts)), jnp.inf)
    stepper = Stepper.of(step, control, solve, interval, past)
    keeping = KeepingTimes(stepper, ahead, strategy, passing_stop)
    carry, rows = pass_all(keeping, keeping.start(solve), jnp.zeros((number, width * first.size), first.dtype))
    solve = carry.solve
    if ts.size == 0:
        # As they are: XLA hands larger arrays, such as all of this in one, to other threads, which costs 30 us.
        ends = at_start, row_with(solve.current, carry.past)
        return solve, jax.tree.map(lambda *xs: jnp.stack(xs), *ends), jnp.ones(2, bool)
    last, _ = ravel_pytree(row_with(solve.current, carry.past))
    rows = jnp.concatenate([first[None], rows.reshape(-1, first.size), last[None]])
    rows, reached = _repeat_last(rows.at[width * carry.kept + 1].set(last), width * carry.kept + 1)
    return solve, jax.vmap(unpack)(rows), reached


def _require_memory(number, row):
    """Raises ``ValueError`` unless so many rows, and what is computed of them, have a place in memory."""
    needed = 2 * number * row.size * row.dtype.itemsize
    if jax.default_backend() == "cpu" and needed > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise ValueError(
            f"To keep up to {number - 1} steps takes {needed / 1e9:.0f} GB, of {memory / 1e9:.0f} GB that there are. "
            "Pass a loop with fewer max_steps, as BoundedLoop(max_steps=200); or solve outside of jit, vmap and grad, "
            "where only the steps that are taken need memory."
        )


def _repeat_last(rows, last):
    """The rows, those behind the last real one replaced by it, and which are real."""
    reached = jnp.arange(rows.shape[0], dtype=last.dtype) <= last
    return jnp.where(reached[:, None], rows, rows[last]), reached
