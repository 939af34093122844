"""Time of filters and smoothers: `python -m benchmarks.smoothing [--plain]`.

Lotka-Volterra on [0, 50] with 100 save times at a tolerance of 1e-6: probode's filter and its two smoothers, and the
fixed-point smoother of probdiffeq, whose fixed-interval smoother needs a grid. All are compiled in one process and run
in turns.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

from . import peers
from .problems import PROBLEMS
from .timing import Table, compare, parse


TOLERANCE = 1e-6
TIMES = np.linspace(0.0, 50.0, 100)
END = np.array([6.479896814873224, 2.883884183537968])


def main() -> None:
    """Measure, print and write the table."""
    options = parse(argparse.ArgumentParser(prog="python -m benchmarks.smoothing", description=__doc__.splitlines()[0]))

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    table = Table("smoothing", options.output)
    for name, timing in compare({name: (fn, ()) for name, fn in [*_ours(), *_theirs()]}).items():
        error = float(np.max(abs(np.asarray(timing.value[0])[-1] - END)))
        table.add("Lotka-Volterra, 100 times", name, timing, error=error)
    table.write()


def _ours():
    import probode

    problem = PROBLEMS["lotka_volterra"]
    ode = probode.ODE(problem.vector_field)
    strategies = (probode.Filter(), probode.FixedPointSmoother(), probode.FixedIntervalSmoother())
    integral = probode.IntegralController(TOLERANCE, TOLERANCE)
    pi = probode.PIController(TOLERANCE, TOLERANCE)
    for method, nu, error, controller in (
        ("EK0", 3, probode.ResidualError(), integral),
        ("EK0", 5, probode.ResidualError(), integral),
        ("EK0 twice", 4, probode.ResidualError(), integral),
        ("EK0 twice", 5, probode.ResidualError(), integral),
        ("EK0 twice", 4, probode.StateError(), pi),
        ("EK0 twice", 5, probode.StateError(), pi),
        ("EK1", 4, probode.ResidualError(), integral),
        ("Taylor", 5, probode.LocalError(), integral),
    ):
        prior, constraint, factorisation = peers.probode_method(method, ode, nu)
        label = f"probode {method}({nu}) {'state ' if isinstance(error, probode.StateError) else ''}"
        for strategy in strategies:
            solver = probode.Solver(
                prior,
                constraint,
                factorisation=factorisation,
                strategy=strategy,
                error=error,
                controller=controller,
                loop=probode.ForwardLoop(max_steps=2048),
            )

            def solve(solver=solver):
                solution = solver.solve(problem.u0, 0.0, 50.0, args=problem.args, save_at=TIMES, throw=False)
                return solution.mean, solution.std

            yield label + type(strategy).__name__, solve


def _theirs():
    from probdiffeq import ivpsolve
    from probdiffeq import probdiffeq as parts

    problem = PROBLEMS["lotka_volterra"]
    for method, nu, error in (
        ("TS0", 3, "residual"),
        ("TS0", 3, "state"),
        ("TS0", 5, "residual"),
        ("TS0", 5, "state"),
        ("TS1", 4, "residual"),
        ("TS1", 6, "state"),
    ):

        def solve(method=method, nu=nu, error=error):
            def field(u, *, t):
                return problem.vector_field(t, u, problem.args)

            ode = parts.ode(field, jacobian=parts.jacobian_materialize())
            coefficients, _ = parts.jetexpand_ode_padded_scan(num=nu)(ode, (problem.u0,), t=0.0)
            model, constraint = peers.probdiffeq_method(method, ode)
            estimate = {"residual": parts.error_residual_std, "state": parts.error_state_std}[error]
            run = ivpsolve.solve_adaptive_save_at(
                solver=parts.solver_dynamic(strategy=parts.strategy_smoother_fixedpoint(), constraint=constraint),
                error=estimate(constraint=constraint),
                control=ivpsolve.control_proportional_integral(),
            )
            prior = model.prior_wiener_integrated(coefficients)
            solution = run(prior, save_at=TIMES, rtol=TOLERANCE, atol=TOLERANCE, dt0=0.01)
            return solution.u.mean[0], solution.u.std[0]

        yield f"probdiffeq {method}({nu}) {error} fixed-point", solve


if __name__ == "__main__":
    main()
