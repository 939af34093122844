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

from .factorisations import Layout
from .gaussians import Innovation, Linearisation, Transition, posterior_noise
from .linalg import safe_norm


def rms_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Root mean square."""
    return safe_norm(x) / math.sqrt(x.size)


def max_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Largest magnitude."""
    return jnp.max(jnp.abs(x))


class AbstractErrorEstimate(eqx.Module):
    """What one attempted step does wrong, per component of ``u``, and its norm.

    >>> import jax.numpy as jnp, probode
    >>> float(probode.ResidualError().norm(jnp.array([4.0, 0.0, 0.0, 0.0])))  # root mean square
    2.0
    """

    norm: eqx.AbstractVar[Callable]

    @abstractmethod
    def estimate(
        self,
        dt: Float[Array, ""],
        transition: Transition,
        equation: Linearisation,
        innovation: Innovation,
        layout: Layout,
    ) -> Float[Array, " d"]:
        """The local error in units of ``u``; ``innovation.scale * transition.noise`` is the noise of the step."""


class ResidualError(AbstractErrorEstimate):
    """``|dt|^k / k! * s * sqrt(diag(H Q H^T))``: the residual's standard deviation under the local scale ``s``,
    integrated ``k`` times (the order of the equation). Schober et al. (2019); Bosch et al. (2021).

    For ODEs. Careful: solutions come out two to three digits better than asked for. ``norm`` is a function of the error
    over the tolerance, ``rms_norm`` by default; ``max_norm`` bounds every component.

    >>> import jax.numpy as jnp, probode
    >>> from probode.errors import max_norm
    >>> float(probode.ResidualError(norm=max_norm).norm(jnp.array([0.5, -2.0])))
    2.0
    """

    norm: Callable = eqx.field(static=True, default=rms_norm)

    def estimate(self, dt, transition, equation, innovation, layout):
        k = equation.block
        if k is None:
            raise ValueError(
                "ResidualError() is about an equation for one derivative of u, like an ODE; a Residual, a Stack or an "
                "equation with noise may have other units and shapes. Use error=StateError()."
            )
        std = layout.std(innovation.scale[..., None, None] * innovation.factor)[0]
        return jnp.abs(dt) ** k / math.factorial(k) * std


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

    def estimate(self, dt, transition, equation, innovation, layout):
        left = posterior_noise(equation, transition.noise, layout.identity().shape[-1])
        return layout.std(innovation.scale[..., None, None] * left)[0]
