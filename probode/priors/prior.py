"""What a prior is: a Gauss-Markov process on ``(u, u', ..., u^(nu))``, as a transition over any time step."""

from abc import abstractmethod

import equinox as eqx
from jaxtyping import Array, Float, PyTree, Real

from ..algebra.conditioning import Transition
from ..algebra.factorisations import Layout
from ..equations.problems import AbstractProblem


class AbstractPrior(eqx.Module):
    """A Gauss-Markov process on ``u`` and its first ``num_derivatives`` derivatives.

    A subclass has the field ``num_derivatives`` and defines ``transition``. ``is_polynomial``: whether the process goes
    on as its Taylor polynomial but for noise; otherwise the first step is no longer than the two agree. A field named
    ``output_scale``, if there is one, is what ``RelativeScale`` and ``DiffusionTempering`` multiply.

    >>> import probode
    >>> probode.IWP(2).num_derivatives, probode.IWP(2).is_polynomial
    (2, True)
    """

    num_derivatives: eqx.AbstractVar[int]
    is_polynomial = False

    @abstractmethod
    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        """The distribution of the state a time ``dt`` later given the state; ``dt`` may be negative.

        At zero the matrix is the identity, and nobody looks at the noise.
        """


class AbstractPriorFamily(eqx.Module):
    """A prior for each step, with parameters from the equation and the state where the step starts.

    A subclass has the field ``num_derivatives`` and defines ``at``. ``is_polynomial``: as of the priors.

    >>> import probode
    >>> isinstance(probode.RosenbrockIOUP(3), probode.AbstractPriorFamily)
    True
    """

    num_derivatives: eqx.AbstractVar[int]
    is_polynomial = False

    @abstractmethod
    def at(
        self, t: Float[Array, ""], us: Float[Array, "n d"], problem: AbstractProblem, layout: Layout, args: PyTree
    ) -> AbstractPrior:
        """The prior of the step that leaves the derivatives ``us = (u, u', ...)`` at ``t``."""
