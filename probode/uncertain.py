"""Uncertain initial values: how the posterior moves with them, to first order.

A state that is uncertain at ``t0`` must not simply enter the filter: that would explain the residuals of its own
truncation errors by moving the initial value. Instead the solve at the mean is differentiated along the rows of the
factor, and what this adds to the covariance is kept apart: on a linear equation it is the exact push-forward. The
steps have to be short enough for the directions, too, which may move where the mean is at rest: so the state of such a
solve has its spread, the directions pushed forward with the gains of the steps.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .calibration import AbstractCalibration
from .checks import as_float
from .constraints import AbstractConstraint
from .factorisations import AbstractFactorisation, Layout
from .gaussians import Innovation, Linearisation, Normal, Update, batched, certain, push, square
from .linalg import product, root_mean_square, safe_norm, substitute
from .problems import AbstractProblem
from .residuals import residual_at
from .solution import Solution, Spread, widen


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
    return eqx.tree_at(
        lambda s: (s.marginals, s.state.current.spread, s.spread),
        solution,
        (
            widen(solution.marginals, means),
            tangent.state.current.distribution.mean,
            Spread(means, tangent.trajectory),
        ),
        is_leaf=lambda x: x is None,
    )


def spread_start(start: Callable[[PyTree], Normal], u0: PyTree, directions: PyTree) -> Normal:
    """The state at ``u0`` with how it moves along the directions added to its covariance, triangular."""
    state, tangent = value_and_moves(start, u0, directions)
    return square(widen(state, tangent.mean))


def value_and_moves(fn: Callable[[PyTree], PyTree], u0: PyTree, directions: PyTree) -> tuple[PyTree, PyTree]:
    """``fn(u0)``, and how it moves along each of the directions, along a leading axis."""

    # One and the same run gives values and tangents: what is at round-off differs between compiled programs.
    def along(direction):
        return eqx.filter_jvp(fn, (u0,), (direction,))

    return eqx.filter_vmap(along, out_axes=(None, eqx.if_array(0)))(directions)


class Ahead(eqx.Module):
    """The spread of an uncertain start where the transition of a step takes it, before the equation is seen.

    ``moves``: the directions; ``residuals``: how the residual moves along them, ``whitened`` by ``(H Q H^T)^(-1/2)``;
    ``scale``: that of a noise which explains all of them.
    """

    moves: Float[Array, "N *state"]
    residuals: Float[Array, "N *residual"]
    whitened: Float[Array, "N *residual"]
    scale: Float[Array, "*batch"]


def spread_ahead(
    constraint: AbstractConstraint,
    t: Float[Array, ""],
    x: Normal,
    spread: Float[Array, "N *state"],
    matrix: Float[Array, "..."],
    equation: Linearisation,
    innovation: Innovation,
    layout: Layout,
    args: PyTree,
) -> Ahead:
    """Of a step from ``x`` to ``t`` with this transition ``matrix``, and the equation about its prediction."""
    moves, predicted = push_moves(spread, matrix), push(x, matrix)
    if equation.whole:
        p = equation.matrix.shape[-1]
        residuals = jax.vmap(lambda move: batched(product)(equation.matrix, move[..., :p, :]))(moves)
    else:

        def residual(mean):
            return residual_at(constraint, t, Normal(mean, predicted.factor), layout, args)

        residuals = jax.vmap(lambda move: jax.jvp(residual, (predicted.mean,), (move,))[1])(moves)
    whitened = jax.vmap(batched(substitute), in_axes=(None, 0))(innovation.factor, residuals)
    scale = safe_norm(root_mean_square(whitened), axis=0)
    return Ahead(moves, residuals, whitened, scale)


def push_moves(spread: Float[Array, "N *state"], matrix: Float[Array, "..."]) -> Float[Array, "N *state"]:
    """The directions where a transition takes them."""
    return jax.vmap(lambda move: push(certain(move), matrix).mean)(spread)


def spread_after(ahead: Ahead, update: Update, equation: Linearisation) -> Float[Array, "N *state"]:
    """The directions after an update, with the gain of the mean."""
    influence, whole, block = update.influence, equation.whole, equation.block

    @batched
    def after(move, z, gain, matrix, h):
        m, p = h.shape
        if whole:
            told = product(matrix, move)
        else:
            # S^(-1/2) from S^(-1/2) H, where H says nothing about how the field moves.
            root = matrix[:, p - m : p] if block is not None else product(matrix[:, :p], jnp.linalg.pinv(h))
            told = product(root, z)
        return move - product(gain.T, told)

    along = jax.vmap(after, in_axes=(0, 0, None, None, None))
    return along(ahead.moves, ahead.residuals, influence.gain, influence.matrix, equation.matrix)
