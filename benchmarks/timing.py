"""Timing of compiled functions, and tables of the results.

Functions are compiled first and then run in turns, so that a busy moment of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds that a function takes to compile and to run (minimum and median), and the value that it returned."""

    compile_seconds: float
    fastest: float
    median: float
    value: Any


def compare(
    programs: dict[str, tuple[Callable, tuple]], *, repeats: int = 20, seconds: float = 1.0
) -> dict[str, Timing]:
    """The timings of functions, given by name as `(function, arguments)`; how often each runs: see `in_turns`."""
    compiled, compiling, values = {}, {}, {}
    for name, (fn, args) in programs.items():
        compiling[name], compiled[name] = timed(lambda fn=fn, args=args: jax.jit(fn).lower(*args).compile())
        values[name] = jax.block_until_ready(compiled[name](*args))
    runs = [lambda name=name, args=args: compiled[name](*args) for name, (_, args) in programs.items()]
    taken = in_turns(runs, repeats=repeats, seconds=seconds)
    return {
        name: Timing(compiling[name], min(times), statistics.median(times), values[name])
        for name, times in zip(programs, taken, strict=True)
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds until the result of `run()` is computed, and the result."""
    start = time.perf_counter()
    value = jax.block_until_ready(run())
    return time.perf_counter() - start, value


def in_turns(runs: Sequence[Callable[[], Any]], *, repeats: int, seconds: float) -> list[list[float]]:
    """The times of each function: of `repeats` runs, or of three or more that take `seconds` together; in turns."""
    taken = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, taken, strict=True):
            if len(times) < 3 or sum(times) < seconds:
                times.append(timed(run)[0])
    return taken


RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "probode", "probdiffeq", "diffrax", "scipy")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line, with those that all benchmarks share.

    To be called before anything imports probode, which reads the environment variable that is set here.
    """
    parser.add_argument("--plain", action="store_true", help="without probode's default for XLA's small loops")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    os.environ["PROBODE_SMALL_LOOPS"] = "0" if options.plain else "1"
    return options


def small_loops() -> bool:
    """Whether XLA was told to compile larger loops into native functions."""
    from probode.util.xla import compiles_small_loops  # imports probode: not before `parse` has set the variable

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
    """A table that prints each row as it is added, and writes all to a CSV file with versions, option and device."""

    def __init__(self, name: str, output: pathlib.Path):
        self.file, self.rows = result_file(name, output), []
        device = jax.devices()[0].device_kind
        self.shared = {**versions(), "small_loops": small_loops(), "device": device}
        print(f"{name}: small loops {'on' if small_loops() else 'off'}, {device}")
        print(f"{'':<60}{'ms':>10}{'median':>10}{'compile s':>11}{'error':>10}")

    def add(self, case: str, method: str, timing: Timing, *, error: float = float("nan"), per: float = 1.0) -> None:
        """Add and print a row; its times are divided by `per`."""
        row = {"case": case, "method": method, "seconds_min": timing.fastest / per}
        row |= {"seconds_median": timing.median / per, "compile_seconds": timing.compile_seconds, "error": error}
        self.rows.append({**row, **self.shared})
        line = f"{case + ', ' + method:<60}{1e3 * row['seconds_min']:>10.4f}{1e3 * row['seconds_median']:>10.4f}"
        print(f"{line}{timing.compile_seconds:>11.2f}{error:>10.1e}", flush=True)

    def write(self) -> None:
        """Write the CSV file."""
        write_rows(self.file, self.rows)


def write_rows(file: pathlib.Path, rows: Sequence[dict]) -> None:
    """Write rows to a CSV file with the columns of the first one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {file}\n", flush=True)


def result_file(name: str, output: pathlib.Path) -> pathlib.Path:
    """The CSV file of a benchmark; results without XLA's option, or from an accelerator, have a file of their own."""
    backend = jax.default_backend()
    name = name if backend == "cpu" else f"{name}_{backend}"
    return output / f"{name}{'' if small_loops() else '_plain'}.csv"
