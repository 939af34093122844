"""Linearised equations about a state."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .coupling import Coupling
from .factorisations import Layout
from .linalg import product, substitute
from .normal import batched


class Linearisation(eqx.Module):
    """An equation ``z(x) = 0`` linearised about a point: ``z(x) ~ residual + H (x - point)``.

    ``AbstractConstraint.linearise`` returns it. Make it with ``Linearisation.explicit`` for equations of the form
    ``u^(k) - f(t, u, ...) = 0``, with ``Linearisation.general`` for all others. In the layout of the factorisation:

    - ``matrix``: ``H``, for the leading ``p <= dim`` rows of the state, ``(*batch, m, p)``.
    - ``residual``: ``z`` at the point, ``(*batch, m, cols)``.
    - ``gives``: the derivatives that the equation gives explicitly, as a ``range``. ``range(1, 2)``: it has the form
      ``u' - f(t, u) = 0``, so the last ``m`` columns of ``H`` are the identity on ``u'``. ``range(1, 4)``: equations
      for ``u'``, ``u''`` and ``u^(3)``, each in terms of lower derivatives, so the last ``m`` columns are lower
      triangular with ones on the diagonal. ``None``: an equation of general form.
    - ``noise``: right square root of the covariance of the equation's error, ``(*batch, rows, m)``; ``None`` if the
      equation holds exactly. With noise ``gives`` has to be ``None``.
    - ``left``: right square root of the covariance of ``u`` given the equation under the noise of the step alone,
      ``(rows, entries)``; only from factorisations with an algebra of their own, otherwise ``None``.
    - ``whole``: whether ``matrix`` is the whole derivative of ``z``, so that the error of the linearisation is of
      second order. It is false where the vector field is taken as constant (``TS0``), or where only the diagonal of its
      Jacobian is kept.
    - ``is_frozen``: whether right-hand sides are held constant, so that ``matrix`` is the identity on the derivatives
      given and zero elsewhere, and the attempt itself makes the further evaluations: that of ``TS0`` of a lifted
      equation. (False for ``TS0`` of an ODE, whose matrix looks the same.)
    - ``coupling``: the derivative with respect to all batch elements, where the mean is conditioned on it and
      ``matrix`` is only the part of each element's own equations; ``None`` where there is no other.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -3 * u)))
    >>> state = solver.init(1.0, 0.0)
    >>> equation = solver.constraint.linearise(state.t, state.distribution, state.layout, None)
    >>> equation.matrix, equation.gives
    (Array([[3., 1.]], dtype=float64), range(1, 2))
    """

    matrix: Float[Array, "*batch m p"]
    residual: Float[Array, "*batch m cols"]
    gives: range | None = eqx.field(static=True, default=None)
    noise: Float[Array, "*batch rows m"] | None = None
    left: Float[Array, "rows entries"] | None = None
    whole: bool = eqx.field(static=True, default=True)
    is_frozen: bool = eqx.field(static=True, default=False)
    coupling: Coupling | None = None

    @staticmethod
    def explicit(
        layout: Layout, jacobians: Sequence[Array | None], residual: Float[Array, " d"], *, whole: bool = True
    ) -> "Linearisation":
        """The linearisation of ``u^(k) - f(t, u, ..., u^(k-1)) = 0`` with ``k = len(jacobians)``.

        ``jacobians``: the derivative of ``f`` with respect to each of ``u, ..., u^(k-1)``, of shape ``(d, d)``, or
        ``(d,)`` for diagonals where ``layout.factorisation.keeps_diagonal``; ``None`` for zero. ``residual``:
        ``u^(k) - f`` at the point for the ravelled ``u``, ``(d,)``. ``whole``: whether ``jacobians`` holds the whole
        derivative of ``f``; a factorisation that keeps only diagonals makes it false.
        """
        level = [None if jacobian is None else jacobian[None] for jacobian in jacobians]
        equation = Linearisation.lifted(layout, level, residual[None], whole=whole)
        known = [jacobian for jacobian in jacobians if jacobian is not None]
        if not (known and layout.factorisation.couples_equations):
            return equation
        every = [jnp.zeros_like(known[0]) if jacobian is None else jacobian for jacobian in jacobians]
        factorisation: Any = layout.factorisation
        return dataclasses.replace(equation, coupling=factorisation.couple(every))

    @staticmethod
    def lifted(
        layout: Layout,
        jacobians: Sequence[Float[Array, "levels *jacobian"] | None],
        residual: Float[Array, "levels d"],
        *,
        whole: bool = True,
    ) -> "Linearisation":
        """The linearisation of the equation ``u^(k) - f = 0`` together with its first time derivatives.

        The order ``k`` is the number of ``jacobians``.
        ``jacobians``: the derivative of ``f`` with respect to each of ``u, ..., u^(k-1)`` as for ``explicit``, with its
        time derivatives along the solution in front: ``(levels, d, d)`` or ``(levels, d)``. By Leibniz' rule that of
        ``d^j f / dt^j`` with respect to ``u^(i)`` is made of these. ``residual``: ``u^(k+j) - d^j f / dt^j`` at the
        point, a row for each ``j``.
        """
        k, levels = len(jacobians), residual.shape[0]
        if layout.factorisation.couples_equations and levels > 1 and any(x is not None for x in jacobians):
            name = type(layout.factorisation).__name__
            raise ValueError(f"{name}() needs an equation for one derivative of u, not a lifted one: use Dense().")
        blocks = [[] if jacobian is None else [layout.project(level) for level in jacobian] for jacobian in jacobians]
        nothing, one = jnp.zeros_like(layout.identity()), layout.identity()

        def block(j, i):
            if i == k + j:
                return one
            parts = [math.comb(j, i - a) * blocks[a][j - i + a] for a in range(k) if blocks[a] and 0 <= i - a <= j]
            return -sum(parts[1:], parts[0]) if parts else nothing

        rows = [jnp.concatenate([block(j, i) for i in range(k + levels)], axis=-1) for j in range(levels)]
        matrix = jnp.concatenate(rows, axis=-2)
        return Linearisation(matrix, layout.pack(residual), range(k, k + levels), whole=whole and layout.keeps_all)

    @staticmethod
    def frozen(layout: Layout, order: int, residual: Float[Array, "levels d"]) -> "Linearisation":
        """The equation ``u^(order + j) = c_j`` for ``j = 0, 1, ...``, whose right-hand sides do not depend on ``u``.

        ``residual``: ``u^(order + j) - c_j`` at the point, a row for each derivative, for the flat ``u``.
        """
        size, levels = layout.identity().shape[-1], residual.shape[0]
        unit = jnp.eye(levels * size, (order + levels) * size, order * size, dtype=residual.dtype)
        gives = range(order, order + levels)
        return Linearisation(layout.broadcast(unit), layout.pack(residual), gives, whole=False, is_frozen=True)

    def times(self, x: Float[Array, "*batch dim cols"]) -> Float[Array, "*batch m cols"]:
        """The product ``H x`` of the Jacobian of the residual with a direction ``x`` in the space of states."""
        if self.is_frozen:
            return given(self, x)
        leading = x[..., : self.matrix.shape[-1], :]
        return batched(product)(self.matrix, leading) if self.coupling is None else self.coupling.times(leading)

    @property
    def sizes(self) -> "Linearisation":
        """The equation with the absolute values of its derivatives."""
        coupling = None if self.coupling is None else jax.tree.map(jnp.abs, self.coupling)
        return dataclasses.replace(self, matrix=jnp.abs(self.matrix), coupling=coupling)

    def require_separate(self, what: str, layout: Layout) -> None:
        """Raises ``ValueError`` where the equation couples batch elements; ``what``: what is not available then."""
        if self.coupling is not None:
            name = type(layout.factorisation).__name__
            raise ValueError(f"{what} is not available under {name}(), whose groups it would couple: use Dense().")

    @property
    def num_replaced(self) -> int:
        """The number of entries of a state that the equation determines from the others.

        The factor of its covariance has as many rows less.
        """
        return 0 if self.gives is None or self.coupling is not None else self.residual.shape[-2]

    @property
    def is_coupled(self) -> bool:
        """Whether it gives several derivatives, each in terms of the lower ones."""
        return self.gives is not None and len(self.gives) > 1 and not self.is_frozen

    def solve_for_given(self, z: Float[Array, "m cols"]) -> Float[Array, "m cols"]:
        """``T^-1 z``, where the columns of the derivatives given are ``T``: lower triangular, with a unit diagonal."""
        if not self.is_coupled:
            return z
        triangle = self.matrix[:, self.matrix.shape[1] - self.matrix.shape[0] :]
        return substitute(triangle.T, z)

    @staticmethod
    def general(
        layout: Layout, jacobians: Sequence[Array], residual: Float[Array, " m"], *, whole: bool = True
    ) -> "Linearisation":
        """The linearisation of ``r(t, u, ..., u^(k)) = 0`` with ``k = len(jacobians) - 1``.

        ``jacobians``: the derivative of ``r`` with respect to each of ``u, ..., u^(k)``, of shape ``(m, d)``.
        ``residual``: ``r`` at the point, ``(m,)``. ``whole``: as for ``explicit``. Raises ``ValueError`` for
        ``m != d`` under ``BlockDiagonal()`` and ``Isotropic()``.
        """
        if layout.factorisation.couples_equations:
            name = type(layout.factorisation).__name__
            raise ValueError(f"{name}() needs an explicit equation, u' = f(t, u) or of higher order: use Dense().")
        matrix = jnp.concatenate([layout.project(jacobian) for jacobian in jacobians], axis=-1)
        return Linearisation(matrix, layout.pack(residual[None]), whole=whole and layout.keeps_all)


def residual_about(
    mean: Float[Array, "*batch dim cols"], point: Float[Array, "*batch dim cols"], equation: Linearisation
) -> Float[Array, "*batch m cols"]:
    """The residual at ``mean`` by the linearisation about ``point``: ``z + H (mean - point)``."""
    return equation.residual + equation.times(mean - point)


def given(equation: Linearisation, mean: Float[Array, "*batch dim cols"]) -> Float[Array, "*batch m cols"]:
    """The entries of a mean that a frozen equation gives, which are the product ``H mean``."""
    m, p = equation.matrix.shape[-2:]
    return mean[..., p - m : p, :]
