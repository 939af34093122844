"""Time of a value with its gradient, in reverse mode: `python -m benchmarks.gradients [--plain]`.

Each package uses a loop that can be differentiated. Lotka-Volterra on [0, 10] at rtol 1e-5: the sum of the components
at the end, with respect to initial values and parameters. Van der Pol with mu = 1000 on [0, 0.7]: the first component
at the end, with respect to mu, at several tolerances; methods are compared where the gradient has an error of 1e-6. A
second table has the memory of a gradient through loops of 100 to 100,000 steps.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from . import peers
from .problems import PROBLEMS
from .timing import Table, compare, parse, result_file, write_rows


# From the sensitivity equations, by SciPy's Radau, LSODA and BDF at 1e-12, which agree to nine digits.
VAN_DER_POL_SLOPE = -1.601940767e-6


def lotka_volterra() -> dict:
    """Functions that are timed, by name, each with its arguments: Lotka-Volterra."""
    problem = PROBLEMS["lotka_volterra"]
    point = jnp.asarray(problem.u0), jnp.asarray(problem.args)
    ours = {f"probode {label}": _probode(problem, 10.0, 1e-5, *options) for label, *options in _OURS}
    theirs = {
        "probdiffeq TS0(3)": _probdiffeq(problem, 10.0, 1e-5, "TS0", 3),
        "probdiffeq TS1(3)": _probdiffeq(problem, 10.0, 1e-5, "TS1", 3),
        "diffrax Tsit5 checkpointed": _diffrax(problem, 10.0, 1e-5, "Tsit5", False),
        "diffrax Tsit5 direct": _diffrax(problem, 10.0, 1e-5, "Tsit5", True),
    }

    def differentiated(solve):
        return jax.value_and_grad(lambda point: jnp.sum(solve(*point)))

    return {name: (differentiated(solve), (point,)) for name, solve in (ours | theirs).items()}


def van_der_pol() -> dict:
    """Functions that are timed, by name, each with its arguments: Van der Pol at several tolerances."""
    problem = PROBLEMS["van_der_pol_1e3"]
    programs = {}
    for exponent in (3, 4, 5, 6, 7):
        rtol = 10.0**-exponent
        solves = {
            "probode EK1(4)": _probode(problem, 0.7, rtol, "EK1", 4, "residual", 1024),
            "probode EK1(5)": _probode(problem, 0.7, rtol, "EK1", 5, "residual", 1024),
            "probode EK1(6)": _probode(problem, 0.7, rtol, "EK1", 6, "residual", 1024),
            "diffrax Kvaerno5": _diffrax(problem, 0.7, rtol, "Kvaerno5", False),
        }
        for name, solve in solves.items():
            slope = jax.value_and_grad(lambda mu, solve=solve: solve(jnp.asarray(problem.u0), mu)[0])
            programs[f"{name} {rtol:.0e}"] = slope, (jnp.asarray(problem.args, float),)
    return programs


_OURS = [
    ("EK0(3)", "EK0", 3, "residual", 256),
    ("EK0 twice(4)", "EK0 twice", 4, "residual", 256),
    ("EK0 twice(5)", "EK0 twice", 5, "residual", 256),
    ("Taylor twice(4)", "Taylor twice", 4, "local", 256),
    ("EK1(3)", "EK1", 3, "residual", 256),
    ("EK1(4) StateError", "EK1", 4, "state", 256),
]


def _probode(problem, t1, rtol, method, nu, error, max_steps, loop=None):
    import probode

    ode = probode.ODE(problem.vector_field)
    prior, constraint, factorisation = peers.probode_method(method, ode, nu)
    solver = probode.Solver(
        prior,
        constraint,
        factorisation=factorisation,
        error=peers.probode_error(error),
        controller=probode.IntegralController(rtol, rtol * 1e-2),
        loop=probode.BoundedLoop(max_steps) if loop is None else loop,
    )
    return lambda u0, args: solver.solve(u0, 0.0, t1, args=args, throw=False).mean[-1]


def _probdiffeq(problem, t1, rtol, method, nu):
    import equinox.internal as eqxi
    from probdiffeq import ivpsolve
    from probdiffeq import probdiffeq as parts

    def bounded(cond, body, init):
        return eqxi.while_loop(cond, body, init, max_steps=256, kind="bounded")

    def solve(u0, args):
        exact = parts.jacobian_materialize()
        ode = parts.ode(lambda u, *, t: problem.vector_field(t, u, args), jacobian=exact)
        coefficients, _ = parts.jetexpand_ode_padded_scan(num=nu)(ode, (u0,), t=0.0)
        model, constraint = peers.probdiffeq_method(method, ode)
        run = ivpsolve.solve_adaptive_terminal_values(
            solver=parts.solver_dynamic(strategy=parts.strategy_filter(), constraint=constraint),
            error=parts.error_residual_std(constraint=constraint),
            while_loop=bounded,
        )
        prior = model.prior_wiener_integrated(coefficients)
        return run(prior, t0=0.0, t1=t1, rtol=rtol, atol=rtol * 1e-2, dt0=0.01).u.mean[0]

    return solve


def _diffrax(problem, t1, rtol, method, direct):
    import diffrax

    def solve(u0, args):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(problem.vector_field),
            getattr(diffrax, method)(),
            0.0,
            t1,
            None,
            u0,
            args=args,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol * 1e-2),
            adjoint=diffrax.DirectAdjoint() if direct else diffrax.RecursiveCheckpointAdjoint(),
            max_steps=256 if method == "Tsit5" else 4096,
            throw=False,
        ).ys[-1]

    return solve


def memory() -> dict[int, int]:
    """Bytes of temporary memory that a gradient through a `CheckpointedLoop` takes, by the `max_steps` of the loop."""
    import probode

    problem = PROBLEMS["lotka_volterra"]
    sizes = {}
    for steps in (100, 1000, 10_000, 100_000):
        loop = probode.CheckpointedLoop(max_steps=steps)
        solve = _probode(problem, 10.0, 1e-5, "EK0", 3, "residual", None, loop)
        gradient = jax.jit(jax.grad(lambda u0, solve=solve: jnp.sum(solve(u0, problem.args))))
        analysis = gradient.lower(jnp.asarray(problem.u0)).compile().memory_analysis()
        sizes[steps] = analysis.temp_size_in_bytes
    return sizes


def main() -> None:
    """Measure, print and write both tables."""
    options = parse(argparse.ArgumentParser(prog="python -m benchmarks.gradients", description=__doc__.splitlines()[0]))

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    table = Table("gradients", options.output)
    sizes = memory()
    for steps, size in sizes.items():
        print(f"gradient through a CheckpointedLoop({steps}): {size} bytes of temporary memory", flush=True)
    rows = [{"steps": steps, "bytes": size, **table.shared} for steps, size in sizes.items()]
    write_rows(result_file("gradient_memory", options.output), rows)
    for name, timing in compare(lotka_volterra()).items():
        table.add("Lotka-Volterra", name, timing)
    for name, timing in compare(van_der_pol(), repeats=5).items():
        table.add("Van der Pol", name, timing, error=abs(float(timing.value[1]) / VAN_DER_POL_SLOPE - 1))
    table.write()


if __name__ == "__main__":
    main()
