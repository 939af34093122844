"""Random solves in search of wrong answers: `python -m benchmarks.fuzz` takes about an hour, `--quick` some minutes.

Configurations of the solver are run on families of equations whose solutions are known (`fuzz_families`), at random
tolerances, scales and intervals. Successful solves whose answer is far from the known solution are counted as wrong.
`--pulses` and `--stiff` run only the comparison of that name, `--family` and `--configuration` only some rows.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import fuzz_pulses, fuzz_stiff
from .fuzz_draws import Draw, Family
from .fuzz_families import FAMILIES
from .timing import parse, result_file, write_rows


SEED = 0
MAX_STEPS = 8192  # without a bound some solves would not end
KEPT_STEPS = 2048  # fewer for smoothers that keep their steps, each of which takes memory
WRONG_TOLERANCES, WRONG_STDS = 1000, 100  # an answer is wrong if its error is larger than both
SHOWN = 3  # flagged draws that are printed per row; the table has the indices of all


class Configuration(NamedTuple):
    """The parts of a solver, as functions of what differs from draw to draw.

    `prior`: a function of the unit of time. `constraint`: a function of the equation. `controller`: a function of
    `rtol` and `atol`. `parts`: the other parts. `saves`: compare inside the interval too, not at its end alone.
    `single`: solve in single precision. `everywhere`: run on all families that fit, not on a sample of them.
    """

    name: str
    prior: Callable
    constraint: Callable
    parts: dict
    controller: Callable
    saves: bool = False
    single: bool = False
    everywhere: bool = False

    def solver(self, family: Family, draw: Draw) -> Any:
        """The solver for one draw of a family."""
        import probode as po

        keeps = isinstance(self.parts.get("strategy"), po.FixedIntervalSmoother)
        return po.Solver(
            self.prior(abs(draw.unit)),
            self.constraint(family.problem),
            controller=self.controller(draw.rtol, draw.atol),
            loop=po.ForwardLoop(KEPT_STEPS if keeps else MAX_STEPS),
            **self.parts,
        )

    def fits(self, family: Family) -> bool:
        """Whether the parts accept equations of this family and can be expected to solve them."""
        import probode as po

        whole = not isinstance(self.parts.get("factorisation"), po.BlockDiagonal | po.Isotropic)
        first = "TS0" not in self.name
        if family.residual:
            return first and whole and not isinstance(self.parts.get("error"), po.ResidualError)
        return ((first and whole) or not family.stiff) and self.prior(1.0).num_derivatives >= family.order

    def families(self, number: int) -> list[Family]:
        """All families that fit, or a sample of `number` that depends on the name of the configuration alone."""
        fitting = [family for family in FAMILIES.values() if self.fits(family)]
        return fitting if self.everywhere else random.Random(self.name).sample(fitting, min(number, len(fitting)))


def configurations() -> dict[str, Configuration]:
    """All configurations by name: the default, changes of one part at a time, and combinations."""
    import probode as po

    found: dict[str, Configuration] = {}

    def add(name, prior=4, constraint=po.TS1, controller=po.IntegralController, everywhere=False, **parts):
        order = prior
        prior = prior if callable(prior) else lambda unit: po.IWP(order)
        single, saves = "float32" in name, "saves" in name or "smoother" in name
        found[name] = Configuration(name, prior, constraint, parts, controller, saves, single, everywhere)

    def twice(ode):
        return po.TS0(ode, evaluations=2)

    def again(problem):
        return po.TS1(problem, evaluations=4, relinearise=True)

    block, isotropic = {"factorisation": po.BlockDiagonal()}, {"factorisation": po.Isotropic()}
    point, interval = {"strategy": po.FixedPointSmoother()}, {"strategy": po.FixedIntervalSmoother()}
    left_out, mle, none = (
        {"calibration": kind()} for kind in (po.LeaveOneOutCalibration, po.MLECalibration, po.NoCalibration)
    )
    state, residual = {"error": po.StateError()}, {"error": po.ResidualError()}
    add("default", everywhere=True)
    add("float32 default", everywhere=True)
    add("TS0 isotropic", constraint=po.TS0, **isotropic, everywhere=True)
    add("TS0 block", constraint=po.TS0, **block, everywhere=True)
    add("TS1 fixed-point smoother", **point, everywhere=True)
    add("TS1 relative scale", lambda unit: po.RelativeScale(po.IWP(4)), everywhere=True)
    add("float32 TS1 relative scale", lambda unit: po.RelativeScale(po.IWP(4)))
    for order in (1, 2, 3, 5, 6, 7, 8):
        add(f"TS1 IWP({order})", order)
    add("TS1 saves")
    add("TS1 block", **block)
    add("TS1 isotropic", **isotropic)
    add("TS1 block IWP(3) fixed-point smoother", 3, **block, **point)
    add("TS1 fixed-interval smoother", **interval)
    add("TS1 IWP(3) fixed-interval smoother, leave one out", 3, **interval, **left_out)
    add("TS1 block fixed-interval smoother, leave one out", **interval, **left_out, **block)
    add("TS1 MLE", **mle)
    add("TS1 MLE fixed-point smoother", **mle, **point)
    add("TS1 IWP(3) no calibration", 3, **none)
    add("TS1 ResidualError PI", controller=po.PIController, **residual)
    add("TS1 StateError", **state)
    add("TS1 IWP(5) StateError relinearised", 5, again, **state)
    add("TS1 IWP(2) fixed-point smoother", 2, **point)
    add("TS0 dense IWP(3)", 3, po.TS0)
    add("TS0 isotropic IWP(2) fixed-point smoother", 2, po.TS0, **isotropic, **point)
    add("TS0 isotropic IWP(6)", 6, po.TS0, **isotropic)
    add("TS0 isotropic StateError PI", 4, po.TS0, po.PIController, **isotropic, **state)
    add("TS0 block MLE", 4, po.TS0, **block, **mle)
    add("TS0 twice block", 4, twice, **block)
    add("TS0 twice isotropic IWP(5)", 5, twice, **isotropic)
    add("TS0 twice block fixed-interval smoother, leave one out", 4, twice, **block, **interval, **left_out)
    add("SLR1 IWP(3)", 3, po.SLR1)
    add("SLR1 IWP(3) fixed-point smoother", 3, po.SLR1, **point)
    add("TS1 Matern(3)", lambda unit: po.Matern(3, 2 * unit))
    add("TS0 block Matern(2)", lambda unit: po.Matern(2, 10 * unit), po.TS0, **block)
    add("TS1 IOUP(3)", lambda unit: po.IOUP(3, -1 / unit))
    add("float32 TS0 isotropic", constraint=po.TS0, **isotropic)
    add("float32 TS1 fixed-point smoother", **point)
    add("float32 TS1 block fixed-interval smoother, leave one out", **block, **interval, **left_out)
    return found


QUICK = (
    "default",
    "TS1 fixed-point smoother",
    "float32 default",
    "TS0 isotropic",
    "TS0 block",
    "TS1 fixed-interval smoother",
)


class Outcome(NamedTuple):
    """The outcome of a solve, compared with the known solution.

    `error`: the largest error, in tolerances. `chi2`: the largest mean square of errors in standard deviations over the
    times. `nonfinite`: how many numbers are not finite. `zero_std`: how many standard deviations are zero in spite of
    an error. `wrong`: whether an error exceeds `WRONG_TOLERANCES` and `WRONG_STDS`. `words`: the worst error in words.
    """

    result: str
    attempts: int = 0
    error: float = np.nan
    chi2: float = np.nan
    nonfinite: int = 0
    zero_std: int = 0
    wrong: bool = False
    words: str = ""

    @property
    def flagged(self) -> bool:
        """Whether the solve is wrong, or returned numbers that cannot be right, or raised an error."""
        return self.wrong or self.nonfinite + self.zero_std > 0 or self.result.startswith("raised")


def attempt(configuration: Configuration, family: Family, draw: Draw) -> Outcome:
    """The outcome of one draw under one configuration."""
    import probode as po

    dtype = np.float32 if configuration.single else np.float64
    unit, scale, times = draw.unit, draw.scale, draw.times * draw.unit
    u0 = tuple(jnp.asarray(v * scale / unit**k, dtype) for k, v in enumerate(draw.start))
    args = jax.tree.map(lambda x: jnp.asarray(x, dtype), (unit, scale, draw.parameters))
    keeps = isinstance(configuration.parts.get("strategy"), po.FixedIntervalSmoother)
    inside = configuration.saves and not keeps
    save_at = po.SaveAt(ts=jnp.asarray(times[:-1], dtype), t1=True) if inside else None
    if np.any(np.isnan(family.right(draw))):
        return Outcome("no reference")
    try:
        solution = configuration.solver(family, draw).solve(
            u0 if family.order > 1 else u0[0], 0.0, times[-1], args=args, save_at=save_at, throw=False
        )
        attempts = int(solution.stats["num_steps"])
        if solution.result != po.Result.successful:
            return Outcome(po.Result[solution.result].split(".")[0], attempts)
        posterior = solution.evaluate(jnp.asarray(times, dtype)) if keeps else solution
        derivative = posterior.derivative(1)
        returned = {
            "mean": posterior.mean,
            "std": posterior.std,
            "derivative": jnp.stack([derivative.mean, derivative.std]),
            "output_scale": solution.output_scale,
            "log_likelihood": solution.log_likelihood,
        }
        returned = {name: np.asarray(x, float) for name, x in returned.items()}
    except Exception as error:  # counted: a user would see it
        return Outcome(f"raised {type(error).__name__}: {str(error)[:100]}")
    nonfinite = {name: int(np.sum(~np.isfinite(x))) for name, x in returned.items()}
    mean, std = returned["mean"] / scale, returned["std"] / scale
    return _judged(family, draw, mean, std, attempts, nonfinite, np.finfo(dtype).eps)


def _judged(family, draw, mean, std, attempts, nonfinite, eps):
    right = family.right(draw)[-len(mean) :]
    largest = np.max(np.abs(np.where(np.isfinite(right), right, 0)), initial=np.max(np.abs(draw.start[0])))
    floor = max(100 * eps, family.accuracy) * largest
    error = np.where(np.isnan(mean - right), np.inf, np.abs(mean - right))
    tolerance = draw.atol / draw.scale + draw.rtol * np.abs(np.where(np.isfinite(right), right, 0))
    zero = (std == 0) & (error > floor)
    # Without the floor, errors of the reference itself would be counted.
    wrong = (error > WRONG_TOLERANCES * tolerance + floor) & ~(error <= WRONG_STDS * std)
    chi2 = np.max(np.mean(error**2 / (std**2 + (floor / 100) ** 2), axis=1))
    # The entry to describe: a flagged one if there is any, otherwise the largest error.
    flagged = wrong if np.any(wrong) else zero if np.any(zero) else np.isfinite(error)
    worst = np.unravel_index(np.argmax(np.where(flagged, np.minimum(error / tolerance, 1e300), -1)), error.shape)
    words = _described(draw, mean, std, right, *worst)
    words += "".join(f"; {count} of {name} not finite" for name, count in nonfinite.items() if count)
    return Outcome(
        "successful",
        attempts,
        float(np.max(error / tolerance)),
        float(chi2),
        sum(nonfinite.values()),
        int(np.sum(zero)),
        bool(np.any(wrong)),
        words,
    )


def _described(draw, mean, std, right, row, component):
    worst = row, component
    at = draw.times[len(draw.times) - len(mean) + row]
    units = f"unit {draw.unit:g}, scale {draw.scale:g}"
    numbers = f"rtol {draw.rtol:.1e}, atol {draw.atol / draw.scale:.1e} scales, {units}"
    got = f"got v{component}({at:.6g}) = {mean[worst]:.8g} +- {std[worst]:.1e}, right {right[worst]:.8g}"
    return f"{numbers}, p {draw.parameters}, v(0) {draw.start.tolist()}, end {draw.times[-1]:.6g}: {got}"


def summarised(configuration: Configuration, family: Family, outcomes: list[Outcome]) -> dict:
    """A row of the table: statistics over the outcomes of a family under a configuration."""
    good = [outcome for outcome in outcomes if outcome.result == "successful"]
    errors, chi2 = ([getattr(outcome, name) for outcome in good] or [np.nan] for name in ("error", "chi2"))
    attempts = [outcome.attempts for outcome in outcomes]
    numbers = {
        "successful": len(good) / len(outcomes),
        "error_median": np.median(errors),
        "error_max": np.max(errors),
        "chi2_median": np.median(chi2),
        "chi2_geometric_mean": np.exp(np.mean(np.log(np.maximum(chi2, 1e-30)))),
        "chi2_max": np.max(chi2),
        "attempts_median": np.median(attempts),
        "attempts_max": np.max(attempts),
    }
    flagged = [str(index) for index, outcome in enumerate(outcomes) if outcome.flagged]
    return {
        "family": family.name,
        "configuration": configuration.name,
        "well_posed": "yes" if family.well_posed else "no",
        "solves": len(outcomes),
        **{name: f"{value:.4g}" for name, value in numbers.items()},
        "nonfinite": sum(outcome.nonfinite for outcome in good),
        "zero_std": sum(outcome.zero_std for outcome in good),
        "wrong": sum(outcome.wrong for outcome in good),
        "raised": sum(outcome.result.startswith("raised") for outcome in outcomes),
        "out_of_steps": sum("max_steps" in outcome.result for outcome in outcomes),
        "draws_to_look_at": " ".join(flagged),
    }


def run(configuration: Configuration, family: Family, number: int, *, seed=SEED, only=None) -> dict:
    """The row of a family under a configuration, printed with its flagged draws; `only`: skip the draws before it."""
    draws = family.draws(number, seed, configuration.single)
    draws = draws if only is None else draws[only:]
    outcomes = [attempt(configuration, family, draw) for draw in draws]
    row = summarised(configuration, family, outcomes)
    columns = ("successful", "error_median", "error_max", "chi2_geometric_mean", "chi2_max")
    counts = ("nonfinite", "zero_std", "wrong", "raised")
    line = "".join(f"{row[name]:>11}" for name in columns) + "".join(f"{row[name]:>10}" for name in counts)
    print(f"{family.name:<18}{configuration.name:<56}{line}", flush=True)
    pairs = [pair for pair in zip(draws, outcomes, strict=True) if pair[1].flagged or only is not None]
    for draw, outcome in pairs[:SHOWN]:
        print(f"    draw {draw.index}: {outcome.words or outcome.result}", flush=True)
    return row


def summary(rows: list[dict]) -> str:
    """Counts over all rows as text, separately for equations on which no solver can be sure of its answer."""
    lines = [f"{'':<24}{'solves':>8}{'successful':>12}{'wrong':>8}{'nonfinite':>11}{'zero std':>10}{'raised':>8}"]
    for name, posed, which in (
        ("well posed", "yes", ("",)),
        ("  the default", "yes", ("default",)),
        ("  float32", "yes", ("float32",)),
        ("not well posed", "no", ("",)),
        ("  the default", "no", ("default",)),
    ):
        group = [row for row in rows if row["well_posed"] == posed and row["configuration"].startswith(which)]
        solves = sum(row["solves"] for row in group)
        share = sum(row["solves"] * float(row["successful"]) for row in group) / max(solves, 1)
        counts = [sum(row[name] for row in group) for name in ("wrong", "nonfinite", "zero_std", "raised")]
        lines.append(f"{name:<24}{solves:>8}{share:>12.3f}{counts[0]:>8}{counts[1]:>11}{counts[2]:>10}{counts[3]:>8}")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison that is asked for, write its table, print a summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six configurations, few draws: minutes")
    parser.add_argument("--pulses", action="store_true", help="only the pulses, beside SciPy and diffrax")
    parser.add_argument("--stiff", action="store_true", help="only the end points of stiff problems, beside Kvaerno5")
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--configuration", action="append", metavar="NAME")
    parser.add_argument("--draws", type=int, help="of each family; 40, quick 10")
    parser.add_argument("--draw", type=int, help="this one alone, with its numbers")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parse(parser)
    # Most of the time is compilation, which takes a third longer with optimisations.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    jax.config.update("jax_enable_x64", True)
    if options.stiff:
        return fuzz_stiff.table(options.output, options.quick)
    if options.pulses:
        return fuzz_pulses.table(options.output, 100 if options.quick else 1000)
    rows = sweep(options)
    if options.family or options.configuration or options.draw is not None:
        return None
    write_rows(result_file("fuzz", options.output), rows)
    print(summary(rows))
    return fuzz_pulses.table(options.output, 100 if options.quick else 1000)


def sweep(options: argparse.Namespace) -> list[dict]:
    """The rows of all configurations and families that are asked for."""
    print(f"{'family':<18}{'configuration':<56}{'success':>11}{'median':>11}{'max':>11}{'chi2 gm':>11}{'max':>11}")
    rows, number = [], options.draws or (10 if options.quick else 40)
    chosen = options.configuration or (QUICK if options.quick else list(configurations()))
    for name in chosen:
        configuration = configurations()[name]
        families = configuration.families(4 if options.quick else 6)
        if options.family:
            families = [FAMILIES[name] for name in options.family if configuration.fits(FAMILIES[name])]
        elif options.quick and name not in ("default", "float32 default"):
            families = random.Random(name).sample(families, min(6, len(families)))
        for family in families:
            number = number if options.draw is None else options.draw + 1
            rows.append(run(configuration, family, number, seed=options.seed, only=options.draw))
        # Thousands of compiled programs in one process exhaust its memory maps.
        jax.clear_caches()
    return rows


if __name__ == "__main__":
    main()
