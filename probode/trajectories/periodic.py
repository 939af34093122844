"""Periodic orbits: boundary value problems over one period, which may be unknown."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..algebra.marginals import Moments
from ..equations.problems import ODE
from ..estimation.strategies import FixedIntervalSmoother
from ..information.constraints import TS1
from ..posterior.solution import SaveAt, Solution
from ..priors.iwp import IWP
from ..priors.powers import powers
from ..requests import floats_to_arrays
from ..solver import Solver
from ..stepping.controllers import IntegralController, Tolerances
from ..stepping.times import Interval
from ..util.checks import as_scalar, require, require_flag
from ..util.tracing import compiled, depends_on
from .boundary_values import LEVELS, find, ode_of, raise_unless_found
from .collocation import Mesh
from .guesses import AbstractGuess, FromFunction, FromPath, as_guess, equidistant
from .path import MeshPath


# How many nodes a mesh may have, how many of the steps of a first solve become nodes, and how many there are without.
_MOST, _FIRST = 2048, 256
_INTERVALS = 20
# The tolerances of the solve from which the search starts, where a state is given.
_ROUGHLY = 1e-4


def solve_periodic(
    problem: Any,
    guess: Any,
    period: Any,
    *,
    rtol: Any = 1e-6,
    atol: Any = 1e-9,
    args: PyTree = None,
    throw: Any = True,
) -> Solution:
    """The ``Solution`` over one period of a periodic orbit, ``u(t + T) = u(t)``, with its period and their errors.

    - ``problem``: an ``ODE``, or a vector field ``f(t, u, args)``.
    - ``guess``: a state near the orbit, as a ``u0`` of ``Solver.solve``, from which one period is solved; or a function
      of the time that returns ``u``, from zero on; or a ``Solution``, from its first time on.
    - ``period``: a first guess of the period, positive. If the vector field depends on ``t`` the period is that of the
      field: it is known, and stays as it is.
    - ``rtol``, ``atol``, ``args``, ``throw``: as for ``solve_bvp``.

    ``Solution.period`` has ``mean`` and ``std``. The orbit begins where it is nearest to the beginning of the guess,
    at right angles to the flow there (Poincaré's section). Its distributions are those at given phases, the shares of
    the period: times are ``share * period.mean``, and the uncertainty of the period is apart from them. Unstable
    orbits are found as stable ones are.

    Raises as ``solve_bvp``: the result is ``singular`` near an equilibrium, which is periodic with any period, and for
    orbits in a family with one period, as of a conservative system.

    >>> import jax.numpy as jnp, probode
    >>> van_der_pol = probode.ODE(lambda t, u, du, mu: mu * (1 - u**2) * du - u, order=2)
    >>> orbit = probode.solve_periodic(van_der_pol, (2.0, 0.0), 6.5, args=1.0)
    >>> f"{orbit.period.mean:.4f}"
    '6.6633'
    """
    require_flag(throw, "throw")
    ode = ode_of(problem)
    args, period = floats_to_arrays((args, period))
    period = as_scalar(period, "period")
    period = jnp.asarray(require(period, period > 0, "period must be positive", period=period))
    example, t0, guess, mesh = _begun(ode, guess, period, args)
    period, t0 = (jnp.asarray(x, mesh.t.dtype) for x in (period, t0))
    is_forced = depends_on(lambda t: ode.vector_field(t, *(example,) * ode.order, args), t0)
    begin = _first_state(guess, period, ode.order)
    given: Any = (t0, begin, args)
    # ``solve_bvp`` calls field and conditions with (parameters, args): the period that is known takes that place.
    unknown, given = (None, (period, given)) if is_forced else (period, given)
    field, closed = ODE(_InPhase(ode.vector_field), order=ode.order), _Closed(ode, is_forced)
    span = Interval(jnp.zeros_like(t0), jnp.ones_like(t0))
    solution = find(field, closed, span, guess, mesh, unknown, given, Tolerances(rtol, atol), example)
    known = solution.parameters
    found = (
        Moments(period, jnp.zeros_like(period)) if known is None else Moments(known.mean, jnp.abs(known.factor[0, 0]))
    )
    solution = _in_time(solution, t0, found)
    return raise_unless_found(solution, _MOST) if throw else solution


@compiled
def _first_state(guess, period, k):
    """``u, ..., u^(k-1)`` at the beginning of a guess, as derivatives with respect to the time."""
    return guess.at(jnp.zeros_like(period), k, k + 1)[:k] / jnp.stack(powers(period, k))[:, None]


class _InPhase(eqx.Module):
    """The vector field as a function of the phase ``(t - t0) / T`` and of derivatives with respect to it."""

    field: Callable

    def __call__(self, phase: Float[Array, ""], *us_and_args: PyTree) -> PyTree:
        *us, (period, (t0, _, args)) = us_and_args
        us = [jax.tree.map(lambda u: u / period**i, u) for i, u in enumerate(us)]  # noqa: B023
        out = self.field(t0 + period * phase, *us, args)
        return jax.tree.map(lambda f: f * period ** len(us), out)


class _Closed(eqx.Module):
    """The conditions of an orbit: its first and last states agree.

    If the period is unknown (the orbit is not forced) there is one more: the first state lies in the plane through the
    first state of the guess, orthogonal to the flow there.
    """

    ode: ODE
    is_forced: bool = eqx.field(static=True)

    def __call__(self, first: PyTree, last: PyTree, args: PyTree) -> PyTree:
        period, (t0, begin, args) = args
        first, last = ((x,) if self.ode.order == 1 else x for x in (first, last))
        closed = jax.tree.map(jnp.subtract, first, last)
        if self.is_forced:
            return closed
        unravel = ravel_pytree(first[0])[1]
        us = tuple(unravel(u) for u in begin)
        flow = jnp.concatenate([begin[1:], ravel_pytree(self.ode.vector_field(t0, *us, args))[0][None]])
        here = jnp.stack([ravel_pytree(u)[0] / period**i for i, u in enumerate(first)])
        size = jnp.sqrt(jnp.sum(flow**2))
        return closed, jnp.sum(flow * (here - begin)) / jnp.where(size > 0, size, 1)


def _begun(ode, guess, period, args):
    """An example of ``u``, the first time, and guess and first mesh as functions of the phase."""
    path: Any
    t0: Any = jnp.zeros(())
    if isinstance(guess, Solution):
        t0 = guess.t[0] if guess.trajectory is None else guess.trajectory.interval.t0
        example, _ = as_guess(guess, (t0, t0 + period), None)
        path, layout = guess.trajectory, guess.layout
    elif callable(guess):
        example, _ = as_guess(guess, (t0, period), None)
        return example, t0, FromFunction(_AtPhase(guess, period)), _equidistant(example)
    else:
        guess = floats_to_arrays(guess)
        controller = IntegralController(rtol=_ROUGHLY, atol=1e-3 * _ROUGHLY)
        solver = Solver(IWP(ode.order + LEVELS), TS1(ode), strategy=FixedIntervalSmoother(), controller=controller)
        once = solver.solve(guess, t0, period, args=args, save_at=SaveAt(dense=True), throw=False)
        example, path, layout = once.layout.example, once.trajectory, once.layout
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)

    return example, t0, _PathInPhase(FromPath(path, layout), t0, period), _nodes_of(path, t0, period)


class _AtPhase(eqx.Module):
    """A function of the time as one of the phase, from zero on."""

    fn: Callable
    period: Float[Array, ""]

    def __call__(self, phase: Float[Array, ""]) -> PyTree:
        return self.fn(phase * self.period)


class _PathInPhase(AbstractGuess):
    """The mean of a posterior process as a function of the phase."""

    path: FromPath
    t0: Float[Array, ""]
    period: Float[Array, ""]

    def at(self, t: Float[Array, ""], k: int, n: int) -> Float[Array, "n d"]:
        t = jnp.asarray(self.t0 + self.period * t, t.dtype)
        return self.path.at(t, k, n) * jnp.stack(powers(jnp.asarray(self.period, t.dtype), n))[:, None]


def _equidistant(example):
    dtype = jnp.result_type(*jax.tree.leaves(example))
    return equidistant(jnp.zeros((), dtype), jnp.ones((), dtype), jnp.asarray(_INTERVALS), _MOST)


def _nodes_of(path, t0, period):
    """The phases of the nodes or steps of a path, or of as many of them as a first mesh may have."""
    mesh = isinstance(path, MeshPath)
    t, last = (path.mesh.t, path.mesh.number) if mesh else (path.rows.t, path.last)
    number = jnp.clip(last, 5, _FIRST)
    i = jnp.minimum(jnp.arange(_MOST) * last // number, last)
    phase = jnp.clip((t[i] - t0) / period, 0, 1)
    # A path that ends before the period, or goes on behind it, has no node at its end.
    return Mesh(jnp.where(jnp.arange(_MOST) >= number, 1, phase), number.astype(i.dtype))


@compiled
def _in_time(solution, t0, period):
    """The solution over the times ``t0 + phase * period``."""
    path, layout = solution.trajectory, solution.layout
    n = layout.num_derivatives + 1
    units = 1 / jnp.stack(powers(period.mean, n))
    entries = jnp.repeat(units, layout.size)
    t = t0 + period.mean * path.mesh.t

    def rows(x):
        return x * entries[None, :, None]

    system = dataclasses.replace(
        path.system,
        basis=rows(path.system.basis),
        lift=rows(path.system.lift),
        along=rows(path.system.along),
        before=path.system.before / entries[None, None],
        after=path.system.after / entries[None, None],
    )
    path = dataclasses.replace(
        path,
        mesh=Mesh(t, path.mesh.number),
        course=dataclasses.replace(path.course, states=path.course.states * units[None, :, None]),
        system=system,
        left=path.left * entries[None, None],
        right=path.right * entries[None, None],
    )
    return dataclasses.replace(
        solution,
        t=t,
        marginals=path.marginals(),
        output_scale=path.output_scale(),
        trajectory=path,
        parameters=None,
        period=period,
    )
