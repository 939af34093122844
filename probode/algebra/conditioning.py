"""The algebra of a step in square-root form: predict a Gaussian state, and condition it on a linearised equation."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from .coordinates import Conditional, updated_noise
from .factorisations import Layout
from .linalg import eliminate, product, root_mean_square, safe_norm, substitute, triangularise
from .normal import Normal, batched, pad, pad_rows


class Transition(eqx.Module):
    """The Gaussian distribution of the state after a time step given the state before it, as a prior returns it.

    ``x(t + dt) | x(t) ~ N(A x(t), magnitude^2 noise^T noise)`` in the layout of the factorisation:

    - ``matrix``: ``A``, ``(*batch, p, p)``. If it is smaller than the state it stands for ``kron(A, I)``, the same for
      all components.
    - ``noise``: upper triangular right square root of the covariance of the process noise, ``(*batch, dim, dim)``, with
      the prior's own output scale; a calibrated scale multiplies it.
    - ``magnitude``: a scalar factor on ``noise``, for a power of ``dt`` with which the entries of ``noise`` would
      under- or overflow. The solvers compute with the product of calibrated scale and ``magnitude``, which may be
      representable where the scale is not. Use one for steps of ordinary length.

    >>> import jax.numpy as jnp, probode
    >>> state = probode.Solver(probode.IWP(2), probode.TS0(probode.ODE(lambda t, u, args: -u))).init(1.0, 0.0)
    >>> probode.IWP(2).transition(jnp.array(0.5), state.layout).matrix  # a Taylor polynomial
    Array([[1.   , 0.5  , 0.125],
           [0.   , 1.   , 0.5  ],
           [0.   , 0.   , 1.   ]], dtype=float64)
    """

    matrix: Float[Array, "*batch p p"]
    noise: Float[Array, "*batch dim dim"]
    magnitude: Float[Array, ""]


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
      ``(rows, k)``; only from factorisations with an algebra of their own, otherwise ``None``.
    - ``whole``: whether ``matrix`` is the whole derivative of ``z``, so that the error of the linearisation is of
      second order. It is false where the vector field is taken as constant (``TS0``), or where only the diagonal of its
      Jacobian is kept.
    - ``is_frozen``: whether ``matrix`` is known to be the identity on the derivatives given, and zero elsewhere.

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
    left: Float[Array, "more k"] | None = None
    whole: bool = eqx.field(static=True, default=True)
    is_frozen: bool = eqx.field(static=True, default=False)

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
        return Linearisation.lifted(layout, level, residual[None], whole=whole)

    @staticmethod
    def lifted(
        layout: Layout,
        jacobians: Sequence[Float[Array, "levels *jacobian"] | None],
        residual: Float[Array, "levels d"],
        *,
        whole: bool = True,
    ) -> "Linearisation":
        """The linearisation of ``u^(k) - f = 0`` with ``k = len(jacobians)`` and of its time derivatives.

        ``jacobians``: the derivative of ``f`` with respect to each of ``u, ..., u^(k-1)`` as for ``explicit``, with its
        time derivatives along the solution in front: ``(levels, d, d)`` or ``(levels, d)``. By Leibniz' rule that of
        ``d^j f / dt^j`` with respect to ``u^(i)`` is made of these. ``residual``: ``u^(k+j) - d^j f / dt^j`` at the
        point, a row for each ``j``.
        """
        k, levels = len(jacobians), residual.shape[0]
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

    @property
    def is_coupled(self) -> bool:
        """Whether it gives several derivatives, each in terms of the lower ones."""
        return self.gives is not None and len(self.gives) > 1 and not self.is_frozen

    def solve_for_given(self, z: Float[Array, "m cols"]) -> Float[Array, "m cols"]:
        """``T^-1 z``, where the columns of the derivatives given are ``T``: lower triangular, with a unit diagonal."""
        if not self.is_coupled:
            return z
        triangle = self.matrix[:, self.matrix.shape[1] - self.matrix.shape[0] :]
        return jax.scipy.linalg.solve_triangular(triangle, z, lower=True, unit_diagonal=True)

    @staticmethod
    def general(
        layout: Layout, jacobians: Sequence[Array], residual: Float[Array, " m"], *, whole: bool = True
    ) -> "Linearisation":
        """The linearisation of ``r(t, u, ..., u^(k)) = 0`` with ``k = len(jacobians) - 1``.

        ``jacobians``: the derivative of ``r`` with respect to each of ``u, ..., u^(k)``, of shape ``(m, d)``.
        ``residual``: ``r`` at the point, ``(m,)``. ``whole``: as for ``explicit``. Raises ``ValueError`` for
        ``m != d`` under ``BlockDiagonal()`` and ``Isotropic()``.
        """
        matrix = jnp.concatenate([layout.project(jacobian) for jacobian in jacobians], axis=-1)
        return Linearisation(matrix, layout.pack(residual[None]), whole=whole and layout.keeps_all)


class Innovation(eqx.Module):
    """The residual ``z`` of a step's prediction, and its covariance under the process noise of that step alone.

    Calibrations and error estimates receive it. The covariance is ``S = H Q H^T`` with ``Q = noise^T noise`` of the
    ``Transition``, without its ``magnitude``. So output scales are given here times ``magnitude``:

    - ``factor``: upper triangular right square root of ``S``, ``(*batch, m, m)``.
    - ``whitened``: ``S^(-1/2) z``, ``(*batch, m, cols)``.
    - ``scale``: the root mean square of ``whitened``, ``(*batch,)``: the local quasi-maximum-likelihood estimate of the
      output scale (Schober, Sarkka, Hennig 2019, "A probabilistic model for the numerical solution of initial value
      problems"). Infinite for a residual in a direction without noise. A step raises it to what explains round-off in
      the residual, and, where the residual is zero, to what explains that inside the step.
    - ``unit``: ``magnitude``, which is the prior's own output scale here, ``(*batch,)``.
    - ``inside``, ``remainder``: residuals of the corrected mean, at a time inside the step and at its end, whitened in
      the same way, ``(*batch, m, cols)``; ``None`` unless the error estimate needs them (``needs_defects``).

    >>> import probode
    >>> innovation = probode.testing.example_attempt().innovation
    >>> probode.NoCalibration().scale(innovation, None) == innovation.unit
    Array(True, dtype=bool)
    """

    factor: Float[Array, "*batch m m"]
    whitened: Float[Array, "*batch m cols"]
    scale: Float[Array, "*batch"]
    unit: Float[Array, "*batch"]
    inside: Float[Array, "*batch m cols"] | None = None
    remainder: Float[Array, "*batch m cols"] | None = None

    @property
    def is_zero(self) -> Bool[Array, "*batch"]:
        """A flag for each batch element: true where the residual is zero, as steps set it if it is round-off."""
        return jnp.all(self.whitened == 0, axis=(-2, -1))

    @property
    def size_inside(self) -> Float[Array, "*batch"]:
        """Root mean square of ``inside``."""
        assert self.inside is not None
        return root_mean_square(self.inside, axis=(-2, -1))


@batched
def innovate(equation: Linearisation, noise: Float[Array, "dim dim"], unit: Float[Array, ""]) -> Innovation:
    """The residual and its covariance ``H Q H^T``, ``Q = noise^T noise``, by one triangularisation of ``m`` columns.

    ``unit``: the ``magnitude`` of the transition that the noise is from.
    """
    factor = triangularise(*_observed(equation, noise))
    whitened = substitute(factor, equation.residual)
    scale = root_mean_square(whitened)
    unexplained = jnp.any((jnp.diagonal(factor)[:, None] == 0) & (equation.residual != 0))
    return Innovation(factor, whitened, jnp.where(unexplained, jnp.inf, scale), unit)


@batched
def smoothing_weights(
    equation: Linearisation, factor: Float[Array, "m m"], whitened: Float[Array, "m cols"]
) -> Float[Array, "p cols"]:
    """``H^T (H Q H^T)^-1 z`` from the whitened residual, times the largest entry of the factor of ``H Q H^T``.

    Without that entry, ``Q`` times it is the mean of the noise given the residual (the adjoint variable of the
    disturbance smoother: de Jong 1989, "Smoothing and interpolation with the state-space model"). With it the result
    stays representable in single precision, where the inverse of a covariance may overflow and the inverse of its
    square root does not.
    """
    factor = factor / _largest(factor)
    # ``substitute`` solves with the transpose; that of ``factor`` is upper triangular in reverse order of its indices.
    solution = substitute(factor[::-1, ::-1].T, whitened[::-1])[::-1]
    if equation.is_frozen:
        return jnp.pad(solution, ((equation.matrix.shape[1] - solution.shape[0], 0), (0, 0)))
    return product(equation.matrix.T, solution)


@batched
def noise_mean(
    noise: Float[Array, "dim dim"],
    later: Float[Array, "dim dim"],
    factor: Float[Array, "m m"],
    weights: Float[Array, "p cols"],
) -> Float[Array, "dim cols"]:
    """``noise^T later H^T (H Q H^T)^-1 z``: the mean of a noise given a residual, from its ``smoothing_weights``.

    ``noise``: a right square root of the covariance of the noise. ``later``: ``noise A^T``, where ``A`` is the
    transition from the time of the noise to that of the residual. ``factor``: of ``H Q H^T``, as for the weights.
    """
    p = weights.shape[0]
    # Only the ``p`` columns in the equation, and in this order: in single precision the columns of high derivatives,
    # and the covariance ``noise^T later``, may not be representable.
    return product(noise.T, product(later[:, :p] / _largest(factor), weights))


def explained(
    transition: Transition, equation: Linearisation, factor: Float[Array, "*batch m m"], whitened: Array
) -> Float[Array, "*batch dim cols"]:
    """``Q H^T (H Q H^T)^-1 z``: the mean of the noise of a step given the residual at its end, which is whitened."""
    return noise_mean(transition.noise, transition.noise, factor, smoothing_weights(equation, factor, whitened))


def explained_by_leading(
    transition: Transition, equation: Linearisation, factor: Float[Array, "*batch m m"], whitened: Array, rows: int
) -> Float[Array, "*batch dim cols"]:
    """What ``explained`` returns if the equation has its rows before ``rows`` alone."""
    leading = Linearisation(equation.matrix[..., :rows, :], equation.residual[..., :rows, :])
    return explained(transition, leading, factor[..., :rows, :rows], whitened[..., :rows, :])


def _largest(factor):
    size = jnp.max(jnp.abs(factor), initial=0)
    return jnp.where(size > 0, size, 1)


def _observed(equation, noise, columns=0):
    """The rows ``[noise H^T, leading columns of noise]``, those that are upper triangular apart from the others.

    They are a square root of the joint covariance of ``z`` and of what the leading columns belong to.
    """
    m, p = equation.matrix.shape
    leading = noise[:p, :p]
    observed = jnp.concatenate([product(leading, equation.matrix.T), leading[:, :columns]], axis=1)
    if equation.gives is not None:
        # H ends with a unit triangle: the noise of those derivatives is upper triangular in the columns of z.
        return observed[p - m :], observed[: p - m]
    return jnp.zeros((m, m + columns), noise.dtype), observed


def posterior_noise(
    equation: Linearisation, noise: Float[Array, "*batch dim dim"], size: int
) -> Float[Array, "*batch rows {size}"]:
    """A square root of the covariance of the first ``size`` entries of ``x ~ N(0, noise^T noise)`` given the equation.

    For factorisations with an algebra of their own it is what they have computed, ``equation.left``.
    """
    if equation.left is not None:
        return equation.left

    @batched
    def given(equation, noise):
        _, left = eliminate(*_observed(equation, noise, columns=size))
        return left

    return given(equation, noise)


@batched
def predict(
    x: Normal, noise: Float[Array, "dim dim"], scale: Float[Array, ""], past: Conditional | None = None
) -> tuple[Normal, Conditional | None]:
    """The distribution of ``x`` plus independent noise ``N(0, scale^2 noise^T noise)``, with a triangular factor.

    ``noise``: upper triangular. ``past``: an earlier state given ``x``; it is returned given the new state.
    """
    upper, dense = _beside(scale * noise, x.factor, past)
    triangle, left = eliminate(upper, dense)
    dim = noise.shape[1]
    if past is not None:
        past = Conditional(past.shift, triangle[:, dim:], updated_noise(past, left))
    return Normal(x.mean, triangle[:, :dim]), past


class Influence(eqx.Module):
    """The effect of an equation on a state: innovation, gain and ``H``, whitened by the innovation covariance ``S``.

    ``whitened``: the innovation ``S^(-1/2) z``; ``gain``: the mean changes by ``-gain^T whitened``; ``matrix``:
    ``S^(-1/2) H``, for all rows of the state; ``weight``: one, or zero if the innovation must not enter statistics.
    """

    whitened: Float[Array, "*batch m cols"]
    gain: Float[Array, "*batch m dim"]
    matrix: Float[Array, "*batch m dim"]
    weight: Float[Array, "*batch"]


class Update(eqx.Module):
    """The result of conditioning a state on an equation, with ``S`` the covariance of the innovation ``z``.

    ``state``: the posterior; ``past``: an earlier state given it, or ``None``; ``influence``: the effect of the
    equation. ``log_det``: the logarithm of the determinant of ``S^(1/2)`` in the directions in which ``z`` has a
    variance, and ``rank``, how many these are: where there is no noise there is no density.
    """

    state: Normal
    past: Conditional | None
    influence: Influence
    log_det: Float[Array, "*batch"]
    rank: Float[Array, "*batch"]


class Joint(eqx.Module):
    """A square root of the joint covariance of an innovation, the predicted state, and an earlier state.

    Upper triangular in the columns of ``z``, of ``x'`` (the state without the entries that ``z`` replaces), and of
    ``w``, the earlier state's coordinates, if there is one::

               z        x'       w
        [ S^(1/2)     gain     ...  ]   triangle
        [    0     posterior   ...  ]
        [    0         0      noise ]   left

    Where the equation gives several derivatives in terms of each other, ``x'`` has sums of ``u, ..., u^(k+L)`` instead
    of these, and their own columns stand between ``x'`` and ``w``, of the posterior and of the gain alike.

    ``inverse``: the matrix from ``z`` to the entries that it replaces; ``None`` if they are derivatives that the
    equation gives explicitly. ``carried``: how many columns there are between ``x'`` and ``w``.
    """

    triangle: Float[Array, "*batch n width"]
    left: Float[Array, "*batch rows extra"]
    inverse: Float[Array, "*batch dim m"] | None
    carried: int = eqx.field(static=True, default=0)


@batched
def join(
    x: Normal,
    noise: Float[Array, "dim dim"],
    scale: Float[Array, ""],
    equation: Linearisation,
    past: Conditional | None = None,
) -> Joint:
    """The joint square root of ``z``, the predicted state and an earlier one, by the one elimination of a step.

    The predicted state is ``x`` plus noise with the square root ``scale * noise``. The columns of the stacked square
    root ``[x.factor; scale noise]`` are changed to ``(z, all other derivatives)``. Then it has full column rank if the
    noise has, and its triangle holds the innovation's factor, the cross-covariance and, in the trailing block, the
    posterior's factor. With the columns of ``past`` beside it, the same elimination conditions the earlier state. The
    residual is not needed.
    """
    h, noise, dim = equation.matrix, scale * noise, x.mean.shape[0]
    m, p = h.shape
    if equation.gives is None:
        inverse, kept = _replacement(equation, noise)

        def beside(factor):
            return jnp.concatenate([product(factor[:, :p], h.T), factor * kept], axis=1)

        upper, dense = _beside(jnp.zeros((m + dim, m + dim), noise.dtype), beside(x.factor), past, beside(noise))
        if equation.noise is not None:
            upper, dense = _beside(upper, dense, None, equation.noise)
        return Joint(*eliminate(upper, dense), inverse)

    k = p - m
    mix, carried = (_mixture(equation, noise), p) if equation.is_coupled else (None, 0)

    def change_columns(factor):
        leading = factor[:, :p]
        kept = leading[:, :k] if mix is None else product(leading, mix)
        return jnp.concatenate([product(leading, h.T), kept, factor[:, p:], leading[:, :carried]], axis=1)

    changed = change_columns(noise)
    # Noise of derivatives above those given does not enter z and stays triangular; that of derivatives below them is
    # dense in the columns of z, and would break the triangle.
    upper = jnp.concatenate([changed[k:p], jnp.zeros((k, dim + carried), noise.dtype), changed[p:]])
    upper, dense = _beside(upper, change_columns(x.factor), past, changed[:k])
    triangle, left = eliminate(upper, dense)
    return Joint(triangle, left[:, carried:], None, carried)


@batched
def condition(joint: Joint, x: Normal, equation: Linearisation, past: Conditional | None = None) -> Update:
    """The posterior distribution of a state given that a linearised equation holds, from their joint square root.

    ``x``: the prediction, of which the mean is used. The posterior's factor has ``dim - m`` rows, or ``dim`` if
    ``equation.gives`` is ``None``; zeros are appended where ``x.factor`` has more, so that loops keep their shapes.
    """
    triangle, dim, h = joint.triangle, x.mean.shape[0], equation.matrix
    m, p = h.shape
    n = triangle.shape[0]

    def all_columns(rows, own):
        # The entries that z replaces follow from z = H x. `own` are the columns of z in the same rows.
        if joint.carried:
            return jnp.concatenate([rows[:, dim - m :], rows[:, p - m : dim - m]], axis=1)
        if joint.inverse is not None:
            missing = own - product(rows[:, :p], h.T)
            return rows + product(missing, joint.inverse.T)
        k = p - m
        return jnp.concatenate([rows[:, :k], own - product(rows[:, :k], h[:, :k].T), rows[:, k:]], axis=1)

    end = n + joint.carried
    whitened = substitute(triangle[:m, :m], equation.residual)
    gain = all_columns(triangle[:m, m:end], triangle[:m, :m])
    factor = all_columns(triangle[m:, m:end], jnp.zeros((n - m, m), gain.dtype))
    state = Normal(x.mean - product(gain.T, whitened), factor)
    if past is not None:
        shift = past.shift - product(triangle[:m, end:].T, whitened)
        cross = pad_rows(triangle[m:, end:], x.factor.shape[0])
        past = Conditional(shift, cross, updated_noise(past, joint.left))
    observed = jnp.pad(substitute(triangle[:m, :m], h), ((0, 0), (0, dim - p)))
    influence = Influence(whitened, gain, observed, jnp.ones((), gain.dtype))
    pivots = jnp.diagonal(triangle)[:m]
    has_density = pivots != 0
    log_det = jnp.sum(jnp.log(jnp.where(has_density, jnp.abs(pivots), 1)))
    rank = jnp.sum(has_density, dtype=log_det.dtype)
    return Update(pad(state, x.factor.shape[0]), past, influence, log_det, rank)


def _mixture(equation, noise):
    """Weights of sums of ``u, ..., u^(k+L)`` that determine all of these, given an equation between them.

    Given ``z`` they are determined by ``u, ..., u^(k-1)``, but not in floating-point numbers: a stiff field multiplies
    round-off in ``u`` by ``J`` again with every derivative. So the elimination has the sums, ``k`` for each component,
    in which every derivative counts by its noise, and carries the columns of the derivatives themselves along. What it
    leaves of these below its triangle is round-off then: in a stiff direction ``u`` is, and the highest derivative is
    not.
    """
    m, p = equation.matrix.shape
    blocks = p // (m // len(equation.gives))
    size, k = p // blocks, blocks - len(equation.gives)
    std = lax.stop_gradient(safe_norm(noise[:, :p], axis=0))
    weights = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1), 1)
    # The powers of an eigenvalue with negative real part alternate in sign, and so their sum does not cancel.
    j = np.arange(blocks)
    signs = (-1.0) ** j * np.cos(np.pi * np.arange(k)[:, None] * (j + 0.5) / blocks)
    mix = jnp.kron(jnp.asarray(signs.T, noise.dtype), jnp.eye(size, dtype=noise.dtype))
    return weights[:, None] * mix


def _replacement(equation, noise):
    """A right inverse of ``H`` on the entries of the state that ``z`` replaces, and flags: one for all other entries.

    Gauss-Jordan elimination, in which the pivot of a row is its entry with most noise. Given an exact equation the
    covariance of the state is singular; as many entries as the equation has rows are left out, so that no singular
    matrix is triangularised. An equation with noise replaces none.
    """
    (m, p), dim = equation.matrix.shape, noise.shape[1]
    if equation.noise is not None:
        return jnp.zeros((dim, m), noise.dtype), jnp.ones(dim, noise.dtype)
    size = lax.stop_gradient(safe_norm(noise, axis=0))[:p]

    def step(carry, i):
        h, solved, chosen = carry
        j = jnp.argmax(jnp.abs(h[i]) * size)
        # An equation between entries without variance replaces none of them: its pivot would be zero.
        empty = h[i, j] * size[j] == 0
        pivot = jnp.where(empty, jnp.inf, h[i, j])
        row, row_solved, column = h[i] / pivot, solved[i] / pivot, h[:, j].at[i].set(0)
        h = (h - column[:, None] * row).at[i].set(row)
        solved = (solved - column[:, None] * row_solved).at[i].set(row_solved)
        return (h, solved, chosen.at[i].set(jnp.where(empty, dim, j))), None

    init = equation.matrix, jnp.eye(m, dtype=noise.dtype), jnp.zeros(m, int)
    (_, solved, chosen), _ = lax.scan(step, init, jnp.arange(m))
    inverse = jnp.zeros((dim, m), noise.dtype).at[chosen].set(solved, mode="drop")
    return inverse, jnp.ones(dim, noise.dtype).at[chosen].set(0, mode="drop")


def residual_about(
    mean: Float[Array, "*batch dim cols"], point: Float[Array, "*batch dim cols"], equation: Linearisation
) -> Float[Array, "*batch m cols"]:
    """The residual at ``mean`` by the linearisation about ``point``: ``z + H (mean - point)``."""
    if equation.is_frozen:
        return equation.residual + given(equation, mean - point)
    p = equation.matrix.shape[-1]
    return equation.residual + batched(product)(equation.matrix, (mean - point)[..., :p, :])


def given(equation: Linearisation, mean: Float[Array, "*batch dim cols"]) -> Float[Array, "*batch m cols"]:
    """The rows of a mean that a frozen equation is about: the product with its matrix."""
    m, p = equation.matrix.shape[-2:]
    return mean[..., p - m : p, :]


def _beside(upper, dense, past, more=None):
    """The stack ``[upper; dense]`` with the columns of ``past`` appended, and the rows ``more``, padded with zeros."""
    if past is not None:
        upper = jnp.pad(upper, ((0, 0), (0, past.cross.shape[1])))
        dense = jnp.concatenate([dense, past.cross], axis=1)
    if more is not None:
        dense = jnp.concatenate([dense, jnp.pad(more, ((0, 0), (0, dense.shape[1] - more.shape[1])))])
    return upper, dense
