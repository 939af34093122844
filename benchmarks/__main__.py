"""All benchmarks, one after the other: `python -m benchmarks`; the quick ones: `python -m benchmarks --quick`.

Each benchmark runs in a process of its own, with XLA's options for small loops as probode sets them, and where these
matter once more without them (`--plain`). Each writes a CSV file to `benchmarks/results/`. At the end
`benchmarks.summary` makes the table of targets and the plots from these files.
"""

import argparse
import subprocess
import sys


NON_STIFF = ("lotka_volterra", "fitzhugh_nagumo", "rigid_body", "pleiades", "arenstorf_three_body")
STIFF = ("van_der_pol_1e3", "van_der_pol_1e5", "hires", "robertson", "brusselator_1d_32")
PARTS = [
    *(["work_precision", "--problem", name] for name in NON_STIFF + STIFF),
    *(["work_precision", "--plain", "--problem", name] for name in ("lotka_volterra", "van_der_pol_1e3", "hires")),
    ["gradients"],
    ["gradients", "--plain"],
    ["smoothing"],
    ["smoothing", "--plain"],
    ["lanes"],
    ["dimension"],
    ["first_calls"],
    ["calibration"],
    ["calibration", "--further"],
    ["calibration", "--lifted"],
    ["stability"],
    ["inference"],
    ["tempering"],
    ["nuts"],
    ["checks"],
    ["events"],
    ["boundary_values"],
    ["fuzz"],
    ["fuzz", "--stiff"],
]
QUICK = [
    ["work_precision", "--quick"],
    ["work_precision", "--quick", "--problem", "van_der_pol_1e3"],
    ["smoothing"],
    ["dimension", "--largest", "10000"],
]


def main() -> None:
    """Run the benchmarks, then the summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two problems, few configurations: a few minutes")
    parser.add_argument("--output", metavar="DIR", help="instead of benchmarks/results")
    options = parser.parse_args()
    output = ["--output", options.output] if options.output else []
    for part, *arguments in QUICK if options.quick else PARTS:
        print(f"== {' '.join([part, *arguments])}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{part}", *arguments, *output], check=True)
    subprocess.run([sys.executable, "-m", "benchmarks.summary", *output], check=True)


if __name__ == "__main__":
    main()
