"""The one-liner, in the form of ``scipy.integrate.solve_ivp``."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from .constraints import TS0, TS1
from .controllers import IntegralController
from .factorisations import Dense, Isotropic
from .priors import IWP
from .problems import ODE
from .solution import Solution
from .solver import Solver


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
    """Solve ``u' = f(t, u, args)`` over ``t_span = (t0, t1)`` with uncertainty.

    ``method``: ``"EK1"`` (first-order linearisation, dense covariance: stiff and small problems) or ``"EK0"`` (zeroth
    order, isotropic: large problems that are not stiff). ``num_derivatives``: of the integrated Wiener process; the
    method's order is one more. ``t_eval``: times to keep, ``t1`` alone by default. Raises ``ValueError`` for an unknown
    method or a ``t_span`` that is not a pair, and as ``Solver.solve``.
    """
    methods = {"EK0": (TS0, Isotropic()), "EK1": (TS1, Dense())}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(map(repr, methods))}, got {method!r}.")
    if dense_output:
        raise ValueError("dense_output=True needs a smoother, which this version does not have; use t_eval.")
    if not isinstance(t_span, (tuple, list)) or len(t_span) != 2:
        raise ValueError(f"t_span must be a pair (t0, t1), got {t_span!r}.")
    constraint, factorisation = methods[method]
    solver = Solver(
        prior=IWP(num_derivatives),
        constraint=constraint(ODE(vector_field)),
        factorisation=factorisation,
        controller=IntegralController(rtol=rtol, atol=atol),
    )
    t0, t1 = t_span
    return solver.solve(u0, t0, t1, args=args, save_at=t_eval)
