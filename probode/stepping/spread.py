"""The spread of an uncertain start in the steps of a solve: the directions in which its mean may move.

Each step pushes them forward with the gain of the mean, so that its length can be chosen for them as well: the mean may
be at rest where they are not.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..algebra.conditioning import Influence, Update
from ..algebra.factorisations import Layout
from ..algebra.innovation import whiten
from ..algebra.linalg import detach, kron_apply_right, product, root_mean_square, safe_norm
from ..algebra.linearisation import Linearisation
from ..algebra.normal import Normal, batched, certain, push
from ..information.constraints import AbstractConstraint
from .attempt import Attempt
from .residuals import residual_at


def value_and_moves(fn: Callable[[PyTree], PyTree], u0: PyTree, directions: PyTree) -> tuple[PyTree, PyTree]:
    """``fn(u0)``, and how it moves along each of the directions, along a leading axis."""

    # One and the same run gives values and tangents: what is at round-off differs between compiled programs.
    def along(direction):
        return eqx.filter_jvp(fn, (u0,), (direction,))

    return eqx.filter_vmap(along, out_axes=(None, eqx.if_array(0)))(directions)


class PredictedSpread(eqx.Module):
    """The spread of an uncertain start where the transition of a step takes it, before the equation is seen.

    ``moves``: the directions; ``residuals``: how the residual moves along them, ``whitened`` by ``(H Q H^T)^(-1/2)``;
    ``scale``: that of a noise which explains all of them.
    """

    moves: Float[Array, "N *state"]
    residuals: Float[Array, "N *residual"]
    whitened: Float[Array, "N *rows"]
    scale: Float[Array, "*batch"]


def predicted_spread(
    constraint: AbstractConstraint,
    t: Float[Array, ""],
    x: Normal,
    spread: Float[Array, "N *state"],
    attempt: Attempt,
    layout: Layout,
    args: PyTree,
) -> PredictedSpread:
    """The spread of an uncertain start at the prediction of an attempt from ``x`` to ``t``.

    ``spread``: where the step starts.
    """
    matrix, equation = attempt.transition.matrix, attempt.equation
    moves, predicted = push_moves(spread, matrix), push(x, matrix)
    if equation.whole:
        residuals = jax.vmap(equation.times)(moves)
    else:

        def residual(mean):
            return residual_at(constraint, t, Normal(mean, predicted.factor), layout, args)

        residuals = jax.vmap(lambda move: jax.jvp(residual, (predicted.mean,), (move,))[1])(moves)
    whitened = jax.vmap(lambda z: whiten(equation, attempt.innovation.factor, z))(residuals)
    scale = safe_norm(root_mean_square(whitened, axis=(-2, -1)), axis=0)
    return PredictedSpread(moves, residuals, whitened, scale)


def push_moves(spread: Float[Array, "N *state"], matrix: Float[Array, "..."]) -> Float[Array, "N *state"]:
    """The directions after a transition: ``A`` times each of them."""
    return jax.vmap(lambda move: push(certain(move), matrix).mean)(spread)


def spread_after(predicted: PredictedSpread, update: Update, equation: Linearisation) -> Float[Array, "N *state"]:
    """The directions after an update: each moves by the gain of the mean times its own residual."""
    influence = update.influence
    if equation.coupling is not None:

        def together(move):
            told = jnp.sum(batched(product)(influence.matrix, move), axis=0)
            return move - jax.vmap(lambda gain: product(gain.T, told))(influence.gain)

        return jax.vmap(together)(predicted.moves)

    @batched
    def after(move, z, gain, matrix, equation):
        m, p = equation.matrix.shape
        if equation.whole:
            told = product(matrix, move)
        else:
            # S^(-1/2) from S^(-1/2) H, where H says nothing about how the field moves.
            if equation.gives is None:
                told = product(product(matrix[:, :p], jnp.linalg.pinv(equation.matrix)), z)
            else:
                told = product(matrix[:, p - m : p], equation.solve_for_given(z))
        return move - product(gain.T, told)

    along = jax.vmap(after, in_axes=(0, 0, None, None, None))
    return along(predicted.moves, predicted.residuals, influence.gain, influence.matrix, equation)


@batched
def push_rows(rows: Float[Array, "rows dim"], matrix: Float[Array, "p p"]) -> Float[Array, "rows dim"]:
    """Rows of a square root after a transition, without derivatives."""
    return detach(kron_apply_right(rows, matrix))


@batched
def inherited_after(rows: Float[Array, "rows dim"], influence: Influence) -> Float[Array, "rows dim"]:
    """Rows of a square root after an update, each as ``spread_after`` has a direction, without derivatives."""
    return detach(rows - product(product(rows, influence.matrix.T), influence.gain))
