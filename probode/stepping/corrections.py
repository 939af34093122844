"""The evaluations of a step with ``TS0`` of a lifted equation, and the error that they leave.

The right-hand sides are evaluated at a point and held constant, first at the prediction. Their residual corrects
``u, ..., u^(k-1)``, and each further evaluation, at the corrected point, replaces them. The corrections tell what is
left: their moves fall geometrically, and rules of different order for the same residual differ by the error of the
coarser one. Where all highest derivatives are given, and nothing else was uncertain, the last correction is the update
of the step, and under a local calibration this error is carried along the solution and makes the covariance. Elsewhere
it serves the error estimate alone, and the step conditions on the equation as on any other.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..algebra.conditioning import Update
from ..algebra.coordinates import Conditional
from ..algebra.derivatives import (
    NoiseSplit,
    Remainder,
    condition_on_derivatives,
    condition_with_remainder,
    moved_by,
    weighted,
)
from ..algebra.innovation import Innovation, explained, explained_by_leading
from ..algebra.linalg import safe_divide, safe_norm, substitute
from ..algebra.linearisation import Linearisation
from ..algebra.normal import Normal, batched, certain, push
from ..algebra.transition import Transition
from .attempt import Attempt, Correction
from .state import State


# What is not known of an error that has been estimated by extrapolation, as a share of it (chosen on the problems of
# ``benchmarks.calibration --lifted``).
_DOUBT = 0.5


def correct(
    evaluate: Callable[[Normal], Array],
    evaluations: int,
    dt: Float[Array, ""],
    predicted: Normal,
    transition: Transition,
    equation: Linearisation,
    innovation: Innovation,
    split: NoiseSplit | None,
) -> Correction:
    """What ``evaluations`` of an equation make of the lower derivatives of a prediction.

    - ``evaluate``: the residual at a point, at the end of the step.
    - ``equation``: the first evaluation, at the prediction, with its ``innovation``.
    - ``split``: the noise of the step, where the equation gives all highest derivatives.
    """
    assert equation.gives is not None
    size = equation.residual.shape[-2] // len(equation.gives)
    lower = equation.gives.start * size
    mean = predicted.mean
    if split is None:
        rows, factor = equation.residual.shape[-2] - size, innovation.factor

        def move(z):
            return explained(transition, equation, factor, batched(substitute)(factor, z))[..., :lower, :]

        def rules(z):
            moved = move(z)
            if rows == 0:
                return moved, moved, None
            z = batched(substitute)(factor, z)
            return moved, moved - explained_by_leading(transition, equation, factor, z, rows)[..., :lower, :], None
    else:

        def move(z):
            return weighted(z, split.gain)

        def rules(z):
            # All at once: the price of an attempt is that of its instructions.
            weights = split.gain, split.gain - split.embedded, split.gain - split.coarser
            return jnp.split(weighted(z, jnp.concatenate(weights)), 3, axis=-2)

    z, point, corrections = equation.residual, mean, [jnp.zeros((), mean.dtype)]
    # Without elimination there is little to compile in an evaluation, and a loop costs more than it.
    for _ in range(evaluations - 1):
        corrections.append(move(z))
        # Right-hand sides depend on the lower derivatives alone. With the others as predicted the residual is that of
        # the prediction with these right-hand sides: the next correction starts from the prediction again.
        point = jnp.concatenate([mean[..., :lower, :] - corrections[-1], mean[..., lower:, :]], axis=-2)
        z = evaluate(Normal(point, predicted.factor))
    moved, embedded, coarser = rules(z)
    moves = [b - a for a, b in itertools.pairwise([*corrections, moved])]
    remainder = None if split is None else _remainder(mean, size, dt, moves, embedded, coarser)
    return Correction(moves[-1], embedded, z, point, split, remainder)


def _remainder(mean, size, dt, moves, embedded, coarser):
    """What an attempt leaves wrong in the lower derivatives: the iteration, extrapolated, and the rule.

    ``moves``: by which each evaluation has moved them.
    """
    last = moves[-1]
    relative = safe_divide(jnp.stack([*moves[-2:], embedded, coarser]), _sizes(mean, last.shape[-2], size, dt))
    *of_moves, of_embedded, of_coarser = safe_norm(relative, tuple(range(1, relative.ndim)))
    # Moves d, r d, r^2 d, ...: what follows the last sums up to r / (1 - r) times it.
    rate = jnp.minimum(safe_divide(of_moves[1], of_moves[0]), 0.5) if len(moves) > 1 else 0.5
    iteration = rate / (1 - rate) * last
    # Errors of rules whose orders differ by one have about the same ratio.
    rule = jnp.minimum(safe_divide(of_embedded, of_coarser), 1) * embedded
    round_off = jnp.finfo(mean.dtype).eps * jnp.abs(mean[..., : last.shape[-2], :])
    # The first move is that of the rule: the rate of the iteration itself is known from the third evaluation on.
    doubt = _DOUBT if len(moves) > 2 else 1.0
    return Remainder(iteration + rule, safe_norm(jnp.stack([doubt * iteration, doubt * rule, round_off]), 0))


def condition_corrected(
    evaluate: Callable[[Normal], Array],
    matrix: Float[Array, "*batch p p"],
    before: State,
    dt: Float[Array, ""],
    attempted: Attempt,
    scale: Float[Array, "*batch"],
    past: Conditional | None,
    *,
    is_local: bool,
) -> tuple[Update, Linearisation, Float[Array, "*batch rows cols"]]:
    """The update of an attempt that has a ``split``, its equation, and ``State.global_error`` after it.

    - ``evaluate``: the residual at a point, at the end of the step; ``matrix``: of the transition.
    - ``before``: the state where the step starts, in which only the lower derivatives are uncertain.
    - ``is_local``: that of the calibration. If it is, covariances are made of what the evaluations leave wrong,
      otherwise of the noise of the prior with the output ``scale``.
    """
    correction = attempted.correction
    assert correction is not None and correction.split is not None
    split, residual = correction.split, correction.residual
    lower, k = correction.last_change.shape[-2], split.gain.shape[-2]
    size = lower // k
    # Only the lower derivatives move the lower ones: the others were certain.
    rows = matrix.shape[-1] * lower // before.distribution.mean.shape[-2]
    block = matrix[..., :rows, :rows]
    start = Normal(before.distribution.mean[..., :lower, :], before.distribution.factor[..., :lower])
    given = attempted.mean, push(start, block).factor, split, scale, residual
    equation = dataclasses.replace(attempted.equation, residual=residual)
    if not is_local:
        return condition_on_derivatives(*given, past), equation, before.global_error
    remainder = correction.remainder
    assert remainder is not None
    if not before.carries_error:
        # Data move a state, and would have to move the carried error likewise. What the step leaves counts as unknown.
        remainder = Remainder(remainder.error, safe_norm(jnp.stack([remainder.std, remainder.error]), 0))
        update = condition_with_remainder(*given, remainder, None, jnp.ones((), scale.dtype), past)
        return update, equation, before.global_error
    error = push(certain(before.global_error), matrix).mean
    alone = push(certain(before.global_error[..., :lower, :]), block).mean
    error = error - moved_by(split, _residual_along(evaluate, error, size, dt, correction, start.factor))
    # By how much the error has grown in the step, relative to the solution: so does what is not known of it. (Before
    # and after the field acts: the transition has moved the factor already.)
    old, new = (
        safe_norm(safe_divide(x[..., :lower, :], _sizes(mean, lower, size, dt)))
        for x, mean in ((alone, before.distribution.mean), (error, attempted.mean))
    )
    growth = jnp.where(old > 0, safe_divide(new, old), 1)
    error = jnp.concatenate([error[..., :lower, :] + remainder.error, error[..., lower:, :]], axis=-2)
    return condition_with_remainder(*given, remainder, error, growth, past), equation, error


def _residual_along(evaluate, direction, size, dt, correction, factor):
    """How the residual of the last evaluation changes along a direction: a difference quotient.

    One more evaluation, where a derivative costs as much as two or three; and the gradient of a solve needs no second
    derivatives of the series then.
    """
    sizes = _sizes(correction.point, correction.last_change.shape[-2], size, dt)
    longest = jnp.max(safe_divide(jnp.abs(direction[..., : sizes.shape[-2], :]), sizes))
    # A relative change near the square root of round-off, where truncation and cancellation are about equal.
    wanted = jnp.full_like(longest, jnp.finfo(longest.dtype).eps ** 0.4)
    length = lax.stop_gradient(jnp.where(longest > 0, safe_divide(wanted, longest), 1))
    return (evaluate(Normal(correction.point + length * direction, factor)) - correction.residual) / length


def _sizes(mean, lower, size, dt):
    """``|u^(i)| + |dt u^(i+1)|`` of the lower derivatives: to what their errors are relative."""
    return jnp.abs(mean[..., :lower, :]) + jnp.abs(dt * mean[..., size : size + lower, :])
