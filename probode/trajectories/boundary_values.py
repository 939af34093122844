"""Boundary value problems: Newton's method on a mesh, which is refined until the error meets the tolerances."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ..algebra.factorisations import Dense, layout_of
from ..algebra.linalg import choose, detach, is_finite, safe_divide, safe_norm, triangularise
from ..algebra.marginals import widen
from ..algebra.normal import Normal
from ..equations.problems import ODE, AbstractProblem
from ..posterior.solution import Solution, Spread
from ..requests import floats_to_arrays, pair, require_resolvable, two_times
from ..stepping.controllers import Tolerances
from ..stepping.result import Result, has_failed, in_words
from ..stepping.times import Interval
from ..util.checks import as_integer, require_flag
from ..util.failures import stop_if
from ..util.tracing import compiled, full_precision, traced_once
from .collocation import Course, Equations, Mesh
from .conditions import Conditions
from .guesses import AbstractGuess, FromFunction, as_guess, first_mesh
from .meshes import assess, better, halved
from .newton import Scales, newton
from .path import mesh_path
from .rows import map_rows


# How many derivatives of the equation hold at the nodes beside it: an error of order 2 (levels + 1) in the length of an
# interval.
LEVELS = 3
# How often the mesh may change.
_MESHES = 40
# How often Newton's method is repeated at the end, for derivatives: the first ones need one step, the second two.
_STEPS = 2


def solve_bvp(
    problem: Any,
    boundary: Any,
    t_span: Any,
    guess: Any,
    *,
    parameters: PyTree = None,
    data: Any = None,
    mesh: Any = None,
    rtol: Any = 1e-3,
    atol: Any = 1e-6,
    max_nodes: Any = 1024,
    args: PyTree = None,
    throw: Any = True,
) -> Solution:
    """The ``Solution`` of a boundary value problem, ``u^(k) = f(t, u, ..., args)`` with conditions at both ends.

    - ``problem``: an ``ODE``, or a vector field ``f(t, u, args)``.
    - ``boundary``: called as ``boundary(ua, ub, args)`` with ``u`` at ``t0`` and at ``t1``, tuples ``(u, u', ...)`` for
      an equation of higher order; returns a PyTree of arrays that are zero for the solution. They hold as many numbers
      as there are conditions: ``k`` times those of ``u``, and one for each parameter. A leaf may be a
      ``Normal(residual, std)``: then that condition holds up to a deviation, as of a value that was measured.
    - ``t_span``: the pair ``(t0, t1)``; ``t1`` may lie before ``t0``.
    - ``guess``: of the solution: a function of scalar ``t`` that returns ``u``; an array ``(nodes, *u.shape)`` (or a
      PyTree of them) on ``mesh`` or on equidistant nodes; or a ``Solution`` whose steps were kept, as of a similar
      problem (continuation).
    - ``parameters``: first guesses of unknown parameters, a PyTree. Field and boundary are then called with
      ``args = (parameters, args)``.
    - ``data``: not available yet; anything but ``None`` raises ``ValueError``.
    - ``mesh``: the first nodes, ``(nodes,)``, from ``t0`` to ``t1``.
    - ``rtol``, ``atol``: the mesh is refined until the error of ``u`` is below ``atol + rtol |u|`` everywhere: numbers,
      or PyTrees like ``u``.
    - ``max_nodes``: how many nodes the mesh may have.
    - ``throw``: whether a failure raises an error; otherwise see ``Solution.result``.

    At the nodes the equation and its first three time derivatives hold; between them the posterior is that of an
    integrated Wiener process with ``k + 3`` derivatives. Its mean at the nodes is a collocation solution of order
    eight. Standard deviations are calibrated: at the nodes and between them they are the difference to the solution on
    a mesh of twice as many, the largest nearby.

    The result has the nodes as times (``t``; unused rows repeat the last), ``evaluate`` and ``sample`` at any time,
    ``parameters`` as a ``Normal``, and ``stats`` with ``num_nodes``, ``num_iterations`` (Newton steps on all meshes)
    and ``num_meshes``. It can be differentiated, also twice, with respect to ``args``, ``t_span`` and what the boundary
    closes over, as the solution on its last mesh.

    Raises ``RuntimeError`` if there is no success: its result is ``no_progress`` where Newton's method does not
    converge from the guess, ``singular`` where the conditions do not determine a solution, ``max_nodes_reached``, or
    ``nonfinite``. Raises ``TypeError`` or ``ValueError`` for wrong input, as for a number of conditions that is not the
    one of the unknowns.

    Sources: Obreshkov's rule as the conditional mean of the prior (``algebra/derivatives.py``); elimination by
    orthogonal transformations, Wright (1992), "Stable parallel algorithms for two-point boundary value problems";
    damping and meshes, Ascher, Mattheij, Russell (1995), "Numerical solution of boundary value problems for ordinary
    differential equations".

    >>> import jax.numpy as jnp, probode
    >>> bratu = probode.ODE(lambda t, u, du, args: -jnp.exp(u), order=2)
    >>> solution = probode.solve_bvp(bratu, lambda ua, ub, args: (ua[0], ub[0]), (0.0, 1.0), lambda t: 0.0 * t)
    >>> f"{solution.evaluate(0.5).mean:.4f}"
    '0.1405'
    """
    require_flag(throw, "throw")
    ode = ode_of(problem)
    if not callable(boundary):
        raise TypeError(f"boundary must be callable as boundary(ua, ub, args), got {boundary!r}.")
    if data is not None:
        raise ValueError(
            "solve_bvp(data=...) is not available yet: pass measured end values as Normal(residual, std) in boundary, "
            "or solve an initial value problem with data (Solver.solve)."
        )
    args, parameters = floats_to_arrays((args, parameters))
    most = as_integer(max_nodes, "max_nodes", 6)
    t0, t1 = pair(t_span)
    example, guess = as_guess(guess, (t0, t1), mesh)
    layout = layout_of(example, ode.order + LEVELS, Dense())
    t0, t1 = two_times(t0, t1, layout)
    first = first_mesh(mesh, guess, t0, t1, layout.dtype, most)
    span = Interval(jnp.asarray(t0), jnp.asarray(t1))
    solution = find(ode, boundary, span, guess, first, parameters, args, Tolerances(rtol, atol), example)
    return raise_unless_found(solution, most) if throw else solution


def find(
    ode: ODE,
    boundary: Callable,
    span: Interval,
    guess: AbstractGuess,
    mesh: Mesh,
    parameters: PyTree,
    args: PyTree,
    tolerances: Tolerances,
    example: PyTree,
) -> Solution:
    """The ``Solution`` of ``solve_bvp(..., throw=False)``, from a first ``mesh``; ``example``: a value of ``u``."""
    layout = layout_of(example, ode.order + LEVELS, Dense())
    known, unravel = ravel_pytree(parameters)
    known = known.astype(layout.dtype)
    arguments = Arguments(args, None if parameters is None else unravel)
    conditions = Conditions(boundary, arguments, layout, ode.order)
    lifted: Any = ode.lifted(LEVELS)
    bvp = Equations(lifted, conditions, arguments, layout, jnp.ones(layout.size, layout.dtype))
    solution = _solve(bvp, guess, mesh, span.t0, span.t1, known, _scales(tolerances, layout))
    if parameters is None:
        return solution
    found = solution.parameters
    return dataclasses.replace(solution, parameters=Normal(unravel(found.mean), found.factor))


class Arguments(eqx.Module):
    """What vector field and conditions are called with: ``args``, or ``(parameters, args)`` if some are unknown."""

    args: PyTree
    unravel: Callable | None

    def __call__(self, p: Float[Array, " P"]) -> PyTree:
        """The arguments for the flat parameters ``p``."""
        return self.args if self.unravel is None else (self.unravel(p), self.args)


class _Search(NamedTuple):
    """Where the search for a mesh stands; ``first``: the one with which it began, or began anew."""

    mesh: Mesh
    course: Course
    first: Mesh
    ratio: Float[Array, ""]
    errors: Float[Array, "nodes d"]
    of_parameters: Float[Array, " P"]
    meshes: Int[Array, ""]
    iterations: Int[Array, ""]
    result: Result
    is_running: Array


@compiled
def _solve(bvp, guess, mesh, t0, t1, known, scales):
    """The ``Solution`` of a boundary value problem; parameters, if any, are flat in it."""
    # Here, where they are traced, so that they are looked at once.
    zeros = jnp.zeros(bvp.layout.size, bvp.layout.dtype)
    values = (bvp.layout.unravel(zeros),) * bvp.k
    bvp.lifted.ode.check(t0, values, bvp.with_parameters(known))
    bvp.boundary.check(known)
    bvp, guess = _with_closures(bvp, guess, values, t0, known)
    found = _search(*detach((bvp, guess, scales, mesh, t0, t1, known)))
    plain = _answer(detach(bvp), found.mesh, found, found.errors, found.of_parameters, scales, found.course)
    return _as_implicit_function(plain, bvp, t0, t1, found, scales)


def _with_closures(bvp, guess, us, t, known):
    """Equations and guess whose functions are PyTrees with the arrays that users' functions close over.

    So derivatives with respect to these arrays can be taken, or cut with ``detach``.
    """
    k, args = bvp.k, bvp.with_parameters(known)
    ode, conditions = bvp.lifted.ode, bvp.boundary
    ode = ODE(traced_once(ode.vector_field, t, *us, args), order=k, jacobian=ode.jacobian)
    end = us if k > 1 else us[0]
    conditions = dataclasses.replace(conditions, function=traced_once(conditions.function, end, end, args))
    if isinstance(guess, FromFunction):
        guess = FromFunction(traced_once(guess.fn, t))
    return dataclasses.replace(bvp, lifted=ode.lifted(LEVELS), boundary=conditions), guess


@eqx.filter_custom_jvp
def _as_implicit_function(plain, bvp, t0, t1, found, scales):
    """The solution ``plain`` that was found for a problem, with the derivatives of the function that it implies."""
    return plain


@_as_implicit_function.def_jvp
@full_precision()
def _(primals, tangents):
    plain, *inputs = primals

    def again(bvp, t0, t1, found, scales):
        # The nodes keep their shares of the interval.
        share = (found.mesh.t - found.mesh.t[0]) / (found.mesh.t[-1] - found.mesh.t[0])
        mesh = Mesh(jnp.where(share < 1, t0 + share * (t1 - t0), t1), found.mesh.number)
        course = found.course
        equations = _in_proportion(bvp, mesh, course, scales)
        # With the derivatives held fixed, each of Newton's steps makes one further derivative right, in both modes.
        linear = equations.linearised(*detach((mesh, course)), differentiable=True)
        linear = detach(linear)
        for _ in range(_STEPS):
            step = linear.step(equations.residuals(mesh, course, differentiable=True))
            course = jax.tree.map(jnp.add, course, step)
        errors = assess(equations, mesh, course, scales, differentiable=True)
        return _answer(bvp, mesh, found, errors.errors[::2], errors.parameters, scales, course, differentiable=True)

    _, moved = eqx.filter_jvp(again, tuple(inputs), tuple(tangents[1:]))
    return plain, moved


def _search(bvp, guess, scales, mesh, t0, t1, known):
    """The mesh on which the error meets the tolerances, and the solution on it."""
    most, n, k = mesh.t.size, bvp.n, bvp.k

    def guessed(mesh):
        states = map_rows(lambda t: guess.at(t, k, n), mesh.t, mesh.number + 1)
        return Course(jnp.where(mesh.is_node[:, None, None], states, states[mesh.number]), known)

    def restarted(now, failed):
        # From the guess again, as what was found on a mesh that is too coarse may be far off.
        finer = halved(now.first)
        mesh = Mesh(finer.t[:most], finer.number)
        result = Result.where(failed.singular | failed.nearly_singular, Result.singular, Result.no_progress)
        result = Result.where(failed.finite, result, Result.nonfinite)
        goes_on = (mesh.number < most) & ~failed.singular
        nothing = jnp.full_like(now.ratio, jnp.inf)
        return now._replace(
            mesh=choose(goes_on, mesh, now.mesh),
            course=choose(goes_on, guessed(mesh), failed.course),
            first=choose(goes_on, mesh, now.first),
            ratio=nothing,
            result=result,
            is_running=goes_on,
        )

    def assessed(now, found):
        equations = _in_proportion(bvp, now.mesh, found.course, scales)
        assessment = assess(equations, now.mesh, found.course, scales)
        ratio = assessment.ratio
        good, full = ratio <= 1, now.mesh.number >= most - 1
        mesh, course = better(equations, now.mesh, found.course, scales, ratio, now.ratio)
        stays = good | full
        result = Result.where(good, Result.successful, Result.max_nodes_reached)
        return now._replace(
            mesh=choose(stays, now.mesh, mesh),
            course=choose(stays, found.course, course),
            ratio=ratio,
            errors=assessment.errors[::2],
            of_parameters=assessment.parameters,
            result=result,
            is_running=~stays,
        )

    def body(now):
        found = newton(_in_proportion(bvp, now.mesh, now.course, scales), now.mesh, now.course, scales)
        now = now._replace(meshes=now.meshes + 1, iterations=now.iterations + found.iterations)
        return lax.cond(found.success & ~found.singular, assessed, restarted, now, found)

    nothing, result = jnp.zeros((), jnp.int32), Result.where(True, Result.no_progress, Result.successful)
    course = guessed(mesh)
    infinite = jnp.full((), jnp.inf, t0.dtype)
    errors = infinite * jnp.ones((most, course.states.shape[2]), t0.dtype), infinite * jnp.ones_like(known)
    init = _Search(mesh, course, mesh, infinite, *errors, nothing, nothing, result, jnp.array(True))
    return lax.while_loop(lambda now: now.is_running & (now.meshes < _MESHES), body, init)


def _in_proportion(bvp, mesh, course, scales):
    """The equations with noise in proportion to the largest values of the components."""
    size = jnp.max(jnp.where(mesh.is_node[:, None], jnp.abs(course.states[:, 0]), 0), axis=0)
    size = size + scales.atol
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    return dataclasses.replace(bvp, sizes=lax.stop_gradient(size))


def _answer(bvp, mesh, found, errors, of_parameters, scales, course, *, differentiable=False):
    """The ``Solution`` about a course with the given errors."""
    states = jnp.where(mesh.is_node[:, None, None], course.states, course.states[mesh.number])
    course = Course(states, course.parameters)
    equations = _in_proportion(bvp, mesh, course, scales)
    path = mesh_path(equations, mesh, course, errors, differentiable=differentiable)
    moves = path.system.moves(bvp.boundary.noise(course, mesh.number))
    marginals, spread = path.marginals(), None
    # Samples are differentiated whether or not this was.
    system = dataclasses.replace(path.system, chain=dataclasses.replace(path.system.chain, differentiable=True))
    path = dataclasses.replace(path, system=system)
    if moves.parameters.shape[0]:
        means = jax.vmap(jax.vmap(bvp.layout.pack))(moves.states)
        marginals = widen(marginals, means)
        nothing = jax.tree.map(lambda _: None, path)
        # A ``Course`` that is made anew is checked to have no leading axis.
        moving = jax.tree.unflatten(jax.tree.structure(course), (moves.states, moves.parameters))
        spread = Spread(means, eqx.tree_at(lambda p: p.course, nothing, moving))
    result = found.result
    spoilt = ~has_failed(result) & ~is_finite((marginals, course))
    return Solution(
        mesh.t,
        marginals,
        path.output_scale(),
        jnp.full((), jnp.nan, mesh.t.dtype),
        Result.where(spoilt, Result.nonfinite, result),
        {"num_nodes": mesh.number + 1, "num_iterations": found.iterations, "num_meshes": found.meshes},
        None,
        bvp.layout,
        path,
        bvp.k,
        spread=spread,
        parameters=_distribution(path, moves.parameters, of_parameters) if course.parameters.size else None,
    )


def _distribution(path, moves, errors):
    """The distribution of the parameters: their errors, correlated as in the model, and uncertain conditions."""
    std = safe_norm(path.parameters, axis=0)
    rows = jnp.concatenate([path.parameters * safe_divide(errors, std)[None], moves])
    return Normal(path.course.parameters, triangularise(None, rows))


def _scales(tolerances, layout):
    """The tolerances as numbers for each component."""
    known = tolerances.of(layout)
    rtol, atol = (jnp.broadcast_to(jnp.asarray(x, layout.dtype), (layout.size,)) for x in (known.rtol, known.atol))
    return Scales(require_resolvable(rtol, rtol, layout.dtype), atol)


def ode_of(problem: Any) -> ODE:
    """An ``ODE``, of a vector field that of order one; raises ``TypeError`` for equations of another form."""
    if isinstance(problem, AbstractProblem) and not isinstance(problem, ODE):
        raise TypeError(f"The equation must be explicit: pass an ODE or a vector field, not {type(problem).__name__}.")
    return problem if isinstance(problem, ODE) else ODE(problem)


_REMEDIES = {
    "no_progress": "A guess that is closer to the solution helps: the Solution of a similar problem (guess=solution), "
    "reached in several steps, or a finer first mesh.",
    "singular": "The conditions do not determine a solution near the guess: one may follow from the others, or the "
    "equation may have a solution that vanishes at all of them (an eigenvalue).",
    "max_nodes_reached": "Pass a larger max_nodes, or larger rtol and atol.",
    "nonfinite": "The vector field or the conditions are infinite or NaN near the guess.",
}


def raise_unless_found(solution: Solution, most: int) -> Solution:
    """The solution unchanged, if it is successful; otherwise raises ``RuntimeError`` with the reason and what helps."""
    failed = has_failed(solution.result)
    facts = solution.result, solution.stats
    return stop_if(solution, failed, ft.partial(_explain, most), facts)


def _explain(most, facts):
    if facts is None:
        return "The boundary value problem was not solved."
    result, stats = facts
    name, _, why = in_words(result).partition(": ")
    done = f"It made {int(stats['num_iterations'])} Newton steps on {int(stats['num_meshes'])} meshes, "
    done += f"the last of {int(stats['num_nodes'])} nodes (max_nodes={most})."
    return f"{why} {done} {_REMEDIES[name]} throw=False returns what was reached."
