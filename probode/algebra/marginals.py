"""Means and standard deviations of ``u`` and its derivatives, read off the distributions of the whole state."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..util import describe
from ..util.checks import as_integer
from .factorisations import Layout
from .linalg import compiled, root_mean_square, safe_divide
from .normal import Normal


class Moments(eqx.Module):
    """Mean and standard deviation of ``u`` or of one of its derivatives, both PyTrees like ``u``.

    >>> import probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
    >>> solution.derivative(1).mean.shape, solution.derivative(1).std.shape
    ((1,), (1,))
    """

    mean: PyTree[Float[Array, "..."]]
    std: PyTree[Float[Array, "..."]]


@compiled
def moments(layout: Layout, state: Normal, k: int) -> Moments:
    """The means and standard deviations of ``u^(k)``, with the leading axes (time, lanes) of ``state``."""

    def one(layout, mean, factor):
        means, stds = layout.unpack(mean), layout.std(factor)
        std = stds[k] if k == 0 else jnp.where(stds[k] > 0, stds[k], _std_through_the_field(means, stds[k - 1], k))
        return Moments(layout.unravel(means[k]), layout.unravel(std))

    for axis in reversed(range(state.mean.ndim - 2 - len(layout.batch_shape))):
        one = jax.vmap(one, in_axes=(0 if axis < layout.lanes else None, 0, 0))
    return one(layout, state.mean, state.factor)


def _std_through_the_field(means, std, k):
    """An estimate of the standard deviation of ``u^(k)``, ``(d,)``, from that of ``u^(k-1)``.

    A constraint that freezes the field calls that derivative exact. How the field moves is not known here, but along
    the solution it does so at the rate ``|u^(k+1)| / |u^(k)|``, and in that measure every component is taken to depend
    on every other: relative to their sizes, ``|u^(k-1)|`` and what it changes by in the time in which all change so
    much. Of the highest derivative the rate is that of the one below.
    """

    rms = root_mean_square
    below, own = jnp.abs(means[k - 1]), jnp.abs(means[k])
    size = below + safe_divide(own, rms(safe_divide(own, below)))
    above = min(k, len(means) - 2)
    rate = safe_divide(rms(safe_divide(means[above + 1], size)), rms(safe_divide(means[above], size)))
    estimate = rate * size * rms(safe_divide(std, size))
    # Of sizes that are no numbers any more: as large as the derivative itself.
    return jnp.where(jnp.isfinite(estimate), estimate, own)


class Posterior(eqx.Module):
    """Mean and standard deviation of a solution and its derivatives at one or several times.

    What ``Solution.evaluate`` and ``prior_marginals`` return.

    >>> import probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0, dense_output=True)
    >>> solution.evaluate([0.2, 0.4]).derivative(1).mean.shape
    (2,)
    """

    t: Float[Array, "*time"]
    marginals: Normal
    layout: Layout

    def __repr__(self):
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
        """Posterior of ``u^(k)``: an object with ``.mean`` and ``.std``. Raises ``ValueError`` above the prior's."""
        k = as_integer(k, "derivative(k)", 0, self.layout.num_derivatives)
        return moments(self.layout, self.marginals, k)


def widen(states: Normal, moves: Float[Array, "N ..."]) -> Normal:
    """The states with the directions in which an uncertain initial value moves them as further rows of the factors."""
    return Normal(states.mean, jnp.concatenate([states.factor, jnp.moveaxis(moves[..., 0], 0, -2)], axis=-2))
