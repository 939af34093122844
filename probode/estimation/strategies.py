"""Strategies: filtering, or smoothing with backward conditionals.

For a state that it has kept, a smoother carries along the distribution of its coordinates given those of the current
state (``Conditional``); every step updates it in the elimination that it needs anyway. The chain of kept states is
smoothed when the solve has ended (``trajectory``).
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp

from ..algebra.coordinates import Conditional
from ..algebra.normal import Normal


class AbstractStrategy(eqx.Module):
    """Which states a solve keeps, and whether it conditions them on the equation at later times, as a smoother does.

    A subclass defines ``remember``, and sets as a class attribute ``keeps_steps``: whether every accepted step is kept,
    so that the solution can be evaluated at any time, or only the times of ``save_at``.

    >>> import probode
    >>> [part.keeps_steps for part in (probode.Filter(), probode.FixedPointSmoother(), probode.FixedIntervalSmoother())]
    [False, False, True]
    """

    keeps_steps: eqx.AbstractClassVar[bool]

    @property
    def smooths(self) -> bool:
        """Whether states are conditioned on the whole solve: whether ``remember`` returns a ``Conditional``."""
        # Derived from the method, which a flag in a subclass might contradict. Only shapes are evaluated.
        kept = Normal(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
        return eqx.filter_eval_shape(lambda strategy: strategy.remember(kept), self) is not None

    @abstractmethod
    def remember(self, kept: Normal) -> Conditional | None:
        """The ``Conditional`` of a state that has just been kept, given itself; ``None`` to filter."""


class Filter(AbstractStrategy):
    """The strategy of a Kalman filter: the solution at each time given the equation up to that time, not later.

    Memory is constant, and steps are the cheapest. Between two steps the solution is the prediction from the earlier
    one. For the solution at the end, or where the uncertainty at earlier times does not matter.

    >>> import probode
    >>> probode.Filter().keeps_steps
    False
    """

    keeps_steps = False

    def remember(self, kept: Normal) -> None:
        return None


class FixedPointSmoother(AbstractStrategy):
    """A fixed-point smoother: the solution at each ``save_at`` time is conditioned on the whole solve.

    Memory is that for these times alone. For a known, moderate number of them, also in reverse-mode differentiation.
    Both ends of the steps that contain one of these times are kept, and the states between are marginalised; an
    accepted step costs about twice that of a filter.

    >>> import probode
    >>> probode.FixedPointSmoother().keeps_steps
    False
    """

    keeps_steps = False

    def remember(self, kept: Normal) -> Conditional:
        return Conditional.identity(kept)


class FixedIntervalSmoother(AbstractStrategy):
    """A smoother over a fixed interval: it keeps all accepted steps, and conditions each of them on the whole solve.

    Memory is that for ``max_steps`` states. For dense output, ``Solution.evaluate`` and samples at any time. (Rauch,
    Tung & Striebel 1965, "Maximum likelihood estimates of linear dynamic systems".)

    >>> import probode
    >>> probode.FixedIntervalSmoother().keeps_steps
    True
    """

    keeps_steps = True

    def remember(self, kept: Normal) -> Conditional:
        return Conditional.identity(kept)
