"""A single function for common problems, with the arguments of ``scipy.integrate.solve_ivp``."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from .algebra.factorisations import AbstractFactorisation, BlockDiagonal, Dense, Isotropic
from .algebra.normal import Normal
from .equations.problems import ODE
from .estimation.calibration import AbstractCalibration, DynamicCalibration, LeaveOneOutCalibration
from .estimation.initialisation import AbstractInitialisation, TaylorMode
from .estimation.strategies import AbstractStrategy, Filter, FixedIntervalSmoother, FixedPointSmoother
from .information.constraints import TS0, TS1, AbstractConstraint
from .information.observations import Observations
from .posterior.solution import SaveAt, Solution
from .priors.iwp import IWP
from .priors.prior import AbstractPrior, AbstractPriorFamily
from .priors.relative_scale import RelativeScale
from .requests import pair
from .solver import Solver
from .stepping.controllers import AbstractController, IntegralController
from .stepping.error_estimates import AbstractErrorEstimate
from .stepping.loops import AbstractLoop, BoundedLoop
from .util.checks import as_integer
from .util.words import hinted


# The defaults are told from what a user passes by identity: the same number, passed beside a controller, is an error.
_RTOL, _ATOL = float("1e-3"), float("1e-6")


@hinted
def solve_ivp(
    vector_field: Callable,
    t_span: Any,
    u0: PyTree,
    *,
    method: str = "EK1",
    num_derivatives: int | None = None,
    t_eval: Any = None,
    dense_output: bool = False,
    rtol: Any = _RTOL,
    atol: Any = _ATOL,
    args: PyTree = None,
    max_step: Any = None,
    first_step: Any = None,
    max_steps: Any = None,
    dt0: Any = None,
    factorisation: AbstractFactorisation | None = None,
    strategy: AbstractStrategy | None = None,
    calibration: AbstractCalibration | None = None,
    error: AbstractErrorEstimate | None = None,
    controller: AbstractController | None = None,
    loop: AbstractLoop | None = None,
    initialisation: AbstractInitialisation | None = None,
    throw: bool = True,
    progress: Any = None,
    data: Observations | None = None,
    events: Any = None,
    max_events: Any = 64,
) -> Solution:
    """The ``Solution`` of ``u' = f(t, u, args)`` from ``u0``, with a standard choice of the solver's parts.

    - ``vector_field``: called as ``f(t, u, args)``; returns a PyTree like ``u``.
    - ``t_span``: the pair ``(t0, t1)``.
    - ``u0``, ``args``, ``throw``, ``progress``, ``data``, ``events``, ``max_events``: as in ``Solver.solve``.
    - ``method``: ``"EK1"``, an extended Kalman filter with the full Jacobian and a dense covariance, for small and for
      stiff problems; ``"EK0"``, which needs no Jacobian and has an isotropic covariance, for large problems that are
      not stiff, but whose uncertainty does not know that solutions may diverge, and is far too small where they do; or
      ``"Taylor"``, which conditions every step on all derivatives of the solution that the prior has, for vector fields
      that are cheap and not stiff: the fewest steps, above all at tight tolerances.
    - ``num_derivatives``: of the integrated Wiener process, for ``"EK1"`` with ``RelativeScale`` (unless it is 1): 4 by
      default, 5 for ``"Taylor"``. The order of ``"EK0"`` and ``"EK1"`` is one more.
    - ``t_eval``: times to keep, ``(times,)``, sorted from ``t0`` to ``t1``, where the solution is smoothed; ``None``
      keeps ``t1`` alone.
    - ``dense_output``: whether all steps are kept, and smoothed, for ``Solution.evaluate`` and ``Solution.sample`` at
      any time. ``"EK1"`` is then calibrated by ``LeaveOneOutCalibration``, unless there are data or ``u0`` is a
      ``Normal``.
    - ``rtol``, ``atol``: the tolerances of a step, ``atol + rtol |u|`` for each component: numbers, or PyTrees like
      ``u``.
    - ``max_step``, ``first_step`` (or ``dt0``): the longest step, and the length of the first; ``max_steps``: how many
      are attempted, 4096 by default.
    - ``factorisation``, ``strategy``, ``calibration``, ``error``, ``controller``, ``loop``, ``initialisation``: parts
      of a ``Solver`` in place of the method's.

    Raises ``ValueError`` for an unknown method, a ``t_span`` that is not a pair, and what is said twice: a
    ``controller`` beside ``rtol``, ``atol`` or ``max_step``, a ``loop`` beside ``max_steps``, a ``strategy`` beside
    ``t_eval`` or ``dense_output``, ``dt0`` beside ``first_step``. Otherwise as ``Solver.solve``.

    >>> import probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0, rtol=1e-6)
    >>> f"{solution.mean[0]:.4f}"
    '0.3679'
    """
    t0, t1 = pair(t_span)
    _said_once("controller", controller, rtol=rtol is not _RTOL, atol=atol is not _ATOL, max_step=max_step is not None)
    _said_once("loop", loop, max_steps=max_steps is not None)
    _said_once("strategy", strategy, t_eval=t_eval is not None, dense_output=dense_output)
    _said_once("dt0", dt0, first_step=first_step is not None)
    prior, constraint, structure = _method(method, ODE(vector_field), num_derivatives)
    if calibration is None:
        # Leave-one-out residuals, which need the kept steps, would not see the accumulated errors of EK0; and they
        # would rescale what is known from data, or of u0.
        leaves_out = dense_output and method == "EK1" and data is None and not isinstance(u0, Normal)
        calibration = LeaveOneOutCalibration() if leaves_out else DynamicCalibration()
    save_at = t_eval
    if dense_output:
        save_at = SaveAt(t1=t_eval is None, ts=t_eval, dense=True)
    if strategy is None:
        smoother = FixedIntervalSmoother() if dense_output else FixedPointSmoother()
        strategy = smoother if dense_output or t_eval is not None else Filter()
    if controller is None:
        controller = IntegralController(rtol=rtol, atol=atol, dt_max=max_step)
    if loop is None:
        loop = BoundedLoop() if max_steps is None else BoundedLoop(max_steps)
    solver = Solver(
        prior=prior,
        constraint=constraint,
        factorisation=structure if factorisation is None else factorisation,
        strategy=strategy,
        calibration=calibration,
        error=error,
        controller=controller,
        loop=loop,
        initialisation=TaylorMode() if initialisation is None else initialisation,
    )
    first = dt0 if first_step is None else first_step
    return solver.solve(
        u0,
        t0,
        t1,
        args=args,
        save_at=save_at,
        dt0=first,
        throw=throw,
        progress=progress,
        data=data,
        events=events,
        max_events=max_events,
    )


def _method(
    method: str, ode: ODE, num_derivatives: Any
) -> tuple[AbstractPrior | AbstractPriorFamily, AbstractConstraint, AbstractFactorisation]:
    """Prior, constraint and factorisation of a method; raises ``ValueError`` for an unknown one."""
    if method not in ("EK0", "EK1", "Taylor"):
        explicit, implicit = ("RK23", "RK45", "DOP853"), ("Radau", "BDF", "LSODA")
        hint = " For equations that are not stiff: 'Taylor', or 'EK0' if there are many." if method in explicit else ""
        hint = " For stiff equations: 'EK1'." if method in implicit else hint
        raise ValueError(f"method must be one of 'EK0', 'EK1', 'Taylor', got {method!r}.{hint}")
    if num_derivatives is None:
        num_derivatives = 5 if method == "Taylor" else 4
    prior = IWP(nu := as_integer(num_derivatives, "num_derivatives", 1))
    if method == "Taylor":
        return prior, TS0(ode.lifted(nu - 1), evaluations=3), BlockDiagonal()
    if method == "EK0":
        return prior, TS0(ode), Isotropic()
    return RelativeScale(prior) if nu > 1 else prior, TS1(ode), Dense()


def _said_once(name: str, value: Any, **others: bool) -> None:
    """Raises ``ValueError`` if ``value`` was passed together with any of the other arguments."""
    if value is not None and (twice := [other for other, passed in others.items() if passed]):
        raise ValueError(f"solve_ivp({name}=...) and {twice[0]} say the same thing twice: pass one of them.")
