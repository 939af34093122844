"""The interface of priors: Gauss-Markov processes on ``(u, u', ..., u^(nu))``, given by their transitions."""

from abc import abstractmethod

import equinox as eqx
from jaxtyping import Array, Float, PyTree, Real

from ..algebra.derivatives import NoiseSplit
from ..algebra.factorisations import Layout
from ..algebra.transition import Transition
from ..equations.problems import AbstractProblem


class AbstractPrior(eqx.Module):
    """A Gauss-Markov process on ``u`` and its first ``num_derivatives`` derivatives: the prior of a solver.

    A subclass has the field ``num_derivatives``, the ``nu`` of ``u^(nu)``, and defines ``transition``. Check it with
    ``probode.testing.check_prior``: a solver does not see if it is no such process, and its answers would be wrong.
    ``is_polynomial``: whether the mean of the process over a step is the Taylor polynomial; if not, the first step of a
    solve is halved until the two differ at its end by no more than the tolerances. A field with the name
    ``output_scale`` is optional: ``RelativeScale`` and ``DiffusionTempering`` multiply it, and refuse priors without.

    >>> import probode
    >>> probode.IWP(2).num_derivatives, probode.IWP(2).is_polynomial
    (2, True)
    """

    num_derivatives: eqx.AbstractVar[int]
    is_polynomial = False

    @abstractmethod
    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        """The transition of the process over a step: the conditional distribution of ``x(t + dt)`` given ``x(t)``.

        ``dt``: a scalar, which may be negative. For ``dt = 0`` the matrix has to be the identity, and the noise is not
        used. ``layout``: how the state is stored; all arrays have its dtype.
        """


class AbstractSplitPrior(AbstractPrior):
    """A prior that knows in closed form what its noise in the highest derivatives says of that in the others.

    Conditioning on all derivatives from some order on (``ODE.lifted``) then needs no elimination. A subclass defines
    ``split`` beside what an ``AbstractPrior`` does. In its transitions derivatives depend on themselves and on higher
    ones alone: otherwise those at the end of a step would be uncertain from the lower ones at its start, too.

    >>> import probode
    >>> isinstance(probode.IWP(2), probode.AbstractSplitPrior)
    True
    """

    @abstractmethod
    def split(self, dt: Float[Array, ""], order: int, layout: Layout) -> NoiseSplit:
        """The noise of ``transition(dt, layout)`` as that of ``u^(order), ..., u^(nu)``, and the rest given these."""


class AbstractPriorFamily(eqx.Module):
    """A family of priors with one for each step: its parameters depend on the equation and the state before the step.

    For priors that adapt to the solution, as ``RosenbrockIOUP`` and ``RelativeScale``. A subclass has the field
    ``num_derivatives`` and defines ``at``. ``is_polynomial``, and an optional field ``output_scale``: as for
    ``AbstractPrior``. ``RelativeScale`` multiplies that of the priors that ``at`` returns.

    >>> import probode
    >>> isinstance(probode.RosenbrockIOUP(3), probode.AbstractPriorFamily)
    True
    """

    num_derivatives: eqx.AbstractVar[int]
    is_polynomial = False

    @abstractmethod
    def at(
        self,
        t: Float[Array, ""],
        us: Float[Array, "n d"],
        problem: AbstractProblem,
        layout: Layout,
        args: PyTree,
        dt: Float[Array, ""] | None = None,
    ) -> AbstractPrior:
        """The prior of the step that starts at the time ``t`` from the derivatives ``us = (u, u', ..., u^(nu))``.

        ``dt``: the signed length of the step; ``None`` before there is one, where a solve begins.
        """
