"""Random draws from families of equations, for `benchmarks.fuzz`, and the known solutions at their times.

A family is written in variables of its own, time `x` and solution `v`. A draw stretches time by `unit` and the solution
by `scale`. Both are powers of two: other factors would change the equation by round-off, so that in single precision
its solution would not be the known one.
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
    """One equation of a family, its interval and its tolerances. With a negative `unit` time runs backwards."""

    index: int
    parameters: np.ndarray
    start: np.ndarray  # (order, d): v and its derivatives
    times: np.ndarray  # values of x: three inside the interval, then its end
    unit: float
    scale: float
    rtol: float
    atol: float


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A family of equations with parameters `p`.

    `field`: called as `field(x, v, p)`, or as `field(x, v, v', p)` for an equation of second `order` or a residual.
    `draw(rng)`: returns `p`, the initial value and the end of the interval. `solution(p, start, x)`: the solution at
    the times `x`, `(times, d)`, not finite where it does not exist; by default it is computed with SciPy. `small`: the
    size of the smallest component that matters. `well_posed`: false if no solver that evaluates the field at some times
    can be sure of its answer. `accuracy`: of the known solution, relative to its largest component.
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
        """The equation in the stretched variables. One function for each draw would compile anew for each."""
        import probode

        if self.residual:
            return probode.Residual(_stretched_residual(self.field))
        return probode.ODE((_stretched, _stretched_second)[self.order - 1](self.field), order=self.order)

    def draws(self, number: int, seed: int, single: bool = False) -> list[Draw]:
        """The first draws of a seed, the same for all configurations but for tolerances in `single` precision."""
        return [self._draw(index, seed, single) for index in range(number)]

    def _draw(self, index, seed, single):
        rng = np.random.default_rng([seed, index, zlib.crc32(self.name.encode())])
        parameters, start, end = self.draw(rng)
        times = end * np.array([*np.sort(rng.uniform(0.02, 0.98, 3)), 1.0])
        unit, scale = 2.0 ** rng.integers(-30, 31), 2.0 ** rng.integers(-40, 41)
        unit *= rng.choice([1.0, 1.0, 1.0, -1.0])
        rtol = 10.0 ** rng.uniform(-5 if single else -11, -2)
        # One tolerance in five is not in the units of the solution, like a default that nobody has changed.
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
    """The solution at `times` by SciPy, with an error close to round-off, `(times, d)`; NaN if SciPy fails."""
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
