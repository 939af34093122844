"""Priors with a drift: the integrated Ornstein-Uhlenbeck process and Matern processes, ``x' = F x + e_nu w``.

``F`` is a companion matrix: ones above the diagonal and a last row. Its exponential and the square root of the noise
come from Taylor and Legendre series over a short step, doubled until it is long enough (Van Loan, 1978;
Stillfjord & Tronarp, 2023, "Computing the matrix exponential and the Cholesky factor of a related finite horizon
Gramian"). Axes: ``n`` derivatives; ``p`` components that the drift couples, one where they are independent; ``m``
last blocks of the last row of ``F``, before which it is zero.
"""

import functools as ft
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Real

from .checks import as_float, as_integer, require
from .factorisations import Layout
from .gaussians import Normal, Transition
from .linalg import kron_apply_right, product, triangularise
from .priors import AbstractPrior, as_positive, exact_root, noise_units, powers, powers_of_step
from .problems import ODE, AbstractProblem


# A step is halved until the size of the drift over it is at most one. Then the coefficients y_m of the Taylor series
# below are O(1.45^m), which leaves 1.45^22 / 22! < 1e-17, and polynomials of degree below nu + 7 leave of the root of
# the noise less than 5e-18 of its smallest pivot (nu <= 8; computed in 60 digits).
_TAYLOR_TERMS = 21
_MORE_POLYNOMIALS = 7
# Longer steps, of more than 1e12 time constants, become NaN: a solver rejects them.
_MOST_DOUBLINGS = 40


class IOUP(AbstractPrior):
    """The ``num_derivatives`` times integrated Ornstein-Uhlenbeck process: ``du^(nu) = rate u^(nu) dt + dW``.

    With the linear part of a stiff or oscillating equation as ``rate``, ``TS1`` is exact on that part whatever the step
    (Bosch, Hennig & Tronarp, 2023, "Probabilistic exponential integrators"). ``rate``, in units of ``1 / time``: a
    number; one number for each component, as a PyTree like ``u``; a ``(d, d)`` matrix over the ravelled ``u``; or a
    linear function from a PyTree like ``u`` to one like ``u``, of which the derivative at zero is taken (an
    ``eqx.Module`` keeps its arrays differentiable). ``Dense()`` takes all of them, ``BlockDiagonal()`` one number or
    one for each component, ``Isotropic()`` one number. ``output_scale``, the factor of ``dW``: see ``IWP``.

    Raises ``ValueError`` unless ``num_derivatives`` is a positive integer and the rate is finite; in the first step for
    a rate that does not fit ``u`` or the factorisation.
    """

    num_derivatives: int = eqx.field(static=True)
    rate: PyTree[Float[Array, "..."]] | Callable
    output_scale: PyTree[Float[Array, "..."]]

    def __init__(self, num_derivatives: Any, rate: PyTree | Callable, *, output_scale: PyTree = 1.0):
        self.num_derivatives = as_integer(num_derivatives, "IOUP(num_derivatives)", 1)
        self.rate = rate if callable(rate) else _as_rate(rate)
        self.output_scale = as_positive(output_scale, "IOUP(output_scale)")

    def transition(self, dt, layout):
        rate = self._blocks(layout)
        size = jnp.max(jnp.sum(jnp.abs(rate), axis=-1))
        return _transition(lambda x: x[None], rate, size, dt, self.output_scale, layout)

    def _blocks(self, layout):
        d = layout.size
        if callable(self.rate):
            matrix = _matrix_of(self.rate, layout)
        elif isinstance(self.rate, Array) and self.rate.shape == (d, d):
            matrix = self.rate.astype(layout.dtype)
        else:
            shapes = f"a number, have the structure and shapes of u, or be a ({d}, {d}) matrix"
            return _per_component(self.rate, "IOUP(rate)", shapes, layout)
        if d > 1 and layout.identity().shape != (d, d):
            name = type(layout.factorisation).__name__
            raise ValueError(
                f"IOUP(rate) is a matrix or a function, which couples the components, but {name}() keeps no "
                "correlations between them. Use Dense(), or pass a number"
                f"{' or one number for each component' if layout.batch_shape == (d,) else ''}."
            )
        return matrix


class RosenbrockIOUP(AbstractPrior):
    """``IOUP`` whose rate is the Jacobian of the vector field where a step starts.

    With ``TS1`` the exponential integrator of Rosenbrock type of Bosch, Hennig & Tronarp (2023): steps as long as the
    nonlinear part allows. The Jacobian is kept as ``TS1`` keeps it: in full under ``Dense()``, its diagonal under
    ``BlockDiagonal()``, its mean diagonal under ``Isotropic()``. ``output_scale`` as for ``IWP``. Raises ``TypeError``
    in the first step for anything but an ``ODE`` of order one.
    """

    num_derivatives: int = eqx.field(static=True)
    output_scale: PyTree[Float[Array, "..."]]
    differs_by_step = True

    def __init__(self, num_derivatives: Any, *, output_scale: PyTree = 1.0):
        self.num_derivatives = as_integer(num_derivatives, "RosenbrockIOUP(num_derivatives)", 1)
        self.output_scale = as_positive(output_scale, "RosenbrockIOUP(output_scale)")

    def transition(self, dt, layout):
        raise ValueError("RosenbrockIOUP takes its rate from an equation: without one use IOUP(num_derivatives, rate).")

    def at(
        self, t: Float[Array, ""], us: Float[Array, "n d"], problem: AbstractProblem, layout: Layout, args: PyTree
    ) -> IOUP:
        """The prior of a step that leaves the derivatives ``us`` at ``t``."""
        if not isinstance(problem, ODE) or problem.order != 1:
            raise TypeError(
                "RosenbrockIOUP takes its rate from an ODE of order one: for other equations use IOUP or IWP."
            )
        # The equation u' - f = 0 has the derivative -J with respect to u.
        rate = -problem.first_order(t, us, layout, args).matrix[..., : layout.identity().shape[-1]]
        if layout.batch_shape:
            rate = layout.unravel(jnp.reshape(rate, -1))
        elif rate.shape != (layout.size, layout.size):
            rate = rate[0, 0]
        # The rate is a value of this step, not a user's, which would be checked.
        plain = IOUP(self.num_derivatives, 0.0)
        return eqx.tree_at(lambda prior: (prior.rate, prior.output_scale), plain, (rate, self.output_scale))


class Matern(AbstractPrior):
    """The Matern process of smoothness ``num_derivatives + 1/2``, as a state-space model.

    With ``lambda = sqrt(2 nu + 1) / length_scale``, ``(d/dt + lambda)^(nu + 1) u = output_scale * white noise``
    (Hartikainen & Sarkka, 2010). ``length_scale``, in units of time: a number or, not under ``Isotropic()``, one for
    each component, as a PyTree like ``u``. ``output_scale``: see ``IWP``; it multiplies the noise, so that the variance
    is that of ``stationary``, not ``output_scale^2``.

    Raises ``ValueError`` unless ``num_derivatives`` is a positive integer and the length scale finite and positive; in
    the first step for a length scale that does not fit ``u`` or the factorisation.
    """

    num_derivatives: int = eqx.field(static=True)
    length_scale: PyTree[Float[Array, "..."]]
    output_scale: PyTree[Float[Array, "..."]]

    def __init__(self, num_derivatives: Any, length_scale: PyTree, *, output_scale: PyTree = 1.0):
        self.num_derivatives = as_integer(num_derivatives, "Matern(num_derivatives)", 1)
        self.length_scale = as_positive(length_scale, "Matern(length_scale)")
        self.output_scale = as_positive(output_scale, "Matern(output_scale)")

    def transition(self, dt, layout):
        n = self.num_derivatives + 1

        def row(x):
            terms = powers(x, n + 1)
            return -jnp.stack([math.comb(n, j) * terms[n - j] for j in range(n)])

        decay = self._decay(layout)
        # n is the largest of binom(n, j)^(1 / (n - j)).
        return _transition(row, decay, n * jnp.max(decay), dt, self.output_scale, layout)

    def stationary(self, layout: Layout) -> Normal:
        """The distribution in which the process forgets its past: mean zero, in the layout of a factorisation.

        ``P_ij = (-1)^((i-j)/2) int w^(i+j) S(w) dw / 2 pi`` for even ``i + j``, zero otherwise, with the spectral
        density ``S(w) = output_scale^2 / (lambda^2 + w^2)^(nu + 1)``.
        """
        n = self.num_derivatives + 1
        root = jnp.asarray(_stationary_root(self.num_derivatives), layout.dtype)

        def factor(decay):
            units = jnp.stack(powers(1 / decay[0, 0], n)[::-1]) / jnp.sqrt(decay)
            return root * units

        factor = _lift(_over_blocks(factor, self._decay(layout)), self.output_scale, layout)
        return Normal(layout.pack(jnp.zeros((n, layout.size), layout.dtype)), factor)

    def _decay(self, layout):
        shapes = "a number, or have the structure and shapes of u"
        length_scale = _per_component(self.length_scale, "Matern(length_scale)", shapes, layout)
        return math.sqrt(2 * self.num_derivatives + 1) / length_scale


def _transition(
    row: Callable,
    drift: Float[Array, "*blocks p p"],
    size: Float[Array, ""],
    dt: Real[Array, ""],
    scale: PyTree,
    layout: Layout,
) -> Transition:
    """The process whose drift has the last row ``row(drift)``, with ``row(drift dt)`` for a step in its own units.

    In units ``T_i = dt^(nu-i)``, ``F dt = T M T^-1`` where ``M`` has ones above the diagonal, ``A = T exp(M) T^-1`` and
    ``Q = |dt| T Qbar T``. ``size``: a norm of the drift, by which a step is short or long.
    """
    n, p, dt = layout.num_derivatives + 1, drift.shape[-1], jnp.asarray(dt, layout.dtype)
    doublings, fraction = _halvings(size * jnp.abs(dt))
    one = jnp.ones((1, 1), layout.dtype)
    # Components that are coupled have their noise in one problem, others get their scale afterwards.
    inputs = one if p == 1 else layout.lift(one, scale)
    # A zero step is in the limit: the matrix is the identity, and the noise vanishes with its magnitude.
    columns, magnitude = noise_units(jnp.where(dt == 0, 1, dt), n)
    magnitude = jnp.where(dt == 0, 0, magnitude)

    def discretise(drift):
        matrix, noise = _discretise(row(drift * (dt * fraction)), inputs, n, doublings)
        return _in_time(matrix, row(drift), dt, n), noise * jnp.repeat(columns, p)

    matrix, noise = _over_blocks(discretise, drift)
    if p > 1:
        return Transition(matrix, noise, magnitude)
    matrix = layout.broadcast(matrix) if drift.ndim == 2 else _lift(matrix, 1.0, layout)
    return Transition(matrix, _lift(noise, scale, layout), magnitude)


def _halvings(size: Float[Array, ""]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """How many times to halve a step that is ``size`` time constants long, and the fraction of it that is left."""
    halves = np.arange(_MOST_DOUBLINGS + 1)
    number = jnp.sum(size > jnp.asarray(2.0**halves, size.dtype))
    return number, jnp.asarray([*(0.5**halves), np.nan], size.dtype)[number]


def _discretise(
    row: Float[Array, "m p p"], inputs: Float[Array, "p p"], n: int, doublings: Int[Array, ""]
) -> tuple[Float[Array, "dim dim"], Float[Array, "dim dim"]]:
    """``exp(M)`` and the upper triangular root of ``int_0^1 g g^T dr``, ``g(r) = exp(M r) e_nu inputs``.

    ``row`` has the last blocks of ``M`` for a step that is then doubled.
    """
    (m, p, _), dtype = row.shape, row.dtype
    shift, tail, polynomials = (jnp.asarray(table, dtype) for table in _tables(n))
    eye = jnp.eye(p, dtype=dtype)

    # Row i of M^k is row 0 of M^(i+k), which is e_k up to k = nu: only what comes then is computed.
    def multiply(w, _):
        shifted = jnp.concatenate([jnp.zeros((1, p, p), dtype), w[:-1]])
        return shifted + jnp.einsum("ab,mbc->mac", w[-1], row), w

    _, w = lax.scan(multiply, row, length=_TAYLOR_TERMS)
    matrix = jnp.einsum("ij,ab->ijab", shift, eye).at[:, n - m :].add(product(tail, w))
    # g_i(r) = sum_k y_k r^(k-i) / (k-i)!, where y_k is the last block of that row, in orthonormal polynomials.
    g = product(polynomials, jnp.concatenate([inputs[None], w[:, -1] @ inputs]))

    dim = n * p
    matrix = jnp.reshape(jnp.swapaxes(matrix, 1, 2), (dim, dim))
    rows = jnp.reshape(jnp.transpose(jnp.reshape(g, (-1, n, p, p)), (0, 3, 1, 2)), (-1, dim))
    root = triangularise(jnp.zeros((dim, dim), dtype), rows)

    # Twice the step: exp(2 M) and exp(M) Q exp(M)^T + Q, and new units.
    units = jnp.asarray(np.repeat(0.5 ** np.arange(n)[::-1], p), dtype)

    def double(matrix, root):
        longer = triangularise(root, kron_apply_right(root, matrix))
        return units[:, None] * product(matrix, matrix) / units, longer * (units / math.sqrt(2))

    def step(carry, k):
        return lax.cond(k < doublings, double, lambda *same: same, *carry), None

    def loop(*carry):
        return lax.scan(step, carry, jnp.arange(_MOST_DOUBLINGS + 1))[0]

    return lax.cond(doublings > 0, loop, lambda *same: same, matrix, root)


def _in_time(
    scaled: Float[Array, "dim dim"], row: Float[Array, "m p p"], dt: Float[Array, ""], n: int
) -> Float[Array, "dim dim"]:
    """``T exp(M) T^-1``."""
    m, p, _ = row.shape
    # Above the diagonal. Powers of 1 / dt below it would leave the range of floating-point numbers:
    above = jnp.triu(powers_of_step(dt, n))
    blocks = jnp.reshape(scaled, (n, p, n, p)) * above[:, None, :, None]
    if m > 1:
        # there, row i + 1 of exp(F dt) is row i times F. (With m = 1 there is nothing.)
        rows = [blocks[0]]
        for i in range(1, n):
            before = jnp.concatenate([jnp.zeros((p, 1, p), scaled.dtype), rows[-1][:, :-1]], axis=1)
            below = before[:, :i] + jnp.einsum("ab,jbc->ajc", rows[-1][:, -1], row[:i])
            rows.append(jnp.concatenate([below, blocks[i, :, i:]], axis=1))
        blocks = jnp.stack(rows)
    return jnp.reshape(blocks, (n * p, n * p))


@ft.lru_cache
def _tables(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``1 / (k-i)!`` for ``k = j <= nu``; for ``k > nu``; and the coefficients of ``r^(k-i) / (k-i)!`` for ``k >= nu``.

    The coefficients, with an axis for the polynomials and ``i`` and one for ``k``, are inner products with what
    Gram-Schmidt makes of the powers ``r^nu, ..., r, 1, r^n, r^(n+1), ...`` on ``[0, 1]`` (Muntz-Legendre polynomials):
    in this order ``i`` has no coefficients beyond the ``i``-th unless there is a drift.
    """
    factorials = np.array([float(math.factorial(k)) for k in range(n + _TAYLOR_TERMS + 1)])
    i, j = np.arange(n)[:, None], np.arange(n)
    shift = np.where(j >= i, 1 / factorials[np.abs(j - i)], 0)
    powers = np.arange(n - 1, n + _TAYLOR_TERMS) - i
    coefficients, rest = [], 1 / factorials[powers]
    for power in [*range(n)[::-1], *range(n, n - 1 + _MORE_POLYNOMIALS)]:
        coefficients.append(math.sqrt(2 * power + 1) / (power + powers + 1) * rest)
        rest = rest * (power - powers) / (power + powers + 1)
    return shift, 1 / factorials[powers[:, 1:]], np.concatenate(coefficients)


@ft.lru_cache
def _stationary_root(nu: int) -> np.ndarray:
    """Upper root of the stationary covariance for ``lambda = 1``: ``int w^2k / (1 + w^2)^(nu+1) dw / 2 pi`` exactly."""

    def moment(k):
        gammas = math.factorial(2 * k) * math.factorial(2 * (nu - k)) / Fraction(math.factorial(k))
        return gammas / (2 * 4**nu * math.factorial(nu - k) * math.factorial(nu))

    def entry(i, j):
        return (-1) ** ((j - i) // 2) * moment((i + j) // 2) if (i + j) % 2 == 0 else Fraction(0)

    return exact_root([[entry(i, j) for j in range(nu + 1)] for i in range(nu + 1)], [1] * (nu + 1))


def _over_blocks(fn: Callable, blocks: Float[Array, "*blocks p p"]) -> PyTree[Array]:
    """``fn`` of the block, or of each of them."""
    return fn(blocks) if blocks.ndim == 2 else jax.vmap(fn)(blocks)


def _lift(matrix: Float[Array, "*blocks n n"], scale: PyTree, layout: Layout) -> Float[Array, "*batch dim dim"]:
    """A matrix over the derivatives times a scale; one for all components, or one for each of them."""
    if matrix.ndim == 2:
        return layout.lift(matrix, scale)
    scales = layout.lift(jnp.ones((1, 1), layout.dtype), scale)
    if scales.ndim == 3:
        return scales * matrix
    d, n, _ = matrix.shape
    return jnp.reshape(jnp.einsum("aij,ab->iajb", matrix, scales), (n * d, n * d))


def _as_rate(rate: PyTree) -> PyTree:
    if not jax.tree.leaves(rate):
        raise ValueError("IOUP(rate) must be numbers or a linear function, got nothing.")

    def finite(x):
        x = as_float(x, "IOUP(rate)")
        return jnp.asarray(require(x, abs(x) < np.inf, "IOUP(rate) must be finite", rate=x))

    return jax.tree.map(finite, rate)


def _per_component(x: PyTree, name: str, expected: str, layout: Layout) -> Float[Array, "*blocks 1 1"]:
    """A parameter of the drift as one block, or as one for each component."""
    d = layout.size
    alike = jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, _example(layout))
    flat = layout.ravel(x)
    scalar = isinstance(x, Array) and x.ndim == 0
    if flat.size == 1 and (scalar or d == 1):
        return jnp.reshape(flat, (1, 1))
    if not alike:
        raise ValueError(f"{name} must be {expected}: got {jax.tree.map(jnp.shape, x)}.")
    if layout.batch_shape != (d,) and layout.identity().shape != (d, d):
        raise ValueError(
            f"{name} has one number for each component, but {type(layout.factorisation).__name__}() has one block for "
            "all of them. Pass a scalar, or use BlockDiagonal() or Dense()."
        )
    return jnp.reshape(flat, (d, 1, 1))


def _matrix_of(fn: Callable, layout: Layout) -> Float[Array, "d d"]:
    """The matrix of a linear function from a PyTree like ``u`` to one like ``u``."""
    example = _example(layout)
    got = jax.tree.map(jnp.shape, eqx.filter_eval_shape(fn, example))
    if got != jax.tree.map(jnp.shape, example):
        raise ValueError(
            "IOUP(rate) must map a PyTree like u to one like u: expected "
            f"{jax.tree.map(jnp.shape, example)}, got {got}."
        )
    return jax.jacfwd(lambda u: layout.ravel(fn(layout.unravel(u))))(jnp.zeros(layout.size, layout.dtype))


def _example(layout):
    return jax.eval_shape(layout.unravel, jax.ShapeDtypeStruct((layout.size,), layout.dtype))
