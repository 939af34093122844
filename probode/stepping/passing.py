"""The loop of an adaptive solve, and its derivative: that of the accepted steps, frozen, each taken once more.

The loop looks for steps, and is not differentiated. It notes how long the accepted ones are, and keeps the state before
every so many of them, where a segment begins. The derivative goes from segment to segment: it takes the steps of each
again from the state that was kept, and pushes a tangent through every step, or pulls a cotangent back. So there is one
step to differentiate, and to compile, without search, decisions and rejected attempts; and memory is needed for the
states that were kept and for those of one segment.
"""

import dataclasses
import functools as ft
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..algebra.linalg import choose, detach
from ..util.tracing import computed_again, full_precision
from .adaptive import Move, Note, Stepper
from .loops import AbstractLoop, repeat


class Written(eqx.Module):
    """A row to be written: its numbers, its place among the rows, and whether it is to be written at all.

    ``table``: in which of the arrays of rows.
    """

    row: Float[Array, " flat"]
    place: Int[Array, ""]
    real: Bool[Array, ""]
    table: int = eqx.field(static=True, default=0)


# Arrays of rows, which the loop writes and does not read: of states, and of events where there are any.
Tables = tuple[Float[Array, "_ _"], ...]


class AbstractKeeping(eqx.Module):
    """Which states of an adaptive solve are kept, as rows of arrays that the loop writes and does not read.

    A subclass has the field ``stepper`` and defines ``is_running`` and ``attempt``. It also chooses the carry, which
    goes from attempt to attempt: a module with the ``AdaptiveState`` in its field ``solve``.
    """

    stepper: eqx.AbstractVar[Stepper]

    @abstractmethod
    def is_running(self, carry: Any) -> Bool[Array, ""]:
        """Whether the solve goes on."""

    @abstractmethod
    def attempt(self, carry: Any, take: Callable[..., Move]) -> tuple[Any, list[Written], Move]:
        """The carry after an attempt, the rows that it writes, and the attempt itself.

        ``take(solve, past, leaving, influence)``: makes the attempt, as ``Stepper.advance`` or ``Stepper.repeat``,
        where the other arguments are explained.
        """


class Segments(eqx.Module):
    """How the accepted steps of a solve are divided: ``number`` segments of ``length`` steps.

    ``noted``: whether there are notes on all steps; otherwise they are found again, segment by segment.
    """

    number: int = eqx.field(static=True)
    length: int = eqx.field(static=True)
    noted: bool = eqx.field(static=True)

    @staticmethod
    def of(loop: AbstractLoop) -> "Segments":
        """The division for a loop: a segment for each of its checkpoints; by default about ``sqrt(max_steps)``."""
        number = math.ceil(math.sqrt(loop.max_steps)) if loop.checkpoints is None else loop.checkpoints
        number = min(number, loop.max_steps)
        return Segments(number, math.ceil(loop.max_steps / number), loop.notes_steps)


class Record(eqx.Module):
    """What is known of the accepted steps: the carry before each segment, notes on the steps, and their number.

    In a tangent ``number`` is ``None``.
    """

    starts: PyTree
    notes: Note | None
    number: Int[Array, ""] | None


def pass_all(
    keeping: AbstractKeeping, carry: Any, rows: Tables, moving: AbstractKeeping | None = None
) -> tuple[Any, Tables]:
    """The carry and the rows at the end of a solve, from those at its start.

    ``moving``: the same as ``keeping``, with steps whose derivative is meant where another one is. It holds for the
    first derivative that is taken, along the spread of an uncertain start; one of the result is that of ``keeping``.
    """
    ended = _pass(keeping, moving, carry, rows, None)[:2]
    loop = keeping.stepper.control.loop
    if loop.reverse:
        return ended
    message = (
        f"{type(loop).__name__}() cannot be differentiated in reverse mode (jax.grad, jax.vjp). "
        "Use Solver(..., loop=BoundedLoop()) or CheckpointedLoop()."
    )
    return eqxi.nondifferentiable_backward(ended, msg=message, symbolic=True)


def _search(keeping, carry, rows, segments, limit=None):
    """The carry and the rows at the end of a solve, or after ``limit`` steps; and the record, divided in ``segments``.

    ``None`` instead of segments: no record.
    """
    loop, before = keeping.stepper.control.loop, carry.solve.num_accepted_steps

    def running(carry):
        here = True if limit is None else carry.solve.num_accepted_steps - before < limit
        return keeping.is_running(carry) & here

    def put(into, values, place, real):
        return [x.at[place].set(value, pred=real) for x, value in zip(into, jax.tree.leaves(values), strict=True)]

    def body(carry, kept):
        rows, starts, notes = kept
        new, written, move = keeping.attempt(carry, keeping.stepper.advance)
        for row in written:
            into = rows[row.table].at[row.place].set(row.row, pred=row.real)
            rows = (*rows[: row.table], into, *rows[row.table + 1 :])
        if starts is not None:
            segment, i = jnp.divmod(carry.solve.num_accepted_steps - before, segments.length)
            starts = put(starts, carry, segment, move.accepted & (i == 0))
            notes = put(notes, move.note, (segment, i), move.accepted) if segments.noted else notes
        return new, (rows, starts, notes)

    if segments is None:
        carry, (rows, *_) = repeat(loop, running, body, carry, (rows, None, None))
        return carry, rows, None
    # Not zeros: lanes of a vmap differentiate segments, too, that they have not reached.
    starts = jax.tree.map(lambda x: jnp.broadcast_to(x, (segments.number, *x.shape)), carry)
    notes = Note.before(carry.solve) if segments.noted else None
    notes = jax.tree.map(lambda x: jnp.zeros((segments.number, segments.length, *x.shape), x.dtype), notes)
    kept = rows, jax.tree.leaves(starts), jax.tree.leaves(notes)
    carry, (rows, *leaves) = repeat(loop, running, body, carry, kept)
    starts, notes = (jax.tree.unflatten(jax.tree.structure(t), x) for t, x in zip((starts, notes), leaves, strict=True))
    return carry, rows, Record(starts, notes, carry.solve.num_accepted_steps - before)


@eqx.filter_custom_jvp
def _pass(keeping, moving, carry, rows, segments):
    """``_search``, with the derivative of the accepted steps: those of ``moving``, unless that is ``None``."""
    return _search(keeping, carry, rows, segments)


@_pass.def_jvp
@full_precision()
def _(primals, tangents):
    keeping, moving, carry, rows, segments = primals
    parts = Segments.of(keeping.stepper.control.loop) if segments is None else segments
    ended = _pass(keeping, None, carry, rows, parts)
    t_keeping, t_moving, *t_others = tangents
    if moving is not None:
        keeping, t_keeping = moving, t_moving
    t_carry, t_rows, t_starts = _push(keeping, carry, rows, ended[2], parts, (t_keeping, *t_others))
    if segments is None:
        return (*ended[:2], None), (t_carry, t_rows, None)
    # A second derivative needs the tangents of the states with which segments begin, too.
    t_notes = jax.tree.map(lambda _: None, ended[2].notes)
    return ended, (t_carry, t_rows, Record(t_starts, t_notes, None))


def _push(keeping, carry, rows, record, segments, tangents):
    """The tangents of the carry and the rows at the end of a solve, and those of the carries before all segments."""
    t_keeping, t_carry, t_rows, _ = tangents
    moving, _ = eqx.partition(carry, eqx.is_inexact_array)
    t_begun = _with_zeros(t_carry, moving)
    # Where no step was accepted, as in a lane that has failed at its start, derivatives may be NaN: zero times NaN is
    # NaN, so tangents are set to zero before the steps, and replaced after them.
    some = record.number > 0
    t_keeping, t_moving = jax.tree.map(lambda t: jnp.where(some, t, 0), (t_keeping, t_begun))
    # One more row, for what is not to be kept.
    t_rows = jax.tree.map(lambda t: jnp.pad(t, ((0, 1), (0, 0))), _with_zeros(t_rows, rows))

    def retake(keeping, moving, still, note, active):
        """The carry after a step that is taken once more, the rows that it writes, and their places."""
        before = eqx.combine(moving, still)
        new, written, _ = keeping.attempt(before, ft.partial(keeping.stepper.repeat, note, active))
        # What only the search needs goes on as it is, so that nothing is computed for it.
        solve = dataclasses.replace(new.solve, dt=before.solve.dt, controller=before.solve.controller)
        moving, still = eqx.partition(dataclasses.replace(new, solve=solve), eqx.is_inexact_array)
        places = [jnp.where(w.real & active, w.place, rows[w.table].shape[0]) for w in written]
        tables = [w.table for w in written]
        return moving, [w.row for w in written], still, places, tables

    @computed_again
    def step(moving, still, t_moving, t_rows, note, active):
        """The carry after a step, and the tangents."""
        along = lambda keeping, moving: retake(keeping, moving, still, note, active)  # noqa: E731
        (new, _, new_still, places, tables), (t_new, t_written, *_) = eqx.filter_jvp(
            along, (keeping, moving), (t_keeping, t_moving)
        )
        for place, table, t_row in zip(places, tables, t_written, strict=True):
            into = t_rows[table].at[place].set(t_row)
            t_rows = (*t_rows[:table], into, *t_rows[table + 1 :])
        new, old = (new, new_still, _with_zeros(t_new, new)), (moving, still, t_moving)
        return *choose(active, new, old), t_rows

    @computed_again
    def segment(t_moving, t_rows, first, start, notes):
        """The tangents after the steps of a segment, of which the ``first`` one goes from ``start``."""
        notes = _notes(keeping, start, rows, segments.length) if notes is None else notes

        # Also around the branch: otherwise what that closes over would be kept for every step.
        @computed_again
        def step_if_any(state, x):
            i, note = x
            active = i < record.number
            wait = lambda *args: args[:4]  # noqa: E731
            return lax.cond(eqxi.unvmap_any(active), step, wait, *state, note, active), None

        state = *eqx.partition(start, eqx.is_inexact_array), t_moving, t_rows
        state, _ = lax.scan(step_if_any, state, (first + jnp.arange(segments.length, dtype=first.dtype), notes))
        return state[2:]

    @computed_again
    def segment_if_any(state, x):
        wait = lambda *args: args[:2]  # noqa: E731
        return lax.cond(eqxi.unvmap_any(x[0] < record.number), segment, wait, *state, *x), state[0]

    firsts = jnp.arange(segments.number, dtype=record.number.dtype) * segments.length
    parts = firsts, record.starts, record.notes
    (t_moving, t_rows), t_starts = lax.scan(segment_if_any, (t_moving, t_rows), parts)
    return choose(some, t_moving, t_begun), jax.tree.map(lambda t: t[:-1], t_rows), t_starts


def _notes(keeping, start, rows, number):
    """The lengths of the next ``number`` accepted steps from a carry, as a ``Note``, by looking for them once more."""
    # Progress was reported when these steps were taken first.
    control = dataclasses.replace(keeping.stepper.control, progress=None)
    without_progress = eqx.tree_at(lambda keeping: keeping.stepper.control, keeping, control)
    without_progress, start, rows = detach((without_progress, start, rows))
    _, _, record = _search(without_progress, start, rows, Segments(1, number, noted=True), number)
    return jax.tree.map(lambda x: x[0], record.notes)


def _with_zeros(tangent, primal):
    """Tangents of all numbers of a tree that can be differentiated; ``None`` stands for zeros."""

    def fill(t, x):
        return None if x is None else (jnp.zeros_like(x) if t is None else t)

    return jax.tree.map(fill, tangent, primal, is_leaf=lambda x: x is None)
