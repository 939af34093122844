"""How long a step is: the first one, where the next attempt goes, and the size of its error.

What the controller decides from an error is in ``controllers``; this is what the loop asks for around it.
"""

import dataclasses
import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..algebra.conditioning import Influence
from ..algebra.factorisations import Layout
from ..algebra.innovation import explained
from ..algebra.linalg import product, root_mean_square, safe_divide, safe_norm
from ..algebra.normal import batched, push
from ..estimation.initialisation import AbstractInitialisation
from ..information.constraints import AbstractConstraint
from ..priors.prior import AbstractPrior
from .attempt import Attempt
from .controllers import AbstractController
from .error_estimates import AbstractErrorEstimate
from .events import Events
from .loops import AbstractLoop
from .progress import AbstractProgress
from .spread import PredictedSpread
from .state import State
from .times import Interval, round_off


# The largest share of the way to the next stop that a first step takes unless the user says how long it is; and where
# by its derivatives the solution does not move at all, so that they say nothing about how long a step may be.
_LARGEST_SHARE, _BLIND_SHARE = 1 / 4, 1 / 50
# How many times as long as the step before a step may be.
_GROWTH = 3.0


class Control(eqx.Module):
    """The parts of a solver that choose the steps, and who is told how far they got.

    ``initialisation``: how derivatives are computed behind a jump, as at ``t0``. ``must_hit``: further times that must
    be hit, at which nothing happens to the equation: those of data. ``halve_before_hit``: whether two equal steps go to
    a time that must be hit, not a whole one and what is left. ``refuses_unexplained``: whether a step is refused whose
    residual the output scale does not explain. ``events``: if there are any.
    """

    error: AbstractErrorEstimate
    controller: AbstractController
    loop: AbstractLoop
    initialisation: AbstractInitialisation
    progress: AbstractProgress | None = None
    must_hit: Float[Array, " times"] | None = None
    halve_before_hit: bool = eqx.field(static=True, default=False)
    refuses_unexplained: bool = eqx.field(static=True, default=False)
    events: Events | None = None

    def stops(self, dtype: DTypeLike) -> Float[Array, " times"] | None:
        """The times at which the equation may jump, if there are any: the controller's, and known times of events."""
        known = None if self.events is None else self.events.times
        stops = [x.astype(dtype) for x in (self.controller.limits.stops, known) if x is not None and x.size]
        return jnp.concatenate(stops) if stops else None

    @property
    def jumps(self) -> bool:
        """Whether the state may be restarted in the course of a solve."""
        resets = self.events is not None and self.events.resets
        return resets or self.stops(self.controller.limits.stops.dtype) is not None


@functools.cache
def sustained_share(num_derivatives: int, order: int) -> float:
    """The length of later steps divided by that of a first step from exact derivatives, at the same error.

    In the steps of a filter each prediction rests on derivatives that are estimates themselves. Where ``u^(nu+1)`` is
    constant and the steps are equal, the residual grows to ``K`` times that of the first, and the error with it. To the
    same error belongs a step shorter by ``K^(-1/(nu+1))``: by 0.44 for ``nu = 6``. A first step as long as it could be
    is followed by a row of very short ones, until the derivatives have recovered.

    For ``m = nu + 1 - order``, the equation observes the last but ``m - 1`` of the derivatives, an integrated Wiener
    process whose ``m``-th differences are a moving average with the polynomial ``prod (1 - r_i B)``, ``r_i`` the roots
    in (-1, 0) of the Eulerian polynomial of degree ``2m - 2`` (Schoenberg 1973, "Cardinal Spline Interpolation"). The
    differences are ``h^m`` then, the innovations ``h^m / prod (1 - r_i)``, the first one ``h^m / m!``.
    """
    m = num_derivatives + 1 - order
    eulerian = np.ones(1)
    for n in range(2, 2 * m):
        k = np.arange(n)
        eulerian = (k + 1) * np.append(eulerian, 0) + (n - k) * np.append(0, eulerian)
    roots = np.roots(eulerian).real
    growth = math.factorial(m) / np.prod(1 - roots[np.abs(roots) < 1])
    return float(growth ** (-1 / (num_derivatives + 1)))


def first_step(
    control: Control, state: State, prior: AbstractPrior, span: Float[Array, ""], constraint: AbstractConstraint
) -> Float[Array, ""]:
    """The length, positive, of the first step, from the derivatives at the start, whatever the unit of time.

    ``span``: the signed time to the next stop, or to the end.

    With ``c_k`` the size of ``u^(k) / k!`` against the tolerances, the first term that the Taylor polynomial leaves out
    is extrapolated geometrically, ``c_(nu+1) = c_nu^2 / c_(nu-1)``; its residual reaches the tolerance in a step that
    later ones can keep up with, or what is left of the last term kept. At most the time in which ``u`` changes by its
    own size, and a share of the span: derivatives at one point do not know what happens elsewhere. A prior that does
    not extrapolate by the polynomial, but returns to its mean, is followed no further than it agrees with it.
    """
    # The lowest derivative that the equation gives.
    order = min(constraint.order, constraint.problem.num_initial_values)
    nu, (u0, *_) = state.layout.num_derivatives, (u := state.layout.unpack(state.distribution.mean))
    weight = control.controller.tolerances.weight(jnp.abs(u0))
    weight = jnp.where(weight > 0, weight, jnp.max(weight))
    c = [control.error.norm(safe_divide(u[k], weight) / math.factorial(k)) for k in range(nu + 1)]
    extrapolated = safe_divide(c[nu - 1] ** (1 / (nu + 1)), c[nu] ** (2 / (nu + 1)))
    kept = safe_divide(jnp.ones_like(c[nu]), c[nu] ** (1 / nu))
    direction, span = jnp.where(span < 0, -1, 1), jnp.abs(span)
    term = jnp.maximum(extrapolated, kept)
    # The residual of the term h^(nu+1) is as many times larger.
    residual = math.comb(nu + 1, order) ** (1 / (nu + 1))
    # Where all derivatives are observed there is nothing to recover.
    term = term * (1 if state.derivatives_known else sustained_share(nu, order)) / residual
    # The size of a solution below the tolerance says nothing: it may be the round-off of zero.
    candidates = jnp.stack([term, jnp.where(c[0] >= 1, safe_divide(c[0], c[1]), 0)])
    dt = jnp.min(jnp.where((candidates > 0) & jnp.isfinite(candidates), candidates, span))
    moves = sum(c[k] * span**k for k in range(1, nu + 1)) > 1
    dt = jnp.minimum(dt, jnp.where(moves, _LARGEST_SHARE, _BLIND_SHARE) * span)
    if prior.is_polynomial:
        return dt

    def departs(dt):
        matrix = prior.transition(direction * dt, state.layout).matrix
        predicted = state.layout.unpack(push(state.distribution, matrix).mean)[0]
        polynomial = sum((direction * dt) ** k / math.factorial(k) * u[k] for k in range(nu + 1))
        return control.error.norm((predicted - polynomial) / weight) > 1

    return lax.while_loop(lambda dt: departs(dt) & (dt > 1e-12 * span), lambda dt: dt / 2, lax.stop_gradient(dt))


def trusted(proposed: Float[Array, ""], dt: Float[Array, ""]) -> Float[Array, ""]:
    """The proposed length of the step after one of length ``dt``, at most three times as long.

    Where nothing happens the error is zero and says nothing about how far it stays so: with an evaluation at the end of
    a step and one inside, steps that are three times as long as the last leave no larger gaps between two evaluations
    than a Runge-Kutta method whose steps grow tenfold.
    """
    return jnp.minimum(proposed, _GROWTH * dt)


def shortest_near_zero(first: Float[Array, ""]) -> Float[Array, ""]:
    """The length below which a step near ``t = 0`` is hopeless, from that of a solve's first attempt.

    Near zero the times are as dense as floating-point numbers are, and would let steps shrink for hundreds of attempts.
    """
    limits = jnp.finfo(first.dtype)
    return lax.stop_gradient(jnp.maximum(limits.eps**2 * first, limits.tiny))


def bounded_step(control: Control, dt: Float[Array, ""]) -> Float[Array, ""]:
    """A first step within the bounds of the controller."""
    limits = control.controller.limits
    return jnp.clip(dt, limits.shortest.astype(dt.dtype), limits.longest.astype(dt.dtype))


def next_time(
    control: Control, t: Array, dt: Array, interval: Interval, smallest: Array, target: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Where the next attempt goes: its time and signed length, whether it was cut to hit a time, the shortest length.

    The step reaches for the next time that must be hit; it is stretched, or divided in two equal ones, never followed
    by a sliver of round-off. ``smallest``: the shortest length where ``t = 0``; elsewhere it is a few units of
    round-off of ``t``. ``target``: the time of an event that was found, or infinite. The length is the difference of
    two times that have been rounded, and never zero.
    """
    eps = jnp.finfo(t.dtype).eps
    floor = jnp.maximum(4 * eps * jnp.abs(t), smallest)
    target = None if target is None else target[None]
    hits = [x.astype(t.dtype) for x in (control.stops(t.dtype), control.must_hit, target) if x is not None]
    hit = interval.nearest(jnp.concatenate(hits), t) if hits else interval.t1
    room = interval.signed(hit - t)
    floor = jnp.maximum(floor, control.controller.limits.shortest.astype(t.dtype))
    dt = jnp.maximum(dt, floor)
    slack = round_off(jnp.maximum(jnp.abs(t), jnp.abs(hit)))
    # A step that is stretched by more could be rejected, shortened and stretched again for ever.
    to_the_end = dt >= room - jnp.minimum(slack, dt / 1024)
    half = lax.stop_gradient(room / 2)
    in_two = ~to_the_end & (dt > half) & (half >= floor)
    if not control.halve_before_hit:
        in_two = in_two & (dt > room - slack)
    dt = jnp.where(in_two, half, dt)
    new_t = jnp.where(to_the_end, hit, t + interval.signed(dt))
    # Not `dt`: the vector field is evaluated at the times, so the step has to lie between them.
    return new_t, new_t - t, to_the_end | in_two, lax.stop_gradient(floor)


def error_norm(control: Control, layout: Layout, now: State, dt: Array, attempted: Attempt) -> Float[Array, ""]:
    """The norm of an attempt's estimated error over the tolerances; infinite where anything is not finite."""
    error = _estimated(control, layout, dt, attempted)
    norm = _against_tolerances(control, layout, now.distribution.mean, attempted.mean, error)
    finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(attempted.mean))
    return jnp.where(finite, norm, jnp.inf)


def defect_norm(
    control: Control, layout: Layout, now: State, dt: Array, attempted: Attempt, defect: Float[Array, " d"]
) -> Float[Array, ""]:
    """The size of what a defect of ``u^(k)`` inside a step does to ``u`` if it stays so, against the tolerances."""
    assert attempted.equation.gives is not None
    k = attempted.equation.gives.start
    error = jnp.abs(dt) ** k / math.factorial(k) * jnp.abs(defect)[None]
    norm = _against_tolerances(control, layout, now.distribution.mean, attempted.mean, error)
    return jnp.where(jnp.isfinite(norm), norm, jnp.inf)


def unexplained_norm(
    control: Control, layout: Layout, now: State, attempted: Attempt, influence: Influence
) -> Float[Array, ""]:
    """The norm, in tolerances, of the part of an update of ``u`` that the noise of the step does not explain.

    The error estimates look at the noise of a step alone, as if the state before were known. Where the prior's scale
    does not follow the residuals, a residual that it does not expect is explained by moving the past instead.
    """
    if (unexplained := attempted.unexplained) is None:
        innovation = attempted.innovation
        expected = explained(attempted.transition, attempted.equation, innovation.factor, innovation.whitened)
        moved = batched(lambda gain, z: product(gain.T, z))(influence.gain, influence.whitened)
        unexplained = moved - expected
    beyond = layout.unpack(unexplained)[:1]
    return _against_tolerances(control, layout, now.distribution.mean, attempted.mean, beyond)


def spread_norm(
    control: Control, layout: Layout, now: State, dt: Array, attempted: Attempt, predicted: PredictedSpread
) -> Float[Array, ""]:
    """The size of what an attempt does wrong to the spread of an uncertain initial value, against the tolerances.

    The error is estimated for every direction, with the residual along it in place of that of the mean, and these are
    added in squares. A component counts against ``atol + rtol`` times the largest of its sizes and its standard
    deviations, at both ends of the step.
    """

    def estimate(whitened):
        scale = root_mean_square(whitened, axis=(-2, -1))
        innovation = dataclasses.replace(attempted.innovation, whitened=whitened, scale=scale)
        if control.error.needs_defects:
            nothing = jnp.zeros_like(whitened)
            innovation = dataclasses.replace(innovation, inside=nothing, remainder=nothing)
        attempt = dataclasses.replace(attempted, innovation=innovation)
        if attempted.correction is not None:
            # The whole correction: how far further evaluations would move a direction is not known.
            move = explained(attempted.transition, attempted.equation, innovation.factor, whitened)
            move = move[..., : attempted.correction.last_change.shape[-2], :]
            corrected = dataclasses.replace(attempted.correction, last_change=move, embedded=jnp.zeros_like(move))
            attempt = dataclasses.replace(attempt, correction=corrected)
        return _estimated(control, layout, dt, attempt)

    def std(spread):
        return safe_norm(jax.vmap(layout.unpack)(spread), axis=0)

    error = safe_norm(jax.vmap(estimate)(predicted.whitened), axis=0)
    widths = std(now.spread), std(predicted.moves)
    norm = _against_tolerances(control, layout, now.distribution.mean, attempted.mean, error, widths)
    return jnp.where(jnp.isfinite(norm), norm, jnp.inf)


def _estimated(control, layout, dt, attempted):
    """The local error of ``u``, or of ``u, u', ...``, one row each."""
    return jnp.reshape(control.error.estimate(attempted, dt, layout), (-1, layout.size))


def _against_tolerances(control, layout, before, after, error, widths=()):
    sizes = [jnp.abs(x[: error.shape[0]]) for x in (layout.unpack(before), layout.unpack(after), *widths)]
    weight = control.controller.tolerances.weight(functools.reduce(jnp.maximum, sizes))
    # Without an absolute tolerance a component that is zero, and stays zero, has no error.
    error = jnp.where(error == 0, 0, error / weight)
    # A norm of a user's own expects the components of u where nothing but u has an error.
    return control.error.norm(error[0] if error.shape[0] == 1 else error)


def tolerance_in_range(control: Control, u: Float[Array, " d"]) -> Bool[Array, ""]:
    """Whether the tolerances at ``u`` are so large that variances of such errors do not underflow in its dtype.

    In double precision the factors of covariances are not scaled before they are squared, which would cost 4 to 8 % of
    a step. Errors of 1e-154 are seen as zero then. Components that are zero have no error to be seen.
    """
    weight = control.controller.tolerances.weight(jnp.abs(u))
    return jnp.all((weight >= smallest_error(u.dtype)) | (u == 0))


def smallest_error(dtype: Any) -> float:
    """The size of errors below which their covariances underflow."""
    limits = np.finfo(dtype)
    return float(1e6 * limits.tiny**0.5 if limits.bits >= 64 else 1e3 * limits.tiny)
