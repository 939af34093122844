"""The solver: a prior, a constraint and the parts that make a method of them.

``Solver`` checks what it is given, binds the factorisation to the state of the problem and hands over to the one step
(``steps.py``), on a grid or in the adaptive loop (``adaptive.py``).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Real

from .adaptive import AdaptiveState, Control, Row, begin, first_step, run
from .calibration import AbstractCalibration, DynamicCalibration
from .checks import as_float, as_scalar, is_traced, require
from .constraints import AbstractConstraint
from .controllers import AbstractController, IntegralController
from .errors import AbstractErrorEstimate, ResidualError
from .factorisations import AbstractFactorisation, Dense, Layout
from .gaussians import Normal
from .initialisation import AbstractInitialisation, InitialState, TaylorMode
from .loops import AbstractLoop, BoundedLoop
from .priors import AbstractPrior
from .solution import Result, SaveAt, Solution, raise_unless_successful
from .steps import State, Step, start, unconditional
from .strategies import AbstractStrategy, Filter


class Solver(eqx.Module):
    """A probabilistic ODE solver, composed of parts; any part can be replaced by a subclass of its base.

    ``prior`` (what solutions look like) and ``constraint`` (the equation and its linearisation) are required. Defaults:
    ``Dense()``, ``Filter()``, ``DynamicCalibration()``, ``ResidualError()``, ``IntegralController()``,
    ``BoundedLoop()``, ``TaylorMode()``. Raises ``TypeError`` for a part of the wrong kind, ``ValueError`` where the
    order of the ODE exceeds that of the prior.
    """

    prior: AbstractPrior
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
        error: Any = ResidualError(),
        controller: Any = None,
        loop: Any = BoundedLoop(),
        initialisation: Any = TaylorMode(),
    ):
        controller = IntegralController() if controller is None else controller
        self.prior = _part("prior", prior, AbstractPrior)
        self.constraint = _part("constraint", constraint, AbstractConstraint)
        self.factorisation = _part("factorisation", factorisation, AbstractFactorisation)
        self.strategy = _part("strategy", strategy, AbstractStrategy)
        self.calibration = _part("calibration", calibration, AbstractCalibration)
        self.error = _part("error", error, AbstractErrorEstimate)
        self.controller = _part("controller", controller, AbstractController)
        self.loop = _part("loop", loop, AbstractLoop)
        self.initialisation = _part("initialisation", initialisation, AbstractInitialisation)
        if constraint.ode.order > prior.num_derivatives:
            raise ValueError(
                f"An ODE of order {constraint.ode.order} needs a prior with at least as many derivatives, "
                f"but {type(prior).__name__} has num_derivatives={prior.num_derivatives}."
            )

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
        progress: None = None,
    ) -> Solution:
        """Solve from ``t0`` to ``t1`` (which may lie before ``t0``) with steps chosen by the error estimate.

        ``u0``: a PyTree of real arrays; a tuple ``(u, u', ...)`` for an ODE of higher order; an ``InitialState``; or
        ``Solution.state``, to go on. ``save_at``: an array of times or a ``SaveAt``; ``None``
        keeps ``t1``. ``dt0``: length of the first attempt, chosen automatically by default. ``throw``: raise a
        ``RuntimeError`` if ``t1`` is not reached, otherwise ``Solution.result`` tells. Wrong input raises
        ``ValueError`` or ``TypeError``.
        """
        if progress is not None:
            raise ValueError("progress: no progress meter is available; pass progress=None.")
        save_at = SaveAt(t1=True) if save_at is None else save_at
        save_at = save_at if isinstance(save_at, SaveAt) else SaveAt(ts=save_at)
        solver, args = _floats_to_arrays((self, args))
        u0, layout = _canonical(solver, u0)
        t0, t1 = _time(t0, "t0", layout), _time(t1, "t1", layout)
        t1 = require(t1, t0 != t1, f"t0 and t1 are both {t0}: there is nothing to solve.")
        _check_rtol(self.controller, layout)
        if isinstance(u0, AdaptiveState):
            t0 = require(t0, u0.t == t0, f"A solve goes on from the time of its state, t0 = {u0.t}, not from {t0}.")
        ts = None if save_at.ts is None else _check_save_times(save_at.ts.astype(layout.dtype), t0, t1)
        if dt0 is not None:
            dt0 = as_scalar(dt0, "dt0").astype(layout.dtype)
            dt0 = require(dt0, (dt0 != 0) & (abs(dt0) < np.inf), "dt0 must be finite and not zero.")
            dt0 = require(dt0, (dt0 > 0) | (t1 < t0), "dt0 is negative, but t1 > t0.")
        t0, t1, ts, dt0 = (None if x is None else jnp.asarray(x) for x in (t0, t1, ts, dt0))
        solution = _solve_adaptive(solver, u0, t0, t1, ts, dt0, args, layout, (save_at.t0, save_at.steps, save_at.t1))
        return raise_unless_successful(solution) if throw else solution

    def solve_grid(self, u0: PyTree, grid: Real[Array, " time"] | Any, *, args: PyTree = None) -> Solution:
        """Solve with one step between any two neighbours of ``grid``, whose first entry is ``t0``; keeps every point.

        ``grid`` is ``(time,)``, increasing or decreasing; equal neighbours count as one time. No error control:
        ``Solution.result`` is ``nonfinite`` if the solution left the real numbers. ``u0`` and ``args`` as in ``solve``.
        """
        solver, args = _floats_to_arrays((self, args))
        u0, layout = _canonical(solver, u0)
        if isinstance(u0, AdaptiveState):
            raise ValueError("solve_grid starts from u0 or an InitialState, not from the state of an adaptive solve.")
        grid = as_float(grid, "grid").astype(layout.dtype)
        if grid.ndim != 1 or grid.size < 2:
            raise ValueError(f"grid must be an array of at least two times, got shape {grid.shape}.")
        steps = grid[1:] - grid[:-1]
        message = "grid must hold finite times in increasing or in decreasing order."
        ordered = (steps >= 0).all() | (steps <= 0).all()
        grid = jnp.asarray(require(grid, ordered & (abs(grid) < np.inf).all(), message))
        return _solve_grid(solver, u0, grid, args, layout)

    def initialise(self, u0: PyTree, t0: Any, *, args: PyTree = None) -> InitialState:
        """The state at ``t0``: a Gaussian over ``(u, u', ..., u^(nu))`` whose mean and factor can be changed,
        differentiated and passed to ``solve``, ``solve_grid`` or ``init`` in place of ``u0``."""
        solver, args = _floats_to_arrays((self, args))
        u0, layout = _canonical(solver, u0)
        state = _init(solver, u0, jnp.asarray(_time(t0, "t0", layout)), args, layout).distribution
        return InitialState(tuple(layout.unravel(u) for u in layout.unpack(state.mean)), state.factor)

    def init(self, u0: PyTree, t0: Any, *, args: PyTree = None) -> State:
        """The solver's state at ``t0``, for ``step``. ``u0`` and ``args`` as in ``solve``."""
        solver, args = _floats_to_arrays((self, args))
        u0, layout = _canonical(solver, u0)
        if isinstance(u0, AdaptiveState):
            return u0.current
        return _init(solver, u0, jnp.asarray(_time(t0, "t0", layout)), args, layout)

    def step(self, state: State, dt: Any, *, args: PyTree = None) -> State:
        """One step of signed length ``dt``, without error control; a pure function of its arguments."""
        solver, args = _floats_to_arrays((self, args))
        dt = as_scalar(dt, "dt").astype(state.layout.dtype)
        dt = jnp.asarray(require(dt, abs(dt) < np.inf, "dt must be finite."))
        return _step(solver, state, dt, args)


def _steps(solver: Solver) -> Step:
    return Step(solver.prior, solver.constraint, solver.strategy, solver.calibration)


def _state(solver, u0, t0, args, layout) -> State:
    """The state at ``t0`` from any of the things that ``u0`` may be."""
    ode = solver.constraint.ode
    # Here the check runs once per compilation, not once per call.
    example = layout.unravel(jnp.zeros(layout.size, layout.dtype))
    ode.check_field(t0, (example,) * ode.order, args)
    if isinstance(u0, InitialState):
        mean = layout.pack(jnp.stack([layout.ravel(u) for u in u0.mean]))
        distribution = Normal(mean, u0.factor.astype(layout.dtype))
    else:
        stack = jnp.stack([layout.ravel(u) for u in u0])
        distribution = solver.initialisation.initialise(ode, t0, stack, layout, args)
    return start(_steps(solver), t0, distribution, layout)


@eqx.filter_jit
def _init(solver, u0, t0, args, layout):
    return _state(solver, u0, t0, args, layout)


@eqx.filter_jit
def _step(solver, state, dt, args):
    return unconditional(_steps(solver), state, state.t + dt, args)


@eqx.filter_jit
def _solve_adaptive(solver, u0, t0, t1, ts, dt0, args, layout, keep):
    control = Control(solver.error, solver.controller, solver.loop)
    resumed = isinstance(u0, AdaptiveState)
    state = u0.current if resumed else _state(solver, u0, t0, args, layout)
    if dt0 is None:
        dt = u0.dt if resumed else first_step(control, state, t1 - t0)
    else:
        dt = jnp.abs(dt0)
    if solver.controller.dt_max is not None:
        dt = jnp.minimum(dt, solver.controller.dt_max.astype(dt.dtype))
    begun = begin(control, state, dt)
    if resumed:
        begun = eqx.tree_at(lambda s: s.controller, begun, u0.controller, is_leaf=lambda x: x is None)
    keep_t0, keep_steps, keep_t1 = keep
    ended, rows = run(_steps(solver), control, begun, t1, args, ts=ts, steps=keep_steps)

    first, last = (Row(s.t, s.distribution, s.output_scale) for s in (state, ended.current))
    kept = [_one(first)] if keep_t0 else []
    kept += [] if rows is None else [rows]
    kept += [_one(last)] if keep_t1 and not keep_steps else []
    rows = jax.tree.map(lambda *xs: jnp.concatenate(xs), *kept)
    if ts is not None:
        first_ts = int(keep_t0)
        rows = eqx.tree_at(lambda r: r.t, rows, rows.t.at[first_ts : first_ts + ts.size].set(ts))
    return _solution(solver, rows, ended, layout)


@eqx.filter_jit
def _solve_grid(solver, u0, grid, args, layout):
    parts = _steps(solver)
    state = _state(solver, u0, grid[0], args, layout)

    def body(state, t):
        state = unconditional(parts, state, t, args)
        return state, Row(state.t, state.distribution, state.output_scale)

    final, rows = lax.scan(body, state, grid[1:])
    first = _one(Row(state.t, state.distribution, state.output_scale))
    rows = jax.tree.map(lambda *xs: jnp.concatenate(xs), first, rows)
    finite = jnp.all(jnp.isfinite(rows.distribution.mean)) & jnp.all(jnp.isfinite(rows.distribution.factor))
    result = Result.where(finite, Result.successful, Result.nonfinite)
    steps = jnp.asarray(grid.size - 1, jnp.int32)
    ended = AdaptiveState(final, grid[-1] - grid[-2], solver.controller.init(layout.dtype), steps, steps, result)
    return _solution(solver, rows, ended, layout)


def _solution(solver, rows, ended, layout) -> Solution:
    distribution, output_scale = rows.distribution, rows.output_scale
    factor = solver.calibration.finalise(ended.current.statistics)
    if factor is not None:
        distribution = Normal(distribution.mean, distribution.factor * factor[..., None, None])
        output_scale = output_scale * factor
    stats = {
        "num_steps": ended.num_steps,
        "num_accepted_steps": ended.num_accepted_steps,
        "num_rejected_steps": ended.num_steps - ended.num_accepted_steps,
        "max_steps": jnp.asarray(solver.loop.max_steps, jnp.int32),
    }
    return Solution(rows.t, distribution, output_scale, ended.result, stats, ended, layout)


def _one(row):
    return jax.tree.map(lambda x: x[None], row)


def _part(name, value, kind):
    if not isinstance(value, kind):
        hint = f" Did you mean {value.__name__}()?" if isinstance(value, type) and issubclass(value, kind) else ""
        raise TypeError(f"Solver({name}) must be an instance of a subclass of {kind.__name__}, got {value!r}.{hint}")
    return value


def _canonical(solver, u0):
    """The initial value in one of the forms that ``_state`` takes, and the layout of its state."""
    ode, n = solver.constraint.ode, solver.prior.num_derivatives
    if isinstance(u0, AdaptiveState):
        return u0, u0.current.layout
    if isinstance(u0, State):
        raise TypeError("solve goes on from Solution.state of an adaptive solve, not from a state of init or step.")
    if isinstance(u0, InitialState):
        if not isinstance(u0.mean, tuple) or len(u0.mean) != n + 1:
            raise ValueError(f"The InitialState must hold {n + 1} derivatives, those of a prior with {n} derivatives.")
        example = u0.mean[0]
    elif isinstance(u0, Normal):
        raise TypeError(
            "u0 is a Normal, but this version does not propagate uncertain initial values. Pass its mean, or an "
            "InitialState from solver.initialise with a factor of your own."
        )
    else:
        u0 = ode.split(u0)
        example = u0[0]
    flat, unravel = ravel_pytree(example)
    layout = Layout(solver.factorisation, n, flat.size, unravel, jnp.dtype(flat.dtype))
    if isinstance(u0, InitialState):
        expected = jax.eval_shape(lambda: layout.lift(jnp.eye(n + 1), 1.0)).shape
        if jnp.shape(u0.factor) != expected:
            raise ValueError(
                f"The InitialState's factor must have the layout of {type(solver.factorisation).__name__}(): "
                f"expected shape {expected}, got {jnp.shape(u0.factor)}."
            )
    return u0, layout


def _floats_to_arrays(tree):
    # A Python float would be compiled into the program, and retrace it for every new value.
    return jax.tree.map(lambda x: jnp.asarray(float(x)) if isinstance(x, float) else x, tree)


def _time(t, name, layout):
    t = as_scalar(t, name).astype(layout.dtype)
    return require(t, abs(t) < np.inf, f"{name} must be finite, got {t}.")


def _check_rtol(controller, layout):
    smallest = 10 * float(jnp.finfo(layout.dtype).eps)
    message = (
        f"rtol = {controller.rtol} is below {smallest:.1e}, ten times the round-off of {layout.dtype}: it cannot be "
        "met. Loosen it, or use float64 (jax.config.update('jax_enable_x64', True)) with a float64 u0."
    )
    rtol = as_float(controller.rtol, "rtol")
    require(rtol, (rtol == 0) | (rtol >= smallest), message)


def _check_save_times(ts, t0, t1):
    forward = t1 > t0
    steps = (ts[1:] - ts[:-1]) * (2 * forward - 1)
    ts = require(ts, steps >= 0, "save_at must be sorted from t0 to t1.")
    early, late = (t0 - ts) * (2 * forward - 1) > 0, (ts - t1) * (2 * forward - 1) > 0
    outside = early | late
    if not is_traced(outside) and np.any(outside | np.isnan(ts)):
        entry = ts[outside | np.isnan(ts)][0]
        raise ValueError(f"save_at must lie in [t0, t1] = [{t0}, {t1}], but has the entry {entry}.")
    return require(ts, ~outside, "save_at must lie between t0 and t1.")
