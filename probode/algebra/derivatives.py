"""Conditioning on the highest derivatives of a step, where all that was uncertain before is uncertain in the others.

The residual ``z`` of the derivatives ``u^(k), ..., u^(nu)`` is then the noise of the step in them, with its sign
changed: what it says of ``u, ..., u^(k-1)`` is the regression of one part of the noise on the other, by a matrix that
depends on the length of the step alone. For an integrated Wiener process these are the weights of the two-point Hermite
quadrature (for ``k = 1`` and ``nu = 1`` those of the trapezoidal rule: Schober, Sarkka, Hennig 2019, "A probabilistic
model for the numerical solution of initial value problems").

Axes: ``k`` lower derivatives, ``m = nu + 1 - k`` highest, ``s`` rows of the layout for each, hence ``ks`` and ``ms``
rows of them.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .conditioning import Influence, Update, predict
from .coordinates import Conditional
from .innovation import Innovation
from .linalg import kron_apply, root_mean_square, safe_divide, substitute, triangularise
from .normal import Normal, batched, pad_rows


class NoiseSplit(eqx.Module):
    """The noise of a step as that of the highest derivatives, and that of the lower ones given these.

    With the prior's own output scale, and without the ``magnitude`` of its ``Transition``.

    - ``gain``: the regression of ``u, ..., u^(k-1)`` on the highest derivatives, the same for all components.
    - ``embedded``: the weights of the rule that leaves out ``u^(nu)``, whose column is zero; ``coarser``: of the one
      that leaves out ``u^(nu-1)`` as well.
    - ``root``: upper triangular right square root of the covariance of the highest derivatives; ``log_det``: the
      logarithm of its determinant.
    - ``whitener``: a matrix ``W`` such that ``kron(W, F^-T) z`` is ``root^-T z``.
    - ``scale``: the right square root ``F`` of the covariance between components.
    - ``rest``: upper triangular right square root of the covariance of the lower derivatives given the highest.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS0(probode.ODE(lambda t, u, args: -u).lifted(1)))
    >>> probode.IWP(2).split(jnp.array(1.0), 1, solver.init(1.0, 0.0).layout).gain  # h / 2 and -h^2 / 12
    Array([[ 0.5       , -0.08333333]], dtype=float64)
    """

    gain: Float[Array, "k m"]
    embedded: Float[Array, "k m"]
    coarser: Float[Array, "k m"]
    root: Float[Array, "*batch ms ms"]
    log_det: Float[Array, "*batch"]
    whitener: Float[Array, "m m"]
    scale: Float[Array, "*batch s s"]
    rest: Float[Array, "*batch ks ks"]

    def whiten(self, z: Float[Array, "*batch ms cols"]) -> Float[Array, "*batch ms cols"]:
        """The residual in units of the standard deviations of the noise, ``root^-T z``."""

        @batched
        def of_one(scale, z):
            blocks = jnp.reshape(kron_apply(self.whitener, z), (-1, scale.shape[0], z.shape[1]))
            columns = jnp.reshape(jnp.moveaxis(blocks, 1, 0), (scale.shape[0], -1))
            blocks = jnp.reshape(substitute(scale, columns), (scale.shape[0], *blocks.shape[::2]))
            return jnp.reshape(jnp.moveaxis(blocks, 0, 1), z.shape)

        return of_one(self.scale, z)


def innovate_derivatives(
    split: NoiseSplit, residual: Float[Array, "*batch ms cols"], unit: Float[Array, "*batch"]
) -> Innovation:
    """The ``Innovation`` of the highest derivatives, whose noise reaches all of them."""
    whitened = split.whiten(residual)
    return Innovation(split.root, whitened, root_mean_square(whitened, axis=(-2, -1)), unit)


def condition_on_derivatives(
    mean: Float[Array, "*batch dim cols"],
    factor: Float[Array, "*batch rows ks"],
    split: NoiseSplit,
    scale: Float[Array, "*batch"],
    residual: Float[Array, "*batch ms cols"],
    past: Conditional | None = None,
) -> Update:
    """The update of a step whose highest derivatives are all observed, with the ``residual`` that they have.

    ``mean``: as predicted; ``factor``: of the lower derivatives, in which alone the state before the step was
    uncertain, without the noise of the step. ``scale``: the output scale.
    """

    @batched
    def of_one(mean, factor, rest, scale, residual, past):
        ms, ks = residual.shape[0], rest.shape[0]
        mean = mean - moved_by(split, residual)
        at, past = predict(Normal(mean[:ks], factor), rest, scale, past)
        return Normal(mean, pad_rows(jnp.pad(at.factor, ((0, 0), (0, ms))), factor.shape[0])), past

    state, past = of_one(mean, factor, split.rest, scale, residual, past)
    return _update(state, past, split, scale, residual)


def influence_of_derivatives(
    split: NoiseSplit, scale: Float[Array, "*batch"], residual: Float[Array, "*batch ms cols"]
) -> Influence:
    """The ``Influence`` of the residual of the highest derivatives."""

    @batched
    def of_one(root, scale, whitened):
        ms = root.shape[0]
        ks = ms // split.gain.shape[1] * split.gain.shape[0]
        gain = scale * jnp.concatenate([kron_apply(split.gain, root.T).T, root], axis=1)
        observed = substitute(root, jnp.eye(ms, dtype=root.dtype))
        observed = jnp.pad(observed, ((0, 0), (ks, 0)))
        return Influence(safe_divide(whitened, scale), gain, safe_divide(observed, scale), jnp.ones_like(scale))

    return of_one(split.root, scale, split.whiten(residual))


def _update(state, past, split, scale, residual):
    rows, has_noise = residual.shape[-2], scale != 0
    # Only the influence needs the root itself: XLA drops it where none is kept.
    log_det = split.log_det + rows * jnp.log(jnp.where(has_noise, jnp.abs(scale), 1))
    influence = influence_of_derivatives(split, scale, residual)
    square = jnp.sum(influence.whitened**2, axis=(-2, -1))
    rank = rows * has_noise.astype(scale.dtype)
    return Update(state, past, influence, square, jnp.where(has_noise, log_det, 0), rank)


class Remainder(eqx.Module):
    """What a step leaves wrong in ``u, ..., u^(k-1)``: estimated with its sign, and the size of what is not known.

    ``error``: the estimated error of the mean; ``std``: the standard deviation of that estimate.
    """

    error: Float[Array, "*batch ks cols"]
    std: Float[Array, "*batch ks cols"]


def condition_with_remainder(
    mean: Float[Array, "*batch dim cols"],
    factor: Float[Array, "*batch rows ks"],
    split: NoiseSplit,
    scale: Float[Array, "*batch"],
    residual: Float[Array, "*batch ms cols"],
    remainder: Remainder,
    error: Float[Array, "*batch dim cols"] | None,
    growth: Float[Array, ""],
    past: Conditional | None = None,
) -> Update:
    """The update of a step as in ``condition_on_derivatives``, with a covariance from the errors of its evaluations.

    The noise of the prior does not contain what holding the field constant leaves out. So the lower derivatives have
    the covariance ``F^T F + e e^T`` instead: ``e`` is the estimated ``error`` of all steps so far, carried along the
    solution; ``F^T F`` is the covariance of that estimate, multiplied by ``growth`` squared in the step, plus the
    variance of the ``remainder`` of this one. In ``factor`` the rows of ``F`` come first, and those of ``e`` behind
    them. Without an ``error`` all rows are those of ``F``.
    """

    @batched
    def of_one(mean, before, residual, std, error, past):
        ms, ks = residual.shape[0], std.shape[0]
        mean = mean - moved_by(split, residual)
        known = past
        if past is not None and error is not None:
            known = Conditional(past.shift, past.cross[:ks], past.noise)
        noise = jnp.diag(root_mean_square(std, axis=(-1,)))
        rows = before.shape[0] if error is None else ks
        at, known = predict(Normal(mean[:ks], growth * before[:rows]), noise, jnp.ones_like(growth), known)
        factor = at.factor
        if error is not None:
            factor = jnp.concatenate([factor, error_rows(error[:ks])])
            if past is not None and known is not None:
                known = Conditional(known.shift, jnp.concatenate([known.cross, past.cross[ks:]]), known.noise)
        factor = pad_rows(jnp.pad(factor, ((0, 0), (0, ms))), before.shape[0])
        return Normal(mean, factor), known

    state, past = of_one(mean, factor, residual, remainder.std, error, past)
    return _update(state, past, split, scale, residual)


def error_rows(error: Float[Array, "ks cols"]) -> Float[Array, "rows ks"]:
    """A right square root of ``e e^T``, or of its mean over columns that share a covariance."""
    ks, cols = error.shape
    if cols == 1:
        return error.T
    rows = error.T / math.sqrt(cols)
    return root_mean_square(error, axis=(-1,))[None] if ks == 1 else triangularise(None, rows)


def weighted(z: Float[Array, "*batch ms cols"], weights: Float[Array, "k m"]) -> Float[Array, "*batch ks cols"]:
    """The sums over derivatives ``kron(weights, I) z``, with the same weights for all components."""
    return batched(lambda z: kron_apply(weights, z))(z)


def moved_by(split: NoiseSplit, z: Float[Array, "*batch ms cols"]) -> Float[Array, "*batch dim cols"]:
    """What the noise of a step explains of the residual ``z`` of its highest derivatives, subtracted from the mean."""
    return jnp.concatenate([weighted(z, split.gain), z], axis=-2)
