"""What is known of a step before its covariance."""

import equinox as eqx
from jaxtyping import Array, Float

from ..algebra.conditioning import Update
from ..algebra.derivatives import NoiseSplit, Remainder
from ..algebra.innovation import Innovation
from ..algebra.linearisation import Linearisation
from ..algebra.transition import Transition
from ..priors.prior import AbstractPrior


class Correction(eqx.Module):
    """What the evaluations of an equation that gives several derivatives make of ``u, ..., u^(k-1)`` in an attempt.

    - ``last_change``: how far the last evaluation has moved them, under the noise of the step alone.
    - ``embedded``: the difference to the rule that leaves out the last derivative at the new end.
    - ``residual``: of the last evaluation, as the prediction has it.
    - ``point``: where this was made: the prediction, with the lower derivatives as corrected before.
    - ``remainder``: what the last evaluation leaves wrong in them; ``None`` without ``split``.
    - ``split``: where all highest derivatives are given, and nothing else was uncertain: the noise of the step as that
      of these derivatives and the rest. The evaluations do not depend on covariances then, and are part of the attempt.
      Otherwise ``None``.
    """

    last_change: Float[Array, "*batch ks cols"]
    embedded: Float[Array, "*batch ks cols"]
    residual: Float[Array, "*batch ms cols"]
    point: Float[Array, "*batch dim cols"]
    split: NoiseSplit | None
    remainder: Remainder | None


class Attempt(eqx.Module):
    """The prediction of a step held against the equation: enough to estimate the error, and to reject.

    - ``transition``: that of the prior over the step.
    - ``mean``: the predicted mean.
    - ``equation``: linearised about it.
    - ``innovation``: its residual under the noise of the step alone.
    - ``prior``: that of the step, where the solver's prior is a family; otherwise ``None``.
    - ``correction``: where the equation gives several derivatives; otherwise ``None``.
    - ``update``: where the factorisation has an algebra of its own, and has conditioned already.
    - ``unexplained``: then the part of the update of the mean that the noise of the step does not explain.

    >>> import probode
    >>> probode.testing.example_attempt().mean.shape  # u, u' and u'' of two components
    (6, 1)
    """

    transition: Transition
    mean: Float[Array, "*batch dim cols"]
    equation: Linearisation
    innovation: Innovation
    prior: AbstractPrior | None
    correction: Correction | None = None
    update: Update | None = None
    unexplained: Float[Array, "*batch dim cols"] | None = None

    @property
    def split(self) -> NoiseSplit | None:
        """The noise of the step, split by derivatives, if the last correction is its update; otherwise ``None``."""
        return None if self.correction is None else self.correction.split
