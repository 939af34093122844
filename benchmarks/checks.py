"""What `Solution.check` says of solutions that are wrong, or hard to get, and of those that are right.

`python -m benchmarks.checks` solves each case with the steps kept, checks it, and compares with an accurate solution:
the findings, the true error relative to the largest value of its component, and the time of the check over that of the
solve, both compiled before. A case of the first kind should have a finding, one of the second none.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .problems import PROBLEMS
from .timing import in_turns, parse, result_file, versions, write_rows


class Case(NamedTuple):
    """An initial value problem and how it is solved; `method`: that of `solve_ivp`."""

    field: Any
    t1: float
    u0: Any
    method: str = "EK1"
    rtol: float = 1e-3
    args: Any = None
    t0: float = 0.0
    atol: float | None = None  # a thousandth of rtol
    max_steps: int = 20_000


def lorenz(t, u, args):
    """Lorenz's equations with the usual parameters."""
    return jnp.stack([10 * (u[1] - u[0]), u[0] * (28 - u[2]) - u[1], u[0] * u[1] - 8 / 3 * u[2]])


def kepler(t, u, args):
    """A body about a fixed one."""
    return jnp.concatenate([u[2:], -u[:2] / (u[0] ** 2 + u[1] ** 2) ** 1.5])


def pulse(t, u, args):
    """Decay with a pulse at a time, of a width."""
    return jnp.exp(-(((t - args[0]) / args[1]) ** 2)) - 0.1 * u


def runaway(t, u, args):
    """A bounded solution, `cos(t)`, from which all others run away."""
    return 10 * (u - jnp.cos(t)) - jnp.sin(t)


def attracted(t, u, args):
    """A solution, close to `cos(t)`, to which all others are drawn within a thousandth."""
    return -1000 * (u - jnp.cos(t))


def _standard(name, method, rtol):
    problem = PROBLEMS[name]
    u0 = np.asarray(problem.u0)
    # All states that may be kept have room in memory: with 64 components they are large.
    most = 20_000 if problem.dim < 32 else 512
    return Case(problem.vector_field, problem.t1, u0, method, rtol, problem.args, problem.t0, max_steps=most)


def _eccentric(e):
    return np.array([1 - e, 0.0, 0.0, ((1 + e) / (1 - e)) ** 0.5])


ONES, PENDULUM = np.ones(3), lambda t, u, args: jnp.stack([u[1], -jnp.sin(u[0])])
DOUBTFUL = {
    "pulse of width 0.01 in 10": Case(pulse, 10.0, 0.0, args=(5.3, 0.01)),
    "pulse of width 0.02 in 10": Case(pulse, 10.0, 0.0, args=(3.21, 0.02)),
    "pulse of width 0.003 in 10": Case(pulse, 10.0, 0.0, args=(7.7, 0.003)),
    "pulse after everything has decayed": Case(
        lambda t, u, args: -u + 10 * jnp.exp(-(((t - 57.3) / 0.05) ** 2)), 100.0, 1.0
    ),
    "Lorenz to t = 40, EK1": Case(lorenz, 40.0, ONES, rtol=1e-6),
    "Lorenz to t = 40, EK0": Case(lorenz, 40.0, ONES, "EK0", 1e-6),
    "Lorenz to t = 40, Taylor": Case(lorenz, 40.0, ONES, "Taylor", 1e-6),
    "Henon and Heiles, chaotic, EK0": Case(
        lambda t, u, args: jnp.stack([u[2], u[3], -u[0] - 2 * u[0] * u[1], -u[1] - u[0] ** 2 + u[1] ** 2]),
        500.0, np.array([0.0, 0.1, 0.49, 0.0]), "EK0",
    ),
    "all others run away, EK0": Case(runaway, 3.0, 1.0, "EK0"),
    "all others run away, EK1": Case(runaway, 3.0, 1.0),
    "pendulum that just turns over": Case(PENDULUM, 60.0, np.array([0.0, 2 - 1e-9])),
    "Kepler, eccentricity 0.9, 16 orbits, EK0": Case(kepler, 100.0, _eccentric(0.9), "EK0", 1e-4),
    "three bodies at a loose tolerance": _standard("arenstorf_three_body", "EK1", 1e-5),
    "step in the forcing, EK1": Case(lambda t, u, args: jnp.where(t > 3.3, 1.0, 0.0) - u, 10.0, 0.0),
    "step in the forcing, EK0": Case(lambda t, u, args: jnp.where(t > 3.3, 1.0, 0.0) - u, 10.0, 0.0, "EK0"),
    "square wave": Case(lambda t, u, args: jnp.sign(jnp.sin(t)) - u, 20.0, 0.0),
    "kink in the forcing": Case(lambda t, u, args: jnp.abs(t - 4.2) - u, 10.0, 0.0, rtol=1e-6),
    "spring that is stiffer on one side": Case(
        lambda t, u, args: jnp.stack([u[1], -jnp.where(u[0] > 0, 1.0, 5.0) * u[0]]), 20.0, np.array([1.0, 0.0]),
        rtol=1e-6,
    ),
    "dry friction that sticks": Case(
        lambda t, u, args: jnp.stack([u[1], jnp.sin(t) - u[0] - 0.5 * jnp.sign(u[1])]), 20.0, np.array([1.0, 0.0])
    ),
    "square root from zero, two solutions": Case(lambda t, u, args: jnp.sqrt(jnp.abs(u)), 5.0, 0.0),
    "blows up inside": Case(lambda t, u, args: u**2, 2.0, 1.0),
    "atol above the solution": Case(lambda t, u, args: -u, 5.0, 1e-9, atol=1e-6),
    "stiff, EK0": Case(attracted, 5.0, 0.0, "EK0"),
    "Van der Pol, mu = 1000, EK0": Case(
        PROBLEMS["van_der_pol_1e3"].vector_field, 0.5, np.array([2.0, 0.0]), "EK0", args=1e3
    ),
    "Lotka-Volterra in 20 attempts": _standard("lotka_volterra", "EK1", 1e-3)._replace(max_steps=20),
}  # fmt: skip
RIGHT = {
    **{
        f"{name.replace('_', ' ')}, {method}, {rtol:.0e}": _standard(name, method, rtol)
        for name in PROBLEMS
        for method in (["EK1"] if PROBLEMS[name].stiff or PROBLEMS[name].dim > 20 else ["EK1", "EK0", "Taylor"])
        for rtol in (1e-3, 1e-6)
        if name not in ("arenstorf_three_body", "pleiades")
    },
    "pleiades, EK1, 1e-06": _standard("pleiades", "EK1", 1e-6),
    "arenstorf three body, EK1, 1e-08": _standard("arenstorf_three_body", "EK1", 1e-8),
    "arenstorf three body, Taylor, 1e-08": _standard("arenstorf_three_body", "Taylor", 1e-8),
    "decay": Case(lambda t, u, args: -u, 20.0, 1.0),
    "decay, backwards in time": Case(lambda t, u, args: -u, 0.0, 1.0, t0=2.0),
    "decay of 1e-9, with an atol of 1e-15": Case(lambda t, u, args: -u, 5.0, 1e-9, atol=1e-15),
    "growth": Case(lambda t, u, args: u, 10.0, 1.0),
    "forced decay": Case(lambda t, u, args: jnp.cos(3 * t) - u, 20.0, 1.0),
    "forced decay at the time of a Unix clock": Case(lambda t, u, args: jnp.cos(t) - u, 1.6e9 + 20, 0.0, t0=1.6e9),
    "oscillator": Case(lambda t, u, args: jnp.stack([u[1], -u[0]]), 50.0, np.array([1.0, 0.0])),
    "oscillator, EK0": Case(lambda t, u, args: jnp.stack([u[1], -u[0]]), 20.0, np.array([1.0, 0.0]), "EK0"),
    "stiff": Case(attracted, 5.0, 0.0),
    "pulse of width 1 in 10": Case(pulse, 10.0, 0.0, args=(5.0, 1.0)),
    "front of width 0.1": Case(lambda t, u, args: 10 / jnp.cosh((t - 5) / 0.1) ** 2, 10.0, 0.0),
    "Kepler, eccentricity 0.5": Case(kepler, 20.0, _eccentric(0.5), rtol=1e-6),
    "chain of decays": Case(
        lambda t, u, args: jnp.stack([-u[0], u[0] - 3 * u[1], 3 * u[1]]), 10.0, np.array([1.0, 0.0, 0.0])
    ),
    "Lorenz to t = 5": Case(lorenz, 5.0, ONES, rtol=1e-6),
    "power of a sine that is flat at the ends": Case(lambda t, u, args: jnp.sin(jnp.pi * t) ** 16 - u, 1.0, 0.0),
    "Duffing, EK0": Case(
        lambda t, u, args: jnp.stack([u[1], -0.1 * u[1] - u[0] ** 3 + 12 * jnp.cos(t)]),
        100.0,
        np.array([1.0, 0.0]),
        "EK0",
        1e-5,
    ),
    "flame": Case(lambda t, u, args: u**2 - u**3, 2e4, 1e-4),
    "pendulum": Case(PENDULUM, 20.0, np.array([1.0, 0.0])),
}


def main() -> None:
    """Measure, print and write the table."""
    options = parse(argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__.splitlines()[0]))

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    rows = []
    for kind, cases in (("doubtful", DOUBTFUL), ("right", RIGHT)):
        for name, case in cases.items():
            row = {"case": name, "kind": kind, **measured(case)}
            as_it_should = bool(row["findings"]) == (kind == "doubtful")
            mark = "" if as_it_should else "   <-- not as it should be"
            print(f"{name:<44} {row['findings'] or '-':<28} error {row['error']:.1e}  cost {row['cost']:.2f}{mark}")
            rows.append({**row, "as_it_should": as_it_should, **versions()})
    write_rows(result_file("checks", options.output), rows)
    for kind in ("doubtful", "right"):
        chosen = [row for row in rows if row["kind"] == kind]
        print(f"{kind}: {sum(row['as_it_should'] for row in chosen)} of {len(chosen)} as they should be")


def measured(case: Case) -> dict[str, Any]:
    """The findings, the true error at the end, the number of steps, the cost of the check over that of the solve."""
    import probode

    atol = 1e-3 * case.rtol if case.atol is None else case.atol
    controller = probode.IntegralController(case.rtol, atol)

    # The cases hold NumPy arrays: one of JAX would start its backend before probode has set XLA's options.
    case = case._replace(u0=jnp.asarray(case.u0, float))
    solver = _solver(case, controller)
    save_at = probode.SaveAt(t0=True, steps=True, dense=True)
    solve = lambda: solver.solve(case.u0, case.t0, case.t1, args=case.args, save_at=save_at, throw=False)  # noqa: E731
    solution = solve()
    report = solution.check()
    taken = in_turns([solve, lambda: solution.check().std], repeats=5, seconds=1.0)
    kinds = list(dict.fromkeys(finding.kind for finding in report.findings))
    return {
        "findings": ", ".join(kinds),
        "error": _error(case, solution),
        "steps": int(solution.stats["num_accepted_steps"]),
        "cost": min(taken[1]) / min(taken[0]),
    }


def _solver(case, controller):
    """The solver of `solve_ivp(method=...)`, as a filter that keeps its steps."""
    import probode

    ode = probode.ODE(case.field)
    prior, constraint, factorisation = {
        "EK1": lambda: (probode.RelativeScale(probode.IWP(4)), probode.TS1(ode), probode.Dense()),
        "EK0": lambda: (probode.IWP(4), probode.TS0(ode), probode.Isotropic()),
        "Taylor": lambda: (probode.IWP(5), probode.TS0(ode.lifted(4), evaluations=3), probode.BlockDiagonal()),
    }[case.method]()
    loop = probode.BoundedLoop(case.max_steps)
    return probode.Solver(prior, constraint, factorisation=factorisation, controller=controller, loop=loop)


def _error(case, solution):
    """The error at the time that was reached, relative to the largest value of its component; by SciPy at 1e-12."""
    from scipy.integrate import solve_ivp

    import probode

    field = jax.jit(lambda t, u: jnp.ravel(case.field(t, jnp.reshape(u, jnp.shape(case.u0)), case.args)))
    last = int(solution.stats["num_accepted_steps"])
    t, u = np.asarray(solution.t), np.asarray(solution.mean).reshape(solution.t.size, -1)
    if solution.result != probode.Result.successful:
        return float("nan")
    longest = abs(t[last] - t[0]) / 500  # so that it sees pulses
    accurate = {"method": "LSODA", "rtol": 1e-11, "atol": 1e-14, "max_step": longest}
    found = solve_ivp(field, (case.t0, t[last]), np.ravel(case.u0), **accurate)
    size = np.maximum(np.max(abs(u[: last + 1]), axis=0), np.max(abs(found.y), axis=1))
    return float(np.max(abs(u[last] - found.y[:, -1]) / size)) if found.success else float("nan")


if __name__ == "__main__":
    main()
