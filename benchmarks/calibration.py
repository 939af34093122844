"""Calibration of the uncertainty on a set of problems: `python -m benchmarks.calibration` writes and prints the table.

`--further` writes a second table: an equation of second order, a stiff equation, EK1 with block-diagonal covariances,
and output scales with a memory. `--lifted` writes a third: filters that observe all derivatives. Reference solutions
are computed in extended precision by extrapolation (Gragg, Bulirsch & Stoer), from each saved time to the next.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import problems
from .timing import parse


# Plain Python functions of `u` alone: JAX has no extended precision, in which the references are computed.


def lotka_volterra(u):
    return 0.5 * u[0] - 0.05 * u[0] * u[1], -0.5 * u[1] + 0.05 * u[0] * u[1]


def fitzhugh_nagumo(u):
    return 3.0 * (u[0] - u[0] ** 3 / 3 + u[1]), -(u[0] - 0.2 + 0.2 * u[1]) / 3.0


def rigid_body(u):
    return -2.0 * u[1] * u[2], 1.25 * u[0] * u[2], -0.5 * u[0] * u[1]


def van_der_pol(u):
    return u[1], (1 - u[0] ** 2) * u[1] - u[0]


def logistic(u):
    return (u[0] * (1 - u[0]),)


def henon_heiles(u):
    x, y, dx, dy = u
    return dx, dy, -x - 2 * x * y, -y - x**2 + y**2


def three_body(u):
    """The restricted three-body problem of Arenstorf's orbit, with a light third body."""
    (x, y, dx, dy), mu = u, 0.012277471
    to_first = ((x + mu) ** 2 + y**2) ** 1.5
    to_second = ((x - 1 + mu) ** 2 + y**2) ** 1.5
    ddx = x + 2 * dy - (1 - mu) * (x + mu) / to_first - mu * (x - 1 + mu) / to_second
    return dx, dy, ddx, y - 2 * dx - (1 - mu) * y / to_first - mu * y / to_second


def pleiades(u):
    """Seven bodies of masses 1 to 7 in the plane: 28 components, positions before velocities."""
    masses, (x, y) = np.arange(1.0, 8.0), (u[:7], u[7:14])
    dx, dy = (z[None, :] - z[:, None] for z in (x, y))
    pull = masses / (dx**2 + dy**2 + np.eye(7)) ** 1.5
    return (*u[14:], *(pull * dx).sum(axis=1), *(pull * dy).sum(axis=1))


def driven_pendulum(u):
    x, v, t = u
    return v, -_elementary("sin", x) - 0.2 * v + 1.2 * _elementary("cos", 2 * t / 3), 1.0


def quadratures(u):
    """A chain of quadratures: nothing but the time enters the first, and that the others."""
    *x, t = u
    return _elementary("cos", 3 * t), 0.1 * x[0], x[1], 1.0


def _elementary(name, x):
    # JAX has no extended precision, and NumPy does not trace.
    return getattr(np if isinstance(x, np.floating) else jnp, name)(x)


def stiff_van_der_pol(u):
    return u[1], 50.0 * (1 - u[0] ** 2) * u[1] - u[0]


class Problem(NamedTuple):
    """An initial value problem `u' = field(u)`, `u(0) = start`, on `[0, end]`.

    `second_order`: the second half of `u` is the derivative of the first half, and the problem is solved as an equation
    of second order for the first half. `clock`: the last component of `u` is the time, and the problem is solved
    without it. `longest`: the longest step of the reference.
    """

    field: Callable
    start: tuple[float, ...]
    end: float
    second_order: bool = False
    longest: float = 0.05
    clock: bool = False

    def equation(self):
        """The `probode.ODE` and its initial value."""
        import probode

        start, half = jnp.array(self.start), len(self.start) // 2
        if self.clock:
            field = lambda t, u, args: jnp.stack(self.field((*u, t))[:-1])  # noqa: E731
            return probode.ODE(field), start[:-1]
        if not self.second_order:
            return probode.ODE(lambda t, u, args: jnp.stack(self.field(u))), start
        ode = probode.ODE(lambda t, u, du, args: jnp.stack(self.field(jnp.concatenate([u, du]))[half:]), order=2)
        return ode, (start[:half], start[half:])

    def reference(self, times):
        """The solution at increasing times that begin at 0, `(times, components)`, computed in extended precision."""
        u, out = np.array(self.start, np.longdouble), [np.array(self.start)]
        for a, b in itertools.pairwise(times):
            parts = max(1, int(np.ceil((b - a) / self.longest)))
            for _ in range(parts):
                u = _extrapolated(self.field, u, (np.longdouble(b) - np.longdouble(a)) / parts)
            out.append(u.astype(float))
        return np.array(out)[:, : len(self.start) // 2 if self.second_order else -1 if self.clock else None]


PROBLEMS = {
    "lotka_volterra": Problem(lotka_volterra, (20.0, 20.0), 50.0),
    "fitzhugh_nagumo": Problem(fitzhugh_nagumo, (-1.0, 1.0), 20.0),
    "rigid_body": Problem(rigid_body, (1.0, 0.0, 0.9), 20.0),
    "van_der_pol_1": Problem(van_der_pol, (2.0, 0.0), 10.0),
    "logistic": Problem(logistic, (0.1,), 10.0),
}
FURTHER = {
    "henon_heiles": Problem(henon_heiles, (0.0, 0.1, 0.5, 0.0), 50.0, second_order=True),
    "van_der_pol_50": Problem(stiff_van_der_pol, (2.0, 0.0), 45.0, longest=0.01),
}
LIFTED = {
    "three_body": Problem(three_body, (0.994, 0.0, 0.0, -2.00158510637908252), 0.5, longest=0.001),
    "pleiades": Problem(pleiades, tuple(problems.PROBLEMS["pleiades"].u0), 3.0, longest=0.005),
    "driven_pendulum": Problem(driven_pendulum, (0.2, 0.0, 0.0), 20.0, clock=True),
    "quadratures": Problem(quadratures, (0.0, 0.0, 0.0, 0.0), 10.0, clock=True),
}
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)


def _extrapolated(field, u, h, rows=9):
    """The solution after one step of the extrapolated modified midpoint rule, of order up to 18."""
    table = []
    for i in range(rows):
        n = 2 * (i + 1)
        step = h / n
        before, now = u, u + step * np.array(field(u))
        for _ in range(n - 1):
            before, now = now, before + 2 * step * np.array(field(now))
        row = [(before + now + step * np.array(field(now))) / 2]
        for k in range(i):
            ratio = (np.longdouble(i + 1) / np.longdouble(i - k)) ** 2
            row.append(row[k] + (row[k] - table[k]) / (ratio - 1))
        table = row
        # On short steps further rows of the table change nothing but the time.
        if i > 1 and np.max(abs(row[-1] - row[-2])) <= 1e-18 * np.max(abs(u)):
            break
    return table[-1]


def solvers(nu):
    """Functions from an ODE to its solver, by name: the recommended configurations, and others for comparison."""
    import probode

    def ek(constraint, factorisation, calibration):
        return lambda ode: probode.Solver(
            probode.IWP(nu),
            constraint(ode),
            factorisation=factorisation,
            strategy=probode.FixedIntervalSmoother(),
            calibration=calibration,
            loop=probode.ForwardLoop(max_steps=2**15 if nu < 4 else 2**12),
        )

    twice = functools.partial(probode.TS0, evaluations=2)
    return {
        "EK1 leave one out": ek(probode.TS1, probode.Dense(), probode.LeaveOneOutCalibration()),
        "EK1 dynamic": ek(probode.TS1, probode.Dense(), probode.DynamicCalibration()),
        "EK1 leave one out, memory": ek(probode.TS1, probode.Dense(), probode.LeaveOneOutCalibration(memory=0.5)),
        "EK1 dynamic, memory": ek(probode.TS1, probode.Dense(), probode.DynamicCalibration(memory=0.5)),
        "EK1 mle": ek(probode.TS1, probode.Dense(), probode.MLECalibration()),
        "EK0 dynamic, per component": ek(probode.TS0, probode.BlockDiagonal(), probode.DynamicCalibration()),
        "EK0 twice dynamic, per component": ek(twice, probode.BlockDiagonal(), probode.DynamicCalibration()),
        "EK0 twice leave one out": ek(twice, probode.BlockDiagonal(), probode.LeaveOneOutCalibration()),
        "EK1 dynamic, per component": ek(probode.TS1, probode.BlockDiagonal(), probode.DynamicCalibration()),
        "EK1 leave one out, per component": ek(probode.TS1, probode.BlockDiagonal(), probode.LeaveOneOutCalibration()),
    }


def lifted_solvers(nu):
    """Functions from an ODE to a filter that observes all derivatives of the prior, by name."""
    import probode

    def taylor(evaluations):
        return lambda ode: probode.Solver(
            probode.IWP(nu),
            probode.TS0(ode.lifted(nu - ode.order), evaluations=evaluations),
            factorisation=probode.BlockDiagonal(),
            loop=probode.ForwardLoop(max_steps=2**13),
        )

    return {"Taylor, two evaluations": taylor(2), "Taylor, three evaluations": taylor(3)}


def between(solver, problem, u0, rtol, times=100):
    """The geometric mean of `chi^2 / d` at equidistant times, most of them between the steps."""
    ts = np.linspace(0.0, problem.end, times + 1)
    mean, std = _at(solver, u0, jnp.asarray(ts[1:]), jnp.array(rtol))
    error = np.asarray(mean) - _reference(problem, times)
    return float(np.exp(np.mean(np.log(np.mean((error / np.asarray(std)) ** 2, axis=1)))))


@eqx.filter_jit
def _at(solver, u0, ts, rtol):
    import probode

    solver = eqx.tree_at(lambda s: s.controller, solver, probode.IntegralController(rtol, rtol / 100))
    solution = solver.solve(u0, 0.0, ts[-1], save_at=ts)
    return solution.mean, solution.std


@functools.cache
def _reference(problem, times):
    return problem.reference(np.linspace(0.0, problem.end, times + 1))[1:]


def cases(further, lifted):
    """The names of the configurations for each problem, by the name of the problem."""
    if lifted:
        return dict.fromkeys([*PROBLEMS, "henon_heiles", *LIFTED], tuple(lifted_solvers(3)))
    neglecting = ("EK1 dynamic, per component", "EK1 leave one out, per component")
    remembering = ("EK1 leave one out, memory", "EK1 dynamic, memory")
    if not further:
        return dict.fromkeys(PROBLEMS, tuple(label for label in solvers(2) if label not in neglecting + remembering))
    coupled = ("EK1 leave one out", "EK1 dynamic", *remembering)
    return dict.fromkeys(FURTHER, coupled) | dict.fromkeys(PROBLEMS, neglecting + remembering)


def main() -> None:
    """Solve all problems with all configurations, write the table, print a summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="orders 3 and 5, three tolerances")
    parser.add_argument("--problem", action="append", choices=[*PROBLEMS, *FURTHER, *LIFTED])
    parser.add_argument("--further", action="store_true", help="second order, stiff, EK1 per component, memory")
    parser.add_argument("--lifted", action="store_true", help="filters that observe all derivatives, nu 3 to 8")
    options = parse(parser)

    import probode

    jax.config.update("jax_enable_x64", True)
    entries = []
    orders = (3, 4, 5, 6, 7, 8) if options.lifted else (2, 3, 4, 5)
    for name, labels in cases(options.further, options.lifted).items():
        if options.problem and name not in options.problem:
            continue
        problem = (PROBLEMS | FURTHER | LIFTED)[name]
        ode, u0 = problem.equation()
        for nu in (3, 5) if options.quick else orders:
            for label in labels:
                solver = (solvers(nu) | lifted_solvers(nu))[label](ode)
                report = probode.calibration_report(
                    solver,
                    problem.reference,
                    u0=u0,
                    t0=0.0,
                    t1=problem.end,
                    tolerances=(1e-4, 1e-6, 1e-8) if options.quick else TOLERANCES,
                    show=False,
                )
                print(f"\n{name}, {label}, nu = {nu}\n{report}", flush=True)
                rows = _rows(report)
                if options.lifted:
                    rows = [[*row, f"{between(solver, problem, u0, float(row[0])):.4g}"] for row in rows]
                entries += [(name, label, nu, *row) for row in rows]
                # A process has room for so many compiled programs only.
                jax.clear_caches()
    options.output.mkdir(parents=True, exist_ok=True)
    table = "calibration_further.csv" if options.further else "calibration.csv"
    table = "calibration_lifted.csv" if options.lifted else table
    with (options.output / table).open("w", newline="") as file:
        writer = csv.writer(file)
        columns = "problem method nu rtol steps error terminal trajectory smoothed inclination successful".split()
        writer.writerow(columns + (["between"] if options.lifted else []))
        writer.writerows(entries)
    _summary(entries)


def _rows(report):
    names = ("rtol", "steps", "error", "terminal", "trajectory", "smoothed", "inclination", "successful")
    columns = (getattr(report, name) for name in names)
    return [[f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in zip(*columns, strict=True)]


def _summary(entries):
    head = f"{'in [0.1, 10]':>13} {'in [1e-2, 10]':>14} {'in [1e-2, 100]':>15}"
    print(f"\n{'method':34} {'cases':>5} {head}   5 % .. 95 % (trajectory)")
    groups = {}
    for problem, method, _, _, _, _, _, trajectory, _, _, _, *elsewhere in entries:
        group = f"{method}, {problem}" if problem in FURTHER and not elsewhere else method
        groups.setdefault(group, []).append(float(trajectory))
        for ratio in elsewhere:
            groups.setdefault(f"{method}, between", []).append(float(ratio))
    for group, chi in groups.items():
        chi = np.array(chi)
        shares = [np.mean((chi >= least) & (chi <= top)) for least, top in ((0.1, 10), (1e-2, 10), (1e-2, 100))]
        low, high = np.nanquantile(chi, [0.05, 0.95])
        print(
            f"{group:34} {chi.size:5d} {shares[0]:13.2f} {shares[1]:14.2f} {shares[2]:15.2f}   {low:.1e} .. {high:.1e}"
        )


if __name__ == "__main__":
    main()
