"""The residual of a linearised equation held against the noise of a step alone, and what that noise explains of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .factorisations import Layout
from .linalg import eliminate, product, root_mean_square, safe_norm, solve_upper, substitute, triangularise
from .linearisation import Linearisation
from .normal import batched
from .transition import Transition


class Innovation(eqx.Module):
    """The residual ``z`` of a step's prediction, and its covariance under the process noise of that step alone.

    Calibrations and error estimates receive it. The covariance is ``S = H Q H^T`` with ``Q = noise^T noise`` of the
    ``Transition``, without its ``magnitude``. So output scales are given here times ``magnitude``:

    - ``factor``: upper triangular right square root of ``S``, ``(*batch, m, m)``; where the equation couples the batch
      elements (``Linearisation.coupling``) the columns of one root for all that belong to each, ``(*batch, rows, m)``.
    - ``whitened``: ``S^(-1/2) z``, ``(*batch, rows, cols)``; coupled elements all have the same one.
    - ``scale``: the root mean square of ``whitened``, ``(*batch,)``: the local quasi-maximum-likelihood estimate of the
      output scale (Schober, Sarkka, Hennig 2019, "A probabilistic model for the numerical solution of initial value
      problems"). Infinite for a residual in a direction without noise. A step raises it to what explains round-off in
      the residual (not where all highest derivatives are given), and, where the residual is zero, to what explains that
      inside the step.
    - ``unit``: ``magnitude``, which is the prior's own output scale here, ``(*batch,)``.
    - ``inside``, ``remainder``: residuals of the corrected mean, at a time inside the step and at its end, whitened in
      the same way; ``None`` unless the error estimate needs them (``needs_defects``), and also then where an explicit
      equation has a partial Jacobian: ``remainder`` always, ``inside`` unless the error is small. See
      ``AbstractErrorEstimate``.

    >>> import probode
    >>> innovation = probode.testing.example_attempt().innovation
    >>> probode.NoCalibration().scale(innovation, None) == innovation.unit
    Array(True, dtype=bool)
    """

    factor: Float[Array, "*batch rows m"]
    whitened: Float[Array, "*batch rows cols"]
    scale: Float[Array, "*batch"]
    unit: Float[Array, "*batch"]
    inside: Float[Array, "*batch rows cols"] | None = None
    remainder: Float[Array, "*batch rows cols"] | None = None

    @property
    def is_zero(self) -> Bool[Array, "*batch"]:
        """A flag for each batch element: true where the residual is zero, as steps set it if it is round-off."""
        return jnp.all(self.whitened == 0, axis=(-2, -1))

    @property
    def size_inside(self) -> Float[Array, "*batch"]:
        """Root mean square of ``inside``."""
        assert self.inside is not None
        return root_mean_square(self.inside, axis=(-2, -1))


def innovate(
    equation: Linearisation, noise: Float[Array, "*batch dim dim"], unit: Float[Array, "*batch"]
) -> Innovation:
    """The residual and its covariance ``H Q H^T``, ``Q = noise^T noise``, by one triangularisation of ``m`` columns.

    ``unit``: the ``magnitude`` of the transition that the noise is from.
    """

    def compare(factor, residual):
        whitened = substitute(factor, residual)
        unexplained = jnp.any((jnp.diagonal(factor)[:, None] == 0) & (residual != 0))
        return whitened, jnp.where(unexplained, jnp.inf, root_mean_square(whitened))

    @batched
    def of_one(equation, noise, unit):
        factor = triangularise(*_observed(equation, noise))
        whitened, scale = compare(factor, equation.residual)
        return Innovation(factor, whitened, scale, unit)

    if (coupling := equation.coupling) is None:
        return of_one(equation, noise, unit)
    p = equation.matrix.shape[-1]
    root = coupling.root(noise[..., :p, :p])
    whitened, scale = coupling.for_each(compare(root, coupling.flat(equation.residual)))
    return Innovation(coupling.columns(root), whitened, scale, unit)


def whiten(
    equation: Linearisation, factor: Float[Array, "*batch rows m"], z: Float[Array, "*batch m cols"]
) -> Float[Array, "*batch rows cols"]:
    """``S^(-1/2) z`` for a residual of the equation, as ``Innovation`` has it, from the factor of ``S``."""
    if (coupling := equation.coupling) is None:
        return batched(substitute)(factor, z)
    return coupling.for_each(substitute(coupling.from_columns(factor), coupling.flat(z)))


def residual_std(equation: Linearisation, innovation: Innovation, layout: Layout) -> Float[Array, " d"]:
    """The standard deviations of the residual of every component under the noise of the step, with its local scale."""
    factor = innovation.scale[..., None, None] * innovation.factor
    if (coupling := equation.coupling) is None:
        return layout.std(factor)[0]
    # The rows are those of one root, of which the directions of an adaptive factorisation may mix the columns.
    rows = jax.vmap(lambda row: layout.unpack(coupling.split(row[:, None]))[0])(coupling.from_columns(factor))
    return safe_norm(rows, axis=0)


def smoothing_weights(
    equation: Linearisation, factor: Float[Array, "*batch rows m"], whitened: Float[Array, "*batch rows cols"]
) -> Float[Array, "*batch p cols"]:
    """``H^T (H Q H^T)^-1 z`` from the whitened residual, times the largest entry of the factor of ``H Q H^T``.

    Without that entry, ``Q`` times it is minus the mean of the noise given the residual (the adjoint variable of the
    disturbance smoother: de Jong 1989, "Smoothing and interpolation with the state-space model"). With it the result
    stays representable in single precision, where the inverse of a covariance may overflow and the inverse of its
    square root does not.
    """

    @batched
    def of_one(equation, factor, whitened):
        solution = solve_upper(factor / _largest(factor), whitened)
        if equation.is_frozen:
            return jnp.pad(solution, ((equation.matrix.shape[1] - solution.shape[0], 0), (0, 0)))
        return product(equation.matrix.T, solution)

    if (coupling := equation.coupling) is None:
        return of_one(equation, factor, whitened)
    shares = batched(_largest)(factor)[:, None, None] / _largest(factor)
    return coupling.adjoint(coupling.from_columns(factor) / _largest(factor), whitened[0]) * shares


@batched
def noise_mean(
    noise: Float[Array, "dim dim"],
    later: Float[Array, "dim dim"],
    factor: Float[Array, "rows m"],
    weights: Float[Array, "p cols"],
) -> Float[Array, "dim cols"]:
    """``noise^T later H^T (H Q H^T)^-1 z``: what of a residual a noise explains, from its ``smoothing_weights``.

    It is subtracted from a mean: minus the conditional mean, since ``H noise = -z``. ``noise``: a right square root of
    the covariance of the noise. ``later``: ``noise A^T``, where ``A`` is the transition from the time of the noise to
    that of the residual. ``factor``: of ``H Q H^T``, as for the weights.
    """
    p = weights.shape[0]
    # Only the ``p`` columns in the equation, and in this order: in single precision the columns of high derivatives,
    # and the covariance ``noise^T later``, may not be representable.
    return product(noise.T, product(later[:, :p] / _largest(factor), weights))


def explained(
    transition: Transition, equation: Linearisation, factor: Float[Array, "*batch rows m"], whitened: Array
) -> Float[Array, "*batch dim cols"]:
    """``Q H^T (H Q H^T)^-1 z``: what the noise of a step explains of the residual at its end, which is ``whitened``.

    It is subtracted from the mean.
    """
    return noise_mean(transition.noise, transition.noise, factor, smoothing_weights(equation, factor, whitened))


def explained_by_leading(
    transition: Transition, equation: Linearisation, factor: Float[Array, "*batch m m"], whitened: Array, rows: int
) -> Float[Array, "*batch dim cols"]:
    """What ``explained`` returns if only the first ``rows`` rows of the equation are observed."""
    leading = Linearisation(equation.matrix[..., :rows, :], equation.residual[..., :rows, :])
    return explained(transition, leading, factor[..., :rows, :rows], whitened[..., :rows, :])


def posterior_noise(
    equation: Linearisation, noise: Float[Array, "*batch dim dim"], size: int
) -> Float[Array, "*batch rows {size}"]:
    """A square root of the covariance of the first ``size`` entries of ``x ~ N(0, noise^T noise)`` given the equation.

    For factorisations with an algebra of their own it is what they have computed, ``equation.left``. Where the equation
    couples the batch elements each is given its own part alone, which is an approximation for estimates of errors.
    """
    if equation.left is not None:
        return equation.left

    @batched
    def given(equation, noise):
        _, left = eliminate(*_observed(equation, noise, columns=size))
        return left

    return given(equation, noise)


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
