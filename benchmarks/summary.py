"""The table of targets and the plots, from the results of all benchmarks: `python -m benchmarks.summary`.

Reads the CSV files that are in `benchmarks/results/` and writes `summary.txt` beside them. A ratio compares the fastest
configurations that reach an error; there is one of the medians of the repeats, and one of their minima.
"""

from __future__ import annotations

import argparse
import csv
import math
import pathlib
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from .dimension import slope
from .timing import RESULTS


MISSING = float("nan")
SMOOTHERS = ("FixedPointSmoother", "FixedIntervalSmoother")
SMOOTHING_ERROR = 1e-5  # at a tolerance of 1e-6; StateError takes longer steps and may be off by a hundred times that

# Why targets are missed: where the time goes, and what was tried.
PLAIN = """XLA calls the operations of a loop one by one: 4 to 7 us per attempt, whatever they compute, against 0.3 to
0.5 with the option. Fewer attempts help: tried were all controllers, a better first step, second evaluations. A
smoother calls 45 operations per attempt and 54 per accepted step, at 90 ns each, and a tenth of its time goes to rows
kept for steps that were not taken; tried: one search for all save times, larger groups of them."""
EXPLICIT = """A filter takes the steps of a multistep method, about 400 where Dopri8 takes 64 of twelve stages, and
each pays 0.3 to 0.5 us for the factors of a covariance where the field costs nothing. Tried: orders 3 to 11,
StateError, six controllers, LAPACK and Householder's QR. Where the field costs something (Pleiades) it is ahead."""
PLEIADES = """The field takes 1.7 of the 2.8 us of an attempt, and is the same for both; fewer attempts are all that is
left. Tried: both forms of the equation, second evaluations (half the steps, twice the field)."""
STIFF = """730 attempts, of field, Jacobian and the QR of 12 columns; Kvaerno5 takes 1400 to 1800, ten times as dear.
Iterated linearisations and StateError take as many steps; other orders more time."""
HIRES = """The QR of 48 columns, which costs (n d)^3, is most of a step; steps are fewer than Kvaerno5's (227 against
568) and five times as dear. Tried: LAPACK, Householder's QR, the reduced basis, iterated linearisations."""
GRADIENT = """The reverse sweep costs about as much as the solve, as for Tsit5, and the solve is four times as long (see
Lotka-Volterra above). Tried: own rules for the derivatives of QR and of the step."""
STIFF_GRADIENT = """Kvaerno5's gradient is more accurate than its value: it reaches 1e-6 at a tolerance where its value
does not, and ours is as accurate as our value. Tried: EK1 of orders 4 to 6."""
LANES = """Lanes fill the SIMD registers, but each takes more than twice the attempts of Tsit5's, and an attempt costs
the factors of a covariance. Tried: blocks of 1 to 1000, lanes in the first and in the last axis, sorting by cost; XLA's
sums in place of a library's, which made plain vmap five times faster and blocks no faster."""
DIMENSION = """Bound by memory from 1e5 components on, where the ratio of what is read and written is 2 (times varied
between 1 and 2 on a shared machine); below, arrays lie in the cache and our fixed work per step counts."""
COMPILATION = """The loop holds two unrolled QR factorisations, Tsit5's seven evaluations of a small field. Tried: loops
instead (slower at run time), Taylor series of one size for all orders."""

TAKEN_AGAIN = """A gradient has the search for steps, the steps of a block taken again, and the derivative of one step:
three times the step. Tried: a checkpoint only inside of its branch (all constants are kept for every step) or only
around it (a fifth longer to compile), none (slower, and longer to compile)."""


def read(name: str, results: pathlib.Path = RESULTS) -> list[dict]:
    """The rows of a CSV file; none if it is not there."""
    file = results / f"{name}.csv"
    if not file.exists():
        return []
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def fastest(rows: list[dict], belongs: Callable[[dict], bool], target: float, column: str) -> float:
    """Seconds of the fastest row of a method with an error of at most `target`; an infinite `target` allows any error.

    Infinity if no row of the method is accurate enough, NaN if it has no rows.
    """
    own = [row for row in rows if belongs(row)]
    good = [float(row[column]) for row in own if target == math.inf or float(row["error"]) <= target]
    return min(good, default=math.inf if own else MISSING)


class Results:
    """The tables in a directory, read as ratios of times: of medians of the repeats, or of minima."""

    def __init__(self, directory: pathlib.Path = RESULTS, statistic: str = "median"):
        self.directory, self.statistic = directory, statistic

    def at_error(self, problem: str, target: float, against: Callable[[dict], bool]) -> float:
        """The time in which a peer reaches the error `target` over probode's; `problem` names the file."""
        rows, column = read(f"work_precision_{problem}", self.directory), f"run_seconds_{self.statistic}"
        return fastest(rows, against, target, column) / fastest(rows, _family("probode"), target, column)

    def against(self, name: str, case: str, ours: str, theirs: str, target: float = math.inf) -> float:
        """The same ratio from the table of another benchmark; `ours` and `theirs` are how names of methods begin."""
        rows = [row for row in read(name, self.directory) if row["case"].startswith(case)]
        column = f"seconds_{self.statistic}"
        return fastest(rows, _starts(theirs), target, column) / fastest(rows, _starts(ours), target, column)

    def smoothing(self, name: str, strategies: tuple[str, ...]) -> float:
        """The time of probdiffeq's fixed-point smoother over ours, each the fastest that reaches `SMOOTHING_ERROR`."""
        rows, column = read(name, self.directory), f"seconds_{self.statistic}"
        ours = fastest(rows, lambda row: row["method"].endswith(strategies), SMOOTHING_ERROR, column)
        return fastest(rows, _starts("probdiffeq"), SMOOTHING_ERROR, column) / ours

    def growth(self, method: str) -> float:
        """The exponent `p` in `time per step ~ dimension^p`."""
        rows = [
            row
            for row in read("dimension", self.directory)
            if row["case"].startswith("Brusselator") and row["method"] == method
        ]
        if len(rows) < 2:
            return MISSING
        return slope({int(row["case"].split("=")[1]): float(row[f"seconds_{self.statistic}"]) for row in rows})

    def compilation(self, peer: str) -> float:
        """The compile time of a peer over that of EK0(4), for the end point of Lotka-Volterra."""
        rows = read("work_precision_lotka_volterra", self.directory)
        theirs = [float(row["compile_seconds"]) for row in rows if row["configuration"].startswith(peer)]
        ours = [float(row["compile_seconds"]) for row in rows if row["configuration"].startswith("EK0(4)")]
        return min(theirs, default=MISSING) / min(ours, default=MISSING)

    def gradient_compilation(self, peer: str) -> float:
        """The compile time of a peer over that of EK0(3), for value and gradient of Lotka-Volterra."""
        rows = [row for row in read("gradients", self.directory) if row["case"].startswith("Lotka-Volterra")]
        theirs, ours = (
            fastest(rows, _starts(method), math.inf, "compile_seconds") for method in (peer, "probode EK0(3)")
        )
        return theirs / ours

    def memory_growth(self) -> float:
        """The exponent `p` in `memory of a gradient ~ max_steps^p`, `max_steps` being that of the loop."""
        rows = read("gradient_memory", self.directory)
        return slope({int(row["steps"]): float(row["bytes"]) for row in rows}) if rows else MISSING

    def converged(self, problem: str) -> float:
        """The share of starts from which a tempered fit finds the parameters; not a ratio of times."""
        rows = read(f"tempering_{problem}", self.directory)
        return next((1 - float(row["error"]) for row in rows if row["method"].endswith("tempered")), MISSING)


class Target(NamedTuple):
    """A line of the table: the target, the measured value, whether the target is met, and why it is missed if not."""

    work: str
    peer: str
    asked: str
    measured: float
    met: bool
    why: str = ""


def targets(results: Results) -> list[Target]:
    """All targets with the measured ratios, times of peers over times of probode."""

    def entry(work, peer, asked, measured, why=""):
        return Target(work, peer, f"{asked:.3g}", measured, measured >= asked, why)

    probdiffeq, explicit = _family("probdiffeq"), _family("diffrax")
    lv, stiff = "lotka_volterra", "van_der_pol_1e3"
    gradient, lanes = ("gradients", "Lotka-Volterra", "probode"), ("lanes", "1000 lanes float64")
    stiff_gradient = ("gradients", "Van der Pol", "probode", "diffrax", 1e-6)
    plain_vmap = results.against(*lanes, "probode EK0(3) vmap", "probdiffeq")
    exponent = results.growth("probode EK0(3) isotropic")
    table = [
        entry("Lotka-Volterra, 1e-7", "probdiffeq", 20, results.at_error(lv, 1e-7, probdiffeq)),
        entry("  without XLA's option", "probdiffeq", 8, results.at_error(f"{lv}_plain", 1e-7, probdiffeq), PLAIN),
        entry("Lotka-Volterra, 1e-7", "diffrax explicit", 0.5, results.at_error(lv, 1e-7, explicit), EXPLICIT),
        entry("Lotka-Volterra, 1e-10", "diffrax explicit", 1, results.at_error(lv, 1e-10, explicit), EXPLICIT),
        entry("Pleiades, 1e-7", "diffrax Dopri8", 1 / 1.5, results.at_error("pleiades", 1e-7, _label("Dopri8"))),
        entry("Pleiades, 1e-7", "probdiffeq", 8, results.at_error("pleiades", 1e-7, probdiffeq), PLEIADES),
        entry("Van der Pol 1e3, 1e-8", "Kvaerno5", 30, results.at_error(stiff, 1e-8, _label("Kvaerno5")), STIFF),
        entry("Van der Pol 1e3, 1e-8", "probdiffeq", 12, results.at_error(stiff, 1e-8, probdiffeq), STIFF),
        entry("Van der Pol 1e3, 1e-8", "SciPy LSODA", 20, results.at_error(stiff, 1e-8, _label("LSODA"))),
        entry("HIRES, 1e-8", "Kvaerno5", 4, results.at_error("hires", 1e-8, _label("Kvaerno5")), HIRES),
        entry("HIRES, 1e-8", "probdiffeq", 4, results.at_error("hires", 1e-8, probdiffeq), HIRES),
        entry("gradient, Lotka-Volterra", "probdiffeq", 20, results.against(*gradient, "probdiffeq")),
        entry("gradient, Lotka-Volterra", "Tsit5", 1 / 2.5, results.against(*gradient, "diffrax"), GRADIENT),
        entry("gradient, Van der Pol, 1e-6", "Kvaerno5", 30, results.against(*stiff_gradient), STIFF_GRADIENT),
        entry("1000 lanes", "probdiffeq vmap", 30, results.against(*lanes, "probode", "probdiffeq"), LANES),
        entry("1000 lanes", "Tsit5 vmap", 1 / 3.5, results.against(*lanes, "probode", "diffrax"), LANES),
        entry("1000 lanes, plain vmap", "probdiffeq vmap", 5, plain_vmap, LANES),
        entry("smoother, 100 times, 1e-5", "probdiffeq", 8, results.smoothing("smoothing", SMOOTHERS)),
        entry("  without XLA's option", "probdiffeq", 5, results.smoothing("smoothing_plain", SMOOTHERS), PLAIN),
        entry(
            "likelihood and gradient, 100 data",
            "probdiffeq",
            8,
            results.against("inference", "Lotka-Volterra", "probode EK0(3) fenrir", "probdiffeq TS0"),
        ),
        entry("tempered fits, pendulum", "share that converges", 1, results.converged("pendulum")),
        entry("tempered fits, Lotka-Volterra", "share that converges", 0.77, results.converged(lv)),
        Target("Brusselator, d = 1e3 .. 1e6", "growth in d", "<= 1.1", exponent, exponent <= 1.1),
    ]
    for d in (1000, 10_000, 100_000, 1_000_000):
        ratio = results.against("dimension", f"Brusselator per step, d = {d}", "probode EK0(3) iso", "diffrax")
        if not math.isnan(ratio):
            table.append(entry(f"  per step, d = {d:.0e}", "Tsit5", 2, ratio, DIMENSION))
    compiled, of_gradient = results.compilation, results.gradient_compilation
    memory = results.memory_growth()
    return [
        *table,
        entry("compilation, EK0(4)", "probdiffeq", 1, compiled("TS0(4)")),
        entry("compilation, EK0(4)", "Tsit5", 1 / 1.5, compiled("Tsit5"), COMPILATION),
        entry("  with its gradient, EK0(3)", "probdiffeq", 1, of_gradient("probdiffeq TS0(3)"), TAKEN_AGAIN),
        entry("  with its gradient, EK0(3)", "Tsit5", 1 / 1.5, of_gradient("diffrax Tsit5"), TAKEN_AGAIN),
        Target("gradient, CheckpointedLoop", "memory, growth in steps", "<= 0.5", memory, memory <= 0.5),
    ]


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
            # Only the lower envelope: rows for which no other row of the family is both faster and more accurate.
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


def report(results: pathlib.Path) -> str:
    """The table as text, and below it the reasons why targets are missed."""
    lines = [f"{'work':<36}{'against':<20}{'target':>10}{'medians':>10}{'minima':>10}   (their time over ours)"]
    reasons = {}
    by_medians, by_minima = (targets(Results(results, statistic)) for statistic in ("median", "min"))
    for target, least in zip(by_medians, by_minima, strict=True):
        verdict = "" if math.isnan(target.measured) else "met" if target.met else "missed"
        if verdict == "missed":
            verdict += f" [{reasons.setdefault(target.why, len(reasons) + 1)}]"
        numbers = f"{target.asked:>10}{target.measured:>10.3g}{least.measured:>10.3g}"
        lines.append(f"{target.work:<36}{target.peer:<20}{numbers}   {verdict}")
    for why, number in reasons.items():
        lines += ["", *textwrap.wrap(f"[{number}] {' '.join(why.split())}", 108)]
    return "\n".join(lines)


def main() -> None:
    """Print and write the table, draw the plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, metavar="DIR")
    results = parser.parse_args().output
    text = report(results)
    print(text)
    (results / "summary.txt").write_text(text + "\n")
    plots(results)


if __name__ == "__main__":
    main()
