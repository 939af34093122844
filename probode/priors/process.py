"""Samples and marginals of a prior alone, without any equation."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..algebra.conditioning import predict
from ..algebra.factorisations import AbstractFactorisation, Dense, Layout, layout_of
from ..algebra.linalg import kron_apply
from ..algebra.marginals import Posterior
from ..algebra.normal import Normal, batched, certain, deviation, push, square
from ..algebra.transition import Transition
from ..util.checks import as_float, require
from ..util.tracing import compiled
from .prior import AbstractPrior, AbstractPriorFamily


def sample_prior(
    prior: Any,
    key: PRNGKeyArray,
    ts: Any,
    like: PyTree,
    *,
    factorisation: AbstractFactorisation = Dense(),
    initial: Normal | Callable[[Layout], Normal] | None = None,
    shape: tuple[int, ...] = (),
) -> PyTree[Float[Array, "..."]]:
    """Joint samples of ``u`` at the times ``ts`` under the prior alone, without any equation.

    They show what a prior assumes about a solution. Returns a PyTree like ``u`` with leaves
    ``(*shape, time, *leaf.shape)``.

    - ``prior``: an ``AbstractPrior`` such as ``IWP(2)``.
    - ``key``: a random key.
    - ``ts``: sorted times, increasing or decreasing, ``(time,)``.
    - ``like``: a PyTree with the structure, shapes and dtype of ``u``; its values are not used.
    - ``factorisation``: the covariance structure of the state.
    - ``initial``: the distribution of the state at ``ts[0]``, a ``Normal`` in the layout of the factorisation, or a
      function of the ``Layout`` that returns one, such as ``Matern(...).stationary``. By default all is zero there.
    - ``shape``: the shape of the array of samples.

    Raises ``TypeError`` unless ``prior`` is a prior and ``like`` is real and floating point; ``ValueError`` for an
    ``AbstractPriorFamily``, which needs an equation, a factorisation with an algebra of its own, a ``like`` without
    numbers, times that are not sorted and finite, or an initial state of another shape.

    >>> import jax.numpy as jnp, probode
    >>> import jax
    >>> probode.sample_prior(probode.IWP(1), jax.random.key(0), jnp.linspace(0.0, 1.0, 5), 0.0, shape=(3,)).shape
    (3, 5)
    """
    ts, initial, layout = _checked("sample_prior", prior, ts, like, factorisation, initial)
    return _sample(prior, key, ts, initial, layout, tuple(shape))


def prior_marginals(
    prior: Any,
    ts: Any,
    like: PyTree,
    *,
    factorisation: AbstractFactorisation = Dense(),
    initial: Normal | Callable[[Layout], Normal] | None = None,
) -> Posterior:
    """The marginal distributions of ``u`` and its derivatives at the times ``ts`` under the prior alone.

    Returns a ``Posterior``, with ``mean`` and ``std``, PyTrees like ``u`` with leaves ``(time, *leaf.shape)``, and
    ``derivative(k)`` with the same of ``u^(k)``. Arguments and errors as for ``sample_prior``.

    >>> import jax.numpy as jnp, probode
    >>> band = probode.prior_marginals(probode.IWP(1), jnp.array([0.0, 1.0]), 0.0)
    >>> band.std.shape
    (2,)
    """
    ts, initial, layout = _checked("prior_marginals", prior, ts, like, factorisation, initial)
    return Posterior(ts, _marginals(prior, ts, initial, layout), layout)


def _checked(
    name: str, prior: Any, ts: Any, like: PyTree, factorisation: AbstractFactorisation, initial: Any
) -> tuple[Float[Array, " time"], Normal, Layout]:
    if isinstance(prior, AbstractPriorFamily):
        raise ValueError(
            f"{type(prior).__name__} takes its parameters from an equation and the state where a step starts: without "
            "them pass a prior with parameters of its own, like IWP(2) or IOUP(2, rate)."
        )
    if not isinstance(prior, AbstractPrior):
        raise TypeError(f"{name}(prior) must be a prior such as IWP(2), got {prior!r}.")
    for leaf in jax.tree.leaves(like):
        as_float(leaf, f"{name}(like)")
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"{name}(like) has dtype {dtype}, but must be floating point.")
    layout = layout_of(like, prior.num_derivatives, factorisation)
    layout.require_shared_algebra(name)
    if layout.size == 0:
        raise ValueError(f"{name}(like) has no numbers: it must be like u.")
    ts = as_float(ts, f"{name}(ts)").astype(layout.dtype)
    if ts.ndim != 1 or ts.size == 0:
        raise ValueError(f"{name}(ts) must be an array of times, got shape {ts.shape}.")
    steps = ts[1:] - ts[:-1]
    ordered = ((steps >= 0).all() | (steps <= 0).all()) & (abs(ts) < np.inf).all()
    ts = require(ts, ordered, f"{name}(ts) must be finite times in increasing or in decreasing order")
    mean = layout.pack(jnp.zeros((prior.num_derivatives + 1, layout.size), layout.dtype))
    if initial is None:
        initial = certain(mean)
    elif not isinstance(initial, Normal):
        initial = initial(layout)
    *batch, dim, _ = mean.shape
    got = jnp.shape(initial.mean), jnp.shape(initial.factor)
    if got[0] != mean.shape or len(got[1]) != mean.ndim or (*got[1][:-2], got[1][-1]) != (*batch, dim):
        raise ValueError(
            f"{name}(initial) must have the layout of {type(factorisation).__name__}(): expected a mean of shape "
            f"{mean.shape} and a factor of shape {(*batch, 'rows', dim)}, got {got[0]} and {got[1]}."
        )
    return jnp.asarray(ts), jax.tree.map(lambda x: x.astype(layout.dtype), initial), layout


def _chain(
    prior: AbstractPrior, ts: Float[Array, " time"], layout: Layout, first: PyTree, move: Callable, extra: PyTree = None
) -> PyTree:
    """States at the times ``ts``, stacked: the first is ``first``, each next one ``move(state, transition, extra)``."""

    def step(x, dt_extra):
        dt, extra = dt_extra
        moved = move(x, prior.transition(jnp.where(dt == 0, 1, dt), layout), extra)
        # For two equal times the state stays: that of a step of length one, which has finite derivatives, is dropped.
        x = jax.tree.map(lambda old, new: jnp.where(dt == 0, old, new), x, moved)
        return x, x

    _, rest = lax.scan(step, first, (ts[1:] - ts[:-1], extra))
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rest)


@compiled
def _marginals(prior, ts, initial, layout):
    def move(x: Normal, moved: Transition, _: None) -> Normal:
        magnitude = jnp.broadcast_to(moved.magnitude, layout.batch_shape)
        return predict(push(x, moved.matrix), moved.noise, magnitude)[0]

    return _chain(prior, ts, layout, square(initial), move)


@compiled
def _sample(prior, key, ts, initial, layout, shape):
    number = math.prod(shape)
    *batch, _, cols = initial.mean.shape
    key, initial_key = jax.random.split(key)

    def draw(key, factor):
        w = jax.random.normal(key, (number, *batch, factor.shape[-2], cols), layout.dtype)
        return jax.vmap(deviation, in_axes=(None, 0))(factor, w)

    def move(x: Array, moved: Transition, key: PRNGKeyArray) -> Array:
        there = jax.vmap(batched(kron_apply), in_axes=(None, 0))(moved.matrix, x)
        return there + moved.magnitude * draw(key, moved.noise)

    def components(x):
        return layout.unravel(layout.unpack(x)[0])

    first = initial.mean[None] + draw(initial_key, initial.factor)
    states = _chain(prior, ts, layout, first, move, jax.random.split(key, ts.size - 1))
    u = jax.vmap(jax.vmap(components), in_axes=1)(states)
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (*shape, *leaf.shape[1:])), u)
