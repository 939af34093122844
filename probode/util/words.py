"""Words of SciPy, diffrax and other packages for which this package has another one, and errors that name it."""

import functools as ft
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar


P = ParamSpec("P")
T = TypeVar("T")

_TOLERANCES = "tolerances are the controller's: Solver(..., controller=IntegralController(rtol=..., atol=...))"
_LIMITS = "the limits of steps are the controller's: Solver(..., controller=IntegralController(dt_min=..., dt_max=...))"
_STEPS = "the number of attempts is the loop's: Solver(..., loop=BoundedLoop(max_steps=...))"
_TIMES = "the times to keep are save_at=..., an array or a SaveAt"
_FIELD = "the vector field belongs to the solver: Solver(prior, TS1(ODE(vector_field)))"
_METHOD = "a method is the parts of a solver: Solver(IWP(4), TS1(ODE(f))), or solve_ivp(..., method='EK1')"
_EVENTS = "events=..., of solve or solve_ivp, is an Event(g) or several; solve_grid finds none, between its times"
_HAPPENED = "when events have happened is .events.t, the states there .events.mean"
_DENSE = "keep every step with save_at=SaveAt(dense=True), for Solution.evaluate(t)"
_GRADIENTS = "the loop decides what can be differentiated: Solver(..., loop=BoundedLoop() or CheckpointedLoop())"
_EXACT = "nothing is needed: Jacobians are exact, by automatic differentiation; others: ODE(f, jacobian=...)"

_JUMPS = ("stop_at", "jump_ts", "tcrit", "tstops", "d_discontinuities")
_JUMP = "times at which the equation jumps are"

_KEYWORDS = {
    **dict.fromkeys(("saveat", "save_at_ts", "ts", "t_eval", "teval", "tspan_eval", "t"), _TIMES),
    **dict.fromkeys(("t_span", "tspan"), "the interval is two arguments: solve(u0, t0, t1)"),
    **dict.fromkeys(("y0", "x0", "z0", "initial_value", "initial_values"), "the initial value is u0"),
    **dict.fromkeys(("dt", "first_step", "h0", "initial_step"), "the length of the first attempt is dt0=..., of solve"),
    **dict.fromkeys(("dense", "dense_output"), _DENSE),
    **dict.fromkeys(("rtol", "atol", "tol", "tolerance", "rtols", "atols"), _TOLERANCES),
    **dict.fromkeys(("max_step", "min_step", "dtmin", "dtmax", "dt_min", "dt_max"), _LIMITS),
    **dict.fromkeys(("stepsize_controller", "step_size_controller"), "steps are controlled by Solver(controller=...)"),
    **dict.fromkeys(("adjoint", "adjoint_method", "adjoint_options"), _GRADIENTS),
    **dict.fromkeys(("max_steps", "mxstep", "max_num_steps"), _STEPS),
    **dict.fromkeys(("terms", "term", "fun", "func", "f", "vf", "vector_field", "rhs", "ode"), _FIELD),
    **dict.fromkeys(("event", "events", "discrete_terminating_event", "terminal", "callback"), _EVENTS),
    **dict.fromkeys(("method", "algorithm", "alg"), _METHOD),
    **dict.fromkeys(("jac", "jacobian", "jac_sparsity", "Dfun"), _EXACT),
    **dict.fromkeys(("p", "params", "parameters", "theta"), "parameters of the vector field are args=..."),
    **dict.fromkeys(("progress_meter", "verbose"), "a progress meter is progress=TextProgress(), of solve"),
    **dict.fromkeys(("throw_errors", "raise_errors"), "whether failures are errors is throw=True or False, of solve"),
    **dict.fromkeys(_JUMPS, f"{_JUMP} the controller's: Solver(..., controller=IntegralController(stop_at=...))"),
    "solver_state": "a solve is resumed from u0=Solution.state",
    "num_derivatives": "the number of derivatives is the prior's: IWP(num_derivatives)",
    "nu": "the number of derivatives is the prior's: IWP(num_derivatives)",
    "order": "the order of the equation is ODE(f, order=...), that of the method follows from IWP(num_derivatives)",
    "diffusion": "how the output scale is set is Solver(calibration=...)",
    "correction": "the linearisation is the constraint: TS0 or TS1",
    "error_estimate": "the estimate of the error is Solver(error=...)",
    "error_norm": "the norm of the error is that of Solver(error=LocalError(norm=...))",
    "solver": "the solver is the object whose method solve is",
}

_ATTRIBUTES = {
    **dict.fromkeys(("y", "ys", "u", "us", "x", "xs", "states", "value", "values"), "the solution is .mean, with .std"),
    **dict.fromkeys(("ts", "times", "time", "grid"), "the times are .t"),
    **dict.fromkeys(("success", "successful", "retcode", "converged"), "compare .result == Result.successful"),
    **dict.fromkeys(("status", "message"), "how it ended is .result, in words summary()"),
    **dict.fromkeys(("sol", "interpolation", "interpolate", "dense_output", "ode_solution"), "any time is evaluate(t)"),
    **dict.fromkeys(("t_events", "y_events", "event_mask"), _HAPPENED),
    **dict.fromkeys(("nfev", "njev", "nlu", "num_steps", "nsteps"), 'numbers of steps are .stats["num_steps"]'),
    **dict.fromkeys(("num_accepted_steps", "num_rejected_steps"), "it is an entry of the dictionary .stats"),
    **dict.fromkeys(("t0", "t1"), "the times kept are .t, the end reached is .state.t"),
    **dict.fromkeys(("solver_state", "controller_state", "final_state"), "a solve goes on from .state"),
    **dict.fromkeys(("var", "variance", "cov"), "standard deviations are .std, the whole Gaussians .marginals"),
    **dict.fromkeys(("samples", "draw"), "joint samples are sample(key, shape)"),
    **dict.fromkeys(("du", "dy", "derivatives", "yp"), "the k-th derivative of u is derivative(k)"),
    "log_marginal_likelihood": "it is .log_likelihood",
    "sigma": "the calibrated scale is .output_scale, the standard deviation .std",
}


# What is different in the one-liner.
_IN_ONE_LINE = {
    **dict.fromkeys(("saveat", "save_at", "ts", "teval", "times"), "the times to keep are t_eval=..."),
    **dict.fromkeys(("t0", "t1", "tspan"), "the interval is one argument, t_span = (t0, t1)"),
    **dict.fromkeys(("fun", "func", "f", "terms", "term", "rhs", "ode"), "the vector field is the first argument"),
    **dict.fromkeys(("dense", "dense_solution"), "any time is dense_output=True, and then Solution.evaluate(t)"),
    **dict.fromkeys(
        ("min_step", "dtmin"), "the shortest step is controller=IntegralController(rtol, atol, dt_min=...)"
    ),
    **dict.fromkeys(("dtmax", "dt_max"), "the longest step is max_step=..."),
    **dict.fromkeys(("dt", "h0"), "the length of the first attempt is first_step=... (or dt0)"),
    **dict.fromkeys(("solver", "algorithm", "alg"), "it is method='EK1', 'EK0' or 'Taylor'"),
    **dict.fromkeys(("stepsize_controller", "step_size_controller"), "it is controller=..."),
    **dict.fromkeys(
        ("adjoint", "adjoint_method"), "what can be differentiated is loop=BoundedLoop() or CheckpointedLoop()"
    ),
    **dict.fromkeys(("max_num_steps", "mxstep"), "it is max_steps=..."),
    "vectorized": "nothing is needed: jax.vmap or solve_ensemble solve many at once",
    "order": (
        "equations of higher order are for a Solver(IWP(4), TS1(ODE(f, order=2))); that of the method follows from "
        "num_derivatives=..."
    ),
    **dict.fromkeys(_JUMPS, f"{_JUMP} controller=IntegralController(rtol, atol, stop_at=...)"),
    "prior": "take a Solver(prior, constraint), for other priors than IWP(num_derivatives)",
    "constraint": "take a Solver(prior, constraint), for other constraints than that of the method",
}


def hint_for_keyword(name: str, *, in_one_line: bool = False) -> str | None:
    """What this package calls an argument of other packages' solvers, in a few words; ``None`` for unknown words.

    ``in_one_line``: in ``solve_ivp``, not in a ``Solver``.
    """
    return _IN_ONE_LINE.get(name, _KEYWORDS.get(name)) if in_one_line else _KEYWORDS.get(name)


def hint_for_attribute(name: str) -> str | None:
    """What this package calls an attribute of other packages' solutions; ``None`` for unknown words."""
    return _ATTRIBUTES.get(name)


def hinted(fn: Callable[P, T]) -> Callable[P, T]:
    """``fn``, a function or method, with a ``TypeError`` for wrong arguments that says which there are.

    A wrapper that looks at the names, for neither ``**kwargs`` in a signature nor the text of Python's own error would
    do: the first hides misspelt words from type checkers and editors, the second is also that of errors further in.
    """
    parameters = inspect.signature(fn).parameters.values()
    names = {p.name for p in parameters} - {"self"}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    needed = [p.name for p in parameters if p.name in positional and p.default is p.empty]
    called, bound = fn.__qualname__.removesuffix(".__init__"), len(parameters) - len(names)

    @ft.wraps(fn)
    def checked(*args, **kwargs):
        given = len(args) - bound
        if given > len(positional) or not names.issuperset(kwargs) or not kwargs.keys() >= set(needed[given:]):
            raise TypeError(_wrong_arguments(called, names, positional, needed[given:], given, kwargs))
        return fn(*args, **kwargs)

    return checked


def _wrong_arguments(called, names, positional, needed, given, kwargs):
    form = f"{called}({', '.join(positional)}, ...)"
    for name in kwargs:
        if name not in names:
            hint = hint_for_keyword(name, in_one_line=called == "solve_ivp")
            others = ", ".join(sorted(names - set(positional)))
            return f"{called} has no argument {name!r}: {hint or f'it has {others}'}."
    if given > len(positional):
        return f"{form} takes {len(positional)} positional arguments, got {given}; others are passed by name."
    missing = ", ".join(name for name in needed if name not in kwargs)
    hint = " The interval is two arguments, not a pair." if missing == "t1" else ""
    return f"{form} needs {missing}, which was not passed.{hint}"
