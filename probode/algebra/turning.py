"""States in pairs of directions, of which the directions are changed in the course of a solve.

The covariance of a state consists of independent blocks, one for each pair of directions. In new directions the blocks
are again those of the pairs: what would correlate them is dropped. A smoother has the coordinates ``w`` of an earlier
state given those of the later one, ``v``. A ``TurnedConditional`` keeps ``w | v`` for the old directions and the later
state in both, so that ``v`` can be computed from the new coordinates.

Axes: ``blocks`` of two of ``d`` directions (one is empty where ``d`` is odd), ``dim = 2 n`` for ``n`` derivatives.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .blocks import PAIRS
from .coordinates import Conditional, determined_coordinates, from_coordinates
from .factorisations import Layout
from .linalg import triangularise_tall
from .normal import Normal, certain, deviation, pad


def turn_state(x: Normal, turn: Float[Array, "d d"]) -> Normal:
    """The state ``x`` in the directions ``turn``, columns in terms of the old ones, with a square factor."""
    (blocks, rows, dim), groups = x.factor.shape, PAIRS.groups(turn.shape[0])
    size, n, turns = groups.size, dim // groups.size, groups.between(turn)
    mean = jnp.einsum("jna,jaib->inb", jnp.reshape(x.mean, (blocks, n, size)), turns)
    factor = jnp.einsum("jrna,jaib->ijrnb", jnp.reshape(x.factor, (blocks, rows, n, size)), turns)
    stacks = jnp.reshape(factor, (blocks, blocks * rows, dim))
    return Normal(jnp.reshape(mean, (blocks, dim, 1)), jax.vmap(triangularise_tall)(stacks))


def in_layout(x: Normal, old: Layout, new: Layout) -> Normal:
    """A state that is stored in the ``old`` layout as it is in the ``new`` one."""
    if not old.factorisation.adapts:
        return x
    one: Any = old.factorisation
    other: Any = new.factorisation
    same = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda a, b: jnp.all(a == b), one, other))
    return lax.cond(same, lambda x: pad(x, x.mean.shape[-2]), lambda x: turn_state(x, one.turn_to(other)), x)


class TurnedConditional(eqx.Module):
    """The distribution of an earlier state's coordinates given those of a later one that has been turned.

    - ``past``: the ``Conditional`` given the coordinates of the later state ``before`` it was turned.
    - ``before``, ``after``: that state in the old directions, and in the new ones.
    - ``turn``: the new directions as columns in terms of the old ones; ``turned``: one if there was a turn at all, else
      zero (a number like the others, since rows of a solve are flat arrays).
    """

    past: Conditional
    before: Normal
    after: Normal
    turn: Float[Array, "d d"]
    turned: Float[Array, ""]

    @staticmethod
    def without(past: Conditional, x: Normal, size: int) -> "TurnedConditional":
        """``past`` of a state ``x`` with ``size`` components that was not turned."""
        return TurnedConditional(past, x, x, jnp.eye(size, dtype=x.mean.dtype), jnp.zeros((), x.mean.dtype))

    @property
    def noise(self) -> Float[Array, "*batch q p"]:
        """That of ``past``."""
        return self.past.noise

    def distribution_before(self, later: Normal) -> Normal:
        """The distribution of the later state's coordinates before the turn, from that of those after it."""

        def turned_back(later):
            state = turn_state(from_coordinates(later, self.after), self.turn.T)
            return determined_coordinates(state, self.before)

        return lax.cond(self.turned > 0, turned_back, lambda later: later, later)

    def coordinates_before(self, later: Float[Array, "*batch rows cols"]) -> Float[Array, "*batch rows cols"]:
        """The later state's coordinates before the turn, from those after it."""

        def turned_back(later):
            state = certain(self.after.mean + deviation(self.after.factor, later))
            return determined_coordinates(turn_state(state, self.turn.T), self.before).mean

        return lax.cond(self.turned > 0, turned_back, lambda later: later, later)

    def rescaled(self, factor: Float[Array, "*batch 1 1"]) -> "TurnedConditional":
        """The same conditional in terms of two states whose covariances are ``factor^2`` times as large."""
        before, after = (Normal(x.mean, x.factor * factor) for x in (self.before, self.after))
        return TurnedConditional(self.past.rescaled(factor), before, after, self.turn, self.turned)
