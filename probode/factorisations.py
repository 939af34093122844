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

from .linalg import safe_norm


class AbstractFactorisation(eqx.Module):
    """Which entries of the covariance of ``(u, u', ..., u^(nu))`` are kept; rows go derivative by derivative."""

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
        """Right square root over the derivatives, times an output scale (scalar or ``(d,)``), for all components."""

    @abstractmethod
    def project(self, jacobian: Float[Array, "m d"]) -> Float[Array, "*batch rows columns"]:
        """What the structure keeps of the Jacobian of ``m`` equations with respect to one derivative."""


class Dense(AbstractFactorisation):
    """The full covariance, ``(n d, n d)``: cubic in ``d``, keeps every correlation between components."""

    def batch_shape(self, d):
        return ()

    def pack(self, derivatives):
        return jnp.reshape(derivatives, (-1, 1))

    def unpack(self, mean, d):
        return jnp.reshape(mean, (-1, d))

    def unpack_std(self, std, d):
        return jnp.reshape(std, (-1, d))

    def lift(self, matrix, scale, d):
        return jnp.kron(matrix, jnp.diag(jnp.broadcast_to(scale, (d,))))

    def project(self, jacobian):
        return jacobian


class BlockDiagonal(AbstractFactorisation):
    """One ``(n, n)`` block for each component: linear in ``d``; components are independent, Jacobians diagonal."""

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
        _require_square(jacobian, self)
        return jnp.diagonal(jacobian)[:, None, None]


class Isotropic(AbstractFactorisation):
    """One ``(n, n)`` block shared by all components: linear in ``d``; a Jacobian enters by its mean diagonal."""

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
        _require_square(jacobian, self)
        return jnp.mean(jnp.diagonal(jacobian))[None, None]


def _require_square(jacobian, factorisation):
    m, d = jacobian.shape
    if m != d:
        raise ValueError(
            f"{type(factorisation).__name__}() gives every component an equation of its own, but there are "
            f"{m} equations for {d} components. Use Dense()."
        )


class Layout(eqx.Module):
    """A factorisation bound to the state of one problem: knows ``n``, ``d`` and the structure of ``u``."""

    factorisation: AbstractFactorisation
    num_derivatives: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    unravel: Callable = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)

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
        return self.factorisation.unpack_std(safe_norm(factor, axis=-2), self.size)

    def project(self, jacobian: Float[Array, "m d"]) -> Float[Array, "*batch rows columns"]:
        """See ``AbstractFactorisation.project``."""
        return self.factorisation.project(jacobian)

    def lift(self, matrix: Float[Array, "n n"], scale: PyTree) -> Float[Array, "*batch dim dim"]:
        """See ``AbstractFactorisation.lift``; ``scale`` is a scalar or a PyTree like ``u``."""
        if jax.tree.structure(scale) == jax.tree.structure(0) and jnp.ndim(scale) == 0:
            return self.factorisation.lift(matrix, jnp.asarray(scale, self.dtype), self.size)
        example = jax.eval_shape(self.unravel, jax.ShapeDtypeStruct((self.size,), self.dtype))
        if jax.tree.map(jnp.shape, scale) != jax.tree.map(jnp.shape, example):
            raise ValueError(
                "output_scale must be a scalar, or have the structure and shapes of u: "
                f"expected {jax.tree.map(jnp.shape, example)}, got {jax.tree.map(jnp.shape, scale)}."
            )
        return self.factorisation.lift(matrix, self.ravel(scale), self.size)

    def broadcast(self, matrix: Float[Array, "p q"]) -> Float[Array, "*batch p q"]:
        """The same matrix for every batch element."""
        return jnp.broadcast_to(matrix, self.batch_shape + matrix.shape)

    def identity(self) -> Float[Array, "*batch m m"]:
        """The identity over the components of one derivative."""
        return self.lift(jnp.ones((1, 1), self.dtype), 1.0)


def layout_of(example: PyTree, num_derivatives: int, factorisation: AbstractFactorisation) -> Layout:
    """The layout of states like the example."""
    flat, unravel = ravel_pytree(example)
    return Layout(factorisation, num_derivatives, flat.size, unravel, jnp.dtype(flat.dtype))
