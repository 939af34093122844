"""Command line of the benchmarks: `python -m benchmarks --help`.

Nothing of JAX is imported before the options are read, since flags of XLA are fixed when its backend starts.
"""

import argparse
import os
import pathlib


def main() -> None:
    """Read the options, set the flags of XLA, run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time probode and its peers.")
    parser.add_argument("--problem", action="append", metavar="NAME", help="default: lotka_volterra; repeatable")
    parser.add_argument("--quick", action="store_true", help="few configurations, tolerances and repeats")
    parser.add_argument("--output", default=pathlib.Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--target", type=float, default=1e-7, help="the error at which families are compared")
    parser.add_argument("--plain", action="store_true", help="without probode's default for XLA's small loops")
    options = parser.parse_args()
    os.environ["PROBODE_SMALL_LOOPS"] = "0" if options.plain else "1"

    from . import work_precision
    from .problems import PROBLEMS

    names = options.problem or ["lotka_volterra"]
    for name in names:
        if name not in PROBLEMS:
            parser.error(f"unknown problem {name!r}; choose from {', '.join(PROBLEMS)}")
    budget = {"repeats": 5, "seconds": 0.3} if options.quick else {}
    work_precision.run(names, options.output, quick=options.quick, target=options.target, **budget)


if __name__ == "__main__":
    main()
