"""A covariance of independent pairs of directions, those of the Jacobian's real Schur form."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from .blocks import PAIRS
from .coupling import AbstractAdaptiveFactorisation, Coupling
from .linalg import safe_norm


# By how much the Jacobian may turn the directions before they are taken anew, as the tangent of an angle. On a
# Brusselator with 64 components 0.1 takes 2 to 9 Schur forms for 46 to 172 steps; with 0.3 errors are five times as
# large, with 0.03 nothing improves.
_TURN = 0.1


class Modal(AbstractAdaptiveFactorisation):
    """A covariance of independent pairs of directions: those of the real Schur form of the Jacobian.

    For stiff problems with ten to some hundred components, where ``Dense`` takes ``O(n^3 d^3)`` in a step and this
    ``O(d^3)``. The mean is conditioned on the equation with its whole Jacobian. In the Schur form the eigenvalues stand
    on the diagonal, so that every direction is damped as in a solve of its own, and those of a complex pair of
    eigenvalues are kept together. Between pairs correlations are dropped after every step. The directions are taken
    anew where the Jacobian has turned them.

    It equals ``Dense`` where the Jacobian is constant and normal, as symmetric ones are, and for two components. In
    other problems the covariance is an approximation. On a Brusselator with 64 components and on HIRES, at tolerances
    from 1e-3 to 1e-6, errors squared over variances, averaged over the components at the end, were between 0.0005 and
    2 with ``IWP(5)`` (``Dense``: 0.0007 and 0.02 on HIRES), and up to 16 with ``IWP(4)``.

    It works with ``TS1`` and ``SLR1`` of an ``ODE`` of any order (the directions are those of the derivative with
    respect to ``u``), priors with one output scale for all components, and all strategies. A ``FixedPointSmoother``
    keeps all steps under it. It does not work with data, an uncertain ``u0``, ``stop_at``, lifted equations and
    leave-one-out residuals. The factor of an ``InitialState`` is that of neighbouring pairs of components. Gradients
    take the directions as constant. Under ``jax.vmap`` of a solve every step of every lane computes a Schur form;
    ``solve_ensemble`` does not. JAX has Schur forms on CPUs only: elsewhere use ``Dense`` or ``Subspace``.

    - ``basis``, ``order``: not to be passed. In the layout of a state they are its directions, as columns, and their
      order in the Schur form.

    Raises ``ValueError``, as ``Solver`` is made or in the first step, for parts with which it does not work.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(5), probode.TS1(probode.ODE(lambda t, u, args: -(u**3))),
    ...                         factorisation=probode.Modal())
    >>> solver.solve(jnp.ones(4), 0.0, 1.0).mean.shape
    (1, 4)
    """

    basis: Any = None
    order: Any = None

    def __init__(self, basis: Float[Array, "*lanes d d"] | None = None, order: Float[Array, "*lanes d"] | None = None):
        self.basis, self.order = basis, order

    def __repr__(self) -> str:
        return "Modal()"

    @property  # type: ignore[misc]  # an abstract variable may be a property
    def lanes(self) -> int:  # type: ignore[override]
        """The number of leading axes of the basis: for times, and for a batch of solutions."""
        return 0 if self.basis is None else self.basis.ndim - 2

    def fit(self, u: PyTree) -> "Modal":
        if self.basis is not None:
            raise ValueError("Modal() finds its directions by itself: pass no basis, or use Subspace(basis).")
        flat = jax.eval_shape(lambda u: ravel_pytree(u)[0], u)
        return Modal(jnp.eye(flat.size, dtype=flat.dtype), jnp.arange(flat.size).astype(flat.dtype))

    def batch_shape(self, d: int) -> tuple[int, ...]:
        return PAIRS.batch_shape(d)

    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        return PAIRS.pack(derivatives @ self.basis)

    def unpack(self, mean: Float[Array, "*batch rows cols"], d: int) -> Float[Array, "m d"]:
        return PAIRS.unpack(mean, d) @ self.basis.T

    def unpack_std(self, std: Float[Array, "*batch rows"], d: int) -> Float[Array, "m d"]:
        raise ValueError("Modal() needs all rows of a factor for a standard deviation: use Layout.std.")

    def std(self, factor: Float[Array, "*batch rows dim"]) -> Float[Array, "m d"]:
        (d, _), (blocks, rows, dim) = self.basis.shape, factor.shape
        groups = PAIRS.groups(d)
        parts = jnp.reshape(factor, (blocks, rows, dim // groups.size, groups.size))
        basis = jnp.reshape(groups.fill(self.basis), (d, blocks, groups.size))
        # One by one, so that XLA drops the derivatives of which nothing is used.
        stds = [safe_norm(parts[:, :, i] @ jnp.moveaxis(basis, 0, 2), axis=(0, 1)) for i in range(parts.shape[2])]
        return jnp.stack(stds)

    def lift(self, matrix: Float[Array, "n n"], scale: Float[Array, "..."], d: int) -> Float[Array, "*batch dim dim"]:
        if jnp.ndim(scale) > 0:
            raise ValueError(
                "Modal() has one output scale for all components, but the prior's output_scale has one for each. "
                "Pass a scalar output_scale, or use Dense()."
            )
        return PAIRS.lift(matrix, scale, d)

    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        return PAIRS.project(self._in_basis(jacobian))

    def couple(self, jacobians: Sequence[Float[Array, "d d"]]) -> Coupling:
        return PAIRS.couple([self._in_basis(jacobian) for jacobian in jacobians])

    def _in_basis(self, jacobian):
        return self.basis.T @ jacobian @ self.basis

    def turn_to(self, other: AbstractAdaptiveFactorisation) -> Float[Array, "d d"]:
        assert isinstance(other, Modal)
        return self.basis.T @ other.basis

    def check(self, prior: Any, constraint: Any, strategy: Any, calibration: Any, error: Any) -> None:
        if not constraint.first_order or not constraint.problem.is_explicit or constraint.problem.num_rows > 1:
            raise ValueError(
                "Modal() takes its directions from the Jacobian of an explicit equation: use TS1(ODE(f)), or another "
                "factorisation."
            )
        if jax.default_backend() != "cpu":
            raise ValueError("Modal() needs Schur forms, which JAX computes on CPUs only: use Dense() or Subspace().")

    def adapt(
        self, coupling: Coupling, dt: Float[Array, ""] | None
    ) -> tuple["Modal", Float[Array, "d d"], Bool[Array, ""]]:
        jacobian = lax.stop_gradient(-coupling.from_columns(coupling.matrix[..., : coupling.size]))
        eye = jnp.eye(len(jacobian), dtype=jacobian.dtype)
        # At the start it need not be finite, as where the field has a square root of zero.
        turns = jnp.all(jnp.isfinite(jacobian)) if dt is None else _have_turned(jacobian, self.order, dt)
        turn, order = lax.cond(turns, schur_directions, lambda _: (eye, self.order), jacobian)
        return Modal(self.basis @ turn, order), turn, turns


def _have_turned(jacobian, order, dt):
    """Whether max ``|J_ij| / (|J_ii| + |J_jj| + 1 / |dt|)`` below the diagonal blocks of ``J`` exceeds ``_TURN``."""
    size = jnp.abs(jnp.diagonal(jacobian)) + 0.5 / jnp.abs(dt)
    below = order[:, None] > order[None]
    return jnp.max(jnp.where(below, jnp.abs(jacobian) / (size[:, None] + size[None]), 0)) > _TURN


def schur_directions(matrix: Float[Array, "d d"]) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
    """Orthonormal directions in which a matrix is triangular but for blocks of two; and the order of these directions.

    The two of each complex pair of eigenvalues come first, side by side; of real eigenvalues any two may stand
    together. With the directions as the columns of ``B``, ``(B^T M B)[i, j] = 0`` wherever ``order[i] > order[j]``; the
    two of a complex pair share a number. For a finite matrix ``M``.
    """
    triangle, directions = jax.scipy.linalg.schur(matrix)
    below = jnp.diagonal(triangle, -1) != 0
    second = jnp.append(False, below)
    columns = jnp.argsort(~(jnp.append(below, False) | second), stable=True)
    order = jnp.arange(len(matrix)) - second.astype(int)
    return directions[:, columns], order[columns].astype(matrix.dtype)
