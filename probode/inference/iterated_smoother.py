"""The iterated extended Kalman smoother on a grid: each pass linearises along the smoothed mean of the pass before.

This is the Gauss-Newton method for the most probable trajectory given the equation at all times of the grid (Bell 1994,
"The iterated Kalman smoother as a Gauss-Newton method"; Tronarp, Sarkka & Hennig 2021, "Bayesian ODE solvers: the
maximum a posteriori estimate"). A single pass linearises each time once, at a mean that depends on the past alone.
"""

import dataclasses
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..algebra.linalg import safe_divide
from ..algebra.linearisation import Linearisation, residual_about
from ..algebra.normal import Normal
from ..equations.problems import AbstractProblem
from ..estimation.initialisation import InitialState
from ..information.constraints import AbstractConstraint
from ..information.observations import Observations
from ..posterior.solution import Solution
from ..posterior.uncertain_start import check_uncertain
from ..requests import bind, floats_to_arrays, grid_times
from ..solver import Solver
from ..util.checks import as_integer, as_scalar, require
from ..util.tracing import compiled


class Along(AbstractConstraint):
    """A constraint whose linearisations are about given means instead of about predictions.

    - ``constraint``: the constraint itself.
    - ``ts``: the times of the means.
    - ``means``: of the whole state, ``(times, *batch, dim, cols)``; at each time that of the nearest ``ts`` is used.
    """

    constraint: AbstractConstraint
    ts: Float[Array, " times"]
    means: Float[Array, "times *state"]

    @property  # type: ignore[misc]  # an abstract variable may be a property
    def problem(self) -> AbstractProblem:  # type: ignore[override]
        return self.constraint.problem

    @property
    def order(self) -> int:
        return self.constraint.order

    @property
    def first_order(self) -> bool:  # type: ignore[override]
        return self.constraint.first_order

    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        point = _nearest(self.means, self.ts, t)
        equation = self.constraint.linearise(t, Normal(point, predicted.factor), layout, args)
        return eqx.tree_at(lambda e: e.residual, equation, residual_about(predicted.mean, point, equation))


def _nearest(means, ts, t):
    """The mean whose time is nearest to ``t``."""
    return means[jnp.argmin(jnp.abs(ts - t))]


def solve_grid_iterated(
    solver: Solver,
    u0: PyTree,
    grid: Any,
    *,
    args: PyTree = None,
    data: Observations | None = None,
    max_iterations: int = 20,
    tolerance: Any = 1e-8,
) -> Solution:
    """The smoothed ``Solution`` on ``grid`` with every equation linearised at the smoothed mean itself.

    The result of ``Solver.solve_grid`` is the first linearisation point; each iteration solves once more, linearised
    along the mean of the solution before, also for data. Unless the calibration has a scale for each step, the limit
    is the most probable trajectory, given the data, on which the equation holds at all points of the grid.

    - ``solver``: with a ``FixedIntervalSmoother`` and a constraint that is evaluated once in a step.
    - ``u0``, ``grid``, ``args``, ``data``: as in ``Solver.solve_grid``, but for a ``Normal``, an uncertain initial
      value: it is part of the state, so that data update it, and its derivatives are linearised in every iteration at
      the initial value of the one before. Those of ``Solver.initialise(Normal(...), ...)`` stay as they are.
    - ``max_iterations``: the largest number of iterations.
    - ``tolerance``: the iterations end when no mean of ``u``, nor of any of its derivatives, moves by more than this
      share of the largest magnitude that ``u``, or that derivative, has on the grid.

    ``stats`` has two further entries, ``num_iterations`` and ``last_move``, the largest such move in the last
    iteration: the method has converged if it is at most ``tolerance``. Differentiable in both modes, through all
    iterations. Raises ``ValueError`` for another strategy, for a constraint with several ``evaluations``, and for a
    ``max_iterations`` or ``tolerance`` that is not positive; otherwise as ``Solver.solve_grid``.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -u**2)),
    ...                         strategy=probode.FixedIntervalSmoother())
    >>> solution = probode.solve_grid_iterated(solver, 1.0, jnp.linspace(0.0, 1.0, 11))
    >>> bool(solution.stats["last_move"] < 1e-8)
    True
    """
    if not (solver.strategy.smooths and solver.strategy.keeps_steps):
        raise ValueError(
            "solve_grid_iterated iterates a smoother: pass a Solver with strategy=FixedIntervalSmoother()."
        )
    if solver.constraint.evaluations > 1:
        raise ValueError(
            "solve_grid_iterated linearises once in every pass: pass a constraint with evaluations=1, not "
            f"{solver.constraint.evaluations}."
        )
    args, u0 = floats_to_arrays((args, u0))
    number = as_integer(max_iterations, "max_iterations", 1)
    tolerance = as_scalar(tolerance, "tolerance")
    tolerance = require(tolerance, tolerance > 0, "tolerance must be positive", tolerance=tolerance)
    start = u0
    if isinstance(u0, Normal):
        _, layout = bind(solver, u0.mean)
        check_uncertain(layout, solver.calibration)
        grid = grid_times(grid, layout)
        start = _start_about(solver, u0, grid, args, solver.constraint.problem.split(u0.mean))
    first = solver.solve_grid(start, grid, args=args, data=data)
    first.layout.require_lasting("solve_grid_iterated")
    return _iterate(solver, u0, grid, args, data, first, jnp.asarray(tolerance, first.t.dtype), number)


def _start_about(solver, u0, grid, args, us):
    """What a pass starts from: ``u0`` itself, or of an uncertain one the state linearised at ``us = (u, u', ...)``.

    Its derivatives are ``D(u) + D'(u) (mean - u)``, and ``D'(u)`` makes its covariance of that of ``u0``.
    """
    if not isinstance(u0, Normal):
        return u0
    known = solver.constraint.problem.split(u0.mean)
    us = tuple(us[: len(known)])
    derivatives = lambda us: solver.initialise(us if len(known) > 1 else us[0], grid[0], args=args).mean  # noqa: E731
    factor = solver.initialise(Normal(us if len(known) > 1 else us[0], u0.factor), grid[0], args=args).factor
    shift = jax.tree.map(lambda m, u: jnp.asarray(m, jnp.result_type(u)) - u, known, us)
    mean, moves = jax.jvp(derivatives, (us,), (shift,))
    if solver.constraint.first_order:
        mean = jax.tree.map(jnp.add, mean, moves)
    return InitialState((*known, *mean[len(known) :]), factor)


@compiled
def _iterate(solver, u0, grid, args, data, first, tolerance, number):
    def sizes(means):
        return jnp.max(jnp.abs(jax.vmap(first.layout.unpack)(means)), axis=(0, 2))

    def body(carry):
        solution, _, iterations = carry
        means = solution.marginals.mean
        constraint = Along(solver.constraint, solution.t, means)  # type: ignore[call-arg]  # ``problem`` is no field
        along = eqx.tree_at(lambda s: s.constraint, solver, constraint)
        seen = data
        if data is not None:
            points = jax.vmap(lambda t: _nearest(means, solution.t, t))(data.ts)
            seen = eqx.tree_at(lambda d: d.points, data, points)
        us = [solution.layout.unravel(u) for u in solution.layout.unpack(means[0])]
        start = _start_about(solver, u0, grid, args, us)
        new = along.solve_grid(start, grid, args=args, data=seen)
        move = jnp.max(safe_divide(sizes(new.marginals.mean - means), sizes(means)))
        return new, lax.stop_gradient(move), iterations + 1

    init = first, jnp.full_like(tolerance, jnp.inf), jnp.zeros((), jnp.int32)
    solution, move, iterations = eqxi.while_loop(
        lambda carry: carry[1] > tolerance, body, init, max_steps=number, kind="bounded"
    )
    stats = solution.stats | {"num_iterations": iterations, "last_move": move}
    return dataclasses.replace(solution, stats=stats)
