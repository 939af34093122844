"""The solver: a prior, a constraint and the parts that make a method of them.

``Solver`` checks what it is given, binds the factorisation to the state of the problem and hands over to the one step
(``stepping/step.py``), on a grid or in the adaptive loop (``stepping/keeping.py``).
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from . import requests
from .algebra.factorisations import AbstractFactorisation, Dense, Layout
from .algebra.linalg import compiled, detach, is_finite
from .algebra.marginals import widen
from .algebra.normal import Normal, certain, pad, square
from .estimation.calibration import AbstractCalibration, AbstractLeaveOneOut, DynamicCalibration
from .estimation.initialisation import AbstractInitialisation, InitialState, TaylorMode
from .estimation.strategies import AbstractStrategy, Filter
from .information.constraints import AbstractConstraint
from .information.observations import Observations
from .posterior.assemble import answer
from .posterior.solution import SaveAt, Solution, raise_unless_successful
from .posterior.uncertain_start import check_moves, check_uncertain, directions_of, push_forward, spread_start
from .priors.prior import AbstractPrior, AbstractPriorFamily
from .stepping.adaptive import AdaptiveState, begin, is_usable
from .stepping.controllers import AbstractController, IntegralController
from .stepping.error_estimates import AbstractErrorEstimate, LocalError, StateError
from .stepping.keeping import solve_keeping_steps, solve_keeping_times
from .stepping.kept import Kept, Row
from .stepping.loops import AbstractLoop, BoundedLoop
from .stepping.progress import AbstractProgress
from .stepping.restarts import start_anew, starts_uncertain
from .stepping.result import Result
from .stepping.spread import value_and_moves
from .stepping.state import State
from .stepping.step import Step
from .stepping.step_sizes import Control, bounded_step, first_step, smallest_error
from .stepping.stops import starting_anew
from .stepping.times import beside, direction_of, nearest
from .util import describe


class Solver(eqx.Module):
    """A probabilistic ODE solver, composed of parts; any part can be replaced by a subclass of its base.

    ``prior`` (what solutions look like) and ``constraint`` (the equation and its linearisation) are required. Defaults:
    ``Dense()``, ``Filter()``, ``DynamicCalibration()``, ``LocalError()`` (``StateError()`` under ``Subspace``),
    ``IntegralController()``, ``BoundedLoop()``, ``TaylorMode()``. Raises
    ``TypeError`` for a part of the wrong kind, ``ValueError`` where parts do not fit together, as an equation of higher
    order than the prior.

    >>> import probode
    >>> solver = probode.Solver(prior=probode.IWP(4), constraint=probode.TS1(probode.ODE(lambda t, u, args: -u)))
    >>> solver.solve(1.0, 0.0, 1.0).mean.shape
    (1,)
    """

    prior: AbstractPrior | AbstractPriorFamily
    constraint: AbstractConstraint
    factorisation: AbstractFactorisation
    strategy: AbstractStrategy
    calibration: AbstractCalibration
    error: AbstractErrorEstimate
    controller: AbstractController
    loop: AbstractLoop
    initialisation: AbstractInitialisation

    def __init__(
        self,
        prior: Any,
        constraint: Any,
        *,
        factorisation: Any = Dense(),
        strategy: Any = Filter(),
        calibration: Any = DynamicCalibration(),
        error: Any = None,
        controller: Any = None,
        loop: Any = BoundedLoop(),
        initialisation: Any = TaylorMode(),
    ):
        controller = IntegralController() if controller is None else controller
        self.prior = _part("prior", prior, AbstractPrior, AbstractPriorFamily)
        self.constraint = _part("constraint", constraint, AbstractConstraint)
        self.factorisation = _part("factorisation", factorisation, AbstractFactorisation)
        self.strategy = _part("strategy", strategy, AbstractStrategy)
        self.calibration = _part("calibration", calibration, AbstractCalibration)
        if error is None:
            error = StateError() if factorisation.own_algebra else LocalError()
        self.error = _part("error", error, AbstractErrorEstimate)
        self.controller = _part("controller", controller, AbstractController)
        self.loop = _part("loop", loop, AbstractLoop)
        self.initialisation = _part("initialisation", initialisation, AbstractInitialisation)
        if constraint.order > prior.num_derivatives:
            raise ValueError(
                f"An equation of order {constraint.order} needs a prior with at least as many derivatives, "
                f"but {type(prior).__name__} has num_derivatives={prior.num_derivatives}."
            )
        if factorisation.own_algebra:
            factorisation.check(prior, constraint, strategy, calibration, error)

    def __repr__(self):
        return "\n".join(["Solver(", *(f"  {name}={words}," for name, words in describe.parts(self)), ")"])

    def _repr_html_(self):
        return describe.as_html("Solver", describe.parts(self))

    def solve(
        self,
        u0: PyTree,
        t0: Any,
        t1: Any,
        *,
        args: PyTree = None,
        save_at: Any = None,
        dt0: Any = None,
        throw: bool = True,
        progress: Any = None,
        data: Observations | None = None,
    ) -> Solution:
        """Solve from ``t0`` to ``t1`` (which may lie before ``t0``) with steps chosen by the error estimate.

        ``u0``: a PyTree of real arrays; a tuple ``(u, u', ...)`` for an equation of higher order; a ``Normal`` over
        either, an uncertain initial value, whose spread is pushed forward to first order; an ``InitialState``; or
        ``Solution.state``, to go on. ``save_at``: an array of times or a ``SaveAt``; ``None``
        keeps ``t1``. ``dt0``: length of the first attempt, chosen automatically by default. ``throw``: raise a
        ``RuntimeError`` if ``t1`` is not reached, otherwise ``Solution.result`` tells. ``data``: observations that the
        solution is conditioned on as it passes them: the posterior is the one given equation and data. Steps end at
        their times. ``progress``: a meter that is told how far the solve got, ``TextProgress()`` or ``TqdmProgress()``.
        Wrong input raises ``ValueError`` or ``TypeError``.
        """
        if not isinstance(progress, AbstractProgress | None):
            raise TypeError(f"progress must be a meter, such as TextProgress() or TqdmProgress(), got {progress!r}.")
        solution = solve_through(self, None, u0, t0, t1, args, save_at, dt0, data, progress)
        return raise_unless_successful(solution) if throw else solution

    def solve_grid(self, u0: PyTree, grid: Any, *, args: PyTree = None, data: Observations | None = None) -> Solution:
        """Solve with one step between any two neighbours of ``grid``, whose first entry is ``t0``; keeps every point.

        ``grid`` is ``(time,)``, increasing or decreasing; equal neighbours count as one time. No error control:
        ``Solution.result`` is ``nonfinite`` if the solution left the real numbers. ``u0``, ``args`` and ``data``, whose
        times are points of the grid, as in ``solve``.
        """
        solver, args = requests.floats_to_arrays((self, args))
        u0, directions = _certain_part(self, u0)
        u0, layout = requests.bind(self, u0)
        if isinstance(u0, AdaptiveState):
            raise ValueError("solve_grid starts from u0 or an InitialState, not from the state of an adaptive solve.")
        grid = requests.grid_times(grid, layout)
        if data is not None:
            requests.check_data(data, self.calibration, directions is None)
            data = requests.data_on_grid(data, grid, layout)
        return _solve_grid(solver, u0, directions, jnp.asarray(grid), args, layout, data)

    def initialise(self, u0: PyTree, t0: Any, *, args: PyTree = None) -> InitialState:
        """The state at ``t0``: a Gaussian over ``(u, u', ..., u^(nu))`` whose mean and factor can be changed,
        differentiated and passed to ``solve``, ``solve_grid`` or ``init`` in place of ``u0``.

        From a ``Normal`` it is uncertain, with derivatives that move with ``u0`` to first order, or do not move where
        the constraint takes the vector field for frozen (``TS0``): the start of a solve that learns about its initial
        value, or about parameters among its components, from data. Use ``NoCalibration()`` then: a scale found from
        single steps does not know how wrong the first order is.
        """
        solver, args = requests.floats_to_arrays((self, args))
        directions = None
        if isinstance(u0, Normal):
            u0, directions = u0.mean, directions_of(u0, self.constraint.problem)
        u0, layout = requests.bind(self, u0)
        t0 = jnp.asarray(requests.time(t0, "t0", layout))
        state = _init(solver, u0, t0, args, layout).distribution
        if directions is not None:
            check_moves(self.factorisation, layout.size)
            if self.constraint.first_order:
                state = spread_start(lambda u0: _init(solver, u0, t0, args, layout).distribution, u0, directions)
            else:
                state = _init_uncertain(solver, state.mean, directions, t0, args, layout)
        state = pad(state, state.mean.shape[-2])
        return InitialState(tuple(layout.unravel(u) for u in layout.unpack(state.mean)), state.factor)

    def init(self, u0: PyTree, t0: Any, *, args: PyTree = None) -> State:
        """The solver's state at ``t0``, for ``step``. ``u0`` and ``args`` as in ``solve``."""
        solver, args = requests.floats_to_arrays((self, args))
        u0, layout = requests.bind(self, u0)
        if isinstance(u0, AdaptiveState):
            return u0.current
        return _init(solver, u0, jnp.asarray(requests.time(t0, "t0", layout)), args, layout)

    def step(self, state: Any, dt: Any, *, args: PyTree = None) -> State:
        """One step of signed length ``dt``, without error control; a pure function of its arguments."""
        if not isinstance(state, State):
            raise TypeError("step goes on from a state of init or step (or Solution.state.current), not from u0.")
        solver, args = requests.floats_to_arrays((self, args))
        return _step(solver, state, jnp.asarray(requests.time(dt, "dt", state.layout)), args)


def solve_through(
    solver: Solver,
    through: Float[Array, " times"] | None,
    u0: PyTree,
    t0: Any,
    t1: Any,
    args: PyTree,
    save_at: Any = None,
    dt0: Any = None,
    data: Observations | None = None,
    progress: AbstractProgress | None = None,
) -> Solution:
    """``Solver.solve``, which never raises that it has failed, with steps that end at the times ``through``.

    They are no times of the controller's ``stop_at``: the equation goes on there, and so does the state.
    """
    given, (solver, args) = solver, requests.floats_to_arrays((solver, args))
    u0, directions = _certain_part(given, u0)
    if data is not None:
        requests.check_data(data, given.calibration, directions is None)
    request = requests.check_request(given, u0, t0, t1, save_at, dt0, data, progress)
    request = dataclasses.replace(request, through=through)
    try:
        if directions is None:
            return solve_adaptive(solver, request, args)
        return _solve_uncertain(solver, request, args, directions)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        # JAX's own words for forward mode through something that has a reverse mode only.
        raise TypeError(
            f"{type(given.loop).__name__}() cannot be differentiated in forward mode (jax.jvp, jax.jacfwd, an "
            "uncertain u0). "
            "Use Solver(..., loop=BoundedLoop()) or ForwardLoop()."
        ) from error


def _certain_part(solver, u0):
    """The mean of an uncertain ``u0``, or a state, and the directions in which it is uncertain, or ``None``."""
    if isinstance(u0, AdaptiveState) and u0.current.spread is not None:
        mean, directions = u0, u0.current.spread
    elif isinstance(u0, Normal):
        mean, directions = u0.mean, directions_of(u0, solver.constraint.problem)
    else:
        return u0, None
    _, layout = requests.bind(solver, mean)
    layout.require_shared_algebra("An uncertain u0")
    check_uncertain(solver.factorisation, solver.calibration, layout.size)
    return mean, directions


def _step_of(solver: Solver, layout: Layout, args: PyTree, data: Observations | None = None) -> Step:
    return Step(solver.prior, solver.constraint, solver.calibration, layout, args, data)


def _state(solver, u0, t0, args, layout, data=None, behind=None) -> State:
    """The state at ``t0`` from any of the things that ``u0`` may be.

    ``behind``: the time of the equation, where it matters on which side of ``t0``.
    """
    problem = solver.constraint.problem
    # Here the check runs once per compilation, not once per call.
    example = layout.unravel(jnp.zeros(layout.size, layout.dtype))
    problem.check(t0, (example,) * problem.num_initial_values, args)
    if isinstance(u0, InitialState):
        mean = layout.pack(jnp.stack([layout.ravel(u) for u in u0.mean]))
        distribution = Normal(mean, u0.factor.astype(layout.dtype))
    else:
        stack = jnp.stack([layout.ravel(u) for u in u0])
        distribution = solver.initialisation.initialise(problem, t0 if behind is None else behind, stack, layout, args)
    return _step_of(solver, layout, args, data).start(t0, distribution)


@compiled
def _init(solver, u0, t0, args, layout):
    return _state(solver, u0, t0, args, layout)


@compiled
def _init_uncertain(solver, mean, directions, t0, args, layout):
    """The state at ``t0`` of a solver that freezes the field.

    Derivatives that move with ``u`` would be residuals to it, and tell about ``u``, falsely.
    """
    moves = jnp.stack([jax.vmap(layout.ravel)(u) for u in directions], axis=1)
    moves = jnp.pad(moves, ((0, 0), (0, layout.num_derivatives + 1 - moves.shape[1]), (0, 0)))
    uncertain = widen(certain(mean), jax.vmap(layout.pack)(moves))
    state, _ = start_anew(solver.constraint, solver.initialisation, t0, uncertain, None, layout, args)
    return square(state)


@compiled
def _step(solver, state, dt, args):
    step = _step_of(solver, state.layout, args)
    return step.fixed(step.resume(state), state.t + dt).state


@compiled
def solve_adaptive(solver: Solver, request: requests.Request, args: PyTree) -> Solution:
    """Answer a request."""
    save_at, strategy = request.save_at, solver.strategy
    step, control, begun = _begin(solver, request, args)
    dense = save_at.steps or save_at.dense or strategy.keeps_steps
    if dense:
        influence = isinstance(solver.calibration, AbstractLeaveOneOut)
        ended, *kept = solve_keeping_steps(step, control, strategy, begun, request.t1, influence=influence)
    else:
        # Nobody asks what the start looks like from the end.
        strategy = strategy if save_at.ts is not None or save_at.t0 else Filter()
        times = jnp.zeros(0, request.layout.dtype) if save_at.ts is None else save_at.ts
        ended, *kept = solve_keeping_times(step, control, strategy, begun, request.t1, times)
    return answer(save_at, Kept(*kept, dense), ended, step, solver.loop)


def _begin(solver, request, args):
    """The step, the parts that control it, and the solve before its first attempt."""
    u0, t0, t1, layout = request.u0, request.t0, request.t1, request.layout
    step = _step_of(solver, layout, args, request.data)
    control = Control(
        solver.error, solver.controller, solver.loop, solver.initialisation, request.progress, request.through
    )
    if request.data is not None:
        # The residual of a very short step is round-off, and so is what it adds to a likelihood.
        control = dataclasses.replace(control, through=request.data.ts, in_two=True)
    # What is uncertain at the start, or learnt from data, moves with residuals as it should.
    doubts = not (
        solver.calibration.is_local or request.data is not None or isinstance(u0, InitialState | AdaptiveState)
    )
    control = dataclasses.replace(control, doubts_scale=doubts)
    stops, behind, until = control.stops(layout.dtype), t0, t1
    if stops is not None:
        layout.require_shared_algebra("stop_at")
        direction = direction_of(t0, t1)
        behind, until = beside(t0, direction, stops), nearest(stops, t0, t1, direction)
    resumed = isinstance(u0, AdaptiveState)
    if resumed:
        state = step.resume(u0.current)
    else:
        state = _state(solver, u0, t0, args, layout, request.data, behind)
    if request.directions is not None:
        start = lambda u0: _state(solver, u0, t0, args, layout, behind=behind).distribution.mean  # noqa: E731
        _, spread = detach(value_and_moves(start, detach(u0), request.directions))
        state = dataclasses.replace(state, spread=spread)
    if stops is not None and starts_uncertain(solver.constraint, solver.initialisation, layout, args):
        distribution = pad(state.distribution, state.distribution.mean.shape[-2])
        state = dataclasses.replace(state, distribution=distribution)
    if request.dt0 is not None:
        dt = jnp.abs(request.dt0)
    elif resumed:
        dt = u0.dt
    else:
        prior = solver.prior if state.prior is None else state.prior
        dt = first_step(control, detach(state), detach(prior), until - t0, solver.constraint.order)
    begun = begin(control, state, bounded_step(control, dt))
    if resumed:
        begun = _go_on(step, control, begun, u0, t1, choose_dt=request.dt0 is None)
    return step, control, begun


def _go_on(step, control, begun, before, t1, *, choose_dt):
    """A solve that goes on from another one: behind the jump, if that has ended before one."""
    begun = dataclasses.replace(begun, controller=before.controller)
    passing_stop = starting_anew(step, control, begun, t1)
    if passing_stop is None:
        return begun
    if before.anew is not None:
        begun = dataclasses.replace(begun, anew=before.anew)
    new, *_ = passing_stop(begun, None, begun.anew.t != begun.t)
    return new if choose_dt else dataclasses.replace(new, dt=begun.dt)


@compiled
def _solve_uncertain(solver, request, args, directions):
    resumed = isinstance(request.u0, AdaptiveState)
    if not resumed:
        request = dataclasses.replace(request, directions=directions)
    uncertain = (lambda r: r.u0.current.distribution.mean) if resumed else (lambda r: r.u0)

    def solve(u0):
        return solve_adaptive(solver, eqx.tree_at(uncertain, request, u0), args)

    return push_forward(solve, uncertain(request), directions)


@compiled
def _solve_grid(solver, u0, directions, grid, args, layout, data):
    if directions is not None:
        return push_forward(lambda u0: _solve_grid(solver, u0, None, grid, args, layout, None), u0, directions)
    step = _step_of(solver, layout, args, data)
    state = _state(solver, u0, grid[0], args, layout, data)
    remember, influences = solver.strategy.remember, isinstance(solver.calibration, AbstractLeaveOneOut)

    def body(state, t):
        stepped = step.fixed(state, t, remember(state.distribution))
        return stepped.state, Row.of(stepped.state, stepped.past, stepped.influence if influences else None)

    first = Row.of(state, *step.nothing(state, remember(state.distribution), influence=influences))
    final, rows = lax.scan(body, state, grid[1:])
    rows = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rows)
    finite = is_usable(final) & is_finite((rows.distribution, rows.output_scale))
    sizes = jnp.max(jnp.abs(jax.vmap(lambda mean: layout.unpack(mean)[0])(rows.distribution.mean)), axis=1)
    tiny = jnp.any((sizes > 0) & (sizes < 1e8 * smallest_error(layout.dtype)))
    result = Result.where(tiny, Result.tolerance_out_of_range, Result.successful)
    result = Result.where(finite, result, Result.nonfinite)
    steps = jnp.asarray(grid.size - 1, jnp.int32)
    ended = AdaptiveState(final, grid[-1] - grid[-2], solver.controller.init(layout.dtype), steps, steps, result)
    kept = Kept(rows, jnp.ones(grid.size, bool), dense=True)
    return answer(SaveAt(t0=True, steps=True, dense=True), kept, ended, step, solver.loop)


def _part(name, value, kind, *others):
    kinds = (kind, *others)
    if not isinstance(value, kinds):
        hint = f" Did you mean {value.__name__}()?" if isinstance(value, type) and issubclass(value, kinds) else ""
        raise TypeError(f"Solver({name}) must be an instance of a subclass of {kind.__name__}, got {value!r}.{hint}")
    return value
