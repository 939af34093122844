"""Where a solve begins: at initial values, at a Gaussian over all derivatives, or where another solve has ended."""

import dataclasses
from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..algebra.normal import Normal
from ..algebra.transition import Transition
from ..estimation.initialisation import AbstractInitialisation, InitialState
from ..priors.prior import AbstractPrior
from ..util.checks import as_returned
from .adaptive import AdaptiveState
from .state import State
from .step import Step


class AbstractStart(eqx.Module):
    """Where a solve begins: at initial values, at a Gaussian over all derivatives, or where another solve has ended.

    A subclass defines ``resumed``, ``directions``, ``mean``, ``at`` and ``state``. It may set ``is_certain``: whether
    the state there is known, so that no residual can be explained by moving it.
    """

    is_certain = False

    @property
    @abstractmethod
    def resumed(self) -> AdaptiveState | None:
        """The solve that goes on, if one does."""

    @property
    @abstractmethod
    def directions(self) -> PyTree:
        """The rows of the factor of ``mean``, each a PyTree like it, stacked along a leading axis.

        The solve is pushed forward along them. ``None`` if ``mean`` is certain, or if the filter itself treats its
        uncertainty.
        """

    @property
    @abstractmethod
    def mean(self) -> PyTree:
        """The mean of what the solve begins with; if that is uncertain, the solve is differentiated with respect to it.

        The tuple of initial values ``(u, ..., u^(k-1))``; the tuple of all derivatives of an ``InitialState``; or the
        mean of the state from which a solve goes on, an array ``(*batch, dim, cols)``.
        """

    @abstractmethod
    def at(self, mean: PyTree) -> "AbstractStart":
        """The start with another ``mean``."""

    @abstractmethod
    def state(
        self,
        step: Step,
        initialisation: AbstractInitialisation,
        t0: Float[Array, ""],
        seen_at: Float[Array, ""] | None = None,
    ) -> State:
        """The state of the solver at ``t0``; ``seen_at``: the time of the equation, where it matters on which side."""


class FromValues(AbstractStart):
    """A solve from the tuple ``(u, ..., u^(k-1))``: the initialisation makes the other derivatives.

    ``values``: that tuple. ``uncertain``: what ``directions`` returns, such tuples stacked along a leading axis;
    ``None`` for values that are certain.
    """

    values: tuple[PyTree, ...]
    uncertain: PyTree = None
    is_certain = True

    @property
    def resumed(self) -> AdaptiveState | None:
        return None

    @property
    def directions(self) -> PyTree:
        return self.uncertain

    @property
    def mean(self) -> PyTree:
        return self.values

    def at(self, mean: PyTree) -> AbstractStart:
        return FromValues(mean, self.uncertain)

    def state(
        self,
        step: Step,
        initialisation: AbstractInitialisation,
        t0: Float[Array, ""],
        seen_at: Float[Array, ""] | None = None,
    ) -> State:
        _check(step, t0)
        layout, problem = step.layout, step.constraint.problem
        stack = jnp.stack([layout.ravel(u) for u in self.values])
        t = t0 if seen_at is None else seen_at
        return step.start(t0, initialisation.initialise(problem, t, stack, layout, step.args))


class FromInitialState(AbstractStart):
    """A solve from a Gaussian over all derivatives, as ``Solver.initialise`` returns it."""

    given: InitialState

    @property
    def resumed(self) -> AdaptiveState | None:
        return None

    @property
    def directions(self) -> PyTree:
        return None

    @property
    def mean(self) -> PyTree:
        return self.given.mean

    def at(self, mean: PyTree) -> AbstractStart:
        return FromInitialState(InitialState(mean, self.given.factor))

    def state(
        self,
        step: Step,
        initialisation: AbstractInitialisation,
        t0: Float[Array, ""],
        seen_at: Float[Array, ""] | None = None,
    ) -> State:
        _check(step, t0)
        layout = step.layout
        mean = layout.pack(jnp.stack([layout.ravel(u) for u in self.given.mean]))
        return step.start(t0, Normal(mean, self.given.factor.astype(layout.dtype)))


class Resumed(AbstractStart):
    """A solve that goes on from ``Solution.state``."""

    solve: AdaptiveState

    @property
    def resumed(self) -> AdaptiveState | None:
        return self.solve

    @property
    def directions(self) -> PyTree:
        current = self.solve.current
        return current.spread if current.is_spread else None

    @property
    def mean(self) -> PyTree:
        return self.solve.current.distribution.mean

    def at(self, mean: PyTree) -> AbstractStart:
        current = self.solve.current
        current = dataclasses.replace(current, distribution=Normal(mean, current.distribution.factor))
        return Resumed(dataclasses.replace(self.solve, current=current))

    def state(
        self,
        step: Step,
        initialisation: AbstractInitialisation,
        t0: Float[Array, ""],
        seen_at: Float[Array, ""] | None = None,
    ) -> State:
        return step.resume(self.solve.current)


def _check(step, t0):
    """Raises unless the equation can be evaluated, and the prior has transitions: once in a compilation."""
    layout, problem = step.layout, step.constraint.problem
    example = layout.unravel(jnp.zeros(layout.size, layout.dtype))
    problem.check(t0, (example,) * problem.num_initial_values, step.args)
    if isinstance(step.prior, AbstractPrior):
        transition = eqx.filter_eval_shape(step.prior.transition, t0, layout)
        as_returned(transition, Transition, f"{type(step.prior).__name__}.transition")
