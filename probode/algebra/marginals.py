"""Means, deviations and covariances of ``u`` and its derivatives, from the distributions of the whole state."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..util import describe
from ..util.checks import as_integer
from ..util.tracing import compiled
from .factorisations import Layout
from .linalg import product, root_mean_square, safe_divide, triangularise
from .normal import Normal, deviation


class Moments(eqx.Module):
    """Mean and standard deviation of ``u`` or of one of its derivatives.

    ``mean``, ``std``: PyTrees like ``u``, with leaves ``(*time, *leaf.shape)``, in the units of that derivative.
    ``Solution.derivative`` and ``Posterior.derivative`` return it.

    >>> import probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
    >>> solution.derivative(1).mean.shape, solution.derivative(1).std.shape
    ((1,), (1,))
    """

    mean: PyTree[Float[Array, "..."]]
    std: PyTree[Float[Array, "..."]]


@compiled
def moments(layout: Layout, state: Normal, k: int) -> Moments:
    """The means and standard deviations of ``u^(k)``, with the leading axes (time, lanes) of ``state``.

    A derivative without variance, as that which ``TS0`` takes to be exact, gets an estimate of its standard deviation.
    """

    def one(layout, mean, factor):
        means, stds = layout.unpack(mean), layout.std(factor)
        std = stds[0]
        for j in range(1, k + 1):
            std = jnp.where(stds[j] > 0, stds[j], _std_through_the_field(means, std, j))
        return Moments(layout.unravel(means[k]), layout.unravel(std))

    return over_times(one, layout, state.mean, 2)(layout, state.mean, state.factor)


@compiled
def covariance(layout: Layout, state: Normal, k: int, moves: Float[Array, "N ..."] | None) -> Float[Array, "*time d d"]:
    """The covariance of the components of ``u^(k)``, with the leading axes of ``state``, as ``moments`` has them.

    ``moves``: see ``widen``; ``None`` for a certain start.
    """
    std = moments(layout, state, k).std

    def one(layout, mean, factor, std, *moves):
        root = root_of(layout, mean, factor, moves, k, k + 1)
        cov, variance = product(root.T, root), jnp.square(layout.ravel(std))
        # The estimated deviation of a derivative that has no variance stands for errors whose correlations are unknown.
        return cov + jnp.diag(jnp.where(jnp.diagonal(cov) > 0, 0, variance))

    mapped = (std,) if moves is None else (std, jnp.moveaxis(moves, 0, -1 - len(layout.batch_shape) - 2))
    mapped = (state.mean, state.factor, *mapped)
    return over_times(one, layout, state.mean, len(mapped))(layout, *mapped)


@compiled
def joint(layout: Layout, state: Normal, k: int, moves: Float[Array, "N ..."] | None) -> Normal:
    """The distribution of ``(u, ..., u^(k-1))`` at one time: stacked means ``(k, d)``, an upper triangular factor.

    ``moves``: see ``widen``; ``None`` for a certain start.
    """
    root = root_of(layout, state.mean, state.factor, () if moves is None else (moves,), 0, k)
    return Normal(layout.unpack(state.mean)[:k], triangularise(None, root))


def root_of(
    layout: Layout, mean: Float[Array, "*state"], factor: Float[Array, "..."], moves: tuple, first: int, last: int
) -> Float[Array, "rows numbers"]:
    """A right square root of the covariance of ``u^(first), ..., u^(last - 1)``, ``(rows, (last - first) d)``."""

    def part(state):
        return jnp.ravel(layout.unpack(state)[first:last])

    # The last rows of a factor that was widened have the same coordinates for all components.
    shared = sum(len(x) for x in moves)
    own = factor[..., : factor.shape[-2] - shared, :]
    coordinates = jnp.zeros((*own.shape[:-1], mean.shape[-1]), mean.dtype)
    root = jax.jacobian(lambda w: part(deviation(own, w)))(coordinates)
    root = jnp.reshape(root, (root.shape[0], -1)).T
    return jnp.concatenate([root, *(jax.vmap(part)(x) for x in moves)])


def over_times(one: Callable, layout: Layout, mean: Float[Array, "..."], number: int) -> Callable:
    """The function ``one(layout, *arrays)`` of so many arrays, mapped over the axes of a mean for times and lanes.

    A layout that differs from time to time, or from lane to lane, has these axes, too.
    """
    for axis in reversed(range(mean.ndim - 2 - len(layout.batch_shape))):
        one = jax.vmap(one, in_axes=(0 if axis < layout.lanes else None, *[0] * number))
    return one


def _std_through_the_field(means, std, k):
    """The standard deviations of ``u^(k)``, ``(d,)``, estimated from ``std``, those of ``u^(k-1)``.

    A constraint that takes the vector field as constant gives ``u^(k)`` no variance. The Jacobian that would relate the
    two deviations is not known here; its size is taken to be the rate at which the field changes along the solution,
    ``|u^(k+1)| / |u^(k)|``, and every component to depend on all others alike. So the estimate is
    ``rate * size * rms(std / size)``, with the sizes ``|u^(k-1)| + tau |u^(k)|`` of the components, where ``tau`` is
    the time in which they change by ``|u^(k-1)|`` in the root mean square. For the highest derivative the rate is that
    of the one below.
    """

    rms = root_mean_square
    below, own = jnp.abs(means[k - 1]), jnp.abs(means[k])
    size = below + safe_divide(own, rms(safe_divide(own, below)))
    above = min(k, len(means) - 2)
    rate = safe_divide(rms(safe_divide(means[above + 1], size)), rms(safe_divide(means[above], size)))
    estimate = rate * size * rms(safe_divide(std, size))
    # Where the sizes overflow, the size of the derivative itself: the standard deviation would be infinite or NaN.
    return jnp.where(jnp.isfinite(estimate), estimate, own)


class Posterior(eqx.Module):
    """The distribution of a solution and its derivatives at one or several times: marginal means and deviations.

    ``Solution.evaluate`` and ``prior_marginals`` return it. Use ``mean``, ``std`` and ``derivative(k)``. Fields:

    - ``t``: the times, ``(*time,)``.
    - ``marginals``: the distribution of ``(u, u', ..., u^(nu))`` at each time, in the layout of the factorisation.
    - ``layout``: that layout.
    - ``moves``: the derivatives of the means along the directions of an uncertain initial value, whose share is already
      in ``marginals``, ``(N, *time, *batch, dim, cols)``; ``None`` elsewhere.

    >>> import probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0, dense_output=True)
    >>> solution.evaluate([0.2, 0.4]).derivative(1).mean.shape
    (2,)
    """

    t: Float[Array, "*time"]
    marginals: Normal
    layout: Layout
    moves: Float[Array, "N ..."] | None = None

    def __repr__(self) -> str:
        return f"Posterior(t={describe.brief(self.t)}, u={describe.shape_of_u(self.layout)}, layout={self.layout!r})"

    @property
    def mean(self) -> PyTree[Float[Array, "..."]]:
        """Mean of ``u``, a PyTree like it with leaves ``(*time, *leaf.shape)``."""
        return self.derivative(0).mean

    @property
    def std(self) -> PyTree[Float[Array, "..."]]:
        """Standard deviation of ``u``, a PyTree like it with leaves ``(*time, *leaf.shape)``."""
        return self.derivative(0).std

    def derivative(self, k: Any) -> Moments:
        """The mean and standard deviation of ``u^(k)``.

        Raises ``ValueError`` unless ``k`` is an integer from zero to the number of derivatives of the prior.
        """
        k = as_integer(k, "derivative(k)", 0, self.layout.num_derivatives)
        return moments(self.layout, self.marginals, k)

    def at(self, i: int | np.integer | Array) -> "Posterior":
        """The posterior at the ``i``-th of several times."""
        layout = self.layout
        if layout.factorisation.adapts:
            layout = jax.tree.map(lambda x: x[i], layout)
        moves = None if self.moves is None else self.moves[:, i]
        return Posterior(self.t[i], jax.tree.map(lambda x: x[i], self.marginals), layout, moves)

    @property
    def covariance(self) -> Float[Array, "*time d d"]:
        """Covariance of ``u`` at each time, over its components in the order of ``jax.flatten_util.ravel_pytree``."""
        return self.covariance_of(0)

    def covariance_of(self, k: Any) -> Float[Array, "*time d d"]:
        """The covariance of ``u^(k)`` at each time, as ``covariance`` has it for ``u``.

        Its diagonal is that of ``derivative(k).std`` squared. Raises ``ValueError`` unless ``k`` is an integer from
        zero to the number of derivatives of the prior, and under ``Subspace``.
        """
        k = as_integer(k, "covariance_of(k)", 0, self.layout.num_derivatives)
        self.layout.require_shared_algebra("A covariance of all components")
        return covariance(self.layout, self.marginals, k, self.moves)


def widen(states: Normal, moves: Float[Array, "N ..."]) -> Normal:
    """The states with the covariance that an uncertain initial value adds, as further rows of their factors.

    ``moves``: the derivatives of the mean along the ``N`` directions of that value's square root, ``(N, *mean.shape)``.
    """
    return Normal(states.mean, jnp.concatenate([states.factor, jnp.moveaxis(moves[..., 0], 0, -2)], axis=-2))
