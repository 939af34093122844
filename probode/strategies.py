"""Strategies: what is remembered of the past, and what that says between the steps."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from .gaussians import Normal, Transition, add_noise, push


class AbstractStrategy(eqx.Module):
    """Filter or smoother: keeps a memory along the accepted steps."""

    @abstractmethod
    def init(self, state: Normal) -> Any:
        """The memory at the initial time: a PyTree of arrays."""

    @abstractmethod
    def extend(self, memory: Any, previous: Normal, transition: Transition, scale: Float[Array, "*batch"]) -> Any:
        """The memory after a step from ``previous`` through ``transition`` with ``scale * transition.noise``."""

    @abstractmethod
    def interpolate(self, left: Normal, transition: Transition, scale: Float[Array, "*batch"]) -> Normal:
        """The state inside a step, from the state at its left end and the transition to the time asked for, whose noise
        is ``scale * transition.noise``."""


class Filter(AbstractStrategy):
    """Each time is estimated from the past alone. Constant memory; between steps it predicts from the left."""

    def init(self, state):
        return None

    def extend(self, memory, previous, transition, scale):
        return None

    def interpolate(self, left, transition, scale):
        return add_noise(push(left, transition.matrix), transition.noise, scale)
