"""What smoothing costs: `python -m benchmarks.smoothing [--plain]`.

Lotka-Volterra on [0, 50] with 100 save times at a tolerance of 1e-6: our filter, our two smoothers, and probdiffeq's
fixed-point smoother (its fixed-interval one needs a grid), in one process, repeats interleaved.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np


TOLERANCE = 1e-6
TIMES = np.linspace(0.0, 50.0, 100)
END = np.array([6.479896814873224, 2.883884183537968])


def main() -> None:
    """Read the options, set the flags of XLA, run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoothing", description="The cost of smoothing.")
    parser.add_argument("--plain", action="store_true", help="without probode's default for XLA's small loops")
    os.environ["PROBODE_SMALL_LOOPS"] = "0" if parser.parse_args().plain else "1"

    import jax

    import probode as probode  # before JAX starts

    jax.config.update("jax_enable_x64", True)
    programs, compile_seconds, outcomes = {}, {}, {}
    for label, fn in [*_ours(), *_theirs()]:
        start = time.perf_counter()
        programs[label] = jax.jit(fn).lower().compile()
        compile_seconds[label] = time.perf_counter() - start
        outcomes[label] = jax.block_until_ready(programs[label]())
    best = dict.fromkeys(programs, np.inf)
    for _ in range(20):
        for label, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            best[label] = min(best[label], time.perf_counter() - start)
    print(f"{'':34} {'ms':>7} {'error at the end':>17} {'compile s':>10}")
    for label in programs:
        error = np.max(abs(np.asarray(outcomes[label][0])[-1] - END))
        print(f"{label:34} {1e3 * best[label]:7.3f} {error:17.1e} {compile_seconds[label]:10.1f}")


def _ours():
    import probode

    from .problems import PROBLEMS

    problem = PROBLEMS["lotka_volterra"]
    kinds = {"EK0": (probode.TS0, probode.Isotropic()), "EK1": (probode.TS1, probode.Dense())}
    strategies = (probode.Filter(), probode.FixedPointSmoother(), probode.FixedIntervalSmoother())
    for method, nu in (("EK0", 3), ("EK0", 5), ("EK1", 4)):
        constraint, factorisation = kinds[method]
        for strategy in strategies:
            solver = probode.Solver(
                probode.IWP(nu),
                constraint(probode.ODE(problem.vector_field)),
                factorisation=factorisation,
                strategy=strategy,
                controller=probode.IntegralController(TOLERANCE, TOLERANCE),
                loop=probode.ForwardLoop(max_steps=2048),
            )

            def solve(solver=solver):
                solution = solver.solve(problem.u0, 0.0, 50.0, args=problem.args, save_at=TIMES, throw=False)
                return solution.mean, solution.std

            yield f"probode {method}({nu}) {type(strategy).__name__}", solve


def _theirs():
    from probdiffeq import ivpsolve
    from probdiffeq import probdiffeq as parts

    from .problems import PROBLEMS

    problem = PROBLEMS["lotka_volterra"]
    for method, nu, error in (
        ("TS0", 3, "residual"),
        ("TS0", 5, "residual"),
        ("TS1", 4, "residual"),
        ("TS1", 6, "state"),
    ):

        def solve(method=method, nu=nu, error=error):
            def field(u, *, t):
                return problem.vector_field(t, u, problem.args)

            ode = parts.ode(field, jacobian=parts.jacobian_materialize())
            coefficients, _ = parts.jetexpand_ode_padded_scan(num=nu)(ode, (problem.u0,), t=0.0)
            if method == "TS0":
                model = parts.state_space_model_isotropic()
                constraint = model.constraint_ode_ts0(ode)
            else:
                model = parts.state_space_model_dense()
                constraint = model.constraint_ode_ts1(ode)
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
