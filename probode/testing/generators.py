"""Hypothesis strategies: Gaussians, grids, priors, equations with known solutions, solvers of all kinds.

Hypothesis is imported when a strategy is made. Shapes come from small sets, so that tests compile a few programs only.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ..algebra.factorisations import BlockDiagonal, Dense, Isotropic
from ..algebra.normal import Normal
from ..equations.problems import ODE
from ..estimation.calibration import DynamicCalibration, MLECalibration, NoCalibration
from ..estimation.strategies import Filter, FixedIntervalSmoother, FixedPointSmoother
from ..information.constraints import TS0, TS1
from ..priors.iwp import IWP
from ..priors.linear_sde import IOUP
from ..priors.matern import Matern
from ..solver import Solver
from ..stepping.controllers import IntegralController, PIController


class KnownSolution(eqx.Module):
    """An initial value problem whose solution is known in closed form.

    - ``problem``: the equation.
    - ``u0``: the initial value, ``(d,)``, at the time zero.
    - ``t1``: the end of the interval.
    - ``args``: the parameter of the equation.
    - ``solution``: ``solution(t, args)`` is the solution at times ``(*time,)``, of shape ``(*time, d)``.
    """

    problem: ODE
    u0: Any
    t1: float
    args: Any
    solution: Callable


def _hypothesis():
    """The module ``hypothesis.strategies``; raises ``ImportError`` if hypothesis is not installed."""
    try:
        import hypothesis.strategies as st
    except ImportError as error:
        raise ImportError("The strategies of probode.testing need hypothesis: pip install hypothesis.") from error
    return st


def _numbers(st, low, high):
    return st.floats(low, high, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def normals(dims: tuple[int, ...] = (1, 2, 3)) -> Any:
    """A strategy for ``Normal`` over vectors, with factors that may be singular and columns of very different sizes.

    ``dims``: the dimensions ``d``. Means have entries between -2 and 2; the columns of factors, ``(d, d)``, are such
    numbers times a power of ten from -6 to 3. Raises ``ImportError`` without hypothesis.
    """
    st = _hypothesis()

    @st.composite
    def one(draw):
        d = draw(st.sampled_from(dims))
        entries = st.lists(_numbers(st, -2.0, 2.0), min_size=d * d, max_size=d * d)
        scales = np.power(10.0, draw(st.lists(st.integers(-6, 3), min_size=d, max_size=d)))
        mean = jnp.asarray(draw(st.lists(_numbers(st, -2.0, 2.0), min_size=d, max_size=d)))
        return Normal(mean, jnp.asarray(np.reshape(draw(entries), (d, d)) * scales))

    return one()


def grids(t0: float = 0.0, t1: float = 1.0, sizes: tuple[int, ...] = (2, 5, 9)) -> Any:
    """A strategy for arrays of times from ``t0`` to ``t1``, sorted, with steps of very different lengths.

    ``sizes``: the numbers of times. Raises ``ImportError`` without hypothesis.
    """
    st = _hypothesis()

    @st.composite
    def one(draw):
        n = draw(st.sampled_from(sizes))
        steps = np.array(draw(st.lists(_numbers(st, 0.01, 1.0), min_size=n - 1, max_size=n - 1)))
        ts = np.concatenate([[0.0], np.cumsum(steps)]) / np.sum(steps)
        return t0 + (t1 - t0) * ts

    return one()


def priors(num_derivatives: tuple[int, ...] = (1, 2, 3, 4)) -> Any:
    """A strategy for the priors ``IWP``, ``IOUP`` and ``Matern`` with scalar parameters between 0.1 and 10.

    ``num_derivatives``: the numbers of derivatives. Raises ``ImportError`` without hypothesis.
    """
    st = _hypothesis()
    scales = _numbers(st, 0.1, 10.0)

    def of(make):
        return st.builds(lambda n, x, scale: make(n, x, scale), st.sampled_from(num_derivatives), scales, scales)

    return st.one_of(
        of(lambda n, x, scale: IWP(n, output_scale=scale)),
        of(lambda n, x, scale: IOUP(n, -x, output_scale=scale)),
        of(lambda n, x, scale: Matern(n, x, output_scale=scale)),
    )


def problems() -> Any:
    """A strategy for ``KnownSolution``: exponential decay, logistic growth, an oscillator, forcing in time.

    The vector fields are always the same four functions, with the parameter in ``args``, so that tests compile each of
    them once. Raises ``ImportError`` without hypothesis.
    """
    st = _hypothesis()
    rates = _numbers(st, 0.2, 2.0)
    return st.one_of(*(st.builds(make, rates) for make in (_decaying, _saturating, _oscillating, _forced)))


def _decay(t, u, args):
    return -args * u


def _logistic(t, u, args):
    return args * u * (1 - u)


def _oscillator(t, u, args):
    return jnp.stack([args * u[1], -args * u[0]])


def _forcing(t, u, args):
    return jnp.cos(args * t) * jnp.ones_like(u)


_PROBLEMS = {field: ODE(field) for field in (_decay, _logistic, _oscillator, _forcing)}


def _decaying(rate):
    u0 = jnp.array([1.0, -2.0])
    return KnownSolution(_PROBLEMS[_decay], u0, 2.0, jnp.asarray(rate), _decay_solution)


def _decay_solution(t, args):
    return jnp.exp(-args * jnp.asarray(t))[..., None] * jnp.array([1.0, -2.0])


def _saturating(rate):
    return KnownSolution(_PROBLEMS[_logistic], jnp.array([0.1]), 3.0, jnp.asarray(rate), _logistic_solution)


def _logistic_solution(t, args):
    return (1 / (1 + 9 * jnp.exp(-args * jnp.asarray(t))))[..., None]


def _oscillating(rate):
    return KnownSolution(_PROBLEMS[_oscillator], jnp.array([1.0, 0.0]), 2.0, jnp.asarray(rate), _oscillator_solution)


def _oscillator_solution(t, args):
    t = jnp.asarray(t)
    return jnp.stack([jnp.cos(args * t), -jnp.sin(args * t)], axis=-1)


def _forced(rate):
    return KnownSolution(_PROBLEMS[_forcing], jnp.array([0.0]), 2.0, jnp.asarray(rate), _forcing_solution)


def _forcing_solution(t, args):
    return (jnp.sin(args * jnp.asarray(t)) / args)[..., None]


def solvers(problem: ODE, num_derivatives: tuple[int, ...] = (2, 3)) -> Any:
    """A strategy for solvers of ``problem`` with the prior ``IWP`` and all combinations of the other parts.

    Tolerances are 1e-4 (relative) and 1e-6 (absolute). ``num_derivatives``: of the prior. Raises ``ImportError``
    without hypothesis.
    """
    st = _hypothesis()

    def make(nu, constraint, factorisation, strategy, calibration, controller):
        return Solver(
            IWP(nu),
            constraint(problem),
            factorisation=factorisation,
            strategy=strategy,
            calibration=calibration,
            controller=controller,
        )

    return st.builds(
        make,
        st.sampled_from(num_derivatives),
        st.sampled_from((TS0, TS1)),
        st.sampled_from((Dense(), BlockDiagonal(), Isotropic())),
        st.sampled_from((Filter(), FixedPointSmoother(), FixedIntervalSmoother())),
        st.sampled_from((NoCalibration(), DynamicCalibration(), MLECalibration())),
        st.sampled_from((IntegralController(1e-4, 1e-6), PIController(1e-4, 1e-6))),
    )
