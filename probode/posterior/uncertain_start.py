"""Uncertain initial values: their distribution pushed forward along the solution, to first order.

A covariance of the initial value must not enter the filter: its updates would attribute residuals, which come from
truncation errors, to a wrong initial value, and correct that. Instead the solve from the mean is differentiated along
the rows of the initial factor, and the covariance of these derivatives is added to that of the filter. For a linear
equation this is the exact push-forward. The derivative is that of the means alone, with the gains of the steps
(``Step.gains_fixed``). The steps have to resolve these directions, too, which may change where the mean is constant:
the state of such a solve therefore carries its spread, the directions propagated with the same gains.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import AbstractFactorisation, Layout
from ..algebra.linalg import is_finite
from ..algebra.marginals import widen
from ..algebra.normal import Normal, square
from ..equations.problems import AbstractProblem
from ..estimation.calibration import AbstractCalibration, check_not_rescaled, returns_factor
from ..estimation.initialisation import InitialState
from ..stepping.result import Result, has_failed
from ..stepping.spread import value_and_moves
from ..util.checks import as_float, require
from .solution import Solution, Spread


_KNOWN = "that of an uncertain u0, which you know"


def directions_of(u0: Normal, problem: AbstractProblem) -> PyTree:
    """The rows of the factor of ``u0``, each a tuple ``(u, u', ...)``, stacked along a leading axis.

    Raises ``ValueError`` unless the factor is a PyTree of standard deviations like the mean, none of them negative, or
    a right square root of the covariance over all its numbers, and finite; ``TypeError`` if it is not real.
    """
    flat, unravel = ravel_pytree(problem.split(u0.mean))
    return jax.vmap(unravel)(root_of_normal(u0, flat, "an uncertain u0"))


def root_of_normal(x: Normal, flat: Float[Array, " p"], name: str) -> Float[Array, "p p"]:
    """The right square root of the covariance of a ``Normal`` that a user has made, over its mean as a flat array.

    ``flat``: the mean. ``name``: of the distribution, for messages. Raises as ``directions_of``.
    """
    if getattr(x.factor, "shape", None) == (flat.size, flat.size):
        root: Any = as_float(x.factor, f"The factor of {name}")
        root = require(root, abs(root) < np.inf, f"The factor of {name} must be finite")
        return jnp.asarray(root).astype(flat.dtype)
    if jax.tree.map(jnp.shape, x.factor) == jax.tree.map(jnp.shape, x.mean):
        stds = jax.tree.map(lambda std: _standard_deviation(std, name), x.factor)
        return jnp.diag(ravel_pytree(stds)[0].astype(flat.dtype))
    one = isinstance(x.factor, int | float) or getattr(x.factor, "shape", None) == ()
    remedy = " The same for all: jax.tree.map(lambda x: std * jnp.ones_like(x), mean)." if one else ""
    raise ValueError(
        f"The factor of {name} must be a PyTree of standard deviations like its mean, or a "
        f"{(flat.size, flat.size)} right square root of the covariance of all its numbers.{remedy}"
    )


def _standard_deviation(x, name):
    x = as_float(x, f"The factor of {name}")
    x = require(x, (x >= 0) & (x < np.inf), f"Standard deviations of {name} must be finite and not negative")
    return jnp.asarray(x)


def check_uncertain(layout: Layout, calibration: AbstractCalibration) -> None:
    """Raises ``ValueError`` for parts with which the initial value cannot be uncertain."""
    check_not_rescaled(None, False, calibration, layout.batch_shape, _KNOWN)
    check_moves(layout.factorisation, layout.size)


def check_state_not_rescaled(
    state: InitialState, number: int, calibration: AbstractCalibration, layout: Layout
) -> InitialState:
    """``state``; raises ``ValueError`` if one of its first ``number`` derivatives is uncertain and would be rescaled.

    Higher derivatives may be: their variance, as that of ``Diffuse()``, is a part of the model that is calibrated.
    """
    if not returns_factor(calibration, layout.batch_shape):
        return state
    factor = jnp.asarray(state.factor)
    certain = layout.std(factor)[:number] == 0
    return InitialState(state.mean, check_not_rescaled(factor, certain, calibration, layout.batch_shape, _KNOWN))


def check_moves(factorisation: AbstractFactorisation, size: int, what: str = "an uncertain u0") -> None:
    """Raises ``ValueError`` where the ``size`` components of ``u`` share one covariance, as under ``Isotropic``.

    ``what``: what moves them.
    """
    cols = factorisation.pack(jnp.zeros((1, size))).shape[-1]
    if cols > 1:
        raise ValueError(
            f"{type(factorisation).__name__}() has one covariance for all components, but {what} moves them "
            "differently. Use Dense() or BlockDiagonal() as factorisation (in solve_ivp also method='EK1' or 'Taylor')."
        )


def push_forward(
    solve: Callable[[PyTree], tuple[Solution, PyTree]], u0: PyTree, directions: PyTree
) -> tuple[Solution, PyTree, PyTree]:
    """The solution of ``solve(u0)``, with the covariance that its derivatives along the directions add.

    ``u0``: the mean of the initial value, or that of the state from which a solve is resumed. ``directions``: PyTrees
    like it, stacked along a leading axis ``N``. Also what ``solve`` returns besides, and its derivatives.
    """
    (solution, more), (tangent, moves_of_more) = value_and_moves(solve, u0, directions)
    layout, last = solution.layout, solution.state.current

    def fixed(mean, moves, t_moves):
        # The time of an event depends on the initial value. Its derivative times the velocity is subtracted from the
        # derivative of the state at the event: what remains is that of the state at a fixed time.
        if t_moves is None:
            return moves
        us = layout.unpack(mean)
        velocity = layout.pack(jnp.concatenate([us[1:], jnp.zeros_like(us[:1])]))
        return moves - jnp.reshape(t_moves, (-1,) + (1,) * mean.ndim) * velocity[None]

    moves = solution.marginals.mean, tangent.marginals.mean, tangent.t
    means = jax.vmap(fixed, in_axes=(0, 1, 1), out_axes=1)(*moves)
    at_end = tangent.state.current
    spread = fixed(last.distribution.mean, at_end.distribution.mean, at_end.t)
    current = dataclasses.replace(last, spread=spread)
    # The derivative of a field may be infinite or NaN where the field is finite, and the steps were fine.
    spoilt = ~has_failed(solution.result) & ~is_finite((means, spread))
    result = Result.where(spoilt, Result.nonfinite, solution.result)
    solution = dataclasses.replace(
        solution,
        marginals=widen(solution.marginals, means),
        result=result,
        state=dataclasses.replace(solution.state, current=current, result=result),
        spread=Spread(means, tangent.trajectory),
    )
    return solution, more, moves_of_more


def spread_start(start: Callable[[PyTree], Normal], u0: PyTree, directions: PyTree) -> Normal:
    """The state ``start(u0)`` with the covariance that its derivatives along the directions add.

    The factor is upper triangular.
    """
    state, tangent = value_and_moves(start, u0, directions)
    return square(widen(state, tangent.mean))
