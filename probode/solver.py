"""The solver: a prior, a constraint and the other parts of a method, and the five calls of a user.

``Solver`` checks what users pass, chooses the layout of the state, and repeats the step of ``stepping/step.py``, on a
grid or in the adaptive loop of ``stepping/passing.py`` (``stepping/keeping.py`` says which states are kept).
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from . import requests
from .adaptive_solve import answer_request, step_of
from .algebra.factorisations import AbstractFactorisation, Dense
from .algebra.linalg import is_finite
from .algebra.marginals import widen
from .algebra.normal import Normal, certain, pad, square
from .algebra.turning import in_layout
from .equations.problems import AbstractProblem
from .estimation.calibration import AbstractCalibration, AbstractLeaveOneOut, DynamicCalibration
from .estimation.initialisation import AbstractInitialisation, InitialState, TaylorMode
from .estimation.strategies import AbstractStrategy, Filter
from .information.constraints import AbstractConstraint
from .information.events import Event, as_events
from .information.observations import Observations
from .posterior.assemble import answer
from .posterior.origin import Origin, with_origin
from .posterior.reasons import raise_unless_successful
from .posterior.solution import SaveAt, Solution
from .posterior.uncertain_start import check_moves, directions_of, push_forward, spread_start
from .priors.prior import AbstractPrior, AbstractPriorFamily
from .stepping.adaptive import AdaptiveState, is_usable
from .stepping.controllers import AbstractController, IntegralController
from .stepping.error_estimates import AbstractErrorEstimate, LocalError, StateError
from .stepping.forward_mode import naming_what_has_none
from .stepping.kept import Kept, Row
from .stepping.loops import AbstractLoop, BoundedLoop
from .stepping.progress import AbstractProgress
from .stepping.restarts import restart
from .stepping.result import Result
from .stepping.starts import FromValues
from .stepping.state import State
from .stepping.step_sizes import smallest_error
from .util import describe
from .util.checks import as_integer, require_flag
from .util.tracing import compiled
from .util.words import hinted


class Solver(eqx.Module):
    """A probabilistic ODE solver: a Gaussian filter or smoother that conditions a Gauss-Markov prior on an equation.

    It is composed of parts; each can be replaced by a subclass of its abstract class:

    - ``prior``: the Gauss-Markov process over the solution and its derivatives.
    - ``constraint``: the equation, and how it is linearised.
    - ``factorisation``: the structure of the covariance; ``Dense()`` by default.
    - ``strategy``: filtering or smoothing; ``Filter()`` by default.
    - ``calibration``: the estimate of the output scale; ``DynamicCalibration()`` by default.
    - ``error``: the estimate of the local error; ``LocalError()`` by default, ``StateError()`` under ``Subspace``.
    - ``controller``: tolerances and step sizes; ``IntegralController()`` by default.
    - ``loop``: the loop over attempted steps, which decides what can be differentiated; ``BoundedLoop()`` by default.
    - ``initialisation``: the derivatives at ``t0``; ``TaylorMode()`` by default.

    Raises ``TypeError`` for a part of the wrong kind, ``ValueError`` for parts that do not fit together, as an equation
    of higher order than the prior has derivatives. (Tronarp, Kersting, Sarkka, Hennig 2019, "Probabilistic solutions to
    ordinary differential equations as nonlinear Bayesian filtering".)

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

    @hinted
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
        if factorisation.couples_equations and isinstance(calibration, AbstractLeaveOneOut):
            raise ValueError(
                f"{type(factorisation).__name__}() does not work with {type(calibration).__name__}(): what earlier and "
                "later residuals say of a step couples all blocks. Use DynamicCalibration() or MLECalibration(), or "
                "Dense()."
            )
        if factorisation.own_algebra or factorisation.adapts:
            factorisation.check(prior, constraint, strategy, calibration, self.error)

    def __hash__(self) -> int:
        # ``jax.jit(solver.solve)`` looks for the method among those compiled before, by a hash that arrays have not.
        # Solvers with other numbers have the same one, and are then compared.
        return hash(jax.tree.structure(self))

    def __repr__(self) -> str:
        return "\n".join(["Solver(", *(f"  {name}={words}," for name, words in describe.parts(self)), ")"])

    def _repr_html_(self):
        return describe.as_html("Solver", describe.parts(self))

    @hinted
    def solve(
        self,
        u0: PyTree,
        t0: Any,
        t1: Any,
        *,
        args: PyTree = None,
        save_at: Any = None,
        dt0: Any = None,
        throw: Any = True,
        progress: Any = None,
        data: Observations | None = None,
        events: Any = None,
        max_events: Any = 64,
    ) -> Solution:
        """The ``Solution`` from ``t0`` to ``t1``, with steps chosen by the error estimate and the controller.

        - ``u0``: a PyTree of real arrays; the tuple ``(u, u', ...)`` for an equation of higher order. Or a ``Normal``
          over either, an uncertain initial value, whose covariance is pushed forward to first order; an
          ``InitialState``; or ``Solution.state``, from which a solve is resumed.
        - ``t0``, ``t1``: different times; ``t1`` may lie before ``t0``.
        - ``args``: a PyTree of parameters, passed to the equation.
        - ``save_at``: the times to keep, an array ``(times,)`` sorted from ``t0`` to ``t1`` or a ``SaveAt``; ``t1`` by
          default.
        - ``dt0``: the length of the first attempted step; chosen from the derivatives at ``t0`` by default.
        - ``throw``: whether a solve that does not reach ``t1`` raises an error; otherwise see ``Solution.result``.
        - ``progress``: a meter to which the share of the interval that is done is reported, such as ``TextProgress()``
          or ``TqdmProgress()``.
        - ``data``: observations on which the posterior is conditioned as well; steps end at their times.
        - ``events``: an ``Event`` or a PyTree of them; when they happened is in ``Solution.events``. Steps end at
          events. One that ends the solve is a success: the last saved state is at its time.
        - ``max_events``: how often they may happen, all together; with more the solve ends, and has failed.

        ``eqx.filter_jit(solver.solve)`` and ``jax.jit(solver.solve, static_argnames="throw")`` work; the second
        compiles anew for every solver. ``jax.vmap`` maps arguments given by name, too, along their first axis: map a
        function of what varies, as in ``jax.vmap(lambda u0: solver.solve(u0, 0.0, 1.0, args=args))``.

        Raises ``RuntimeError`` if ``t1`` is not reached: its last line says why, how far the solve came and what would
        help. With ``throw=False`` nothing raises, also later: times of ``save_at`` that were not reached are NaN, and
        in place of ``t1`` stand the time and the state that were reached; see ``Solution.result``. Raises ``TypeError``
        or ``ValueError`` for wrong input, for an uncertain ``u0`` or data together with a calibration that rescales all
        covariances at the end, and for parts that do not support what is asked for: ``Subspace`` knows no events, and
        ``Isotropic``, ``Blocks`` and ``Modal`` no resets.
        """
        require_flag(throw, "throw")
        if not isinstance(progress, AbstractProgress | None):
            raise TypeError(f"progress must be a meter, such as TextProgress() or TqdmProgress(), got {progress!r}.")
        bounds = {} if events is None else {"events": as_events(events), "max_events": max_events}
        solution = solve_through(self, None, u0, t0, t1, args, save_at, dt0, data, progress, **bounds)
        solution = raise_unless_successful(solution, self, t0, t1) if throw else solution
        options = {"dt0": dt0, "data": data, **bounds}
        options = {name: value for name, value in options.items() if value is not None}
        return with_origin(solution, Origin(self, u0, t0, t1, args, options))

    @hinted
    def solve_grid(self, u0: PyTree, grid: Any, *, args: PyTree = None, data: Observations | None = None) -> Solution:
        """The ``Solution`` on a grid of times: one step from each point to the next, without error control.

        - ``grid``: times ``(time,)``, increasing or decreasing, from ``t0`` to ``t1``; between equal neighbours there
          is no step.
        - ``u0``, ``args``: as in ``solve``, but for ``Solution.state``, from which this does not start.
        - ``data``: as in ``solve``, at times that are points of the grid.

        It does not raise if the solve fails: ``Solution.result`` is ``nonfinite`` if a state is infinite or NaN, and
        ``tolerance_out_of_range`` if ``u`` is so small that its covariances underflow. Raises ``TypeError`` or
        ``ValueError`` for wrong input.
        """
        solver, args = requests.floats_to_arrays((self, args))
        start, layout = requests.bind(self, u0, uncertain=True)
        if start.resumed is not None:
            raise ValueError("solve_grid starts from u0 or an InitialState, not from the state of an adaptive solve.")
        grid = requests.grid_times(grid, layout)
        if data is not None:
            requests.check_data(data, self.calibration, start, layout)
            data = requests.data_on_grid(data, grid, layout)
        with _named(solver, layout, args):
            solution = _solve_grid(solver, start, jnp.asarray(grid), args, layout, data)
        options = {} if data is None else {"data": data}
        return with_origin(solution, Origin(self, u0, grid[0], grid[-1], args, options, grid))

    def initialise(self, u0: PyTree, t0: Any, *, args: PyTree = None) -> InitialState:
        """The ``InitialState`` at ``t0``: a Gaussian over ``(u, u', ..., u^(nu))``, to be passed as ``u0``.

        Its mean and factor can be changed and differentiated before they are passed to ``solve``, ``solve_grid`` or
        ``init``. ``u0``, ``t0``, ``args``: as in ``solve``.

        For a ``Normal`` the state is uncertain, so that data update the initial value, or parameters among its
        components. The derivatives then depend on ``u0`` to first order; under a constraint that freezes the vector
        field (``TS0``) they do not depend on it. Use ``NoCalibration()`` for such solves: a scale estimated from single
        steps does not include the error of the first order. Raises ``ValueError`` for a ``Normal`` under a
        factorisation with one covariance for all components; otherwise for wrong input, as ``solve``.
        """
        solver, args = requests.floats_to_arrays((self, args))
        directions = None
        if isinstance(u0, Normal):
            u0, directions = u0.mean, directions_of(u0, self.constraint.problem)
        start, layout = requests.bind(self, u0)
        t0 = jnp.asarray(requests.at_state(start, requests.time(t0, "t0", layout)))
        if directions is not None:
            layout.require_lasting("An uncertain u0")
            check_moves(layout.factorisation, layout.size)
        with _named(solver, layout, args):
            state = _init(solver, start, t0, args, layout)
            state = in_layout(state.distribution, state.layout, layout)
            if directions is not None and self.constraint.first_order:
                state = spread_start(
                    lambda u0: _init(solver, start.at(u0), t0, args, layout).distribution, start.mean, directions
                )
            elif directions is not None:
                state = _init_uncertain(solver, state.mean, directions, t0, args, layout)
        state = pad(state, state.mean.shape[-2])
        return InitialState(tuple(layout.unravel(u) for u in layout.unpack(state.mean)), state.factor)

    def init(self, u0: PyTree, t0: Any, *, args: PyTree = None) -> State:
        """The ``State`` of the solver at ``t0``, from which ``step`` goes on.

        ``u0``, ``t0``, ``args``: as in ``solve``, but for a ``Normal``, which is refused. For ``Solution.state`` it is
        the state in it, and ``t0`` its time. Raises ``TypeError`` or ``ValueError`` for wrong input.
        """
        solver, args = requests.floats_to_arrays((self, args))
        start, layout = requests.bind(self, u0)
        t0 = requests.at_state(start, requests.time(t0, "t0", layout))
        if start.resumed is not None:
            return start.resumed.current
        with _named(solver, layout, args):
            return _init(solver, start, jnp.asarray(t0), args, layout)

    def step(self, state: Any, dt: Any, *, args: PyTree = None) -> State:
        """The ``State`` after one step of signed length ``dt``, without error control; a pure function.

        ``state``: from ``init`` or ``step``, or ``Solution.state.current``. ``args``: parameters of the equation. A
        step shorter than round-off only predicts. Raises ``TypeError`` for another ``state``, ``ValueError`` for one
        that was made with other kinds of parts, and for a ``dt`` that is not finite.
        """
        if not isinstance(state, State):
            raise TypeError("step goes on from a state of init or step (or Solution.state.current), not from u0.")
        solver, args = requests.floats_to_arrays((self, args))
        dt = jnp.asarray(requests.time(dt, "dt", state.layout))
        with _named(solver, state.layout, args):
            return _step(solver, state, dt, args)


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
    events: tuple[Event, ...] | None = None,
    max_events: Any = 64,
) -> Solution:
    """The ``Solution`` of an initial value problem, computed with steps that end at the times ``through``, if any.

    Other arguments as for ``Solver.solve(..., throw=False)``.

    Unlike at the controller's ``stop_at`` the equation does not jump there, and the state is not restarted.
    """
    given, (solver, args) = solver, requests.floats_to_arrays((solver, args))
    events, max_events = requests.floats_to_arrays(events), as_integer(max_events, "max_events", 1)
    request = requests.check_request(given, u0, t0, t1, save_at, dt0, data, progress, events, max_events)
    request = dataclasses.replace(request, must_hit=through)
    with _named(solver, request.layout, args):
        return answer_request(solver, request, args)


def _named(solver, layout, args):
    return naming_what_has_none(solver.constraint.problem, layout, args)


@compiled
def _init(solver, start, t0, args, layout):
    return start.state(step_of(solver, layout, args), solver.initialisation, t0)


@compiled
def _init_uncertain(solver, mean, directions, t0, args, layout):
    """The state at ``t0`` under a constraint that freezes the vector field, with derivatives independent of ``u``.

    If they depended on ``u``, the filter would take the difference to its own linearisation for data about ``u``.
    """
    moves = jnp.stack([jax.vmap(layout.ravel)(u) for u in directions], axis=1)
    moves = jnp.pad(moves, ((0, 0), (0, layout.num_derivatives + 1 - moves.shape[1]), (0, 0)))
    uncertain = widen(certain(mean), jax.vmap(layout.pack)(moves))
    state, _ = restart(solver.constraint, solver.initialisation, t0, uncertain, None, layout, args)
    return square(state)


@compiled
def _step(solver, state, dt, args):
    # Where it is traced: in every call it would take longer than the step.
    requests.check_goes_on(state, solver.prior.num_derivatives, solver.factorisation, solver.calibration)
    step = step_of(solver, state.layout, args)
    return step.fixed(step.resume(state), state.t + dt).state


@compiled
def _solve_grid(solver, start, grid, args, layout, data):
    step = step_of(solver, layout, args, data)
    if start.directions is not None:
        solve = lambda mean: (_solved_grid(solver, step.with_fixed_gains(), FromValues(mean), grid), None)  # noqa: E731
        return push_forward(solve, start.mean, start.directions)[0]
    return _solved_grid(solver, step, start, grid)


def _solved_grid(solver, step, start, grid):
    layout = step.layout
    state = start.state(step, solver.initialisation, grid[0])
    remember, influences = solver.strategy.remember, isinstance(solver.calibration, AbstractLeaveOneOut)

    def body(state, t):
        stepped = step.fixed(state, t, remember(state.distribution))
        return stepped.state, Row.of(stepped.state, stepped.past, stepped.influence if influences else None)

    first = Row.of(state, *step.nothing(state, remember(state.distribution), influence=influences))
    final, rows = lax.scan(body, state, grid[1:])
    rows = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rows)
    finite = is_usable(final) & is_finite((rows.distribution, rows.output_scale))
    unpack = lambda row: (row.layout or layout).unpack(row.distribution.mean)[0]  # noqa: E731
    sizes = jnp.max(jnp.abs(jax.vmap(unpack)(rows)), axis=1)
    tiny = jnp.any((sizes > 0) & (sizes < 1e8 * smallest_error(layout.dtype)))
    result = Result.where(tiny, Result.tolerance_out_of_range, Result.successful)
    result = Result.where(finite, result, Result.nonfinite)
    steps = jnp.asarray(grid.size - 1, jnp.int32)
    # The last step that was one: a grid may hold a time twice. A solve goes on from here with its length.
    lengths = jnp.abs(jnp.diff(grid))
    last = jnp.argmax(jnp.where(lengths > 0, jnp.arange(lengths.size), -1))
    ended = AdaptiveState(final, lengths[last], solver.controller.init(layout.dtype), steps, steps, result)
    kept = Kept(rows, jnp.ones(grid.size, bool), dense=True, most=grid.size - 1)
    return answer(SaveAt(t0=True, steps=True, dense=True), kept, ended, step, solver.loop)[0]


def _part(name, value, kind, *others):
    """Returns ``value`` itself if it is a part of one of the kinds; raises ``TypeError`` otherwise."""
    kinds, hint = (kind, *others), ""
    if not isinstance(value, kinds):
        if isinstance(value, type) and issubclass(value, kinds):
            hint = f" Did you mean {value.__name__}()?"
        elif isinstance(value, AbstractProblem):
            hint = " Linearise it: TS1(ODE(f)), or TS0."
        raise TypeError(f"Solver({name}) must be an instance of a subclass of {kind.__name__}, got {value!r}.{hint}")
    return value
