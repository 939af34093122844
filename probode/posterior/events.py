"""The events of a solve with what is known of them: distributions of their times, and of the state before and after."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int, PyTree

from ..algebra.linalg import choose, safe_norm, triangularise
from ..algebra.marginals import root_of
from ..algebra.normal import Normal
from ..equations.taylor.derivatives import derivatives_along
from ..stepping.adaptive import AdaptiveState
from ..stepping.events import Events, Happening, advanced
from ..stepping.result import Result
from ..util.checks import as_float, is_traced
from .crossings import expected_crossings
from .trajectory import Trajectory


# So many time derivatives of a function are known well enough to follow it away from an event: a filter's estimates of
# higher ones are poor.
_LEVELS = 4


class Occurrences(eqx.Module):
    """The events of a solve in the order in which they happened, as ``Solution.events`` holds them.

    There are as many entries as ``max_events``. Where no event has happened numbers are NaN, and ``which`` is -1.

    - ``t``, ``t_std``: the times ``(max_events,)``, means and standard deviations. Of known times the latter is zero;
      where a function touches zero without crossing it, it is infinite.
    - ``which``: the numbers of the events among the leaves of ``events``.
    - ``count``: how many have happened, ``()``.
    - ``mean``, ``std``: of ``u`` at the event, before a reset: leaves ``(max_events, *leaf.shape)``. The state where a
      function crosses zero is less uncertain than that at a fixed time: it is not uncertain along the motion.
    - ``mean_after``, ``std_after``: after the reset; without one the same.
    - ``expected_crossings``: how often every function is expected to cross zero in the whole solve, ``(events,)``, by
      the uncertainty of the solution (Rice 1944, "Mathematical analysis of random noise"). If it is not close to the
      number of times that the event has happened, events were perhaps missed, or seen where there are none. NaN unless
      the solve has kept its steps, and for known times.

    ``cdf(t)``: the distribution function of the times.

    >>> import probode
    >>> half = probode.Event(lambda t, u, args: u - 0.5)
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 9.0), 1.0, events=half, rtol=1e-6)
    >>> print(f"{solution.events.t[0]:.4f}", solution.events.count)
    0.6931 1
    """

    t: Float[Array, " max_events"]
    t_std: Float[Array, " max_events"]
    which: Int[Array, " max_events"]
    count: Int[Array, ""]
    mean: PyTree[Float[Array, "max_events ..."]]
    std: PyTree[Float[Array, "max_events ..."]]
    mean_after: PyTree[Float[Array, "max_events ..."]]
    std_after: PyTree[Float[Array, "max_events ..."]]
    expected_crossings: Float[Array, " events"]
    _course: Float[Array, "max_events levels"]  # time derivatives of the function at the event
    _course_root: Float[Array, "max_events levels levels"]  # a right square root of their covariance

    def __repr__(self) -> str:
        if self.t.ndim != 1 or is_traced(self.t, self.count):
            return f"Occurrences(t={eqx.tree_pformat(self.t)}, events={self.expected_crossings.shape[-1]})"
        number = int(self.count)
        times = np.array2string(np.asarray(self.t[:number]), threshold=6, separator=", ")
        return f"Occurrences(count={number}, t={times}, of at most {self.t.size})"

    def cdf(self, t: Any) -> Float[Array, "max_events *times"]:
        """The probability that every event has happened until the time ``t``, ``(max_events, *t.shape)``.

        For a function with mean ``m(t)`` and standard deviation ``s(t)``, negative before the event, that is
        ``Phi(m(t) / s(t))``, with the course of both that the state at the event predicts: valid as long as the
        function crosses zero once. Raises ``TypeError`` for times that are not real, ``ValueError`` for a batch of
        solutions.
        """
        if self.t.ndim != 1:
            raise ValueError("cdf(t) is for a single solution: map over a batch with jax.vmap or equinox.filter_vmap.")
        t = jnp.asarray(as_float(t, "cdf(t)"), self.t.dtype)
        distance = t - jnp.reshape(self.t, (-1,) + (1,) * t.ndim)
        levels = self._course.shape[-1]
        powers = jnp.stack([distance**j / math.factorial(j) for j in range(levels)])
        mean = jnp.einsum("ej,je...->e...", self._course, powers)
        std = safe_norm(jnp.einsum("ekj,je...->ke...", self._course_root, powers), axis=0)
        # In the direction in which time runs, and in which the function grows.
        rate = jnp.sign(self._course[:, min(1, levels - 1)])
        mean = mean * jnp.reshape(rate, (-1,) + (1,) * t.ndim)
        certain = jnp.where(distance >= 0, 1.0, 0.0)
        value = jnp.where(std > 0, norm.cdf(mean / jnp.where(std > 0, std, 1)), certain)
        return jnp.where(jnp.isnan(distance), jnp.nan, value)


def occurrences(
    events: Events,
    happenings: Happening,
    ended: AdaptiveState,
    path: Trajectory | None = None,
    moving: Trajectory | None = None,
    moves: Float[Array, "max_events N *state"] | None = None,
) -> Occurrences:
    """What is known of the events that a solve has kept.

    ``ended``: the solve after its last step. ``path``: its steps, if all of them were kept. ``moving``, ``moves``: how
    these, and the states at the events at fixed times, move along the directions of an uncertain start.
    """
    watch, layout = ended.watch, ended.current.layout
    assert watch is not None
    number = jnp.minimum(watch.number, events.most)
    real = jnp.arange(events.most) < number
    # What is not real is differentiated at a point that is known to be fine.
    happenings = jax.vmap(lambda real, row: choose(real, row, events.example(ended.current)))(real, happenings)

    def known(_):
        return jax.vmap(lambda row, *moves: _one(events, row, layout, moves))(
            happenings, *(() if moves is None else (moves,))
        )

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(known, None))
    t, t_std, us, stds, course, root = jax.tree.map(
        lambda x: jax.vmap(lambda real, x: jnp.where(real, x, jnp.nan))(real, x),
        lax.cond(number > 0, known, lambda _: nothing, None),
    )
    which = jnp.where(real, happenings.which.astype(jnp.int32), -1)
    (mean, after), (std, std_after) = (tuple(jax.vmap(layout.unravel)(x) for x in pair) for pair in (us, stds))
    crossings = jnp.full(len(events.events), jnp.nan, t.dtype)
    if path is not None and path.dense:
        at_event = ended.result == Result.event
        crossings = expected_crossings(events, path, moving, happenings, number, at_event)
    return Occurrences(t, t_std, which, number, mean, std, after, std_after, crossings, course, root)


def _one(events, row, layout, moves):
    """Time, its deviation, ``u`` before and after with deviations, and the course of the function at one event."""
    layout = layout if row.layout is None else row.layout
    k, x = events.problem.num_initial_values, row.distribution
    us = layout.unpack(x.mean)
    n, d = us.shape
    index = row.which.astype(jnp.int32)
    alone = jnp.where(jnp.arange(len(events.events)) == index, 1, 0).astype(us.dtype)
    crossing = events.crossing(row.t, us, alone, row.near, layout)
    at = row.t + crossing.delay
    # All rows at the fixed time of the event: by how much u, u', ... are uncertain.
    root = jnp.reshape(root_of(layout, x.mean, x.factor, moves, 0, n), (-1, n, d))
    root = jax.vmap(lambda row: advanced(row, crossing.delay, n))(root)
    sooner = jax.vmap(crossing.moves)(root[:, :k])
    before, fn = advanced(us, crossing.delay, k), lambda t, z: events.reset(t, z, row.happen, layout)
    on_surface = root[:, :k] + sooner[:, None, None] * crossing.velocity
    after, along = jax.jvp(fn, (at, before), (jnp.ones_like(at), jnp.zeros_like(before)))
    behind = jnp.einsum("mikj,rkj->rmi", jax.jacfwd(fn, argnums=1)(at, before), on_surface)
    behind = behind + sooner[:, None, None] * along
    stds = safe_norm(on_surface[:, 0], axis=0), safe_norm(behind[:, 0], axis=0)
    t_std = jnp.where(crossing.touches, jnp.inf, safe_norm(sooner, axis=0))
    # Where there is a reset, report the stored time `row.t`, and keep only the derivative of the delay: the solve
    # restarts at exactly this time, at which `evaluate` therefore returns the state after the reset.
    exact = jnp.any(row.happen * events.have_reset > 0)
    at = jnp.where(exact, row.t + crossing.delay - lax.stop_gradient(crossing.delay), at)
    return at, t_std, (before[0], after[0]), stds, *_course(events, at, us, crossing.delay, root, index, layout)


def _course(events, at, us, delay, root, index, layout):
    """The time derivatives of the function that crosses zero, and a square root of their covariance."""
    k, n = events.problem.num_initial_values, us.shape[0]
    levels = min(n - k + 1, _LEVELS)
    if not events.functions:
        return jnp.zeros(levels, at.dtype), jnp.zeros((levels, levels), at.dtype)
    place = jnp.argmax(events.places == index)
    is_function = jnp.any(events.places == index)

    def course(us):
        curve = jnp.stack([us[j : j + k] for j in range(levels)])
        return derivatives_along(lambda t, z: events.values(t, z, layout), at, curve)[:, place]

    there = advanced(us, delay, n)
    mean, push = jax.linearize(course, there)
    rows = jax.vmap(push)(root)
    rows = jnp.concatenate([rows, jnp.zeros((levels, levels), rows.dtype)])
    zero = jnp.zeros_like
    root = triangularise(None, rows)[:levels]
    # At the event itself the function is zero: what is left is round-off.
    mean = mean.at[0].set(0)
    return jnp.where(is_function, mean, zero(mean)), jnp.where(is_function, root, zero(root))


def ended_at_event(events: Events, happenings: Happening, ended: AdaptiveState) -> AdaptiveState:
    """The solve with its last state at the time of the event that has ended it, if one has."""
    current, watch = ended.current, ended.watch
    assert watch is not None
    layout, last = current.layout, jnp.clip(watch.number - 1, 0, events.most - 1)
    ends = ended.result == Result.event
    row = choose(ends, jax.tree.map(lambda x: x[last], happenings), events.example(current))
    own = layout if row.layout is None else row.layout
    alone = jnp.where(jnp.arange(len(events.events)) == row.which, 1, 0)
    delay = events.crossing(row.t, own.unpack(row.distribution.mean), alone, row.near, own).delay
    delay = jnp.where(ends, delay, 0)
    us = layout.unpack(current.distribution.mean)
    mean = layout.pack(advanced(us, delay, us.shape[0]))
    distribution = Normal(mean, current.distribution.factor)
    current = dataclasses.replace(current, t=current.t + delay, distribution=distribution)
    return dataclasses.replace(ended, current=current)
