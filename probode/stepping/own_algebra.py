"""Factorisations that condition in their own way."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from ..algebra.factorisations import AbstractFactorisation
from ..algebra.normal import Normal
from ..algebra.transition import Transition
from .attempt import Attempt


class AbstractOwnAlgebra(AbstractFactorisation):
    """A factorisation whose covariance is more than one square root times an identity, so that it conditions itself.

    Beside what an ``AbstractFactorisation`` has, a subclass has the field or property ``lanes``, how many leading axes
    its arrays have in a batch of solutions, and defines:

    - ``check``: called once, as a ``Solver`` is made of parts.
    - ``start``: called once in a solve, with the state at ``t0``.
    - ``attempt``: called in every attempt of a step, in place of linearising, comparing and conditioning.
    - ``std``: called for the standard deviations of a solution, and by error estimates.

    It is for filters: smoothers, data, stops and uncertain starts are refused with it. ``own_algebra`` is true.

    >>> import jax.numpy as jnp, probode
    >>> isinstance(probode.Subspace(jnp.eye(3)[:, :1]), probode.AbstractOwnAlgebra)
    True
    """

    lanes: eqx.AbstractVar[int]
    own_algebra = True

    @abstractmethod
    def check(self, prior: Any, constraint: Any, strategy: Any, calibration: Any, error: Any) -> None:
        """Nothing; raises ``ValueError`` for parts of a solver that this factorisation has no formulas for."""

    @abstractmethod
    def start(self, x: Normal) -> Normal:
        """The first state, with as many rows and columns as all that follow."""

    @abstractmethod
    def attempt(self, step: Any, predicted: Normal, t: Float[Array, ""], transition: Transition) -> Attempt:
        """The attempt of a ``Step`` to ``t``, with its ``update`` and what of that is ``unexplained``.

        ``step``: has the constraint, the calibration, the layout and ``args``. ``predicted``: mean and factor, in the
        shapes that ``start`` returns, without the noise of the step. ``transition``: that of the prior over the step.

        ``update`` is the posterior given the equation, its state in the same shapes, and ``unexplained``, like a mean,
        the part of its change of the mean that the noise of the step does not explain. The error estimate uses
        ``innovation.scale``, the local scale, and ``equation.left``, a right square root of the covariance of ``u``
        given the equation under the noise of the step alone.
        """

    @abstractmethod
    def std(self, factor: Float[Array, "rows dim"]) -> Float[Array, "m d"]:
        """Standard deviations of all components, derivative by derivative."""
