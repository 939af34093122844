"""What a solve returns: the posterior at the times asked for, how it ended, and what it cost."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .checks import as_float, as_integer
from .factorisations import Layout
from .gaussians import Normal


class Result(eqx.Enumeration):
    """How a solve ended: ``successful`` or the reason why it stopped before ``t1``."""

    successful = ""
    max_steps_reached = (
        "The solve stopped because max_steps attempts were made before t1. Pass loop=BoundedLoop(max_steps=...) with "
        "more steps, loosen the tolerances, or use TS1 if the problem is stiff."
    )
    initial_state_nonfinite = (
        "The solve did not start because the state at t0 is infinite or NaN: u0, or a derivative of the vector field "
        "there. Move t0 away from the singularity, or start from an InitialState."
    )
    nonfinite = (
        "The solve stopped because the vector field, its derivative or the state became infinite or NaN however short "
        "the step. The solution may blow up or leave the domain of the vector field: shorten the interval."
    )
    step_size_too_small = (
        "The solve stopped because the step had to become shorter than dt_min or the round-off of the time. "
        "The solution may be singular there: shorten the interval, loosen the tolerances, lower dt_min, use float64, "
        "or name the times at which the equation jumps with stop_at."
    )


class SaveAt(eqx.Module):
    """Which times to keep: ``t0``, ``t1``, ``ts`` (sorted in the direction of time), or every accepted step.

    ``steps`` includes ``t1`` and excludes ``ts``. Raises ``ValueError`` if nothing or both are asked for.
    """

    t0: bool = eqx.field(static=True)
    t1: bool = eqx.field(static=True)
    ts: Float[Array | np.ndarray, " times"] | None
    steps: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)

    def __init__(self, *, t0: Any = False, t1: Any = False, ts: Any = None, steps: Any = False, dense: Any = False):
        for name, flag in {"t0": t0, "t1": t1, "steps": steps, "dense": dense}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"SaveAt({name}) is a flag, True or False, got {flag!r}; times go into ts.")
        if ts is not None and steps:
            raise ValueError("SaveAt(ts=..., steps=True): keep either the times ts or every step, not both.")
        if ts is None and not (t0 or t1 or steps or dense):
            raise ValueError("SaveAt() keeps nothing: set t0, t1, ts, steps or dense.")
        if dense:
            raise ValueError(
                "SaveAt(dense=True) needs a strategy with dense output, which Filter() does not offer yet."
            )
        if ts is not None:
            ts = as_float(ts, "SaveAt(ts)")
            if ts.ndim != 1 or ts.size == 0:
                raise ValueError(f"save_at must be a non-empty array of times of shape (times,), got shape {ts.shape}.")
        self.t0, self.t1, self.ts, self.steps, self.dense = t0, t1, ts, steps, dense


class Moments(eqx.Module):
    """Mean and standard deviation of one derivative, PyTrees like ``u``."""

    mean: PyTree[Float[Array, "..."]]
    std: PyTree[Float[Array, "..."]]


@eqx.filter_jit
def moments(layout: Layout, state: Normal, k: int) -> Moments:
    """Mean and standard deviation of ``u^(k)``, for any number of leading axes (time, lanes) of ``state``."""

    def one(mean, factor):
        return Moments(layout.unravel(layout.unpack(mean)[k]), layout.unravel(layout.std(factor)[k]))

    for _ in range(state.mean.ndim - 2 - len(layout.batch_shape)):
        one = jax.vmap(one)
    return one(state.mean, state.factor)


class Solution(eqx.Module):
    """The posterior over a solution.

    ``t``: times, ``(time,)``. ``marginals``: the state distributions over ``(u, u', ..., u^(nu))`` with a leading time
    axis. ``output_scale``: the calibrated factor on the prior's scale, ``(time,)`` or ``(time, d)``, 1 without
    calibration. ``result``: a ``Result``. ``stats``: ``num_steps`` attempts, of which ``num_accepted_steps`` and
    ``num_rejected_steps``, and ``max_steps``. ``state``: the running state at the end, to go on from.
    """

    t: Float[Array, " time"]
    marginals: Normal
    output_scale: Float[Array, "time *batch"]
    result: Any
    stats: dict[str, Int[Array, ""]]
    state: Any
    layout: Layout

    @property
    def mean(self) -> PyTree[Float[Array, "..."]]:
        """Posterior mean of ``u``: leaves ``(time, *leaf.shape)``."""
        return self.derivative(0).mean

    @property
    def std(self) -> PyTree[Float[Array, "..."]]:
        """Posterior standard deviation of ``u``: leaves ``(time, *leaf.shape)``."""
        return self.derivative(0).std

    def derivative(self, k: Any) -> Moments:
        """Posterior of ``u^(k)``: an object with ``.mean`` and ``.std``. Raises ``ValueError`` above the prior's."""
        k = as_integer(k, "derivative(k)", 0, self.layout.num_derivatives)
        return moments(self.layout, self.marginals, k)


def raise_unless_successful(solution: Solution) -> Solution:
    """The solution, or a ``RuntimeError`` that says why it stopped and, where known, at which time."""
    failed = solution.result != Result.successful
    if isinstance(failed, jax.core.Tracer):
        return solution.result.error_if(solution, failed)
    if np.any(failed):
        state, stats = solution.state, solution.stats
        raise RuntimeError(
            f"{Result[solution.result]} It stopped at t = {state.t} after {stats['num_accepted_steps']} accepted and "
            f"{stats['num_rejected_steps']} rejected steps; throw=False returns what was reached."
        )
    return solution
