"""Diffusion tempering: likelihoods that are easy at first, and become what they should be stage by stage.

A large output scale lets the solution follow the data instead of the equation, which makes the likelihood of Fenrir
smooth in the parameters; the optimum of one stage is where the next one starts (Beck, Bosch, Deistler, Kadhim, Macke,
Hennig & Tronarp 2024, "Diffusion tempering improves parameter estimation with probabilistic integrators for ODEs").
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..estimation.calibration import NoCalibration
from ..solver import Solver
from ..util.checks import as_integer, as_scalar, require


class DiffusionTempering(eqx.Module):
    """A schedule of output scales, evenly spaced in their logarithms, from ``largest`` down to ``smallest``.

    The defaults are 21 stages with squared scales ``10^20, 10^19, ..., 1``. Raises ``ValueError`` for scales that are
    not finite and positive or not in order, or a number of stages below 1.

    >>> import probode
    >>> [float(scale) for scale in probode.DiffusionTempering(largest=100.0, stages=3).scales]
    [100.0, 10.0, 1.0]
    """

    largest: float = eqx.field(static=True)
    smallest: float = eqx.field(static=True)
    stages: int = eqx.field(static=True)

    def __init__(self, *, largest: Any = 1e10, smallest: Any = 1.0, stages: Any = 21):
        largest, smallest = as_scalar(largest, "largest"), as_scalar(smallest, "smallest")
        ordered = (smallest > 0) & (smallest <= largest) & (largest < np.inf)
        message = "DiffusionTempering needs 0 < smallest <= largest, finite"
        self.largest = float(require(largest, ordered, message, largest=largest, smallest=smallest))
        self.smallest, self.stages = float(smallest), as_integer(stages, "DiffusionTempering(stages)", 1)

    @property
    def scales(self) -> np.ndarray:
        """The output scales, ``(stages,)``; with one stage the smallest."""
        return np.geomspace(self.smallest, self.largest, self.stages)[::-1]

    def solvers(self, solver: Solver) -> Iterator[Solver]:
        """The solver of every stage: uncalibrated, the prior's own output scale times that of the stage.

        They differ in numbers alone, so that a compiled function of the solver serves all stages. Raises ``ValueError``
        if the solver's prior has no ``output_scale``.
        """
        if not hasattr(solver.prior, "output_scale"):
            name = type(solver.prior).__name__
            raise ValueError(f"DiffusionTempering needs a prior with an output_scale, which {name} has not.")
        for scale in self.scales:
            tempered = jax.tree.map(lambda own, scale=scale: own * scale, solver.prior.output_scale)
            prior = eqx.tree_at(lambda p: p.output_scale, solver.prior, tempered)
            yield dataclasses.replace(solver, prior=prior, calibration=NoCalibration())
