"""Filter or smoothers: what is remembered of the past, so that it can learn from the future.

A kept state is remembered by its coordinates given those of the present (``Conditional``); every step updates them in
the elimination that it needs anyway. The chain of kept states is smoothed when the solve has ended (``trajectory``).
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp

from ..algebra.coordinates import Conditional
from ..algebra.normal import Normal


class AbstractStrategy(eqx.Module):
    """Which states are kept, and what of them is carried along.

    ``keeps_steps``: whether every accepted step is kept, and can be evaluated in between, or just the times asked for.
    ``smooths``: whether it remembers anything, so that later times have a say in earlier ones.

    >>> import probode
    >>> [part.keeps_steps for part in (probode.Filter(), probode.FixedPointSmoother(), probode.FixedIntervalSmoother())]
    [False, False, True]
    """

    keeps_steps: eqx.AbstractClassVar[bool]

    @property
    def smooths(self) -> bool:
        """Whether each time is estimated from the whole solve, or from the past alone."""
        # Asked of the method itself, so that no class can forget to declare it. Nothing is computed.
        kept = Normal(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
        return eqx.filter_eval_shape(lambda strategy: strategy.remember(kept), self) is not None

    @abstractmethod
    def remember(self, kept: Normal) -> Conditional | None:
        """What to carry along from a state that has just been kept: usually its coordinates, or nothing."""


class Filter(AbstractStrategy):
    """Each time is estimated from the past alone: constant memory. Between steps it predicts from the left.

    >>> import probode
    >>> probode.Filter().keeps_steps
    False
    """

    keeps_steps = False

    def remember(self, kept):
        return None


class FixedPointSmoother(AbstractStrategy):
    """Each time asked for is estimated from the whole solve, with memory for these times alone.

    The choice for a known, moderate number of ``save_at`` times, also inside reverse mode. Both ends of the steps that
    hold one of these times are kept, and what lies between is marginalised on the way; an accepted step costs about
    twice that of a filter.

    >>> import probode
    >>> probode.FixedPointSmoother().keeps_steps
    False
    """

    keeps_steps = False

    def remember(self, kept):
        return Conditional.identity(kept)


class FixedIntervalSmoother(AbstractStrategy):
    """Keeps every accepted step and estimates each from the whole solve (Rauch, Tung & Striebel, 1965).

    Memory for ``max_steps`` states. The choice for dense output, ``Solution.evaluate`` and samples at any time.

    >>> import probode
    >>> probode.FixedIntervalSmoother().keeps_steps
    True
    """

    keeps_steps = True

    def remember(self, kept):
        return Conditional.identity(kept)
