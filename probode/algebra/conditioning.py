"""The algebra of a step in square-root form: predict a Gaussian state, and condition it on a linearised equation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .coordinates import Conditional, from_coordinates, in_coordinates, updated_noise
from .linalg import eliminate, product, safe_norm, substitute
from .linearisation import Linearisation
from .normal import Normal, batched, pad, pad_rows


@batched
def predict(
    x: Normal, noise: Float[Array, "dim dim"], scale: Float[Array, ""], past: Conditional | None = None
) -> tuple[Normal, Conditional | None]:
    """The distribution of ``x`` plus independent noise ``N(0, scale^2 noise^T noise)``, with a triangular factor.

    ``noise``: upper triangular. ``past``: an earlier state given ``x``; it is returned given the new state.
    """
    upper, dense = _beside(scale * noise, x.factor, past)
    triangle, left = eliminate(upper, dense)
    dim = noise.shape[1]
    if past is not None:
        past = Conditional(past.shift, triangle[:, dim:], updated_noise(past, left))
    return Normal(x.mean, triangle[:, :dim]), past


class Influence(eqx.Module):
    """The effect of an equation on a state: innovation, gain and ``H``, whitened by the innovation covariance ``S``.

    ``whitened``: the innovation ``S^(-1/2) z``; ``gain``: the mean changes by ``-gain^T whitened``; ``matrix``:
    ``S^(-1/2) H``, for all rows of the state; ``weight``: one, or zero if the innovation must not enter statistics.
    Where an equation couples the batch elements, ``whitened`` is that of all equations, the same in each of them.
    """

    whitened: Float[Array, "*batch rows cols"]
    gain: Float[Array, "*batch rows dim"]
    matrix: Float[Array, "*batch rows dim"]
    weight: Float[Array, "*batch"]


class Update(eqx.Module):
    """The posterior of a state given an equation, and of an earlier state; ``S`` is the covariance of the innovation.

    ``state``: the posterior; ``past``: an earlier state given it, or ``None``; ``influence``: the effect of the
    equation. ``square``: ``z^T S^-1 z``. ``log_det``: the logarithm of the determinant of ``S^(1/2)`` in the directions
    in which ``z`` has a variance, and ``rank``, how many these are: where there is no noise there is no density. Where
    an equation couples the batch elements each has a share of these.
    """

    state: Normal
    past: Conditional | None
    influence: Influence
    square: Float[Array, "*batch"]
    log_det: Float[Array, "*batch"]
    rank: Float[Array, "*batch"]


class Joint(eqx.Module):
    """A square root of the joint covariance of an innovation, the predicted state, and an earlier state.

    Upper triangular in the columns of ``z``, of ``x'`` (the state without the entries that ``z`` replaces), and of
    ``w``, the earlier state's coordinates, if there is one::

               z        x'       w
        [ S^(1/2)     gain     ...  ]   triangle
        [    0     posterior   ...  ]
        [    0         0      noise ]   left

    Where the equation gives several derivatives in terms of each other, ``x'`` has sums of ``u, ..., u^(k+L)`` instead
    of these, and their own columns stand between ``x'`` and ``w``, of the posterior and of the gain alike.

    ``inverse``: the matrix from ``z`` to the entries that it replaces; ``None`` if they are derivatives that the
    equation gives explicitly. ``carried``: how many columns there are between ``x'`` and ``w``.
    """

    triangle: Float[Array, "*batch n width"]
    left: Float[Array, "*batch rows extra"]
    inverse: Float[Array, "*batch dim m"] | None
    carried: int = eqx.field(static=True, default=0)


class CoupledJoint(eqx.Module):
    """The predicted state, an earlier one given it, and what an equation that couples the batch elements says of them.

    ``root``: of the covariance of the residual; ``given``: right square roots of the covariances of the coordinates of
    the elements, given the equation. See ``Coupling``.
    """

    predicted: Normal
    past: Conditional | None
    root: Float[Array, "d d"]
    given: Float[Array, "blocks p p"]


def join(
    x: Normal,
    noise: Float[Array, "*batch dim dim"],
    scale: Float[Array, "*batch"],
    equation: Linearisation,
    past: Conditional | None = None,
) -> Joint | CoupledJoint:
    """The joint square root of ``z``, the predicted state and an earlier one, as ``condition`` takes it.

    The predicted state is ``x`` plus noise with the square root ``scale * noise``. ``past``: an earlier state given
    ``x``.
    """
    if (coupling := equation.coupling) is None:
        return _join(x, noise, scale, equation, past)
    predicted, past = predict(x, noise, scale, past)
    p = equation.matrix.shape[-1]
    roots = predicted.factor[..., :p, :p]
    return CoupledJoint(predicted, past, coupling.root(roots), coupling.conditioned(roots))


@batched
def _join(
    x: Normal,
    noise: Float[Array, "dim dim"],
    scale: Float[Array, ""],
    equation: Linearisation,
    past: Conditional | None = None,
) -> Joint:
    """The joint square root of ``z``, the predicted state and an earlier one, by the one elimination of a step.

    The predicted state is ``x`` plus noise with the square root ``scale * noise``. The columns of the stacked square
    root ``[x.factor; scale noise]`` are changed to ``(z, all other derivatives)``. Then it has full column rank if the
    noise has, and its triangle holds the innovation's factor, the cross-covariance and, in the trailing block, the
    posterior's factor. With the columns of ``past`` beside it, the same elimination conditions the earlier state. The
    residual is not needed.
    """
    h, noise, dim = equation.matrix, scale * noise, x.mean.shape[0]
    m, p = h.shape
    if equation.gives is None:
        inverse, kept = _replacement(equation, noise)

        def beside(factor):
            return jnp.concatenate([product(factor[:, :p], h.T), factor * kept[None]], axis=1)

        upper, dense = _beside(jnp.zeros((m + dim, m + dim), noise.dtype), beside(x.factor), past, beside(noise))
        if equation.noise is not None:
            upper, dense = _beside(upper, dense, None, equation.noise)
        return Joint(*eliminate(upper, dense, in_every_step=True), inverse)

    k = p - m
    mix, carried = (_mixture(equation, noise), p) if equation.is_coupled else (None, 0)

    def change_columns(factor):
        leading = factor[:, :p]
        kept = leading[:, :k] if mix is None else product(leading, mix)
        return jnp.concatenate([product(leading, h.T), kept, factor[:, p:], leading[:, :carried]], axis=1)

    changed = change_columns(noise)
    # Noise of derivatives above those given does not enter z and stays triangular; that of derivatives below them is
    # dense in the columns of z, and would break the triangle.
    upper = jnp.concatenate([changed[k:p], jnp.zeros((k, dim + carried), noise.dtype), changed[p:]])
    upper, dense = _beside(upper, change_columns(x.factor), past, changed[:k])
    triangle, left = eliminate(upper, dense, in_every_step=True)
    return Joint(triangle, left[:, carried:], None, carried)


def condition(
    joint: Joint | CoupledJoint, x: Normal, equation: Linearisation, past: Conditional | None = None
) -> Update:
    """The posterior distribution of a state given that a linearised equation holds, from their joint square root.

    ``x``: the prediction, of which the mean is used. ``past``: as for ``join``. The posterior's factor has
    ``dim - equation.num_replaced`` rows; zeros are appended where ``x.factor`` has more, so that loops keep their
    shapes.
    """
    if isinstance(joint, CoupledJoint):
        return _condition_coupled(joint, x, equation)
    return _condition(joint, x, equation, past)


def _condition_coupled(joint, x, equation):
    coupling, root, rows = equation.coupling, joint.root, x.factor.shape[-2]
    (blocks, d, p), dim = coupling.matrix.shape, x.mean.shape[-2]
    whitened = substitute(root, coupling.flat(equation.residual))
    leading = joint.predicted.factor[..., :p, :p]
    # In the coordinates of the prediction, of which the first are in the equation.
    moved = -batched(product)(leading, coupling.adjoint(root, whitened))
    unchanged = jnp.broadcast_to(jnp.eye(dim, dtype=root.dtype), (blocks, dim, dim))
    moved = jnp.pad(moved, ((0, 0), (0, dim - p), (0, 0)))
    coordinates = Normal(moved, unchanged.at[:, :p, :p].set(joint.given))
    state = from_coordinates(coordinates, Normal(x.mean, joint.predicted.factor))
    past = None if joint.past is None else in_coordinates(joint.past, coordinates)
    gain = coupling.adjoint(root, jnp.eye(d, dtype=root.dtype))
    gain = jax.vmap(lambda r, a: product(product(r[:p, :p], a).T, r[:p]))(joint.predicted.factor, gain)
    observed = jax.vmap(lambda h: jnp.pad(substitute(root, h), ((0, 0), (0, dim - p))))(coupling.matrix)
    influence = Influence(coupling.for_each(whitened), gain, observed, jnp.ones(blocks, root.dtype))
    pivots = coupling.split(jnp.diagonal(root)[:, None])[..., 0]  # zero at places without an equation
    square = jnp.broadcast_to(jnp.sum(whitened**2) / blocks, (blocks,))
    return Update(pad(state, rows), past, influence, square, *_density(pivots))


def _density(pivots):
    """The sum of the logarithms of the pivots of a root that are not zero, and how many these are."""
    has_density = pivots != 0
    log_det = jnp.sum(jnp.log(jnp.where(has_density, jnp.abs(pivots), 1)), axis=-1)
    return log_det, jnp.sum(has_density, axis=-1, dtype=log_det.dtype)


@batched
def _condition(joint: Joint, x: Normal, equation: Linearisation, past: Conditional | None = None) -> Update:
    triangle, dim, h = joint.triangle, x.mean.shape[0], equation.matrix
    m, p = h.shape
    n = triangle.shape[0]

    def all_columns(rows, own):
        # The entries that z replaces follow from z = H x. `own` are the columns of z in the same rows.
        if joint.carried:
            return jnp.concatenate([rows[:, dim - m :], rows[:, p - m : dim - m]], axis=1)
        if joint.inverse is not None:
            missing = own - product(rows[:, :p], h.T)
            return rows + product(missing, joint.inverse.T)
        k = p - m
        return jnp.concatenate([rows[:, :k], own - product(rows[:, :k], h[:, :k].T), rows[:, k:]], axis=1)

    end = n + joint.carried
    whitened = substitute(triangle[:m, :m], equation.residual)
    gain = all_columns(triangle[:m, m:end], triangle[:m, :m])
    factor = all_columns(triangle[m:, m:end], jnp.zeros((n - m, m), gain.dtype))
    state = Normal(x.mean - product(gain.T, whitened), factor)
    if past is not None:
        shift = past.shift - product(triangle[:m, end:].T, whitened)
        cross = pad_rows(triangle[m:, end:], x.factor.shape[0])
        past = Conditional(shift, cross, updated_noise(past, joint.left))
    observed = jnp.pad(substitute(triangle[:m, :m], h), ((0, 0), (0, dim - p)))
    influence = Influence(whitened, gain, observed, jnp.ones((), gain.dtype))
    density = _density(jnp.diagonal(triangle)[:m])
    return Update(pad(state, x.factor.shape[0]), past, influence, jnp.sum(whitened**2), *density)


def _mixture(equation, noise):
    """Weights of sums of ``u, ..., u^(k+L)`` that determine all of these, given an equation between them.

    Given ``z`` they are determined by ``u, ..., u^(k-1)``, but not in floating-point numbers: a stiff field multiplies
    round-off in ``u`` by ``J`` again with every derivative. So the elimination has the sums, ``k`` for each component,
    in which every derivative counts by its noise, and carries the columns of the derivatives themselves along. What it
    leaves of these below its triangle is round-off then: in a stiff direction ``u`` is, and the highest derivative is
    not.
    """
    m, p = equation.matrix.shape
    blocks = p // (m // len(equation.gives))
    size, k = p // blocks, blocks - len(equation.gives)
    std = lax.stop_gradient(safe_norm(noise[:, :p], axis=0))
    weights = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1), 1)
    # The powers of an eigenvalue with negative real part alternate in sign, and so their sum does not cancel.
    j = np.arange(blocks)
    signs = (-1.0) ** j * np.cos(np.pi * np.arange(k)[:, None] * (j + 0.5) / blocks)
    mix = jnp.kron(jnp.asarray(signs.T, noise.dtype), jnp.eye(size, dtype=noise.dtype))
    return weights[:, None] * mix


def _replacement(equation, noise):
    """A matrix ``B`` with ``H B = I``, and a vector that is zero where a row of ``B`` is not, and one elsewhere.

    These rows are the entries of the state that ``z`` replaces.

    Gauss-Jordan elimination, in which the pivot of a row is its entry with most noise. Given an exact equation the
    covariance of the state is singular; as many entries as the equation has rows are left out, so that no singular
    matrix is triangularised. An equation with noise replaces none.
    """
    (m, p), dim = equation.matrix.shape, noise.shape[1]
    if equation.noise is not None:
        return jnp.zeros((dim, m), noise.dtype), jnp.ones(dim, noise.dtype)
    size = lax.stop_gradient(safe_norm(noise, axis=0))[:p]

    def step(carry, i):
        h, solved, chosen = carry
        j = jnp.argmax(jnp.abs(h[i]) * size)
        # An equation between entries without variance replaces none of them: its pivot would be zero.
        empty = h[i, j] * size[j] == 0
        pivot = jnp.where(empty, jnp.inf, h[i, j])
        row, row_solved, column = h[i] / pivot, solved[i] / pivot, h[:, j].at[i].set(0)
        h = (h - column[:, None] * row[None]).at[i].set(row)
        solved = (solved - column[:, None] * row_solved[None]).at[i].set(row_solved)
        return (h, solved, chosen.at[i].set(jnp.where(empty, dim, j))), None

    init = equation.matrix, jnp.eye(m, dtype=noise.dtype), jnp.zeros(m, int)
    (_, solved, chosen), _ = lax.scan(step, init, jnp.arange(m))
    inverse = jnp.zeros((dim, m), noise.dtype).at[chosen].set(solved, mode="drop")
    return inverse, jnp.ones(dim, noise.dtype).at[chosen].set(0, mode="drop")


def _beside(upper, dense, past, more=None):
    """The stack ``[upper; dense]`` with the columns of ``past`` appended, and the rows ``more``, padded with zeros."""
    if past is not None:
        upper = jnp.pad(upper, ((0, 0), (0, past.cross.shape[1])))
        dense = jnp.concatenate([dense, past.cross], axis=1)
    if more is not None:
        dense = jnp.concatenate([dense, jnp.pad(more, ((0, 0), (0, dense.shape[1] - more.shape[1])))])
    return upper, dense
