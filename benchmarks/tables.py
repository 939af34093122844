"""Figures in `benchmarks/README.md`, from the CSV files: `python -m benchmarks.tables` writes its tables anew.

A table stands between `<!-- table: speed -->` and `<!-- end -->`. `quoted` are the phrases of the text around them that
hold figures; these are written by hand, and a test compares both with what the page says.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import summary
from .timing import RESULTS


PAGE = pathlib.Path(__file__).parent / "README.md"
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
TARGET = 1e-7
ANY = math.inf  # where a table has no errors, or all solve to the same tolerance


class Run(NamedTuple):
    """A row of a CSV file: whose solver it was, its parts, seconds of the fastest repeat, and the error."""

    family: str
    parts: str
    seconds: float
    error: float

    @property
    def name(self) -> str:
        """The method alone, as in `EK0(5) twice evaluated`."""
        found = re.match(r"(?:2nd )?(\w+)( lifted| modal)?( twice)?(\(\d+\))?", self.parts)
        method, kind, twice, order = found.groups(default="")
        return f"{method}{kind}{order}{twice and ' twice evaluated'}"


class Race(NamedTuple):
    """A row of the table of speed: what is solved, where the CSV file has it, which runs are ours, and the error."""

    work: str
    file: str
    case: str = ""
    ours: str = ""
    error: float = TARGET


RACES = (
    Race("Lotka-Volterra on [0, 50]", "work_precision_lotka_volterra"),
    Race("FitzHugh-Nagumo on [0, 20]", "work_precision_fitzhugh_nagumo"),
    Race("Pleiades, as an equation of second order", "work_precision_pleiades", ours="2nd"),
    Race("Van der Pol, mu = 1000, on [0, 2.1]", "work_precision_van_der_pol_1e3"),
    Race("Van der Pol, mu = 100,000", "work_precision_van_der_pol_1e5"),
    Race("HIRES, 8 components", "work_precision_hires"),
    Race("Robertson", "work_precision_robertson"),
    Race("Brusselator on a line, 64 components, stiff", "work_precision_brusselator_1d_32"),
    Race("value and gradient, Lotka-Volterra on [0, 10], rtol 1e-5", "gradients", "Lotka-Volterra", error=ANY),
    Race("1000 lanes of it, end points", "lanes", "1000 lanes float64", error=ANY),
    Race("the same, `jax.vmap` alone", "lanes", "1000 lanes float64", "vmap", ANY),
    Race("Fenrir's likelihood and gradient, 100 data", "inference", "Lotka-Volterra, 100 data", "fenrir", ANY),
    Race("fixed-point smoother, 100 times, rtol 1e-6, error below 1e-5", "smoothing", ours="FixedPoint", error=1e-5),
    Race("a million components, one step", "dimension", "Brusselator per step, d = 1000000", error=ANY),
)
CALIBRATED = {
    "EK1 leave one out": "`TS1`, `LeaveOneOutCalibration()`",
    "EK1 dynamic": "`TS1`, `DynamicCalibration()`",
    "EK1 mle": "`TS1`, `MLECalibration()`",
    "EK0 twice leave one out": "`TS0(ode, evaluations=2)`, `BlockDiagonal()`, `LeaveOneOutCalibration()`",
    "EK0 twice dynamic, per component": "the same, `DynamicCalibration()`",
    "EK0 dynamic, per component": "`TS0(ode)`, `BlockDiagonal()`, `DynamicCalibration()`",
}
SENSITIVE = ("pleiades", "arenstorf_three_body")
EVENT_COSTS = ("run", "compile", "gradient_run", "gradient_compile")
FITS = {"pendulum": "pendulum, length", "lotka_volterra": "Lotka-Volterra, two rates"}


def tables(results: pathlib.Path = RESULTS) -> dict[str, str]:
    """The tables of the page, by the names in its marks."""
    return {
        "speed": speed(results),
        "gpu": gpu(results),
        "calibration": calibration(results),
        "tempering": tempering(results),
        "nuts": nuts(results),
        "checks": checks(results),
        "events": events(results),
        "boundary_values": boundary_values(results),
        "stability": stability(results),
        "first_calls": first_calls(results),
    }


def renewed(text: str, results: pathlib.Path = RESULTS) -> str:
    """The text with what stands between its marks made anew. It must have a place for every table."""
    made = tables(results)
    marks = [match[1] for match in MARKED.finditer(text)]
    if sorted(marks) != sorted(made):
        raise ValueError(f"the page must mark each of the tables {sorted(made)} once, but it marks {sorted(marks)}.")
    return MARKED.sub(lambda match: f"{match[1]}{match[2]}\n{made[match[1]]}\n\n", text)


def speed(results: pathlib.Path = RESULTS) -> str:
    """The table of how many times longer the peers take, each in its fastest configuration that is accurate enough."""
    rows = []
    for race in RACES:
        found = runs(race.file, race.case, results)
        ours = fastest(found, "probode", race.error, race.ours)
        times = [_ratio(found, peer, race.error, ours.seconds) for peer in ("probdiffeq", "diffrax", "scipy")]
        rows.append([race.work, f"{ours.name}, {significant(1e3 * ours.seconds)} ms", *times])
    return _table(["", "probode", "probdiffeq", "diffrax", "SciPy"], rows)


def gpu(results: pathlib.Path = RESULTS) -> str:
    """The table of milliseconds of many solves at once on a GPU."""
    rows = []
    for lanes, work in ((1000, "1000 lanes"), (100_000, "100,000 lanes")):
        double, single = (runs("lanes_gpu", f"{lanes} lanes float{bits}", results) for bits in (64, 32))
        shown = (fastest(double, "probode", ANY), fastest(single, "probode", ANY), fastest(double, "diffrax", ANY))
        rows.append([work, *(f"{run.name}, {significant(1e3 * run.seconds)} ms" for run in shown)])
    return _table(["one H200", "probode, double", "probode, single", "diffrax, double"], rows)


def calibration(results: pathlib.Path = RESULTS) -> str:
    """The table of shares of solves whose uncertainty is of about the right size, and of how far it spreads."""
    rows = []
    for method, words in CALIBRATED.items():
        ratios = _trajectories("calibration", method, results)
        rows.append([words, str(len(ratios)), share(ratios, 10), share(ratios, 100), spread(ratios)])
    return _table(["", "solves", "`chi^2 / d` in [0.01, 10]", "in [0.01, 100]", "5 % .. 95 %"], rows)


def tempering(results: pathlib.Path = RESULTS) -> str:
    """The table of shares of starts from which a fit finds the parameters."""
    methods, rows = ("least squares", "Fenrir", "Fenrir, tempered", "fit, 8 starts"), []
    for problem, words in FITS.items():
        lost = {row["method"]: float(row["error"]) for row in summary.read(f"tempering_{problem}", results)}
        rows.append([words, *(f"{1 - lost[method]:.2f}" for method in methods)])
    return _table(["", *methods], rows)


def nuts(results: pathlib.Path = RESULTS) -> str:
    """The table of what a gradient costs within NUTS."""
    rows = [[row["method"], significant(1e6 * float(row["seconds_min"]))] for row in summary.read("nuts", results)]
    return _table(["", "microseconds per gradient"], rows)


def checks(results: pathlib.Path = RESULTS) -> str:
    """The table of solutions that `Solution.check` doubts, and of what it costs, relative to the solve."""
    every, rows = summary.read("checks", results), []
    for kind, words in {"doubtful": "should be doubted", "right": "should not"}.items():
        chosen = [row for row in every if row["kind"] == kind]
        doubted = sum(bool(row["findings"]) for row in chosen)
        cost = np.quantile([float(row["cost"]) for row in chosen], [0.1, 0.5, 0.9])
        rows.append([words, str(len(chosen)), str(doubted), *(significant(x) for x in cost)])
    return _table(["solutions that", "number", "doubted", "time over the solve's: 10 %", "median", "90 %"], rows)


def events(results: pathlib.Path = RESULTS) -> str:
    """The table of what an event costs that never happens, relative to the same solve without."""
    (row,) = summary.read("events", results)
    found = f"{row['solves']} systems, {row['roots']} roots: {row['missed']} missed, {row['invented']} invented"
    rows = []
    for kind, words in {"event": "an event that ends the solve", "reset": "an event with a reset"}.items():
        rows.append([words, *(f"{float(row[f'{kind}_{cost}']):.2f}" for cost in EVENT_COSTS)])
    return _table(["", "run", "compile", "run of a gradient", "compile a gradient"], rows) + f"\n\n{found}."


def boundary_values(results: pathlib.Path = RESULTS) -> str:
    """The table of boundary value problems: nodes, errors, and times beside SciPy's."""
    rows = []
    for row in summary.read("boundary_values", results):
        if row["tol"] == "1e-06":
            name = f"{row['problem']}, w = {float(row['small']):g}"
            if row["result"] != "successful":
                rows.append([name, row["nodes"], row["result"], "", "", "", ""])
                continue
            numbers = (float(row[key]) for key in ("error_over_tol", "chi2"))
            seconds, scipy_seconds = float(row["seconds"]), float(row["scipy_seconds"])
            beside = ["-", "-"]
            if math.isfinite(scipy_seconds):
                beside = [f"{float(row['scipy_nodes']):.0f}", f"{scipy_seconds / seconds:.1f}"]
            rows.append([name, row["nodes"], *map(significant, numbers), significant(1e3 * seconds), *beside])
    return _table(["at 1e-6", "nodes", "error", "chi^2", "ms", "SciPy's nodes", "SciPy's time over ours"], rows)


def first_calls(results: pathlib.Path = RESULTS) -> str:
    """The table of seconds that a first call takes, and of milliseconds of a second one."""
    rows = []
    for row in summary.read("first_calls", results):
        first, disk, again = (float(row[f"{name}_seconds"]) for name in ("first", "from_disk", "again"))
        rows.append([row["case"], *(significant(x) for x in (first, disk, 1e3 * again))])
    return _table(["", "first call, s", "from the cache on disk, s", "again, ms"], rows)


def stability(results: pathlib.Path = RESULTS) -> str:
    """The table of rejected attempts and of errors in units of the tolerance, for every order of a filter."""
    return stability_of(summary.read("stability", results))


def stability_of(every: Sequence[dict]) -> str:
    """The table of `stability`, from the rows of its file."""
    rows = []
    for nu in sorted({int(row["num_derivatives"]) for row in every}):
        here = [row for row in every if int(row["num_derivatives"]) == nu]
        rejected = [float(row["rejected"]) for row in here if float(row["rtol"]) <= 1e-6]
        off = {row["problem"]: [] for row in here}
        for row in here:
            off[row["problem"]].append(float(row["error"]) / float(row["rtol"]))
        sensitive = [off.pop(name) for name in SENSITIVE]
        others = np.concatenate(list(off.values()))
        shown = np.median(others), np.max(others), np.max(sensitive)
        rows.append([str(nu), f"{100 * np.median(rejected):.0f} %", *(significant(x) for x in shown)])
    return _table(["derivatives", "rejected", "error, median", "largest", "on the two"], rows)


def quoted(results: pathlib.Path = RESULTS) -> list[str]:
    """Phrases with figures that the text of the page must hold, word for word."""
    return [*_quoted_speed(results), *_quoted_calibration(results), *_quoted_fuzz(results), *_quoted_pulses(results)]


def _quoted_speed(results):
    problems = {"Lotka-Volterra": "lotka_volterra", "Van der Pol": "van_der_pol_1e3", "HIRES": "hires"}
    plain = {
        words: fastest(runs(f"work_precision_{name}_plain", "", results), "probode", TARGET).seconds
        for words, name in problems.items()
    }
    ratios = summary.Results(results, "min")
    smoothers = [significant(ratios.smoothing(name, summary.SMOOTHERS)) for name in ("smoothing_plain", "smoothing")]
    solves = [row for race in RACES for row in summary.read(race.file, results) if row.get("family") == "probode"]
    gradients = [row for row in summary.read("gradients", results) if row["method"].startswith("probode")]
    compiling = [significant(1 / ratios.compilation(peer)) for peer in ("TS0(4)", "Tsit5")]
    peers = ("probdiffeq TS0(3)", "diffrax Tsit5")
    of_gradients = [significant(1 / ratios.gradient_compilation(peer)) for peer in peers]
    return [
        f"({', '.join(f'{words} {significant(1e3 * seconds)} ms' for words, seconds in plain.items())})",
        f"{smoothers[0]} times as fast as probdiffeq's instead of {smoothers[1]}",
        f"Compilation takes {_range(solves)} s, "
        f"for Lotka-Volterra {compiling[0]} times probdiffeq's and {compiling[1]} times diffrax's",
        f"that of a gradient {_range(gradients)} s, "
        f"{of_gradients[0]} times probdiffeq's and {of_gradients[1]} times diffrax's",
    ]


def _quoted_calibration(results):
    def solve(file, method, problem, nu, rtol):
        columns = {"method": method, "problem": problem, "nu": nu, "rtol": rtol}
        row = next(row for row in summary.read(file, results) if columns.items() <= row.items())
        return row["steps"], significant(float(row["error"]))

    plain, memory, further = "EK1 leave one out", "EK1 leave one out, memory", "calibration_further"
    volterra, heiles = ("lotka_volterra", "3", "1e-09"), ("henon_heiles", "4", "1e-08")
    steps, error = solve("calibration", plain, *volterra)
    left_out, remembering = _trajectories("calibration", plain, results), _trajectories(further, memory, results)
    neglecting = [_trajectories(further, f"EK1 {way}, per component", results) for way in ("dynamic", "leave one out")]
    return [
        f"{steps} steps and an error of {error}, with memory {' and '.join(solve(further, memory, *volterra))}",
        f"{' and '.join(solve(further, plain, *heiles))}, with memory {' and '.join(solve(further, memory, *heiles))}",
        f"{share(remembering, 10)} instead of {share(left_out, 10)} of the {len(left_out)} solves",
        f"{spread(neglecting[0])} on these problems (5 % .. 95 %), leaving one out {spread(neglecting[1])}",
        *_quoted_filters(results),
    ]


def _quoted_filters(results):
    """Of filters that observe all derivatives: at the steps, and at equidistant times."""
    shares, largest = {}, {}
    for method in ("two", "three"):
        rows = [row for row in summary.read("calibration_lifted", results) if f"{method} " in row["method"]]
        ratios = [np.array([float(row[column]) for row in rows]) for column in ("trajectory", "between")]
        shares[method] = [f"{100 * np.mean((x >= least) & (x <= 10)):.0f} %" for x in ratios for least in (0.1, 0.01)]
        largest[method] = max(np.max(x) for x in ratios)
    (at, at_all, between, between_all), two = shares["three"], shares["two"]
    return [
        f"{at} have a `chi^2 / d` in [0.1, 10] at the steps and {at_all} in [0.01, 10], and",
        f"{between} and {between_all} at a hundred equidistant times",
        f"the largest is {largest['three']:.0f}",
        f"{', '.join(two[:3])} and {two[3]}, and up to {significant(largest['two'])} on Pleiades",
    ]


def _quoted_fuzz(results):
    rows = summary.read("fuzz", results)
    posed = [row for row in rows if row["well_posed"] == "yes"]
    default = [row for row in posed if row["configuration"] == "default"]
    single = [row for row in posed if row["configuration"].startswith("float32")]
    configurations = {row["configuration"] for row in rows}
    causes = {words: _count(group, "wrong") for words, group in wrong_by_cause(posed).items()}
    return [
        f"{_count(rows, 'solves'):,} solves in {len(configurations)} configurations",
        f"Of {_count(posed, 'solves'):,} of equations with a solution to the end, {_count(posed, 'wrong')} end as",
        f"{_count(default + single, 'wrong') or 'none'} of them with the default parts ({_count(default, 'solves')}) "
        f"or in single precision ({_count(single, 'solves')})",
        *(f"{ {1: 'once', 2: 'twice'}.get(number, f'{number} times') } {words}" for words, number in causes.items()),
    ]


def wrong_by_cause(posed: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows of `fuzz.csv` with wrong answers, by what the page says of them; each row once."""
    causes = {
        "`TS0`": r"TS0",
        "`NoCalibration()`": r"no calibration",
        "a prior of order one or two": r"\(1\)|\(2\)",
        "`StateError()`": r"StateError",
        "something else": r"",
    }
    found = {words: [] for words in causes}
    for row in posed:
        if int(row["wrong"]):
            found[next(words for words, name in causes.items() if re.search(name, row["configuration"]))].append(row)
    return {words: group for words, group in found.items() if group}


def _quoted_pulses(results):
    missed = {}
    for row in summary.read("pulses", results):
        missed.setdefault(row["method"], []).append(f"{100 * float(row['missed_share']):.0f} %")
    methods = {"`TS1`": "probode TS1", "RK45": "scipy RK45", "DOP853": "scipy DOP853"}
    return [f"{words} misses {' and '.join(missed[method])}" for words, method in methods.items()]


def runs(file: str, case: str, results: pathlib.Path = RESULTS) -> list[Run]:
    """What a CSV file holds of a case, of all its cases where none is named."""
    found = []
    for row in summary.read(file, results):
        if "family" in row:
            found.append(Run(row["family"], row["configuration"], float(row["run_seconds_min"]), float(row["error"])))
        elif case in ("", row["case"]):
            family, _, parts = row["method"].partition(" ")
            found.append(Run(family, parts, float(row["seconds_min"]), float(row["error"])))
    return found


def fastest(found: Sequence[Run], family: str, error: float, parts: str = "") -> Run | None:
    """The fastest run of a family with an error of at most that, of any where it is infinite; None where none is."""
    good = [run for run in found if run.family == family and parts in run.parts]
    return min((run for run in good if error == ANY or run.error <= error), key=lambda run: run.seconds, default=None)


def significant(x: float) -> str:
    """The number with two significant digits."""
    mantissa, exponent = f"{x:.1e}".split("e")
    if 0 < abs(x) < 1e-3:
        return f"{mantissa}e{int(exponent)}"
    digits = 1 - int(exponent)
    return f"{round(x, digits):.{max(0, digits)}f}"


def share(ratios: np.ndarray, top: float) -> str:
    """The percentage of the ratios between 0.01 and `top`; what is not a number is outside."""
    return f"{100 * np.mean((ratios >= 0.01) & (ratios <= top)):.0f} %"


def spread(ratios: np.ndarray) -> str:
    """The 5 % and the 95 % quantile of those that are numbers."""
    return " .. ".join(significant(float(x)) for x in np.nanquantile(ratios, [0.05, 0.95]))


def _trajectories(file, method, results):
    stiff_or_second_order = ("henon_heiles", "van_der_pol_50")
    rows = [row for row in summary.read(file, results) if row["method"] == method]
    return np.array([float(row["trajectory"]) for row in rows if row["problem"] not in stiff_or_second_order])


def _ratio(found, peer, error, seconds):
    theirs = [run for run in found if run.family == peer]
    if not theirs:
        return ""
    best = fastest(theirs, peer, error)
    shown = best or min(theirs, key=lambda run: run.error)
    method = "" if peer == "probdiffeq" else f"{shown.name} "  # those of probdiffeq are ours
    short = "" if best else f", only to {significant(shown.error)}"
    return f"{method}{significant(shown.seconds / seconds)}x{short}"


def _range(rows):
    seconds = [float(row["compile_seconds"]) for row in rows]
    return f"{significant(min(seconds))} to {significant(max(seconds))}"


def _count(rows, column):
    return sum(int(row[column]) for row in rows)


def _table(header, rows):
    lines = ["".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def main() -> None:
    """Write the page anew, and say which of its phrases do not agree with the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.parse_args()
    text = renewed(PAGE.read_text())
    PAGE.write_text(text)
    for phrase in missing(text):
        print(f"not on the page: {phrase}")


def missing(text: str, results: pathlib.Path = RESULTS) -> list[str]:
    """The phrases that a text should hold and does not; lines may break anywhere."""
    flat = " ".join(text.split())
    return [phrase for phrase in quoted(results) if phrase not in flat]


if __name__ == "__main__":
    main()
