"""Gauss-Markov priors on ``(u, u', ..., u^(nu))``: what time alone does to a state.

A prior turns a time step into a linear-Gaussian transition. Formulas for the integrated Wiener process: Kersting,
Sullivan, Hennig (2020), appendix A; the constants are computed once in exact arithmetic. Axes: see factorisations.
"""

import functools as ft
import math
from abc import abstractmethod
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Real

from .checks import as_float, as_integer, require
from .factorisations import AbstractFactorisation, Dense, Layout, layout_of
from .gaussians import Normal, Transition, batched, certain, spread
from .linalg import kron_apply


class AbstractPrior(eqx.Module):
    """A Gauss-Markov process on ``u`` and its first ``num_derivatives`` derivatives.

    ``differs_by_step``: whether it has a method ``at(t, us, problem, layout, args)`` for the prior of the step that
    leaves the derivatives ``us``, ``(n, d)``, at ``t``.
    """

    num_derivatives: eqx.AbstractVar[int]
    differs_by_step = False

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
        self.num_derivatives = as_integer(num_derivatives, "IWP(num_derivatives)", 1)
        self.output_scale = as_positive(output_scale, "IWP(output_scale)")

    def transition(self, dt, layout):
        pascal, root = _iwp_constants(self.num_derivatives)
        n = self.num_derivatives + 1
        dt = jnp.asarray(dt, layout.dtype)
        # A_ij = dt^(j-i) / (j-i)!
        matrix = jnp.asarray(pascal, layout.dtype) * powers_of_step(dt, n)
        # Q = T Qbar T with T_i = sqrt|dt| dt^(nu-i) / (nu-i)!
        columns, magnitude = noise_units(dt, n)
        noise = jnp.asarray(root, layout.dtype) * columns
        return Transition(layout.broadcast(matrix), layout.lift(noise, self.output_scale), magnitude)


def sample_prior(
    prior: Any,
    key: PRNGKeyArray,
    ts: Any,
    like: PyTree,
    *,
    factorisation: AbstractFactorisation = Dense(),
    initial: Normal | Callable[[Layout], Normal] | None = None,
    shape: tuple[int, ...] = (),
) -> PyTree[Float[Array, "..."]]:
    """Joint samples of ``u`` at the times ``ts`` under the prior alone, without any equation.

    ``ts``: sorted times, increasing or decreasing. ``like``: a PyTree like ``u``, whose values do not matter.
    ``initial``: the state at ``ts[0]``, a ``Normal`` in the layout of the factorisation, or a function that makes one,
    as ``Matern(...).stationary`` does; by default zero and certain. Leaves are ``(*shape, time, *leaf.shape)``.

    Raises ``TypeError`` unless ``prior`` is one and ``like`` is real and floating point, ``ValueError`` for times that
    are not sorted and finite, or an initial state of another shape.
    """
    if not isinstance(prior, AbstractPrior):
        raise TypeError(f"sample_prior(prior) must be a prior such as IWP(2), got {prior!r}.")
    layout = _checked_layout(like, prior.num_derivatives, factorisation)
    ts = as_float(ts, "sample_prior(ts)").astype(layout.dtype)
    if ts.ndim != 1 or ts.size == 0:
        raise ValueError(f"sample_prior(ts) must be an array of times, got shape {ts.shape}.")
    steps = ts[1:] - ts[:-1]
    ordered = ((steps >= 0).all() | (steps <= 0).all()) & (abs(ts) < np.inf).all()
    ts = require(ts, ordered, "sample_prior(ts) must be finite times in increasing or in decreasing order")
    mean = layout.pack(jnp.zeros((prior.num_derivatives + 1, layout.size), layout.dtype))
    if initial is None:
        initial = certain(mean)
    elif not isinstance(initial, Normal):
        initial = initial(layout)
    *batch, dim, _ = mean.shape
    got = jnp.shape(initial.mean), jnp.shape(initial.factor)
    if got[0] != mean.shape or len(got[1]) != mean.ndim or (*got[1][:-2], got[1][-1]) != (*batch, dim):
        raise ValueError(
            f"sample_prior(initial) must have the layout of {type(factorisation).__name__}(): expected a mean of shape "
            f"{mean.shape} and a factor of shape {(*batch, 'rows', dim)}, got {got[0]} and {got[1]}."
        )
    return _sample(prior, key, jnp.asarray(ts), initial, layout, tuple(shape))


def _checked_layout(like, num_derivatives, factorisation):
    for leaf in jax.tree.leaves(like):
        as_float(leaf, "sample_prior(like)")
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"sample_prior(like) has dtype {dtype}, but must be floating point.")
    layout = layout_of(like, num_derivatives, factorisation)
    if layout.size == 0:
        raise ValueError("sample_prior(like) has no numbers: nothing to sample.")
    return layout


@eqx.filter_jit
def _sample(prior, key, ts, initial, layout, shape):
    number, dtype = math.prod(shape), layout.dtype
    *batch, _, cols = initial.mean.shape
    key, initial_key = jax.random.split(key)

    def draw(key, factor):
        w = jax.random.normal(key, (number, *batch, factor.shape[-2], cols), dtype)
        return jax.vmap(spread, in_axes=(None, 0))(factor, w)

    def step(x, dt_key):
        dt, key = dt_key
        # Twice the same time is the same state.
        moved = prior.transition(jnp.where(dt == 0, 1, dt), layout)
        there = jax.vmap(batched(kron_apply), in_axes=(None, 0))(moved.matrix, x)
        x = jnp.where(dt == 0, x, there + moved.magnitude * draw(key, moved.noise))
        return x, x

    def components(x):
        return layout.unravel(layout.unpack(x)[0])

    first = initial.mean.astype(dtype) + draw(initial_key, initial.factor.astype(dtype))
    _, rest = lax.scan(step, first, (ts[1:] - ts[:-1], jax.random.split(key, ts.size - 1)))
    u = jax.vmap(jax.vmap(components), in_axes=1)(jnp.concatenate([first[None], rest]))
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (*shape, *leaf.shape[1:])), u)


def as_positive(x: PyTree, name: str) -> PyTree:
    """A number, or a PyTree of them, as arrays: finite and positive, or a ``ValueError`` that names the part."""
    if not jax.tree.leaves(x):
        raise ValueError(f"{name} must be a number or a PyTree of numbers like u, got nothing.")
    field = name[name.index("(") + 1 : -1]

    def positive(x):
        x = as_float(x, name)
        return jnp.asarray(require(x, (x > 0) & (x < np.inf), f"{name} must be finite and positive", **{field: x}))

    return jax.tree.map(positive, x)


def powers_of_step(dt: Float[Array, ""], n: int) -> Float[Array, "{n} {n}"]:
    """``dt^(j-i)`` above the diagonal, one below."""
    shift = np.clip(np.arange(n)[None, :] - np.arange(n)[:, None], 0, None)
    return jnp.stack(powers(dt, n))[shift]


def noise_units(dt: Float[Array, ""], n: int) -> tuple[Float[Array, "{n}"], Float[Array, ""]]:
    """``sqrt|dt| dt^(nu-i)``, the units of ``u^(i)``, as an array times a magnitude ``sqrt|dt| |dt|^middle``.

    What is left, ``dt^(nu-middle), ..., 1, ..., dt^-middle``, spans the range of floating-point numbers evenly.
    """
    middle = n // 2
    columns = jnp.stack([*powers(dt, n - middle)[:0:-1], *powers(1 / dt, middle + 1)])
    return columns, jnp.sqrt(jnp.abs(dt)) * jnp.abs(powers(dt, middle + 1)[-1])


def powers(x: Float[Array, "*shape"], number: int) -> list[Float[Array, "*shape"]]:
    """``1, x, x^2, ...``: exact to round-off, where ``x ** k`` takes a logarithm."""
    out = [jnp.ones_like(x)]
    for _ in range(number - 1):
        out.append(out[-1] * x)
    return out


@ft.lru_cache
def _iwp_constants(nu: int) -> tuple[np.ndarray, np.ndarray]:
    """``1 / (j-i)!`` above the diagonal, and the upper Cholesky factor of ``Qbar`` with columns over ``(nu-j)!``.

    ``Qbar_ij = 1 / (2 nu + 1 - i - j)`` is as ill-conditioned as a Hilbert matrix: an ``L D L^T`` in fractions keeps
    every digit, where floating point loses most of them by ``nu = 11``.
    """
    n = nu + 1
    pascal = np.array([[1 / math.factorial(j - i) if j >= i else 0.0 for j in range(n)] for i in range(n)])
    q = [[Fraction(1, 2 * nu + 1 - i - j) for j in range(n)] for i in range(n)]
    return pascal, exact_root(q, [math.factorial(nu - j) for j in range(n)])


def exact_root(q: list[list[Fraction]], units: list[int]) -> np.ndarray:
    """Upper Cholesky factor of ``q``, columns divided by ``units``: every entry is rounded once."""
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
