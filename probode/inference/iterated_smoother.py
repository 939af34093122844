"""The iterated smoother: the equation linearised along the whole trajectory found before, until nothing changes.

Gauss-Newton's method for the most probable trajectory given the equation at all times of a grid, where a filter
linearises each time once, knowing the past alone (Bell 1994; Tronarp, Sarkka & Hennig 2021).
"""

import dataclasses
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..algebra.conditioning import seen_from
from ..algebra.linalg import compiled, safe_divide
from ..algebra.normal import Normal
from ..information.constraints import AbstractConstraint
from ..information.observations import Observations
from ..posterior.solution import Solution
from ..solver import Solver
from ..util.checks import as_integer, as_scalar, require


class Along(AbstractConstraint):
    """A constraint that is linearised along given means, ``(times, *batch, dim, cols)`` at sorted ``ts``, instead of at
    the prediction."""

    constraint: AbstractConstraint
    ts: Float[Array, " times"]
    means: Float[Array, "times *state"]

    @property
    def problem(self):
        return self.constraint.problem

    @property
    def order(self):
        return self.constraint.order

    @property
    def first_order(self):
        return self.constraint.first_order

    def linearise(self, t, predicted, layout, args):
        point = _nearest(self.means, self.ts, t)
        equation = self.constraint.linearise(t, Normal(point, predicted.factor), layout, args)
        return eqx.tree_at(lambda e: e.residual, equation, seen_from(predicted.mean, point, equation))


def _nearest(means, ts, t):
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
    """The smoothed solution on ``grid`` with every equation linearised at the smoothed mean itself.

    ``solver`` has a ``FixedIntervalSmoother``; ``u0``, ``grid``, ``args`` and ``data`` as in ``Solver.solve_grid``,
    whose result is the first of at most ``max_iterations`` iterates; data are linearised there, too. They end when no
    mean of ``u`` or a derivative moves by more than ``tolerance`` relative to the largest of its kind. ``stats`` has
    ``num_iterations`` and ``last_move``, the move of the last one: the iteration has converged if it is below
    ``tolerance``. Unless the calibration scales single steps, the limit is the most probable trajectory, given the
    data, on which the equation holds at all points of the grid. Differentiable in both modes through all iterations.
    Raises ``ValueError`` for another strategy, an iteration within the steps (``evaluations``), or numbers that are not
    positive.

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
    number = as_integer(max_iterations, "max_iterations", 1)
    tolerance = as_scalar(tolerance, "tolerance")
    tolerance = require(tolerance, tolerance > 0, "tolerance must be positive", tolerance=tolerance)
    first = solver.solve_grid(u0, grid, args=args, data=data)
    return _iterate(solver, u0, grid, args, data, first, jnp.asarray(tolerance, first.t.dtype), number)


@compiled
def _iterate(solver, u0, grid, args, data, first, tolerance, number):
    def sizes(means):
        return jnp.max(jnp.abs(jax.vmap(first.layout.unpack)(means)), axis=(0, 2))

    def body(carry):
        solution, _, iterations = carry
        means = solution.marginals.mean
        along = eqx.tree_at(lambda s: s.constraint, solver, Along(solver.constraint, solution.t, means))
        seen = data
        if data is not None:
            points = jax.vmap(lambda t: _nearest(means, solution.t, t))(data.ts)
            seen = eqx.tree_at(lambda d: d.points, data, points, is_leaf=lambda x: x is None)
        new = along.solve_grid(u0, grid, args=args, data=seen)
        move = jnp.max(safe_divide(sizes(new.marginals.mean - means), sizes(means)))
        return new, lax.stop_gradient(move), iterations + 1

    init = first, jnp.full_like(tolerance, jnp.inf), jnp.zeros((), jnp.int32)
    solution, move, iterations = eqxi.while_loop(
        lambda carry: carry[1] > tolerance, body, init, max_steps=number, kind="bounded"
    )
    stats = solution.stats | {"num_iterations": iterations, "last_move": move}
    return dataclasses.replace(solution, stats=stats)
