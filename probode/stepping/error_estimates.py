"""Local error estimates and the norm in which the controllers see them.

The estimate looks at the noise of one step only, so it is free of the covariance and costs no triangularisation of the
state: a rejected attempt stops here.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..algebra.factorisations import Layout
from ..algebra.innovation import explained, posterior_noise, residual_std
from ..algebra.linalg import root_mean_square
from .attempt import Attempt


# Errors of single steps add up: without this factor they are above the tolerance at the end of sensitive problems
# (chosen on end points, a driven pendulum, and close encounters).
_SAFETY = 5.0


def rms_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """The root mean square of an array, a scalar: the norm of error estimates by default.

    >>> import jax.numpy as jnp, probode
    >>> float(probode.rms_norm(jnp.array([3.0, 4.0, 0.0, 0.0])))
    2.5
    """
    return root_mean_square(x)


def max_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest magnitude in an array, a scalar: a norm for error estimates that bounds every component.

    >>> import jax.numpy as jnp, probode
    >>> float(probode.max_norm(jnp.array([3.0, -4.0])))
    4.0
    """
    return jnp.max(jnp.abs(x))


class AbstractErrorEstimate(eqx.Module):
    """An estimate of the local error of an attempted step, for each component of ``u``, and the norm to measure it in.

    A subclass has the field ``norm``, a function of the errors over the tolerances that returns a number, and defines
    ``estimate``. It may set, as a class attribute, ``needs_defects``: whether it uses the residuals of the corrected
    mean, ``innovation.inside`` and ``innovation.remainder``, which take further evaluations of the equation. If not,
    both are ``None``. If so, the equation decides which of them there are:

    - Both, where it is linearised by its whole derivative (``TS1`` under ``Dense``), or is not explicit. They take one
      evaluation inside the step, and as many at its end as the constraint makes.
    - Neither, for an explicit equation with a partial Jacobian or none (``TS0``, ``TS1`` under ``BlockDiagonal``). Only
      if the error is so small that the next step could be one and a half times as long, ``estimate`` is called again,
      with ``inside`` alone, which takes one evaluation.
    - Neither, for ``TS0`` of a ``Lifted`` equation. Its attempts have a ``correction`` instead, whatever
      ``needs_defects`` is, and where the error is small the loop itself looks at the residual inside the step.

    From an uncertain initial value ``estimate`` is called for each of its directions, too, with zeros for both.

    >>> import jax.numpy as jnp, probode
    >>> float(probode.ResidualError().norm(jnp.array([4.0, 0.0, 0.0, 0.0])))  # root mean square
    2.0
    """

    norm: eqx.AbstractVar[Callable]
    needs_defects = False

    @abstractmethod
    def estimate(
        self, attempt: Attempt, dt: Float[Array, ""], layout: Layout
    ) -> Float[Array, " d"] | Float[Array, "k d"]:
        """The local error of a step, in the units of ``u`` for every component, ``(d,)``; or of ``(u, u', ...)`` row by
        row, ``(k, d)``, each held against the tolerances.

        ``attempt``: the step. The square root of its noise is ``innovation.scale * transition.noise``. ``dt``: its
        signed length. ``layout``: how the state is stored.
        """


class LocalError(AbstractErrorEstimate):
    """The local error of a step in ``u, ..., u^(k-1)``, for an equation of order ``k``. The default.

    Where the linearisation is the whole derivative of the equation (``TS1`` or ``SLR1`` under ``Dense``), and of any
    equation that is not explicit (residuals, a ``Stack``, ``Noisy``):
    ``5 s sqrt(diag(Cov(u | z))) + (2^(nu+1) - 1) |Q H^T (H Q H^T)^-1 r|``. The first term is the standard deviation of
    ``u`` after the step under its noise alone, as in ``StateError``: damped as the method is, so that stiff components
    at rest do not hold up the solve. In the second, ``r`` is the residual of the corrected mean at the end of the step,
    which the linearisation left out; what it does to ``u`` enters the derivatives too, and a polynomial of degree
    ``nu`` extrapolates an error in equidistant values with up to that factor. (Of a ``Lifted`` equation every state
    knows several derivatives; there it is what the remainder does to the state, extrapolated over one more step of the
    same length, in absolute values.) Elsewhere (``TS0``, or ``TS1`` with the
    diagonal of the Jacobian) the residual itself, for ``u`` alone, ``|dt|^k / k! s sqrt(diag(H Q H^T))``: the errors
    of such steps add up with equal sign, and are near the tolerance in the end for this.

    For a ``Lifted`` equation in zeroth order, component by component the larger of two numbers: how far the last
    evaluation has moved ``u``, and the difference to the rule that leaves out the highest derivative at the new end.
    The first alone is blind where further evaluations move nothing, as in a quadrature; the second alone does not see
    that they have not converged. Where they are small the mean is held against the field inside the step.

    In the others, ``s`` is the local scale that explains the residual of the prediction and the one that explains the
    residual of the corrected mean inside the step, whichever is larger: a solution that moves between two ends at which
    nothing happens is seen. ``norm`` as for ``ResidualError``.

    >>> import jax.numpy as jnp, probode
    >>> float(probode.LocalError().norm(jnp.array([4.0, 0.0, 0.0, 0.0])))
    2.0
    """

    norm: Callable = eqx.field(static=True, default=rms_norm)
    needs_defects = True

    def estimate(
        self, attempt: Attempt, dt: Float[Array, ""], layout: Layout
    ) -> Float[Array, " d"] | Float[Array, "k d"]:
        transition, equation, innovation = attempt.transition, attempt.equation, attempt.innovation
        if attempt.correction is not None:
            moves = attempt.correction.last_change, attempt.correction.embedded
            return jnp.maximum(*(jnp.abs(layout.unpack(move)) for move in moves))
        scale = innovation.scale
        if innovation.inside is not None:
            scale = jnp.maximum(scale, innovation.size_inside)
        scale = scale[..., None, None]
        size = layout.identity().shape[-1]
        order = max(1, equation.matrix.shape[-1] // size - 1) if equation.gives is None else equation.gives.start
        if equation.gives is not None and not equation.whole:
            return jnp.abs(dt) ** order / math.factorial(order) * layout.std(scale * innovation.factor)[0]
        left = posterior_noise(equation, transition.noise, order * size)
        if innovation.remainder is None:
            return _SAFETY * layout.std(scale * left)
        left_out = layout.unpack(explained(transition, equation, innovation.factor, innovation.remainder))
        if equation.is_coupled:
            left_out = _accumulated(jnp.abs(left_out), jnp.abs(dt), order)
        else:
            left_out = (2 ** (layout.num_derivatives + 1) - 1) * jnp.abs(left_out[:order])
        return _SAFETY * layout.std(scale * left) + left_out


def _accumulated(errors, dt, order):
    """The sums ``|e_i| + dt |e_(i+1)| + dt^2 / 2 |e_(i+2)| + ...`` of errors in derivatives, for the first ones."""
    n = errors.shape[0]
    powers = jnp.stack([dt**j / math.factorial(j) for j in range(n)])[:, None]
    return jnp.stack([jnp.sum(powers[: n - i] * errors[i:], axis=0) for i in range(order)])


class ResidualError(AbstractErrorEstimate):
    """``|dt|^k / k! * s * sqrt(diag(H Q H^T))``: the residual's standard deviation under the local scale ``s``,
    integrated ``k`` times (the order of the equation). Schober et al. (2019); Bosch et al. (2021).

    For ODEs. Careful: solutions come out two to three digits better than asked for. ``norm`` is a function of the error
    over the tolerance, ``rms_norm`` by default; ``max_norm`` bounds every component.

    >>> import jax.numpy as jnp, probode
    >>> float(probode.ResidualError(norm=probode.max_norm).norm(jnp.array([0.5, -2.0])))
    2.0
    """

    norm: Callable = eqx.field(static=True, default=rms_norm)

    def estimate(
        self, attempt: Attempt, dt: Float[Array, ""], layout: Layout
    ) -> Float[Array, " d"] | Float[Array, "k d"]:
        equation, innovation = attempt.equation, attempt.innovation
        if equation.gives is None:
            raise ValueError(
                "ResidualError() is about an equation for one derivative of u, like an ODE; a Residual, a Stack or an "
                "equation with noise may have other units and shapes. Use error=StateError()."
            )
        k = equation.gives.start
        return jnp.abs(dt) ** k / math.factorial(k) * residual_std(equation, innovation, layout)


class StateError(AbstractErrorEstimate):
    """``s * sqrt(diag(Cov(u | z)))``: the standard deviation of ``u`` after the step under its noise alone and the
    local scale ``s``, that is, what the step adds to the error once the equation has been used.

    Lands closer to the tolerance than ``ResidualError``, with fewer steps. It does not see what the linearisation
    leaves out, which on stiff and far from linear problems is the larger part at loose tolerances: pass
    ``TS1(..., evaluations=4, relinearise=True)`` there. ``norm`` as there.

    >>> import jax.numpy as jnp, probode
    >>> float(probode.StateError().norm(jnp.array([4.0, 0.0, 0.0, 0.0])))
    2.0
    """

    norm: Callable = eqx.field(static=True, default=rms_norm)

    def estimate(
        self, attempt: Attempt, dt: Float[Array, ""], layout: Layout
    ) -> Float[Array, " d"] | Float[Array, "k d"]:
        left = posterior_noise(attempt.equation, attempt.transition.noise, layout.identity().shape[-1])
        return layout.std(attempt.innovation.scale[..., None, None] * left)[0]
