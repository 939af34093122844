"""Gauss-Markov priors on ``(u, u', ..., u^(nu))``: what time alone does to a state.

A prior turns a time step into a linear-Gaussian transition. Formulas for the integrated Wiener process: Kersting,
Sullivan, Hennig (2020), appendix A; the constants are computed once in exact arithmetic. Axes: see factorisations.
"""

import functools as ft
import math
from abc import abstractmethod
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from .checks import as_float, as_integer, as_numbers, is_traced, require
from .factorisations import Layout
from .gaussians import Transition
from .linalg import safe_divide, safe_norm


class AbstractPrior(eqx.Module):
    """A Gauss-Markov process on ``u`` and its first ``num_derivatives`` derivatives.

    ``differs_by_step``: whether it has a method ``at(t, us, problem, layout, args)`` for the prior of the step that
    leaves the derivatives ``us``, ``(n, d)``, at ``t``. ``is_polynomial``: whether the process goes on as its Taylor
    polynomial but for noise; otherwise the first step is no longer than the two agree.

    >>> import probode
    >>> probode.IWP(2).num_derivatives, probode.IWP(2).differs_by_step
    (2, False)
    """

    num_derivatives: eqx.AbstractVar[int]
    differs_by_step = False
    is_polynomial = False

    @abstractmethod
    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        """``x(t + dt) | x(t)``; ``dt`` may be negative.

        At zero the matrix is the identity, and nobody looks at the noise.
        """


class IWP(AbstractPrior):
    """The ``num_derivatives`` times integrated Wiener process: ``u^(nu)`` is a Wiener process times ``output_scale``.

    ``output_scale``, in units of ``u^(nu) / sqrt(time)``: a positive number; not under ``Isotropic()``, one for each
    component, as a PyTree like ``u``; or, under ``Dense()``, a ``(d, d)`` array ``F`` of full rank over the ravelled
    ``u``, for noise with the covariance ``F^T F`` (as in ``Normal.factor``). Raises ``ValueError`` unless
    ``num_derivatives`` is a positive integer; in the first step for a scale that does not fit ``u`` or the
    factorisation.

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


class RelativeScale(AbstractPrior):
    """A prior under which components move by as much as they are large: in every step the output scale of ``prior``
    times the sizes of the components where the step starts.

    With one output scale for all components a solver takes them for equally rough. Where they differ by orders of
    magnitude, as concentrations do, it blames the small ones for the errors of the large ones, and on stiff problems
    their derivatives, and all that is predicted from them, are lost: Robertson's problem to t = 1e11 takes ``IWP(4)``
    with ``TS1`` more than 200,000 steps at ``rtol=1e-3``, ``RelativeScale(IWP(4))`` some 250. The solution does not
    depend on the units of the components then.

    A size is ``|u| + tau |u'|``, ``tau`` being the time in which the components change by their own sizes ``|u|``, in
    the root mean square: what a component is, and what it is about to be. None counts as smaller than ``floor`` times
    the largest ``|u|``. ``prior``: any with an ``output_scale``. Not for ``Isotropic()`` and ``Subspace()``, which have
    one scale for all components. Raises ``ValueError`` for a floor that is not positive, ``TypeError`` for a prior
    without an output scale.

    >>> import probode
    >>> probode.RelativeScale(probode.IWP(4)).num_derivatives
    4
    """

    prior: AbstractPrior
    floor: Float[Array, ""]
    differs_by_step = True

    def __init__(self, prior: Any, floor: Any = 1e-12):
        if not isinstance(prior, AbstractPrior) or not hasattr(prior, "output_scale"):
            raise TypeError(f"RelativeScale(prior) must be a prior with an output_scale, like IWP(4), got {prior!r}.")
        self.prior, self.floor = prior, as_positive(floor, "RelativeScale(floor)")

    @property
    def num_derivatives(self) -> int:
        """That of the prior whose output scale it is."""
        return self.prior.num_derivatives

    @property
    def is_polynomial(self) -> bool:
        """As of the prior whose output scale it is."""
        return self.prior.is_polynomial

    def transition(self, dt, layout):
        raise ValueError("RelativeScale takes its scale from the state where a step starts: without one use its prior.")

    def at(
        self, t: Float[Array, ""], us: Float[Array, "n d"], problem: Any, layout: Layout, args: PyTree
    ) -> AbstractPrior:
        """The prior of a step that leaves the derivatives ``us`` at ``t``."""
        prior = self.prior.at(t, us, problem, layout, args) if self.prior.differs_by_step else self.prior
        size = jnp.abs(us[0])
        size = size + self.floor.astype(size.dtype) * jnp.max(size)
        rate = safe_norm(safe_divide(us[1], size)) / math.sqrt(size.size)
        size = size + safe_divide(jnp.abs(us[1]), rate)
        size = jnp.where(size > 0, size, 1)  # where all components are zero
        scale = layout.output_scale(prior.output_scale) * size
        scale = scale if scale.ndim == 2 else layout.unravel(scale)
        return eqx.tree_at(lambda p: p.output_scale, prior, scale)


def as_positive(x: PyTree, name: str) -> PyTree:
    """The numbers of a PyTree as arrays; raises ``ValueError`` with the name of the part unless all are positive."""
    kinds = "a number or a PyTree of numbers like u"
    return as_numbers(x, name, kinds, lambda x: (x > 0) & (x < np.inf), "finite and positive")


def as_output_scale(x: PyTree, name: str) -> PyTree:
    """As ``as_positive``; a square array may also be a matrix of any finite numbers that has full rank."""
    square = jax.tree.structure(x) == jax.tree.structure(0) and len(shape := np.shape(x)) == 2 and shape[0] == shape[1]
    if not square:
        return as_positive(x, name)
    x = as_float(x, name)
    x = require(x, abs(x) < np.inf, f"{name} must be finite", output_scale=x)
    # One number for each component of a square u must not be zero; nobody knows yet which of the two this is.
    if not is_traced(x) and not (x > 0).all():
        # The rank is that of the correlations: components may have different units.
        size = np.linalg.norm(x, axis=0)
        rank = np.linalg.matrix_rank(x / np.where(size > 0, size, 1))
        require(x, rank == len(x), f"{name}, a matrix, must have full rank", rank=rank, output_scale=x)
    return jnp.asarray(x)


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
