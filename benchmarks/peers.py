"""Solvers of probode and its peers: a function per package, from `(problem, rtol, atol)` to a callable that solves.

Calling it waits for the result. Each package is used in its fastest way: everything inside one `jax.jit`, exact
Jacobians, only the end kept, no gradients. Tolerances are arguments of the compiled functions: as constants they would
be compiled anew for every tolerance.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .problems import Problem


MAX_STEPS = 2**17


class Outcome(NamedTuple):
    """The state at `t1`, attempted and accepted steps (`None` where a package does not tell)."""

    u: Any
    steps: Any = None
    accepted_steps: Any = None


def probode(
    problem: Problem,
    rtol: float,
    atol: float,
    *,
    method: str = "EK1",
    num_derivatives: int = 5,
    error: str = "residual",
    control: str = "integral",
    safety: float = 0.95,
    loop: str = "forward",
) -> Callable[[], Outcome]:
    """A callable that solves with probode, by a filter with an integrated Wiener process: see `probode_method`.

    "2nd EK0" solves the problem as an equation of second order, where it is one. The default loop is a plain while
    loop, like the loops of the peers.
    """
    solve = probode_function(problem, method, num_derivatives, error, control, safety, loop)
    return lambda: jax.block_until_ready(solve(problem.u0, problem.args, rtol, atol))


def probode_method(name: str, ode: Any, num_derivatives: int) -> tuple[Any, Any, Any]:
    """The prior, the constraint and the factorisation of a method.

    "EK0" and "EK1"; "EK0 twice" evaluates the vector field twice in each accepted step. "Taylor" observes all
    derivatives in every step, with three evaluations of their series, "Taylor twice" with two; "EK1 lifted" observes
    the first three, with the Jacobian. "EK1 modal" keeps pairs of directions, those of the Jacobian's Schur form.
    """
    import probode

    prior = probode.IWP(num_derivatives)
    if name.startswith("Taylor"):
        evaluations = 2 if name.endswith("twice") else 3
        lifted = ode.lifted(num_derivatives - ode.order)
        return prior, probode.TS0(lifted, evaluations=evaluations), probode.BlockDiagonal()
    return {
        "EK0": (prior, probode.TS0(ode), probode.Isotropic()),
        "EK0 twice": (prior, probode.TS0(ode, evaluations=2), probode.Isotropic()),
        "EK1": (prior, probode.TS1(ode), probode.Dense()),
        "EK1 modal": (prior, probode.TS1(ode), probode.Modal()),
        "EK1 lifted": (probode.RelativeScale(prior), probode.TS1(ode.lifted(2), evaluations=2), probode.Dense()),
    }[name]


def probode_error(name: str) -> Any:
    """The error estimate "residual", "state" or "local"."""
    import probode

    return {"residual": probode.ResidualError, "state": probode.StateError, "local": probode.LocalError}[name]()


@functools.cache
def probode_function(problem, method, num_derivatives, error, control, safety, loop):
    import probode

    second = method.startswith("2nd ")
    ode = probode.ODE(problem.acceleration, order=2) if second else probode.ODE(problem.vector_field)
    prior, constraint, factorisation = probode_method(method.removeprefix("2nd "), ode, num_derivatives)
    controllers = {
        "integral": probode.IntegralController,
        "pi": probode.PIController,
        "brisk pi": functools.partial(probode.PIController, integral=0.7),
    }
    loops = {"forward": probode.ForwardLoop, "bounded": probode.BoundedLoop, "checkpointed": probode.CheckpointedLoop}

    @jax.jit
    def solve(u0, args, rtol, atol):
        solver = probode.Solver(
            prior=prior,
            constraint=constraint,
            factorisation=factorisation,
            error=probode_error(error),
            controller=controllers[control](rtol=rtol, atol=atol, safety=safety),
            loop=loops[loop](max_steps=MAX_STEPS),
        )
        start = tuple(jnp.split(u0, 2)) if second else u0
        solution = solver.solve(start, problem.t0, problem.t1, args=args, throw=False)
        u = solution.mean[-1]
        u = jnp.concatenate([u, solution.derivative(1).mean[-1]]) if second else u
        return Outcome(u, solution.stats["num_steps"], solution.stats["num_accepted_steps"])

    return solve


def probdiffeq(
    problem: Problem,
    rtol: float,
    atol: float,
    *,
    method: str = "TS1",
    num_derivatives: int = 5,
    calibration: str = "dynamic",
    error: str = "residual",
    control: str = "integral",
) -> Callable[[], Outcome]:
    """A callable that solves with probdiffeq: TS0 (isotropic) or TS1 (dense, exact Jacobian), as a filter."""
    solve = probdiffeq_function(problem, method, num_derivatives, calibration, error, control)
    return lambda: jax.block_until_ready(solve(problem.u0, problem.args, rtol, atol))


def probdiffeq_method(name: str, ode: Any) -> tuple[Any, Any]:
    """The model and the constraint of "TS0" (isotropic) or "TS1" (dense)."""
    from probdiffeq import probdiffeq as parts

    if name == "TS0":
        model = parts.state_space_model_isotropic()
        return model, model.constraint_ode_ts0(ode)
    model = parts.state_space_model_dense()
    return model, model.constraint_ode_ts1(ode)


@functools.cache
def probdiffeq_function(problem, method, num_derivatives, calibration, error, control):
    from probdiffeq import ivpsolve
    from probdiffeq import probdiffeq as parts

    calibrations = {"dynamic": parts.solver_dynamic, "mle": parts.solver_mle}
    errors = {"residual": parts.error_residual_std, "state": parts.error_state_std}
    controls = {"integral": ivpsolve.control_integral, "pi": ivpsolve.control_proportional_integral}

    @jax.jit
    def solve(u0, args, rtol, atol):
        # the default Jacobian is a Monte Carlo estimate; this one is exact
        exact = parts.jacobian_materialize()
        if method.startswith("2nd "):
            ode = parts.ode_order_two(lambda u, du, *, t: problem.acceleration(t, u, du, args), jacobian=exact)
            start = tuple(jnp.split(u0, 2))
        else:
            ode = parts.ode(lambda u, *, t: problem.vector_field(t, u, args), jacobian=exact)
            start = (u0,)
        coefficients, _ = parts.jetexpand_ode_padded_scan(num=num_derivatives + 1 - len(start))(
            ode, start, t=problem.t0
        )
        model, constraint = probdiffeq_method(method.removeprefix("2nd "), ode)
        run = ivpsolve.solve_adaptive_terminal_values(
            solver=calibrations[calibration](strategy=parts.strategy_filter(), constraint=constraint),
            error=errors[error](constraint=constraint),
            control=controls[control](),
            while_loop=_at_most_max_steps,
        )
        rate = num_derivatives + 1
        dt0 = 0.01
        if len(start) == 1:
            dt0 = ivpsolve.dt0_adaptive(ode, start, problem.t0, error_contraction_rate=rate, rtol=rtol, atol=atol)
        prior = model.prior_wiener_integrated(coefficients)
        solution = run(prior, t0=problem.t0, t1=problem.t1, rtol=rtol, atol=atol, dt0=dt0)
        u = jnp.concatenate(solution.u.mean[:2]) if len(start) == 2 else solution.u.mean[0]
        return Outcome(u, None, solution.num_steps)

    return solve


def _at_most_max_steps(cond, body, init):
    """A while loop with a bound; probdiffeq's own never ends where steps become ever smaller, as on Robertson's."""
    import equinox.internal as eqxi

    return eqxi.while_loop(cond, body, init, max_steps=MAX_STEPS, kind="lax")


def diffrax(
    problem: Problem, rtol: float, atol: float, *, method: str = "Tsit5", pi: bool = False
) -> Callable[[], Outcome]:
    """A callable that solves with a Runge-Kutta method of diffrax; `pi` turns on proportional-integral control."""
    solve = diffrax_function(problem, method, pi)
    return lambda: jax.block_until_ready(solve(problem.u0, problem.args, rtol, atol))


@functools.cache
def diffrax_function(problem, method, pi):
    import diffrax

    gains = {"pcoeff": 0.3, "icoeff": 0.4} if pi else {}

    @jax.jit
    def solve(u0, args, rtol, atol):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(problem.vector_field),
            getattr(diffrax, method)(),
            t0=problem.t0,
            t1=problem.t1,
            dt0=None,
            y0=u0,
            args=args,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, **gains),
            adjoint=diffrax.ForwardMode(),
            max_steps=MAX_STEPS,
            throw=False,
        )
        return Outcome(solution.ys[-1], solution.stats["num_steps"], solution.stats["num_accepted_steps"])

    return solve


def scipy(problem: Problem, rtol: float, atol: float, *, method: str = "LSODA") -> Callable[[], Outcome]:
    """A callable that solves with `scipy.integrate.solve_ivp`; each evaluation of the field is a call into JAX."""
    from scipy.integrate import solve_ivp

    field, jacobian = _scipy_functions(problem)
    options = {"jac": jacobian} if method in ("LSODA", "Radau", "BDF") else {}

    def solve():
        span = problem.t0, problem.t1
        solution = solve_ivp(field, span, problem.u0, method=method, rtol=rtol, atol=atol, **options)
        u = solution.y[:, -1] if solution.success else np.full_like(problem.u0, np.nan)
        return Outcome(u, None, solution.t.size - 1)

    return solve


@functools.cache
def _scipy_functions(problem):
    field = jax.jit(lambda t, u: problem.vector_field(t, u, problem.args))
    jacobian = jax.jit(jax.jacfwd(field, argnums=1))
    return lambda t, u: np.asarray(field(t, u)), lambda t, u: np.asarray(jacobian(t, u))


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to use a package.

    `stiff`: for stiff problems only (`True`), for the others only (`False`), for both (`None`). `dense`: the cost grows
    with the cube of the dimension, which is worth it for small or stiff problems. `second`: for equations of
    second order.
    """

    family: str
    label: str
    build: Callable[[Problem, float, float], Callable[[], Outcome]]
    stiff: bool | None = None
    dense: bool = False
    second: bool = False

    def suits(self, problem: Problem) -> bool:
        """Whether the method is meant for problems like this one."""
        affordable = not self.dense or problem.stiff or problem.dim <= 8
        affordable = affordable and (problem.acceleration is not None or not self.second)
        return affordable and (self.stiff is None or self.stiff == problem.stiff)


FAMILIES = ("probode", "probdiffeq", "diffrax", "scipy")


def configurations(quick: bool = False) -> list[Configuration]:
    """The configurations of every package, or with `quick` only the leading ones."""
    every = [*_probode_configurations(), *_probdiffeq_configurations(), *_others()]
    return [configuration for configuration, leading in every if leading or not quick]


def _probode_configurations():
    # method, number of derivatives, error estimate, control, safety, leading
    table = [
        ("EK0", 4, "residual", "integral", 0.95, False),
        ("EK0", 5, "residual", "integral", 0.95, True),
        ("EK0", 5, "residual", "integral", 0.8, False),
        ("EK0", 5, "residual", "pi", 0.9, False),
        ("EK0", 5, "residual", "brisk pi", 0.9, True),
        ("EK0 twice", 5, "state", "integral", 0.95, True),
        ("EK0 twice", 5, "residual", "brisk pi", 0.9, False),
        ("EK0 twice", 5, "state", "pi", 0.9, False),
        ("EK0 twice", 6, "residual", "integral", 0.95, False),
        ("EK0 twice", 7, "residual", "integral", 0.95, True),
        ("EK0 twice", 7, "residual", "brisk pi", 0.9, False),
        ("EK0 twice", 7, "state", "pi", 0.9, False),
        ("EK0 twice", 8, "residual", "pi", 0.9, False),
        ("2nd EK0", 5, "residual", "integral", 0.95, False),
        ("2nd EK0", 6, "residual", "pi", 0.9, False),
        ("2nd EK0 twice", 6, "residual", "integral", 0.95, True),
        ("2nd EK0 twice", 7, "residual", "integral", 0.95, False),
        ("2nd EK0 twice", 8, "residual", "integral", 0.95, True),
        ("2nd EK0 twice", 8, "residual", "pi", 0.9, False),
        ("2nd EK0 twice", 9, "residual", "integral", 0.95, False),
        ("Taylor", 5, "local", "integral", 0.95, True),
        ("Taylor", 6, "local", "integral", 0.95, False),
        ("Taylor", 7, "local", "integral", 0.95, False),
        ("Taylor twice", 5, "local", "integral", 0.95, False),
        ("Taylor twice", 7, "local", "integral", 0.95, False),
        ("2nd Taylor", 7, "local", "integral", 0.95, True),
        ("2nd Taylor", 9, "local", "integral", 0.95, False),
        ("2nd Taylor twice", 8, "local", "integral", 0.95, False),
        ("EK1 lifted", 5, "local", "integral", 0.95, True),
        ("EK1 lifted", 7, "local", "integral", 0.95, False),
        ("EK1 modal", 4, "state", "integral", 0.95, False),
        ("EK1 modal", 5, "residual", "integral", 0.95, True),
        ("EK1 modal", 5, "residual", "brisk pi", 0.9, False),
        ("EK1", 5, "residual", "integral", 0.95, True),
        ("EK1", 5, "residual", "pi", 0.9, True),
        ("EK1", 5, "residual", "brisk pi", 0.9, False),
        ("EK1", 5, "residual", "pi", 0.7, False),
        ("EK1", 4, "residual", "pi", 0.9, False),
        ("EK1", 5, "state", "integral", 0.95, False),
        ("EK1", 5, "state", "brisk pi", 0.9, False),
        ("EK1", 5, "state", "pi", 0.9, False),
        ("EK1", 6, "state", "pi", 0.9, True),
        ("EK1", 6, "state", "brisk pi", 0.9, False),
        ("EK1", 7, "state", "pi", 0.9, False),
    ]
    for method, n, error, control, safety, leading in table:
        options = {"method": method, "num_derivatives": n, "error": error, "control": control, "safety": safety}
        build = functools.partial(probode, **options)
        label = f"{method}({n}) {error} {control} {safety}"
        yield Configuration("probode", label, build, *_purpose(method)), leading


def _probdiffeq_configurations():
    # method, number of derivatives, calibration, error estimate, control, leading
    table = [
        ("TS0", 4, "mle", "residual", "integral", False),
        ("TS0", 5, "mle", "residual", "integral", False),
        ("TS0", 5, "mle", "residual", "pi", True),
        ("TS0", 5, "dynamic", "residual", "integral", False),
        ("2nd TS0", 5, "mle", "residual", "pi", False),
        ("2nd TS0", 6, "dynamic", "residual", "integral", True),
        ("2nd TS0", 6, "mle", "residual", "pi", False),
        ("2nd TS0", 7, "mle", "residual", "pi", False),
        ("TS1", 5, "dynamic", "residual", "integral", False),
        ("TS1", 5, "dynamic", "residual", "pi", True),
        ("TS1", 5, "dynamic", "state", "pi", False),
        ("TS1", 6, "dynamic", "state", "pi", True),
        ("TS1", 7, "dynamic", "residual", "pi", False),
        ("TS1", 7, "dynamic", "state", "pi", True),
        ("TS1", 8, "mle", "state", "pi", False),
    ]
    for method, n, calibration, error, control, leading in table:
        options = {"method": method, "num_derivatives": n, "calibration": calibration, "error": error}
        build = functools.partial(probdiffeq, control=control, **options)
        label = f"{method}({n}) {calibration} {error} {control}"
        yield Configuration("probdiffeq", label, build, *_purpose(method)), leading


def _others():
    for method, pi, stiff, leading in [
        ("Tsit5", False, False, True),
        ("Dopri8", False, False, True),
        ("Kvaerno5", False, True, True),
        ("Kvaerno5", True, True, False),
    ]:
        label = method + (" pi" if pi else "")
        yield Configuration("diffrax", label, functools.partial(diffrax, method=method, pi=pi), stiff), leading
    for method, stiff, leading in [("DOP853", False, False), ("LSODA", None, True), ("Radau", True, False)]:
        yield Configuration("scipy", method, functools.partial(scipy, method=method), stiff), leading


def _purpose(method):
    dense = method in ("EK1", "EK1 lifted", "EK1 modal", "TS1")
    stiff = True if method == "EK1 modal" else None if dense else False
    return stiff, dense, method.startswith("2nd ")


def available(family: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(family) is not None
