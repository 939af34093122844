"""Powers of a time step, kept in the range of floating-point numbers; Cholesky factors in exact arithmetic."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def powers_of_step(dt: Float[Array, ""], n: int) -> Float[Array, "{n} {n}"]:
    """The matrix with ``dt^(j-i)`` on and above the diagonal, and one below it."""
    # Rows cut from one vector: an array of indices would be looked up in every step.
    row = jnp.stack([*[jnp.ones_like(dt)] * (n - 1), *powers(dt, n)])
    return jnp.stack([row[n - 1 - i : 2 * n - 1 - i] for i in range(n)])


def noise_units(dt: Float[Array, ""], n: int) -> tuple[Float[Array, "{n}"], Float[Array, ""]]:
    """The units ``sqrt|dt| dt^(nu-i)`` of the noise of ``u^(i)``, as an array and a common factor, the magnitude.

    The magnitude is ``sqrt|dt| |dt|^middle``, and the array ``dt^(nu-middle), ..., 1, ..., dt^-middle``: its exponents
    are half as large as ``nu``, which would underflow for a short step.
    """
    middle = -exponents_of_units(n)[-1]
    columns = jnp.stack([*powers(dt, n - middle)[:0:-1], *powers(1 / dt, middle + 1)])
    return columns, jnp.sqrt(jnp.abs(dt)) * jnp.abs(powers(dt, middle + 1)[-1])


def exponents_of_units(n: int) -> list[int]:
    """The exponents of ``dt`` in the array of ``noise_units``."""
    return [n - 1 - n // 2 - i for i in range(n)]


def powers(x: Float[Array, "*shape"], number: int) -> list[Float[Array, "*shape"]]:
    """The powers ``1, x, x^2, ...``, ``number`` of them, by products: exponents in an array would take a logarithm."""
    out = [jnp.ones_like(x)]
    for _ in range(number - 1):
        out.append(out[-1] * x)
    return out


def exact_root(q: list[list[Fraction]], units: list[int]) -> np.ndarray:
    """The upper Cholesky factor of ``q``, with columns divided by ``units``, in fractions: entries are rounded once."""
    n = len(q)
    q, root = [list(row) for row in q], np.zeros((n, n))
    for i in range(n):
        pivot = q[i][i]
        for j in range(i, n):
            # sqrt(pivot) * L_ji = sign * sqrt(q_ij^2 / pivot)
            ratio = q[i][j] ** 2 / pivot / Fraction(units[j]) ** 2
            root[i, j] = math.copysign(math.sqrt(ratio), q[i][j])
        for a in range(i + 1, n):
            for b in range(i + 1, n):
                q[a][b] -= q[i][a] * q[i][b] / pivot
    return root


def exact_solve(a: list[list[Fraction]], b: list[list[Fraction]]) -> list[list[Fraction]]:
    """``A^-1 B`` in fractions, for a matrix ``A`` that needs no pivots."""
    rows = [[*left, *right] for left, right in zip(a, b, strict=True)]
    for i in range(len(rows)):
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[len(a) :] for row in rows]


def exact_inverse_root(q: list[list[Fraction]], units: list[int]) -> np.ndarray:
    """``R^-T`` for the root ``R = exact_root(q, units)``: it whitens a variable whose covariance is ``R^T R``."""
    n = len(q)
    # L^-1 D^-1/2 of Q = L D L^T: every row is reduced by those before it, beside the identity.
    rows = [[*q[i], *(Fraction(int(i == j)) for j in range(n))] for i in range(n)]
    for i in range(n):
        for j in range(i + 1, n):
            ratio = rows[j][i] / rows[i][i]
            rows[j] = [x - ratio * y for x, y in zip(rows[j], rows[i], strict=True)]
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            entry = rows[i][n + j] * units[j]
            out[i, j] = math.copysign(math.sqrt(entry**2 / rows[i][i]), entry)
    return out
