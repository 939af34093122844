"""Events in an adaptive solve: how they are found in a step, at what time they are, and what a reset does to a state.

A step in which an event is found is not taken: another one goes from the same state to its time. There the event
happens, if it lies within a small part of a step; the rest is the ``delay``, by Newton's method, through which its time
is differentiated: ``dt* = -(g_theta + g_u u_theta) / (g_t + g_u u')``.

Axes: ``events``; of these ``functions`` are found, the others happen at known times; ``k`` derivatives ``u, ...,
u^(k-1)`` that an initial value has.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..algebra.factorisations import Layout
from ..algebra.linalg import detach, safe_divide
from ..algebra.normal import Normal
from ..algebra.roots import along_step, coefficients, first_crossing, is_resolved, last_sign, noise, points, with_side
from ..equations.problems import AbstractProblem, flat_field
from ..information.events import Event
from .state import State
from .times import Interval, is_jump, round_off


# So many derivatives at both ends of a step make the polynomial in which roots are looked for; fewer in single
# precision, where the round-off of its coefficients would be seen.
_DERIVATIVES = {8: 6, 4: 4}
# An event counts as at the end of a step if it lies within `_CLOSE` times a usual step of it (at most `_SHARE` times
# this step). A step that was to end at an event may miss it, by the error of the polynomial. If the event lies beyond
# the end by at most `_BEHIND` times the step, the step is tried again, to the event. If `_BEHIND` were smaller, a very
# short step would follow more often, whose round-off takes a large output scale; if it were larger, the time of the
# event, by the slope at the end of the step, would be less certain, and a step that could be taken is lost.
_CLOSE, _SHARE, _BEHIND = 1e-13, 1e-3, 0.1
# After so many attempts that were meant to end at an event the next one halves the time in which it is.
_TRIES = 4
# If all coefficients of a polynomial are larger than this share of the largest, on the side of zero where the step
# begins, nothing else is looked at. With a smaller share a function that its polynomial does not follow may cross zero
# unseen; with a larger one more steps are searched in vain.
_FAR = 0.05
# A step is not halved to see roots below so many of the shortest ones: of a function that jumps it would not help.
_COARSE = 100
# Behind a reset a function is zero if it is no larger than this share of its size in the step before: its side is then
# the one to which it moves. If the share were smaller, the sign of what round-off leaves of a zero would count as its
# side, and the same event be found again, or the next one missed; if it were larger, a function that is near zero and
# still approaches it would be taken to have crossed, and its event missed.
ZERO = 1e-7
# An event that follows itself within so many times `round_off(t)` has accumulated, and ends the solve. If this were
# smaller, a ball that comes to rest could fall through the floor between two times that can no longer be told apart; if
# it were larger, the solve would end at events that are merely frequent.
_AT_ONCE = 20


class Watch(eqx.Module):
    """The state of the search for events, which is carried from each attempted step to the next one.

    - ``side``: the sign of every function where the state is; zero if that is a root, which has been dealt with.
    - ``size``: the largest absolute value of every function in the last step.
    - ``target``: the time of an event ahead, to which the next step goes; infinite if none was found. ``due``: which
      functions have it. ``low``, ``high``: between which lengths of the step it lies; ``tries``: how many attempts
      have gone to it.
    - ``counts``: how often every event has happened, and ``last`` when; ``number``: how often all together.
    """

    side: Float[Array, " functions"]
    size: Float[Array, " functions"]
    target: Float[Array, ""]
    due: Bool[Array, " functions"]
    low: Float[Array, ""]
    high: Float[Array, ""]
    tries: Int[Array, ""]
    counts: Int[Array, " events"]
    last: Float[Array, " events"]
    number: Int[Array, ""]


class Seen(eqx.Module):
    """What an attempt that the controller accepts shows of the events: which happen at its end, or that it is too long.

    ``near``: how far from the end they may be. ``cut``: whether an event lies further inside, to which the next attempt
    goes; or half the way, if the step is ``coarse``: too long to see all roots of a function. ``finite``: whether all
    functions are.
    """

    watch: Watch
    happen: Bool[Array, " events"]
    near: Float[Array, ""]
    cut: Bool[Array, ""]
    coarse: Bool[Array, ""]
    finite: Bool[Array, ""]

    @staticmethod
    def nothing(watch: Watch, happen: Any = None) -> "Seen":
        """Nothing is seen but events at known times, if any ``happen``."""
        happen = jnp.zeros(watch.counts.shape, bool) if happen is None else happen
        no = jnp.array(False)
        return Seen(watch, happen, jnp.zeros_like(watch.target), no, no, ~no)


class Crossing(eqx.Module):
    """How a function crosses zero near a state: after a ``delay``, there with a ``rate`` in time and a ``gradient``.

    ``velocity``: of ``(u, ..., u^(k-1))`` there. ``touches``: whether the function does not cross zero there, as
    one that jumps; a rate of zero is given as one. At known times delay and gradient are zero.
    """

    delay: Float[Array, ""]
    rate: Float[Array, ""]
    gradient: Float[Array, "k d"]
    velocity: Float[Array, "k d"]
    touches: Bool[Array, ""]

    def moves(self, z: Float[Array, "k d"]) -> Float[Array, ""]:
        """By how much the time of the crossing moves with a displacement ``z`` of the state at a fixed time."""
        return -jnp.sum(self.gradient * z) / self.rate


class Leaving(eqx.Module):
    """The motion of a function away from zero after a reset.

    ``side``: the sign that it takes, zero if it stays. ``within``: how large it may be a ``delay`` before or after.
    """

    side: Float[Array, ""]
    within: Float[Array, ""]


class Happening(eqx.Module):
    """The state at an event, before a reset, as it is kept: a row of numbers.

    ``which``: the number of the event; ``happen``: all events at that time, as ones and zeros; ``near``: by how much
    their times may differ from that of the state.
    """

    t: Float[Array, "..."]
    which: Float[Array, "..."]
    happen: Float[Array, "... events"]
    near: Float[Array, "..."]
    distribution: Normal
    layout: Layout | None


class Events(eqx.Module):
    """The events of a solve, bound to its problem; ``most``: how often they may happen, all together."""

    events: tuple[Event, ...]
    problem: AbstractProblem
    args: PyTree
    most: int = eqx.field(static=True)

    @property
    def functions(self) -> list[Event]:
        """The events that have to be found."""
        return [event for event in self.events if not event.is_scheduled]

    @property
    def places(self) -> np.ndarray:
        """The numbers of the events that have to be found, among all."""
        return np.asarray([i for i, event in enumerate(self.events) if not event.is_scheduled], int)

    @property
    def times(self) -> Float[Array, " times"] | None:
        """All known times; ``None`` without any."""
        known = [event.g for event in self.events if event.is_scheduled]
        return jnp.concatenate(known) if known else None

    @property
    def have_reset(self) -> np.ndarray:
        """Which events have a reset, as ones and zeros."""
        return np.asarray([float(event.reset is not None) for event in self.events])

    @property
    def resets(self) -> bool:
        """Whether any event has a reset."""
        return bool(np.any(self.have_reset))

    def check(self, t0: Float[Array, ""], layout: Layout) -> None:
        """Raises ``TypeError`` or ``ValueError`` unless all functions and resets can be called and fit the problem."""
        example = layout.unravel(jnp.zeros(layout.size, layout.dtype))
        for i, event in enumerate(self.events):
            name = "the event" if len(self.events) == 1 else f"event {i}"
            event.check(t0, (example,) * self.problem.num_initial_values, self.args, name)

    def values(self, t: Float[Array, ""], z: Float[Array, "k d"], layout: Layout) -> Float[Array, " functions"]:
        """The functions at ``z = (u, ..., u^(k-1))``."""
        us = [layout.unravel(u) for u in z]
        values = [jnp.asarray(event.g(t, *us, self.args), layout.dtype) for event in self.functions]
        return jnp.stack(values) if values else jnp.zeros(0, layout.dtype)

    def start(self, state: State) -> Watch:
        """What is known before the first attempt. A function within round-off of zero is at a root."""
        no_target = jnp.full((), jnp.inf, state.t.dtype)
        counts, number = jnp.zeros(len(self.events), jnp.int32), jnp.zeros((), jnp.int32)
        bounds = jnp.zeros((), state.t.dtype), no_target, number
        none = *bounds, counts, jnp.full(counts.shape, jnp.nan, state.t.dtype), number
        if not self.functions:
            zero = jnp.zeros(0, state.t.dtype)
            return Watch(zero, zero, no_target, zero != 0, *none)
        z = self._low(state)
        at = lambda t, z: self.values(t, z, state.layout)  # noqa: E731
        along_t = jax.jvp(at, (state.t, z), (jnp.ones_like(state.t), jnp.zeros_like(z)))[1]
        gradients = jax.jacfwd(at, argnums=1)(state.t, z)
        parts = jnp.abs(along_t * state.t) + jnp.sum(jnp.abs(gradients * z), axis=(1, 2))
        parts = jnp.where(jnp.isfinite(parts), parts, 0)
        values = at(state.t, z)
        side = jnp.where(jnp.abs(values) <= 64 * jnp.finfo(z.dtype).eps * parts, 0, jnp.sign(values))
        return detach(Watch(side, jnp.abs(values), no_target, jnp.zeros(side.shape, bool), *none))

    def look(self, interval: Interval, watch: Watch, before: State, after: State, length: Float[Array, ""]) -> Seen:
        """The events that a step shows: those at its end, or the time inside of it of the first one (``Seen``).

        ``length``: of a usual step, one that was not cut to hit a time.
        """
        watch, before, after, length = detach((watch, before, after, length))
        here = [is_jump(after.t, event.g.astype(after.t.dtype)) for event in self.events if event.is_scheduled]
        if not self.functions:
            return Seen.nothing(watch, self._all([], here))
        values = self._along(before, after)
        b = jax.vmap(coefficients, in_axes=1)(values)
        size = jnp.max(jnp.abs(values), axis=0)
        # Most steps stay far from zero: that none of the coefficients comes near it is seen at once.
        far = jnp.min(b * watch.side[:, None], axis=1) > _FAR * jnp.max(jnp.abs(b), axis=1)
        none = jnp.zeros(size.shape, bool)
        zero, infinite, tries = jnp.zeros_like(after.t), jnp.full_like(after.t, jnp.inf), jnp.zeros_like(watch.tries)
        nothing = watch.side, infinite, none, none, jnp.array(False), (zero, infinite, tries)
        search = lambda b, values: self._search(interval, watch, b, values, before.t, after.t, length)  # noqa: E731
        # Lanes of a vmap that are far from zero find nothing, when others search.
        some = eqxi.unvmap_any(jnp.any(~far) | (watch.tries > 0))
        side, target, due, happen, coarse, (low, high, tries) = lax.cond(some, search, lambda *_: nothing, b, values)
        cut = jnp.isfinite(target)
        size = jnp.where(cut, watch.size, size)
        new = dataclasses.replace(watch, side=side, size=size, target=target, due=due, low=low, high=high, tries=tries)
        here = [known & ~cut for known in here]
        near = self._near(before.t, after.t, length)[1]
        return Seen(new, self._all(list(happen), here), near, cut, coarse, jnp.all(jnp.isfinite(values)))

    def _search(self, interval, watch, b, values, start, end, length):
        """The first roots of the functions with coefficients ``b`` in a step from ``start`` to ``end``.

        Returns on which side of zero they end; the time inside of the step to which the next attempt goes, or infinity;
        which of them are zero there; which of them are zero at the end; whether the step is too coarse to tell;
        and between which lengths of a step the root lies, with the number of tries.
        """
        h, dt = jnp.abs(end - start), end - start
        b = jax.vmap(with_side)(b, watch.side)
        directions = jnp.asarray([event.direction for event in self.functions], b.dtype)
        share, found = jax.vmap(first_crossing)(b, directions)
        first_sign, last, small = jnp.sign(b[:, 0]), jax.vmap(last_sign)(b), jax.vmap(noise)(b)
        shortest, near = self._near(start, end, length)
        expected = watch.due & (jnp.abs(end - watch.target) <= near)
        behind = self._just_behind(b, last, small, h, directions, jnp.where(expected, _BEHIND * h, near))
        behind = jnp.where(behind <= interval.remaining(end), h + behind, jnp.inf)
        way = jnp.where(found, share * h, behind)
        # Between which lengths the first root lies: where the step came for it and has not reached it, and where the
        # function has another sign at the end.
        came, some, nearest = jnp.any(expected), jnp.any(found), jnp.argmin(way)
        crossed = found[nearest] & (last[nearest] * first_sign[nearest] < 0)
        again = watch.tries > 0
        low = jnp.where(again, jnp.where(came & ~some, jnp.maximum(watch.low, h), watch.low), 0)
        high = jnp.where(again, watch.high, jnp.inf)
        high = jnp.where(crossed, jnp.minimum(high, h), high)
        # A shorter step could not be taken.
        first = jnp.maximum(jnp.min(way), shortest)
        closed = came & (high - low <= near)
        here = (jnp.abs(first - h) <= near) | closed
        # Of a function with a kink or a steep slope the polynomial's root may be wrong again and again: then by halves.
        between = (low < first) & (first < high)
        halves = jnp.isfinite(high) & again & ~here & ((watch.tries > _TRIES) | ~between)
        first = jnp.where(halves, (low + high) / 2, first)
        cut = jnp.isfinite(first) & ~here
        together = jnp.where(closed & ~some, expected, jnp.isfinite(way) & (way <= first + near))
        coarse = jnp.any(~jax.vmap(is_resolved, in_axes=1)(values)) & ~closed & (h > _COARSE * shortest)
        coarse = coarse & ~halves
        happen = together & here & ~coarse
        # Behind an event the function is where it is, or at zero as long as it has not clearly crossed that.
        over = jnp.where((jnp.abs(b[:, -1]) > small) & (b[:, -1] * first_sign < 0), jnp.sign(b[:, -1]), 0)
        side = jnp.where(cut | coarse, watch.side, jnp.where(happen, over, last))
        target = jnp.where(cut, start + jnp.sign(dt) * first, jnp.inf)
        target = jnp.where(coarse, start + dt / 2, target)
        goes = cut & ~coarse
        bounds = jnp.where(goes, low, 0), jnp.where(goes, high, jnp.inf), jnp.where(goes, watch.tries + 1, 0)
        due = jnp.where(halves, watch.due | found, together) & goes
        return side, target, due, happen, coarse, bounds

    def _near(self, start, end, length):
        """The length of the shortest step, and how close to its end an event has to be to happen there."""
        unit = jnp.maximum(_CLOSE, 64 * jnp.finfo(end.dtype).eps)
        shortest = 2 * round_off(jnp.maximum(jnp.abs(start), jnp.abs(end)))
        return shortest, jnp.maximum(jnp.minimum(unit * length, _SHARE * jnp.abs(end - start)), shortest)

    def crossing(
        self, t: Float[Array, ""], us: Float[Array, "n d"], happen: Array, near: Float[Array, ""], layout: Layout
    ) -> Crossing:
        """How the first function of those that happen crosses zero near a state with the derivatives ``us``.

        One that jumps there, or that data have moved, does not cross zero within ``near``: then there is no delay, and
        nothing is known of its rate. (``near``: infinite where it is known to cross zero, negative where it is known
        not to.) Two steps of Newton's method: one makes the first derivatives of the delay right, both the second ones,
        too.
        """
        k = self.problem.num_initial_values
        zero, velocity, found = jnp.zeros_like(t), us[1 : k + 1], happen[self.places] > 0
        if not self.functions:
            return Crossing(zero, jnp.ones_like(t), jnp.zeros_like(velocity), velocity, jnp.array(False))
        index, any_found = jnp.argmax(found), jnp.any(found)

        def g(t, z):
            return self.values(t, z, layout)[index]

        def after(delay):
            there = advanced(us, delay, k + 1)
            value, rate = jax.jvp(g, (t + delay, there[:k]), (jnp.ones_like(t), there[1:]))
            return value, jnp.where(any_found & (rate != 0), rate, 1), there, any_found & (rate == 0)

        delay = zero
        for _ in range(2):
            value, rate, *_ = after(delay)
            delay = delay - jnp.where(any_found, value / rate, 0)
        jumps = ~(jnp.abs(delay) <= 2 * near)
        delay = jnp.where(jumps, 0, delay)
        _, rate, there, touches = after(delay)
        gradient = jnp.where(any_found, jax.grad(g, argnums=1)(t + delay, there[:k]), 0)
        return Crossing(delay, rate, gradient, there[1:], touches | (jumps & any_found))

    def reset(self, t: Float[Array, ""], z: Float[Array, "k d"], happen: Array, layout: Layout) -> Float[Array, "k d"]:
        """The values of ``u, ..., u^(k-1)`` after the resets of all events that happen, one after the other."""
        for i, event in enumerate(self.events):
            if event.reset is not None:
                us = event.reset(t, *(layout.unravel(u) for u in z), self.args)
                new = jnp.stack([layout.ravel(u) for u in (us if len(z) > 1 else (us,))])
                z = jnp.where(happen[i] > 0, new, z)
        return z

    def pass_through(
        self,
        t: Float[Array, ""],
        us: Float[Array, "n d"],
        happen: Array,
        near: Float[Array, ""],
        layout: Layout,
        direction: Float[Array, ""],
    ) -> tuple[Float[Array, "k d"], Float[Array, "k d k d"], Leaving, Bool[Array, ""]]:
        """``(u, ..., u^(k-1))`` at ``t`` on the way that begins with the reset; its derivative, the saltation matrix.

        The reset is at ``t + delay``: the state goes there, through the reset, and back with its new velocity. With
        ``dt* = -g_z dz / rate`` the derivative is ``R_z + (R_z f_before + R_t - f_after) dt*/dz``.

        Also how the function leaves zero, and whether it only touches it. ``direction``: in which time runs, 1 or -1.
        """
        k = self.problem.num_initial_values
        # The time of the reset is that of the first function that has one; others that happen then only watch.
        happen = happen * self.have_reset
        crossing = self.crossing(t, us, happen, near, layout)
        at, before = t + crossing.delay, advanced(us, crossing.delay, k)
        fn = lambda t, z: self.reset(t, z, happen, layout)  # noqa: E731
        after, along = jax.jvp(fn, (at, before), (jnp.ones_like(t), crossing.velocity))
        if self.problem.is_explicit:
            field = flat_field(self.problem, layout, self.args)
            velocity = lambda t, z: jnp.concatenate([z[1:], field(t, z)[None]])  # noqa: E731
            new = velocity(at, after)
            half = crossing.delay / 2
            # The rule of the midpoint, so that second derivatives are right as well.
            back = after - crossing.delay * velocity(at - half, after - half * new)
            leaving = self._leaving(crossing, at, after, new, happen, layout, direction)
        else:
            # At known times: there is no delay.
            new, back = jnp.zeros_like(after), after
            leaving = Leaving(jnp.zeros_like(t), jnp.zeros_like(t))
        moves = -crossing.gradient / crossing.rate
        jacobian = jax.jacfwd(fn, argnums=1)(at, before)
        saltation = jacobian + (along - new)[:, :, None, None] * moves
        return back, saltation, detach(leaving), crossing.touches

    def _leaving(self, crossing, t, z, velocity, happen, layout, direction):
        """How the function leaves zero behind a reset to ``z``."""
        if not self.functions:
            return Leaving(jnp.zeros_like(crossing.delay), jnp.zeros_like(crossing.delay))
        g = lambda t, z: self.values(t, z, layout)[jnp.argmax(happen[self.places] > 0)]  # noqa: E731
        _, rate = jax.jvp(g, (t, z), (jnp.ones_like(t), velocity))
        return Leaving(jnp.sign(rate) * direction, 2 * jnp.abs(rate * crossing.delay))

    def behind_reset(self, watch: Watch, state: State, happen: Bool[Array, " events"], leaving: Leaving) -> Watch:
        """What is known behind a reset. A function that has crossed zero may start there again, or elsewhere."""
        if not self.functions:
            return watch
        values = self.values(state.t, self._low(state), state.layout)
        found = (happen & (self.have_reset > 0))[self.places]
        zero = found & (jnp.abs(values) <= jnp.maximum(ZERO * watch.size, leaving.within))
        side = jnp.where(zero, leaving.side, jnp.sign(values))
        return dataclasses.replace(watch, side=lax.stop_gradient(side))

    def counted(
        self, watch: Watch, t: Float[Array, ""], happen: Bool[Array, " events"]
    ) -> tuple[Watch, Bool[Array, ""], Bool[Array, ""]]:
        """The numbers of events after some have happened at ``t``; whether one of these ends the solve.

        And whether they are too many: more than there is room for, or one so soon after itself that the times cannot
        be told apart.
        """
        counts = watch.counts + happen.astype(jnp.int32)
        number = watch.number + jnp.sum(happen, dtype=jnp.int32)
        most = jnp.asarray(
            [np.iinfo(np.int32).max if e.terminal is None else e.terminal for e in self.events], jnp.int32
        )
        ends = jnp.any(happen & (counts >= most))
        # Otherwise a ball that comes to rest would fall through the floor, between two floating-point numbers.
        at_once = jnp.any((happen & (jnp.abs(t - watch.last) <= _AT_ONCE * round_off(t)))[self.places])
        new = dataclasses.replace(
            watch, counts=counts, number=number, last=lax.stop_gradient(jnp.where(happen, t, watch.last))
        )
        return new, ends, at_once | (number > self.most)

    def happenings(self, state: State, happen: Bool[Array, " events"], near: Float[Array, ""]) -> list[Happening]:
        """The state before a reset as every one of the events would keep it."""
        flags = happen.astype(state.t.dtype)
        layout = state.layout if state.layout.factorisation.adapts else None
        return [
            Happening(state.t, jnp.full_like(state.t, i), flags, near, state.distribution, layout)
            for i in range(len(self.events))
        ]

    def example(self, state: State) -> Happening:
        """A row as ``happenings`` makes it, of a state at which nothing happens."""
        none = jnp.zeros(len(self.events), bool)
        return self.happenings(state, none, jnp.zeros_like(state.t))[0]

    def _low(self, state):
        return state.layout.unpack(state.distribution.mean)[: self.problem.num_initial_values]

    def _all(self, functions, scheduled):
        """Flags of the two kinds of events in the order of all."""
        kinds = {False: iter(functions), True: iter(scheduled)}
        return jnp.stack([next(kinds[event.is_scheduled]) for event in self.events])

    def _along(self, before, after):
        """The values of the functions of all events at times inside a step, ``(points, functions)``.

        The times are Chebyshev's points, both ends of the step included.
        """
        most = _DERIVATIVES[before.t.dtype.itemsize]
        first, second = (x.layout.unpack(x.distribution.mean)[:most] for x in (before, after))
        k, n, dt = self.problem.num_initial_values, first.shape[0], after.t - before.t
        at = points(2 * n)
        z = jnp.stack([along_step(first[j:], second[j:], dt, at) for j in range(k)], axis=1)
        ts = jnp.append(before.t + jnp.asarray(at[:-1], dt.dtype) * dt, after.t)
        return jax.vmap(lambda t, z: self.values(t, z, after.layout))(ts, z)

    def _just_behind(self, b, side, small, h, directions, most):
        """How far behind the end of a step functions cross zero, if it is no further than ``most``; else infinite."""
        slope = (b.shape[1] - 1) * (b[:, -1] - b[:, -2])
        approaching = (side * slope < 0) & ((directions == 0) | (directions == -side))
        # An end in the round-off of zero may be on either side of it.
        end = jnp.where(jnp.abs(b[:, -1]) > small, jnp.abs(b[:, -1]), 0)
        distance = h * safe_divide(end, jnp.abs(slope))
        return jnp.where(approaching & (distance <= most), distance, jnp.inf)


def advanced(us: Float[Array, "n d"], delay: Float[Array, ""], number: int) -> Float[Array, "number d"]:
    """The first derivatives after a short time, by the Taylor polynomial of all."""
    n = us.shape[0]
    weights = [delay**i / math.factorial(i) for i in range(n)]
    return jnp.stack([sum(weights[i] * us[j + i] for i in range(n - j)) for j in range(number)])
