"""How a state is restarted at a time at which the equation jumps.

What is known of ``u, .., u^(k-1)`` stays, the higher derivatives are those of the equation behind the jump: the state
is initialised again, as one that depends on ``u`` to first order (``u + du`` has the derivatives ``x + M du``).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..algebra.coordinates import Conditional, root_of_sum
from ..algebra.factorisations import Layout
from ..algebra.linalg import eliminate, product, triangularise
from ..algebra.normal import Normal, batched, pad, pad_rows
from ..estimation.initialisation import AbstractInitialisation
from ..information.constraints import AbstractConstraint
from .spread import value_and_moves


def starts_uncertain(
    constraint: AbstractConstraint, initialisation: AbstractInitialisation, layout: Layout, args: PyTree
) -> bool:
    """Whether derivatives are unknown where a state is initialised, so that its factor needs all its rows."""
    u = jnp.zeros((constraint.problem.num_initial_values, layout.size), layout.dtype)
    t = jnp.zeros((), layout.dtype)
    start = eqx.filter_eval_shape(initialisation.initialise, constraint.problem, t, u, layout, args)
    return start.factor.shape[-2] > 0


def restart(
    constraint: AbstractConstraint,
    initialisation: AbstractInitialisation,
    t: Float[Array, ""],
    x: Normal,
    past: Conditional | None,
    layout: Layout,
    args: PyTree,
) -> tuple[Normal, Conditional | None]:
    """The state with the derivatives of the equation at ``t``, and the ``past`` of ``x`` in its coordinates."""
    start, moves = _start_and_moves(constraint, initialisation, t, x, layout, args)
    if start.factor.shape[-2] == 0:
        # All that is uncertain is u: whatever its coordinates are, they are those of the new state.
        return Normal(start.mean, _moved(moves, x.factor)), past
    factor, past = _with_unknown(moves, x.factor, start.factor, past)
    return pad(Normal(start.mean, factor), x.factor.shape[-2]), past


def _start_and_moves(constraint, initialisation, t, x, layout, args):
    """The state at the mean of ``u``, and the matrix ``(*batch, dim, width)`` by which it moves with ``u``.

    Derivatives must move with ``u`` exactly as the linearised equation says. Otherwise the filter takes the mismatch
    for data about ``u``, and its variance shrinks step by step, falsely. So if the linearisation does not depend on
    ``u``, as in ``TS0``, neither do the derivatives; if the factorisation keeps a part of the Jacobian, they move by
    the powers of that part.
    """
    problem, u = constraint.problem, layout.unpack(x.mean)[: constraint.problem.num_initial_values]
    k, d = u.shape

    def start(u):
        return initialisation.initialise(problem, t, u, layout, args)

    if constraint.first_order and layout.couples:
        state, tangent = value_and_moves(start, u, jnp.reshape(jnp.eye(k * d, dtype=u.dtype), (k * d, k, d)))
        moves = jnp.reshape(jax.vmap(layout.unpack)(tangent.mean), (k * d, -1))
        return state, layout.broadcast(moves.T)
    state = start(u)
    dim, cols = x.mean.shape[-2], layout.identity().shape[-1]
    if not constraint.first_order:
        return state, layout.broadcast(jnp.eye(dim, k * cols, dtype=u.dtype))
    certain = Normal(state.mean, jnp.zeros((*state.mean.shape[:-1], dim), u.dtype))
    equation = constraint.linearise(t, certain, layout, args)
    known = jnp.all(layout.std(state.factor) == 0, axis=1)
    moves = batched(lambda equation: _powers(equation, dim, cols, k))(equation)
    return state, moves * layout.broadcast(jnp.repeat(known, cols).astype(u.dtype)[:, None])


def _powers(equation, dim, cols, k):
    """How all derivatives move with the first ``k`` if the equation holds at all times."""
    width, matrix = k * cols, equation.matrix
    rows = jnp.eye(width, dtype=matrix.dtype)
    if equation.gives is None:
        told = -product(jnp.linalg.pinv(matrix[:, width:]), matrix[:, :width])
    else:
        told = -equation.solve_for_given(matrix[:, :width])
    rows = jnp.concatenate([rows, told])[:dim]
    while told.shape[0] and rows.shape[0] < dim:
        rows = jnp.concatenate([rows, product(told[:cols], rows[-width:])])
    return pad_rows(rows, dim)


def displaced(
    x: Normal, z: Float[Array, "k d"], saltation: Float[Array, "k d k d"], past: Conditional | None, layout: Layout
) -> tuple[Normal, Conditional | None]:
    """A state with other ``u, ..., u^(k-1)``, which move with the old ones, and the ``past`` in its coordinates.

    Where the components of ``u`` are independent, each keeps its own coordinates, and what comes to it from others is
    noise. ``saltation``: the derivative of the new ones. The higher derivatives are as they were.
    """
    k, d = z.shape
    mean = layout.pack(layout.unpack(x.mean).at[:k].set(z))
    if layout.couples:
        whole = jnp.reshape(saltation, (k * d, k * d))
        return Normal(mean, x.factor.at[:, : k * d].set(product(x.factor[:, : k * d], whole.T))), past
    moved, i = jnp.einsum("milj,jrl->ijrm", saltation, x.factor[..., :k]), np.arange(d)
    own, others = moved[i, i], jnp.reshape(moved.at[i, i].set(0), (d, -1, k))
    factor, past = _with_noise(x.factor, own, others, past)
    return Normal(mean, factor), past


@batched
def _with_noise(factor, own, others, past):
    """The factor of a state whose first entries have other rows, and independent noise; the past in its coordinates."""
    k, rows = own.shape[1], own
    if past is not None:
        rows = jnp.concatenate([own, past.cross], axis=1)
    none = jnp.zeros((others.shape[0], rows.shape[1] - k), factor.dtype)
    rows = jnp.concatenate([rows, jnp.concatenate([others, none], axis=1)])
    triangle, left = eliminate(jnp.zeros((k, rows.shape[1]), factor.dtype), rows)
    new = jnp.zeros_like(factor).at[:k, :k].set(triangle[:, :k])
    if past is not None:
        cross = pad_rows(triangle[:, k:], factor.shape[0])
        past = Conditional(past.shift, cross, root_of_sum(past.noise, left))
    return new, past


@batched
def _moved(moves: Float[Array, "dim width"], factor: Float[Array, "rows dim"]) -> Float[Array, "rows dim"]:
    return product(factor[:, : moves.shape[1]], moves.T)


@batched
def _with_unknown(moves, factor, unknown, past):
    """The factor of a state that moves with ``u`` and has unknown derivatives, and the past in its coordinates."""
    width, u = moves.shape[1], factor[:, : moves.shape[1]]
    if past is not None:
        u = jnp.concatenate([u, past.cross], axis=1)
    triangle, left = eliminate(jnp.zeros((width, u.shape[1]), u.dtype), u)
    noise = triangularise(None, unknown.at[:, :width].set(0))[width:]
    new = jnp.concatenate([product(triangle[:, :width], moves.T), noise])
    if past is not None:
        past = Conditional(past.shift, pad_rows(triangle[:, width:], factor.shape[0]), root_of_sum(past.noise, left))
    return new, past
