"""The algebra of a step: predict a Gaussian state, and condition it on an equation."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .coordinates import Conditional, more_left_over
from .factorisations import Layout
from .linalg import eliminate, product, root_mean_square, safe_norm, substitute, triangularise
from .normal import Normal, batched, pad, pad_rows


class Transition(eqx.Module):
    """The Gaussian distribution of the state after a time step given that before it, as a prior returns it.

    ``x(t + dt) | x(t) ~ N(A x(t), magnitude^2 noise^T noise)`` in the layout of the factorisation:

    - ``matrix``: ``A``. Smaller than the state it stands for ``kron(A, I)``, the same for all components.
    - ``noise``: upper triangular right square root of the covariance, ``(*batch, dim, dim)``, under an output scale of
      one.
    - ``magnitude``: a factor on ``noise``, such as a power of ``dt`` that would leave the range of floating-point
      numbers in it. The product of an output scale and ``magnitude`` is representable where neither of them is. One is
      fine for steps of ordinary length.

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
    """An equation ``z(x) = 0`` to first order about a point: ``z(x) ~ residual + H (x - point)``.

    It is what ``AbstractConstraint.linearise`` returns; made by ``explicit`` for equations that are solved for a
    derivative, by ``general`` for all others. In the layout of the factorisation:

    - ``matrix``: ``H`` on the leading rows of the state, ``(*batch, m, p)`` with ``p <= dim``.
    - ``residual``: ``z`` at the point, ``(*batch, m, cols)``.
    - ``gives``: the derivatives that the equation gives, as a ``range``. ``range(1, 2)`` says that it has the form
      ``u' - f(t, u) = 0``: the last ``m`` columns of ``H`` are the identity on ``u'``, so that conditioning needs no
      further columns. ``None``: an equation of general form.
    - ``noise``: right square root of the covariance of the equation's error, ``(*batch, rows, m)``, where it does not
      hold exactly; then ``gives`` is ``None``.
    - ``left``: right square root of the covariance of ``u`` given the equation under the noise of the step alone,
      ``(rows, k)``, from factorisations with an algebra of their own.
    - ``whole``: whether ``matrix`` is the whole derivative of ``z``, so that what it leaves out is of second order. It
      is not where the field is frozen, or where only the diagonal of its Jacobian is kept.

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

    @staticmethod
    def explicit(
        layout: Layout, jacobians: Sequence[Array | None], residual: Float[Array, " d"], *, whole: bool = True
    ) -> "Linearisation":
        """The equation ``u^(k) - f(t, u, ..., u^(k-1)) = 0`` with ``k = len(jacobians)``.

        ``jacobians``: the derivative of ``f`` with respect to each of ``u, ..., u^(k-1)``, of shape ``(d, d)``, or
        ``(d,)`` for diagonals where ``layout.factorisation.keeps_diagonal``; ``None`` for zero. ``residual``:
        ``u^(k) - f`` at the point, for the flat ``u``. ``whole``: whether these are all derivatives of ``f``.
        """
        zero, k = jnp.zeros_like(layout.identity()), len(jacobians)
        blocks = [zero if jacobian is None else -layout.project(jacobian) for jacobian in jacobians]
        matrix = jnp.concatenate([*blocks, layout.identity()], axis=-1)
        return Linearisation(matrix, layout.pack(residual[None]), range(k, k + 1), whole=whole and layout.keeps_all)

    @staticmethod
    def general(
        layout: Layout, jacobians: Sequence[Array], residual: Float[Array, " m"], *, whole: bool = True
    ) -> "Linearisation":
        """The equation ``r(t, u, ..., u^(k)) = 0`` with ``k = len(jacobians) - 1``.

        ``jacobians``: the derivative of ``r`` with respect to each of ``u, ..., u^(k)``, of shape ``(m, d)``.
        ``residual``: ``r`` at the point. ``whole``: whether these are all derivatives of ``r``.
        """
        matrix = jnp.concatenate([layout.project(jacobian) for jacobian in jacobians], axis=-1)
        return Linearisation(matrix, layout.pack(residual[None]), whole=whole and layout.keeps_all)


class Innovation(eqx.Module):
    """The residual of a step's prediction, and its covariance under the noise of that step alone.

    Calibrations and error estimates receive it. The covariance is ``S = H Q H^T`` with ``Q = noise^T noise`` of the
    ``Transition``, so that output scales have the unit ``1 / magnitude``:

    - ``factor``: upper triangular square root of ``S``, ``(*batch, m, m)``.
    - ``whitened``: ``S^(-1/2) z``, ``(*batch, m, cols)``.
    - ``scale``: its root mean square per batch element, the local quasi-maximum-likelihood estimate of the output scale
      (Schober, Sarkka, Hennig 2019, "A probabilistic model for the numerical solution of initial value problems");
      infinite for a residual that no noise explains.
    - ``unit``: the prior's own output scale in this unit.
    - ``inside``, ``remainder``: residuals of the corrected mean, at a time inside the step and at its end, whitened in
      the same way; only where the error estimate needs them (``needs_defects``).

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
    def silent(self) -> Bool[Array, "*batch"]:
        """Whether the residual is zero, that is, no more than round-off."""
        return jnp.all(self.whitened == 0, axis=(-2, -1))

    @property
    def size_inside(self) -> Float[Array, "*batch"]:
        """Root mean square of ``inside``."""
        return root_mean_square(self.inside, axis=(-2, -1))


@batched
def innovate(equation: Linearisation, noise: Float[Array, "dim dim"], unit: Float[Array, ""]) -> Innovation:
    """The residual under ``N(0, H Q H^T)``, ``Q = noise^T noise``; costs one triangularisation of ``m`` columns."""
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

    ``Q`` times it is the mean of the noise given the residual (the adjoint variable of the disturbance smoother: de
    Jong 1989, "Smoothing and interpolation with the state-space model"). The inverse of a covariance may not be a
    number in single precision where its inverse square root is one.
    """
    factor = factor / _largest(factor)
    # ``factor`` is upper triangular; with rows and columns in reverse order its transpose is.
    solution = substitute(factor[::-1, ::-1].T, whitened[::-1])[::-1]
    return product(equation.matrix.T, solution)


@batched
def noise_mean(
    noise: Float[Array, "dim dim"],
    later: Float[Array, "dim dim"],
    factor: Float[Array, "m m"],
    weights: Float[Array, "p cols"],
) -> Float[Array, "dim cols"]:
    """``noise^T later w``: the mean of a noise, given the residual that has these ``smoothing_weights`` and factor.

    ``later``: the same noise as the state in which the residual was seen has it, ``noise A^T``.
    """
    p = weights.shape[0]
    # In this order: high derivatives, whose noise and weights are no numbers in single precision, do not enter.
    return product(noise.T, product(later[:, :p] / _largest(factor), weights))


def explained(
    transition: Transition, equation: Linearisation, factor: Float[Array, "*batch m m"], whitened: Array
) -> Float[Array, "*batch dim cols"]:
    """``Q H^T (H Q H^T)^-1 z``: the mean of the noise of a step given a whitened residual at its end."""
    return noise_mean(transition.noise, transition.noise, factor, smoothing_weights(equation, factor, whitened))


def _largest(factor):
    size = jnp.max(jnp.abs(factor), initial=0)
    return jnp.where(size > 0, size, 1)


def _observed(equation, noise, columns=0):
    """Square root of the covariance of ``z`` beside the leading columns of ``noise``: its triangular rows, the rest."""
    m, p = equation.matrix.shape
    leading = noise[:p, :p]
    observed = jnp.concatenate([product(leading, equation.matrix.T), leading[:, :columns]], axis=1)
    if equation.gives is not None:
        # Only the rows of that derivative itself are triangular in the columns of z.
        return observed[p - m :], observed[: p - m]
    return jnp.zeros((m, m + columns), noise.dtype), observed


def posterior_noise(
    equation: Linearisation, noise: Float[Array, "*batch dim dim"], size: int
) -> Float[Array, "*batch rows {size}"]:
    """Square root of the covariance of the first ``size`` rows of ``x ~ N(0, noise^T noise)`` given the equation."""
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
    """``x`` plus independent noise ``N(0, scale^2 noise^T noise)``, ``noise`` upper triangular.

    The new factor is upper triangular. ``past``, given in the coordinates of ``x``, comes back in the new ones.
    """
    upper, dense = _beside(scale * noise, x.factor, past)
    triangle, left = eliminate(upper, dense)
    dim = noise.shape[1]
    if past is not None:
        past = Conditional(past.shift, triangle[:, dim:], more_left_over(past, left))
    return Normal(x.mean, triangle[:, :dim]), past


class Influence(eqx.Module):
    """How an equation has moved a state, in units of its innovation's standard deviations ``S^(1/2)``.

    ``whitened``: the innovation ``S^(-1/2) z``; ``gain``: the state moves by ``-gain^T whitened``; ``matrix``:
    ``S^(-1/2) H``; ``weight``: one, or zero if the innovation is not to be counted.
    """

    whitened: Float[Array, "*batch m cols"]
    gain: Float[Array, "*batch m dim"]
    matrix: Float[Array, "*batch m dim"]
    weight: Float[Array, "*batch"]


class Update(eqx.Module):
    """What conditioning on an equation gives, with ``S`` the covariance of the innovation ``z``.

    ``state``: the posterior; ``past``: an earlier state in its coordinates; ``influence``: how it came about;
    ``pivots``: the diagonal of the triangular ``S^(1/2)``, zero where nothing can be learnt.
    """

    state: Normal
    past: Conditional | None
    influence: Influence
    pivots: Float[Array, "*batch m"]


class Joint(eqx.Module):
    """Square root of the joint covariance of an innovation, the state that is predicted, and an earlier state.

    Upper triangular in the columns of ``z``, of ``x'`` (the state without the coordinates that ``z`` replaces), and of
    ``w``, the earlier state's coordinates, if there is one::

               z        x'       w
        [ S^(1/2)     gain     ...  ]   triangle
        [    0     posterior   ...  ]
        [    0         0       own  ]   left

    ``inverse``: the replaced coordinates in terms of ``z``, where these are not a whole derivative.
    """

    triangle: Float[Array, "*batch n width"]
    left: Float[Array, "*batch rows extra"]
    inverse: Float[Array, "*batch dim m"] | None


@batched
def join(
    x: Normal,
    noise: Float[Array, "dim dim"],
    scale: Float[Array, ""],
    equation: Linearisation,
    past: Conditional | None = None,
) -> Joint:
    """The joint distribution after adding the noise ``scale * noise`` to ``x``: the one elimination of a step.

    The columns of the stacked square root ``[x.factor; scale noise]`` are changed to ``(z, all other derivatives)``.
    It then has full column rank as soon as the noise has, and its triangle holds the innovation's factor, the
    cross-covariance and, in the trailing block, the posterior's factor. Columns of ``past`` beside it tell what the
    equation says of an earlier state. The residual does not enter.
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

    def change_columns(factor):
        return jnp.concatenate([product(factor[:, :p], h.T), factor[:, :k], factor[:, p:]], axis=1)

    changed = change_columns(noise)
    # Rows of the noise below the block are untouched by H; those above it meet z densely and join the dense part.
    upper = jnp.concatenate([changed[k:p], jnp.zeros((k, dim), noise.dtype), changed[p:]])
    upper, dense = _beside(upper, change_columns(x.factor), past, changed[:k])
    return Joint(*eliminate(upper, dense), None)


@batched
def condition(joint: Joint, x: Normal, equation: Linearisation, past: Conditional | None = None) -> Update:
    """Condition on the equation, linearised about the mean of ``x``: by substitution, since ``joint`` is triangular.

    The posterior's factor has as many rows as derivatives are left, or as the state if ``gives`` is ``None``. (Where
    ``x.factor`` has more rows, zeros keep the shape.)
    """
    triangle, dim, h = joint.triangle, x.mean.shape[0], equation.matrix
    m, p = h.shape
    n = triangle.shape[0]

    def all_columns(rows, own):
        # What is replaced follows from z = H x: `own` are the columns of z in the same rows.
        if joint.inverse is not None:
            missing = own - product(rows[:, :p], h.T)
            return rows + product(missing, joint.inverse.T)
        k = p - m
        return jnp.concatenate([rows[:, :k], own - product(rows[:, :k], h[:, :k].T), rows[:, k:]], axis=1)

    whitened = substitute(triangle[:m, :m], equation.residual)
    gain = all_columns(triangle[:m, m:n], triangle[:m, :m])
    factor = all_columns(triangle[m:, m:n], jnp.zeros((n - m, m), gain.dtype))
    state = Normal(x.mean - product(gain.T, whitened), factor)
    if past is not None:
        shift = past.shift - product(triangle[:m, n:].T, whitened)
        cross = pad_rows(triangle[m:, n:], x.factor.shape[0])
        past = Conditional(shift, cross, more_left_over(past, joint.left))
    observed = jnp.pad(substitute(triangle[:m, :m], h), ((0, 0), (0, dim - p)))
    influence = Influence(whitened, gain, observed, jnp.ones((), gain.dtype))
    return Update(pad(state, x.factor.shape[0]), past, influence, jnp.diagonal(triangle)[:m])


def _replacement(equation, noise):
    """Coordinates of the state that ``z`` can replace: their inverse, ``H inverse = 1``, and the flags of the others.

    Gauss-Jordan elimination with the pivots that have most noise. An exact equation leaves the covariance singular;
    without as many coordinates as it has rows nothing singular is ever triangularised.
    """
    (m, p), dim = equation.matrix.shape, noise.shape[1]
    if equation.noise is not None:
        return jnp.zeros((dim, m), noise.dtype), jnp.ones(dim, noise.dtype)
    size = lax.stop_gradient(safe_norm(noise, axis=0))[:p]

    def step(carry, i):
        h, solved, chosen = carry
        j = jnp.argmax(jnp.abs(h[i]) * size)
        # Nothing is to be learnt from an equation about what is certain.
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


@batched
def seen_from(
    mean: Float[Array, "dim cols"], point: Float[Array, "dim cols"], equation: Linearisation
) -> Float[Array, "m cols"]:
    """The residual at ``mean`` by the linearisation about ``point``: ``z + H (mean - point)``."""
    return equation.residual + product(equation.matrix, (mean - point)[: equation.matrix.shape[1]])


def _beside(upper, dense, past, more=None):
    """The stack with the columns of ``past`` at its side, and the rows ``more`` below it, zero where they end."""
    if past is not None:
        upper = jnp.pad(upper, ((0, 0), (0, past.cross.shape[1])))
        dense = jnp.concatenate([dense, past.cross], axis=1)
    if more is not None:
        dense = jnp.concatenate([dense, jnp.pad(more, ((0, 0), (0, dense.shape[1] - more.shape[1])))])
    return upper, dense
