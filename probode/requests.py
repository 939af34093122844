"""Checks of what users pass to a solver, and its conversion into the one form on which solvers work.

Where values are known they are checked here, on the host and before anything is compiled, so that errors are raised at
once; traced values are checked when the compiled program runs. The errors are ``ValueError`` and ``TypeError``.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .algebra.factorisations import AbstractFactorisation, Layout, fitted, layout_of
from .algebra.normal import Normal
from .equations.problems import AbstractProblem
from .estimation.calibration import AbstractCalibration, check_not_rescaled
from .estimation.initialisation import InitialState
from .estimation.strategies import AbstractStrategy
from .information.events import Event
from .information.observations import Observations
from .posterior.solution import SaveAt, Solution
from .posterior.uncertain_start import check_moves, check_state_not_rescaled, check_uncertain, directions_of
from .stepping.adaptive import AdaptiveState
from .stepping.controllers import AbstractController
from .stepping.progress import AbstractProgress
from .stepping.starts import AbstractStart, FromInitialState, FromValues, Resumed
from .stepping.state import State
from .stepping.times import Interval
from .util.checks import as_float, as_scalar, is_traced, require


class Request(eqx.Module):
    """The arguments of ``Solver.solve``, checked and as arrays with the dtype of the state.

    - ``start``: where the solve begins; ``interval``: from ``t0`` to ``t1``.
    - ``save_at``: which times are kept.
    - ``dt0``: the length of the first attempt; ``None`` if it is to be chosen.
    - ``layout``: how the state is stored.
    - ``data``: observations, if any; ``progress``: the meter, if any.
    - ``events``: if there are any; ``max_events``: how often they may happen.
    - ``must_hit``: times at which steps end without a jump of the equation, if any.
    - ``may_be_empty``: whether ``t0`` and ``t1`` may be equal: they are different where they are known.
    """

    start: AbstractStart
    interval: Interval
    save_at: SaveAt
    dt0: Float[Array, ""] | None
    layout: Layout
    data: Observations | None = None
    progress: AbstractProgress | None = None
    events: tuple[Event, ...] | None = None
    max_events: int = eqx.field(static=True, default=64)
    must_hit: Float[Array, " times"] | None = None
    may_be_empty: bool = eqx.field(static=True, default=False)


def check_request(
    solver: Any,
    u0: PyTree,
    t0: Any,
    t1: Any,
    save_at: Any,
    dt0: Any,
    data: Observations | None = None,
    progress: AbstractProgress | None = None,
    events: tuple[Event, ...] | None = None,
    max_events: int = 64,
) -> Request:
    """The ``Request`` of a call ``solver.solve(...)``; raises ``TypeError`` or ``ValueError`` for wrong input.

    Arguments as for ``Solver.solve``.
    """
    save_at = SaveAt(t1=True) if save_at is None else save_at
    save_at = save_at if isinstance(save_at, SaveAt) else SaveAt(ts=save_at)
    start, layout = bind(solver, u0, uncertain=True)
    if data is not None:
        check_data(data, solver.calibration, start, layout)
    if dt0 is None and start.resumed is not None and not is_traced(start.resumed.dt):
        message = "The state to go on from is that of a grid of equal times, without a step: pass dt0"
        require(start.resumed.dt, start.resumed.dt > 0, message)
    t0, t1 = two_times(t0, t1, layout)
    t0, t1 = at_state(start, t0), resolvable(solver.controller, layout, t1)
    check_dense(save_at, solver.strategy)
    ts = None if save_at.ts is None else save_times(save_at.ts, t0, t1, layout)
    dt0 = None if dt0 is None else first_length(dt0, t0, t1, layout)
    if data is not None:
        data = data_between(data, t0, t1, layout)
        if start.resumed is not None:
            message = "What is seen at the time from which a solve goes on belongs to the solve before"
            data = eqx.tree_at(lambda d: d.ts, data, require(data.ts, data.ts != t0, message))
    if events is not None:
        t1 = check_events(events, solver.constraint.problem, layout, t0, t1)
    may_be_empty = is_traced(t0, t1)
    t0, t1, ts, dt0 = (None if x is None else jnp.asarray(x) for x in (t0, t1, ts, dt0))
    if ts is not None:
        save_at = eqx.tree_at(lambda s: s.ts, save_at, ts)
    return Request(
        start, Interval(t0, t1), save_at, dt0, layout, data, progress, events, max_events, may_be_empty=may_be_empty
    )


def bind(solver: Any, u0: PyTree, *, uncertain: bool = False) -> tuple[AbstractStart, Layout]:
    """Where a solve from ``u0`` begins, and the layout of its state: ``start_from`` with the parts of a solver.

    ``uncertain``: whether ``u0`` may be a ``Normal``, or the state of a solve from one, and is pushed forward; checks
    that the parts allow it.
    """
    problem, nu, parts = solver.constraint.problem, solver.prior.num_derivatives, solver
    directions = None
    if uncertain and isinstance(u0, Normal):
        u0, directions = u0.mean, directions_of(u0, problem)
    start, layout = start_from(u0, problem, nu, parts.factorisation, parts.controller, parts.calibration)
    if directions is not None:
        start = FromValues(start.mean, directions)
    if uncertain and start.directions is not None:
        layout.require_shared_algebra("An uncertain u0")
        layout.require_lasting("An uncertain u0")
        check_uncertain(layout, solver.calibration)
    if uncertain and isinstance(start, FromInitialState):
        given = check_state_not_rescaled(start.given, problem.num_initial_values, solver.calibration, layout)
        start = FromInitialState(given)
    return start, layout


def at_state(start: AbstractStart, t0: Any) -> Any:
    """``t0``; raises ``ValueError`` if it is not the time of the state that is resumed."""
    if start.resumed is None:
        return t0
    message = "A solve goes on from the time of its state, which is not t0"
    return require(t0, start.resumed.t == t0, message, t0=t0, state=start.resumed.t)


def floats_to_arrays(tree: PyTree) -> PyTree:
    """The tree with Python floats as arrays: as constants of a program they would compile it for every new value."""
    return jax.tree.map(lambda x: jnp.asarray(float(x)) if isinstance(x, float) else x, tree)


def start_from(
    u0: Any,
    problem: AbstractProblem,
    num_derivatives: int,
    factorisation: AbstractFactorisation,
    controller: AbstractController,
    calibration: AbstractCalibration,
) -> tuple[AbstractStart, Layout]:
    """Where a solve from ``u0`` begins, and the layout of its state.

    ``u0``: a PyTree, or the tuple ``(u, ..., u^(k-1))`` of an equation of order ``k``; an ``InitialState``; or an
    ``AdaptiveState``, the state of a solve to be resumed. Raises ``TypeError`` for other objects of this package,
    ``ValueError`` where structure, shapes or parts do not fit.
    """
    if isinstance(u0, AdaptiveState):
        _check_resumed(u0, num_derivatives, factorisation, controller, calibration)
        return Resumed(u0), u0.current.layout
    if isinstance(u0, Solution):
        raise TypeError("u0 is a Solution: pass its .state to go on from where it ended.")
    if isinstance(u0, State):
        raise TypeError("u0 is a state of init or step: a solve goes on from Solution.state, step goes on from this.")
    if isinstance(u0, Normal):
        raise TypeError(
            "u0 is a Normal, an uncertain initial value: solve and solve_grid take it; elsewhere pass its mean, or an "
            "InitialState from solver.initialise."
        )
    if isinstance(u0, InitialState):
        layout = layout_of(u0.mean[0], num_derivatives, factorisation)
        _check_initial_state(u0, layout)
        return FromInitialState(u0), layout
    values = problem.split(u0)
    return FromValues(values), layout_of(values[0], num_derivatives, factorisation)


def time(t: Any, name: str, layout: Layout) -> Array | np.ndarray:
    """A time in the dtype of the state; raises ``ValueError`` unless it is a finite scalar."""
    t = as_scalar(t, name, " The order is u0, then the times.").astype(layout.dtype)
    return require(t, abs(t) < np.inf, f"{name} must be finite", **{name: t})


def pair(t_span: Any) -> tuple[Any, Any]:
    """The two entries ``t0`` and ``t1`` of ``t_span``; raises ``ValueError`` unless they are a pair."""
    pair = isinstance(t_span, (tuple, list)) and len(t_span) == 2
    if not pair and not (hasattr(t_span, "shape") and t_span.shape == (2,)):
        raise ValueError(f"t_span must be a pair (t0, t1), got {t_span!r}. The order is solve_ivp(f, t_span, u0).")
    return t_span[0], t_span[1]


def two_times(t0: Any, t1: Any, layout: Layout) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """``t0`` and ``t1`` in the dtype of the state; raises ``ValueError`` unless they are finite.

    Also if they are known to be the same. Traced ones may be, in one lane of many: it stays at its start.
    """
    t0, t1 = time(t0, "t0", layout), time(t1, "t1", layout)
    if not is_traced(t0, t1):
        require(t1, t0 != t1, f"t0 and t1 are the same time in {layout.dtype}: nothing to solve", t0=t0, t1=t1)
    return t0, t1


def smallest_rtol(dtype: DTypeLike) -> float:
    """The smallest relative tolerance that a state of this dtype can meet: ten times its round-off."""
    return 10 * float(jnp.finfo(dtype).eps)


def resolvable(controller: AbstractController, layout: Layout, t1: Array | np.ndarray) -> Array | np.ndarray:
    """``t1`` unchanged; raises ``ValueError`` for tolerances that do not fit ``u``, or are below its round-off."""
    controller.tolerances.of(layout)
    for rtol in jax.tree.leaves(controller.rtol):
        t1 = require_resolvable(t1, as_float(rtol, "rtol"), layout.dtype)
    return t1


def require_resolvable(x: Any, rtol: Array | np.ndarray, dtype: DTypeLike) -> Any:
    """``x`` itself; raises ``ValueError`` if the relative tolerance is positive but below ``smallest_rtol(dtype)``."""
    smallest = smallest_rtol(dtype)
    message = (
        f"rtol cannot be met below {smallest:.1e}, ten times the round-off of {dtype}; loosen it, "
        "or use float64: jax.config.update('jax_enable_x64', True) and a float64 u0"
    )
    return require(x, (rtol == 0) | (rtol >= smallest), message, rtol=rtol)


def save_times(
    ts: Any, t0: Array | np.ndarray, t1: Array | np.ndarray, layout: Layout, name: str = "save_at"
) -> Array | np.ndarray:
    """The times ``ts`` in the dtype of the state; raises ``ValueError`` unless they are sorted from ``t0`` to ``t1``.

    Known times that lie outside of the interval by a few units of round-off are moved to its ends. ``name``: of the
    argument, for messages.
    """
    ts, short = ts.astype(layout.dtype), " (t_eval of solve_ivp)" if name == "save_at" else ""
    traced = is_traced(ts, t0, t1)
    # NumPy for known values: inside of ``jit`` functions of JAX would turn them into tracers, which cannot be checked.
    xp = jnp if traced else np
    first, last, forward = xp.minimum(t0, t1), xp.maximum(t0, t1), t1 > t0
    if not traced:
        near = np.clip(ts, first, last)
        ts = np.where(abs(near - ts) <= 4 * np.finfo(layout.dtype).eps * abs(near), near, ts)
        outside = ts[~((ts >= first) & (ts <= last))]
        if outside.size:
            raise ValueError(f"{name} must lie in [t0, t1] = [{t0}, {t1}], but has the entry {outside[0]}{short}.")
    ts = require(ts, (ts >= first) & (ts <= last), f"{name} must lie between t0 and t1{short}")
    steps = xp.where(forward, ts[1:] - ts[:-1], ts[:-1] - ts[1:])
    return require(ts, steps >= 0, f"{name} must be sorted from t0 to t1{short}")


def require_observations(data: Any) -> None:
    """Raises ``TypeError`` unless the data are ``Observations``."""
    if not isinstance(data, Observations):
        raise TypeError(f"data must be Observations(ts, values, noise), got {data!r}.")


def check_data(data: Any, calibration: AbstractCalibration, start: AbstractStart, layout: Layout) -> None:
    """Raises ``TypeError`` unless the data are ``Observations``, ``ValueError`` where a solve cannot use them."""
    require_observations(data)
    learnt = "what was learnt from data with a noise that you know"
    check_not_rescaled(data, False, calibration, layout.batch_shape, learnt)
    if start.directions is not None:
        raise ValueError(
            "An uncertain u0 is pushed forward along the solution, and learns nothing from data. Pass an InitialState "
            "(from solver.initialise) with a factor of its own."
        )


def check_events(
    events: tuple[Event, ...],
    problem: AbstractProblem,
    layout: Layout,
    t0: Array | np.ndarray,
    t1: Array | np.ndarray,
) -> Array | np.ndarray:
    """``t1`` unchanged; raises ``ValueError`` for events that a solve cannot have, as a known time that is ``t0``."""
    layout.require_shared_algebra("An event")
    for event in events:
        if event.reset is not None:
            check_moves(layout.factorisation, layout.size, "a reset")
            layout.require_own_equations("A reset")
            if not problem.is_explicit and not event.is_scheduled:
                raise ValueError(
                    "A reset where a function crosses zero needs an equation solved for its highest derivative (ODE): "
                    "for a Residual the velocity behind the event is not known. Resets at known times are possible."
                )
        if event.is_scheduled:
            message = "A known time of an Event is t0: what happens there belongs into u0"
            t1 = require(t1, (event.g.astype(layout.dtype) != t0).all(), message, t0=t0)
    return t1


def data_between(data: Observations, t0: Array | np.ndarray, t1: Array | np.ndarray, layout: Layout) -> Observations:
    """The data with times in the dtype of the state.

    Raises ``ValueError`` unless these lie in the interval, sorted from ``t0`` to ``t1`` and further apart than 1000
    units of round-off.
    """
    ts = save_times(data.ts if is_traced(data.ts) else np.asarray(data.ts), t0, t1, layout, "the times of the data")
    xp = jnp if is_traced(ts) else np
    later = xp.maximum(abs(ts[1:]), abs(ts[:-1]))
    apart = abs(ts[1:] - ts[:-1]) > 1000 * np.finfo(layout.dtype).eps * later
    ts = require(ts, apart, "the times of the data must be further apart than round-off")
    return eqx.tree_at(lambda d: d.ts, data, jnp.asarray(ts))


def data_on_grid(data: Observations, grid: Array | np.ndarray, layout: Layout) -> Observations:
    """The data at times that are exactly points of the grid; raises ``ValueError`` if one is not, up to round-off."""
    ts = data.ts.astype(layout.dtype)
    xp = jnp if is_traced(ts, grid) else np
    ts, grid = xp.asarray(ts), xp.asarray(grid)
    nearest = grid[xp.argmin(abs(ts[:, None] - grid[None]), axis=1)]
    near = abs(ts - nearest) <= 4 * np.finfo(layout.dtype).eps * xp.maximum(abs(nearest), abs(grid[-1] - grid[0]))
    nearest = require(nearest, near, "the times of the data must be points of the grid")
    return eqx.tree_at(lambda d: d.ts, data, jnp.asarray(nearest))


def check_dense(save_at: SaveAt, strategy: AbstractStrategy) -> None:
    """Raises ``ValueError`` for dense output of a smoother that does not keep the steps, as it would need them."""
    if save_at.dense and strategy.smooths and not strategy.keeps_steps:
        raise ValueError(
            f"SaveAt(dense=True) keeps every step, {type(strategy).__name__}() only the times asked for: "
            "use strategy=FixedIntervalSmoother() (solve_ivp(dense_output=True) does, without a strategy)."
        )


def first_length(dt0: Any, t0: Array | np.ndarray, t1: Array | np.ndarray, layout: Layout) -> Array | np.ndarray:
    """``dt0`` in the dtype of the state; raises ``ValueError`` if it is zero, infinite, or negative for ``t1 > t0``."""
    dt0 = as_scalar(dt0, "dt0").astype(layout.dtype)
    dt0 = require(dt0, (dt0 != 0) & (abs(dt0) < np.inf), "dt0 must be finite and not zero", dt0=dt0)
    return require(dt0, (dt0 > 0) | (t1 < t0), "dt0 is negative, but t1 > t0", dt0=dt0)


def grid_times(grid: Any, layout: Layout) -> Array | np.ndarray:
    """The grid in the dtype of the state, ``(time,)``.

    Raises ``ValueError`` unless it has at least two times, all finite, in increasing or decreasing order, and if
    different times are the same in that dtype.
    """
    wide = as_float(grid, "grid")
    grid = wide.astype(layout.dtype)
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(f"grid must be an array of at least two times, got shape {grid.shape}.")
    steps = grid[1:] - grid[:-1]
    ordered = ((steps >= 0).all() | (steps <= 0).all()) & (abs(grid) < np.inf).all()
    grid = require(grid, ordered, "grid must hold finite times in increasing or in decreasing order")
    kept = (steps != 0) | (wide[1:] == wide[:-1])
    return require(grid, kept, f"grid has different times that are the same in {layout.dtype}, the dtype of u0")


def _check_initial_state(u0, layout):
    """Raises ``ValueError`` unless an ``InitialState`` has the derivatives and shapes of the layout."""
    n = layout.num_derivatives
    if len(u0.mean) != n + 1:
        raise ValueError(
            f"The InitialState must hold u and {n} derivatives, as many as the prior; it has {len(u0.mean) - 1}."
        )
    if any(jax.tree.map(jnp.shape, u) != jax.tree.map(jnp.shape, u0.mean[0]) for u in u0.mean):
        raise ValueError("The InitialState's derivatives must all have the structure and shapes of u.")
    dim = (n + 1) * layout.identity().shape[-1]
    expected = (*layout.batch_shape, dim, dim)
    if jnp.shape(u0.factor) != expected:
        raise ValueError(
            f"The InitialState's factor must have the layout of {type(layout.factorisation).__name__}(): "
            f"expected shape {expected}, got {jnp.shape(u0.factor)}."
        )


def _check_resumed(u0, num_derivatives, factorisation, controller, calibration):
    """Raises ``ValueError`` unless the state of a solve to be resumed was made with the same kinds of parts."""
    check_goes_on(u0.current, num_derivatives, factorisation, calibration)
    if jax.tree.structure(u0.controller) != jax.tree.structure(controller.init(u0.current.layout.dtype)):
        raise ValueError("The state to go on from was made with another kind of controller than this solver's.")


def check_goes_on(
    state: State, num_derivatives: int, factorisation: AbstractFactorisation, calibration: AbstractCalibration
) -> None:
    """Raises ``ValueError`` unless a state was made with the same kinds of parts as those with which it is to go on."""
    layout = state.layout
    if layout.num_derivatives != num_derivatives:
        raise ValueError(
            f"The state to go on from was made by a prior with {layout.num_derivatives} derivatives, "
            f"this solver's prior has {num_derivatives}."
        )
    if type(layout.factorisation) is not type(factorisation):
        raise ValueError(
            f"The state to go on from has the factorisation {type(layout.factorisation).__name__}(), "
            f"this solver has {type(factorisation).__name__}()."
        )
    own = fitted(factorisation, layout.example)
    if jax.tree.structure(layout.factorisation) != jax.tree.structure(own):
        raise ValueError(
            f"The state to go on from has the factorisation {layout.factorisation}, this solver has {own}."
        )
    collected = eqx.filter_eval_shape(lambda c: c.init(layout.batch_shape, layout.dtype), calibration)
    shapes = (jax.tree.structure(collected), [x.shape for x in jax.tree.leaves(collected)])
    statistics, made_by = state.statistics, state.calibration
    same = shapes == (jax.tree.structure(statistics), [jnp.shape(x) for x in jax.tree.leaves(statistics)])
    if made_by is not type(calibration) or not same:
        this = f"another calibration, {type(calibration).__name__}()"
        if made_by is type(calibration):
            this = f"one with other options, {calibration!r}"
        raise ValueError(
            f"The state to go on from was made with {made_by.__name__}(), and this solver has {this}: its scales and "
            "statistics mean something else. Go on with the same one."
        )
