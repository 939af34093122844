"""How a solve ended, and the sentence that says why it did not reach ``t1``."""

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool


class Result(eqx.Enumeration):
    """How a solve ended: ``successful``, ``event`` if one has ended it, or the reason why it stopped before ``t1``.

    It is printed with its name, and ``Result[result]`` is that name.

    >>> import probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
    >>> bool(solution.result == probode.Result.successful)
    True
    >>> print(solution.result)
    probode.Result<successful>
    """

    # Equinox prints the module and the words of an item: here the name that a user types.
    __module__ = "probode"

    # (``Any``: members are no strings, as a type checker believes.)
    successful: Any = "successful"
    max_steps_reached: Any = "max_steps_reached"
    initial_state_nonfinite: Any = "initial_state_nonfinite"
    nonfinite: Any = "nonfinite"
    step_size_too_small: Any = "step_size_too_small"
    scale_mismatch: Any = "scale_mismatch"
    tolerance_out_of_range: Any = "tolerance_out_of_range"
    event: Any = "event"
    max_events_reached: Any = "max_events_reached"
    max_nodes_reached: Any = "max_nodes_reached"
    singular: Any = "singular"
    no_progress: Any = "no_progress"


_WHY = {
    "max_steps_reached": "The solve stopped because max_steps attempts were made before t1.",
    "initial_state_nonfinite": "The solve did not start because the state at t0 is infinite or NaN.",
    "nonfinite": "The solve stopped because the vector field, its derivative or the state became infinite or NaN, "
    "however short the step.",
    "step_size_too_small": "The solve stopped because the step had to become shorter than dt_min or the round-off of "
    "the time.",
    "scale_mismatch": "The solve stopped because the output scale does not explain the residuals, and the mean would "
    "be lost.",
    "tolerance_out_of_range": "The solve stopped because what rtol and atol allow for a component became so small that "
    "the squares of such errors are no numbers (1e-148 in float64, 1e-35 in float32).",
    "event": "The solve ended at an event.",
    "max_nodes_reached": "The boundary value problem was not solved: with max_nodes nodes the error is larger than the "
    "tolerances.",
    "singular": "The boundary value problem was not solved: its conditions do not determine a solution.",
    "no_progress": "The boundary value problem was not solved: Newton's method does not converge from the guess.",
    "max_events_reached": "The solve stopped because more events happened than max_events, or infinitely many at one "
    "time.",
}


def has_failed(result: Result) -> Bool[Array, "*lanes"]:
    """Whether a solve with this result stopped before ``t1`` for a reason that nobody asked for."""
    return (result != Result.successful) & (result != Result.event)


def in_words(result: Result) -> str:
    """How a solve with this result, which is known, has ended; of a batch how many were successful."""
    failed = np.asarray(has_failed(result))
    if failed.ndim:
        return f"{failed.size} solves, of which {int(np.sum(~failed))} successful"
    name: str = Result[result]  # type: ignore[misc]  # equinox's enumerations have words
    return f"{name}: {_WHY[name]}" if failed else name
