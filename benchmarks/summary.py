"""What the results say: `python -m benchmarks.summary` prints the table of targets and draws the plots.

Reads the CSV files in `benchmarks/results/`, whatever of them is there; ratios are those of the fastest runs of the
fastest configurations at an error.
"""

from __future__ import annotations

import argparse
import csv
import math
import pathlib
from collections.abc import Callable

from .dimension import slope
from .timing import RESULTS


MISSING = float("nan")


def read(name: str, results: pathlib.Path = RESULTS) -> list[dict]:
    """The rows of a CSV file; none if it is not there."""
    file = results / f"{name}.csv"
    if not file.exists():
        return []
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def fastest(rows: list[dict], belongs: Callable[[dict], bool], target: float, column: str = "run_seconds_min") -> float:
    """Seconds of the fastest row with an error of at most `target`; infinity if none gets there."""
    own = [row for row in rows if belongs(row)]
    good = [float(row[column]) for row in own if float(row["error"]) <= target]
    return min(good, default=math.inf if own else MISSING)


def at_error(problem: str, target: float, against: Callable[[dict], bool], results: pathlib.Path) -> float:
    """How many times longer the peers take to an error than probode; `problem` names the file."""
    rows = read(f"work_precision_{problem}", results)
    return fastest(rows, against, target) / fastest(rows, _family("probode"), target)


def against(name: str, case: str, ours: str, theirs: str, results: pathlib.Path, target: float = math.inf) -> float:
    """The same in the tables of the other benchmarks, over methods whose names start so."""
    rows = [row for row in read(name, results) if row["case"].startswith(case)]
    if target == math.inf:
        rows = [{**row, "error": 0} for row in rows]
    return fastest(rows, _starts(theirs), target, "seconds_min") / fastest(rows, _starts(ours), target, "seconds_min")


def growth(method: str, results: pathlib.Path) -> float:
    """The exponent of time per step in the dimension."""
    rows = [
        row for row in read("dimension", results) if row["case"].startswith("Brusselator") and row["method"] == method
    ]
    if len(rows) < 2:
        return MISSING
    return slope({int(row["case"].split("=")[1]): float(row["seconds_min"]) for row in rows})


def compile_ratio(peer: str, results: pathlib.Path) -> float:
    """Compile seconds of a peer's end point of Lotka-Volterra over ours, EK0(4)."""
    rows = read("work_precision_lotka_volterra", results)
    theirs = min(
        (float(row["compile_seconds"]) for row in rows if row["configuration"].startswith(peer)), default=MISSING
    )
    ours = [float(row["compile_seconds"]) for row in rows if row["configuration"].startswith("EK0(4)")]
    return theirs / min(ours, default=MISSING)


def converged(problem: str, results: pathlib.Path) -> float:
    """The share of starts from which a tempered fit finds the parameters; not a ratio of times."""
    rows = read(f"tempering_{problem}", results)
    return next((1 - float(row["error"]) for row in rows if row["method"].endswith("tempered")), MISSING)


def targets(results: pathlib.Path = RESULTS) -> list[tuple[str, str, str, float, bool]]:
    """Work, peer, target, measured ratio (their time over ours), and whether it is met."""
    explicit = lambda row: row["family"] == "diffrax"  # noqa: E731

    def entry(work, peer, target, ratio):
        return work, peer, f"{target:.3g}", ratio, ratio >= target

    lv, pleiades = "lotka_volterra", "pleiades"
    stiff, hires = "van_der_pol_1e3", "hires"
    table = [
        entry("Lotka-Volterra, 1e-7", "probdiffeq", 20, at_error(lv, 1e-7, _family("probdiffeq"), results)),
        entry("  without the option", "probdiffeq", 8, at_error(f"{lv}_plain", 1e-7, _family("probdiffeq"), results)),
        entry("  ", "diffrax explicit", 0.5, at_error(lv, 1e-7, explicit, results)),
        entry("Lotka-Volterra, 1e-10", "diffrax explicit", 1, at_error(lv, 1e-10, explicit, results)),
        entry("Pleiades, 1e-7", "diffrax Dopri8", 1 / 1.5, at_error(pleiades, 1e-7, _label("Dopri8"), results)),
        entry("  ", "probdiffeq", 8, at_error(pleiades, 1e-7, _family("probdiffeq"), results)),
        entry("Van der Pol 1e3, 1e-8", "Kvaerno5", 30, at_error(stiff, 1e-8, _label("Kvaerno5"), results)),
        entry("  ", "probdiffeq", 12, at_error(stiff, 1e-8, _family("probdiffeq"), results)),
        entry("  ", "SciPy LSODA", 20, at_error(stiff, 1e-8, _label("LSODA"), results)),
        entry("HIRES, 1e-8", "Kvaerno5", 4, at_error(hires, 1e-8, _label("Kvaerno5"), results)),
        entry("  ", "probdiffeq", 4, at_error(hires, 1e-8, _family("probdiffeq"), results)),
    ]
    gradient = ("gradients", "Lotka-Volterra", "probode")
    table += [
        entry("gradient, Lotka-Volterra", "probdiffeq", 20, against(*gradient, "probdiffeq", results)),
        entry("  ", "Tsit5", 1 / 2.5, against(*gradient, "diffrax", results)),
        entry(
            "gradient, Van der Pol, 1e-6",
            "Kvaerno5",
            30,
            against("gradients", "Van der Pol", "probode", "diffrax", results, 1e-6),
        ),
    ]
    lanes = ("lanes", "1000 lanes float64")
    table += [
        entry("1000 lanes", "probdiffeq vmap", 30, against(*lanes, "probode", "probdiffeq", results)),
        entry("  ", "Tsit5 vmap", 1 / 3.5, against(*lanes, "probode", "diffrax", results)),
        entry("  plain vmap", "probdiffeq vmap", 5, against(*lanes, "probode EK0(3) vmap", "probdiffeq", results)),
        entry("  100 times, fixed-point", "probdiffeq", 8, _smoothing(results)),
    ]
    likelihood = against("inference", "Lotka-Volterra", "probode EK0(3) fenrir", "probdiffeq TS0", results)
    table.append(entry("likelihood and gradient, 100 data", "probdiffeq", 8, likelihood))
    for problem, target in (("pendulum", 1), ("lotka_volterra", 0.77)):
        table.append(entry(f"tempered fits, {problem}", "share that converges", target, converged(problem, results)))
    exponent = growth("probode EK0(3) isotropic", results)
    table.append(("Brusselator, d = 1e3 .. 1e6", "growth in d", "<= 1.1", exponent, exponent <= 1.1))
    for d in (1000, 10_000, 100_000, 1_000_000):
        ratio = against("dimension", f"Brusselator per step, d = {d}", "probode EK0(3) iso", "diffrax", results)
        if not math.isnan(ratio):
            table.append(entry(f"  per step, d = {d:.0e}", "Tsit5", 2, ratio))
    table.append(entry("compilation, EK0(4)", "probdiffeq", 1, compile_ratio("TS0(4)", results)))
    table.append(entry("  ", "Tsit5", 1 / 1.5, compile_ratio("Tsit5", results)))
    return table


def plots(results: pathlib.Path = RESULTS) -> None:
    """Work against precision, one picture per problem: the fastest configuration of each family and error."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plots.")
        return
    for file in sorted(results.glob("work_precision_*.csv")):
        rows = [row for row in read(file.stem, results) if 1e-13 < float(row["error"]) < 1]
        figure, axes = plt.subplots(figsize=(6, 4))
        for family in ("probode", "probdiffeq", "diffrax", "scipy"):
            # The lower envelope: nothing of the family is both faster and better.
            points = sorted(
                (float(r["error"]), 1e3 * float(r["run_seconds_min"])) for r in rows if r["family"] == family
            )
            envelope, best = [], math.inf
            for error, milliseconds in points:
                if milliseconds < best:
                    best = milliseconds
                    envelope.append((error, milliseconds))
            if envelope:
                axes.loglog(*zip(*envelope, strict=True), marker="o", markersize=3, label=family)
        axes.set(
            xlabel="relative error at the end", ylabel="milliseconds", title=file.stem.removeprefix("work_precision_")
        )
        axes.legend()
        figure.tight_layout()
        figure.savefig(file.with_suffix(".png"), dpi=120)
        plt.close(figure)


def _family(name):
    return lambda row: row["family"] == name


def _label(start):
    return lambda row: row["configuration"].startswith(start)


def _starts(method):
    return lambda row: row["method"].startswith(method)


def _smoothing(results):
    rows = [{**row, "error": 0} for row in read("smoothing", results)]
    ours = fastest(rows, lambda row: row["method"].endswith("FixedPointSmoother"), 1, "seconds_min")
    return fastest(rows, _starts("probdiffeq"), 1, "seconds_min") / ours


def main() -> None:
    """Print and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, metavar="DIR")
    results = parser.parse_args().output
    print(f"{'work':<36}{'against':<20}{'target':>10}{'measured':>10}   (their time over ours)")
    for work, peer, target, ratio, met in targets(results):
        verdict = "" if math.isnan(ratio) else "met" if met else "missed"
        print(f"{work:<36}{peer:<20}{target:>10}{ratio:>10.3g}   {verdict}")
    plots(results)


if __name__ == "__main__":
    main()
