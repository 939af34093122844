"""Work and precision: the time and the error of every configuration at several tolerances.

All configurations are compiled first, then timed in turns, so that a busy moment of the machine affects all of them.
The result is a CSV file per problem, a table, and the fastest configuration of each family at a target error.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import jax

from . import peers
from .problems import PROBLEMS, Problem
from .timing import in_turns, parse, result_file, small_loops, timed, versions, write_rows


TOLERANCES = tuple(10.0 ** (-k / 2) for k in range(6, 21))
QUICK_TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
COLUMNS = ["problem", "family", "configuration", "rtol", "atol", "error", "compile_seconds", "run_seconds_min"]
COLUMNS += ["run_seconds_median", "repeats", "steps", "accepted_steps", "jax", "probode", "probdiffeq", "diffrax"]
COLUMNS += ["scipy", "small_loops", "device"]


def main() -> None:
    """Measure the named problems, write `work_precision_NAME.csv`, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.work_precision", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--problem", action="append", choices=list(PROBLEMS), help="default: lotka_volterra; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="few configurations, tolerances and repeats")
    parser.add_argument("--target", type=float, default=1e-7, help="the error at which families are compared")
    options = parse(parser)

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    present = [family for family in peers.FAMILIES if peers.available(family)]
    for family in peers.FAMILIES:
        if family not in present:
            print(f"{family} is not installed: skipped.")
    chosen = [c for c in peers.configurations(options.quick) if c.family in present]
    tolerances = QUICK_TOLERANCES if options.quick else TOLERANCES
    budget = {"repeats": 5, "seconds": 0.3} if options.quick else {}
    for name in options.problem or ["lotka_volterra"]:
        rows = measure(PROBLEMS[name], chosen, tolerances, **budget)
        print(table(rows))
        print(ratios(rows, options.target))
        ordered = [{column: row[column] for column in COLUMNS} for row in rows]
        write_rows(result_file(f"work_precision_{name}", options.output), ordered)


def measure(
    problem: Problem,
    chosen: Sequence[peers.Configuration],
    tolerances: Sequence[float],
    *,
    repeats: int = 20,
    seconds: float = 0.5,
    patience: float = 2.0,
) -> list[dict]:
    """One row of `COLUMNS` for every suitable configuration and relative tolerance, loose ones first.

    `atol` is a thousandth of `rtol`. A row takes at most `repeats` runs, or three where they last more than `seconds`;
    a configuration stops at the first tolerance that takes longer than `patience` seconds.
    """
    shared = {**versions(), "small_loops": small_loops(), "device": jax.devices()[0].device_kind}
    rows, solves = [], []
    chosen = [configuration for configuration in chosen if configuration.suits(problem)]
    # The first program of a process, and the first of a package, take longer to compile: without these runs that would
    # count as compile time of the first configuration.
    for configuration in {configuration.family: configuration for configuration in reversed(chosen)}.values():
        timed(configuration.build(problem, tolerances[0], 1e-3 * tolerances[0]))
    jax.clear_caches()
    for configuration in chosen:
        first = None
        for rtol in tolerances:
            atol = 1e-3 * rtol
            solve = configuration.build(problem, rtol, atol)
            elapsed, outcome = timed(solve)
            if first is None:
                # one program serves all tolerances: what the first call took beyond a run was compilation
                again, outcome = timed(solve)
                first, elapsed = max(elapsed - again, 0.0), again
            row = {"problem": problem.name, "family": configuration.family, "configuration": configuration.label}
            row |= {"rtol": rtol, "atol": atol, "error": problem.error(outcome.u), "compile_seconds": first}
            row |= {"steps": _count(outcome.steps), "accepted_steps": _count(outcome.accepted_steps), **shared}
            rows.append(row)
            solves.append(solve)
            if elapsed > patience:
                break
    times = in_turns(solves, repeats=repeats, seconds=seconds)
    for row, taken in zip(rows, times, strict=True):
        row |= {"run_seconds_min": min(taken), "run_seconds_median": statistics.median(taken), "repeats": len(taken)}
    return rows


def table(rows: Sequence[dict]) -> str:
    """The rows as text, one line each."""
    lines = [f"{'family':<11}{'configuration':<33}{'rtol':>9}{'error':>10}{'ms':>10}{'median':>10}"]
    lines[0] += f"{'compile s':>11}{'steps':>9}{'accepted':>10}"
    for row in rows:
        line = f"{row['family']:<11}{row['configuration']:<33}{row['rtol']:>9.1e}{row['error']:>10.1e}"
        line += f"{1e3 * row['run_seconds_min']:>10.3f}{1e3 * row['run_seconds_median']:>10.3f}"
        lines.append(line + f"{row['compile_seconds']:>11.2f}{row['steps']:>9}{row['accepted_steps']:>10}")
    return "\n".join([f"{rows[0]['problem']} ({_environment(rows[0])})", *lines]) if rows else ""


def ratios(rows: Sequence[dict], target: float) -> str:
    """Per family, the fastest configuration with an error of at most `target` and its time relative to probode's."""
    best = {}
    for row in rows:
        fastest = best.get(row["family"])
        if row["error"] <= target and (fastest is None or row["run_seconds_min"] < fastest["run_seconds_min"]):
            best[row["family"]] = row
    lines = [f"fastest with an error of at most {target:.0e}:"]
    for family in peers.FAMILIES:
        if family not in best:
            lines.append(f"  {family:<11}none")
            continue
        row = best[family]
        line = f"  {family:<11}{row['configuration']:<33} rtol {row['rtol']:.1e}  error {row['error']:.1e}"
        line += f"  {1e3 * row['run_seconds_min']:9.3f} ms  compile {row['compile_seconds']:.2f} s"
        if "probode" in best:
            line += f"  {row['run_seconds_min'] / best['probode']['run_seconds_min']:8.2f} x probode"
        lines.append(line)
    return "\n".join(lines)


def _count(steps):
    return "" if steps is None else int(steps)


def _environment(row):
    versions = [f"{package} {row[package]}" for package in ("jax", *peers.FAMILIES) if row[package]]
    return ", ".join([*versions, f"small loops {'on' if row['small_loops'] else 'off'}", row["device"]])


if __name__ == "__main__":
    main()
