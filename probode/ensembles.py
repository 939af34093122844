"""Many solves of one equation, which differ in initial value, interval or parameters, on one or several devices.

Each of these solves is called a lane. On a CPU every lane is a loop of its own, which XLA compiles into native code,
and takes no more steps than it needs; on accelerators the lanes of a block step together. Lanes are divided among
devices, which do not communicate.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .adaptive_solve import answer_request
from .information.events import as_events
from .posterior.solution import Solution
from .requests import bind, check_request, floats_to_arrays
from .solver import Solver
from .stepping.adaptive import AdaptiveState
from .stepping.forward_mode import naming_what_has_none
from .stepping.times import Interval
from .util.checks import as_float, as_integer, is_traced, require
from .util.tracing import compiled


def solve_ensemble(
    solver: Solver,
    u0s: PyTree,
    t0: Any,
    t1: Any,
    *,
    args: PyTree = None,
    in_axes: Any = (0, None, None, None),
    save_at: Any = None,
    dt0: Any = None,
    lanes_per_block: Any = None,
    cost: Any = None,
    mesh: Mesh | None = None,
    events: Any = None,
    max_events: Any = 64,
) -> Solution:
    """The ``Solution`` of the same equation for many initial values, intervals or parameters, with a leading axis.

    - ``solver``: shared by all lanes.
    - ``u0s``, ``t0``, ``t1``, ``args``: as in ``Solver.solve``, with an axis of lanes where ``in_axes`` says so; for
      an uncertain initial value (``Normal``) in its mean and its factor.
    - ``in_axes``: the axes of lanes of ``(u0s, t0, t1, args)``, as in ``jax.vmap``; by default the first axis of
      ``u0s`` alone.
    - ``save_at``, ``dt0``, ``events``, ``max_events``: as in ``Solver.solve``, shared by all lanes.
    - ``lanes_per_block``: how many lanes step together, as under ``jax.vmap``; by default one on CPUs, on accelerators
      all lanes of a device.
    - ``cost``: ``(lanes,)``, an estimate of the work of each lane, in any unit. Lanes of similar cost then share a
      block, and the shares of all devices are about equal.
    - ``mesh``: the devices among which lanes are divided, along all axes of the mesh. Results are the same but for
      round-off.

    A lane that fails raises no error: ``solutions.result == Result.successful`` is true for the others, which do not
    depend on it. Differentiable like ``Solver.solve``. Raises ``ValueError`` if nothing is mapped, if numbers of lanes
    differ, and for times that do not fit in some lane (a lane may have ``t0 == t1``, if not all have: it stays at its
    start); otherwise as ``Solver.solve`` for wrong input.

    >>> solver = probode.Solver(probode.IWP(3), probode.TS0(probode.ODE(lambda t, u, args: -args * u)))
    >>> rates = jnp.array([0.5, 1.0, 2.0])
    >>> solutions = probode.solve_ensemble(solver, jnp.ones(2), 0.0, 1.0, args=rates, in_axes=(None, None, None, 0))
    >>> solutions.mean.shape  # lanes, times, components
    (3, 1, 2)
    """
    events = None if events is None else as_events(events)
    solver, args, events = floats_to_arrays((solver, args, events))
    operands = jax.tree.map(_automatic_sharding, (u0s, t0, t1, args))
    axes = _axes(in_axes, operands)
    lanes = _number_of_lanes(operands, axes)
    mapped = _per_leaf(lambda axis, x: None if axis is None else jnp.moveaxis(x, axis, 0), axes, operands)
    shared = _per_leaf(lambda axis, x: x if axis is None else None, axes, operands)
    u0s, t0s, t1s, _ = eqx.combine(mapped, shared)
    # A lane whose interval is empty stays at its start: the lane that is checked has another one, if there is any.
    one = 0 if is_traced(t0s, t1s) else int(np.argmax(np.atleast_1d(np.asarray(t0s) != np.asarray(t1s))))
    u0, one_t0, one_t1, one_args = eqx.combine(jax.tree.map(lambda x: x[one], mapped), shared)
    most = as_integer(max_events, "max_events", 1)
    request = check_request(solver, u0, one_t0, one_t1, save_at, dt0, events=events, max_events=most)
    times = _check_times(u0s, t0s, t1s, request)
    # Of lanes with times of their own some may begin where they end.
    may_be_empty = request.may_be_empty or axes[1] is not None or axes[2] is not None
    request = dataclasses.replace(request, may_be_empty=may_be_empty)
    for i, t in enumerate(times, start=1):
        if axes[i] is None:
            shared = (*shared[:i], t, *shared[i + 1 :])
        else:
            mapped = (*mapped[:i], t, *mapped[i + 1 :])

    devices = 1 if mesh is None else mesh.size
    mesh = None if mesh is None else _automatic_mesh(mesh)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if lanes_per_block is None:
        lanes_per_block = 1 if platform == "cpu" else math.ceil(lanes / devices)
    block = min(as_integer(lanes_per_block, "lanes_per_block", 1), lanes)
    if cost is not None:
        cost = as_float(cost, "cost")
        if cost.shape != (lanes,):
            raise ValueError(f"cost must be one number for each of {lanes} lanes, got shape {cost.shape}.")
    with naming_what_has_none(solver.constraint.problem, request.layout, one_args):
        return _solve_lanes(solver, mapped, shared, request, cost, lanes, block, mesh)


@compiled
def _solve_lanes(solver, mapped, shared, request, cost, lanes, block, mesh):
    devices = 1 if mesh is None else mesh.size

    def solve(lane, shared):
        u0, t0, t1, args = eqx.combine(lane, shared)
        start, layout = bind(solver, u0, uncertain=True)
        own = dataclasses.replace(request, start=start, interval=Interval(t0, t1), layout=layout)
        return answer_request(solver, own, args)

    def solve_share(mapped, shared):
        if block == 1:
            return lax.map(lambda lane: solve(lane, shared), mapped)
        together = jax.vmap(solve, in_axes=(0, None))
        blocks = jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] // block, block, *x.shape[1:])), mapped)
        solutions = lax.map(lambda lanes: together(lanes, shared), blocks)
        return jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] * block, *x.shape[2:])), solutions)

    # Lanes sorted by cost, in blocks that go to the devices in turn: contiguous shares would have very different costs.
    # Copies of the last lane fill up the last blocks.
    order = jnp.arange(lanes) if cost is None else jnp.argsort(cost)
    order = jnp.pad(order, (0, -lanes % (devices * block)), mode="edge")
    order = jnp.reshape(jnp.swapaxes(jnp.reshape(order, (-1, devices, block)), 0, 1), -1)
    place = jnp.zeros(lanes, int).at[order].set(jnp.arange(order.size))
    mapped = jax.tree.map(lambda x: x[order], mapped)
    arrays, rest = eqx.partition(shared, eqx.is_array)
    if mesh is None:
        solutions = solve_share(mapped, shared)
    else:
        along, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
        solutions = jax.shard_map(
            lambda mapped, arrays: solve_share(mapped, eqx.combine(arrays, rest)),
            mesh=mesh,
            in_specs=(along, everywhere),
            out_specs=along,
            check_vma=False,
        )(mapped, arrays)
    return jax.tree.map(lambda x: x[place], solutions)


def _per_leaf(fn, axes, operands):
    return jax.tree.map(fn, axes, operands, is_leaf=_none)


def _none(x):
    return x is None


def _automatic_mesh(mesh):
    return Mesh(mesh.devices, mesh.axis_names)


def _automatic_sharding(x):
    """The array with its axes of explicit sharding made automatic, so that lanes can be indexed in any order."""
    sharding = None if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.device_put(x, NamedSharding(_automatic_mesh(sharding.mesh), sharding.spec))


def _axes(in_axes, operands):
    """The axis of lanes, or ``None``, for every leaf of the operands; raises ``ValueError`` unless the trees fit."""
    try:
        return jax.tree.broadcast(in_axes, operands, is_leaf=_none)
    except ValueError as error:
        raise ValueError(
            "in_axes must be a tuple for (u0s, t0, t1, args) of axes, None, or trees of them that the operands extend, "
            f"as for jax.vmap; got {in_axes!r}: {error}"
        ) from None


def _number_of_lanes(operands, axes):
    """The number of lanes; raises ``ValueError`` unless there is one, the same along all mapped axes."""
    sizes = set()

    def look(axis, x):
        if axis is None:
            return
        if not -jnp.ndim(x) <= axis < jnp.ndim(x):
            remedy = " A list of numbers has no axis: write jnp.array([...])." if jnp.ndim(x) == 0 else ""
            raise ValueError(f"in_axes asks for axis {axis} of an array of shape {jnp.shape(x)}.{remedy}")
        sizes.add(jnp.shape(x)[axis])

    _per_leaf(look, axes, operands)
    if not sizes:
        raise ValueError("in_axes maps nothing: at least one of u0s, t0, t1, args must have an axis of lanes.")
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"The mapped axes must all have the same number of lanes, at least one; got {sorted(sizes)}.")
    return sizes.pop()


def _check_times(u0s, t0s, t1s, request):
    """``t0`` and ``t1`` of all lanes; raises ``ValueError`` unless they pass the checks of ``check_request``.

    That has checked one lane alone.
    """
    dtype, ts = request.layout.dtype, request.save_at.ts
    xp = jnp if is_traced(t0s, t1s, ts) else np
    t0s, t1s = (as_float(t, "t0 and t1").astype(dtype) for t in (t0s, t1s))
    t1s = require(t1s, (abs(t0s) < np.inf) & (abs(t1s) < np.inf), "t0 and t1 must be finite in every lane")
    if isinstance(u0s, AdaptiveState):
        same = u0s.current.t == t0s
        t1s = require(t1s, same, "A solve goes on from the time of its state, which is not t0 in every lane")
    if ts is not None:
        # A lane whose interval is empty has no direction.
        forward = (t1s > t0s) | ((t1s == t0s) & ~(t1s < t0s).any())
        same = forward.all() | ~forward.any()
        t1s = require(t1s, same, "Lanes that share save_at must run in the same direction of time")
        first = xp.where(forward.all(), t0s.max(), t0s.min())
        last = xp.where(forward.all(), t1s.min(), t1s.max())
        t1s = require(t1s, (ts - first) * (ts - last) <= 0, "save_at must lie in the interval of every lane")
    return jnp.asarray(t0s), jnp.asarray(t1s)
