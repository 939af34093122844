"""Covariance structures as layouts of one array: how a stack of derivatives becomes a batch of matrix-normals.

    mean (*batch, dim, cols), factor (*batch, rows, dim), covariance = factor^T factor, shared by the columns
    Dense: batch (), dim n d, cols 1     BlockDiagonal: batch (d,), dim n, cols 1     Isotropic: batch (), dim n, cols d

(n derivatives including the zeroth, d components of the ravelled u; axis ``m`` below counts any number of derivatives.)
"""

from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Shaped

from .linalg import safe_norm, triangularise


class AbstractFactorisation(eqx.Module):
    """Which entries of the covariance of ``(u, u', ..., u^(nu))`` are kept; rows go derivative by derivative.

    ``keeps_diagonal``: whether of a Jacobian nothing but its diagonal matters, so that nobody computes the rest.
    ``own_algebra``: whether it conditions in its own way (see ``AbstractOwnAlgebra``).

    >>> import probode
    >>> probode.Dense().batch_shape(3), probode.BlockDiagonal().batch_shape(3)
    ((), (3,))
    """

    keeps_diagonal = False
    own_algebra = False

    @abstractmethod
    def batch_shape(self, d: int) -> tuple[int, ...]:
        """Shape of the batch, which is also the shape of the calibrated output scale."""

    @abstractmethod
    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        """A stack of derivatives as a mean."""

    @abstractmethod
    def unpack(self, mean: Float[Array, "*batch rows cols"], d: int) -> Float[Array, "m d"]:
        """The inverse of ``pack``."""

    @abstractmethod
    def unpack_std(self, std: Float[Array, "*batch rows"], d: int) -> Float[Array, "m d"]:
        """One standard deviation per row of a factor's columns as a stack like the mean."""

    @abstractmethod
    def lift(self, matrix: Float[Array, "n n"], scale: Float[Array, "..."], d: int) -> Float[Array, "*batch dim dim"]:
        """Right square root over the derivatives, times an output scale, for all components.

        The scale is a scalar; ``(d,)``; or, if the identity over the components is ``(d, d)``, upper triangular.
        """

    @abstractmethod
    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        """What the structure keeps of the Jacobian of ``m`` equations with respect to one derivative, ``(m, d)``; or,
        if ``keeps_diagonal``, also of a diagonal ``(d,)``."""


class Dense(AbstractFactorisation):
    """The full covariance, ``(n d, n d)``: cubic in ``d``, keeps every correlation between components.

    >>> import jax.numpy as jnp, probode
    >>> probode.Dense().pack(jnp.ones((3, 2))).shape  # three derivatives of two components
    (6, 1)
    """

    def batch_shape(self, d):
        return ()

    def pack(self, derivatives):
        return jnp.reshape(derivatives, (-1, 1))

    def unpack(self, mean, d):
        return jnp.reshape(mean, (-1, d))

    def unpack_std(self, std, d):
        return jnp.reshape(std, (-1, d))

    def lift(self, matrix, scale, d):
        return jnp.kron(matrix, scale if jnp.ndim(scale) == 2 else jnp.diag(jnp.broadcast_to(scale, (d,))))

    def project(self, jacobian):
        return jacobian


class BlockDiagonal(AbstractFactorisation):
    """One ``(n, n)`` block for each component: linear in ``d``; components are independent, Jacobians diagonal.

    >>> import probode
    >>> probode.BlockDiagonal().batch_shape(5)  # one output scale for each component
    (5,)
    """

    keeps_diagonal = True

    def batch_shape(self, d):
        return (d,)

    def pack(self, derivatives):
        return derivatives.T[:, :, None]

    def unpack(self, mean, d):
        return mean[:, :, 0].T

    def unpack_std(self, std, d):
        return std.T

    def lift(self, matrix, scale, d):
        return jnp.broadcast_to(scale, (d,))[:, None, None] * matrix

    def project(self, jacobian):
        return _diagonal(jacobian, self)[:, None, None]


class Isotropic(AbstractFactorisation):
    """One ``(n, n)`` block shared by all components: linear in ``d``; a Jacobian enters by its mean diagonal.

    >>> import jax.numpy as jnp, probode
    >>> probode.Isotropic().pack(jnp.ones((3, 2))).shape  # the components share the rows
    (3, 2)
    """

    keeps_diagonal = True

    def batch_shape(self, d):
        return ()

    def pack(self, derivatives):
        return derivatives

    def unpack(self, mean, d):
        return mean

    def unpack_std(self, std, d):
        return jnp.broadcast_to(std[:, None], (std.shape[0], d))

    def lift(self, matrix, scale, d):
        if jnp.ndim(scale) > 0:
            raise ValueError(
                "Isotropic() has one output scale for all components, but the prior's output_scale has one for each. "
                "Pass a scalar output_scale, or use BlockDiagonal() or Dense()."
            )
        return scale * matrix

    def project(self, jacobian):
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

    Parts of a solver receive it to go from PyTrees to arrays:

    - ``ravel`` and ``unravel``: between a ``u`` and a flat ``(d,)``, where ``d = size``.
    - ``pack`` and ``unpack``: between a stack of derivatives ``(m, d)`` and a mean.
    - ``project`` and ``lift``: from Jacobians and square roots to what the factorisation keeps of them.
    - ``dtype``: that of the state, which all arrays of a part must have.

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

    def __repr__(self):
        name = type(self.factorisation).__name__
        return f"Layout({name}(), num_derivatives={self.num_derivatives}, size={self.size}, dtype={self.dtype})"

    def ravel(self, u: PyTree[Shaped[Array, "..."]]) -> Float[Array, " d"]:
        """A state, or anything like it, as a vector of the layout's dtype."""
        return ravel_pytree(u)[0].astype(self.dtype)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """See ``AbstractFactorisation.batch_shape``."""
        return self.factorisation.batch_shape(self.size)

    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        """See ``AbstractFactorisation.pack``."""
        return self.factorisation.pack(derivatives)

    def unpack(self, mean: Float[Array, "*batch rows cols"]) -> Float[Array, "m d"]:
        """See ``AbstractFactorisation.unpack``."""
        return self.factorisation.unpack(mean, self.size)

    def std(self, factor: Float[Array, "*batch rows dim"]) -> Float[Array, "m d"]:
        """Standard deviations of the columns of a factor, stacked like the mean."""
        if self.factorisation.own_algebra:
            return self.factorisation.std(factor)
        return self.factorisation.unpack_std(safe_norm(factor, axis=-2), self.size)

    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        """See ``AbstractFactorisation.project``."""
        return self.factorisation.project(jacobian)

    def lift(self, matrix: Float[Array, "n n"], scale: PyTree) -> Float[Array, "*batch dim dim"]:
        """See ``AbstractFactorisation.lift``; ``scale`` as for ``output_scale``."""
        return self.factorisation.lift(matrix, self.output_scale(scale), self.size)

    def output_scale(self, scale: PyTree) -> Float[Array, "*shape"]:
        """A scale as the factorisation takes it: a scalar, ``(d,)``, or an upper triangular ``(d, d)`` root.

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

    def broadcast(self, matrix: Float[Array, "p q"]) -> Float[Array, "*batch p q"]:
        """The same matrix for every batch element."""
        return jnp.broadcast_to(matrix, self.batch_shape + matrix.shape)

    def identity(self) -> Float[Array, "*batch m m"]:
        """The identity over the components of one derivative."""
        return self.lift(jnp.ones((1, 1), self.dtype), 1.0)

    @property
    def keeps_all(self) -> bool:
        """True if ``project`` keeps every entry of a Jacobian."""
        return self.size == 1 or not self.factorisation.keeps_diagonal

    @property
    def couples(self) -> bool:
        """True if the covariance has entries between different components."""
        return jax.eval_shape(self.identity).shape == (self.size, self.size)

    def require_coupling(self, what: str) -> None:
        """Raises ``ValueError`` where components are kept independent; ``what``: the parameter that couples them."""
        if self.size > 1 and not self.couples:
            each = " or one number for each component" if self.batch_shape == (self.size,) else ""
            raise ValueError(
                f"{what}, but {type(self.factorisation).__name__}() keeps no correlations between them. Use Dense(), "
                f"or pass a number{each}."
            )

    def require_shared_algebra(self, what: str) -> None:
        """Raises ``ValueError`` under a factorisation with an algebra of its own; ``what`` names what it cannot do."""
        if self.factorisation.own_algebra:
            raise ValueError(f"{what} is not available under {type(self.factorisation).__name__}(): use Dense().")

    @property
    def lanes(self) -> int:
        """How many leading axes the arrays of the factorisation have in a batch of solutions."""
        return self.factorisation.lanes if self.factorisation.own_algebra else 0

    @property
    def example(self) -> PyTree[jax.ShapeDtypeStruct]:
        """A state without values."""
        return jax.eval_shape(self.unravel, jax.ShapeDtypeStruct((self.size,), self.dtype))


def layout_of(example: PyTree, num_derivatives: int, factorisation: AbstractFactorisation) -> Layout:
    """The layout of states like the example."""
    flat, unravel = ravel_pytree(example)
    return Layout(factorisation, num_derivatives, flat.size, unravel, jnp.dtype(flat.dtype))
