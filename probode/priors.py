"""Gauss-Markov priors on ``(u, u', ..., u^(nu))``: what time alone does to a state.

A prior turns a time step into a linear-Gaussian transition. Formulas for the integrated Wiener process: Kersting,
Sullivan, Hennig (2020), appendix A; the constants are computed once in exact arithmetic.
"""

import functools as ft
import math
from abc import abstractmethod
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from .checks import as_float, as_integer, require
from .factorisations import Layout
from .gaussians import Transition


class AbstractPrior(eqx.Module):
    """A Gauss-Markov process on ``u`` and its first ``num_derivatives`` derivatives."""

    num_derivatives: eqx.AbstractVar[int]

    @abstractmethod
    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        """``x(t + dt) | x(t)``; ``dt`` may be negative.

        At zero the matrix is the identity, and nobody looks at the noise.
        """


class IWP(AbstractPrior):
    """The ``num_derivatives`` times integrated Wiener process: ``u^(nu)`` is a Wiener process times ``output_scale``.

    ``output_scale`` is a scalar or, where the factorisation allows it, a PyTree like ``u``, in units of
    ``u^(nu) / sqrt(time)``. Raises ``ValueError`` unless ``num_derivatives`` is a positive integer.
    """

    num_derivatives: int = eqx.field(static=True)
    output_scale: PyTree[Float[Array, "..."]]

    def __init__(self, num_derivatives: int, *, output_scale: PyTree = 1.0):
        if not jax.tree.leaves(output_scale):
            raise ValueError("IWP(output_scale) must be a number or a PyTree of numbers like u, got nothing.")
        self.num_derivatives = as_integer(num_derivatives, "IWP(num_derivatives)", 1)
        self.output_scale = jax.tree.map(_as_scale, output_scale)

    def transition(self, dt, layout):
        pascal, root = _iwp_constants(self.num_derivatives)
        n = self.num_derivatives + 1
        dt = jnp.asarray(dt, layout.dtype)
        # A_ij = dt^(j-i) / (j-i)!
        shift = np.clip(np.arange(n)[None, :] - np.arange(n)[:, None], 0, None)
        matrix = jnp.asarray(pascal, layout.dtype) * jnp.stack(_powers(dt, n))[shift]
        # Q = T Qbar T with T_i = sqrt|dt| dt^(nu-i) / (nu-i)!, of which sqrt|dt| dt^middle is taken out: what is left,
        # dt^(nu-middle), ..., 1, ..., dt^-middle, spans the range of floating-point numbers evenly.
        middle = n // 2
        columns = jnp.stack([*_powers(dt, n - middle)[:0:-1], *_powers(1 / dt, middle + 1)])
        noise = jnp.asarray(root, layout.dtype) * columns
        magnitude = jnp.sqrt(jnp.abs(dt)) * jnp.abs(_powers(dt, middle + 1)[-1])
        return Transition(layout.broadcast(matrix), layout.lift(noise, self.output_scale), magnitude)


def _as_scale(x):
    x = as_float(x, "IWP(output_scale)")
    return jnp.asarray(
        require(x, (x > 0) & (x < np.inf), "IWP(output_scale) must be finite and positive", output_scale=x)
    )


def _powers(x, number):
    """``1, x, x^2, ...``: exact to round-off, where ``x ** k`` takes a logarithm."""
    powers = [jnp.ones_like(x)]
    for _ in range(number - 1):
        powers.append(powers[-1] * x)
    return powers


@ft.lru_cache
def _iwp_constants(nu: int) -> tuple[np.ndarray, np.ndarray]:
    """``1 / (j-i)!`` above the diagonal, and the upper Cholesky factor of ``Qbar`` with columns over ``(nu-j)!``.

    ``Qbar_ij = 1 / (2 nu + 1 - i - j)`` is as ill-conditioned as a Hilbert matrix: an ``L D L^T`` in fractions keeps
    every digit, where floating point loses most of them by ``nu = 11``.
    """
    n = nu + 1
    pascal = np.array([[1 / math.factorial(j - i) if j >= i else 0.0 for j in range(n)] for i in range(n)])
    q = [[Fraction(1, 2 * nu + 1 - i - j) for j in range(n)] for i in range(n)]
    root = np.zeros((n, n))
    for i in range(n):
        pivot = q[i][i]
        for j in range(i, n):
            # sqrt(pivot) * L_ji = sign * sqrt(q_ij^2 / pivot), rounded once
            ratio = q[i][j] ** 2 / pivot / Fraction(math.factorial(nu - j)) ** 2
            root[i, j] = math.copysign(math.sqrt(ratio), q[i][j])
        for a in range(i + 1, n):
            for b in range(i + 1, n):
                q[a][b] -= q[i][a] * q[i][b] / pivot
    return pascal, root
