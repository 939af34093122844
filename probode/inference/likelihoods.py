"""The log likelihood of data under the solution of an equation, in three approximations.

With ``z`` the equation at the steps and ``y`` the data, they approximate ``log p(y | z)``:

- Fenrir solves first and then conditions the posterior on the data (Tronarp, Bosch & Hennig 2022, "Fenrir:
  physics-enhanced regression for initial value problems").
- Dalton conditions on both in one filter (Wu & Lysy 2024, "Data-adaptive probabilistic likelihood approximation for
  ordinary differential equations").
- Filtering predicts every datum from the equation and the data before it.

The first two agree where the equation is linear, all three where the solver's uncertainty is small against the noise of
the data. Steps are chosen by the solver and end at the times of the data; gradients are those of these steps, held
fixed. A solve that fails has the log likelihood minus infinity, and a gradient of zero.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..algebra.coordinates import from_coordinates, marginalise, standard
from ..estimation.strategies import Filter, FixedPointSmoother
from ..information.observations import Observations
from ..posterior.solution import SaveAt, Solution
from ..posterior.trajectory import Trajectory
from ..requests import bind, data_between, floats_to_arrays, require_observations, two_times
from ..solver import Solver, solve_through
from ..stepping.controllers import IntegralController
from ..stepping.result import Result
from ..util.tracing import compiled


def fenrir_log_likelihood(
    solver: Solver, u0: PyTree, t0: Any, t1: Any, data: Observations, *, args: PyTree = None
) -> Float[Array, ""]:
    """The log density of the data under the posterior of the solution, that is, given the whole equation: a scalar.

    The equation is solved without the data, with any calibration; then its posterior, a Gauss-Markov process, is
    conditioned on them from the last to the first. With a large output scale (``NoCalibration``, see
    ``DiffusionTempering``) the likelihood is smooth also far from the best parameters.

    - ``solver``: its strategy is replaced by a ``FixedPointSmoother``.
    - ``u0``, ``t0``, ``t1``, ``args``: as in ``Solver.solve``, but for a ``Normal`` as ``u0``, which is refused.
    - ``data``: at times between ``t0`` and ``t1``, in the order of the solve.

    Raises ``TypeError`` unless ``data`` are ``Observations``, ``ValueError`` if their times lie outside of the interval
    or run in the other direction; otherwise as ``Solver.solve`` for wrong input, but not for a solve that fails: it is
    minus infinity then, with a gradient of zero, and ``Solver.solve`` says why (often ``max_steps``).

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -args * u)))
    >>> data = probode.Observations([0.5, 1.0], jnp.array([0.6, 0.4]), 0.1)
    >>> value = probode.fenrir_log_likelihood(solver, 1.0, 0.0, 1.0, data, args=1.0)
    """
    require_observations(data)
    args = floats_to_arrays(args)
    _, layout = bind(solver, u0)
    data = data_between(data, *two_times(t0, t1, layout), layout)
    smoother = dataclasses.replace(solver, strategy=FixedPointSmoother())
    solution = solve_through(smoother, data.ts, u0, t0, t1, args, save_at=data.ts)
    assert isinstance(solution.trajectory, Trajectory)
    return _if_successful(solution, _log_density(solution.trajectory, data, args))


def filtering_log_likelihood(
    solver: Solver, u0: PyTree, t0: Any, t1: Any, data: Observations, *, args: PyTree = None
) -> Float[Array, ""]:
    """The sum of the log densities of every datum given the data before it, and the equation up to its time: a scalar.

    It is the cheapest of the three, with one filter. The equation at later times does not correct the state at earlier
    ones, so it differs from the others where a smoother would change the solution by an amount that is not small
    against the noise. For data at ``t1`` alone all three are the same, and this one is best. Arguments and errors as
    for ``fenrir_log_likelihood``; a calibration that rescales all covariances at the end of a solve
    (``MLECalibration``, ``LeaveOneOutCalibration``) is a ``ValueError``.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -args * u)))
    >>> end = probode.Observations([1.0], jnp.array([0.4]), 0.1)  # a datum at the end alone
    >>> value = probode.filtering_log_likelihood(solver, 1.0, 0.0, 1.0, end, args=1.0)
    """
    solution = dataclasses.replace(solver, strategy=Filter()).solve(u0, t0, t1, args=args, data=data, throw=False)
    assert solution.data_log_likelihood is not None
    return _if_successful(solution, solution.data_log_likelihood)


def dalton_log_likelihood(
    solver: Solver, u0: PyTree, t0: Any, t1: Any, data: Observations, *, args: PyTree = None
) -> Float[Array, ""]:
    """``log p(y, z) - log p(z)``, a scalar: equation and data in one filter, less the equation alone on the same steps.

    The equation is linearised at a mean that is conditioned on the data, which helps where the solution without them is
    far away. Use ``NoCalibration``: a dynamic scale is estimated from residuals, which differ between the two solves
    (by 1.5 in the log likelihood of one example at a tolerance of 1e-3, 0.05 at 1e-6, and at 1e-10, where they are
    round-off, by 1e-4; with a fixed scale by 3e-6). They also differ in the short step between two data that lie close
    together (1e-5 for data 1e-3 apart at 1e-9). Arguments and errors as for ``filtering_log_likelihood``.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -args * u)))
    >>> data = probode.Observations([0.5, 1.0], jnp.array([0.6, 0.4]), 0.1)
    >>> value = probode.dalton_log_likelihood(solver, 1.0, 0.0, 1.0, data, args=1.0)
    """
    forward = dataclasses.replace(solver, strategy=Filter())
    joint = forward.solve(u0, t0, t1, args=args, data=data, save_at=SaveAt(t0=True, steps=True), throw=False)
    # Tolerances so loose that no step is shortened: the steps of ``alone`` end where those of ``joint`` do.
    stops = solver.controller.limits.stops
    whole = lax.stop_gradient(jnp.abs(joint.t[-1] - joint.t[0]))
    # Behind a stop the state is restarted, and a first step is chosen from its derivatives. This lower bound keeps it
    # from being shorter than the steps of ``joint``.
    anew = {"stop_at": stops, "dt_min": whole} if stops.size else {}
    loose = IntegralController(1e6, 1e6, **anew)
    forward = dataclasses.replace(forward, controller=loose)
    alone = solve_through(forward, lax.stop_gradient(joint.t), u0, t0, t1, args, dt0=t1 - t0)
    assert joint.data_log_likelihood is not None
    return _if_successful(joint, joint.data_log_likelihood + joint.log_likelihood - alone.log_likelihood)


@compiled
def _log_density(path: Trajectory, data: Observations, args: PyTree) -> Float[Array, ""]:
    """The log density of the data under a trajectory with rows at their times, conditioned on them backwards."""
    rows, t = path.rows, path.rows.t
    nearest, seen = jax.vmap(data.find)(t)
    # The end of a step and the start of the next may be two rows with one time: a datum would be counted twice.
    again = jnp.append((t[:-1] == t[1:]) & path.reached[1:], False)
    told = path.reached & seen & ~again

    def learn(row, belief, total, i):
        coordinates, log_density = data.condition(i, from_coordinates(belief, row), path.layout, args)
        return from_coordinates(coordinates, belief), total + log_density

    def body(carry, x):
        row, past, i, told, reached = x
        belief, total = lax.cond(told, learn, lambda row, belief, total, i: (belief, total), row, *carry, i)
        earlier = marginalise(belief, past)
        return (jax.tree.map(lambda a, b: jnp.where(reached, a, b), earlier, belief), total), None

    last = standard(jax.tree.map(lambda x: x[-1], rows.distribution))
    xs = rows.distribution, rows.past, nearest, told, path.reached
    (_, total), _ = lax.scan(body, (last, jnp.zeros((), t.dtype)), xs, reverse=True)
    return total


def _if_successful(solution: Solution, log_density: Float[Array, ""]) -> Float[Array, ""]:
    """The log density, or minus infinity if the solve has failed."""
    return jnp.where(solution.result == Result.successful, log_density, -jnp.inf)
