"""Solutions of equations whose parameters or initial values are uncertain, integrated over by cubature."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..algebra.linalg import safe_sqrt
from ..algebra.normal import Normal
from ..ensembles import solve_ensemble
from ..information.regression import AbstractCubature, GaussHermite, require_cubature
from ..posterior.solution import Solution
from ..posterior.uncertain_start import root_of_normal
from ..solver import Solver
from ..stepping.result import has_failed
from ..util import describe
from ..util.checks import require_flag
from ..util.tracing import compiled


# Points in each direction by default, and up to how many solves.
_POINTS, _FEWER, _SOLVES = 5, 3, 1000


class Marginal(eqx.Module):
    """The distribution of a solution over that of its parameters, as ``marginalise`` returns it.

    - ``t``: the saved times, ``(time,)``.
    - ``mean``, ``std``: of ``u``, PyTrees like it with leaves ``(time, *leaf.shape)``.
    - ``parametric_std``: the standard deviation of the solutions' means, which comes from the parameters.
    - ``numerical_std``: the root of the mean of the solutions' variances, which comes from the solver. The squares of
      both add up to that of ``std`` (law of total variance).
    - ``solutions``: the ``Solution`` at every point of the cubature, with a leading axis ``(points,)``.
    - ``points``: standard normal coordinates of the parameters, ``(points, p)``; ``weights``: ``(points,)``, sum one.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(3), probode.TS1(probode.ODE(lambda t, u, args: -args * u)))
    >>> marginal = probode.marginalise(solver, 1.0, 0.0, 1.0, args=probode.Normal(1.0, 0.1))
    >>> print(f"{marginal.mean[-1]:.4f} {jnp.exp(-1 + 0.1**2 / 2):.4f}")
    0.3697 0.3697
    """

    t: Float[Array, " time"]
    mean: PyTree[Float[Array, "time ..."]]
    std: PyTree[Float[Array, "time ..."]]
    parametric_std: PyTree[Float[Array, "time ..."]]
    numerical_std: PyTree[Float[Array, "time ..."]]
    solutions: Solution
    points: Float[Array, "points p"]
    weights: Float[Array, " points"]

    def __repr__(self) -> str:
        return f"Marginal(t={eqx.tree_pformat(self.t)}, points={self.weights.size}, p={self.points.shape[1]})"


def marginalise(
    solver: Solver,
    u0: PyTree,
    t0: Any,
    t1: Any,
    *,
    args: PyTree = None,
    save_at: Any = None,
    cubature: AbstractCubature | None = None,
    throw: Any = True,
) -> Marginal:
    """The ``Marginal`` distribution of a solution whose parameters, or initial values, are ``Normal``.

    It is integrated over them: the equation is solved at the points of a cubature. Unlike a ``Normal`` as ``u0`` of
    ``Solver.solve``, which is pushed forward to first order, the equation need not be nearly linear in what is
    uncertain.

    - ``u0``, ``args``: as in ``Solver.solve``. Each ``Normal`` in them is one or several uncertain numbers, independent
      of those of the others: ``args={"rate": Normal(1.0, 0.1), "capacity": 2.0}``.
    - ``t0``, ``t1``, ``save_at``: as in ``Solver.solve``.
    - ``cubature``: by default ``GaussHermite(5)``, or with 3 points in each direction where 5 would need more than 1000
      solves. From seven uncertain numbers on pass ``SphericalCubature()``: its means are exact for cubic functions of
      the parameters, its standard deviations for linear ones.
    - ``throw``: whether it is an error if one of the solves fails; otherwise the moments are NaN.

    With respect to means and factors of the ``Normal`` the result can be differentiated. Raises ``TypeError`` or
    ``ValueError`` for wrong input, as without a ``Normal``; ``RuntimeError`` if a solve fails.

    >>> import probode
    >>> solver = probode.Solver(probode.IWP(3), probode.TS1(probode.ODE(lambda t, u, args: -args["rate"] * u)))
    >>> uncertain = {"rate": probode.Normal(1.0, 0.1)}
    >>> marginal = probode.marginalise(solver, probode.Normal(1.0, 0.2), 0.0, 1.0, args=uncertain)
    >>> marginal.points.shape
    (25, 2)
    """
    require_flag(throw, "throw")
    leaves, structure = jax.tree.flatten((u0, args), is_leaf=_is_normal)
    flats = [ravel_pytree(_floats(x.mean)) if _is_normal(x) else None for x in leaves]
    number = sum(flat[0].size for flat in flats if flat is not None)
    if number == 0:
        raise ValueError("marginalise needs a Normal in u0 or args; a certain problem is that of Solver.solve.")
    dtype = jnp.result_type(*(flat[0] for flat in flats if flat is not None))
    cubature = _chosen(number) if cubature is None else require_cubature(cubature)
    points, weights = (jnp.asarray(x, dtype) for x in cubature.rule(number))
    lanes: list[Any] = []
    axes: list[Any] = []
    used = 0
    for leaf, flat in zip(leaves, flats, strict=True):
        if flat is None:
            lanes.append(leaf)
            axes.append(None)
            continue
        (mean, unravel), p = flat, flat[0].size
        values = mean + points[:, used : used + p].astype(mean.dtype) @ root_of_normal(leaf, mean, "a Normal")
        lanes.append(jax.vmap(unravel)(values))
        axes.append(jax.tree.map(lambda _: 0, leaf.mean))
        used += p
    (u0s, argss), (u0_axes, args_axes) = (jax.tree.unflatten(structure, x) for x in (lanes, axes))
    in_axes = (u0_axes, None, None, args_axes)
    solutions = solve_ensemble(solver, u0s, t0, t1, args=argss, in_axes=in_axes, save_at=save_at)
    failed = has_failed(solutions.result)
    if throw and describe.is_known(failed) and np.any(failed):
        i = int(np.argmax(np.asarray(failed)))
        raise RuntimeError(
            f"The solve at point {i} of the cubature, of {points.shape[0]}, has failed: Solver.solve with the u0 and "
            "args there says why. They are improbable, but not impossible: their Normal may be too wide."
        )
    mean, std, parametric, numerical = _moments(solutions, weights, failed)
    return Marginal(solutions.t[0], mean, std, parametric, numerical, solutions, points, weights)


def _is_normal(x):
    return isinstance(x, Normal)


def _floats(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x, float)), tree)


def _chosen(number):
    for points in (_POINTS, _FEWER):
        if points**number <= _SOLVES:
            return GaussHermite(points)
    raise ValueError(
        f"marginalise over {number} uncertain numbers needs {_FEWER}^{number} solves by GaussHermite({_FEWER}). Pass "
        "cubature=SphericalCubature(), with two solves for each, or keep some of them certain."
    )


@compiled
def _moments(solutions, weights, failed):
    bad = jnp.any(failed)

    def one(means, stds):
        column = weights.astype(means.dtype).reshape(-1, *[1] * (means.ndim - 1))
        mean = jnp.sum(column * means, axis=0)
        parametric, numerical = jnp.sum(column * (means - mean) ** 2, axis=0), jnp.sum(column * stds**2, axis=0)
        known = (mean, *(safe_sqrt(x) for x in (parametric + numerical, parametric, numerical)))
        return tuple(jnp.where(bad, jnp.nan, x) for x in known)

    means, structure = jax.tree.flatten(solutions.mean)
    each = [one(m, s) for m, s in zip(means, jax.tree.leaves(solutions.std), strict=True)]
    return tuple(jax.tree.unflatten(structure, column) for column in zip(*each, strict=True))
