"""How a solve ended, and in which words it says why it stopped."""

from typing import Any

import equinox as eqx


class Result(eqx.Enumeration):
    """How a solve ended: ``successful`` or the reason why it stopped before ``t1``.

    >>> import probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
    >>> bool(solution.result == probode.Result.successful)
    True
    """

    # (``Any``: members are no strings, as a type checker believes.)
    successful: Any = ""
    max_steps_reached: Any = (
        "The solve stopped because max_steps attempts were made before t1. Pass loop=BoundedLoop(max_steps=...) with "
        "more steps, loosen the tolerances, or use TS1 if the problem is stiff. Where components differ in size by "
        "orders of magnitude, prior=RelativeScale(IWP(...)); far from linear, TS1(evaluations=4, relinearise=True)."
    )
    initial_state_nonfinite: Any = (
        "The solve did not start because the state at t0 is infinite or NaN: u0, or a derivative of the vector field "
        "there; or because no derivatives satisfy a Residual together with u0. Move t0 away from the singularity, pass "
        "a consistent u0, or start from an InitialState."
    )
    nonfinite: Any = (
        "The solve stopped because the vector field, its derivative or the state became infinite or NaN however short "
        "the step. The solution may blow up or leave the domain of the vector field: shorten the interval. Or its "
        "derivatives leave the range of the numbers, in float32 those of short times: choose other units, or float64."
    )
    step_size_too_small: Any = (
        "The solve stopped because the step had to become shorter than dt_min or the round-off of the time. "
        "The solution may be singular there: shorten the interval, loosen the tolerances, lower dt_min, use float64, "
        "or name the times at which the equation jumps with stop_at."
    )
    scale_mismatch: Any = (
        "The solve stopped because the output scale does not explain the residuals: the equation jumps, or the "
        "solution is far rougher in some places than in others, and the mean would be lost. Use DynamicCalibration(), "
        "whose scale follows, name the times of jumps with stop_at, or tighten the tolerances."
    )
    tolerance_out_of_range: Any = (
        "The solve stopped because what rtol and atol allow for a component, or on a grid the eighth digit of all, "
        "became so small that the squares of such errors are no numbers (1e-148 in float64, 1e-35 in float32). Choose "
        "other units, or a larger atol."
    )
