"""Draws from a family of equations, and what is right: the parts of `benchmarks.fuzz` that know of no equation.

A family is written in its own variables `x` and `v`; a draw stretches time by `unit` and the solution by `scale`, both
powers of two, so that in single precision, too, the equation is exactly the one whose solution is known.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Draw(NamedTuple):
    """One equation of a family, where it ends, and how it is to be solved; negative units run time backwards."""

    index: int
    parameters: np.ndarray
    start: np.ndarray  # (order, d): v and its derivatives
    times: np.ndarray  # of x: three inside, and the end
    unit: float
    scale: float
    rtol: float
    atol: float


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """`field(x, v, p)`, `(x, v, v', p)` for an equation of second `order` or a residual; `draw(rng)` gives `p`, the
    start and the end; `solution(p, start, x)` is `(times, d)`, not finite where there is none; without it, SciPy's.

    `small`: the size of the smallest component that matters. Not `well_posed`: no solver that looks at the field at
    some times can be sure. `accuracy`: of the solution, relative to its largest component.
    """

    name: str
    field: Callable
    draw: Callable
    solution: Callable | None = None
    order: int = 1
    residual: bool = False
    stiff: bool = False
    small: float = 1.0
    well_posed: bool = True
    accuracy: float = 1e-14

    @functools.cached_property
    def problem(self) -> Any:
        """The equation as it is solved: one function for all draws, so that nothing compiles twice."""
        import probode

        if self.residual:
            return probode.Residual(_stretched_residual(self.field))
        return probode.ODE((_stretched, _stretched_second)[self.order - 1](self.field), order=self.order)

    def draws(self, number: int, seed: int, single: bool = False) -> list[Draw]:
        """The first draws of a seed, the same for all configurations but for tolerances in single precision."""
        return [self._draw(index, seed, single) for index in range(number)]

    def _draw(self, index, seed, single):
        rng = np.random.default_rng([seed, index, zlib.crc32(self.name.encode())])
        parameters, start, end = self.draw(rng)
        times = end * np.array([*np.sort(rng.uniform(0.02, 0.98, 3)), 1.0])
        unit, scale = 2.0 ** rng.integers(-30, 31), 2.0 ** rng.integers(-40, 41)
        unit *= rng.choice([1.0, 1.0, 1.0, -1.0])
        rtol = 10.0 ** rng.uniform(-5 if single else -11, -2)
        # Mostly in the units of the solution; else a number that someone left as it was.
        atol = rtol * 10.0 ** -rng.uniform(0, 4) * self.small * scale if rng.random() < 0.8 else 1e-3 * rtol
        return Draw(index, _single(parameters), _single(np.atleast_2d(start)), _single(times), unit, scale, rtol, atol)

    def right(self, draw: Draw) -> np.ndarray:
        """The solution at the times of a draw, in the variables of the family."""
        key = (self.name, draw.parameters.tobytes(), draw.start.tobytes(), draw.times.tobytes())
        if key not in _KNOWN:
            _KNOWN[key] = (self.solution or self._integrated)(draw.parameters, draw.start, draw.times)
        return _KNOWN[key]

    def _integrated(self, p, start, times):
        return integrate(self.field, p, start[0], times, stiff=self.stiff, atol=1e-14 * self.small)


_KNOWN: dict = {}


def integrate(field, p, start, times, *, stiff, atol):
    """SciPy's solution at `times`, close to round-off."""
    import scipy.integrate

    f, jacobian = jax.jit(field), jax.jit(jax.jacfwd(field, 1))
    method = {"method": "Radau", "jac": lambda x, v: np.asarray(jacobian(x, v, p))} if stiff else {"method": "DOP853"}
    fine = {"rtol": 1e-12 if stiff else 1e-13, "atol": atol, "t_eval": times}
    found = scipy.integrate.solve_ivp(lambda x, v: np.asarray(f(x, v, p)), (0, times[-1]), start, **fine, **method)
    return found.y.T if found.success else np.full((len(times), len(start)), np.nan)


def _single(x):
    return np.asarray(x, np.float32).astype(float)


def _stretched(field):
    def stretched(t, u, args):
        unit, scale, p = args
        return scale / unit * field(t / unit, u / scale, p)

    return stretched


def _stretched_second(field):
    def stretched(t, u, du, args):
        unit, scale, p = args
        return scale / unit**2 * field(t / unit, u / scale, du * (unit / scale), p)

    return stretched


def _stretched_residual(field):
    def stretched(t, u, du, args):
        unit, scale, p = args
        return field(t / unit, u / scale, du * (unit / scale), p)

    return stretched
