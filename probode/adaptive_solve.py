"""One adaptive solve from a checked request: its start, its loop and its answer, each compiled.

Where all values are known the steps that are kept come in pieces, so that memory and time follow their number. Under a
transformation of JAX the shapes of arrays must not depend on values: there is room for ``max_steps`` of them.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .algebra.factorisations import Layout
from .algebra.linalg import choose, detach
from .algebra.normal import pad, push
from .estimation.calibration import AbstractLeaveOneOut
from .estimation.strategies import Filter
from .information.observations import Observations
from .posterior.assemble import answer
from .posterior.events import occurrences
from .posterior.solution import Solution
from .posterior.uncertain_start import push_forward
from .requests import Request
from .stepping.adaptive import Note, begin, end, is_running
from .stepping.events import Events
from .stepping.keeping import solve_keeping_steps, solve_keeping_times
from .stepping.kept import Kept, Row
from .stepping.restarts import starts_uncertain
from .stepping.spread import value_and_moves
from .stepping.step import Step
from .stepping.step_sizes import Control, bounded_step, first_step
from .stepping.stops import restart_at_jumps
from .stepping.times import beside
from .util.checks import is_traced
from .util.tracing import compiled


# A piece of a solve keeps at most so many states, and about so many numbers.
_ROWS, _NUMBERS = 256, 2**21


def step_of(solver: Any, layout: Layout, args: PyTree, data: Observations | None = None) -> Step:
    """The step of a solver, bound to the layout of its state and the parameters and data of a problem."""
    return Step(solver.prior, solver.constraint, solver.calibration, layout, args, data)


def answer_request(solver: Any, request: Request, args: PyTree) -> Solution:
    """The ``Solution`` of an adaptive solve, pushed forward along the directions in which its start is uncertain."""
    if request.start.directions is not None:
        return _solve_uncertain(solver, request, args)
    jumps = request.events is not None or solver.controller.limits.stops.size
    if jumps or not _keeps_steps(solver, request) or is_traced(solver, request, args):
        return _solve_adaptive(solver, request, args)
    begun = _begun(solver, request, args)
    # The user's function may close over traced values.
    if is_traced(begun):
        return _solve_adaptive(solver, request, args)
    return _solve_in_pieces(solver, request, args, begun)


def _keeps_steps(solver, request):
    at, strategy = request.save_at, solver.strategy
    # Where layouts change no conditional reaches across a change: all steps are kept.
    of_layouts = solver.factorisation.adapts and strategy.smooths and (at.ts is not None or at.t0)
    return at.steps or at.dense or strategy.keeps_steps or of_layouts


def _solve_in_pieces(solver, request, args, solve):
    """The ``Solution`` of a request, like ``_solve_adaptive``, with arrays for as many steps as there turn out to be.

    ``solve``: before its first attempt.
    """
    numbers = 3 * solve.current.distribution.factor.size
    room = min(max(_NUMBERS // numbers, 8), _ROWS, solver.loop.max_steps + 1)
    kept: list[Row] = []
    goes_on = True
    while goes_on:
        solve, rows, reached, goes_on = _piece(solver, request, args, solve, room)
        # The first row of a further piece is the last one of the piece before.
        real = slice(1 if kept else 0, int(np.sum(reached)))
        kept.append(jax.tree.map(lambda x: np.asarray(x)[real], rows))  # noqa: B023
    rows = jax.tree.map(lambda *pieces: np.concatenate(pieces), *kept)
    # Powers of two, so that what follows is not compiled for every number of steps.
    number = len(rows.t)
    size = max(8, 1 << (number - 1).bit_length())
    rows = jax.tree.map(lambda x: jnp.asarray(np.pad(x, [(0, size - number)] + [(0, 0)] * (x.ndim - 1), "edge")), rows)
    return _answer(solver, request, args, solve, rows, jnp.asarray(np.arange(size) < number))


@compiled
def _begun(solver, request, args):
    return _begin(solver, request, args)[-1]


@compiled
def _piece(solver, request, args, solve, room):
    step, control = _parts(solver, request, args)
    solve, rows, reached, _ = _keep_steps(solver, request, step, control, solve, room)
    return solve, rows, reached, is_running(solve, request.interval, solver.loop)


@compiled
def _answer(solver, request, args, solve, rows, reached):
    step, control = _parts(solver, request, args)
    return _answer_with(solver, request, step, control, solve, rows, reached, None, dense=True)[0]


@compiled
def _solve_adaptive(solver: Any, request: Request, args: PyTree) -> Solution:
    """The ``Solution`` of the initial value problem in a request, with adaptive step sizes, as one compiled program.

    ``Solution.result`` says whether the solve has failed.
    """
    solution, happenings = _solved(solver, request, args)
    return _with_events(solution, request, solver, args, happenings)


def _with_events(solution, request, solver, args, happenings, moves=None):
    """The solution of a request with the times and states of its events, if any were asked for.

    ``moves``: the derivatives of these states with respect to an uncertain initial value.
    """
    if request.events is None:
        return solution
    _, control = _parts(solver, request, args)
    spread, ended = solution.spread, solution.state
    moving = None if spread is None else spread.trajectory
    events = occurrences(control.events, happenings, ended, solution.trajectory, moving, moves)
    return dataclasses.replace(solution, events=events)


def _solved(solver, request, args):
    """The ``Solution`` without its events, and the states at these as they were kept."""
    step, control, begun = _begin(solver, request, args)
    if dense := _keeps_steps(solver, request):
        kept = _keep_steps(solver, request, step, control, begun)
    else:
        save_at = request.save_at
        # At ``t1`` alone smoother and filter agree: without this line conditionals would be computed and not used.
        strategy = solver.strategy if save_at.ts is not None or save_at.t0 else Filter()
        times = jnp.zeros(0, request.layout.dtype) if save_at.ts is None else jnp.asarray(save_at.ts)
        kept = solve_keeping_times(step, control, strategy, begun, request.interval, times)
    return _answer_with(solver, request, step, control, *kept, dense=dense)


def _keep_steps(solver, request, step, control, solve, room=None):
    influence = isinstance(solver.calibration, AbstractLeaveOneOut)
    return solve_keeping_steps(step, control, solver.strategy, solve, request.interval, influence=influence, room=room)


def _answer_with(solver, request, step, control, solve, rows, reached, happenings, *, dense):
    kept = Kept(rows, reached, dense, solver.loop.max_steps, control.events, happenings)
    return answer(request.save_at, kept, end(solve, request.interval), step, solver.loop)


def _parts(solver, request, args):
    """The step, and the parts that control it."""
    start, layout = request.start, request.layout
    step = step_of(solver, layout, args, request.data)
    controller = eqx.tree_at(lambda c: c.tolerances, solver.controller, solver.controller.tolerances.of(layout))
    control = Control(solver.error, controller, solver.loop, solver.initialisation, request.progress, request.must_hit)
    if request.data is not None:
        # Two equal steps to a datum instead of a very short last one, whose residual would be round-off, and likewise
        # what it adds to a likelihood.
        control = dataclasses.replace(control, must_hit=request.data.ts, halve_before_hit=True)
    if request.events is not None:
        events = Events(request.events, solver.constraint.problem, args, request.max_events)
        control = dataclasses.replace(control, events=events)
    # An uncertain start, and a state conditioned on data, are rightly updated by residuals that the noise of a step
    # does not explain: such steps must not be refused.
    refuses = not solver.calibration.is_local and request.data is None and start.is_certain
    return step, dataclasses.replace(control, refuses_unexplained=refuses)


def _begin(solver, request, args):
    """The step, the parts that control it, and the solve before its first attempt."""
    start, interval, layout, t0 = request.start, request.interval, request.layout, request.interval.t0
    step, control = _parts(solver, request, args)
    stops, behind, until = control.stops(layout.dtype), t0, interval.t1
    if stops is not None:
        layout.require_shared_algebra("stop_at")
        layout.require_own_equations("stop_at")
        behind, until = beside(t0, interval.direction, stops), interval.nearest(stops, t0)
    state = start.state(step, solver.initialisation, t0, behind)
    if control.events is not None:
        control.events.check(t0, layout)
    if start.directions is not None and start.resumed is None:
        mean = lambda u0: start.at(u0).state(step, solver.initialisation, t0, behind).distribution.mean  # noqa: E731
        _, spread = detach(value_and_moves(mean, detach(start.mean), start.directions))
        state = dataclasses.replace(state, spread=spread)
    if control.jumps and starts_uncertain(solver.constraint, solver.initialisation, layout, args):
        distribution = pad(state.distribution, state.distribution.mean.shape[-2])
        state = dataclasses.replace(state, distribution=distribution)
    if control.jumps and solver.constraint.first_order and not state.inherits:
        # At a restart only u, ..., u^(k-1) are uncertain.
        rows = solver.constraint.problem.num_initial_values * layout.identity().shape[-1]
        state = dataclasses.replace(state, inherited=jnp.zeros_like(state.distribution.factor[..., :rows, :]))
    if request.dt0 is not None:
        dt = jnp.abs(request.dt0)
    elif start.resumed is not None:
        dt = start.resumed.dt
    else:
        prior = solver.prior if state.prior is None else state.prior
        dt = first_step(control, detach(state), detach(prior), until - t0, solver.constraint)
    if request.may_be_empty:
        state = _moving_with_time(step, state, interval)
    begun = begin(control, state, bounded_step(control, dt))
    if start.resumed is not None:
        begun = _go_on(step, control, begun, start.resumed, interval, choose_dt=request.dt0 is None)
    return step, control, begun


def _moving_with_time(step, state, interval):
    """The state where a solve begins; if ``t1 = t0`` with the derivatives that the state at ``t1`` has in both times.

    In such lanes of a batch no step is taken that would have them.
    """
    empty, before = interval.remaining(state.t) == 0, state.distribution
    matrix = step.member(state.prior).transition(jnp.where(empty, interval.t1 - state.t, 0), step.layout).matrix
    # Elsewhere the state itself: a derivative that is not finite would spread to u.
    return dataclasses.replace(state, distribution=choose(empty, push(before, matrix), before))


def _go_on(step, control, begun, before, interval, *, choose_dt):
    """The solve ``begun`` with the controller's memory of the one ``before``, which it resumes.

    If that has ended at a jump of the equation, without a restart, the state is restarted behind it. What it knew of
    events, such as that it has ended at one, is still known if they are as many. ``choose_dt``: whether a restart
    chooses the length of the next step.
    """
    begun = dataclasses.replace(begun, controller=before.controller)
    if begun.watch is not None and before.watch is not None and begun.watch.side.shape == before.watch.side.shape:
        # A function that was zero, and is small now, counts as zero: its parameters may be others.
        here = (before.watch.side == 0) & (begun.watch.size <= 1e-6 * before.watch.size)
        side = jnp.where(here, 0, begun.watch.side)
        begun = dataclasses.replace(begun, watch=dataclasses.replace(begun.watch, side=side))
    pass_jump = restart_at_jumps(step, control, begun, interval, None)
    if pass_jump is None:
        return begun
    if before.last_restart is not None:
        begun = dataclasses.replace(begun, last_restart=before.last_restart)
    new, *_ = pass_jump(begun, None, begun.last_restart.t != begun.t, Note.before(begun))
    return new if choose_dt else dataclasses.replace(new, dt=begun.dt)


@compiled
def _solve_uncertain(solver, request, args):
    start = request.start

    def solve(mean):
        return _solved(solver, dataclasses.replace(request, start=start.at(mean)), args)

    solution, happenings, tangents = push_forward(solve, start.mean, start.directions)
    moves = None if happenings is None else jnp.moveaxis(tangents.distribution.mean, 0, 1)
    return _with_events(solution, request, solver, args, happenings, moves)
