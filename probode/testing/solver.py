"""Conformance of whole solvers: laws that hold for every composition of parts."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..equations.problems import ODE
from ..information.events import Event
from ..posterior.solution import SaveAt
from ..requests import smallest_rtol
from ..solver import Solver
from ..stepping.result import Result
from .laws import difference_quotient, equal, finite, has_dtype, hold, in_single, require_double, require_kind, scaled


def check_solver(
    solver: Solver, u0: PyTree, t0: float, t1: float, *, args: PyTree = None, reference: PyTree = None
) -> None:
    """Raises ``LawBroken`` unless a solver solves a problem as every solver should.

    - The same call returns the same numbers, which are finite, also under ``jit`` (traced once) and ``vmap``.
    - The result at ``t1`` does not depend on which times are saved. A solve in two parts arrives where one does; so
      does a solve back to ``t0``, for an ``ODE`` of order one, unless it fails.
    - An event ends it where its function crosses zero, in the state in which a solve to that time ends (but for
      factorisations with an algebra of their own, which have no events).
    - Single precision is kept, unless ``rtol`` is too small for it. An initial value that is NaN ends in a ``Result``
      other than successful.
    - The derivative with respect to the initial value agrees with finite differences on the same steps.
    - If ``reference`` is passed, the error at ``t1`` is less than 1000 tolerances.

    ``u0``, ``t0``, ``t1``, ``args``: the problem, as in ``Solver.solve``. ``reference``: the solution at ``t1``, a
    PyTree like ``u``. The check takes up to a minute, as it prints. Raises ``TypeError`` for anything but a ``Solver``.
    """
    require_double()
    require_kind(solver, Solver)
    print("check_solver takes up to a minute, most of it compilation.", file=sys.stderr, flush=True)
    flat = lambda u: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(u)])  # noqa: E731
    first = solver.solve(u0, t0, t1, args=args)
    again = solver.solve(u0, t0, t1, args=args)
    for a, b in zip(jax.tree.leaves(first.marginals), jax.tree.leaves(again.marginals), strict=True):
        equal(a, b, "The same call gives the same, bit for bit", 0.0)
    finite((first.mean, first.std), "Means and standard deviations are finite")
    hold(first.t[-1] == t1, "A solve arrives", f"it stopped at {first.t[-1]}")
    hold(jnp.min(flat(first.std)) >= 0, "Standard deviations are not negative")

    traces = 0

    @eqx.filter_jit
    def end(u0, args, t1):
        nonlocal traces
        traces += 1
        return flat(solver.solve(u0, t0, t1, args=args, throw=False).mean)

    u0 = jax.tree.map(lambda x: jnp.asarray(x, float), u0)
    args = jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_inexact_array_like(x) else x, args)
    span = jnp.asarray(t1, float)
    equal(end(u0, args, span), flat(first.mean), "Under jit a solve gives the same", 1e-9)
    ends = [end(scaled(u0, f), args, span) for f in (1.0, 0.99, 1.02)]
    hold(traces == 1, "New values do not retrace a solve", f"{traces} traces")
    lanes = jax.vmap(lambda f: end(scaled(u0, f), args, span))(jnp.array([1.0, 0.99, 1.02]))
    equal(lanes, jnp.stack(ends), "A lane of a vmap is what it is alone", 1e-7)

    times = np.linspace(t0, t1, 4)[1:]
    saved = solver.solve(u0, t0, t1, args=args, save_at=times)
    hold(saved.stats["num_steps"] == first.stats["num_steps"], "Save times do not change the steps")
    law = "What is known at the end does not depend on what is saved"
    equal(flat(jax.tree.map(lambda x: x[-1], saved.mean)), flat(first.mean), law, 1e-9)
    steps = solver.solve(u0, t0, t1, args=args, save_at=SaveAt(steps=True, t0=True))
    number = int(steps.stats["num_accepted_steps"])
    hold(jnp.all((steps.t[1 : number + 1] - steps.t[:number]) * (t1 - t0) > 0), "Accepted steps go forward")

    middle = steps.t[number // 2]
    half = solver.solve(u0, t0, middle, args=args)
    on = solver.solve(half.state, middle, t1, args=args)
    deviation = jnp.max(jnp.abs(flat(on.mean) - flat(first.mean)) / (1 + jnp.abs(flat(first.mean))))
    tolerances = solver.controller.tolerances.of(solver.init(u0, t0, args=args).layout)
    rtol, atol = tolerances.rtol, tolerances.atol
    hold(
        deviation < 100 * jnp.max(rtol + atol),
        "A solve that goes on arrives where one solve does",
        f"{deviation:.1e} off",
    )

    if not solver.factorisation.own_algebra:
        time = Event(lambda t, *us: t - 0.5 * (t0 + t1))
        stopped = solver.solve(u0, t0, t1, args=args, events=time)
        hold(stopped.result == Result.event, "An event ends a solve")
        equal(stopped.t[-1], 0.5 * (t0 + t1), "An event is where its function crosses zero", 1e-12)
        whole = solver.solve(u0, t0, 0.5 * (t0 + t1), args=args)
        off = jnp.max(jnp.abs(flat(stopped.mean) - flat(whole.mean)) / (1 + jnp.abs(flat(whole.mean))))
        law = "A solve that ends at an event arrives where one to that time does"
        hold(off < 100 * jnp.max(rtol + atol), law, f"{off:.1e} off")

    if jnp.min(rtol) >= smallest_rtol(jnp.float32):  # of smaller ones a solve says that it cannot meet them
        single = solver.solve(in_single(u0), t0, t1, args=args, throw=False)
        has_dtype((single.mean, single.std), jnp.float32, "A state in single precision stays so")

    if type(solver.constraint.problem) is ODE and solver.constraint.problem.order == 1:
        law = "Time may run backwards: there and back is where it began"
        there = jax.tree.map(lambda x: x[-1], first.mean)
        back = solver.solve(there, t1, t0, args=args, throw=False)
        off = jnp.max(jnp.abs(flat(back.mean) - flat(u0)) / (1 + jnp.abs(flat(u0))))
        unstable = not bool(jnp.all(jnp.isfinite(flat(back.mean)))) or back.result != Result.successful
        hold(unstable or off < 1e4 * jnp.max(rtol + atol), law, f"{off:.1e} off")

    broken = jax.tree.map(lambda x: x * jnp.nan, u0)
    failed = solver.solve(broken, t0, t1, args=args, throw=False)
    hold(failed.result != Result.successful, "A state that is not a number ends the solve with a result that says so")

    derivative = jax.jit(jax.jacfwd(lambda f: end(scaled(u0, f), args, span)))(1.0)
    finite(derivative, "Derivatives are finite")
    grid = np.asarray(steps.t[: number + 1])
    frozen = jax.jit(
        lambda f: flat(jax.tree.map(lambda x: x[-1], solver.solve_grid(scaled(u0, f), grid, args=args).mean))
    )
    # Short: beside an invariant the initial value is off by it, and the scale has a kink where that is zero.
    expected = difference_quotient(lambda h: frozen(1.0 + h), 1e-6)
    law = "The derivative of an adaptive solve is that of its steps, held fixed"
    equal(derivative, expected, law, 1e-4, 1e-6)

    if reference is not None:
        off = jnp.max(jnp.abs(flat(first.mean) - flat(reference)) / (atol + rtol * jnp.abs(flat(reference))))
        hold(off < 1000, "The error at the end is near the tolerance", f"{off:.0f} times the tolerance")
