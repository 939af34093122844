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
from .linalg import product, safe_norm, safe_sqrt, substitute
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


def predicted_spread(spread: Float[Array, "N *state"], matrix: Float[Array, "..."]) -> Float[Array, "N *state"]:
    """The directions where the transition ``matrix`` takes them."""
    return jax.vmap(lambda move: push(certain(move), matrix).mean)(spread)


def residual_moves(
    constraint: AbstractConstraint,
    t: Float[Array, ""],
    predicted: Normal,
    equation: Linearisation,
    spread: Float[Array, "N *state"],
    layout: Layout,
    args: PyTree,
) -> Float[Array, "N *residual"]:
    """How the residual of a prediction moves along its directions."""
    if equation.whole:
        p = equation.matrix.shape[-1]
        return jax.vmap(lambda move: batched(product)(equation.matrix, move[..., :p, :]))(spread)

    def residual(mean):
        return residual_at(constraint, t, Normal(mean, predicted.factor), layout, args)

    return jax.vmap(lambda move: jax.jvp(residual, (predicted.mean,), (move,))[1])(spread)


def whitened_moves(
    innovation: Innovation, moves: Float[Array, "N *residual"]
) -> tuple[Float[Array, "N *residual"], Float[Array, "*batch"]]:
    """``(H Q H^T)^(-1/2)`` times how the residual moves, and the scale of the noise that explains all of it."""
    whitened = jax.vmap(batched(substitute), in_axes=(None, 0))(innovation.factor, moves)
    return whitened, safe_norm(safe_sqrt(jnp.mean(whitened**2, axis=(-2, -1))), axis=0)


def spread_after(
    update: Update, equation: Linearisation, spread: Float[Array, "N *state"], moves: Float[Array, "N *residual"]
) -> Float[Array, "N *state"]:
    """The directions after an update whose gain is that of the mean; ``moves`` as in ``residual_moves``."""

    @batched
    def root(matrix, equation):
        # S^(-1/2) from S^(-1/2) H.
        m, p = equation.shape
        return matrix[:, p - m : p] if known else product(matrix[:, :p], jnp.linalg.pinv(equation))

    @batched
    def after(move, z, gain, root):
        return move - product(gain.T, product(root, z))

    known, influence = equation.block is not None, update.influence
    inverse = root(influence.matrix, equation.matrix)
    return jax.vmap(after, in_axes=(0, 0, None, None))(spread, moves, influence.gain, inverse)
