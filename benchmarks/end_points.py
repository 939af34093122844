"""Errors of probode at the end points of all problems: run `python -m benchmarks.end_points`.

Every problem is solved by EK1 (dense; five derivatives, four for more than eight components), and by EK0 (isotropic)
unless it is stiff, at rtol 1e-9 and atol 1e-12 in float64. `error` is relative to the largest component.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax

from .problems import PROBLEMS, Problem


MAX_STEPS = 2**17


def end_point(problem: Problem, method: str, *, rtol: float = 1e-9, atol: float = 1e-12) -> Any:
    """The solution at `t1` by `"EK0"` or `"EK1"`; a solve that stops early raises nothing, its `result` says so."""
    import probode

    ode = probode.ODE(problem.vector_field)
    if method == "EK0":
        parts = {"prior": probode.IWP(5), "constraint": probode.TS0(ode), "factorisation": probode.Isotropic()}
    else:
        prior = probode.IWP(5 if problem.dim <= 8 else 4)
        parts = {"prior": prior, "constraint": probode.TS1(ode), "factorisation": probode.Dense()}
    controller = probode.IntegralController(rtol=rtol, atol=atol)
    solver = probode.Solver(**parts, controller=controller, loop=probode.BoundedLoop(max_steps=MAX_STEPS))
    return solver.solve(problem.u0, problem.t0, problem.t1, args=problem.args, throw=False)


def main() -> None:
    """Solve the problems named on the command line, or all, and print one line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_points", description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", metavar="NAME", help=f"of {', '.join(PROBLEMS)}")
    names = parser.parse_args().problems or list(PROBLEMS)
    jax.config.update("jax_enable_x64", True)

    import probode

    print(f"{'problem':<22}{'method':<8}{'error':>9}{'accepted':>10}{'steps':>8}  result")
    for name in names:
        problem = PROBLEMS[name]
        for method in ("EK1",) if problem.stiff else ("EK1", "EK0"):
            solution = end_point(problem, method)
            result = "successful" if solution.result == probode.Result.successful else str(solution.result)
            steps, accepted = int(solution.stats["num_steps"]), int(solution.stats["num_accepted_steps"])
            error = problem.error(solution.mean[-1])
            print(f"{name:<22}{method:<8}{error:>9.1e}{accepted:>10}{steps:>8}  {result}", flush=True)


if __name__ == "__main__":
    main()
