"""The state of a solver between two steps."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..algebra.marginals import Moments, moments, widen
from ..algebra.normal import Normal
from ..estimation.calibration import Evidence
from ..priors.prior import AbstractPrior
from ..util.checks import as_integer
from ..util.describe import brief, shape_of_u


class State(eqx.Module):
    """The state of a solver between two steps, as ``Solver.init`` and ``Solver.step`` return it.

    - ``t``: the time.
    - ``distribution``: the Gaussian over ``(u, ..., u^(nu))``.
    - ``output_scale``: of the step that ended here, in units of the prior's own.
    - ``statistics``: what the calibration has collected; ``calibration``: its class.
    - ``evidence``: what the log likelihood of the equation is made of.
    - ``prior``: that of the step that ended here, where the solver's prior differs from step to step; at a start, that
      of the first step. Elsewhere ``None``.
    - ``last_move``: by how much the last iteration of a linearisation has moved an innovation, at most, in standard
      deviations (root mean square); zero where nothing is iterated.
    - ``data_evidence``: the log density of the data so far.
    - ``derivatives_known``: whether nothing is uncertain but ``u, ..., u^(k-1)``, for an equation of order ``k``.
    - ``global_error``: for ``TS0`` of an equation that gives all highest derivatives, with a calibration step by step,
      such as ``DynamicCalibration``: what the evaluations of all steps so far have left wrong in the mean, to first
      order; part of the covariance. Elsewhere it has no rows.
    - ``spread``: for solves from an uncertain initial value how the mean moves along the ``N`` rows of its factor,
      which adds to the covariance; from a certain one ``N`` is zero.
    - ``inherited``: rows of a square root of the covariance that the last restart at a jump took over, and what the
      steps since have made of it. It is a part of the covariance. No rows in a solve without jumps, or where the
      linearisation does not depend on ``u``.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(3), probode.TS1(probode.ODE(lambda t, u, args: -u)))
    >>> state = solver.step(solver.init(1.0, 0.0), 0.1)
    >>> bool(jnp.abs(state.mean - jnp.exp(-0.1)) < 1e-6)
    True
    """

    t: Float[Array, ""]
    distribution: Normal
    output_scale: Float[Array, "*batch"]
    statistics: Any
    evidence: Evidence
    layout: Layout
    prior: AbstractPrior | None
    last_move: Float[Array, ""]
    data_evidence: Float[Array, ""]
    calibration: type = eqx.field(static=True)
    derivatives_known: bool = eqx.field(static=True)
    global_error: Float[Array, "*batch rows cols"]
    spread: Float[Array, "N *batch dim cols"]
    inherited: Float[Array, "*batch inherited dim"]

    def __repr__(self) -> str:
        return f"State(t={brief(self.t)}, u={shape_of_u(self.layout)}, layout={self.layout!r})"

    @property
    def is_spread(self) -> bool:
        """Whether the initial value was uncertain."""
        return self.spread.shape[-len(self.layout.batch_shape) - 3] > 0

    @property
    def inherits(self) -> bool:
        """Whether the covariance of a restart is carried along."""
        return self.inherited.shape[-2] > 0

    @property
    def carries_error(self) -> bool:
        """Whether the error of all steps so far is known, and part of the covariance."""
        return self.global_error.shape[-2] > 0

    @property
    def mean(self) -> PyTree:
        """Mean of ``u``."""
        return self.derivative(0).mean

    @property
    def std(self) -> PyTree:
        """Standard deviation of ``u``."""
        return self.derivative(0).std

    def derivative(self, k: Any) -> Moments:
        """Mean and standard deviation of ``u^(k)``."""
        k = as_integer(k, "derivative(k)", 0, self.layout.num_derivatives)
        whole = widen(self.distribution, self.spread) if self.is_spread else self.distribution
        return moments(self.layout, whole, k)
