"""The adaptive loop: one flat loop whose iterations attempt a step or serve a save time.

The controller decides on values without derivatives; an accepted attempt gets its derivative back. So gradients are
those of the accepted steps, frozen, and nothing of a rejected or non-finite attempt reaches them.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .controllers import AbstractController
from .errors import AbstractErrorEstimate
from .factorisations import Layout
from .gaussians import Normal
from .linalg import safe_divide
from .loops import AbstractLoop
from .solution import Result
from .steps import State, Step, accept, attempt, round_off


class Control(eqx.Module):
    """The parts of a solver that choose the steps."""

    error: AbstractErrorEstimate
    controller: AbstractController
    loop: AbstractLoop


class AdaptiveState(eqx.Module):
    """A running adaptive solve: the solver's state, the next step's length, and the controller's memory."""

    current: State
    dt: Float[Array, ""]
    controller: Any
    num_steps: Int[Array, ""]
    num_accepted_steps: Int[Array, ""]
    result: Result

    @property
    def t(self) -> Float[Array, ""]:
        """The time reached."""
        return self.current.t


class Row(eqx.Module):
    """What is kept of one time: or, stacked, of many."""

    t: Float[Array, "..."]
    distribution: Normal
    output_scale: Float[Array, "..."]


def row_of(state: State) -> Row:
    """What is kept of a state."""
    return Row(state.t, state.distribution, state.output_scale)


def is_finite(distribution: Normal) -> Bool[Array, ""]:
    """Whether every mean and every covariance is a real number."""
    return jnp.all(jnp.isfinite(distribution.mean)) & jnp.all(jnp.isfinite(distribution.factor))


class _Carry(eqx.Module):
    solve: AdaptiveState
    left: Row | None  # where the current step started, for the times inside it
    served: Int[Array, ""]
    saved: Row | None


def first_step(control: Control, state: State, span: Float[Array, ""]) -> Float[Array, ""]:
    """A first step, in any unit of time, from the derivatives at hand.

    With ``c_k`` the size of ``u^(k) / k!`` against the tolerances, the first term that the Taylor polynomial leaves out
    is extrapolated geometrically, ``c_(nu+1) = c_nu^2 / c_(nu-1)``, and the step is where it reaches the tolerance; at
    least where the last term kept does, and at most the time in which ``u`` changes by its own size.
    """
    nu, (u0, *_) = state.layout.num_derivatives, (u := state.layout.unpack(state.distribution.mean))
    weight = _weight(control.controller, jnp.abs(u0))
    weight = jnp.where(weight > 0, weight, jnp.max(weight))
    c = [control.error.norm(safe_divide(u[k], weight) / math.factorial(k)) for k in range(nu + 1)]
    extrapolated = safe_divide(c[nu - 1] ** (1 / (nu + 1)), c[nu] ** (2 / (nu + 1)))
    kept = safe_divide(jnp.ones_like(c[nu]), c[nu] ** (1 / nu))
    candidates = jnp.stack([jnp.maximum(extrapolated, kept), safe_divide(c[0], c[1])])
    span = jnp.abs(span)
    dt = jnp.min(jnp.where((candidates > 0) & jnp.isfinite(candidates), candidates, span))
    return jnp.minimum(dt, span)


def begin(control: Control, state: State, dt: Float[Array, ""]) -> AdaptiveState:
    """A solve before its first attempt."""
    zero = jnp.zeros((), jnp.int32)
    result = Result.where(is_finite(state.distribution), Result.successful, Result.initial_state_nonfinite)
    return AdaptiveState(state, lax.stop_gradient(dt), control.controller.init(dt.dtype), zero, zero, result)


def run(
    parts: Step,
    control: Control,
    solve: AdaptiveState,
    t1: Float[Array, ""],
    args: PyTree,
    *,
    ts: Float[Array, " times"] | None = None,
    steps: bool = False,
) -> tuple[AdaptiveState, Row | None]:
    """Solve to ``t1``; also the rows at the times ``ts`` or after every accepted step (``max_steps`` of them)."""
    start, layout = solve.current, solve.current.layout
    direction = jnp.where(t1 >= start.t, 1, -1).astype(t1.dtype)
    max_steps = control.loop.max_steps

    # Traced once; what the user's functions close over becomes an input that can be differentiated.
    attempting = eqx.filter_closure_convert(
        lambda distribution, t, dt: attempt(parts, distribution, t, dt, layout, args), start.distribution, t1, t1
    )

    def running(solve):
        unfinished = (t1 - solve.t) * direction > 0
        return unfinished & (solve.num_steps < max_steps) & (solve.result == Result.successful)

    def try_step(solve):
        active = running(solve)
        now = solve.current
        t, dt, clipped, floor = next_time(control.controller, now.t, solve.dt, t1, direction, start.t)
        dt = jnp.where(active, dt, direction)

        attempted = _detach(attempting(_detach(now.distribution), _detach(t), _detach(dt)))
        norm = error_norm(control, layout, _detach(now), _detach(dt), attempted)
        length = jnp.abs(_detach(dt))
        good, proposed, memory = control.controller.propose(length, norm, layout.num_derivatives + 1, solve.controller)
        finite = jnp.isfinite(norm)
        good = good & finite & active

        def accepted(now):
            # Rejected lanes of a vmap come here too: they must differentiate at a point that is known to be fine.
            inputs = (now.distribution, jnp.where(good, t, now.t), jnp.where(good, dt, direction * floor))
            values = jax.tree.map(lambda x: jnp.where(good, x, 0), attempted)
            return accept(parts, now, t, _with_derivative(values, attempting, inputs))

        current = lax.cond(good, accepted, lambda now: now, now)
        # A step cut short by t1 or stop_at says little about the next one.
        proposed = jnp.where(good & clipped, jnp.maximum(proposed, solve.dt), proposed)
        proposed = jnp.clip(lax.stop_gradient(proposed), floor, _dt_max(control.controller, dt.dtype))
        stuck = active & ~good & (length <= floor)
        failure = Result.where(finite, Result.step_size_too_small, Result.nonfinite)
        return AdaptiveState(
            current,
            proposed,
            jax.tree.map(lambda new, old: jnp.where(active, new, old), lax.stop_gradient(memory), solve.controller),
            solve.num_steps + 1,
            solve.num_accepted_steps + good.astype(jnp.int32),
            Result.where(stuck, failure, solve.result),
        )

    def row_between(solve, left, t):
        # At the right end of the step the state itself, inside it a prediction from the left.
        right = solve.current
        at_end = t == right.t
        transition = parts.prior.transition(jnp.where(at_end, direction, t - left.t), layout)
        scale = right.output_scale * transition.magnitude
        inside = parts.strategy.interpolate(left.distribution, transition, scale)
        distribution = jax.tree.map(lambda a, b: jnp.where(at_end, a, b), right.distribution, inside)
        return Row(t, distribution, right.output_scale)

    def pending(carry):
        if ts is None:
            return jnp.zeros((), bool)
        next_ts = ts[jnp.minimum(carry.served, ts.size - 1)]
        return (carry.served < ts.size) & (next_ts * direction <= carry.solve.t * direction)

    def body(carry):
        solve, left, served, saved = carry.solve, carry.left, carry.served, carry.saved
        if ts is None:
            new = try_step(solve)
            if steps:
                saved = _write(saved, served, row_of(new.current), new.num_accepted_steps > solve.num_accepted_steps)
                served = new.num_accepted_steps
            return _Carry(new, left, served, saved)

        serving = pending(carry)

        def serve(solve, left):
            return solve, left, row_between(solve, left, ts[jnp.minimum(served, ts.size - 1)])

        def step(solve, left):
            new = try_step(solve)
            moved = new.num_accepted_steps > solve.num_accepted_steps
            left = jax.tree.map(lambda a, b: jnp.where(moved, a, b), row_of(solve.current), left)
            return new, left, jax.tree.map(jnp.zeros_like, left)

        solve, left, row = lax.cond(serving, serve, step, solve, left)
        return _Carry(solve, left, served + serving.astype(jnp.int32), _write(saved, served, row, serving))

    times = ts.size if ts is not None else max_steps if steps else 0
    saved = jax.tree.map(lambda x: jnp.full((times, *x.shape), jnp.nan, x.dtype), row_of(start)) if times else None
    carry = _Carry(solve, row_of(start) if ts is not None else None, jnp.zeros((), jnp.int32), saved)
    final = control.loop.run(
        lambda carry: pending(carry) | running(carry.solve),
        body,
        carry,
        buffers=lambda carry: carry.saved,
        extra=0 if ts is None else ts.size,
    )
    solve, saved = final.solve, final.saved
    unfinished = ((t1 - solve.t) * direction > 0) & (solve.result == Result.successful)
    result = Result.where(unfinished, Result.max_steps_reached, solve.result)
    solve = eqx.tree_at(lambda s: s.result, solve, result)
    if steps:
        last, reached = row_of(solve.current), jnp.arange(times) < solve.num_accepted_steps
        saved = jax.tree.map(lambda rows, x: jnp.where(_column(reached, rows), rows, x), saved, last)
    return solve, saved


def next_time(
    controller: AbstractController, t: Array, dt: Array, t1: Array, direction: Array, t0: Array
) -> tuple[Array, Array, Array, Array]:
    """Where the next attempt goes: its time and signed length, whether it was cut to hit a time, the shortest length.

    The step reaches for the next time that must be hit; it is stretched, never followed by a sliver of round-off.
    """
    noise = jnp.maximum(round_off(t), round_off(t1 - t0) * 1e-3)
    ahead = t1
    if controller.stop_at is not None:
        stops = controller.stop_at.astype(t.dtype)
        distance = (stops - t) * direction
        usable = (distance > noise) & ((t1 - stops) * direction > noise)
        nearest = stops[jnp.argmin(jnp.where(usable, distance, jnp.inf))]
        ahead = jnp.where(jnp.any(usable), nearest, t1)
    room = (ahead - t) * direction
    clipped = dt >= room - noise
    new_t = jnp.where(clipped, ahead, t + direction * dt)
    signed = jnp.where(clipped, ahead - t, direction * dt)
    floor = noise if controller.dt_min is None else jnp.maximum(noise, controller.dt_min.astype(t.dtype))
    return new_t, signed, clipped, lax.stop_gradient(floor)


def error_norm(control: Control, layout: Layout, now: State, dt: Array, attempted: Any) -> Float[Array, ""]:
    """The size of an attempt's error against the tolerances; infinite where anything is not finite."""
    before, after = (layout.unpack(mean)[0] for mean in (now.distribution.mean, attempted.mean))
    error = control.error.estimate(dt, attempted.equation, attempted.innovation, layout)
    controller = control.controller
    size = jnp.maximum(jnp.abs(before), jnp.abs(after))
    weight = _weight(controller, size)
    # Without an absolute tolerance a component that is zero, and stays zero, has no error.
    scaled = jnp.where(error == 0, 0, error / weight)
    norm = control.error.norm(scaled)
    finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(attempted.mean))
    return jnp.where(finite, norm, jnp.inf)


@eqx.filter_custom_jvp
def _with_derivative(values, fn, inputs):
    """``values``, known to be ``fn(*inputs)``, with the derivative of ``fn``: nothing is computed twice forwards."""
    return values


@_with_derivative.def_jvp
def _(primals, tangents):
    values, fn, inputs = primals
    _, t_fn, t_inputs = tangents
    _, tangent = eqx.filter_jvp(lambda fn, inputs: fn(*inputs), (fn, inputs), (t_fn, t_inputs))
    # Not `values` themselves: a second derivative has to see the first one.
    return _with_derivative(values, fn, inputs), tangent


def _weight(controller, size):
    return controller.atol.astype(size.dtype) + controller.rtol.astype(size.dtype) * size


def _detach(tree):
    return jax.tree.map(lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def _write(rows, index, row, pred):
    # The row comes first: its structure stops the map at the loop's buffers, which are PyTrees themselves.
    return jax.tree.map(lambda x, xs: xs.at[index].set(x, pred=pred), row, rows)


def _column(flags, like):
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))


def _dt_max(controller, dtype):
    return jnp.inf if controller.dt_max is None else controller.dt_max.astype(dtype)
