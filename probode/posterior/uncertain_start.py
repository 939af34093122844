"""Uncertain initial values: how the posterior moves with them, to first order.

A state that is uncertain at ``t0`` must not simply enter the filter: that would explain the residuals of its own
truncation errors by moving the initial value. Instead the solve at the mean is differentiated along the rows of the
factor, and what this adds to the covariance is kept apart: on a linear equation it is the exact push-forward. The
steps have to be short enough for the directions, too, which may move where the mean is at rest: so the state of such a
solve has its spread, the directions pushed forward with the gains of the steps.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from ..algebra.factorisations import AbstractFactorisation
from ..algebra.marginals import widen
from ..algebra.normal import Normal, square
from ..equations.problems import AbstractProblem
from ..estimation.calibration import AbstractCalibration
from ..stepping.spread import value_and_moves
from ..util.checks import as_float
from .solution import Solution, Spread


def directions_of(u0: Normal, problem: AbstractProblem) -> PyTree:
    """The rows of the factor, each a tuple ``(u, u', ...)``, along a leading axis."""
    mean = problem.split(u0.mean)
    flat, unravel = ravel_pytree(mean)
    if getattr(u0.factor, "shape", None) == (flat.size, flat.size):
        factor = jnp.asarray(as_float(u0.factor, "u0.factor")).astype(flat.dtype)
    elif jax.tree.map(jnp.shape, u0.factor) == jax.tree.map(jnp.shape, u0.mean):
        stds = jax.tree.map(lambda x: jnp.asarray(as_float(x, "u0.factor")), u0.factor)
        factor = jnp.diag(ravel_pytree(stds)[0].astype(flat.dtype))
    else:
        raise ValueError(
            "The factor of an uncertain u0 must be a PyTree of standard deviations like its mean, or a "
            f"{(flat.size, flat.size)} right square root of the covariance of all its numbers."
        )
    return jax.vmap(unravel)(factor)


def check_uncertain(factorisation: AbstractFactorisation, calibration: AbstractCalibration, size: int) -> None:
    """Raises where an uncertain initial value has no place."""
    if calibration.rescales:
        raise ValueError(
            f"{type(calibration).__name__}() rescales all covariances when the solve has ended, also that of an "
            "uncertain u0, which you know. Use DynamicCalibration() or NoCalibration()."
        )
    check_moves(factorisation, size)


def check_moves(factorisation: AbstractFactorisation, size: int) -> None:
    """Raises unless components may be uncertain in different ways."""
    cols = factorisation.pack(np.zeros((1, size))).shape[-1]
    if cols > 1:
        raise ValueError(
            f"{type(factorisation).__name__}() has one covariance for all components, but an uncertain u0 moves them "
            "differently. Use Dense() or BlockDiagonal()."
        )


def push_forward(solve: Callable[[PyTree], Solution], u0: PyTree, directions: PyTree) -> Solution:
    """The solution at ``u0``, or from the mean of a state, together with how it moves along the directions."""
    solution, tangent = value_and_moves(solve, u0, directions)
    means = tangent.marginals.mean
    current = dataclasses.replace(solution.state.current, spread=tangent.state.current.distribution.mean)
    return dataclasses.replace(
        solution,
        marginals=widen(solution.marginals, means),
        state=dataclasses.replace(solution.state, current=current),
        spread=Spread(means, tangent.trajectory),
    )


def spread_start(start: Callable[[PyTree], Normal], u0: PyTree, directions: PyTree) -> Normal:
    """The state at ``u0`` with how it moves along the directions added to its covariance, triangular."""
    state, tangent = value_and_moves(start, u0, directions)
    return square(widen(state, tangent.mean))
