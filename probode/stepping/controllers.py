"""Step-size controllers: accept or reject an attempt by its error norm, propose the next step.

With ``E = norm^(-1/order)``, by how much the step could grow if its error is of the order ``dt^order``, the classical
rules of Hairer, Norsett, Wanner (1993), II.4, and Gustafsson (1991) read ``safety E`` and
``safety E^a (E / E_previous)^b``.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

from ..algebra.factorisations import Layout
from ..util.checks import as_float, as_scalar, require


class Tolerances(eqx.Module):
    """The error of a step that is allowed: ``atol + rtol |u|`` for each component.

    ``rtol``, ``atol``: a number, or a PyTree like ``u`` with a number, or an array that broadcasts, for each leaf.
    Raises ``ValueError`` for tolerances that are negative, not finite, or both zero.

    >>> import jax.numpy as jnp, probode
    >>> probode.Tolerances(1e-3, 1e-6).weight(jnp.array([1.0, 0.0]))
    Array([1.001e-03, 1.000e-06], dtype=float64)
    """

    rtol: PyTree[Float[Array, "..."]]
    atol: PyTree[Float[Array, "..."]]

    def __init__(self, rtol: Any = 1e-3, atol: Any = 1e-6):
        self.rtol, self.atol = _not_negative(rtol, "rtol"), _not_negative(atol, "atol")
        if eqx.is_array(self.rtol) and eqx.is_array(self.atol):
            self.rtol = _not_both_zero(self.rtol, self.atol)

    def of(self, layout: Layout) -> "Tolerances":
        """The same tolerances with a number for each component of the flat ``u``, ``(d,)``; plain numbers stay numbers.

        Raises ``ValueError`` for a PyTree or an array that does not fit ``u``, and for a component without tolerance.
        """
        if eqx.is_array(self.rtol) and eqx.is_array(self.atol) and self.rtol.ndim == self.atol.ndim == 0:
            return self
        rtol, atol = layout.per_component(self.rtol, "rtol"), layout.per_component(self.atol, "atol")
        return eqx.tree_at(lambda t: (t.rtol, t.atol), self, (_not_both_zero(rtol, atol), atol))

    def weight(self, size: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """``atol + rtol size`` in the dtype of ``size``, whose last axis is that of the components."""
        rtol, atol = (x.astype(size.dtype) for x in (self.rtol, self.atol))
        # Explicit: JAX can be told to refuse arrays of different rank.
        rtol, atol = (x if x.ndim == 0 else jnp.broadcast_to(x, size.shape) for x in (rtol, atol))
        return atol + rtol * size


class Limits(eqx.Module):
    """Bounds of the steps, and times that must be hit.

    ``shortest``, ``longest``: of the lengths that are asked for; zero and infinity for no bound. ``stops``: times at
    which the equation jumps, ``(times,)``; without any the program knows of none. Raises ``ValueError`` for bounds that
    are not positive or out of order, and for times that are not finite.

    >>> import probode
    >>> limits = probode.Limits(dt_max=0.1)
    >>> float(limits.shortest), float(limits.longest), limits.stops.shape
    (0.0, 0.1, (0,))
    """

    shortest: Float[Array, ""]
    longest: Float[Array, ""]
    stops: Float[Array, " times"]

    def __init__(self, dt_min: Any = None, dt_max: Any = None, stop_at: Any = None):
        if dt_min is not None:
            dt_min = as_scalar(dt_min, "dt_min")
            dt_min = require(dt_min, dt_min > 0, "dt_min must be positive (the length of a step)", dt_min=dt_min)
        if dt_max is not None:
            dt_max = as_scalar(dt_max, "dt_max")
            dt_max = require(dt_max, dt_max > 0, "dt_max must be positive (the length of a step)", dt_max=dt_max)
        if dt_min is not None and dt_max is not None:
            dt_max = require(dt_max, dt_min <= dt_max, "dt_min must not exceed dt_max", dt_min=dt_min, dt_max=dt_max)
        if stop_at is not None:
            stop_at = as_float(stop_at, "stop_at")
            if stop_at.ndim != 1 or stop_at.size == 0:
                raise ValueError(f"stop_at must be an array of times of shape (times,), got shape {stop_at.shape}.")
            stop_at = require(stop_at, abs(stop_at) < np.inf, "stop_at must hold finite times", stop_at=stop_at)
        self.shortest = jnp.asarray(0.0 if dt_min is None else dt_min)
        self.longest = jnp.asarray(jnp.inf if dt_max is None else dt_max)
        self.stops = jnp.zeros(0) if stop_at is None else jnp.asarray(stop_at)


class AbstractController(eqx.Module):
    """The step size control of a solve: whether an attempt is accepted, and how long the next one is.

    It knows numbers, not states. A subclass defines ``init`` and ``propose``, and has the fields ``tolerances``, which
    weigh the error, and ``limits``, the bounds and stops of the steps. Raises ``TypeError`` for fields of another kind.

    The laws, which ``probode.testing.check_controller`` checks: an attempt is accepted if and only if its error norm is
    at most one; after a rejection the next length is shorter; proposed lengths are positive, finite, proportional to
    that of the attempt, and not longer for a larger error; the controller's state keeps structure, shapes and dtypes.

    >>> import probode
    >>> probode.testing.check_controller(probode.PIController())  # or a subclass of your own
    """

    tolerances: eqx.AbstractVar[Tolerances]
    limits: eqx.AbstractVar[Limits]

    def __check_init__(self) -> None:
        for name, kind in (("tolerances", Tolerances), ("limits", Limits)):
            if not isinstance(part := getattr(self, name), kind):
                here = f"{type(self).__name__}({name})"
                raise TypeError(f"{here} must be a probode.{kind.__name__}(...), got {part!r}.")

    @property
    def rtol(self) -> PyTree[Float[Array, "..."]]:
        """The relative tolerance, a share of ``|u|``."""
        return self.tolerances.rtol

    @property
    def atol(self) -> PyTree[Float[Array, "..."]]:
        """The absolute tolerance, in units of ``u``."""
        return self.tolerances.atol

    @abstractmethod
    def init(self, dtype: DTypeLike) -> Any:
        """The controller's state before the first attempt: a PyTree of arrays.

        ``dtype``: that of the solver's state, and of ``dt`` in ``propose``.
        """

    @abstractmethod
    def propose(
        self, dt: Float[Array, ""], error_norm: Float[Array, ""], order: int, state: Any
    ) -> tuple[Bool[Array, ""], Float[Array, ""], Any]:
        """Whether to accept an attempt, the length of the next one, and the next state of the controller.

        ``dt``: the length of the attempt, positive. ``error_norm``: the size of its error in tolerances; one is just
        good enough, and it is infinite if the attempt is not finite. ``order``: the error grows like ``dt^order``.

        The loop applies the limits to the proposed length, and makes a step at most three times as long as the one
        before. The next state is kept after an attempt that is accepted or rejected here. If an attempt is accepted
        here but the solver refuses its result, the state before is put back: where the result is not finite, where the
        output scale does not explain the residual, and where the step goes beyond an event or is too long to see all
        events. After a stop, or a reset by an event, ``init`` is called again.
        """


class IntegralController(AbstractController):
    """``dt <- dt * clip(safety * E, factor_min, factor_max)``; accepts when ``error_norm <= 1``.

    ``E = error_norm^(-1/order)``, after an accepted step the smaller of its own and that of the accepted step before.
    So steps grow only after two small errors in a row: residuals of a filter alternate between small and large, and a
    longer step after an unusually small one is rejected, again and again. (Without this memory:
    ``PIController(integral=1, proportional=0)``.)

    Whatever the controller proposes, a step is at most three times as long as the one before: an error of zero says
    nothing about what lies further ahead. Steps that observe all derivatives (``TS0`` of a lifted equation) are a
    twentieth shorter than proposed. So in a solve a ``factor_max`` has an effect below three alone (there below 3.2),
    and its default, ten, has none.

    ``rtol`` and ``atol`` weigh the error as ``atol + rtol |u|``: numbers, or PyTrees like ``u`` with a number or an
    array for each leaf. ``dt_min``, ``dt_max`` bound the steps (the last step before ``t1`` or a ``stop_at`` may be
    shorter; a rejected step of ``dt_min`` ends the solve).

    ``stop_at``: times, in any order, at which the equation jumps: a switch, a knot of interpolated data, where an
    infusion begins or ends (a dose that is added to ``u`` itself is a new solve from ``u`` and the dose). Such a time
    belongs to the step before it from the left and to the next one from the right, whatever the equation says of the
    time itself, also in derivatives with respect to it. The distribution of ``u`` (``u, .., u^(k-1)``) stays; behind
    the jump derivatives and the length of the step are computed again, as at ``t0``. The derivatives move with ``u`` as
    the linearisation says: under ``BlockDiagonal`` or ``Isotropic`` by the part of the Jacobian that is kept, under
    ``TS0`` not at all. Raises ``ValueError`` for negative or vanishing tolerances, factors out of order, bounds that
    are not positive.

    >>> import jax.numpy as jnp, probode
    >>> controller = probode.IntegralController()
    >>> accept, dt, _ = controller.propose(jnp.array(0.1), jnp.array(0.5), 4, controller.init(jnp.float32))
    >>> bool(accept), bool(dt > 0.1)
    (True, True)
    """

    tolerances: Tolerances
    limits: Limits
    safety: Float[Array, ""]
    factor_min: Float[Array, ""]
    factor_max: Float[Array, ""]

    def __init__(
        self,
        rtol: Any = 1e-3,
        atol: Any = 1e-6,
        *,
        safety: Any = 0.95,
        factor_min: Any = 0.2,
        factor_max: Any = 10.0,
        dt_min: Any = None,
        dt_max: Any = None,
        stop_at: Any = None,
    ):
        self.tolerances, self.limits = Tolerances(rtol, atol), Limits(dt_min, dt_max, stop_at)
        self.safety, self.factor_min, self.factor_max = _factors(safety, factor_min, factor_max)

    def init(self, dtype: DTypeLike) -> Float[Array, ""]:
        return jnp.full((), jnp.inf, dtype)

    def propose(
        self, dt: Float[Array, ""], error_norm: Float[Array, ""], order: int, state: Any
    ) -> tuple[Bool[Array, ""], Float[Array, ""], Any]:
        growth = _log_growth(error_norm, order)
        accept = error_norm <= 1
        return (
            accept,
            _next_dt(self, dt, jnp.where(accept, jnp.minimum(growth, state), growth)),
            jnp.where(accept, growth, state),
        )


class PIController(AbstractController):
    """Proportional-integral control: ``dt <- dt * clip(safety E^integral (E / E_previous)^proportional)``.

    ``E = error_norm^(-1/order)``, ``E_previous`` that of the last accepted step. Smoother step sequences than
    ``IntegralController``, whose other parameters it shares.

    >>> import jax.numpy as jnp, probode
    >>> controller = probode.PIController(1e-4, 1e-6)
    >>> accept, *_ = controller.propose(jnp.array(0.1), jnp.array(2.0), 4, controller.init(jnp.float64))
    >>> bool(accept)
    False
    """

    tolerances: Tolerances
    limits: Limits
    safety: Float[Array, ""]
    factor_min: Float[Array, ""]
    factor_max: Float[Array, ""]
    integral: Float[Array, ""]
    proportional: Float[Array, ""]

    def __init__(
        self,
        rtol: Any = 1e-3,
        atol: Any = 1e-6,
        *,
        safety: Any = 0.95,
        factor_min: Any = 0.2,
        factor_max: Any = 10.0,
        dt_min: Any = None,
        dt_max: Any = None,
        stop_at: Any = None,
        integral: Any = 0.3,
        proportional: Any = 0.4,
    ):
        self.tolerances, self.limits = Tolerances(rtol, atol), Limits(dt_min, dt_max, stop_at)
        self.safety, self.factor_min, self.factor_max = _factors(safety, factor_min, factor_max)
        integral = as_scalar(integral, "PIController(integral)")
        proportional = as_scalar(proportional, "PIController(proportional)")
        message = "PIController needs integral >= 0 and proportional >= 0, not both zero"
        positive = (integral >= 0) & (proportional >= 0) & (integral + proportional > 0)
        self.integral = jnp.asarray(require(integral, positive, message, integral=integral, proportional=proportional))
        self.proportional = jnp.asarray(proportional)

    def init(self, dtype: DTypeLike) -> Float[Array, ""]:
        return jnp.zeros((), dtype)

    def propose(
        self, dt: Float[Array, ""], error_norm: Float[Array, ""], order: int, state: Any
    ) -> tuple[Bool[Array, ""], Float[Array, ""], Any]:
        growth = _log_growth(error_norm, order)
        a, b = self.integral.astype(dt.dtype), self.proportional.astype(dt.dtype)
        accept = error_norm <= 1
        return accept, _next_dt(self, dt, a * growth + b * (growth - state)), jnp.where(accept, growth, state)


def _not_negative(tree, name):
    """A tolerance as arrays; raises ``ValueError`` unless all are finite and not negative."""
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name} must be a number or a PyTree of numbers like u, got nothing.")

    def checked(x):
        x = as_float(x, name)
        good = (x >= 0) & (x < np.inf)
        return jnp.asarray(require(x, good, "Tolerances must be finite and not negative", **{name: x}))

    return jax.tree.map(checked, tree)


def _not_both_zero(rtol, atol):
    """``rtol``; raises ``ValueError`` where neither it nor ``atol`` is positive."""
    message = "rtol and atol are both zero: no step could ever be accepted. Set at least one"
    return jnp.asarray(require(rtol, (rtol > 0) | (atol > 0), message))


def _log_growth(error_norm, order):
    """``log E``: one logarithm and one exponential are cheaper than powers."""
    # Bounded away from 0 and infinity: a zero residual or a NaN must not reach the next proposal.
    bounded = jnp.where(error_norm < 1e20, jnp.maximum(error_norm, 1e-20), 1e20)
    return -jnp.log(bounded) / order


def _next_dt(controller, dt, log_growth):
    safety, smallest, largest = (
        x.astype(dt.dtype) for x in (controller.safety, controller.factor_min, controller.factor_max)
    )
    return dt * jnp.clip(safety * jnp.exp(log_growth), smallest, largest)


def _factors(safety, factor_min, factor_max):
    safety = as_scalar(safety, "safety")
    safety = require(safety, (safety > 0) & (safety <= 1), "A controller needs 0 < safety <= 1", safety=safety)
    factor_min, factor_max = as_scalar(factor_min, "factor_min"), as_scalar(factor_max, "factor_max")
    ordered = (factor_min > 0) & (factor_min < 1) & (factor_max > 1)
    message = "A controller needs 0 < factor_min < 1 < factor_max"
    factor_min = require(factor_min, ordered, message, factor_min=factor_min, factor_max=factor_max)
    return jnp.asarray(safety), jnp.asarray(factor_min), jnp.asarray(factor_max)
