"""Equations that couple components whose covariances are kept as independent blocks.

The mean is conditioned on the whole equation, ``u^(k) - f(t, u, ..., u^(k-1)) = 0`` with all of its Jacobian; of the
joint posterior covariance the blocks of the components that belong together are kept. In coordinates ``w``, in which
the predicted blocks are standard normal and independent, ``x_i = m_i + R_i^T w_i``, the residual is ``z + A^T w``. The
rows of ``A`` are those of ``u, ..., u^(k-1)``, ``B``, and those of ``u^(k)``, which make an upper triangle ``D``, block
by block: ::

    A = [B]     S = A^T A,     w | z ~ N(-A S^-1 z, F^T F),     F = G^-T [I, -L],     L = B D^-1,     G^T G = I + L L^T
        [D]

``S^(1/2)`` and ``G`` are triangles of stacks, of ``[D; B]`` and ``[I; L^T]``. Nothing is subtracted, so a variance of
1e-16 (``L`` = 1e8) keeps full relative accuracy.

Axes: ``blocks`` of ``s`` components; ``d`` equations in all, of order ``k``; ``q = k s`` and ``bq = blocks * q``; the
leading ``p = q + s`` entries of the state of a block. The equations are in the order of the blocks, which need not be
that of the components.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .factorisations import AbstractFactorisation
from .linalg import product, solve_upper, substitute, triangularise


class AbstractCoupledFactorisation(AbstractFactorisation):
    """A block-diagonal covariance, with a mean that is conditioned on the whole equation, blocks together.

    A subclass defines ``fit`` and ``couple`` beside the methods of ``AbstractFactorisation``, in which its
    batch has one axis, for the blocks; ``project`` returns the part of each block's own equations.
    ``couples_equations`` is true. It does not work with ``stop_at``, equations of general form and leave-one-out
    residuals. If data involve several blocks, each block is updated by its own part of them: that which ``project``
    keeps of their Jacobian.

    >>> import probode
    >>> isinstance(probode.Blocks(2), probode.AbstractCoupledFactorisation)
    True
    """

    couples_equations = True

    @abstractmethod
    def fit(self, u: PyTree) -> "AbstractCoupledFactorisation":
        """The factorisation for states like ``u``."""

    @abstractmethod
    def couple(self, jacobians: Sequence[Float[Array, "d d"]]) -> "Coupling":
        """The derivative of ``u^(k) - f`` from those of ``f`` with respect to ``u, ..., u^(k-1)``."""


class AbstractAdaptiveFactorisation(AbstractCoupledFactorisation):
    """A block-diagonal covariance in coordinates along pairs of directions, which change in the course of a solve.

    A subclass defines ``check``, ``adapt``, ``turn_to`` and ``std`` beside the methods of
    ``AbstractCoupledFactorisation``. ``adapts`` is true; data and an uncertain ``u0`` are refused. ``lanes``: how many
    leading axes its arrays have, for times and for a batch of solutions.

    >>> import probode
    >>> isinstance(probode.Modal(), probode.AbstractAdaptiveFactorisation)
    True
    """

    lanes: eqx.AbstractVar[int]
    adapts = True

    @abstractmethod
    def check(self, prior: Any, constraint: Any, strategy: Any, calibration: Any, error: Any) -> None:
        """Raises ``ValueError`` for parts of a solver with which this factorisation does not work; returns nothing."""

    @abstractmethod
    def adapt(
        self, coupling: "Coupling", dt: Float[Array, ""] | None
    ) -> tuple["AbstractAdaptiveFactorisation", Float[Array, "d d"], Bool[Array, ""]]:
        """The factorisation for the next steps, its directions in terms of the present ones, and whether they changed.

        ``coupling``: that of the equation in a step of length ``dt``, or at the start, where ``dt`` is ``None``. The
        directions are the columns of a matrix.
        """

    @abstractmethod
    def turn_to(self, other: "AbstractAdaptiveFactorisation") -> Float[Array, "d d"]:
        """The directions of another factorisation in terms of those of this one, as columns."""

    @abstractmethod
    def std(self, factor: Float[Array, "*batch rows dim"]) -> Float[Array, "m d"]:
        """Standard deviations of all components, derivative by derivative."""


class Coupling(eqx.Module):
    """The whole derivative of an explicit equation with respect to a state that is kept in independent blocks.

    - ``matrix``: of all ``d`` equations with respect to the leading ``p`` entries of each block; the last ``s`` columns
      are the identity on ``u^(k)``. Rows are in the order of ``places``, not of the components: those of
      ``Blocks([0, 1, 0, 1])`` are the equations of the components 0, 2, 1, 3.
    - ``places``: where each row of ``matrix`` stands among the ``blocks * s`` rows of a residual in the layout, of
      which some are empty where blocks differ in size; increasing.
    - ``size``: ``s``, the number of components of a block, of the largest one where blocks differ in size.
    """

    matrix: Float[Array, "blocks d p"]
    places: tuple[int, ...] = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def flat(self, z: Float[Array, "blocks s cols"]) -> Float[Array, "d cols"]:
        """A residual in the layout as that of all equations, one below the other in the order of ``places``."""
        return jnp.reshape(z, (-1, z.shape[-1]))[np.asarray(self.places)]

    def split(self, z: Float[Array, "d cols"]) -> Float[Array, "blocks s cols"]:
        """The inverse of ``flat``."""
        return jnp.reshape(self._spread(z), (-1, self.size, z.shape[1]))

    def _spread(self, z):
        """Rows of all equations at their places among all rows, which elsewhere are zero."""
        rows = self.matrix.shape[0] * self.size
        if self.places == tuple(range(rows)):
            return z
        return jnp.zeros((rows, *z.shape[1:]), z.dtype).at[np.asarray(self.places)].set(z)

    def times(self, x: Float[Array, "blocks p cols"]) -> Float[Array, "blocks s cols"]:
        """``H x`` in the layout of a residual, for the leading entries ``x`` of the states of all blocks."""
        return self.split(jnp.einsum("bdp,bpc->dc", self.matrix, x))

    def columns(self, root: Float[Array, "rows d"]) -> Float[Array, "blocks rows s"]:
        """The columns of a matrix for all equations that belong to each block."""
        return jnp.moveaxis(jnp.reshape(self._spread(root.T), (-1, self.size, root.shape[0])), 2, 1)

    def from_columns(self, columns: Float[Array, "blocks rows s"]) -> Float[Array, "rows d"]:
        """The inverse of ``columns``."""
        return jnp.reshape(jnp.moveaxis(columns, 1, 2), (-1, columns.shape[1]))[np.asarray(self.places)].T

    def for_each(self, shared: PyTree) -> PyTree:
        """What all equations have together, repeated for each block."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.matrix.shape[0], *x.shape)), shared)

    def observed(self, roots: Float[Array, "blocks p p"]) -> tuple[Float[Array, "bq d"], Float[Array, "d d"]]:
        """The matrices ``B`` and ``D`` in the covariance ``S = B^T B + D^T D`` of the residual.

        ``roots``: upper triangular right square roots of the covariances of the blocks.
        """
        a, q = jax.vmap(lambda r, h: product(r, h.T))(roots, self.matrix), roots.shape[-1] - self.size
        b, d = (jnp.reshape(x, (-1, x.shape[-1])) for x in (a[:, :q], a[:, q:]))
        return b, d[np.asarray(self.places)]

    def root(self, roots: Float[Array, "blocks p p"]) -> Float[Array, "d d"]:
        """The upper triangular root of ``S``, the covariance of the residual."""
        below, own = self.observed(roots)
        return triangularise(own, below)

    def adjoint(self, root: Float[Array, "d d"], whitened: Float[Array, "d cols"]) -> Float[Array, "blocks p cols"]:
        """``H^T S^-1 z`` from the whitened residual."""
        y = solve_upper(root, whitened)
        return jax.vmap(lambda h: product(h.T, y))(self.matrix)

    def conditioned(self, roots: Float[Array, "blocks p p"]) -> Float[Array, "blocks p p"]:
        """Upper triangular roots of the covariances of the coordinates of each block, given the equation."""
        (below, _), q = self.observed(roots), roots.shape[-1] - self.size
        # The blocks of D are the lower right corners of ``roots``, as H is the identity there. Zero pivots give zero
        # slopes (``substitute``).
        own, columns = roots[:, q:, q:], self.columns(below)
        slopes = jax.vmap(lambda r, b: substitute(r, b.T))(own, columns)  # L^T, the rows of each block
        rows = jnp.reshape(slopes, (-1, below.shape[0]))
        eye = jnp.eye(below.shape[0], dtype=below.dtype)
        # No pivot is below one.
        lower = substitute(triangularise(eye, rows), eye)
        upper = -product(lower, rows.T)
        parts = [jnp.moveaxis(jnp.reshape(x, (len(below), len(roots), -1)), 1, 0) for x in (lower, upper)]
        return jax.vmap(lambda rows: triangularise(None, rows))(jnp.concatenate(parts, axis=-1))
