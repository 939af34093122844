"""Figures of the page of benchmarks, from the CSV files in `benchmarks/results/`."""

import csv
import math
import pathlib
from collections.abc import Iterator

import matplotlib


matplotlib.use("agg")

import matplotlib.pyplot as plt  # after the backend
import numpy as np


RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
PROBLEMS = {
    "lotka_volterra": "Lotka-Volterra",
    "pleiades": "Pleiades",
    "van_der_pol_1e3": "Van der Pol, mu = 1000",
    "hires": "HIRES",
    "robertson": "Robertson",
    "brusselator_1d_32": "Brusselator, 64 components",
}
FAMILIES = {
    "probode": ("probode", "C3", "o"),
    "probdiffeq": ("probdiffeq", "C0", "s"),
    "diffrax": ("diffrax", "C2", "^"),
    "scipy": ("SciPy", "0.5", "v"),
}
CALIBRATIONS = {
    "EK1 leave one out": "TS1, leave one out",
    "EK1 dynamic": "TS1, dynamic",
    "EK1 mle": "TS1, maximum likelihood",
    "EK0 twice leave one out": "TS0 twice, leave one out",
    "EK0 twice dynamic, per component": "TS0 twice, dynamic",
    "EK0 dynamic, per component": "TS0, dynamic",
}


def write_all(folder: pathlib.Path) -> dict[str, str]:
    """Draws all figures into the folder; for each the table of the page below which it stands, and its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for draw in (work_precision, first_calls, dimension, calibration, boundary_values):
        figure, table, caption = draw()
        figure.savefig(folder / f"{draw.__name__}.svg")
        plt.close(figure)
        drawn[table] = f"![{caption}](figures/{draw.__name__}.svg){{ .figure }}\n\n*{caption}*"
    return drawn


def work_precision() -> tuple[plt.Figure, str, str]:
    """Time over error, of the fastest configurations of each package on six problems."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for ax, (name, title) in zip(axes.flat, PROBLEMS.items(), strict=True):
        rows = _rows(f"work_precision_{name}")
        for family, (label, color, marker) in FAMILIES.items():
            runs = sorted(
                (float(row["error"]), 1e3 * float(row["run_seconds_min"])) for row in rows if row["family"] == family
            )
            front = list(_front((error, time) for error, time in runs if 1e-13 < error < 1))
            if front:
                ax.loglog(*zip(*front, strict=True), color=color, marker=marker, markersize=3, label=label)
        ax.set_title(title, fontsize="medium")
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds")
    for ax in axes[-1]:
        ax.set_xlabel("error at the end, relative")
    axes[0, 0].legend(frameon=False, fontsize="small")
    caption = "Time over error: of each package the runs for which no other is both faster and more accurate."
    return figure, "speed", caption


def first_calls() -> tuple[plt.Figure, str, str]:
    """Seconds of a first call, with and without the cache on disk."""
    rows = _rows("first_calls")[::-1]
    figure, ax = plt.subplots(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    at = np.arange(len(rows))
    for shift, column, label, color in ((0.2, "first", "first call", "C3"), (-0.2, "from_disk", "from disk", "C1")):
        ax.barh(at + shift, [float(row[f"{column}_seconds"]) for row in rows], height=0.4, label=label, color=color)
    ax.set_yticks(at, [row["case"] for row in rows], fontsize="small")
    ax.set_xlabel("seconds")
    ax.legend(frameon=False)
    return figure, "first_calls", "The first call of a process, compiled anew and read from the cache on disk."


def dimension() -> tuple[plt.Figure, str, str]:
    """Time of a step over the number of components."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    looks = {
        "probode EK0(3) isotropic": ("probode, Isotropic()", "C3", "o"),
        "probode EK0(3) block-diagonal": ("probode, BlockDiagonal()", "C1", "s"),
        "diffrax Tsit5": ("diffrax, Tsit5", "C2", "^"),
    }
    case = "Brusselator per step, d = "
    rows = [row for row in _rows("dimension") if row["case"].startswith(case)]
    for method, (label, color, marker) in looks.items():
        own = [row for row in rows if row["method"] == method]
        sizes, times = (
            [int(row["case"].removeprefix(case)) for row in own],
            [1e3 * float(r["seconds_min"]) for r in own],
        )
        ax.loglog(sizes, times, color=color, marker=marker, label=label)
    ax.set(xlabel="components", ylabel="milliseconds per step")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure, "gpu", "A step of EK0 with three derivatives of the Brusselator on a line, on a CPU."


def calibration() -> tuple[plt.Figure, str, str]:
    """Squared errors over reported variances of all solves, for each method."""
    rows = _rows("calibration")
    figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    random = np.random.default_rng(0)
    for at, (method, label) in enumerate(reversed(CALIBRATIONS.items())):
        ratios = np.array([float(row["trajectory"]) for row in rows if row["method"] == method])
        shift = random.uniform(-0.28, 0.28, ratios.size)
        ax.semilogx(ratios, at + shift, ".", markersize=3, color="C3" if label.startswith("TS1") else "C0")
        ax.semilogx([np.median(ratios)] * 2, [at - 0.35, at + 0.35], "k", linewidth=1.5)
    ax.axvline(1.0, color="0.4", linestyle="--", linewidth=1, zorder=0)
    ax.axvspan(0.01, 10, color="0.92", zorder=-1)
    ax.set_yticks(range(len(CALIBRATIONS)), reversed(CALIBRATIONS.values()))
    ax.set_xlabel("chi^2 / d along the trajectory (left: more uncertainty than error; right: less)")
    caption = "One point for each solve, and the medians; 1 is right, and the grey range is that of the table."
    return figure, "calibration", caption


def boundary_values() -> tuple[plt.Figure, str, str]:
    """Times of boundary value problems over the width of their layers, beside SciPy's."""
    rows = [row for row in _rows("boundary_values") if row["tol"] == "1e-06" and row["result"] == "successful"]
    names = [name for name in dict.fromkeys(row["problem"] for row in rows) if name != "Bratu"]
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.4), sharex=True, sharey=True, layout="constrained")
    columns = {"seconds": FAMILIES["probode"], "scipy_seconds": FAMILIES["scipy"]}
    for ax, name in zip(axes.flat, names, strict=True):
        for column, (label, color, marker) in columns.items():
            points = [(float(row["small"]), 1e3 * float(row[column])) for row in rows if row["problem"] == name]
            finite = [point for point in points if math.isfinite(point[1])]
            ax.loglog(*zip(*finite, strict=True), color=color, marker=marker, markersize=4, label=label)
        ax.set_title(name, fontsize="medium")
        ax.grid(alpha=0.3)
    axes[0, 0].invert_xaxis()
    axes[0, 0].yaxis.set_minor_formatter("")
    axes[0, 0].legend(frameon=False, fontsize="small")
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds")
    for ax in axes[-1]:
        ax.set_xlabel("width w")
    return figure, "boundary_values", "Boundary value problems at a tolerance of 1e-6, as their layers become thinner."


def _rows(name: str) -> list[dict]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _front(runs: Iterator[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Of runs in the order of their errors those that are faster than all more accurate ones."""
    fastest = math.inf
    for error, time in runs:
        if time < fastest:
            fastest = time
            yield error, time
