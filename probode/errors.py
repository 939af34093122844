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
from .gaussians import Innovation, Linearisation
from .linalg import safe_norm


def rms_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Root mean square."""
    return safe_norm(x) / math.sqrt(x.size)


def max_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Largest magnitude."""
    return jnp.max(jnp.abs(x))


class AbstractErrorEstimate(eqx.Module):
    """What one attempted step does wrong, per component of ``u``, and its norm."""

    norm: eqx.AbstractVar[Callable]

    @abstractmethod
    def estimate(
        self, dt: Float[Array, ""], equation: Linearisation, innovation: Innovation, layout: Layout
    ) -> Float[Array, " d"]:
        """The local error in units of ``u``."""


class ResidualError(AbstractErrorEstimate):
    """``|dt|^k / k! * s * sqrt(diag(H Q H^T))``: the residual's standard deviation under the local scale ``s``,
    integrated ``k`` times (the order of the equation). Schober et al. (2019); Bosch et al. (2021).

    ``norm`` is a function of the scaled error, ``rms_norm`` by default.
    """

    norm: Callable = eqx.field(static=True, default=rms_norm)

    def estimate(self, dt, equation, innovation, layout):
        k = equation.block
        std = layout.std(innovation.factor)[0]
        return jnp.abs(dt) ** k / math.factorial(k) * innovation.scale * std
