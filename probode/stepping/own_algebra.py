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

    A subclass defines ``check``, ``start``, ``attempt`` and ``std`` beside the methods of ``AbstractFactorisation``. It
    is for filters: smoothers, data, stops and uncertain starts are refused with it. ``own_algebra`` is true. ``lanes``:
    how many leading axes its arrays have in a batch of solutions.

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
        """The attempt of a ``Step`` to ``t``, with its ``update`` and what of that is ``unexplained``."""

    @abstractmethod
    def std(self, factor: Float[Array, "rows dim"]) -> Float[Array, "m d"]:
        """Standard deviations of all components, derivative by derivative."""
