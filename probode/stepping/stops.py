"""What happens at a stop, a time at which the equation jumps, in an adaptive solve: the state is restarted."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..algebra.coordinates import Conditional
from ..algebra.linalg import choose, detach, is_finite
from ..algebra.normal import Normal
from ..util.tracing import traced_once
from .adaptive import AdaptiveState, Restart
from .restarts import restart
from .spread import value_and_moves
from .step import Step
from .step_sizes import Control, bounded_step, first_step
from .times import Interval, beside, is_jump


def restart_at_stops(
    step: Step, control: Control, solve: AdaptiveState, interval: Interval, past: Conditional | None
) -> Any:
    """The function that restarts the state at stops, to be called after every attempt; ``None`` without any stops.

    ``fn(solve, past, moved)`` returns the solve, the past given its state, and whether it was restarted: if it has
    ``moved``, to a stop before the end of the interval. Otherwise solve and past come back as they were. It was traced
    once, for a ``past`` of these shapes, with what users' functions close over among its inputs.
    """
    dtype, begun, direction = interval.t1.dtype, solve, interval.direction
    stops = control.stops(dtype)
    if stops is None:
        return None
    layout, constraint, args = step.layout, step.constraint, step.args

    def restart_spread(now, t):
        problem, initialise = constraint.problem, control.initialisation.initialise
        u, *moves = (layout.unpack(x)[: problem.num_initial_values] for x in (now.distribution.mean, *now.spread))
        start = lambda u: initialise(problem, t, u, layout, detach(args)).mean  # noqa: E731
        return value_and_moves(start, u, jnp.stack(moves))[1]

    def pass_stop(solve, past, moved):
        now = solve.current
        here = moved & is_jump(now.t, stops) & (interval.remaining(now.t) > 0)

        def start(now, past):
            # Lanes of a vmap come here wherever they are: they differentiate at a point that is known to be fine.
            t = jnp.where(here, now.t, begun.t)
            mean = jnp.where(here, now.distribution.mean, begun.current.distribution.mean)
            x = Normal(mean, now.distribution.factor)
            behind = beside(t, direction, stops)
            return restart(constraint, control.initialisation, behind, x, past, layout, args)

        x, new_past = lax.cond(here, start, lambda now, past: (now.distribution, past), now, past)
        # Where no derivatives satisfy the equation together with u, as an algebraic one that jumps, the state goes on.
        restarted = here & is_finite(x)
        x, past = choose(restarted, (x, new_past), (now.distribution, past))
        # The memory of scales is reset by an update with scale zero that is not informative.
        nothing = jnp.zeros_like(now.output_scale), jnp.zeros((*layout.batch_shape, 1, 1), layout.dtype)
        forgotten = step.calibration.update(now.statistics, *nothing, jnp.zeros((), bool))
        statistics = choose(restarted, forgotten, now.statistics)
        current = dataclasses.replace(now, distribution=x, statistics=statistics)
        if now.is_spread:
            spread = jnp.where(restarted, restart_spread(*detach((now, beside(now.t, direction, stops)))), now.spread)
            current = dataclasses.replace(current, spread=spread)
        until = interval.nearest(stops, now.t) - now.t
        prior = step.prior if current.prior is None else current.prior
        # As in a solve that starts here: so one with stops takes the steps of its pieces.
        dt = first_step(control, detach(current), detach(prior), until, constraint)
        dt = bounded_step(control, dt)
        new = dataclasses.replace(
            solve,
            current=current,
            dt=jnp.where(restarted, lax.stop_gradient(dt), solve.dt),
            controller=choose(restarted, control.controller.init(dtype), solve.controller),
            last_restart=choose(
                restarted,
                Restart(lax.stop_gradient(now.t), jnp.ones_like(solve.last_restart.zero_so_far)),
                solve.last_restart,
            ),
        )
        return new, past, restarted

    return traced_once(pass_stop, solve, past, jnp.zeros((), bool))
