"""Boundary value problems with closed forms, beside SciPy's solve_bvp: `python -m benchmarks.boundary_values`.

Nodes, the largest error over the tolerance at the nodes and between them, the mean square of errors over standard
deviations, and the time of a compiled solve. SciPy gets the same first mesh and guess, vectorised NumPy functions, and
the loosest of several tolerances with which its error is not larger; its share of the table is the time that it needs
over ours. Times are the fastest of several, in turns.
"""

from __future__ import annotations

import argparse
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from .timing import parse, result_file, versions, write_rows


TOLERANCES = (1e-4, 1e-6, 1e-8)
WIDTHS = (1e-1, 1e-2, 1e-3, 1e-4)
SCIPY = 10.0 ** -np.arange(2, 12)


def corner(xp, t, small):
    """The solution of ``small u'' = 1 - u'^2``."""
    return 1 + small * (xp.logaddexp((t - 0.745) / small, (0.745 - t) / small) - math.log(2))


def erf(x):
    """The error function of an array, in NumPy."""
    return np.asarray(jax.scipy.special.erf(x))


def bratu(t, small):
    """The lower solution of ``u'' = -exp(u)``."""
    th = 1.5171645990507543
    return -2 * np.log(np.cosh((t - 0.5) * th / 2) / np.cosh(th / 4))


def layer(t, small):
    """A layer in the middle of the interval."""
    return np.cos(np.pi * t) + erf(t / np.sqrt(2 * small)) / math.erf(1 / math.sqrt(2 * small))


def decay(t, small):
    """A layer at the start."""
    width = np.sqrt(small)
    return (np.exp(-t / width) - np.exp((t - 2) / width)) / -np.expm1(-2 / width)


# Right-hand side (of arrays of either library), interval, solution; the values at the ends are those of the solution.
PROBLEMS = {
    "decay": (lambda xp, t, u, du, s: u / s, (0.0, 1.0), decay),
    "convection": (
        lambda xp, t, u, du, s: du / s, (0.0, 1.0), lambda t, s: -np.expm1((t - 1) / s) / -np.expm1(-1 / s),
    ),
    "turning point": (
        lambda xp, t, u, du, s: -(t * du + s * np.pi**2 * xp.cos(np.pi * t) + np.pi * t * xp.sin(np.pi * t)) / s,
        (-1.0, 1.0), layer,
    ),
    "peak": (lambda xp, t, u, du, s: -(4 * t * du + 2 * u) / (s + t**2), (-1.0, 1.0), lambda t, s: 1 / (s + t**2)),
    "corner": (lambda xp, t, u, du, s: (1 - du**2) / s, (0.0, 1.0), lambda t, s: corner(np, t, s)),
    "square": (
        lambda xp, t, u, du, s: (u + u**2 - xp.exp(-2 * t / xp.sqrt(s))) / s, (0.0, 1.0),
        lambda t, s: np.exp(-t / np.sqrt(s)),
    ),
    "Bratu": (lambda xp, t, u, du, s: -xp.exp(u) + 0 * s, (0.0, 1.0), bratu),
}  # fmt: skip


def fastest(fn, repeats):
    """The shortest time of several calls, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return min(times)


def scipy_solution(name, small, tol):
    """SciPy's solution from the line between the values at the ends."""
    from scipy.integrate import solve_bvp

    field, (t0, t1), exact = PROBLEMS[name]
    a, b = exact(np.array([t0, t1]), small)
    t = np.linspace(t0, t1, 11)
    line = np.stack([a + (t - t0) / (t1 - t0) * (b - a), np.full_like(t, (b - a) / (t1 - t0))])
    return solve_bvp(
        lambda t, y: np.stack([y[1], field(np, t, y[0], y[1], small)]),
        lambda ya, yb: np.array([ya[0] - a, yb[0] - b]),
        t,
        line,
        tol=tol,
        max_nodes=100_000,
    )


def measured(repeats: int) -> list[dict]:
    """A row for each problem, width and tolerance."""
    import probode as po

    def conditions(ua, ub, args):
        return ua[0] - args[1][0], ub[0] - args[1][1]

    rows = []
    for name, (field, (t0, t1), exact) in PROBLEMS.items():
        ode = po.ODE(lambda t, u, du, args, field=field: field(jnp, t, u, du, args[0]), order=2)
        solve = jax.jit(
            lambda args, line, tol, ode=ode, t0=t0, t1=t1: po.solve_bvp(
                ode, conditions, (t0, t1), line, args=args, rtol=tol, atol=tol, throw=False
            )
        )
        for small in WIDTHS if name != "Bratu" else WIDTHS[:1]:
            values = exact(np.array([t0, t1]), small)
            line = jnp.asarray(np.linspace(values[0], values[1], 11))
            args = (jnp.asarray(small), jnp.asarray(values))
            for tol in TOLERANCES:
                solution = solve(args, line, jnp.asarray(tol))
                row = {"problem": name, "small": small, "tol": tol, "nodes": int(solution.stats["num_nodes"])}
                row["result"] = po.Result[solution.result]
                t = np.asarray(solution.t)[: row["nodes"]]
                t = np.sort(np.concatenate([t, (t[1:] + t[:-1]) / 2]))
                known, true = solution.evaluate(t), exact(t, small)
                error, std = np.abs(np.asarray(known.mean) - true), np.asarray(known.std)
                row["error_over_tol"] = float(np.max(error / (tol + tol * np.abs(true))))
                told = std > 1e-14 * (1 + np.abs(true))
                row["chi2"] = float(np.mean((error[told] / std[told]) ** 2)) if told.any() else math.nan
                row["seconds"] = fastest(lambda: solve(args, line, jnp.asarray(tol)).t, repeats)  # noqa: B023
                row |= beside(name, small, float(np.max(error)), row["result"], repeats)
                rows.append(row)
                print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def beside(name, small, error, result, repeats):
    """SciPy's nodes and time at the loosest tolerance with which its error is not larger."""
    (t0, t1), exact = PROBLEMS[name][1:]
    ts = np.linspace(t0, t1, 20_001)
    for tol in SCIPY:
        if result != "successful":
            break
        with np.errstate(all="ignore"):
            found = scipy_solution(name, small, tol)
        if found.status == 0 and np.max(np.abs(found.sol(ts)[0] - exact(ts, small))) <= max(error, 1e-11):
            seconds = fastest(lambda tol=tol: scipy_solution(name, small, tol).x, repeats)
            return {"scipy_nodes": found.x.size, "scipy_seconds": seconds}
    return {"scipy_nodes": math.nan, "scipy_seconds": math.nan}


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.boundary_values", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="how often each solve is repeated")
    options = parse(parser)

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    rows = measured(options.repeats)
    write_rows(result_file("boundary_values", options.output), [row | versions() for row in rows])


if __name__ == "__main__":
    main()
