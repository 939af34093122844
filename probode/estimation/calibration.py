"""Calibration: how the output scale of the prior is set from the residuals seen on the way.

A calibration picks the scale of each step's noise, may collect statistics, and turns them into one factor on every
covariance at the end. Sources: Schober et al. (2019) for the local scale, Tronarp et al. (2019) for the global one.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..algebra.conditioning import Innovation
from ..algebra.linalg import safe_sqrt


# How many times the local scale a remembered one may be. Scales that alternate do so within a factor of ten; those of
# a stiff problem fall by many orders of magnitude in a few steps, and lagging behind them would spoil the mean.
_REMEMBERED = 10.0


class Evidence(eqx.Module):
    """What the log marginal likelihood of the equation is made of, one row per batch element.

    ``sums`` over the steps: of the whitened residuals squared, of ``log det`` of the square roots of their covariances,
    and of their number. (One array: the loop pays for each.)
    """

    sums: Float[Array, "*batch 3"]

    @staticmethod
    def none(shape: tuple[int, ...], dtype) -> "Evidence":
        """Before any data."""
        return Evidence(jnp.zeros((*shape, 3), dtype))

    def update(self, whitened: Float[Array, "*batch m cols"], pivots: Float[Array, "*batch m"]) -> "Evidence":
        """After a residual with the whitened form ``S^(-1/2) z`` and the diagonal of ``S^(1/2)``."""
        # A direction without any noise has no density; it is left out.
        positive, cols = pivots != 0, whitened.shape[-1]
        log_det = jnp.log(jnp.where(positive, jnp.abs(pivots), 1))
        terms = jnp.stack([jnp.sum(whitened**2, axis=-1), cols * log_det, cols * positive], axis=-1)
        return Evidence(self.sums + jnp.sum(terms, axis=-2))

    @property
    def number(self) -> Float[Array, "*batch"]:
        """Of residuals so far."""
        return self.sums[..., 2]

    def log_likelihood(self, factor: Float[Array, "*batch"]) -> Float[Array, ""]:
        """The log density of all residuals when every standard deviation is ``factor`` times as large."""
        variance = jnp.where(factor > 0, factor, 1) ** 2
        square, log_det, number = jnp.moveaxis(self.sums, -1, 0)
        return -jnp.sum(log_det + (square / variance + number * jnp.log(2 * jnp.pi * variance)) / 2)


class AbstractCalibration(eqx.Module):
    """Where the output scale comes from; its shape is the layout's batch shape.

    A subclass defines ``init``, ``scale``, ``update`` and ``finalise``, and may set, as class attributes:

    - ``relinearise``: whether the equation is linearised once more when the scale is known, for linearisations that
      look at the covariance.
    - ``is_local``: whether ``scale`` follows ``innovation.scale``, so that the noise of a step explains its residual;
      otherwise steps whose residual it does not explain are refused.
    - ``remembers``: whether ``scale`` depends on the statistics.
    - ``rescales``: whether ``finalise`` returns a factor; found out from the method itself. It would also scale what a
      user knows, as the noise of data: data and an uncertain ``u0`` are then refused.

    >>> import probode
    >>> probode.NoCalibration().finalise(None) is None  # all covariances stay as they are
    True
    """

    relinearise = False
    is_local = False
    remembers = False

    @property
    def rescales(self) -> bool:
        """Whether all covariances are multiplied by a factor when the solve has ended."""
        # Asked of the method itself, so that no class can forget to declare it. Nothing is computed.
        dtype = jnp.zeros(()).dtype
        return eqx.filter_eval_shape(lambda part: part.finalise(part.init((), dtype)), self) is not None

    @abstractmethod
    def init(self, shape: tuple[int, ...], dtype) -> Any:
        """The statistics before the first step: a PyTree of arrays."""

    @abstractmethod
    def scale(self, innovation: Innovation, statistics: Any) -> Float[Array, "*batch"]:
        """The factor on the square root of a step's process noise, from its innovation and the steps before.

        In the units of ``Innovation``: ``innovation.unit`` is the prior's own output scale.
        """

    @abstractmethod
    def update(
        self,
        statistics: Any,
        scale: Float[Array, "*batch"],
        whitened: Float[Array, "*batch m cols"],
        informative: Bool[Array, ""],
    ) -> Any:
        """Statistics after an accepted step.

        ``scale``: its output scale, as a factor on the prior's own; zero, for a step that never was, behind a time at
        which the equation jumps. ``whitened``: the residual over its standard deviation, ``S^(-1/2) z``.
        ``informative``: false if the residual is no more than round-off.
        """

    @abstractmethod
    def finalise(self, statistics: Any) -> Float[Array, "*batch"] | None:
        """The factor on the square root of all covariances when the solve has ended; ``None`` leaves them alone."""


class AbstractLeaveOneOut(AbstractCalibration):
    """A calibration that uses leave-one-out residuals: of each step given the equation at all others, later ones too.

    A subclass defines ``leave_one_out`` beside the methods of ``AbstractCalibration``. It is called once, at the end of
    solves that keep their steps (``FixedIntervalSmoother``, ``SaveAt(steps=True)`` or ``dense``, ``solve_grid``).

    >>> import probode
    >>> isinstance(probode.LeaveOneOutCalibration(), probode.AbstractLeaveOneOut)
    True
    """

    @abstractmethod
    def leave_one_out(
        self, statistics: Any, squares: Float[Array, "steps *batch"], weights: Float[Array, "steps *batch"]
    ) -> Any:
        """The statistics of a solve with the residuals of its steps given all others.

        ``squares``: these residuals squared, over their variances. ``weights``: zero for steps that do not count.
        """


class NoCalibration(AbstractCalibration):
    """The prior's own output scale, as the user set it.

    >>> import probode
    >>> probode.NoCalibration()
    NoCalibration()
    """

    def init(self, shape, dtype):
        return None

    def scale(self, innovation, statistics):
        return innovation.unit

    def update(self, statistics, scale, whitened, informative):
        return None

    def finalise(self, statistics):
        return None


class MLECalibration(AbstractCalibration):
    """One scale for the whole solve, the quasi-maximum-likelihood estimate ``s^2 = mean of z^T S^-1 z / size(z)`` over
    the steps; one per component under ``BlockDiagonal``. Tronarp et al. (2019); Bosch et al. (2021).

    The posterior mean is that of the prior's own scale. ``stop_gradient``: treat the estimate as a constant.

    >>> import probode
    >>> probode.MLECalibration(stop_gradient=True)
    MLECalibration(stop_gradient=True)
    """

    stop_gradient: bool = eqx.field(static=True, default=False)

    def init(self, shape, dtype):
        return MeanSquare.none(shape, dtype)

    def scale(self, innovation, statistics):
        return innovation.unit

    def update(self, statistics, scale, whitened, informative):
        return statistics.update(whitened, informative)

    def finalise(self, statistics):
        return _constant_if(self.stop_gradient, safe_sqrt(statistics.mean))


class DynamicCalibration(AbstractCalibration):
    """A scale of its own for every step, the local quasi-maximum-likelihood estimate; one per component under
    ``BlockDiagonal``. The default: adapts to problems whose stiffness or activity changes. Schober et al. (2019).

    ``memory``: ``scale^2 = (1 - memory) local^2 + memory last^2``, ``last`` the scale of the step before, or ten times
    the local one if that is less. Zero is the estimate of the source, where each residual sets the gain that shapes the
    next one. If ``num_derivatives`` minus the order of the equation is even (``IWP(3)`` for ``u' = f``, ``IWP(4)`` for
    ``u'' = f``), this tends to scales that alternate from step to step, and the mean converges more slowly.
    ``memory=0.5`` ends that. ``relinearise``: linearise the equation again with the noise of that scale.
    ``stop_gradient``: treat the scales as constants in derivatives. Raises ``ValueError`` for a memory outside
    ``[0, 1)``.

    >>> import probode
    >>> probode.DynamicCalibration(relinearise=True, memory=0.5)
    DynamicCalibration(relinearise=True, memory=0.5)
    """

    relinearise: bool = eqx.field(static=True, default=False)
    stop_gradient: bool = eqx.field(static=True, default=False)
    memory: float = eqx.field(static=True, default=0.0)
    is_local = True

    def __check_init__(self):
        _check_memory(self)

    @property
    def remembers(self):
        return self.memory > 0

    def init(self, shape, dtype):
        return jnp.zeros(shape, dtype) if self.remembers else None

    def scale(self, innovation, statistics):
        return _constant_if(self.stop_gradient, _local(innovation, self.memory, statistics))

    def update(self, statistics, scale, whitened, informative):
        return scale if self.remembers else None

    def finalise(self, statistics):
        return None


class LeaveOneOutCalibration(AbstractLeaveOneOut):
    """The dynamic scale for mean and gains, then all covariances times ``min(mean r^2, mean l^2)``.

    ``r^2 = z^T S^-1 z / size(z)`` compares each residual with its prediction from the past, ``l^2`` with that from all
    other residuals, later ones included, each under the variance of its own prediction. The first sees that the dynamic
    scale ignores what was uncertain before the step; the second that the errors of a smooth solution do not add up like
    independent increments. The posterior mean is that of ``DynamicCalibration``.

    Solves that keep their steps (``FixedIntervalSmoother``, ``SaveAt(steps=True)`` or ``dense``, ``solve_grid``) use
    both, others the first alone. One factor per component under ``BlockDiagonal``. Meant for ``TS1``
    with ``Dense``, or ``TS0(ode, evaluations=2)`` with ``BlockDiagonal``: no statistic of the residuals can see the
    errors that ``TS0`` evaluated once, or a Jacobian without its coupling of components, accumulates.
    ``stop_gradient``: treat all scales as constants. ``memory``: see ``DynamicCalibration``; the mean is more accurate
    for it, but the uncertainty can be too small by a factor of seven (Lotka-Volterra, ``IWP(3)``).

    >>> import probode
    >>> probode.LeaveOneOutCalibration(stop_gradient=True)
    LeaveOneOutCalibration(stop_gradient=True)
    """

    stop_gradient: bool = eqx.field(static=True, default=False)
    memory: float = eqx.field(static=True, default=0.0)
    is_local = True

    def __check_init__(self):
        _check_memory(self)

    @property
    def remembers(self):
        return self.memory > 0

    def init(self, shape, dtype):
        return MeanSquare.none(shape, dtype), jnp.zeros(shape, dtype) if self.remembers else None

    def scale(self, innovation, statistics):
        _, last = statistics
        return _constant_if(self.stop_gradient, _local(innovation, self.memory, last))

    def update(self, statistics, scale, whitened, informative):
        square, _ = statistics
        return square.update(whitened, informative), scale if self.remembers else None

    def leave_one_out(self, statistics, squares, weights):
        square, last = statistics
        number = jnp.sum(weights, axis=0)
        left_out = jnp.sum(weights * squares, axis=0) / jnp.where(number > 0, number, 1)
        mean = jnp.where(number > 0, jnp.minimum(square.mean, left_out), square.mean)
        return MeanSquare(mean * square.number, square.number), last

    def finalise(self, statistics):
        square, _ = statistics
        return _constant_if(self.stop_gradient, safe_sqrt(square.mean))


class MeanSquare(eqx.Module):
    """A running mean of whitened residuals squared: ``total`` over ``number`` steps."""

    total: Float[Array, "*batch"]
    number: Float[Array, ""]

    @staticmethod
    def none(shape: tuple[int, ...], dtype) -> "MeanSquare":
        """Before any data."""
        return MeanSquare(jnp.zeros(shape, dtype), jnp.zeros((), dtype))

    def update(self, whitened: Float[Array, "*batch m cols"], informative: Array) -> "MeanSquare":
        """After one step; residuals at round-off level enter neither sum nor number."""
        square = jnp.mean(whitened**2, axis=(-2, -1))
        return MeanSquare(
            self.total + jnp.where(informative, square, 0), self.number + informative.astype(self.number.dtype)
        )

    @property
    def mean(self) -> Float[Array, "*batch"]:
        """The mean so far; one if nothing was informative."""
        some = self.number > 0
        return jnp.where(some, self.total / jnp.where(some, self.number, 1), 1)


def _local(innovation, memory, last):
    """The local scale, mixed with the one of the step before, ``last``, if there was one and it is to be remembered."""
    local = innovation.scale
    if not memory:
        return local
    last = last * innovation.unit
    known = (local > 0) & (last > 0) & jnp.isfinite(last)
    local, last = jnp.where(known, local, 1), jnp.where(known, last, 1)
    mixed = jnp.hypot((1 - memory) ** 0.5 * local, memory**0.5 * jnp.minimum(last, _REMEMBERED * local))
    return jnp.where(known, mixed, innovation.scale)


def _check_memory(calibration):
    memory = calibration.memory
    if not isinstance(memory, (int, float)) or not 0 <= memory < 1:
        name = type(calibration).__name__
        raise ValueError(f"{name}(memory) must be a number in [0, 1), a share of the last step's, got {memory!r}.")


def _constant_if(flag, x):
    return lax.stop_gradient(x) if flag else x
