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
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .controllers import AbstractController
from .errors import AbstractErrorEstimate
from .factorisations import Layout
from .gaussians import Conditional, Influence, Normal, coordinates_of, in_terms_of, pad, pad_rows, predict, push
from .linalg import safe_divide
from .loops import AbstractLoop
from .solution import Result
from .steps import State, Step, accept, attempt, round_off
from .strategies import AbstractStrategy
from .trajectory import Row, column


class Control(eqx.Module):
    """The parts of a solver that choose the steps."""

    error: AbstractErrorEstimate
    controller: AbstractController
    loop: AbstractLoop


def no_influence(x: Normal, layout: Layout) -> Influence:
    """Of no equation at all."""
    m, (*batch, dim, cols) = layout.identity().shape[-1], x.mean.shape
    zeros = jnp.zeros((*batch, m, dim), x.mean.dtype)
    return Influence(jnp.zeros((*batch, m, cols), x.mean.dtype), zeros, zeros, jnp.zeros(batch, x.mean.dtype))


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


def row_of(state: State, past: Conditional | None, rows: int = 0, influence: Influence | None = None) -> Row:
    """What is kept of a state, its factor with at least so many rows."""
    return Row(state.t, pad(state.distribution, rows), state.output_scale, past, influence)


def is_finite(distribution: Normal) -> Bool[Array, ""]:
    """Whether every mean and every covariance is a real number."""
    return jnp.all(jnp.isfinite(distribution.mean)) & jnp.all(jnp.isfinite(distribution.factor))


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


def solve_keeping_steps(
    parts: Step,
    control: Control,
    strategy: AbstractStrategy,
    solve: AdaptiveState,
    t1: Float[Array, ""],
    args: PyTree,
    *,
    influence: bool = False,
) -> tuple[AdaptiveState, Row, Bool[Array, " rows"]]:
    """Solve to ``t1``; the rows at the start and after every accepted step, and which of them are real.

    There are ``max_steps + 1`` rows; those not reached repeat the last one. With ``influence`` the rows have theirs.
    """
    max_steps = control.loop.max_steps
    running, try_step = _stepping(parts, control, solve, t1, args)
    none = no_influence(solve.current.distribution, solve.current.layout) if influence else None
    first = row_of(solve.current, strategy.remember(solve.current.distribution), influence=none)
    # One flat buffer: the price of an iteration is that of its instructions.
    flat, unravel = ravel_pytree(first)

    def body(carry):
        solve, rows = carry
        new, past, effect, moved = try_step(solve, strategy.remember(solve.current.distribution), none)
        row = ravel_pytree(row_of(new.current, past, influence=effect))[0]
        return new, rows.at[solve.num_accepted_steps].set(row, pred=moved)

    carry = solve, jnp.zeros((max_steps, flat.size), flat.dtype)
    carry = control.loop.run(lambda carry: running(carry[0]), body, carry, buffers=lambda carry: carry[1], extra=0)
    solve, rows = _ended(carry[0], t1), carry[1]
    reached = jnp.arange(max_steps + 1) <= solve.num_accepted_steps
    last = ravel_pytree(row_of(solve.current, first.past, influence=none))[0]
    rows = jnp.where(column(reached, rows), jnp.concatenate([flat[None], rows]), last)
    return solve, jax.vmap(unravel)(rows), reached


class _Serving(eqx.Module):
    solve: AdaptiveState
    past: Conditional | None  # of the last row, in the coordinates of the current state
    left: Row | None  # the row where the current step starts, or the last one inside it
    served: Int[Array, ""]
    rows: Any  # (times, flat), which the loop wraps in a buffer


def solve_serving(
    parts: Step,
    control: Control,
    strategy: AbstractStrategy,
    solve: AdaptiveState,
    t1: Float[Array, ""],
    args: PyTree,
    ts: Float[Array, " times"],
) -> tuple[AdaptiveState, Row, Bool[Array, " rows"]]:
    """Solve to ``t1``; the rows at the start, at the times ``ts`` and at the end, and which of them are real.

    One flat loop: an iteration attempts a step, or serves the next of the ``ts`` if it has been passed. Rows have
    square factors; inside a step they are predicted from what is on their left.
    """
    direction, layout = _direction(solve, t1), solve.current.layout
    dim = solve.current.distribution.mean.shape[-2]
    running, try_step = _stepping(parts, control, solve, t1, args)

    def remember(state):
        rows, past = state.distribution.factor.shape[-2], strategy.remember(pad(state.distribution, dim))
        return None if past is None else eqx.tree_at(lambda p: p.cross, past, past.cross[..., :rows, :])

    def pack(row):
        return ravel_pytree(row)[0]

    def next_ts(carry):
        return ts[jnp.minimum(carry.served, ts.size - 1)]

    def pending(carry):
        return (carry.served < ts.size) & (next_ts(carry) * direction <= carry.solve.t * direction)

    def step(solve, past, left, t):
        # After a rejected attempt nothing can be pending, whatever is on the left.
        left = row_of(solve.current, _square(past, dim), dim)
        new, past, _, _ = try_step(solve, past)
        return new, past, left, jnp.zeros_like(first)

    def serve(solve, past, left, t):
        current = solve.current
        at_left, at_right = t == left.t, t == current.t

        def predicted(x, dt, past):
            transition = parts.prior.transition(jnp.where(dt == 0, direction, dt), layout)
            scale = current.output_scale * transition.magnitude
            return predict(push(x, transition.matrix), transition.noise, scale, past)

        def ends(row):
            # A step of no length, which still has a derivative.
            return push(row.distribution, parts.prior.transition(t - row.t, layout).matrix), row.past

        row = predicted(left.distribution, t - left.t, left.past)
        row = _choose(at_left, ends(left), row)
        row = _choose(at_right, ends(row_of(current, _square(past, dim), dim)), row)
        row = Row(t, row[0], current.output_scale, row[1], None)
        # From now on this row is what is remembered, inside the step and after it.
        remembered = strategy.remember(row.distribution)
        if remembered is not None:
            end, past = predicted(row.distribution, current.t - t, remembered)
            past = in_terms_of(past, coordinates_of(current.distribution, end))
            past = _choose(at_right, remember(current), past)
        left = Row(t, row.distribution, row.output_scale, remembered, None)
        return solve, past, left, pack(row)

    def body(carry):
        if ts.size == 0:
            new, past, _, _ = try_step(carry.solve, carry.past)
            return _Serving(new, past, carry.left, carry.served, carry.rows)
        serving = pending(carry)
        *new, row = lax.cond(serving, serve, step, carry.solve, carry.past, carry.left, next_ts(carry))
        # A step writes zeros where the next row will be.
        rows = carry.rows.at[carry.served].set(row)
        return _Serving(*new, carry.served + serving.astype(jnp.int32), rows)

    start = remember(solve.current)
    first_row = row_of(solve.current, _square(start, dim), dim)
    first, unpack = ravel_pytree(first_row)
    rows = jnp.zeros((ts.size, first.size), first.dtype)
    carry = control.loop.run(
        lambda carry: running(carry.solve) if ts.size == 0 else pending(carry) | running(carry.solve),
        body,
        _Serving(solve, start, first_row if ts.size else None, jnp.zeros((), jnp.int32), rows),
        buffers=lambda carry: carry.rows,
        extra=ts.size,
    )
    solve = _ended(carry.solve, t1)
    last = pack(row_of(solve.current, _square(carry.past, dim), dim))
    rows = jax.vmap(unpack)(jnp.concatenate([first[None], carry.rows, last[None]]))
    reached = jnp.arange(ts.size + 2) <= carry.served
    return solve, rows, reached.at[-1].set(True)


def _stepping(parts, control, solve, t1, args):
    """Whether a solve goes on, and its next attempt: the solve after it, its past, its influence, whether it moved."""
    t0, direction, layout = solve.t, _direction(solve, t1), solve.current.layout
    max_steps = control.loop.max_steps

    # Traced once; what the user's functions close over becomes an input that can be differentiated.
    attempting = eqx.filter_closure_convert(
        lambda distribution, t, dt: attempt(parts, distribution, t, dt, layout, args),
        solve.current.distribution,
        t1,
        t1,
    )

    def running(solve):
        unfinished = (t1 - solve.t) * direction > 0
        return unfinished & (solve.num_steps < max_steps) & (solve.result == Result.successful)

    def try_step(solve, past, influence=None):
        active = running(solve)
        now = solve.current
        t, dt, clipped, floor = next_time(control.controller, now.t, solve.dt, t1, direction, t0)
        dt = jnp.where(active, dt, direction)

        attempted = _detach(attempting(_detach(now.distribution), _detach(t), _detach(dt)))
        norm = error_norm(control, layout, _detach(now), _detach(dt), attempted)
        length = jnp.abs(_detach(dt))
        good, proposed, memory = control.controller.propose(length, norm, layout.num_derivatives + 1, solve.controller)
        finite = jnp.isfinite(norm)
        good = good & finite & active

        def accepted(now, past, influence):
            # Rejected lanes of a vmap come here too: they must differentiate at a point that is known to be fine.
            inputs = (now.distribution, jnp.where(good, t, now.t), jnp.where(good, dt, direction * floor))
            values = jax.tree.map(lambda x: jnp.where(good, x, 0), attempted)
            mean = jnp.where(good, attempted.mean, _detach(now.distribution.mean))
            values = eqx.tree_at(lambda a: a.mean, values, mean)
            at = _with_derivative(values, attempting, inputs)
            state, update = accept(parts, now, inputs[1], at, past, args)
            return state, update.past, None if influence is None else update.influence

        current, past, influence = lax.cond(good, accepted, lambda *old: old, now, past, influence)
        # A step cut short by t1 or stop_at says little about the next one.
        proposed = jnp.where(good & clipped, jnp.maximum(proposed, solve.dt), proposed)
        proposed = jnp.clip(lax.stop_gradient(proposed), floor, _dt_max(control.controller, dt.dtype))
        stuck = active & ~good & (length <= floor)
        failure = Result.where(finite, Result.step_size_too_small, Result.nonfinite)
        new = AdaptiveState(
            current,
            proposed,
            _choose(active, lax.stop_gradient(memory), solve.controller),
            solve.num_steps + 1,
            solve.num_accepted_steps + good.astype(jnp.int32),
            Result.where(stuck, failure, solve.result),
        )
        return new, past, influence, good

    return running, try_step


def _ended(solve, t1):
    """The solve with its result, which the end of a loop does not tell."""
    unfinished = (solve.t != t1) & (solve.result == Result.successful)
    return eqx.tree_at(lambda s: s.result, solve, Result.where(unfinished, Result.max_steps_reached, solve.result))


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
    error = control.error.estimate(dt, attempted.transition, attempted.equation, attempted.innovation, layout)
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


def _choose(flag, these, those):
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), these, those)


def _square(past, dim):
    """The past in the coordinates of a factor padded to ``dim`` rows."""
    return None if past is None else eqx.tree_at(lambda p: p.cross, past, pad_rows(past.cross, dim))


def _direction(solve, t1):
    return jnp.where(t1 >= solve.t, 1, -1).astype(t1.dtype)


def _dt_max(controller, dtype):
    return jnp.inf if controller.dt_max is None else controller.dt_max.astype(dtype)
