"""Residuals of an equation: what of them is round-off, and what they are where the prediction has been corrected.

A residual of the prediction tells how wrong the prediction was. What a step leaves wrong is seen from the residuals of
the corrected mean, its defects: at the end of the step they are what the linearisation left out, inside it they tell
whether the solution does something there that neither end shows.
"""

import dataclasses
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ..algebra.factorisations import Layout
from ..algebra.innovation import Innovation, noise_mean, smoothing_weights, whiten
from ..algebra.linalg import product, root_mean_square, safe_divide, safe_norm, substitute
from ..algebra.linearisation import Linearisation
from ..algebra.normal import Normal, batched, push
from ..equations.problems import flat_field, flat_residual
from ..information.constraints import AbstractConstraint
from ..priors.prior import AbstractPrior, AbstractSplitPrior
from .attempt import Attempt


# Where inside a step the equation is held against the mean, as a share of its length: about where the defect of a
# polynomial is largest, and no simple fraction, since a field with a period may vanish at both ends and half-way.
INSIDE = 0.6
# A residual is exact to so many units of round-off of its terms.
_ROUND_OFF = 8
# By how much noise exceeds the residuals of deviations that a restart took over (`with_scale_for`). A step takes away
# one part in the square of `_TO_SPARE` of a deviation; with 10 in place of 100, balls that bounce four times had lost a
# quarter of theirs. In `u` the noise of a step is at most the share `_LITTLE` of the deviation: without that limit, at
# loose tolerances, the covariance grows with every restart; it hardly matters between 0.03 and 0.3.
_TO_SPARE, _LITTLE = 100.0, 0.1


def residual_at(
    constraint: AbstractConstraint, t: Float[Array, ""], point: Normal, layout: Layout, args: PyTree
) -> Float[Array, "*batch m cols"]:
    """The residual that ``linearise`` has at a point, without a Jacobian where none is needed for it."""
    if not constraint.is_pointwise:
        return constraint.linearise(t, point, layout, args).residual
    problem = constraint.problem
    residual = flat_residual(problem, layout, args)(t, layout.unpack(point.mean))
    return layout.pack(jnp.reshape(residual, (problem.num_rows, -1)))


def without_round_off(equation: Linearisation, mean: Float[Array, "*batch dim cols"]) -> Linearisation:
    """The equation without residuals that are round-off."""
    # Residuals at round-off carry no information, but gain and scale of a short step grow like dt^-j for the j-th
    # derivative: they would ruin what is known of the high ones. Only the value is dropped, not its derivative.
    return eqx.tree_at(lambda e: e.residual, equation, _beyond_round_off(equation.residual, equation, mean))


def _beyond_round_off(z, equation, mean):
    small = jnp.abs(z) <= _ROUND_OFF * jnp.finfo(z.dtype).eps * terms(equation, mean)
    return z - lax.stop_gradient(jnp.where(small, z, 0))


def informative(equation: Linearisation, mean: Float[Array, "*batch dim cols"]) -> Bool[Array, ""]:
    """True if the residual exceeds the round-off of the terms that it sums; only then it enters a calibration."""
    floor = 100 * jnp.finfo(mean.dtype).eps * jnp.max(terms(equation, mean))
    return jnp.max(jnp.abs(equation.residual)) > floor


def terms(equation: Linearisation, mean: Float[Array, "*batch dim cols"]) -> Float[Array, "*batch m cols"]:
    """The size of the terms that a residual is the sum of, to first order: ``|H| |x|``.

    For a stiff field they are far larger than the derivative that they add up to, and so is their round-off.
    """
    return equation.sizes.times(jnp.abs(mean))


def with_floor(innovation: Innovation, equation: Linearisation, mean: Float[Array, "*batch dim cols"]) -> Innovation:
    """The same innovation with a local scale that at least explains the round-off of the residual.

    A residual that is zero is known to be small, not to be zero: without a floor a step is without any noise, and what
    a smoother makes of it is divided by zero.
    """
    std = safe_norm(innovation.factor, axis=-2)[..., None]
    unknown = safe_divide(_ROUND_OFF * jnp.finfo(std.dtype).eps * terms(equation, mean), std)
    if (coupling := equation.coupling) is None:
        floor = root_mean_square(unknown, axis=(-2, -1))
    else:
        floor = coupling.for_each(root_mean_square(coupling.flat(unknown)))
    floor = lax.stop_gradient(floor)
    # Divided by ``unit`` it must not overflow, as in single precision it might.
    floor = jnp.minimum(floor, innovation.unit * (jnp.finfo(std.dtype).max / 10))
    return dataclasses.replace(innovation, scale=jnp.maximum(innovation.scale, floor))


def with_defects(
    constraint: AbstractConstraint,
    prior: AbstractPrior,
    before: Normal,
    t: Float[Array, ""],
    dt: Float[Array, ""],
    attempt: Attempt,
    layout: Layout,
    args: PyTree,
) -> Attempt:
    """The attempt of a step of length ``dt`` to ``t`` with the residuals of the corrected mean in its innovation.

    Corrected under the noise of the step alone: ``m - Q H^T (H Q H^T)^-1 z`` at the end, and inside what the prior
    makes of the same noise, where the equation is evaluated once. The residual at the end is left out for an explicit
    equation with a partial Jacobian; otherwise it is evaluated ``constraint.evaluations`` times, each time after a
    correction by the one before (Newton's method with the Jacobian of the prediction).
    """
    transition, equation, innovation = attempt.transition, attempt.equation, attempt.innovation
    predicted = push(before, transition.matrix)
    weights = smoothing_weights(equation, innovation.factor, innovation.whitened)

    def residual(t, mean):
        z = residual_at(constraint, t, Normal(mean, predicted.factor), layout, args)
        return _beyond_round_off(z, equation, mean)

    time_inside, mean_inside = _mean_inside(prior, before, t, dt, transition, innovation, weights, layout)
    if not equation.whole and equation.gives is not None:
        inside = whiten(equation, innovation.factor, residual(time_inside, mean_inside))
        return dataclasses.replace(attempt, innovation=dataclasses.replace(innovation, inside=inside))

    def correct(mean, weights):
        return mean - noise_mean(transition.noise, transition.noise, innovation.factor, weights)

    corrected = correct(predicted.mean, weights)
    # Both at once: the equation is traced, and compiled, a single time.
    times, means = jnp.stack([time_inside, t]), jnp.stack([mean_inside, corrected])
    whitened = jax.vmap(lambda z: whiten(equation, innovation.factor, z))
    inside, remainder = whitened(jax.vmap(residual)(times, means))

    def again(carry):
        corrected, remainder = carry
        corrected = correct(corrected, smoothing_weights(equation, innovation.factor, remainder))
        return corrected, whiten(equation, innovation.factor, residual(t, corrected))

    _, remainder = constraint.iteration.repeat(again, (corrected, remainder))
    innovation = dataclasses.replace(innovation, inside=inside, remainder=remainder)
    return dataclasses.replace(attempt, innovation=innovation)


def defect_inside(
    constraint: AbstractConstraint,
    prior: AbstractPrior,
    before: Normal,
    t: Float[Array, ""],
    dt: Float[Array, ""],
    attempt: Attempt,
    layout: Layout,
    args: PyTree,
) -> Float[Array, " d"]:
    """By how much ``u^(k)`` of the corrected mean inside a step of length ``dt`` to ``t`` differs from the field there.

    For attempts with a correction: the mean inside is what the prior makes of the noise given the last residual.
    """
    transition, equation, innovation, correction = (
        attempt.transition,
        attempt.equation,
        attempt.innovation,
        attempt.correction,
    )
    assert correction is not None and equation.gives is not None
    k = equation.gives.start
    if correction.split is not None:
        # Few attempts come here; an attempt has a split, but not its square root.
        assert isinstance(prior, AbstractSplitPrior)
        innovation = dataclasses.replace(innovation, factor=prior.split(dt, k, layout).root)
    whitened = batched(substitute)(innovation.factor, correction.residual)
    weights = smoothing_weights(equation, innovation.factor, whitened)
    time, mean = _mean_inside(prior, before, t, dt, transition, innovation, weights, layout)
    us = layout.unpack(mean)
    return us[k] - flat_field(constraint.problem, layout, args)(time, us[:k])


def _mean_inside(prior, before, t, dt, transition, innovation, weights, layout):
    """The time inside a step, and the mean there given the residual at its end that has these smoothing weights."""
    to_inside, to_end = prior.transition(INSIDE * dt, layout), prior.transition((1 - INSIDE) * dt, layout)
    share = (to_inside.magnitude / transition.magnitude) ** 2
    later = push(Normal(before.mean, to_inside.noise), to_end.matrix).factor
    noise = noise_mean(to_inside.noise, later, innovation.factor, weights)
    return t - (1 - INSIDE) * dt, push(before, to_inside.matrix).mean - share * noise


def scale_inside(innovation: Innovation, equation: Linearisation, layout: Layout) -> Float[Array, "*batch"]:
    """The maximum likelihood estimate of the output scale from the residual inside the step, given that at its end.

    Both are residuals of the corrected mean.
    """
    order = max(1, equation.matrix.shape[-1] // layout.identity().shape[-1] - 1)
    share = _std_inside(max(0, layout.num_derivatives - order))
    return innovation.size_inside / share


@ft.cache
def _std_inside(m: int) -> float:
    """Standard deviation of an ``m`` times integrated Wiener process at ``INSIDE``, given that at 1, over that at 1.

    Its covariance is ``int_0^min(s,t) ((s - x) (t - x))^m dx / m!^2``; the bridge has ``C(s,s) - C(s,1)^2 / C(1,1)``.
    """
    here = np.poly1d([-1, INSIDE]) ** m
    both = (here * np.poly1d([-1, 1]) ** m).integ()(INSIDE)
    own, whole = INSIDE ** (2 * m + 1) / (2 * m + 1), 1 / (2 * m + 1)
    return float(np.sqrt((own - both**2 / whole) / whole))


def with_scale_for(
    innovation: Innovation,
    equation: Linearisation,
    noise: Float[Array, "*batch dim dim"],
    inherited: Float[Array, "*batch rows dim"],
) -> Innovation:
    """The innovation with a scale that explains the residuals of all ``inherited`` deviations with much to spare.

    Behind a restart the derivatives move with an uncertain ``u`` as the equation wants it, up to the highest that a
    state has. In the next steps there is a residual for every such deviation, the truncation error of its Taylor
    polynomial, and none of it is due to noise. If it were not small beside the noise, that of the mean would be taken
    for data about ``u``: the mean would move by up to its standard deviation, and the covariance vanish.

    ``noise``: of the step. In ``u`` it stays small beside the deviations.
    """

    @batched
    def needed(equation, factor, noise, inherited):
        (m, p), width = equation.matrix.shape, inherited.shape[0]
        whitened = substitute(factor, product(equation.matrix, inherited[:, :p].T))
        most = safe_divide(safe_norm(inherited[:, :width], axis=0), safe_norm(noise[:, :width], axis=0))
        return jnp.minimum(_TO_SPARE * safe_norm(whitened, axis=(0, 1)) / m**0.5, _LITTLE * jnp.max(most))

    # Where a direction has no noise, no scale explains anything.
    scale = lax.stop_gradient(needed(equation, innovation.factor, noise, inherited))
    scale = jnp.where(jnp.isfinite(scale), scale, 0)
    return dataclasses.replace(innovation, scale=jnp.maximum(innovation.scale, scale))


def with_scale_inside(innovation: Innovation, inside: Float[Array, "*batch"]) -> Innovation:
    """The innovation with the scale found inside the step where the residual at its end vanished.

    The polynomial of the prediction may satisfy an equation by accident, as that of ``u' = v`` in the first step from
    exact derivatives, where ``v`` itself is wrong: a scale of round-off would call such a component exact.
    """
    scale = jnp.where(innovation.is_zero, jnp.maximum(innovation.scale, inside), innovation.scale)
    return dataclasses.replace(innovation, scale=scale)
