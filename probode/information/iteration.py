"""How a step conditions on an equation that is not linear: once, or again about what that has made of the state."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jax import lax
from jaxtyping import PyTree

from ..util.checks import as_integer


class Iteration(eqx.Module):
    """How often a step evaluates its equation, and whether it takes a Jacobian every time.

    - ``evaluations``: at the prediction, and then at what the update before has made of it. One is the extended Kalman
      filter.
    - ``relinearise``: whether each of them takes its own Jacobian (Gauss-Newton: the iterated extended Kalman filter,
      Bell & Cathey 1993, "The iterated Kalman filter update as a Gauss-Newton method") or keeps that of the
      prediction (a chord iteration).

    Raises ``ValueError`` for a number of evaluations below 1.

    >>> import probode
    >>> probode.TS1(probode.ODE(lambda t, u, args: -u), evaluations=2).iteration
    Iteration(evaluations=2)
    """

    evaluations: int = eqx.field(static=True, default=1, converter=lambda n: as_integer(n, "evaluations", 1))
    relinearise: bool = eqx.field(static=True, default=False)

    @property
    def is_gauss_newton(self) -> bool:
        """Whether a step iterates its linearisation, so that a user wants to know whether it has converged."""
        return self.relinearise and self.evaluations > 1

    def repeat(self, again: Callable[[PyTree], PyTree], carry: Any) -> Any:
        """``carry`` after the evaluations that follow the first one: ``carry = again(carry)`` for each."""
        times = self.evaluations - 1
        # One extra evaluation is inlined so that XLA can fuse it. More go into a loop: inlined, compile time grows
        # exponentially.
        if times <= 1:
            return again(carry) if times else carry
        return lax.fori_loop(0, times, lambda _, carry: again(carry), carry)
