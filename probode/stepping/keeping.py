"""The loop of an adaptive solve, and what it keeps: every step, or those that hold the times asked for.

At the controller's stops, where the equation may jump, the state starts anew: such a time has two
rows, the state before the jump and the one behind it.
"""

import dataclasses
import os

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ..algebra.coordinates import pad_noise, with_square_noise
from ..estimation.strategies import AbstractStrategy
from .adaptive import AdaptiveState, Stepper
from .kept import Row
from .loops import repeat
from .step import Step
from .step_sizes import Control
from .stops import starting_anew
from .times import Interval


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

    There are ``max_steps + 1`` rows, and one more for every stop: the state before it and the one started anew
    (``Row.anew``). Those not reached repeat the last one. With ``influence`` the rows have that of the equation. With
    ``room`` for fewer rows (not in a solve with stops) the solve ends when these are full. Raises ``ValueError`` if the
    rows cannot have a place in memory.
    """
    stepper, passing_stop = Stepper(step, control, solve, interval), starting_anew(step, control, solve, interval)
    no_past, none = step.nothing(solve.current, strategy.remember(solve.current.distribution), influence=influence)
    first, unpack = ravel_pytree(Row.of(solve.current, no_past, none))
    before = solve.num_accepted_steps if room else 0
    flat_past, unpack_past = ravel_pytree(no_past)

    def attempt(solve, rows, number):
        """The solve and the rows after one attempt, and whether the attempt was accepted."""
        left = strategy.remember(solve.current.distribution)
        new, past, effect, moved = stepper.advance(solve, flat_past, lambda past, t: left, none)
        row, _ = ravel_pytree(Row.of(new.current, unpack_past(past), effect))
        return new, rows.at[number(new)].set(row, pred=moved), moved

    def body(solve, rows):
        return attempt(solve, rows, lambda new: new.num_accepted_steps - before)[:2]

    def body_with_stops(carry, rows):
        assert passing_stop is not None
        solve, stops = carry
        new, rows, moved = attempt(solve, rows, lambda new: new.num_accepted_steps + stops)
        new, past, anew = passing_stop(new, with_square_noise(strategy.remember(new.current.distribution)), moved)
        if no_past is not None:
            past = pad_noise(past, no_past.noise.shape[-2])
        row, _ = ravel_pytree(Row.of(new.current, past, none))
        stops = stops + anew.astype(jnp.int32)
        return (new, stops), rows.at[new.num_accepted_steps + stops].set(row, pred=anew)

    def start(number):
        return jnp.zeros((number, first.size), first.dtype).at[0].set(first)

    number, running = room or control.loop.max_steps + 1, stepper.running
    _require_memory(number, first)
    if passing_stop is None:
        has_room = lambda solve: running(solve) & (solve.num_accepted_steps - before < number - 1)  # noqa: E731
        solve, rows = repeat(control.loop, has_room if room else running, body, solve, start(number))
        rows, reached = _repeat_last(rows, solve.num_accepted_steps - before)
        return solve, jax.vmap(unpack)(rows), reached
    number += control.controller.limits.stops.size
    init = solve, jnp.zeros((), jnp.int32)
    (solve, stops), rows = repeat(control.loop, lambda carry: running(carry[0]), body_with_stops, init, start(number))
    rows, reached = _repeat_last(rows, solve.num_accepted_steps + stops)
    rows = jax.vmap(unpack)(rows)
    again = jnp.append(False, (rows.t[1:] == rows.t[:-1]) & reached[1:])
    return solve, dataclasses.replace(rows, anew=again), reached


class _Passing(eqx.Module):
    solve: AdaptiveState
    past: Float[Array, " flat"]  # of the last state kept, in the coordinates of the current one
    passed: Int[Array, ""]  # how many of the times lie behind
    kept: Int[Array, ""]  # in how many steps


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
    stepper, passing_stop = Stepper(step, control, solve, interval), starting_anew(step, control, solve, interval)
    width = 2 if passing_stop is None else 3

    def remember(state):
        return ravel_pytree(with_square_noise(strategy.remember(state.distribution)))

    def row_with(state, past):
        return Row.of(state, unpack_past(past))

    start, unpack_past = remember(solve.current)
    at_start = row_with(solve.current, start)
    first, unpack = ravel_pytree(at_start)
    ahead = jnp.append(interval.ahead(lax.stop_gradient(ts)), jnp.inf)

    def passing(solve, past, moved):
        assert passing_stop is not None
        solve, past, _ = passing_stop(solve, unpack_past(past), moved)
        return solve, ravel_pytree(past)[0]

    def passed(t):
        t = interval.ahead(lax.stop_gradient(t))
        return jnp.searchsorted(ahead, t, side="right", method="scan_unrolled").astype(jnp.int32)

    def body(carry, rows):
        solve = carry.solve
        if ts.size == 0:
            new, past, _, moved = stepper.advance(solve, carry.past, lambda past, t: unpack_past(past))
            if passing_stop is not None:
                new, past = passing(new, past, moved)
            return _Passing(new, past, carry.passed, carry.kept), rows

        def leaving(past, t):
            holds = ahead[carry.passed] <= interval.ahead(lax.stop_gradient(t))
            return unpack_past(jnp.where(holds, remember(solve.current)[0], past))

        new, past, _, moved = stepper.advance(solve, carry.past, leaving)
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
    # No more steps than these can hold a time.
    number = min(ts.size, control.loop.max_steps)
    rows = jnp.zeros((number, width, first.size), first.dtype)
    carry, rows = repeat(control.loop, lambda carry: stepper.running(carry.solve), body, init, rows)
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
