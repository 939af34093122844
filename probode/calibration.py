"""Calibration: how the output scale of the prior is set from the residuals seen on the way.

A calibration picks the scale of each step's noise, may collect statistics, and turns them into one factor on every
covariance at the end. Sources: Schober et al. (2019) for the local scale, Tronarp et al. (2019) for the global one.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from .gaussians import Innovation


class AbstractCalibration(eqx.Module):
    """Where the output scale comes from; its shape is the layout's batch shape.

    Scales are in the units of ``Innovation``: ``innovation.unit`` is the prior's own output scale.
    """

    @abstractmethod
    def init(self, shape: tuple[int, ...], dtype) -> Any:
        """The statistics before the first step: a PyTree of arrays."""

    @abstractmethod
    def scale(self, innovation: Innovation) -> Float[Array, "*batch"]:
        """The factor on the square root of this step's process noise."""

    @abstractmethod
    def update(self, statistics: Any, whitened: Float[Array, "*batch m cols"], informative: Array) -> Any:
        """Statistics after a step with whitened residual ``S^(-1/2) z``; not ``informative`` at round-off level."""

    @abstractmethod
    def finalise(self, statistics: Any) -> Float[Array, "*batch"] | None:
        """The factor on the square root of all covariances when the solve has ended; ``None`` leaves them alone."""


class NoCalibration(AbstractCalibration):
    """The prior's own output scale, as the user set it."""

    def init(self, shape, dtype):
        return None

    def scale(self, innovation):
        return innovation.unit

    def update(self, statistics, whitened, informative):
        return None

    def finalise(self, statistics):
        return None


class DynamicCalibration(AbstractCalibration):
    """A scale of its own for every step, the local quasi-maximum-likelihood estimate; one per component under
    ``BlockDiagonal``. The default: adapts to problems whose stiffness or activity changes. Schober et al. (2019)."""

    def init(self, shape, dtype):
        return None

    def scale(self, innovation):
        return innovation.scale

    def update(self, statistics, whitened, informative):
        return None

    def finalise(self, statistics):
        return None
