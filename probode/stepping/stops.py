"""What happens where a solve jumps, at a stop of the equation or an event with a reset: the state is restarted."""

import dataclasses
import functools as ft
from typing import Any

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax

from ..algebra.coordinates import Conditional
from ..algebra.linalg import choose, detach, is_finite, triangularise
from ..algebra.normal import Normal, batched
from ..util.tracing import traced_once
from .adaptive import AdaptiveState, Note, Restart
from .restarts import displaced, restart
from .result import Result
from .spread import value_and_moves
from .step import Step
from .step_sizes import Control, bounded_step, first_step
from .times import Interval, beside, is_jump


def restart_at_jumps(
    step: Step, control: Control, solve: AdaptiveState, interval: Interval, past: Conditional | None
) -> Any:
    """The function that restarts the state at jumps, to be called after every attempt; ``None`` without any.

    ``fn(solve, past, moved, note)`` returns the solve, the past given its state, whether it was restarted, and the note
    with which this can be repeated. It restarts if it has ``moved`` to a stop before the end of the interval, or to
    events with a reset; otherwise solve and past come back as they were. ``note``: on the step before it. The function
    was traced once, for a ``past`` of these shapes, with what users' functions close over among its inputs.
    """
    if not control.jumps:
        return None
    dtype, begun, direction = interval.t1.dtype, solve, interval.direction
    stops, events = control.stops(dtype), control.events
    with_reset = None if events is None or not events.resets else events
    layout, constraint, args = step.layout, step.constraint, step.args
    low = constraint.problem.num_initial_values

    def behind(t):
        return t if stops is None else beside(t, direction, stops)

    def pass_jump(solve, past, moved, note):
        now, happen, here = solve.current, note.happen, jnp.array(False)
        if stops is not None:
            here = moved & is_jump(now.t, stops) & (interval.remaining(now.t) > 0)
        is_reset = jnp.array(False)
        if with_reset is not None:
            is_reset = moved & jnp.any(happen & (with_reset.have_reset > 0))
            here = here | is_reset

        def jump(solve, past):
            # Lanes of a vmap come here wherever they are: they differentiate at a point that is known to be fine.
            now = solve.current
            t = jnp.where(here, now.t, begun.t)
            mean = jnp.where(here, now.distribution.mean, begun.current.distribution.mean)
            x, error, spread = Normal(mean, now.distribution.factor), now.global_error, now.spread
            new_past, new_note = past, note
            if with_reset is not None:
                flags = (happen & is_reset).astype(dtype)
                way = with_reset.pass_through(t, layout.unpack(mean), flags, note.near, layout, direction)
                z, saltation, leaving, touches = way
                # The state of a repeated step differs by round-off, which the steps in between have amplified: asked
                # again there, a function might not cross zero, and its time would not move with the state.
                new_note = dataclasses.replace(
                    note, near=jnp.where(is_reset, jnp.where(touches, -jnp.inf, jnp.inf), note.near)
                )
                x, new_past = displaced(x, z, saltation, past, layout)
                along = lambda move: jnp.tensordot(saltation, move[:low], axes=2)  # noqa: E731
                if now.carries_error:
                    whole = layout.unpack(error)
                    error = layout.pack(whole.at[:low].set(along(whole)))
                if now.is_spread:
                    whole = jax.vmap(layout.unpack)(spread)
                    spread = jax.vmap(layout.pack)(whole.at[:, :low].set(jax.vmap(along)(whole)))
            if now.is_spread:
                spread = restart_spread(*detach((x.mean, spread, behind(t))))
            x, new_past = restart(constraint, control.initialisation, behind(t), x, new_past, layout, args)
            # The memory of scales is reset by an update with scale zero that is not informative.
            nothing = jnp.zeros_like(now.output_scale), jnp.zeros((*layout.batch_shape, 1, 1), layout.dtype)
            forgotten = step.calibration.update(now.statistics, *nothing, jnp.zeros((), bool))
            inherited = now.inherited
            if now.inherits:
                inherited = detach(batched(ft.partial(triangularise, None))(x.factor)[..., : inherited.shape[-2], :])
            current = dataclasses.replace(
                now, distribution=x, statistics=forgotten, global_error=error, spread=spread, inherited=inherited
            )
            watch = solve.watch
            if with_reset is not None:
                watch = with_reset.behind_reset(watch, current, happen, leaving)
            until = (interval.t1 if stops is None else interval.nearest(stops, now.t)) - now.t
            prior = step.prior if current.prior is None else current.prior
            # As in a solve that starts here: so one with stops takes the steps of its pieces.
            dt = first_step(control, detach(current), detach(prior), until, constraint)
            # Resets often repeat, and steps that would see nothing of what comes need not be tried each time.
            dt = jnp.where(is_reset, jnp.minimum(dt, solve.dt), dt)
            new = dataclasses.replace(
                solve,
                current=current,
                dt=lax.stop_gradient(bounded_step(control, dt)),
                controller=control.controller.init(dtype),
                last_restart=Restart(lax.stop_gradient(now.t), jnp.ones_like(solve.last_restart.zero_so_far)),
                watch=watch,
            )
            # Where no derivatives satisfy the equation together with u, as an algebraic one that jumps, the state goes
            # on; but not from a state that a reset has made infinite.
            finite = here & is_finite(x)
            failed = is_reset & ~finite
            new, new_past = choose(finite, (new, new_past), (solve, past))
            result = Result.where(failed, Result.nonfinite, new.result)
            return dataclasses.replace(new, result=result), new_past, finite, new_note

        def restart_spread(mean, spread, t):
            u, *moves = (layout.unpack(x)[:low] for x in (mean, *spread))
            initialise = control.initialisation.initialise
            start = lambda u: initialise(constraint.problem, t, u, layout, detach(args)).mean  # noqa: E731
            return value_and_moves(start, u, jnp.stack(moves))[1]

        # In lanes of a vmap without a jump everything is as it was, where others have one.
        no_jump = lambda solve, past: (solve, past, jnp.array(False), note)  # noqa: E731
        return lax.cond(eqxi.unvmap_any(here), jump, no_jump, solve, past)

    return traced_once(pass_jump, solve, past, jnp.zeros((), bool), Note.before(solve))
