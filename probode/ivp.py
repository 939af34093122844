"""A single function for common problems, with the arguments of ``scipy.integrate.solve_ivp``."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from .algebra.factorisations import Dense, Isotropic
from .equations.problems import ODE
from .estimation.calibration import AbstractCalibration, DynamicCalibration, LeaveOneOutCalibration
from .estimation.strategies import AbstractStrategy, Filter, FixedIntervalSmoother, FixedPointSmoother
from .information.constraints import TS0, TS1
from .posterior.solution import SaveAt, Solution
from .priors.iwp import IWP
from .priors.relative_scale import RelativeScale
from .solver import Solver
from .stepping.controllers import IntegralController


def solve_ivp(
    vector_field: Callable,
    t_span: tuple[Any, Any],
    u0: PyTree,
    *,
    method: str = "EK1",
    num_derivatives: int = 4,
    t_eval: Any = None,
    dense_output: bool = False,
    rtol: Any = 1e-3,
    atol: Any = 1e-6,
    args: PyTree = None,
) -> Solution:
    """The ``Solution`` of ``u' = f(t, u, args)`` from ``u0``, with a standard choice of the solver's parts.

    - ``vector_field``: called as ``f(t, u, args)``; returns a PyTree like ``u``.
    - ``t_span``: the pair ``(t0, t1)``.
    - ``u0``, ``args``: as in ``Solver.solve``.
    - ``method``: ``"EK1"``, an extended Kalman filter with the full Jacobian and a dense covariance, for small and for
      stiff problems; or ``"EK0"``, which needs no Jacobian and has an isotropic covariance, for large problems that are
      not stiff.
    - ``num_derivatives``: of the integrated Wiener process, with ``RelativeScale`` for ``"EK1"``; the order of the
      method is one more.
    - ``t_eval``: times to keep, ``(times,)``, sorted from ``t0`` to ``t1``, where the solution is smoothed; ``None``
      keeps ``t1`` alone.
    - ``dense_output``: whether all steps are kept, and smoothed, for ``Solution.evaluate`` and ``Solution.sample`` at
      any time. ``"EK1"`` is then calibrated by ``LeaveOneOutCalibration``.
    - ``rtol``, ``atol``: the tolerances of a step, ``atol + rtol |u|`` for each component.

    Raises ``ValueError`` for an unknown method or a ``t_span`` that is not a pair, and what ``Solver.solve`` raises.

    >>> import probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0, rtol=1e-6)
    >>> f"{solution.mean[0]:.4f}"
    '0.3679'
    """
    methods = {"EK0": (TS0, Isotropic()), "EK1": (TS1, Dense())}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(map(repr, methods))}, got {method!r}.")
    if not isinstance(t_span, (tuple, list)) or len(t_span) != 2:
        raise ValueError(f"t_span must be a pair (t0, t1), got {t_span!r}.")
    constraint, factorisation = methods[method]
    strategy: AbstractStrategy = Filter() if t_eval is None else FixedPointSmoother()
    calibration: AbstractCalibration = DynamicCalibration()
    save_at = t_eval
    if dense_output:
        strategy, save_at = FixedIntervalSmoother(), SaveAt(t1=t_eval is None, ts=t_eval, dense=True)
        # Leave-one-out residuals, which need the kept steps, would not see the accumulated errors of EK0.
        calibration = LeaveOneOutCalibration() if method == "EK1" else calibration
    solver = Solver(
        prior=RelativeScale(IWP(num_derivatives)) if method == "EK1" else IWP(num_derivatives),
        constraint=constraint(ODE(vector_field)),
        factorisation=factorisation,
        strategy=strategy,
        calibration=calibration,
        controller=IntegralController(rtol=rtol, atol=atol),
    )
    t0, t1 = t_span
    return solver.solve(u0, t0, t1, args=args, save_at=save_at)
