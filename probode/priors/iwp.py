"""The integrated Wiener process, with constants computed once in exact arithmetic.

Formulas: Kersting, Sullivan, Hennig (2020), "Convergence rates of Gaussian ODE filters", appendix A.
"""

import functools as ft
import math
from fractions import Fraction

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from ..algebra.derivatives import NoiseSplit
from ..algebra.factorisations import Layout
from ..algebra.transition import Transition
from ..util.checks import as_integer
from .output_scale import as_output_scale
from .powers import exact_inverse_root, exact_root, exact_solve, exponents_of_units, noise_units, powers, powers_of_step
from .prior import AbstractSplitPrior


class IWP(AbstractSplitPrior):
    """The ``num_derivatives`` times integrated Wiener process: ``u^(nu)`` is a Wiener process times ``output_scale``.

    The usual prior of ODE filters: its mean over a step is the Taylor polynomial of degree ``nu``. Formulas: Kersting,
    Sullivan, Hennig (2020), "Convergence rates of Gaussian ODE filters", appendix A.

    - ``num_derivatives``: ``nu``, how many derivatives of ``u`` the state holds.
    - ``output_scale``: in units of ``u^(nu) / sqrt(time)``. A positive number; not under ``Isotropic()``, one for each
      component, as a PyTree like ``u``; or, under ``Dense()``, a ``(d, d)`` array ``F`` of full rank over the ravelled
      ``u``, for noise with the covariance ``F^T F`` (as in ``Normal.factor``).

    Raises ``ValueError`` unless ``num_derivatives`` is a positive integer and the output scale is finite and positive
    (a matrix: finite and of full rank), ``TypeError`` for a scale that does not consist of real numbers; in the first
    step ``ValueError`` for a scale that does not fit ``u`` or the factorisation.

    >>> import probode
    >>> probode.IWP(3, output_scale=2.0)
    IWP(num_derivatives=3, output_scale=f64[])
    """

    num_derivatives: int = eqx.field(static=True)
    output_scale: PyTree[Float[Array, "..."]]
    is_polynomial = True

    def __init__(self, num_derivatives: int, *, output_scale: PyTree = 1.0):
        self.num_derivatives = as_integer(num_derivatives, "IWP(num_derivatives)", 1)
        self.output_scale = as_output_scale(output_scale, "IWP(output_scale)")

    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        pascal, root = _iwp_constants(self.num_derivatives)
        n = self.num_derivatives + 1
        dt = jnp.asarray(dt, layout.dtype)
        # A_ij = dt^(j-i) / (j-i)!
        matrix = jnp.asarray(pascal, layout.dtype) * powers_of_step(dt, n)
        # Q = T Qbar T with T_i = sqrt|dt| dt^(nu-i) / (nu-i)!
        columns, magnitude = noise_units(dt, n)
        noise = jnp.asarray(root, layout.dtype) * columns[None]
        return Transition(layout.broadcast(matrix), layout.lift(noise, self.output_scale), magnitude)

    def split(self, dt: Float[Array, ""], order: int, layout: Layout) -> NoiseSplit:
        exact = _split_constants(self.num_derivatives, order)
        gain, embedded, coarser, root, whitener, rest = (jnp.asarray(x, layout.dtype) for x in exact)
        n, m = self.num_derivatives + 1, self.num_derivatives + 1 - order
        dt = jnp.asarray(dt, layout.dtype)
        columns, _ = noise_units(dt, n)
        scale = layout.lift(jnp.ones((1, 1), layout.dtype), self.output_scale)
        # Of the product of all columns one logarithm: the product itself may underflow.
        exponent = sum(exponents_of_units(n)[order:])
        log_det = np.sum(np.log(np.abs(np.diagonal(exact[3])))).item() + exponent * jnp.log(jnp.abs(dt))
        log_scale = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(scale, axis1=-2, axis2=-1))), axis=-1)
        # A derivative of order j counts dt^(j-i) in one of order i.
        row = jnp.stack(powers(dt, n))
        steps = jnp.stack([row[order - i : n - i] for i in range(order)])
        return NoiseSplit(
            gain * steps,
            embedded * steps,
            coarser * steps,
            layout.lift(root * columns[None, order:], self.output_scale),
            scale.shape[-1] * log_det + m * log_scale,
            whitener / columns[None, order:],
            scale,
            layout.lift(rest * columns[None, :order], self.output_scale),
        )


@ft.lru_cache
def _iwp_constants(nu: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix ``1 / (j-i)!`` on and above the diagonal, and the upper Cholesky factor of ``Qbar``, columns scaled.

    Column ``j`` of the factor is divided by ``(nu-j)!``. ``Qbar_ij = 1 / (2 nu + 1 - i - j)`` is as ill-conditioned as
    a Hilbert matrix: an ``L D L^T`` in fractions keeps every digit, where floating point loses most of them by
    ``nu = 11``.
    """
    n = nu + 1
    pascal = np.array([[1 / math.factorial(j - i) if j >= i else 0.0 for j in range(n)] for i in range(n)])
    return pascal, exact_root(_scaled_covariance(nu), [math.factorial(nu - j) for j in range(n)])


def _scaled_covariance(nu):
    """``Qbar``, the covariance of the noise in units of ``sqrt(dt) dt^(nu-i) / (nu-i)!``."""
    return [[Fraction(1, 2 * nu + 1 - i - j) for j in range(nu + 1)] for i in range(nu + 1)]


@ft.lru_cache
def _split_constants(nu: int, k: int) -> tuple[np.ndarray, ...]:
    """The arrays of a ``NoiseSplit`` for a step of length one.

    The gain is the two-point Hermite rule, of which the embedded ones leave out the last derivative at the new end, or
    the last two. All are exact for as many powers ``t^p``, from ``p = nu + 1`` on, as they have weights: in units of
    ``dt^j / j!`` the ``j``-th derivative of such a power at ``t = 1`` is the binomial coefficient ``C(p, j)``.
    """
    q, units = _scaled_covariance(nu), [math.factorial(nu - j) for j in range(nu + 1)]

    def rule(number):
        if number == 0:
            return np.zeros((k, nu + 1 - k))
        binomials = [[Fraction(math.comb(nu + i, k + j)) for j in range(number)] for i in range(1, number + 1)]
        values = [[Fraction(math.comb(nu + i, low)) for low in range(k)] for i in range(1, number + 1)]
        weights = exact_solve(binomials, values)
        units = [[Fraction(math.factorial(low), math.factorial(k + j)) for low in range(k)] for j in range(number)]
        exact = [[float(w * u) for w, u in zip(*row, strict=True)] for row in zip(weights, units, strict=True)]
        return np.pad(np.array(exact).reshape(number, k).T, ((0, 0), (0, nu + 1 - k - number)))

    high = [row[k:] for row in q[k:]]
    gain = exact_solve(high, [row[:k] for row in q[k:]])
    rest = [[q[i][j] - sum(gain[a][i] * q[k + a][j] for a in range(len(high))) for j in range(k)] for i in range(k)]
    return (
        rule(nu + 1 - k),
        rule(nu - k),
        rule(max(0, nu - k - 1)),
        exact_root(high, units[k:]),
        exact_inverse_root(high, units[k:]),
        exact_root(rest, units[:k]),
    )
