"""Square-root Gaussians and the one algebra on them: map, predict, condition on an equation.

A Gaussian is a mean ``(dim, cols)`` and a right square root ``(rows, dim)`` of a covariance shared by the columns,
which are independent. Every function treats one element of a batch; ``batched`` maps it over the leading axes.
"""

import functools as ft
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .linalg import kron_apply, kron_apply_right, product, safe_norm, substitute, triangularise


class Normal(eqx.Module):
    """A Gaussian by its mean and a right square root of its covariance, ``cov = factor^T factor``.

    Over ``u``: ``mean`` is a PyTree like ``u``; ``factor`` is the ``(d, d)`` square root over the ravelled ``u``, or a
    PyTree of standard deviations like ``u``. Inside the solvers and in ``Solution.marginals``: ``mean`` is
    ``(*batch, dim, cols)`` and ``factor`` is ``(*batch, rows, dim)`` in the layout of the factorisation.
    """

    mean: PyTree[Array]
    factor: PyTree[Array]


class Transition(eqx.Module):
    """``x(t + dt) | x(t) ~ N(A x, magnitude^2 noise^T noise)``; an ``A`` smaller than ``x`` means ``kron(A, I)``.

    ``noise`` is upper triangular. ``magnitude`` takes the powers of ``dt`` out of it that would leave the range of
    floating-point numbers: the scale of a step times ``magnitude`` is representable where neither of them is.
    """

    matrix: Float[Array, "*batch p p"]
    noise: Float[Array, "*batch dim dim"]
    magnitude: Float[Array, ""]


class Linearisation(eqx.Module):
    """An equation ``z(x) = 0`` about a point: ``z(x) ~ residual + H (x - point)``.

    ``matrix`` is ``H`` on the leading rows of the state, ``(*batch, m, p)`` with ``p <= dim``; ``residual`` is ``z`` at
    the point, ``(*batch, m, cols)``. ``block = k`` says that ``H`` is the identity on the ``k``-th derivative and ends
    with it: ``z`` can replace that derivative as a coordinate of the state.
    """

    matrix: Float[Array, "*batch m p"]
    residual: Float[Array, "*batch m cols"]
    block: int = eqx.field(static=True)


class Innovation(eqx.Module):
    """The residual measured against the process noise of one step alone, in units of the transition's ``noise``.

    ``factor``: square root of ``H Q H^T``, ``(*batch, m, m)``; ``whitened``: ``(H Q H^T)^(-1/2) z``; ``scale``: its
    root mean square per batch element, the local (quasi-maximum-likelihood) scale of Schober et al. (2019), infinite
    for a residual without noise to explain it. ``unit``: what an output scale of one is in these units.
    """

    factor: Float[Array, "*batch m m"]
    whitened: Float[Array, "*batch m cols"]
    scale: Float[Array, "*batch"]
    unit: Float[Array, "*batch"]


def batched(fn: Callable) -> Callable:
    """Map ``fn``, written for one batch element, over the leading axes of its arguments.

    The first argument is a ``Normal`` or a ``Linearisation``, which tells how many axes there are.
    """

    @ft.wraps(fn)
    def wrapped(first, *rest):
        leaf = first.mean if isinstance(first, Normal) else first.residual
        mapped = fn
        for _ in range(leaf.ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(first, *rest)

    return wrapped


@batched
def push(x: Normal, matrix: Float[Array, "p p"]) -> Normal:
    """``A x``, without noise: the square root of ``A cov A^T`` is not triangularised."""
    return Normal(kron_apply(matrix, x.mean), kron_apply_right(x.factor, matrix))


@batched
def add_noise(x: Normal, noise: Float[Array, "dim dim"], scale: Float[Array, ""]) -> Normal:
    """``x`` plus independent noise ``N(0, scale^2 noise^T noise)``, ``noise`` upper triangular."""
    return Normal(x.mean, triangularise(scale * noise, x.factor))


@batched
def innovate(equation: Linearisation, noise: Float[Array, "dim dim"], unit: Float[Array, ""]) -> Innovation:
    """The residual under ``N(0, H Q H^T)``, ``Q = noise^T noise``; costs one triangularisation of ``m`` columns."""
    m = equation.residual.shape[0]
    k = equation.block * m
    observed = product(noise[: k + m, : k + m], equation.matrix.T)
    factor = triangularise(observed[k:], observed[:k])
    whitened, _ = substitute(factor, equation.residual)
    scale = safe_norm(whitened) / math.sqrt(whitened.size)
    unexplained = jnp.any((jnp.diagonal(factor)[:, None] == 0) & (equation.residual != 0))
    return Innovation(factor, whitened, jnp.where(unexplained, jnp.inf, scale), unit)


@batched
def condition(
    x: Normal, noise: Float[Array, "dim dim"], scale: Float[Array, ""], equation: Linearisation
) -> tuple[Normal, Float[Array, "m cols"]]:
    """Add the noise ``scale * noise`` to ``x`` and condition on the equation: one triangularisation for both.

    The columns of the stacked square root ``[x.factor; scale noise]`` are changed to ``(z, all other derivatives)``.
    It then has full column rank as soon as the noise has, and its triangle holds the innovation's factor, the
    cross-covariance and, in the trailing block, the posterior's factor. Returns the posterior and ``S^(-1/2) z``.
    """
    mean, noise, (dim, _) = x.mean, scale * noise, x.mean.shape
    h, z = equation.matrix, equation.residual
    m = z.shape[0]
    k = equation.block * m
    own = slice(k, k + m)

    def change_columns(factor):
        return jnp.concatenate([product(factor[:, : k + m], h.T), factor[:, :k], factor[:, k + m :]], axis=1)

    changed = change_columns(noise)
    # Rows of the noise below the block are untouched by H; those above it meet z densely and join the dense part.
    upper = jnp.concatenate([changed[own], jnp.zeros((k, dim), noise.dtype), changed[k + m :]])
    triangle = triangularise(upper, jnp.concatenate([change_columns(x.factor), changed[:k]]))

    whitened, correction = substitute(triangle[:m], z)
    others = jnp.concatenate([mean[:k], mean[k + m :]]) - correction
    # z = 0 determines the block: E_k x = (E_k m - z) - H_other (x_other - m_other).
    block = mean[own] - z - product(h[:, :k], others[:k] - mean[:k])
    posterior_mean = jnp.concatenate([others[:k], block, others[k:]])

    rest = triangle[m:, m:]
    columns = [rest[:, :k], -product(rest[:, :k], h[:, :k].T), rest[:, k:]]
    factor = jnp.pad(jnp.concatenate(columns, axis=1), ((0, m), (0, 0)))
    return Normal(posterior_mean, factor), whitened
