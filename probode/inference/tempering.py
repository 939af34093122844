"""Diffusion tempering: likelihoods of parameters in stages, with output scales that decrease to the intended one.

Under a large output scale the solution follows the data more than the equation, which makes the likelihood of Fenrir
smooth in the parameters. An optimiser starts each stage at the optimum of the one before (Beck, Bosch, Deistler,
Kadhim, Macke, Hennig & Tronarp 2024, "Diffusion tempering improves parameter estimation with probabilistic integrators
for ODEs").
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
    """A decreasing schedule of output scales, for fits of parameters by ``fenrir_log_likelihood`` in stages.

    - ``largest``, ``smallest``: the first and the last scale, as factors on the prior's own ``output_scale``.
    - ``stages``: their number; the logarithms of the scales are equidistant.

    The defaults are 21 stages with squared scales ``10^20, 10^19, ..., 1`` (Beck et al. 2024, "Diffusion tempering
    improves parameter estimation with probabilistic integrators for ODEs"). Raises ``ValueError`` for scales that are
    not finite and positive or not in order, and for a number of stages below 1.

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
        """The output scales, decreasing, ``(stages,)``; with one stage the smallest."""
        return np.geomspace(self.smallest, self.largest, self.stages)[::-1]

    def solvers(self, solver: Solver) -> Iterator[Solver]:
        """The solvers of all stages: ``solver`` without calibration, its prior's output scale times that of the stage.

        They differ in the values of arrays alone, so that a function of the solver is compiled once for all stages.
        Raises ``ValueError``, at the first stage, if the prior has no ``output_scale``.
        """
        if not hasattr(solver.prior, "output_scale"):
            name = type(solver.prior).__name__
            raise ValueError(f"DiffusionTempering needs a prior with an output_scale, which {name} has not.")
        for scale in self.scales:
            tempered = jax.tree.map(lambda own, scale=scale: own * scale, solver.prior.output_scale)
            prior = eqx.tree_at(lambda p: p.output_scale, solver.prior, tempered)
            yield dataclasses.replace(solver, prior=prior, calibration=NoCalibration())
