"""How long a step is: the first one, where the next attempt goes, and the size of its error.

What the controller decides from an error is in ``controllers``; this is what the loop asks for around it.
"""

import functools
import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .controllers import AbstractController
from .errors import AbstractErrorEstimate
from .factorisations import Layout
from .initialisation import AbstractInitialisation
from .linalg import safe_divide
from .loops import AbstractLoop
from .progress import AbstractProgress
from .steps import State, round_off


class Control(eqx.Module):
    """The parts of a solver that choose the steps, and who is told how far they got.

    ``initialisation``: how derivatives start anew at the controller's ``stop_at``. ``through``: further times that must
    be hit, at which nothing happens to the equation: those of data. ``in_two``: whether two equal steps go to a time
    that must be hit, not a whole one and what is left.
    """

    error: AbstractErrorEstimate
    controller: AbstractController
    loop: AbstractLoop
    initialisation: AbstractInitialisation
    progress: AbstractProgress | None = None
    through: Float[Array, " times"] | None = None
    in_two: bool = eqx.field(static=True, default=False)

    def stops(self, dtype) -> Float[Array, " times"] | None:
        """The times at which the equation may jump, if there are any."""
        stops = self.controller.stop_at
        return None if stops is None else stops.astype(dtype)


@functools.cache
def sustained_share(num_derivatives: int, order: int) -> float:
    """What share of a first step from exact derivatives later steps can sustain, at the same error.

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


def first_step(control: Control, state: State, span: Float[Array, ""], order: int) -> Float[Array, ""]:
    """A first step, in any unit of time, from the derivatives at hand, for an equation of that order.

    With ``c_k`` the size of ``u^(k) / k!`` against the tolerances, the first term that the Taylor polynomial leaves out
    is extrapolated geometrically, ``c_(nu+1) = c_nu^2 / c_(nu-1)``; its residual reaches the tolerance in a step that
    later ones can keep up with, or what is left of the last term kept. At most the time in which ``u`` changes by its
    own size. A first step that would reach the end takes it.
    """
    nu, (u0, *_) = state.layout.num_derivatives, (u := state.layout.unpack(state.distribution.mean))
    weight = _weight(control.controller, jnp.abs(u0))
    weight = jnp.where(weight > 0, weight, jnp.max(weight))
    c = [control.error.norm(safe_divide(u[k], weight) / math.factorial(k)) for k in range(nu + 1)]
    extrapolated = safe_divide(c[nu - 1] ** (1 / (nu + 1)), c[nu] ** (2 / (nu + 1)))
    kept = safe_divide(jnp.ones_like(c[nu]), c[nu] ** (1 / nu))
    span = jnp.abs(span)
    term = jnp.maximum(extrapolated, kept)
    # The residual of the term h^(nu+1) is as many times larger.
    residual = math.comb(nu + 1, order) ** (1 / (nu + 1))
    term = jnp.where(term < span, term * sustained_share(nu, order) / residual, term)
    candidates = jnp.stack([term, safe_divide(c[0], c[1])])
    dt = jnp.min(jnp.where((candidates > 0) & jnp.isfinite(candidates), candidates, span))
    return jnp.minimum(dt, span)


def bounded_step(control: Control, dt: Float[Array, ""]) -> Float[Array, ""]:
    """A first step within the bounds of the controller."""
    if control.controller.dt_min is not None:
        dt = jnp.maximum(dt, control.controller.dt_min.astype(dt.dtype))
    if control.controller.dt_max is not None:
        dt = jnp.minimum(dt, control.controller.dt_max.astype(dt.dtype))
    return dt


def indistinguishable(t: Float[Array, ""], span: Float[Array, ""]) -> Float[Array, ""]:
    """How far apart times near ``t`` may be and still be the same, in an interval of that length."""
    return jnp.maximum(round_off(t), round_off(span) * 1e-3)


def nearest(
    hits: Float[Array, " times"], t: Float[Array, ""], t1: Float[Array, ""], direction: Array, noise: Array
) -> Float[Array, ""]:
    """The first of the times behind ``t`` that a step must not cross, or ``t1``."""
    distance = (hits - t) * direction
    usable = (distance > noise) & ((t1 - hits) * direction > noise)
    return jnp.where(jnp.any(usable), hits[jnp.argmin(jnp.where(usable, distance, jnp.inf))], t1)


def next_time(
    control: Control, t: Array, dt: Array, t1: Array, direction: Array, t0: Array
) -> tuple[Array, Array, Array, Array]:
    """Where the next attempt goes: its time and signed length, whether it was cut to hit a time, the shortest length.

    The step reaches for the next time that must be hit; it is stretched, never followed by a sliver of round-off.
    """
    controller = control.controller
    noise = indistinguishable(t, t1 - t0)
    hits = [x.astype(t.dtype) for x in (control.stops(t.dtype), control.through) if x is not None]
    ahead = nearest(jnp.concatenate(hits), t, t1, direction, noise) if hits else t1
    room = (ahead - t) * direction
    floor = noise if controller.dt_min is None else jnp.maximum(noise, controller.dt_min.astype(t.dtype))
    to_the_end = dt >= room - noise
    cut = to_the_end
    if control.in_two:
        half = lax.stop_gradient(room / 2)
        in_two = ~to_the_end & (dt > half) & (half >= floor)
        dt, cut = jnp.where(in_two, half, dt), to_the_end | in_two
    new_t = jnp.where(to_the_end, ahead, t + direction * dt)
    signed = jnp.where(to_the_end, ahead - t, direction * dt)
    return new_t, signed, cut, lax.stop_gradient(floor)


def error_norm(control: Control, layout: Layout, now: State, dt: Array, attempted: Any) -> Float[Array, ""]:
    """The size of an attempt's error against the tolerances; infinite where anything is not finite."""
    before, after = (layout.unpack(mean)[0] for mean in (now.distribution.mean, attempted.mean))
    error = control.error.estimate(dt, attempted.transition, attempted.equation, attempted.innovation, layout)
    controller = control.controller
    size = jnp.maximum(jnp.abs(before), jnp.abs(after))
    weight = _weight(controller, size)
    # Without an absolute tolerance a component that is zero, and stays zero, has no error.
    scaled = jnp.where(error == 0, 0, error / weight)
    norm = control.error.norm(scaled)
    finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(attempted.mean))
    return jnp.where(finite, norm, jnp.inf)


def _weight(controller, size):
    return controller.atol.astype(size.dtype) + controller.rtol.astype(size.dtype) * size
