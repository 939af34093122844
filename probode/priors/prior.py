"""What a prior is: a Gauss-Markov process on ``(u, u', ..., u^(nu))``, as a transition over any time step."""

from abc import abstractmethod

import equinox as eqx
from jaxtyping import Array, Real

from ..algebra.conditioning import Transition
from ..algebra.factorisations import Layout


class AbstractPrior(eqx.Module):
    """A Gauss-Markov process on ``u`` and its first ``num_derivatives`` derivatives.

    ``differs_by_step``: whether it has a method ``at(t, us, problem, layout, args)`` for the prior of the step that
    leaves the derivatives ``us``, ``(n, d)``, at ``t``. ``is_polynomial``: whether the process goes on as its Taylor
    polynomial but for noise; otherwise the first step is no longer than the two agree.

    >>> import probode
    >>> probode.IWP(2).num_derivatives, probode.IWP(2).differs_by_step
    (2, False)
    """

    num_derivatives: eqx.AbstractVar[int]
    differs_by_step = False
    is_polynomial = False

    @abstractmethod
    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        """``x(t + dt) | x(t)``; ``dt`` may be negative.

        At zero the matrix is the identity, and nobody looks at the noise.
        """
