"""A covariance for large stiff problems: full on a subspace of the components, one shared block on its complement.

The mean is conditioned by a Krylov solve with the whole Jacobian, which needs products with it alone: there is no
``(d, d)`` array. The covariance on the complement is an upper bound, for all Jacobians there whose numerical range lies
left of the smallest Ritz value on the subspace.

Axes: ``d`` components, ``r`` directions of the basis ``W``, ``n`` derivatives. With ``a = W^T x`` and ``c`` any
direction of the complement, the mean is ``(n, d)`` and the factor has the ``r + 1`` columns ``(a, c)`` for each
derivative; no row has entries in both.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..algebra.conditioning import Influence, Update, condition, join
from ..algebra.innovation import Innovation, innovate, posterior_noise
from ..algebra.linalg import safe_divide, safe_norm, safe_sqrt, triangularise
from ..algebra.linearisation import Linearisation
from ..algebra.normal import Normal, pad
from ..algebra.transition import Transition
from ..equations.jacobians import ExactJacobian
from ..equations.problems import ODE, flat_field
from ..estimation.calibration import AbstractCalibration, AbstractLeaveOneOut
from ..estimation.strategies import AbstractStrategy
from ..information.constraints import TS1, AbstractConstraint
from ..priors.iwp import IWP
from ..priors.prior import AbstractPrior, AbstractPriorFamily
from ..stepping.attempt import Attempt
from ..stepping.error_estimates import AbstractErrorEstimate, StateError
from ..stepping.own_algebra import AbstractOwnAlgebra
from ..stepping.residuals import without_round_off
from ..stepping.step import Step
from ..util.checks import as_float, as_integer, as_scalar, is_traced, require
from .krylov import linearised, solve_innovation


class Subspace(AbstractOwnAlgebra):
    """The full covariance on the span of ``basis``, and one ``(n, n)`` block for all directions of its complement.

    For stiff problems too large for ``Dense()``: ``Solver(IWP(nu), TS1(ODE(f)), factorisation=Subspace(basis))``. A
    step takes ``r`` products with the Jacobian, ``r`` with its transpose, and those of two Krylov solves; memory is
    ``O(d r)``.

    - ``basis``: ``(d, r)`` over the ravelled ``u``, of full rank, orthonormalised here. It should span the slow
      directions, whose eigenvalues lie furthest to the right: the modes of a diffusion, or ``rightmost_basis``.
    - ``norm``: a bound of the Jacobian's norm along the solution, in units of one over time. Without it the covariance
      assumes no more of the complement than that it decays at least as fast as the fastest direction of the subspace;
      where steps resolve the complement, the uncertainty is then larger than necessary.
    - ``tol``: a Krylov solve ends when the whitened residual has shrunk to this fraction. Derivatives of a solution are
      accurate to ``tol``.
    - ``max_krylov``: the largest number of iterations of a Krylov solve. If it has not converged by then the step is
      rejected; on a grid, and in derivatives, the result is NaN.
    - ``preconditioner``: a function of three numbers; ``preconditioner(p11, p01, p00)`` returns a linear function of a
      vector ``(d,)``, symmetric and positive definite, near ``v -> (p11 I - p01 (J + J^T) + p00 J J^T)^-1 v``.

    The mean is conditioned exactly, up to ``tol``, on the equation with its whole Jacobian, under the covariance used.
    With ``r = d`` that covariance is the one of ``Dense()``; otherwise it is an approximation:

    - On the complement it is an upper bound for every Jacobian whose numerical range lies left of the smallest Ritz
      value of the basis, which is not checked.
    - The coupling from the complement into the subspace enters there as independent noise.
    - The subspace has an output scale of its own, no smaller than that of all components. ``Solution.output_scale``
      reports it, and the prediction between steps uses it.

    So standard deviations can be below those of ``Dense()``. Errors squared over variances, averaged over the
    components, stayed below 2 in adaptive solves of diffusion, FitzHugh-Nagumo and Burgers' equations with 60
    components and a rank of 10.

    It works with ``IWP`` with a scalar output scale, ``TS1`` of an ``ODE`` of order one with its exact Jacobian and one
    evaluation, ``Filter``, ``StateError`` (the default here) and calibrations without leave-one-out residuals, memory
    and ``relinearise``; without data, uncertain ``u0`` and ``stop_at``. The log likelihood is NaN.

    Raises ``ValueError`` for a basis that is not finite or not of full rank, for a ``norm`` or ``tol`` that is not
    finite and positive, a ``max_krylov`` below 1, and, as ``Solver`` is made, for other parts; ``TypeError`` for a
    preconditioner that cannot be called.

    >>> import jax.numpy as jnp, probode
    >>> probode.Subspace(jnp.eye(100, 5)).basis.shape
    (100, 5)
    """

    basis: Float[Array | np.ndarray, "d r"]
    norm: Float[Array, ""] | None
    tol: Float[Array, ""]
    max_krylov: int = eqx.field(static=True)
    preconditioner: Callable | None

    def __init__(
        self,
        basis: Any,
        *,
        norm: Any = None,
        tol: Any = 1e-3,
        max_krylov: int = 1000,
        preconditioner: Callable | None = None,
    ):
        self.basis = _orthonormal(basis)
        self.norm = None if norm is None else jnp.asarray(_positive(norm, "norm"))
        self.tol = jnp.asarray(_positive(tol, "tol"))
        self.max_krylov = as_integer(max_krylov, "Subspace(max_krylov)", 1)
        if not (preconditioner is None or callable(preconditioner)):
            raise TypeError(
                f"Subspace(preconditioner) must be a function of (p11, p01, p00) that returns a function, "
                f"got {preconditioner!r}."
            )
        plain = preconditioner is None or isinstance(preconditioner, eqx.Module)
        self.preconditioner = preconditioner if plain else jax.tree_util.Partial(preconditioner)

    @property
    def rank(self) -> int:
        """The number of columns of the basis: the dimension of the subspace."""
        return self.basis.shape[-1]

    @property  # type: ignore[misc]  # an abstract variable may be a property
    def lanes(self) -> int:  # type: ignore[override]
        """The number of leading axes of the basis in a batch of solutions; 0 in a single one."""
        return self.basis.ndim - 2

    def batch_shape(self, d: int) -> tuple[int, ...]:
        return ()

    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        if derivatives.shape[1] != self.basis.shape[-2]:
            raise ValueError(
                f"Subspace(basis) has {self.basis.shape[-2]} rows, but u has {derivatives.shape[1]} components."
            )
        return derivatives

    def unpack(self, mean: Float[Array, "*batch rows cols"], d: int) -> Float[Array, "m d"]:
        return mean

    def unpack_std(self, std: Float[Array, "*batch rows"], d: int) -> Float[Array, "m d"]:
        raise ValueError("Subspace() needs all rows of a factor for a standard deviation: use Layout.std.")

    def lift(self, matrix: Float[Array, "n n"], scale: Float[Array, "..."], d: int) -> Float[Array, "*batch dim dim"]:
        if jnp.ndim(scale) > 0:
            raise ValueError(
                "Subspace() has one output scale for all components: pass a scalar output_scale, or use Dense()."
            )
        return scale * jnp.kron(matrix, jnp.eye(self.rank + 1, dtype=matrix.dtype))

    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        raise ValueError("Subspace() never holds a Jacobian: start from TaylorMode() or Diffuse().")

    def check(
        self,
        prior: AbstractPrior | AbstractPriorFamily,
        constraint: AbstractConstraint,
        strategy: AbstractStrategy,
        calibration: AbstractCalibration,
        error: AbstractErrorEstimate,
    ) -> None:
        """Nothing; raises ``ValueError`` for parts of a solver with which this factorisation has no formulas."""

        def need(condition, part, words):
            if not condition:
                raise ValueError(
                    f"Subspace() does not work with {type(part).__name__}() here: {words}, or use Dense()."
                )

        need(isinstance(prior, IWP), prior, "use the prior IWP(num_derivatives)")
        need(isinstance(constraint, TS1), constraint, "use the constraint TS1(ODE(f))")
        need(constraint.evaluations == 1, constraint, "it conditions once in a step, so use evaluations=1")
        need(isinstance(constraint.problem, ODE), constraint.problem, "the equation must be an ODE")
        need(constraint.order == 1, constraint.problem, "write the equation as one of order one")
        ode: Any = constraint.problem
        need(
            isinstance(ode.jacobian, ExactJacobian),
            ode.jacobian,
            "it takes exact products by itself, so leave jacobian out",
        )
        need(not strategy.smooths, strategy, "it cannot smooth, so use strategy=Filter()")
        plain = not (isinstance(calibration, AbstractLeaveOneOut) or calibration.relinearise or calibration.remembers)
        need(plain, calibration, "use DynamicCalibration(), MLECalibration() or NoCalibration()")
        need(isinstance(error, StateError), error, "use error=StateError()")

    def std(self, factor: Float[Array, "rows dim"]) -> Float[Array, "m d"]:
        """Standard deviations of all components, derivative by derivative."""
        r, basis = self.rank, jnp.asarray(self.basis, factor.dtype)
        outside = safe_sqrt(1 - jnp.sum(basis**2, axis=1))  # the length of each unit vector's part in the complement
        outside = outside if r < basis.shape[0] else jnp.zeros_like(outside)
        blocks = jnp.moveaxis(jnp.reshape(factor, (factor.shape[0], -1, r + 1)), 1, 0)
        # One by one, so that XLA drops the derivatives of which nothing is used.
        stds = [safe_norm(jnp.concatenate([x[:, :r] @ basis.T, x[:, r:] * outside[None]]), axis=0) for x in blocks]
        return jnp.stack(stds)

    def start(self, x: Normal) -> Normal:
        """The first state, with as many rows and columns as all that follow."""
        dim = x.mean.shape[0] * (self.rank + 1)
        return pad(Normal(x.mean, jnp.reshape(x.factor, (-1, dim))), dim)

    def attempt(
        self,
        step: Step,
        predicted: Normal,
        t: Float[Array, ""],
        transition: Transition,
    ) -> Attempt:
        """The attempt of a step to the time ``t``, with the posterior given the equation in its ``update``.

        ``predicted``: the predicted mean ``(n, d)`` and factor, without the noise of the step. ``transition``: that of
        the prior over the step.
        """
        layout, mean = step.layout, predicted.mean
        n, d, r = layout.num_derivatives + 1, layout.size, self.rank
        field = flat_field(step.constraint.problem, layout, step.args)
        at = linearised(lambda u: field(t, u[None]), mean[0], jnp.asarray(self.basis, mean.dtype))
        of_complement = jnp.stack([-at.slope, jnp.ones_like(at.slope)])[None]
        equation = without_round_off(Linearisation(of_complement, (mean[1] - at.value)[None], range(1, 2)), mean)
        z = equation.residual[0]
        solve = ft.partial(
            solve_innovation,
            preconditioner=self.preconditioner,
            tol=self.tol.astype(z.dtype),
            max_krylov=self.max_krylov,
        )

        # Local scales under the noise of the step alone: ``overall``, of all components, and ``own``, of the subspace.
        # Smooth residuals lie in the subspace, where their average over all ``d`` components is too small a scale.
        qc = transition.noise[:: r + 1, :: r + 1]
        qa = jnp.kron(qc, jnp.eye(r, dtype=qc.dtype))
        y, explained = solve(at, z, qa, qc)
        overall = safe_sqrt(jnp.vdot(z, y) / d)
        of_subspace = Linearisation(jnp.concatenate([-at.inner, jnp.eye(r, dtype=z.dtype)], 1), (z @ at.basis)[:, None])
        own = jnp.maximum(overall, innovate(of_subspace, qa, transition.magnitude).scale)
        innovation = Innovation(jnp.ones((1, 1), z.dtype), own[None, None], own, transition.magnitude)
        statistics = step.calibration.init((), z.dtype)  # ``check`` refuses calibrations whose scale depends on them
        scale_a = step.calibration.scale(innovation, statistics)
        scale_c = step.calibration.scale(dataclasses.replace(innovation, scale=overall), statistics)

        # The posterior mean, under the predicted covariance with the noise of the step.
        blocks = jnp.reshape(predicted.factor, (-1, n, r + 1))
        fa, fc = jnp.reshape(blocks[:, :, :r], (-1, n * r)), blocks[:, :, r]
        y, shift = solve(at, z, jnp.concatenate([fa, scale_a * qa]), jnp.concatenate([fc, scale_c * qc]))
        whitened = safe_sqrt(jnp.vdot(z, y) / d)[None, None]

        # The posterior covariance (``new_a``, ``new_c``), and for the error estimate that of ``u`` under the noise of
        # the step alone (``left``).
        root = triangularise(None, at.coupling)
        root = root if r < d else jnp.zeros_like(root)
        new_c = _left_of(triangularise(scale_c * qc, fc), at.slope, self.norm)
        new_a = _given_subspace(fa, scale_a * qa, at.inner, jnp.abs(new_c[0, 0]) * root)
        left_c = _left_of(safe_divide(overall, own) * qc, at.slope, self.norm)
        augmented, noise = _augmented(at.inner, qa, jnp.abs(left_c[0, 0]) * root)
        left_a = posterior_noise(augmented, noise, r)
        left = jnp.pad(left_a, ((0, 1), (0, 1))).at[-1, -1].set(left_c[0, 0])

        # A Krylov solve that has not converged is NaN. The scale is then infinite, so that the step is rejected.
        state = Normal(mean - shift, _together(new_a, new_c, n))
        nothing, unknown = jnp.zeros((1, 0), z.dtype), jnp.full_like(own, jnp.nan)
        influence = Influence(whitened, nothing, nothing, jnp.ones_like(own))
        update = Update(state, None, influence, unknown, log_det=unknown, rank=jnp.ones_like(own))
        equation = dataclasses.replace(equation, left=left)
        innovation = dataclasses.replace(innovation, scale=jnp.where(jnp.isfinite(whitened[0, 0]), own, jnp.inf))
        return Attempt(transition, mean, equation, innovation, None, update=update, unexplained=shift - explained)


def _left_of(root, slope, norm):
    """Right square root of the complement's covariance given ``c' = j c`` with bounds of ``j``.

    ``root``: upper triangular square root of the covariance ``P`` before. The ``j`` are in the numerical range of the
    complement's Jacobian, which lies left of ``slope``, and if there is a norm in the disc with the diameter ``[-norm,
    slope]``. So there is a quadratic form ``N`` that is not positive on the pairs ``(c, c')`` that are possible, and
    ``(P^-1 + tau N)^-1`` is an upper bound of the covariance for every ``tau >= 0`` (S-procedure); this is the one with
    the smallest determinant. ``N`` acts on ``(c, c')`` alone, of which the root is ``[[f, g], [0, h]]``: a reverse
    Cholesky decomposition of a 2 x 2 matrix.
    """
    f, h = root[0, 0], root[1, 1]
    q = safe_divide(root[0, 1] - slope * f, h)
    # Half of h / (f radius): zero for the half-plane.
    k: Array | int = 0
    if norm is not None:
        norm = norm.astype(root.dtype)
        k = safe_divide(h, f * jnp.maximum(norm + slope, 1e-3 * norm))
    w = jnp.maximum(q + k * (1 + q**2), 0)
    u = jnp.sqrt(1 + 2 * w * k)
    second = root[1] / u
    first = (root[0] - w * (1 + 2 * k * q) / u * second) * u / jnp.sqrt(1 + w**2)
    return jnp.concatenate([jnp.stack([first, second]), root[2:]])


def _augmented(inner, noise, extra):
    """The subspace's equation ``a_1 - Jaa a_0 + e = 0``, and the square root ``noise`` over ``(a_0, e, a_1, ...)``.

    ``inner``: ``Jaa``. ``extra``: right square root of the covariance of ``e``. The equation gives ``a_1``; so a
    covariance of ``e`` that is singular, or zero, does not make that of the other columns singular.
    """
    r = inner.shape[0]
    eye, zeros = jnp.eye(r, dtype=noise.dtype), jnp.zeros((noise.shape[0], r), noise.dtype)
    wide = jnp.concatenate([noise[:, :r], zeros, noise[:, r:]], axis=1)
    middle = jnp.pad(extra, ((0, 0), (r, noise.shape[1] - r)))
    equation = Linearisation(jnp.concatenate([-inner, eye, eye], axis=1), jnp.zeros((r, 1), noise.dtype), range(2, 3))
    return equation, jnp.concatenate([wide[:r], middle, wide[r:]])


def _given_subspace(factor, noise, inner, extra):
    """Right square root of the subspace's covariance after prediction and update; ``extra`` as in ``_augmented``."""
    r, dim = inner.shape[0], noise.shape[0]
    equation, noise = _augmented(inner, noise, extra)
    factor = jnp.concatenate([factor[:, :r], jnp.zeros_like(factor[:, :r]), factor[:, r:]], axis=1)
    x = Normal(jnp.zeros((dim + r, 1), noise.dtype), factor)
    new = condition(join(x, noise, jnp.ones((), noise.dtype), equation), x, equation).state.factor[:dim]
    return jnp.concatenate([new[:, :r], new[:, 2 * r :]], axis=1)


def _together(fa, fc, n):
    """The square roots of subspace and complement as one factor, ``(rows, n (r + 1))``."""
    fa = jnp.pad(jnp.reshape(fa, (fa.shape[0], n, -1)), ((0, 0), (0, 0), (0, 1)))
    fc = jnp.pad(fc[:, :, None], ((0, 0), (0, 0), (fa.shape[2] - 1, 0)))
    return jnp.reshape(jnp.concatenate([fa, fc]), (fa.shape[0] + fc.shape[0], -1))


def _positive(x, name):
    x = as_scalar(x, f"Subspace({name})")
    return require(x, (x > 0) & (x < np.inf), f"Subspace({name}) must be finite and positive", **{name: x})


def _orthonormal(basis):
    basis = as_float(basis, "Subspace(basis)")
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(f"Subspace(basis) must be of shape (d, r) with 1 <= r <= d, got shape {basis.shape}.")
    basis = require(basis, abs(basis) < np.inf, "Subspace(basis) must be finite")
    q, triangle = (jnp if is_traced(basis) else np).linalg.qr(basis)
    pivots, sizes = abs(triangle.diagonal()), (triangle**2).sum(0) ** 0.5
    full = (pivots > 100 * np.finfo(basis.dtype).eps * sizes) & (sizes > 0)
    return require(q, full, "Subspace(basis) must have linearly independent columns")
