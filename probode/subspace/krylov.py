"""Linear algebra with a Jacobian through products alone: conjugate gradients, and its rightmost eigenvectors.

Axes: ``d`` components, ``r`` directions of a basis ``W`` with orthonormal columns, ``n`` derivatives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..algebra.factorisations import Dense, layout_of
from ..algebra.linalg import product, safe_divide, safe_norm, solve_upper, substitute, triangularise
from ..equations.problems import ODE, flat_field
from ..util.checks import as_integer, as_scalar
from ..util.tracing import compiled


class Linearised(NamedTuple):
    """A vector field linearised at a point, with ``J = [[Jaa, Jac], [Jca, Jcc]]`` in a basis and its complement.

    - ``basis``: orthonormal columns, ``(d, r)``.
    - ``value``: the field at the point.
    - ``jvp``, ``vjp``: products of ``J``, and of its transpose, with a vector ``(d,)``.
    - ``inner``: ``Jaa``.
    - ``coupling``: ``Jac^T``, ``(d, r)``.
    - ``slope``: the smallest Ritz value, that is, the smallest eigenvalue of the symmetric part of ``Jaa``.
    """

    basis: Float[Array, "d r"]
    value: Float[Array, " d"]
    jvp: Callable
    vjp: Callable
    inner: Float[Array, "r r"]
    coupling: Float[Array, "d r"]
    slope: Float[Array, ""]


def linearised(field: Callable, u: Float[Array, " d"], basis: Float[Array, "d r"]) -> Linearised:
    """The field linearised at ``u``, by ``r`` products with the Jacobian and ``r`` with its transpose."""
    value, jvp = jax.linearize(field, u)
    vjp = lambda v: jax.linear_transpose(jvp, u)(v)[0]  # noqa: E731
    inner = basis.T @ jax.vmap(jvp, 1, 1)(basis)
    coupling = jax.vmap(vjp, 1, 1)(basis) - basis @ inner.T
    symmetric = (inner + inner.T) / 2
    # The derivative of ``eigh`` is NaN at multiple eigenvalues; that of this quotient with a fixed ``v`` is not.
    v = jnp.linalg.eigh(lax.stop_gradient(symmetric))[1][:, 0]
    return Linearised(basis, value, jvp, vjp, inner, coupling, v @ symmetric @ v)


def solve_innovation(
    at: Linearised,
    z: Float[Array, " d"],
    fa: Float[Array, "rows dim"],
    fc: Float[Array, "more n"],
    preconditioner: Callable | None,
    tol: Float[Array, ""],
    max_krylov: int,
) -> tuple[Float[Array, " d"], Float[Array, "n d"]]:
    """``y = S^-1 z`` and ``P H^T y`` for ``S = H P H^T`` and ``H x = x_1 - J x_0``; NaN if the solve does not converge.

    - ``at``: the field and its ``J``, linearised at the prediction.
    - ``z``: the residual.
    - ``fa``: right square root of ``P`` on the basis, ``dim = n r``.
    - ``fc``: right square root of ``P`` for each direction of the complement.
    - ``preconditioner``, ``tol``, ``max_krylov``: as in ``Subspace``.
    """
    basis, (d, r), n = at.basis, at.basis.shape, fc.shape[1]
    shared = fc.T @ fc[:, :2]

    def times_cov(rows, v):  # (P H^T v)[:rows]
        v = jnp.stack([-at.vjp(v), v])
        a = v @ basis
        inside = jnp.reshape(fa[:, : rows * r].T @ (fa[:, : 2 * r] @ jnp.ravel(a)), (rows, r))
        return (inside - shared[:rows] @ a) @ basis.T + product(shared[:rows], v)

    def times_s(v):
        x = times_cov(2, v)
        return x[1] - at.jvp(x[0])

    # The preconditioner: S on the subspace without the coupling; on the complement that of a ``J`` that is ``slope``
    # times the identity, unless the user passes one.
    root = triangularise(None, fa[:, r : 2 * r] - fa[:, :r] @ at.inner.T)
    if preconditioner is None:
        variance = jnp.sum((fc[:, 1] - at.slope * fc[:, 0]) ** 2)
        of_complement = lambda v: safe_divide(v, variance)  # noqa: E731
    else:
        of_complement = preconditioner(shared[1, 1], shared[0, 1], shared[0, 0])

    def precondition(v):
        a = v @ basis
        inside = basis @ solve_upper(root, substitute(root, a[:, None]))[:, 0]
        if r == d:
            return inside
        c = of_complement(v - basis @ a)
        return inside + c - basis @ (c @ basis)

    def solve(matvec, b):
        return conjugate_gradients(matvec, b, precondition, tol, max_krylov)

    # Differentiated implicitly, in both modes: a ``while_loop`` has no derivative in reverse mode.
    y = lax.custom_linear_solve(times_s, z, solve, symmetric=True)
    return y, times_cov(n, y)


def conjugate_gradients(
    matvec: Callable, b: Float[Array, " d"], precondition: Callable, tol: Float[Array, ""], max_steps: int
) -> Float[Array, " d"]:
    """``x`` with ``matvec(x) = b`` by preconditioned conjugate gradients from ``x = 0``; NaN if they do not converge.

    They have converged when ``sqrt(res^T M res)``, for the residual ``res`` and the preconditioner ``M``, is at most
    ``tol`` times that of ``x = 0``. ``matvec``, ``precondition``: symmetric and positive definite. (Hestenes & Stiefel
    1952, "Methods of conjugate gradients for solving linear systems".)
    """

    def unfinished(carry):
        *_, size, k = carry
        return (size > tol**2 * first) & (k < max_steps)

    def body(carry):
        x, res, p, size, k = carry
        s = matvec(p)
        step = size / jnp.vdot(p, s)
        x, res = x + step * p, res - step * s
        z = precondition(res)
        new = jnp.vdot(res, z)
        return x, res, z + new / size * p, new, k + 1

    p = precondition(b)
    first = jnp.vdot(b, p)
    x, *_, size, _ = lax.while_loop(unfinished, body, (jnp.zeros_like(b), b, p, first, 0))
    return jnp.where(size <= tol**2 * first, x, jnp.nan)


def rightmost_basis(
    ode: Any,
    t: Any,
    u: PyTree,
    rank: int,
    *,
    args: PyTree = None,
    key: PRNGKeyArray | None = None,
    rounds: int = 4,
    degree: int = 40,
) -> Float[Array, "d rank"]:
    """Orthonormal basis of the eigenvectors with the rightmost eigenvalues, ``(d, rank)``, for ``Subspace``.

    These are the directions that the Jacobian at ``(t, u)`` damps least, or makes grow. The method is subspace
    iteration with a Chebyshev filter, a polynomial that is small on the rest of the spectrum (Saad 2011, "Numerical
    Methods for Large Eigenvalue Problems", chapter 5), with about ``rounds * degree * (rank + 4)`` products with the
    Jacobian. It works for Jacobians that are nearly symmetric, like those of reaction-diffusion equations: the spectrum
    is assumed to lie along the real axis, and eigenvectors far from it are amplified.

    - ``ode``: an ``ODE`` of order one.
    - ``t``, ``u``, ``args``: where the Jacobian is taken; ``u`` is a PyTree like the initial value.
    - ``rank``: the number of columns, from 1 to ``d``.
    - ``key``: a random key of JAX for the first subspace; ``jax.random.key(0)`` by default.
    - ``rounds``: the number of filters that are applied.
    - ``degree``: of the polynomial.

    Raises ``TypeError`` for another problem than an ``ODE``, ``ValueError`` for one of higher order, for a rank that is
    not an integer from 1 to ``d``, and for ``rounds`` or ``degree`` below 1.

    >>> import jax.numpy as jnp, probode
    >>> ode = probode.ODE(lambda t, u, args: -jnp.arange(1.0, 6.0) * u)
    >>> probode.rightmost_basis(ode, 0.0, jnp.ones(5), 2).shape  # the two slowest modes
    (5, 2)
    """
    if not isinstance(ode, ODE):
        raise TypeError(f"rightmost_basis(ode) must be an ODE, got {ode!r}.")
    if ode.order != 1:
        raise ValueError(f"rightmost_basis needs an equation of order one, got one of order {ode.order}.")
    layout = layout_of(ode.split(u)[0], 1, Dense())
    rank = as_integer(rank, "rightmost_basis(rank)", 1, layout.size)
    rounds, degree = (as_integer(x, "rightmost_basis(rounds, degree)", 1) for x in (rounds, degree))
    t = jnp.asarray(as_scalar(t, "rightmost_basis(t)")).astype(layout.dtype)
    key = jax.random.key(0) if key is None else key
    return _rightmost(ode, t, layout.ravel(u), args, key, layout, rank, rounds, degree)


@compiled
def _rightmost(ode, t, u, args, key, layout, rank, rounds, degree):
    field = flat_field(ode, layout, args)
    times = jax.vmap(jax.linearize(lambda u: field(t, u[None]), u)[1], 1, 1)

    def grow(_, v):
        return (w := times(v)) / jnp.maximum(safe_norm(w), jnp.finfo(w.dtype).tiny)

    # The spectral radius, by thirty power iterations, with a margin of 10 % for their error: what lies outside of the
    # interval below would be amplified.
    start = jax.random.normal(key, (layout.size, min(rank + 4, layout.size)), u.dtype)
    norm = 1.1 * safe_norm(times(lax.fori_loop(0, 30, grow, start[:, :1] / safe_norm(start[:, 0]))))

    def ritz(x):
        x = jnp.linalg.qr(x)[0]
        projected = x.T @ times(x)
        values, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
        return values[::-1], x @ vectors[:, ::-1]

    def filtered(_, x):
        values, x = ritz(x)
        # The Chebyshev polynomial on [-norm, last Ritz value], scaled to one at the first Ritz value (no overflow).
        centre, half = (values[-1] - norm) / 2, jnp.maximum((values[-1] + norm) / 2, 1e-3 * norm)
        sigma = half / jnp.maximum(values[0] - centre, half)

        def recur(_, carry):
            before, now, last = carry
            new = 1 / (2 / sigma - last)
            return now, 2 * new / half * (times(now) - centre * now) - last * new * before, new

        once = (times(x) - centre * x) * (sigma / half)
        return lax.fori_loop(1, degree, recur, (x, once, sigma))[1]

    return ritz(lax.fori_loop(0, rounds, filtered, start))[1][:, :rank]
