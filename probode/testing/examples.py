"""A small problem on which parts are tried."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..algebra.factorisations import Dense, layout_of
from ..equations.problems import ODE
from ..estimation.calibration import NoCalibration
from ..estimation.initialisation import TaylorMode
from ..information.constraints import TS1
from ..priors.iwp import IWP
from ..stepping.attempt import Attempt
from ..stepping.residuals import with_defects
from ..stepping.step import Step


GRID = np.linspace(0.0, 1.0, 9)
# NumPy: an array of JAX would start its backend when the package is imported.
U0 = np.array([1.0, 0.6])


def field(t: Array, u: Array, args: Any) -> Array:
    """A vector field that is nonlinear and depends on time, with components independent of each other."""
    return -u * (1 + 0.5 * jnp.sin(3 * t)) + 0.1 * u**2


def field_in(t: Array, u: Array, units: Any) -> Array:
    """The field for ``u`` in other units: ``units`` times the solution solves it."""
    return units * field(t, u / units, None)


def example_attempt(
    dt: Any = 0.1, *, scale: float = 1.0, time: float = 1.0, constraint: Callable = TS1, defects: bool = False
) -> Attempt:
    """The first attempt of a solve of two components with ``IWP(2)`` and ``Dense``: input for error estimates.

    ``dt``: the signed length of the step; the state has its dtype. ``scale``: a factor on ``u``, to check units.
    ``time``: a unit of time, in which ``dt`` is given; the prior is the same process for all of them. ``constraint``:
    a function that makes the constraint of an ``ODE``. ``defects``: whether the residuals of the corrected mean are
    evaluated, for estimates with ``needs_defects``.
    """
    dt = jnp.asarray(dt)
    layout = layout_of(U0.astype(dt.dtype), 2, Dense())
    equation = constraint(ODE(lambda t, u, args: time * field_in(time * t, u, scale)))
    u0 = jnp.asarray(scale * U0, dt.dtype)
    distribution = TaylorMode().initialise(equation.problem, jnp.zeros_like(dt), u0[None], layout, None)
    # The output scale has the units of u'' over the square root of time.
    prior = IWP(2, output_scale=time**2.5)
    attempt = Step(prior, equation, NoCalibration(), layout).attempt(distribution, dt, dt)
    return with_defects(equation, prior, distribution, dt, dt, attempt, layout, None) if defects else attempt
