"""Whether filters that observe all derivatives are stable at every order: `python -m benchmarks.stability`.

All end-point problems that are not stiff, `TS0(ode.lifted(nu - 1), evaluations=3)` with `IWP(nu)`, nu from 3 to 11, at
relative tolerances from 1e-3 to 1e-12 (atol a thousandth of it): attempts, the share of them that is rejected, and the
error at the end, relative to the largest component.
"""

from __future__ import annotations

import argparse

import jax

from . import peers, tables
from .problems import PROBLEMS
from .timing import parse, result_file, versions, write_rows


ORDERS = range(3, 12)
TOLERANCES = tuple(10.0**-k for k in range(3, 13))


def measure(name: str, nu: int) -> list[dict]:
    """A row for every tolerance: a problem solved with `nu` derivatives."""
    problem = PROBLEMS[name]
    rows = []
    for rtol in TOLERANCES:
        outcome = peers.probode(problem, rtol, 1e-3 * rtol, method="Taylor", num_derivatives=nu, error="local")()
        attempts, accepted = int(outcome.steps), int(outcome.accepted_steps)
        row = {"problem": name, "num_derivatives": nu, "rtol": rtol, "attempts": attempts}
        rows.append(row | {"rejected": 1 - accepted / attempts, "error": problem.error(outcome.u)})
    return rows


def main() -> None:
    """Measure, print the table, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability", description=__doc__.splitlines()[0])
    options = parse(parser)

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    rows = []
    for nu in ORDERS:
        of_order = [row for name, problem in PROBLEMS.items() if not problem.stiff for row in measure(name, nu)]
        rows += of_order
        print(f"nu = {nu}: {len(of_order)} solves", flush=True)
    print(tables.stability_of(rows))
    shared = versions()
    write_rows(result_file("stability", options.output), [row | shared for row in rows])


if __name__ == "__main__":
    main()
