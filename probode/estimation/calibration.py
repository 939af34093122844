"""Calibration: estimation of the prior's output scale from the residuals of the steps.

A calibration chooses the scale of each step's process noise. It may collect statistics, and turn them into one factor
on all covariances at the end. Sources: Schober, Sarkka, Hennig (2019), "A probabilistic model for the numerical
solution of initial value problems", for the local scale; Tronarp, Kersting, Sarkka, Hennig (2019), "Probabilistic
solutions to ordinary differential equations as nonlinear Bayesian filtering", for the global one; Bosch, Hennig,
Tronarp (2021), "Calibrated adaptive probabilistic ODE solvers", for one scale per component.
"""

from abc import abstractmethod
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..algebra.conditioning import Update
from ..algebra.innovation import Innovation
from ..algebra.linalg import safe_sqrt
from ..util.checks import require


T = TypeVar("T")

# The scale of the step before enters with at most so many times the local one. Scales that alternate from step to step
# do so within a factor of ten; those of a stiff problem fall by many orders of magnitude in a few steps, and without
# this bound a scale that is far too large would spoil the mean.
_REMEMBERED = 10.0


class Evidence(eqx.Module):
    """The sums that the log marginal likelihood of the equation at the steps is made of, for each batch element.

    ``sums``: sums over the steps of the squared whitened residuals, of ``log det`` of the square roots of their
    covariances, and of the number of residuals. One array, since every array that a loop carries costs time.
    """

    sums: Float[Array, "*batch 3"]

    @staticmethod
    def zero(shape: tuple[int, ...], dtype: DTypeLike) -> "Evidence":
        """Sums of zero over zero steps, for scales of the batch shape ``shape``."""
        return Evidence(jnp.zeros((*shape, 3), dtype))

    def update(self, update: Update) -> "Evidence":
        """The sums with one more step."""
        cols = update.influence.whitened.shape[-1]
        return Evidence(self.sums + jnp.stack([update.square, cols * update.log_det, cols * update.rank], -1))

    @property
    def number(self) -> Float[Array, "*batch"]:
        """The number of residuals so far."""
        return self.sums[..., 2]

    def log_likelihood(self, factor: Float[Array, "*batch"]) -> Float[Array, ""]:
        """The log density of all residuals, with every standard deviation multiplied by ``factor``."""
        variance = jnp.where(factor > 0, factor, 1) ** 2
        square, log_det, number = jnp.moveaxis(self.sums, -1, 0)
        return -jnp.sum(log_det + (square / variance + number * jnp.log(2 * jnp.pi * variance)) / 2)


class AbstractCalibration(eqx.Module):
    """An estimator of the output scale: the factor on the square root of the prior's process noise.

    Scales have the layout's batch shape, which is ``()``, or ``(d,)`` under ``BlockDiagonal()``. A subclass defines
    ``init``, ``scale``, ``update`` and ``finalise``, and may set, as class attributes:

    - ``relinearise``: whether the equation is linearised once more with the noise of the estimated scale, for
      linearisations that depend on the covariance (``SLR0``, ``SLR1``).
    - ``is_local``: whether ``scale`` follows ``innovation.scale``, so that the noise of a step explains its residual.
      If not, the solver rejects steps whose residual the noise does not explain.
    - ``remembers``: whether ``scale`` depends on the statistics.

    The property ``rescales`` says whether ``finalise`` returns a factor. Such a calibration would also rescale what the
    user knows, as the noise of data: with it, data and an uncertain ``u0`` raise ``ValueError``.

    >>> import probode
    >>> probode.NoCalibration().finalise(()) is None  # all covariances stay as they are
    True
    """

    relinearise = False
    is_local = False
    remembers = False

    @property
    def rescales(self) -> bool:
        """Whether ``finalise`` returns a factor for all covariances."""
        return returns_factor(self, ())

    @abstractmethod
    def init(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """The statistics before the first step: a PyTree of arrays, ``()`` for none; ``shape``: that of scales."""

    @abstractmethod
    def scale(self, innovation: Innovation, statistics: Any) -> Float[Array, "*batch"]:
        """The output scale of a step, from its innovation and the statistics of the steps before.

        It multiplies the square root of the process noise. As in ``Innovation`` it is given times the transition's
        ``magnitude``, so that ``innovation.unit`` is the prior's own output scale.
        """

    @abstractmethod
    def update(
        self,
        statistics: Any,
        scale: Float[Array, "*batch"],
        whitened: Float[Array, "*batch m cols"],
        informative: Bool[Array, ""],
    ) -> Any:
        """The statistics after an accepted step.

        ``scale``: the output scale of the step, as a factor on the prior's own. ``whitened``: the residual whitened
        with its covariance ``S`` under this scale and the uncertainty before the step, ``S^(-1/2) z``. ``informative``:
        false if the residual is no larger than round-off, and must not be counted.

        It is also called after a restart at a time at which the equation jumps, with zeros and a false ``informative``:
        a scale that was remembered is reset.
        """

    @abstractmethod
    def finalise(self, statistics: Any) -> Float[Array, "*batch"] | None:
        """The factor on the square roots of all covariances at the end of the solve; ``None`` leaves them unchanged."""


def returns_factor(calibration: AbstractCalibration, shape: tuple[int, ...]) -> bool:
    """Whether ``finalise`` returns a factor for all covariances, for output scales of the shape ``shape``.

    Found out from the method: a subclass that did not declare it would wrongly rescale what data have contributed.
    """
    dtype = jnp.zeros(()).dtype
    # Only shapes are evaluated.
    return eqx.filter_eval_shape(lambda part: part.finalise(part.init(shape, dtype)), calibration) is not None


def check_not_rescaled(x: T, certain: Any, calibration: AbstractCalibration, shape: tuple[int, ...], known: str) -> T:
    """``x``; raises ``ValueError`` if the calibration rescales all covariances, unless ``certain`` holds everywhere.

    ``known``: what it would wrongly rescale, in words. ``shape``: that of scales.
    """
    if not returns_factor(calibration, shape):
        return x
    message = (
        f"{type(calibration).__name__}() rescales all covariances when the solve has ended, also {known}. "
        "Use DynamicCalibration() or NoCalibration()"
    )
    return require(x, certain, message)


class AbstractLeaveOneOut(AbstractCalibration):
    """A calibration that uses leave-one-out residuals: those of each step given the equation at all other steps.

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
        """The statistics of a solve, updated with the leave-one-out residuals of its steps.

        ``squares``: the squared residuals over their variances, for each step. ``weights``: zero for steps that do not
        count, otherwise one.
        """


class NoCalibration(AbstractCalibration):
    """No calibration: the output scale is the prior's own, as the user has set it.

    For scales that are known, or estimated otherwise, for example with a likelihood.

    >>> import probode
    >>> probode.NoCalibration()
    NoCalibration()
    """

    def init(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return ()

    def scale(self, innovation: Innovation, statistics: Any) -> Float[Array, "*batch"]:
        return innovation.unit

    def update(
        self,
        statistics: Any,
        scale: Float[Array, "*batch"],
        whitened: Float[Array, "*batch m cols"],
        informative: Bool[Array, ""],
    ) -> Any:
        return ()

    def finalise(self, statistics: Any) -> Float[Array, "*batch"] | None:
        return None


class MLECalibration(AbstractCalibration):
    """One output scale for the whole solve: the global quasi-maximum-likelihood estimate.

    ``s^2`` is the mean of ``z^T S^-1 z / size(z)`` over the steps, with the residuals ``z`` and their covariances ``S``
    under the prior's own scale; one per component under ``BlockDiagonal()``. All covariances are multiplied by it at
    the end, the posterior mean is that of the prior's own scale. (Tronarp, Kersting, Sarkka, Hennig 2019,
    "Probabilistic solutions to ordinary differential equations as nonlinear Bayesian filtering"; Bosch, Hennig, Tronarp
    2021, "Calibrated adaptive probabilistic ODE solvers".)

    - ``stop_gradient``: whether the estimate is a constant in derivatives.

    >>> import probode
    >>> probode.MLECalibration(stop_gradient=True)
    MLECalibration(stop_gradient=True)
    """

    stop_gradient: bool = eqx.field(static=True, default=False)

    def init(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return MeanSquare.zero(shape, dtype)

    def scale(self, innovation: Innovation, statistics: Any) -> Float[Array, "*batch"]:
        return innovation.unit

    def update(
        self,
        statistics: Any,
        scale: Float[Array, "*batch"],
        whitened: Float[Array, "*batch m cols"],
        informative: Bool[Array, ""],
    ) -> Any:
        return statistics.update(whitened, informative)

    def finalise(self, statistics: Any) -> Float[Array, "*batch"] | None:
        return _constant_if(self.stop_gradient, safe_sqrt(statistics.mean))


class DynamicCalibration(AbstractCalibration):
    """A calibration that estimates an output scale in every step, by quasi-maximum likelihood: ``Innovation.scale``.

    The default. It adapts to problems whose stiffness or activity changes; under ``BlockDiagonal()`` every component
    has its own. (Schober, Sarkka, Hennig 2019, "A probabilistic model for the numerical solution of initial value
    problems".)

    For ``TS0`` of a ``Lifted`` equation that gives all derivatives of the prior, the covariance of ``u`` after a step
    is not that of the prior's noise, which does not contain what a frozen field leaves out. It comes from the moves of
    the evaluations: they are extrapolated, carried along the solution, and those of all steps add up with their signs.

    - ``relinearise``: whether the equation is linearised again with the noise of the estimated scale, for
      linearisations that depend on the covariance.
    - ``stop_gradient``: whether the scales are constants in derivatives.
    - ``memory``: ``scale^2 = (1 - memory) local^2 + memory last^2``, where ``last`` is the scale of the step before, or
      ten times the local one if that is less. Zero is the estimate of the source. Then each residual determines the
      gain, and with it the next residual: if ``num_derivatives`` minus the order of the equation is even (``IWP(3)``
      for ``u' = f``, ``IWP(4)`` for ``u'' = f``), scales tend to alternate from step to step, and the mean converges
      more slowly. With ``memory=0.5`` they do not.

    Raises ``ValueError`` for a memory outside ``[0, 1)``.

    >>> import probode
    >>> probode.DynamicCalibration(relinearise=True, memory=0.5)
    DynamicCalibration(relinearise=True, memory=0.5)
    """

    relinearise: bool = eqx.field(static=True, default=False)
    stop_gradient: bool = eqx.field(static=True, default=False)
    memory: float = eqx.field(static=True, default=0.0)
    is_local = True

    def __check_init__(self) -> None:
        _check_memory(self)

    @property
    def remembers(self) -> bool:  # type: ignore[override]  # a flag may be found out
        return self.memory > 0

    def init(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return jnp.zeros(shape, dtype) if self.remembers else ()

    def scale(self, innovation: Innovation, statistics: Any) -> Float[Array, "*batch"]:
        return _constant_if(self.stop_gradient, _local(innovation, self.memory, statistics))

    def update(
        self,
        statistics: Any,
        scale: Float[Array, "*batch"],
        whitened: Float[Array, "*batch m cols"],
        informative: Bool[Array, ""],
    ) -> Any:
        return scale if self.remembers else ()

    def finalise(self, statistics: Any) -> Float[Array, "*batch"] | None:
        return None


class LeaveOneOutCalibration(AbstractLeaveOneOut):
    """The output scales of ``DynamicCalibration``, and a factor on all covariances from leave-one-out residuals.

    The covariances are multiplied by ``min(mean r^2, mean l^2)``, means over the steps. ``r^2 = z^T S^-1 z / size(z)``
    compares each residual with its prediction from the past, ``l^2`` with that from all other residuals, later ones
    included, each under the variance of its own prediction. ``r^2`` accounts for the uncertainty before a step, which
    the dynamic scale ignores; ``l^2`` for the errors of a smooth solution, which do not add up like independent
    increments. The posterior mean is that of ``DynamicCalibration``.

    Solves that keep their steps (``FixedIntervalSmoother``, ``SaveAt(steps=True)`` or ``dense``, ``solve_grid``) use
    both, others ``r^2`` alone. There is one factor per component under ``BlockDiagonal()``. For ``TS1`` with
    ``Dense()``, or ``TS0(ode, evaluations=2)`` with ``BlockDiagonal()``: residuals do not show the errors that
    accumulate with a single evaluation of ``TS0``, or with a Jacobian without the coupling of components.

    - ``stop_gradient``: whether all scales are constants in derivatives.
    - ``memory``: see ``DynamicCalibration``. It makes the mean more accurate, but the uncertainty can be too small by a
      factor of seven (Lotka-Volterra, ``IWP(3)``).

    Raises ``ValueError`` for a memory outside ``[0, 1)``.

    >>> import probode
    >>> probode.LeaveOneOutCalibration(stop_gradient=True)
    LeaveOneOutCalibration(stop_gradient=True)
    """

    stop_gradient: bool = eqx.field(static=True, default=False)
    memory: float = eqx.field(static=True, default=0.0)
    is_local = True

    def __check_init__(self) -> None:
        _check_memory(self)

    @property
    def remembers(self) -> bool:  # type: ignore[override]  # a flag may be found out
        return self.memory > 0

    def init(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return MeanSquare.zero(shape, dtype), jnp.zeros(shape, dtype) if self.remembers else ()

    def scale(self, innovation: Innovation, statistics: Any) -> Float[Array, "*batch"]:
        _, last = statistics
        return _constant_if(self.stop_gradient, _local(innovation, self.memory, last))

    def update(
        self,
        statistics: Any,
        scale: Float[Array, "*batch"],
        whitened: Float[Array, "*batch m cols"],
        informative: Bool[Array, ""],
    ) -> Any:
        square, _ = statistics
        return square.update(whitened, informative), scale if self.remembers else ()

    def leave_one_out(
        self, statistics: Any, squares: Float[Array, "steps *batch"], weights: Float[Array, "steps *batch"]
    ) -> Any:
        square, last = statistics
        number = jnp.sum(weights, axis=0)
        left_out = jnp.sum(weights * squares, axis=0) / jnp.where(number > 0, number, 1)
        mean = jnp.where(number > 0, jnp.minimum(square.mean, left_out), square.mean)
        return MeanSquare(mean * square.number, square.number), last

    def finalise(self, statistics: Any) -> Float[Array, "*batch"] | None:
        square, _ = statistics
        return _constant_if(self.stop_gradient, safe_sqrt(square.mean))


class MeanSquare(eqx.Module):
    """The mean of the squared whitened residuals so far: ``total``, for each batch element, over ``number`` steps."""

    total: Float[Array, "*batch"]
    number: Float[Array, ""]

    @staticmethod
    def zero(shape: tuple[int, ...], dtype: DTypeLike) -> "MeanSquare":
        """A mean of zero over zero steps, for scales of the batch shape ``shape``."""
        return MeanSquare(jnp.zeros(shape, dtype), jnp.zeros((), dtype))

    def update(self, whitened: Float[Array, "*batch m cols"], informative: Array) -> "MeanSquare":
        """The mean after one more step, which is not counted unless its residual is ``informative``."""
        square = jnp.mean(whitened**2, axis=(-2, -1))
        return MeanSquare(
            self.total + jnp.where(informative, square, 0), self.number + informative.astype(self.number.dtype)
        )

    @property
    def mean(self) -> Float[Array, "*batch"]:
        """The mean so far; one if no step was counted, which leaves covariances as they are."""
        some = self.number > 0
        return jnp.where(some, self.total / jnp.where(some, self.number, 1), 1)


def _local(innovation, memory, last):
    """The local scale of a step, or with a ``memory`` its mean square with ``last``, the scale of the step before.

    ``last``: as a factor on the prior's own scale; zero if there is none.
    """
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
