"""Clocks: programs compiled first, then run in turns, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds of a program: to compile, the fastest run and the median one; and what it returned."""

    compile_seconds: float
    fastest: float
    median: float
    value: Any


def compare(
    programs: dict[str, tuple[Callable, tuple]], *, repeats: int = 20, seconds: float = 1.0
) -> dict[str, Timing]:
    """Time jittable functions at their arguments; each runs at most `repeats` times, or three if that takes long."""
    compiled, compiling, values = {}, {}, {}
    for name, (fn, args) in programs.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(fn).lower(*args).compile()
        compiling[name] = time.perf_counter() - start
        values[name] = jax.block_until_ready(compiled[name](*args))
    taken = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (_, args) in programs.items():
            if len(taken[name]) < 3 or sum(taken[name]) < seconds:
                start = time.perf_counter()
                jax.block_until_ready(compiled[name](*args))
                taken[name].append(time.perf_counter() - start)
    return {
        name: Timing(compiling[name], min(runs), statistics.median(runs), values[name]) for name, runs in taken.items()
    }


RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "probode", "probdiffeq", "diffrax", "scipy")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with those that all benchmarks share. To be called before anything imports probode."""
    parser.add_argument("--plain", action="store_true", help="without probode's default for XLA's small loops")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    os.environ["PROBODE_SMALL_LOOPS"] = "0" if options.plain else "1"
    return options


def small_loops() -> bool:
    """Whether XLA was told to compile larger loops into native functions."""
    from probode.small_loops import compiles_small_loops  # not before `parse` has set the variable

    return compiles_small_loops()


def versions() -> dict[str, str]:
    """The versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


class Table:
    """Rows that are printed as they come, and written at the end with what they depend on."""

    def __init__(self, name: str, output: pathlib.Path):
        self.file, self.rows = output / f"{name}{'' if small_loops() else '_plain'}.csv", []
        device = jax.devices()[0].device_kind
        self.shared = {**versions(), "small_loops": small_loops(), "device": device}
        print(f"{name}: small loops {'on' if small_loops() else 'off'}, {device}")
        print(f"{'':<60}{'ms':>10}{'median':>10}{'compile s':>11}{'error':>10}")

    def add(self, case: str, method: str, timing: Timing, *, error: float = float("nan"), per: float = 1.0) -> None:
        """A row; times are divided by `per`."""
        row = {"case": case, "method": method, "seconds_min": timing.fastest / per}
        row |= {"seconds_median": timing.median / per, "compile_seconds": timing.compile_seconds, "error": error}
        self.rows.append({**row, **self.shared})
        line = f"{case + ', ' + method:<60}{1e3 * row['seconds_min']:>10.4f}{1e3 * row['seconds_median']:>10.4f}"
        print(f"{line}{timing.compile_seconds:>11.2f}{error:>10.1e}", flush=True)

    def write(self) -> None:
        """The CSV file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        print(f"written: {self.file}\n", flush=True)
