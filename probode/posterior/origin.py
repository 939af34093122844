"""From what a solution was computed, for what is asked of it later, such as ``Solution.check``.

It is remembered beside the solution and not in it: as a part of the PyTree it would make solutions of different solvers
differ in structure, be copied to every lane of a batch, and keep a solution from being pickled. So a solution that was
computed inside of ``jax.jit`` or ``jax.vmap``, or is a copy, has none.
"""

import weakref
from typing import Any, NamedTuple

from ..util.checks import is_traced
from .solution import Solution


class Origin(NamedTuple):
    """A call of ``Solver.solve``, or of ``Solver.solve_grid`` if ``grid`` is not ``None``.

    ``options``: the arguments ``dt0``, ``data``, ``events`` and ``max_events``, as far as they were passed.
    """

    solver: Any
    u0: Any
    t0: Any
    t1: Any
    args: Any
    options: dict[str, Any]
    grid: Any = None


_ORIGINS: dict[int, Origin] = {}


def with_origin(solution: Solution, origin: Origin) -> Solution:
    """The solution itself; ``origin_of`` then returns its origin, as long as it exists."""
    if not is_traced(solution.t):
        key = id(solution)
        _ORIGINS[key] = origin
        weakref.finalize(solution, _ORIGINS.pop, key, None).atexit = False
    return solution


def origin_of(solution: Solution) -> Origin | None:
    """From what the solution was computed; ``None`` if it is not known."""
    return _ORIGINS.get(id(solution))
