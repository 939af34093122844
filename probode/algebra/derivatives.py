"""Conditioning on the highest derivatives of a step, where all that was uncertain before is uncertain in the others.

The residual ``z`` of the derivatives ``u^(k), ..., u^(nu)`` is then the noise of the step in them, with its sign
changed: what it says of ``u, ..., u^(k-1)`` is the regression of one part of the noise on the other, by a matrix that
depends on the length of the step alone. For an integrated Wiener process these are the weights of the two-point Hermite
quadrature (for ``k = 1`` and ``nu = 1`` those of the trapezoidal rule: Schober, Sarkka, Hennig 2019, "A probabilistic
model for the numerical solution of initial value problems").

Axes: ``k`` lower derivatives, ``m = nu + 1 - k`` highest, ``s`` rows of the layout for each.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .conditioning import Influence, Innovation, Update, predict
from .coordinates import Conditional
from .linalg import kron_apply, product, root_mean_square, safe_divide, substitute, triangularise
from .normal import Normal, batched, pad_rows


class NoiseSplit(eqx.Module):
    """The noise of a step, under an output scale of one, as that of the highest derivatives and the rest given these.

    - ``gain``: the regression of ``u, ..., u^(k-1)`` on the highest derivatives, the same for all components.
    - ``embedded``: likewise on all of these but the last, whose column is zero.
    - ``root``: upper triangular right square root of the covariance of the highest derivatives.
    - ``whitener``: a matrix ``W`` such that ``kron(W, F^-T) z`` is ``root^-T z``.
    - ``scale``: the right square root ``F`` of the covariance between components.
    - ``rest``: upper triangular right square root of the covariance of the lower derivatives given the highest.
    """

    gain: Float[Array, "k m"]
    embedded: Float[Array, "k m"]
    root: Float[Array, "*batch ms ms"]
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
    """The ``Innovation`` of the highest derivatives, as ``innovate`` returns it for any equation."""
    whitened = split.whiten(residual)
    return Innovation(split.root, whitened, root_mean_square(whitened, axis=(-2, -1)), unit)


def condition_on_derivatives(
    predicted: Normal,
    split: NoiseSplit,
    scale: Float[Array, "*batch"],
    residual: Float[Array, "*batch ms cols"],
    extra: Float[Array, "*batch ks ks"] | None,
    past: Conditional | None = None,
) -> Update:
    """The update of a step whose highest derivatives are all observed, with the ``residual`` that they have.

    ``predicted``: without the noise of the step, its factor with zeros in the columns of the highest derivatives.
    ``scale``: the output scale. ``extra``: right square root of a covariance that is added to that of the lower
    derivatives, if any.
    """
    whitened = split.whiten(residual)

    @batched
    def of_one(x, root, rest, scale, residual, whitened, extra, past):
        ms, ks = root.shape[0], rest.shape[0]
        lower = kron_apply_rows(split.gain, residual)
        mean = x.mean - jnp.concatenate([lower, residual])
        noise = scale * rest if extra is None else triangularise(scale * rest, extra)
        at, past = predict(Normal(mean[:ks], x.factor[:, :ks]), noise, jnp.ones_like(scale), past)
        factor = pad_rows(jnp.pad(at.factor, ((0, 0), (0, ms))), x.factor.shape[0])
        gain = scale * jnp.concatenate([kron_apply_rows(split.gain, root.T).T, root], axis=1)
        observed = substitute(root, jnp.eye(ms, dtype=root.dtype))
        observed = jnp.pad(observed, ((0, 0), (ks, 0)))
        influence = Influence(safe_divide(whitened, scale), gain, safe_divide(observed, scale), jnp.ones_like(scale))
        return Update(Normal(mean, factor), past, influence, scale * jnp.diagonal(root))

    return of_one(predicted, split.root, split.rest, scale, residual, whitened, extra, past)


@batched
def weighted(z: Float[Array, "ms cols"], weights: Float[Array, "k m"]) -> Float[Array, "ks cols"]:
    """The sum over derivatives ``kron(weights, I) z``."""
    return kron_apply_rows(weights, z)


def kron_apply_rows(a: Float[Array, "k m"], x: Float[Array, "ms cols"]) -> Float[Array, "ks cols"]:
    """``kron(a, I) x`` for a matrix that need not be square."""
    blocks = jnp.reshape(x, (a.shape[1], -1, x.shape[1]))
    return jnp.reshape(product(a, blocks), (-1, x.shape[1]))
