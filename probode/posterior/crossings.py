"""How often functions of an uncertain solution are expected to cross zero: Rice's formula along the kept steps.

For a Gaussian ``g`` with mean ``m``, standard deviation ``s`` and derivative ``g'``, the expected number of crossings
is the integral of ``E[|g'| | g = 0] phi(m / s) / s``. With ``z = m / s`` that is ``E|z' + r w| phi(z)``, where ``w`` is
standard normal and ``r`` the standard deviation of ``g'`` given ``g``, divided by ``s``. Between neighbouring points
``z`` is taken to be linear, so that crossings far sharper than a step are counted as well (Rice 1944, "Mathematical
analysis of random noise").
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from ..algebra.linalg import safe_divide, safe_norm
from ..algebra.marginals import root_of
from ..algebra.roots import along_step, points
from ..stepping.events import ZERO, Events, Happening
from .trajectory import Trajectory


# Into so many parts every step is divided; and so many steps are looked at together, if any of them is real.
_PARTS, _BLOCK = 16, 64
# So many derivatives at both ends make the course of the mean in a step.
_DERIVATIVES = 4


class _End(eqx.Module):
    """An end of a step: the derivatives of the mean, and the standard deviations of all functions there.

    ``std``: of the functions; ``std_of_rate``: of their time derivatives given that they are zero.
    """

    t: Float[Array, ""]
    us: Float[Array, "n d"]
    std: Float[Array, " functions"]
    std_of_rate: Float[Array, " functions"]


def expected_crossings(
    events: Events, path: Trajectory, moving: Trajectory | None, happenings: Happening, number: Array, at_event: Array
) -> Float[Array, " events"]:
    """The expected number of crossings of every function in the directions that count; NaN for known times.

    ``path``: the kept steps; ``moving``: how they move along the directions of an uncertain start, with a leading axis.
    ``number``: of the events that have happened; ``at_event``: whether one of them has ended the solve. Where a
    function is reset, or ends the solve, half of its crossing lies behind the last state, and is added; half of one is
    taken off where it starts at zero.
    """
    functions, t = events.places, path.rows.t
    counts = jnp.full(len(events.events), jnp.nan, t.dtype)
    if functions.size == 0:
        return counts
    rows, place = t.shape[0], jnp.arange(events.most)
    is_last = at_event & (place == number - 1)
    # Which functions are at their end with every event: none where it has not happened.
    left = jnp.any(happenings.happen * events.have_reset > 0, axis=1) | is_last
    left = (left & (place < number))[:, None] & (happenings.which[:, None] == jnp.asarray(functions, t.dtype))

    def step(i):
        i = jnp.minimum(i, rows - 2)
        real = path.reached[i + 1] & (t[i + 1] != t[i])
        starts = i == 0
        if path.rows.restarted is not None:
            starts = starts | path.rows.restarted[i]
        here = (happenings.t == t[i + 1]) | (is_last & (i + 1 == path.last))
        ends = jnp.any(left & here[:, None], axis=0)
        before, after = _end(events, path, moving, i), _end(events, path, moving, i + 1)
        return jnp.where(real, _in_step(events, path.layout_of(i + 1), before, after, starts, ends), 0)

    def block(total, i):
        some = jnp.any(path.reached[jnp.minimum(i + 1, rows - 1)] & (i < rows - 1))
        count = lambda i: jnp.sum(jnp.where((i < rows - 1)[:, None], jax.vmap(step)(i), 0), axis=0)  # noqa: E731
        return total + lax.cond(some, count, lambda i: jnp.zeros_like(total), i), None

    blocks = -(-(rows - 1) // _BLOCK)
    places = jnp.arange(blocks * _BLOCK).reshape(blocks, _BLOCK)
    total, _ = lax.scan(block, jnp.zeros(functions.size, counts.dtype), places)
    return counts.at[functions].set(total)


def _end(events, path, moving, i):
    layout, x, k = path.layout_of(i), path.marginal(i), events.problem.num_initial_values
    us = layout.unpack(x.mean)
    moves: tuple = ()
    n, d = us.shape
    if moving is not None:
        velocity = layout.pack(jnp.concatenate([us[1:], jnp.zeros_like(us[:1])]))

        def along(tangent):
            mean, t = eqx.filter_jvp(lambda path: (path.marginal(i).mean, path.rows.t[i]), (path,), (tangent,))[1]
            # Where the time of the state moves, too, as that of an event which ends the solve: at a fixed time.
            return mean - velocity * t

        moves = (eqx.filter_vmap(along)(moving),)
    root = jnp.reshape(root_of(layout, x.mean, x.factor, moves, 0, k + 1), (-1, k + 1, d))

    def with_rate(us):
        values = lambda t, z: events.values(t, z, layout)  # noqa: E731
        t = path.rows.t[i]
        return jax.jvp(values, (t, us[:k]), (jnp.ones_like(t), us[1 : k + 1]))

    _, push = jax.linearize(with_rate, us[: k + 1])
    of_value, of_rate = jax.vmap(push)(root)
    std = safe_norm(of_value, axis=0)
    slope = safe_divide(jnp.sum(of_value * of_rate, axis=0), std**2)
    std_of_rate = safe_norm(of_rate - slope * of_value, axis=0)
    return _End(path.rows.t[i], us[: min(n, _DERIVATIVES)], std, std_of_rate)


def _in_step(events, layout, left, right, starts, ends):
    """The expected crossings of all functions in a step.

    ``starts``: whether functions may start at zero there; ``ends``: which of them end at zero.
    """
    k, at = events.problem.num_initial_values, points(_PARTS + 1)
    dt = right.t - left.t
    z = jnp.stack([along_step(left.us[j:], right.us[j:], dt, at) for j in range(k)], axis=1)
    means = jax.vmap(lambda t, z: events.values(t, z, layout))(left.t + at * dt, z)
    share = jnp.asarray(at, dt.dtype)[:, None]
    stds = (1 - share) * left.std + share * right.std
    # Where nothing is uncertain a function crosses zero once or not at all.
    size = jnp.max(jnp.abs(means), axis=0)
    stds = jnp.maximum(stds, jnp.finfo(dt.dtype).eps * size + jnp.finfo(dt.dtype).tiny)
    noise = ((1 - share) * left.std_of_rate + share * right.std_of_rate) * jnp.abs(dt)
    leaves = starts & (jnp.abs(means[0]) <= ZERO * size) & (size > 0)
    u = means / stds
    # Exactly zero where the function starts or ends at zero: the computed mean is round-off there. The integral then
    # counts half of a crossing, which is taken off below where it starts at zero, and completed where it ends there.
    u = jnp.concatenate([jnp.where(leaves, 0, u[:1]), u[1:-1], jnp.where(ends, 0, u[-1:])])
    width = jnp.diff(share, axis=0)
    rate, ratio = jnp.diff(u, axis=0) / width, (noise / stds)[1:]
    lower, upper = norm.cdf(u[:-1]), norm.cdf(u[1:])
    middle = norm.pdf((u[1:] + u[:-1]) / 2)
    density = jnp.where(jnp.abs(jnp.diff(u, axis=0)) > 1e-6, safe_divide(upper - lower, jnp.diff(u, axis=0)), middle)
    direction = jnp.asarray([float(event.direction) for event in events.functions])
    up, down = _positive_part(rate, ratio), _positive_part(-rate, ratio)
    counted = jnp.where(direction == 0, up + down, jnp.where(direction > 0, up, down))
    total = jnp.sum(counted * density * width, axis=0)
    along = jnp.sign(means[1])
    taken_off = jnp.where(leaves & ((direction == 0) | (direction == along)), 0.5, 0)
    return total - taken_off + jnp.where(ends, 0.5, 0)


def _positive_part(mean, std):
    """``E max(X, 0)`` of a normal ``X``."""
    ratio = safe_divide(mean, std)
    return jnp.where(std > 0, std * norm.pdf(ratio) + mean * norm.cdf(ratio), jnp.maximum(mean, 0))
