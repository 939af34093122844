"""What is known of a step before its covariance."""

import equinox as eqx
from jaxtyping import Array, Float

from ..algebra.conditioning import Innovation, Linearisation, Transition, Update
from ..priors.prior import AbstractPrior


class Attempt(eqx.Module):
    """The prediction of a step held against the equation: enough to estimate the error, and to reject.

    - ``transition``: that of the prior over the step.
    - ``mean``: the predicted mean.
    - ``equation``: linearised about it.
    - ``innovation``: its residual under the noise of the step alone.
    - ``prior``: that of the step, where the solver's prior is a family; otherwise ``None``.
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
    update: Update | None = None
    unexplained: Float[Array, "*batch dim cols"] | None = None
