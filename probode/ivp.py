"""A single function for common problems, with the arguments of ``scipy.integrate.solve_ivp``."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from .algebra.factorisations import AbstractFactorisation, BlockDiagonal, Dense, Isotropic
from .equations.problems import ODE
from .estimation.calibration import AbstractCalibration, DynamicCalibration, LeaveOneOutCalibration
from .estimation.strategies import AbstractStrategy, Filter, FixedIntervalSmoother, FixedPointSmoother
from .information.constraints import TS0, TS1, AbstractConstraint
from .posterior.solution import SaveAt, Solution
from .priors.iwp import IWP
from .priors.relative_scale import RelativeScale
from .solver import Solver
from .stepping.controllers import IntegralController
from .util.checks import as_integer


def solve_ivp(
    vector_field: Callable,
    t_span: tuple[Any, Any],
    u0: PyTree,
    *,
    method: str = "EK1",
    num_derivatives: int | None = None,
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
      stiff problems; ``"EK0"``, which needs no Jacobian and has an isotropic covariance, for large problems that are
      not stiff; or ``"Taylor"``, which conditions every step on all derivatives of the solution that the prior has, for
      vector fields that are cheap and not stiff: the fewest steps, above all at tight tolerances.
    - ``num_derivatives``: of the integrated Wiener process, with ``RelativeScale`` for ``"EK1"``: 4 by default, 5 for
      ``"Taylor"``. The order of ``"EK0"`` and ``"EK1"`` is one more.
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
    methods: dict[str, AbstractFactorisation] = {"EK0": Isotropic(), "EK1": Dense(), "Taylor": BlockDiagonal()}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(map(repr, methods))}, got {method!r}.")
    if not isinstance(t_span, (tuple, list)) or len(t_span) != 2:
        raise ValueError(f"t_span must be a pair (t0, t1), got {t_span!r}.")
    ode = ODE(vector_field)
    if num_derivatives is None:
        num_derivatives = 5 if method == "Taylor" else 4
    nu = as_integer(num_derivatives, "num_derivatives", 1)
    constraint: AbstractConstraint
    if method == "Taylor":
        constraint = TS0(ode.lifted(nu - 1), evaluations=3)
    else:
        constraint = TS1(ode) if method == "EK1" else TS0(ode)
    strategy: AbstractStrategy = Filter() if t_eval is None else FixedPointSmoother()
    calibration: AbstractCalibration = DynamicCalibration()
    save_at = t_eval
    if dense_output:
        strategy, save_at = FixedIntervalSmoother(), SaveAt(t1=t_eval is None, ts=t_eval, dense=True)
        # Leave-one-out residuals, which need the kept steps, would not see the accumulated errors of EK0.
        calibration = LeaveOneOutCalibration() if method == "EK1" else calibration
    solver = Solver(
        prior=RelativeScale(IWP(nu)) if method == "EK1" else IWP(nu),
        constraint=constraint,
        factorisation=methods[method],
        strategy=strategy,
        calibration=calibration,
        controller=IntegralController(rtol=rtol, atol=atol),
    )
    t0, t1 = t_span
    return solver.solve(u0, t0, t1, args=args, save_at=save_at)
