"""Matern processes, known as kernels of Gaussian process regression, as state-space models.

Their equation is ``(d/dt + lambda)^(nu + 1) u = white noise``, and their stationary covariance has a closed form
(Hartikainen & Sarkka, 2010, "Kalman filtering and smoothing solutions to temporal Gaussian process regression
models").
"""

import functools as ft
import math
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from ..algebra.factorisations import Layout
from ..algebra.normal import Normal
from ..algebra.transition import Transition
from ..util.checks import as_integer
from .discretisation import companion_transition, lift_blocks
from .drifts import uncoupled_blocks_of
from .output_scale import as_output_scale, as_positive
from .powers import exact_root, powers
from .prior import AbstractPrior


# After so many time constants 1 / lambda the influence of the initial state is below round-off:
# 100^11 exp(-100) < 1e-21.
_LONG = 100.0


class Matern(AbstractPrior):
    """The Matern process of smoothness ``num_derivatives + 1/2``, as a state-space model.

    With ``lambda = sqrt(2 nu + 1) / length_scale``, ``(d/dt + lambda)^(nu + 1) u = output_scale * white noise``
    (Hartikainen & Sarkka, 2010, "Kalman filtering and smoothing solutions to temporal Gaussian process regression
    models"). For functions that return to zero, such as latent forces.

    - ``num_derivatives``: ``nu``, how many derivatives of ``u`` the state holds.
    - ``length_scale``: in units of time. A number or, not under ``Isotropic()``, one for each component, as a PyTree
      like ``u``.
    - ``output_scale``: see ``IWP``. It multiplies the noise, so that the variance of ``u`` is that of ``stationary``,
      not ``output_scale^2``.

    Raises ``ValueError`` unless ``num_derivatives`` is a positive integer and the scales are finite and positive (a
    matrix ``output_scale``: finite and of full rank), ``TypeError`` for scales that do not consist of real numbers; in
    the first step ``ValueError`` for scales that do not fit ``u`` or the factorisation.

    >>> import probode
    >>> probode.Matern(2, length_scale=1.5)
    Matern(num_derivatives=2, length_scale=f64[], output_scale=f64[])
    """

    num_derivatives: int = eqx.field(static=True)
    length_scale: PyTree[Float[Array, "..."]]
    output_scale: PyTree[Float[Array, "..."]]

    def __init__(self, num_derivatives: Any, length_scale: PyTree, *, output_scale: PyTree = 1.0):
        self.num_derivatives = as_integer(num_derivatives, "Matern(num_derivatives)", 1)
        self.length_scale = as_positive(length_scale, "Matern(length_scale)")
        self.output_scale = as_output_scale(output_scale, "Matern(output_scale)")

    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        n = self.num_derivatives + 1
        terms = powers(self._decay(layout), n + 1)
        row = -jnp.stack([math.comb(n, j) * terms[n - j] for j in range(n)], axis=-3)
        return companion_transition(row, dt, self.output_scale, layout)

    def stationary(self, layout: Layout) -> Normal:
        """The stationary distribution of the process, with mean zero, in the layout of a factorisation.

        It is the ``initial`` distribution of a process that has been running for long, see ``sample_prior``.
        ``P_ij = (-1)^((i-j)/2) int w^(i+j) S(w) dw / 2 pi`` for even ``i + j``, zero otherwise, with the spectral
        density ``S(w) = output_scale^2 / (lambda^2 + w^2)^(nu + 1)``.
        """
        n, decay = self.num_derivatives + 1, self._decay(layout)
        mean = layout.pack(jnp.zeros((n, layout.size), layout.dtype))
        if decay.ndim == 3 and layout.output_scale(self.output_scale).ndim == 2:
            # Components of different length scales with correlated noise have no closed form here: the noise of a step
            # that is long for all of them has the stationary covariance, up to round-off.
            forgotten = self.transition(_LONG / jnp.min(decay), layout)
            return Normal(mean, forgotten.magnitude * forgotten.noise)
        root = jnp.asarray(_stationary_root(self.num_derivatives), layout.dtype)

        units = jnp.stack(powers(1 / decay[..., 0, 0], n)[::-1], axis=-1) / jnp.sqrt(decay[..., 0])
        return Normal(mean, lift_blocks(root * units[..., None, :], self.output_scale, layout))

    def _decay(self, layout):
        shapes = "a number, or have the structure and shapes of u"
        length_scale = uncoupled_blocks_of(self.length_scale, "Matern(length_scale)", shapes, layout)
        return math.sqrt(2 * self.num_derivatives + 1) / length_scale


@ft.lru_cache
def _stationary_root(nu: int) -> np.ndarray:
    """The upper triangular root of the stationary covariance for ``lambda = 1`` and an output scale of one.

    Its moments ``int w^2k / (1 + w^2)^(nu+1) dw / 2 pi`` are exact fractions.
    """

    def moment(k):
        gammas = math.factorial(2 * k) * math.factorial(2 * (nu - k)) / Fraction(math.factorial(k))
        return gammas / (2 * 4**nu * math.factorial(nu - k) * math.factorial(nu))

    def entry(i, j):
        return (-1) ** ((j - i) // 2) * moment((i + j) // 2) if (i + j) % 2 == 0 else Fraction(0)

    return exact_root([[entry(i, j) for j in range(nu + 1)] for i in range(nu + 1)], [1] * (nu + 1))
