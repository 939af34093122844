"""How often a short pulse in a long interval is missed, by probode, SciPy and diffrax.

`u' = exp(-((t - c) / w)^2) - u / 10`, `u(0) = 0` on `[0, 10]`, `c` uniform, `w` log-uniform in `[0.01, 1]`. A pulse is
missed if `u(10)` is wrong by more than half of its exact value. Runs at the end of `python -m benchmarks.fuzz`, alone
with `--pulses`.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from .fuzz_families import of_pulse, pulse
from .timing import result_file, write_rows


SEED = 0
END = 10.0
RTOLS = (1e-3, 1e-6)


def draws(number: int) -> list[tuple[np.ndarray, float]]:
    """Pairs `(c, w)`, each with the exact value of `u` at the end."""
    rng = np.random.default_rng(SEED)
    pairs = np.stack([rng.uniform(0, END, number), np.exp(rng.uniform(math.log(0.01), 0, number))], axis=1)
    return [(pair, float(of_pulse(pair, None, np.array([END]))[0, 0])) for pair in pairs]


def solvers() -> dict[str, Callable[[np.ndarray, float], tuple[float, float, int, bool]]]:
    """Functions of `(c, w)` and `rtol`, by name.

    Each returns `u` at the end, its standard deviation, the number of attempts (for SciPy the number of evaluations of
    the field), and whether the solve succeeded.
    """
    import probode as po

    ode = po.ODE(pulse)
    return {
        "probode TS1": functools.partial(_ours, po.TS1(ode), po.Dense()),
        "probode TS0 isotropic": functools.partial(_ours, po.TS0(ode), po.Isotropic()),
        "probode TS0 block": functools.partial(_ours, po.TS0(ode), po.BlockDiagonal()),
        "scipy RK45": functools.partial(_scipy, "RK45"),
        "scipy DOP853": functools.partial(_scipy, "DOP853"),
        "diffrax Tsit5": _tsit5,
    }


def _ours(constraint, factorisation, p, rtol):
    import probode as po

    controller = po.IntegralController(rtol, 1e-3 * rtol)
    solver = po.Solver(po.IWP(4), constraint, factorisation=factorisation, controller=controller)
    solution = solver.solve(0.0, 0.0, END, args=p, throw=False)
    good = bool(solution.result == po.Result.successful)
    return float(solution.mean[-1]), float(solution.std[-1]), int(solution.stats["num_steps"]), good


def _scipy(method, p, rtol):
    from scipy.integrate import solve_ivp

    centre, width = p.tolist()
    field = lambda t, u: math.exp(-(((t - centre) / width) ** 2)) - 0.1 * u  # noqa: E731
    with np.errstate(invalid="ignore"):  # DOP853 divides zero by zero where all is zero
        found = solve_ivp(field, (0, END), [0.0], method=method, rtol=rtol, atol=1e-3 * rtol)
    return float(found.y[0, -1]), math.nan, found.nfev, found.success


def _tsit5(p, rtol):
    import diffrax

    controller = diffrax.PIDController(rtol=jnp.asarray(rtol), atol=jnp.asarray(1e-3 * rtol))
    span = (jnp.asarray(0.0), jnp.asarray(END), None, jnp.asarray(0.0))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(pulse), diffrax.Tsit5(), *span, args=jnp.asarray(p), stepsize_controller=controller, throw=False
    )
    good = bool(solution.result == diffrax.RESULTS.successful)
    return float(solution.ys[-1]), math.nan, int(solution.stats["num_steps"]), good


def table(output: pathlib.Path, number: int) -> None:
    """Count the pulses that each solver misses, and those that it misses by more than 100 standard deviations."""
    rows, drawn = [], draws(number)
    print(f"\n{'pulses':<26}{'rtol':>8}{'missed':>8}{'share':>8}{'sure':>8}{'failed':>8}{'attempts':>10}")
    for rtol in RTOLS:
        for name, solve in solvers().items():
            missed = sure = failed = 0
            attempts = []
            for p, right in drawn:
                mean, std, steps, good = solve(p, rtol)
                attempts.append(steps)
                failed += not good
                miss = good and abs(mean - right) > right / 2
                missed += miss
                sure += miss and abs(mean - right) > 100 * std
            row = {"method": name, "rtol": rtol, "draws": number, "missed": missed, "missed_share": missed / number}
            row |= {"beyond_100_std": sure if name.startswith("probode") else "", "failed": failed}
            rows.append({**row, "attempts_median": float(np.median(attempts))})
            print(
                f"{name:<26}{rtol:>8.0e}{missed:>8}{missed / number:>8.1%}{row['beyond_100_std']:>8}{failed:>8}"
                f"{np.median(attempts):>10g}",
                flush=True,
            )
    write_rows(result_file("pulses", output), rows)
