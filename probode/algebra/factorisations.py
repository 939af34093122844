"""Covariance structures: how a stack of derivatives is stored as a batch of matrix-normal distributions.

    mean (*batch, dim, cols), factor (*batch, rows, dim), covariance = factor^T factor, shared by the columns
    Dense: batch (), dim n d, cols 1     BlockDiagonal: batch (d,), dim n, cols 1     Isotropic: batch (), dim n, cols d

(n derivatives including the zeroth, d components of the ravelled u; axis ``m`` below counts any number of derivatives.)
Kraemer, Bosch, Schmidt & Hennig (2022), "Probabilistic ODE solutions in millions of dimensions".
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Shaped

from .linalg import safe_norm, triangularise


class AbstractFactorisation(eqx.Module):
    """The structure of the covariance of ``(u, u', ..., u^(nu))``: which entries are kept, and how they are stored.

    A subclass defines ``batch_shape``, ``pack``, ``unpack``, ``unpack_std``, ``lift`` and ``project``; rows of means
    and columns of factors are ordered derivative by derivative. It may set, as class attributes or properties:

    - ``keeps_diagonal``: whether only the diagonal of a Jacobian is used, so that the rest need not be computed.
    - ``lanes``: how many leading axes its arrays have in a batch of solutions; zero if it has no arrays.

    Three more attributes are set by subclassing, never by hand, since each asks for further methods:

    - ``couples_equations``: whether the mean is conditioned on an explicit equation with its whole Jacobian, although
      the covariance has blocks: a subclass of ``AbstractCoupledFactorisation``.
    - ``adapts``: whether it changes in the course of a solve: one of ``AbstractAdaptiveFactorisation``.
    - ``own_algebra``: whether it has its own formulas for a step: one of ``AbstractOwnAlgebra``.

    >>> import probode
    >>> probode.Dense().batch_shape(3), probode.BlockDiagonal().batch_shape(3)
    ((), (3,))
    """

    keeps_diagonal = False
    couples_equations = False
    adapts = False
    own_algebra = False
    lanes = 0

    @abstractmethod
    def batch_shape(self, d: int) -> tuple[int, ...]:
        """The shape of the batch axes for ``d`` components, which is also that of the calibrated output scale."""

    @abstractmethod
    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        """A stack of derivatives, one row for each, in the layout of a mean."""

    @abstractmethod
    def unpack(self, mean: Float[Array, "*batch rows cols"], d: int) -> Float[Array, "m d"]:
        """A mean, or any array with its layout, as a stack of derivatives: the inverse of ``pack``."""

    @abstractmethod
    def unpack_std(self, std: Float[Array, "*batch rows"], d: int) -> Float[Array, "m d"]:
        """Standard deviations, one for each column of a factor, as a stack of derivatives."""

    @abstractmethod
    def lift(self, matrix: Float[Array, "n n"], scale: Float[Array, "..."], d: int) -> Float[Array, "*batch dim dim"]:
        """The right square root of the whole state, from that of the derivatives of one component and an output scale.

        ``scale``: a scalar; ``(d,)``; or, if the identity over the components is ``(d, d)``, an upper triangular right
        square root of that shape.
        """

    @abstractmethod
    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        """The part of a Jacobian that the structure keeps, in the layout of a block of ``Linearisation.matrix``.

        ``jacobian``: of ``m`` equations with respect to one derivative, ``(m, d)``; if ``keeps_diagonal``, also a
        diagonal ``(d,)``.
        """


class Dense(AbstractFactorisation):
    """The full covariance of the state, ``(n d, n d)``, with all correlations between components.

    A step costs ``O(n^3 d^3)``. For stiff problems with coupled components, and for equations with more or fewer
    entries than ``u``: it uses the whole Jacobian.

    >>> import jax.numpy as jnp, probode
    >>> probode.Dense().pack(jnp.ones((3, 2))).shape  # three derivatives of two components
    (6, 1)
    """

    def batch_shape(self, d: int) -> tuple[int, ...]:
        return ()

    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        return jnp.reshape(derivatives, (-1, 1))

    def unpack(self, mean: Float[Array, "*batch rows cols"], d: int) -> Float[Array, "m d"]:
        return jnp.reshape(mean, (-1, d))

    def unpack_std(self, std: Float[Array, "*batch rows"], d: int) -> Float[Array, "m d"]:
        return jnp.reshape(std, (-1, d))

    def lift(self, matrix: Float[Array, "n n"], scale: Float[Array, "..."], d: int) -> Float[Array, "*batch dim dim"]:
        return jnp.kron(matrix, scale if jnp.ndim(scale) == 2 else jnp.diag(jnp.broadcast_to(scale, (d,))))

    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        return jacobian


class BlockDiagonal(AbstractFactorisation):
    """A block-diagonal covariance: components are independent, with one ``(n, n)`` block each.

    A step costs ``O(n^3 d)``. Of Jacobians the diagonal is used; there is one output scale for each component. Raises
    ``ValueError`` where an equation does not have ``d`` entries, the ``i``-th about the ``i``-th component.

    >>> import probode
    >>> probode.BlockDiagonal().batch_shape(5)  # one output scale for each component
    (5,)
    """

    keeps_diagonal = True

    def batch_shape(self, d: int) -> tuple[int, ...]:
        return (d,)

    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        return derivatives.T[:, :, None]

    def unpack(self, mean: Float[Array, "*batch rows cols"], d: int) -> Float[Array, "m d"]:
        return mean[:, :, 0].T

    def unpack_std(self, std: Float[Array, "*batch rows"], d: int) -> Float[Array, "m d"]:
        return std.T

    def lift(self, matrix: Float[Array, "n n"], scale: Float[Array, "..."], d: int) -> Float[Array, "*batch dim dim"]:
        return jnp.broadcast_to(scale, (d,))[:, None, None] * matrix[None]

    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        return _diagonal(jacobian, self)[:, None, None]


class Isotropic(AbstractFactorisation):
    """The covariance ``C (x) I``, a Kronecker product: components are independent and share one ``(n, n)`` block ``C``.

    A step costs ``O(n^3 + n^2 d)``. Of Jacobians the mean of the diagonal is used; there is one output scale. Raises
    ``ValueError`` for a prior with an output scale for each component, and where an equation does not have ``d``
    entries.

    >>> import jax.numpy as jnp, probode
    >>> probode.Isotropic().pack(jnp.ones((3, 2))).shape  # the components share the rows
    (3, 2)
    """

    keeps_diagonal = True

    def batch_shape(self, d: int) -> tuple[int, ...]:
        return ()

    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        return derivatives

    def unpack(self, mean: Float[Array, "*batch rows cols"], d: int) -> Float[Array, "m d"]:
        return mean

    def unpack_std(self, std: Float[Array, "*batch rows"], d: int) -> Float[Array, "m d"]:
        return jnp.broadcast_to(std[:, None], (std.shape[0], d))

    def lift(self, matrix: Float[Array, "n n"], scale: Float[Array, "..."], d: int) -> Float[Array, "*batch dim dim"]:
        if jnp.ndim(scale) > 0:
            raise ValueError(
                "Isotropic() has one output scale for all components, but the prior's output_scale has one for each. "
                "Pass a scalar output_scale, or use BlockDiagonal() or Dense()."
            )
        return scale * matrix

    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        return jnp.mean(_diagonal(jacobian, self))[None, None]


def _diagonal(jacobian, factorisation):
    if jacobian.ndim == 1:
        return jacobian
    m, d = jacobian.shape
    if m != d:
        raise ValueError(
            f"{type(factorisation).__name__}() gives every component an equation of its own, but there are "
            f"{m} equations for {d} components. Use Dense()."
        )
    return jnp.diagonal(jacobian)


class Layout(eqx.Module):
    """How the state of one problem is stored: a factorisation, the number of derivatives, and the structure of ``u``.

    Parts of a solver receive it to convert PyTrees to arrays and back. ``Solver.init(...).layout`` is one.

    - ``factorisation``: the structure of the covariance.
    - ``num_derivatives``: ``nu``, so that a state holds ``u, u', ..., u^(nu)``.
    - ``size``: ``d``, how many numbers ``u`` has.
    - ``dtype``: that of the state, which all arrays of a part must have.
    - ``ravel`` and ``unravel``: between a PyTree ``u`` and a vector ``(d,)``.
    - ``pack`` and ``unpack``: between a stack of derivatives ``(m, d)`` and a mean.
    - ``project`` and ``lift``: the part of a Jacobian, or a square root, that the factorisation keeps.
    - ``broadcast``: a matrix over the derivatives, repeated along the batch axes.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -u)))
    >>> layout = solver.init(jnp.ones(3), 0.0).layout
    >>> layout.size, layout.pack(jnp.ones((3, 3))).shape  # u, u' and u'' of three components
    (3, (9, 1))
    """

    factorisation: AbstractFactorisation
    num_derivatives: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    unravel: Callable = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)

    def __repr__(self) -> str:
        name = type(self.factorisation).__name__
        return f"Layout({name}(), num_derivatives={self.num_derivatives}, size={self.size}, dtype={self.dtype})"

    def ravel(self, u: PyTree[Shaped[Array, "..."]]) -> Float[Array, " d"]:
        """A PyTree with the numbers of ``u`` as a vector ``(d,)`` of the layout's dtype."""
        return ravel_pytree(u)[0].astype(self.dtype)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the leading axes of means and covariances: ``()``, or that of the blocks."""
        return self.factorisation.batch_shape(self.size)

    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        """The mean that holds a stack of derivatives ``(m, d)``, stored as the factorisation stores means."""
        return self.factorisation.pack(derivatives)

    def unpack(self, mean: Float[Array, "*batch rows cols"]) -> Float[Array, "m d"]:
        """The derivatives that a mean holds, as a stack ``(m, d)``: the inverse of ``pack``."""
        return self.factorisation.unpack(mean, self.size)

    def std(self, factor: Float[Array, "*batch rows dim"]) -> Float[Array, "m d"]:
        """The standard deviations of all entries of the state as a stack of derivatives, from a factor."""
        own: Any = self.factorisation
        if own.own_algebra or own.adapts:
            return own.std(factor)
        return own.unpack_std(safe_norm(factor, axis=-2), self.size)

    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        """The part of a Jacobian that the factorisation uses, stored as it stores matrices."""
        return self.factorisation.project(jacobian)

    def lift(self, matrix: Float[Array, "n n"], scale: PyTree) -> Float[Array, "*batch dim dim"]:
        """The square root of ``scale^2 matrix^T matrix`` for all components; ``scale`` as for ``output_scale``."""
        return self.factorisation.lift(matrix, self.output_scale(scale), self.size)

    def output_scale(self, scale: PyTree) -> Float[Array, "*shape"]:
        """An output scale in the form that ``lift`` takes: a scalar, ``(d,)``, or an upper triangular ``(d, d)`` root.

        ``scale``: a number; a PyTree like ``u``, one number for each component; or a right square root ``F``, a
        ``(d, d)`` array, for noise with the covariance ``F^T F``. Raises ``ValueError`` for anything else, or for a
        matrix where the factorisation keeps no correlations.
        """
        d, shapes, expected = self.size, jax.tree.map(jnp.shape, scale), jax.tree.map(jnp.shape, self.example)
        if eqx.is_array_like(scale) and (jnp.ndim(scale) == 0 or jnp.size(scale) == d == 1):
            return jnp.reshape(jnp.asarray(scale, self.dtype), ())
        if shapes == expected:
            return self.ravel(scale)
        if shapes != (d, d):
            raise ValueError(
                f"output_scale must be a scalar, have the structure and shapes of u, or be a ({d}, {d}) matrix: "
                f"expected {expected}, got {shapes}."
            )
        self.require_coupling("output_scale is a matrix, which correlates the components")
        return triangularise(None, jnp.asarray(scale, self.dtype))

    def per_component(self, x: PyTree, name: str) -> Float[Array, "*shape"]:
        """One number for each component of ``u`` as a vector ``(d,)``, or a scalar if all have the same.

        ``x``: a number, or a PyTree like ``u`` whose leaves broadcast to those of ``u``; where ``u`` is an array also a
        list. Raises ``ValueError`` with ``name`` for anything else.
        """
        if eqx.is_array_like(x) and jnp.ndim(x) == 0:
            return jnp.asarray(x, self.dtype)
        if isinstance(x, (list, tuple)) and isinstance(self.example, jax.ShapeDtypeStruct):
            x = jnp.stack(x) if all(map(eqx.is_array, x)) else x
        shapes, expected = jax.tree.map(jnp.shape, x), jax.tree.map(jnp.shape, self.example)
        try:
            return self.ravel(jax.tree.map(lambda u, x: jnp.broadcast_to(x, u.shape), self.example, x))
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} must be a number, or have the structure of u and shapes that broadcast to its shapes: "
                f"expected {expected}, got {shapes}."
            ) from None

    def broadcast(self, matrix: Float[Array, "p q"]) -> Float[Array, "*batch p q"]:
        """The matrix repeated along the batch axes."""
        return jnp.broadcast_to(matrix, self.batch_shape + matrix.shape)

    def identity(self) -> Float[Array, "*batch m m"]:
        """The identity matrix over the components of one derivative, in the layout of the factorisation."""
        return self.lift(jnp.ones((1, 1), self.dtype), 1.0)

    @property
    def keeps_all(self) -> bool:
        """True if ``project`` keeps every entry of a Jacobian."""
        # Not only diagonals drop entries: blocks do so with what lies between them, unless their equations are coupled.
        part = self.factorisation
        return self.size == 1 or self.couples or part.couples_equations or part.own_algebra

    @property
    def couples(self) -> bool:
        """True if the covariance has entries between different components."""
        # A factorisation with an algebra of its own has columns that are no components, however many they are.
        return not self.factorisation.own_algebra and jax.eval_shape(self.identity).shape == (self.size, self.size)

    def require_coupling(self, what: str) -> None:
        """Raises ``ValueError`` if the covariance has no entries between components; ``what``: what needs them."""
        if self.size > 1 and not self.couples:
            each = " or one number for each component" if self.batch_shape == (self.size,) else ""
            raise ValueError(
                f"{what}, but {type(self.factorisation).__name__}() keeps no correlations between them. Use Dense(), "
                f"or pass a number{each}."
            )

    def require_shared_algebra(self, what: str) -> None:
        """Raises ``ValueError`` under a factorisation with an algebra of its own; ``what``: what is not available."""
        self._refuse(what, self.factorisation.own_algebra)

    def require_own_equations(self, what: str) -> None:
        """Raises ``ValueError`` where equations couple the blocks of a covariance; ``what``: what is not available."""
        self._refuse(what, self.factorisation.couples_equations)

    def require_lasting(self, what: str) -> None:
        """Raises ``ValueError`` where the layout changes during a solve; ``what``: what is not available."""
        self._refuse(what, self.factorisation.adapts)

    def _refuse(self, what, unavailable):
        if unavailable:
            raise ValueError(f"{what} is not available under {type(self.factorisation).__name__}(): use Dense().")

    @property
    def lanes(self) -> int:
        """How many leading axes a batch of solutions adds to the arrays of the factorisation; zero if it has none."""
        return self.factorisation.lanes

    @property
    def example(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The structure, shapes and dtype of ``u``, without values."""
        return jax.eval_shape(self.unravel, jax.ShapeDtypeStruct((self.size,), self.dtype))


def layout_of(example: PyTree, num_derivatives: int, factorisation: AbstractFactorisation) -> Layout:
    """The layout of states whose ``u`` has the structure, shapes and dtype of ``example``."""
    flat, unravel = ravel_pytree(example)
    return Layout(fitted(factorisation, example), num_derivatives, flat.size, unravel, jnp.dtype(flat.dtype))


def fitted(factorisation: Any, u: PyTree) -> AbstractFactorisation:
    """The factorisation as a layout needs it: for one that depends on the structure or size of ``u``, that for ``u``.

    Others are returned as they are.
    """
    return factorisation.fit(u) if factorisation.couples_equations else factorisation
