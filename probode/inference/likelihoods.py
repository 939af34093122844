"""The probability of data under the solution of an equation: three ways, one for every taste of approximation.

With ``z`` the equation at the steps and ``y`` the data, all are ``log p(y | z)`` where the equation is linear, or the
solver sure enough: Fenrir solves first and then conditions the posterior on the data (Tronarp, Bosch & Hennig 2022),
Dalton conditions on both in one filter (Wu & Lysy 2024), filtering predicts every datum from what lies before it.
Steps end at the times of the data, and are chosen by the solver; gradients are those of the same steps frozen. A solve
that fails has the log likelihood minus infinity, and a gradient of zero.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..algebra.coordinates import look_back, realise, standard
from ..algebra.linalg import compiled
from ..estimation.strategies import Filter, FixedPointSmoother
from ..information.observations import Observations
from ..posterior.solution import SaveAt, Solution
from ..posterior.trajectory import Trajectory
from ..requests import bind, data_between, interval, require_observations
from ..solver import Solver, solve_through
from ..stepping.controllers import IntegralController
from ..stepping.result import Result


def fenrir_log_likelihood(
    solver: Solver, u0: PyTree, t0: Any, t1: Any, data: Observations, *, args: PyTree = None
) -> Float[Array, ""]:
    """The log density of the data under the posterior of the solution, that is, given the whole equation.

    The equation is solved without the data, with whatever calibration; then the posterior, a Gauss-Markov process, is
    conditioned on them from the last to the first. Least sensitive to bad parameters if the output scale is large
    (``NoCalibration``; see ``DiffusionTempering``). ``u0``, ``t0``, ``t1``, ``args`` as in ``Solver.solve``. Raises
    ``TypeError`` or ``ValueError`` for wrong input.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -args * u)))
    >>> data = probode.Observations([0.5, 1.0], jnp.array([0.6, 0.4]), 0.1)
    >>> value = probode.fenrir_log_likelihood(solver, 1.0, 0.0, 1.0, data, args=1.0)
    """
    require_observations(data)
    _, layout = bind(solver, u0)
    data = data_between(data, *interval(t0, t1, layout), layout)
    smoother = dataclasses.replace(solver, strategy=FixedPointSmoother())
    solution = solve_through(smoother, data.ts, u0, t0, t1, args, save_at=data.ts)
    return _if_successful(solution, _log_density(solution.trajectory, data, args))


def filtering_log_likelihood(
    solver: Solver, u0: PyTree, t0: Any, t1: Any, data: Observations, *, args: PyTree = None
) -> Float[Array, ""]:
    """The sum of the log densities of every datum given the data before it, and the equation up to its time.

    The cheapest: one filter. Later equations do not correct what is known of earlier times, so it differs from the
    others by as much as a smoother would change the solution, against the noise; of data at ``t1`` alone all are the
    same, and this is the way to compute it. Arguments as for ``fenrir_log_likelihood``; calibrations that wait for the
    end are a ``ValueError``.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -args * u)))
    >>> end = probode.Observations([1.0], jnp.array([0.4]), 0.1)  # a datum at the end alone
    >>> value = probode.filtering_log_likelihood(solver, 1.0, 0.0, 1.0, end, args=1.0)
    """
    solution = dataclasses.replace(solver, strategy=Filter()).solve(u0, t0, t1, args=args, data=data, throw=False)
    return _if_successful(solution, solution.data_log_likelihood)


def dalton_log_likelihood(
    solver: Solver, u0: PyTree, t0: Any, t1: Any, data: Observations, *, args: PyTree = None
) -> Float[Array, ""]:
    """``log p(y, z) - log p(z)``: equation and data in one filter, less the equation alone on the same steps.

    The equation is linearised where the data say that the solution is, which helps where the solution without them is
    far away. Take ``NoCalibration`` at tight tolerances: a dynamic scale is then read off residuals at round-off, which
    the two solves do not share (1e-4 at a tolerance of 1e-10). Nor do they in the short step between two data that lie
    close together (1e-5 for data 1e-3 apart at 1e-9). Arguments as for ``fenrir_log_likelihood``; calibrations
    that wait for the end are a ``ValueError``.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -args * u)))
    >>> data = probode.Observations([0.5, 1.0], jnp.array([0.6, 0.4]), 0.1)
    >>> value = probode.dalton_log_likelihood(solver, 1.0, 0.0, 1.0, data, args=1.0)
    """
    forward = dataclasses.replace(solver, strategy=Filter())
    joint = forward.solve(u0, t0, t1, args=args, data=data, save_at=SaveAt(t0=True, steps=True), throw=False)
    # So loose that every step goes as far as it may.
    stops = solver.controller.limits.stops
    whole = lax.stop_gradient(jnp.abs(joint.t[-1] - joint.t[0]))
    # A solve that starts anew at its stops would choose a first step there: the whole interval.
    anew = {"stop_at": stops, "dt_min": whole} if stops.size else {}
    loose = IntegralController(1e6, 1e6, **anew)
    forward = dataclasses.replace(forward, controller=loose)
    alone = solve_through(forward, lax.stop_gradient(joint.t), u0, t0, t1, args, dt0=t1 - t0)
    return _if_successful(joint, joint.data_log_likelihood + joint.log_likelihood - alone.log_likelihood)


@compiled
def _log_density(path: Trajectory, data: Observations, args: PyTree) -> Float[Array, ""]:
    """Of the data given a chain of states that holds their times, from the last to the first."""
    rows, t = path.rows, path.rows.t
    nearest, seen = jax.vmap(data.find)(t)
    # Two rows may have one time: the end of a step and the start of the next.
    again = jnp.append((t[:-1] == t[1:]) & path.reached[1:], False)
    told = path.reached & seen & ~again

    def learn(row, belief, total, i):
        coordinates, log_density = data.learn(i, realise(belief, row), path.layout, args)
        return realise(coordinates, belief), total + log_density

    def body(carry, x):
        row, past, i, told, reached = x
        belief, total = lax.cond(told, learn, lambda row, belief, total, i: (belief, total), row, *carry, i)
        earlier = look_back(belief, past)
        return (jax.tree.map(lambda a, b: jnp.where(reached, a, b), earlier, belief), total), None

    last = standard(jax.tree.map(lambda x: x[-1], rows.distribution))
    xs = rows.distribution, rows.past, nearest, told, path.reached
    (_, total), _ = lax.scan(body, (last, jnp.zeros((), t.dtype)), xs, reverse=True)
    return total


def _if_successful(solution: Solution, log_density):
    return jnp.where(solution.result == Result.successful, log_density, -jnp.inf)
