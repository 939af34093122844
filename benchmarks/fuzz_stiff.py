"""Errors of `TS1` and Kvaerno5 at the ends of stiff problems: `python -m benchmarks.fuzz --stiff`.

All problems of `problems`, stiff or not, are among them. Errors are in units of the tolerance; `atol` is a thousandth
of `rtol` times the size of the smallest component that matters. Equations and end values: test set for IVP solvers
(Mazzia & Magherini, 2008); Hairer & Wanner (1996).
"""

from __future__ import annotations

import functools
import itertools
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import problems
from .timing import result_file, write_rows


MAX_STEPS, QUICK_STEPS = 2**15, 2**14
RTOLS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
# One output scale for all components, or one in proportion to the size of each; and the equation with two of its
# derivatives.
METHODS = ("IWP", "relative", "relative, two levels")
LARGE = 20  # problems with more components are solved with priors of order four alone

# POLLU (Verwer, 1994), 25 reactions of 20 species: rate, species that react, species lost, species made.
REACTIONS = (
    (0.35, (1,), (1,), (2, 3)),
    (26.6, (2, 4), (2, 4), (1,)),
    (1.23e4, (5, 2), (5, 2), (6, 1)),
    (8.6e-4, (7,), (7,), (5, 5, 8)),
    (8.2e-4, (7,), (7,), (8,)),
    (1.5e4, (7, 6), (7, 6), (8, 5)),
    (1.3e-4, (9,), (9,), (10, 8, 5)),
    (2.4e4, (9, 6), (9, 6), (11,)),
    (1.65e4, (11, 2), (11, 2), (10, 12, 1)),
    (9e3, (11, 1), (11, 1), (13,)),
    (0.022, (13,), (13,), (11, 1)),
    (1.2e4, (10, 2), (10, 2), (14, 1)),
    (1.88, (14,), (14,), (7, 5)),
    (1.63e4, (1, 6), (1, 6), (15,)),
    (4.8e6, (3,), (3,), (4,)),
    (3.5e-4, (4,), (4,), (16,)),
    (0.0175, (4,), (4,), (3,)),
    (1e8, (16,), (16,), (6, 6)),
    (4.44e11, (16,), (16,), (3,)),
    (1.24e3, (17, 6), (17, 6), (18, 5)),
    (2.1, (19,), (19,), (2,)),
    (5.78, (19,), (19,), (1, 3)),
    (0.0474, (1, 4), (1, 4), (19,)),
    (1.78e3, (19, 1), (19, 1), (20,)),
    (3.12, (20,), (20,), (1, 19)),
)


@functools.lru_cache
def _changes() -> np.ndarray:
    """The stoichiometric matrix, `(species, reactions)`: how much a reaction adds to each species."""
    changes = np.zeros((20, len(REACTIONS)))
    for j, (_, _, lost, made) in enumerate(REACTIONS):
        np.add.at(changes[:, j], np.array(lost) - 1, -1)
        np.add.at(changes[:, j], np.array(made) - 1, 1)
    return changes


def pollu(t, u, args):
    """The vector field of the air pollution problem POLLU."""
    rates = [rate * math.prod(u[i - 1] for i in species) for rate, species, _, _ in REACTIONS]
    return jnp.asarray(_changes()) @ jnp.stack(rates)


def oregonator(t, u, args):
    """The vector field of the Oregonator, a model of the Belousov-Zhabotinskii reaction."""
    x, y, z = u[0], u[1], u[2]
    return jnp.stack([77.27 * (y + x * (1 - 8.375e-6 * x - y)), (z - (1 + x) * y) / 77.27, 0.161 * (x - z)])


def e5(t, u, args):
    """The vector field of E5: four species whose concentrations span twenty orders of magnitude."""
    a, b, c, mc = 7.89e-10, 1.1e7, 1.13e3, 1.13e9
    w, x, y, z = u[0], u[1], u[2], u[3]
    first, second, third, back = a * w, b * w * y, mc * x * y, c * z
    return jnp.stack([-first - second, first - third, first - second - third + back, second - back])


class Case(NamedTuple):
    """A problem with the size of its smallest component that matters."""

    problem: problems.Problem
    small: float = 1.0


def _case(name, field, u0, t1, u1, small=1.0, args=None):
    arrays = np.array(u0, float), 0.0, t1, np.array(u1, float)
    return Case(problems.Problem(name, field, *arrays, stiff=True, source=__doc__, args=args), small)


VAN_DER_POL = {  # at t = 2
    1e0: (0.3233166670461544, -1.8329745679858171),
    1e1: (-1.5818408231740375, 0.9784489158356899),
    1e2: (1.939358532782655, -0.7008150573580799),
    1e3: (1.7632345402034444, -0.8356886816777198),
    1e4: (1.7185872080192515, -0.8796821912416953),
    1e5: (1.708407821418, -0.8904134976480),
    1e6: (1.706167732170, -0.8928097010249),
}
OREGONATOR_END = 1.000814870318523, 1228.178521549917, 132.0554942846706
POLLU_START = np.zeros(20)
POLLU_START[[1, 3, 6, 7, 8, 16]] = 0.2, 0.04, 0.1, 0.3, 0.01, 0.007
POLLU_END = (
    0.056462554800228076, 0.1342484130422332, 4.139734331099455e-09, 0.005523140207484434, 2.0189772623022325e-07,
    1.4645418634939742e-07, 0.07784249118998039, 0.3245075353396031, 0.007494013383880403, 1.622293157301578e-08,
    1.1358638332570862e-08, 0.0022305059757213603, 0.00020871628827986592, 1.396921016840175e-05, 0.008964884856898385,
    4.3528463693301616e-18, 0.006899219696263417, 0.0001007803037365948, 1.7721465139700122e-06, 5.682943292316542e-05,
)  # fmt: skip


def cases() -> dict[str, Case]:
    """All cases, by the names of their problems."""
    rates = problems.PROBLEMS["robertson"].args
    own = [
        _case("pollu", pollu, POLLU_START, 60.0, POLLU_END, 1e-6),
        _case("oregonator", oregonator, (1.0, 2.0, 3.0), 360.0, OREGONATOR_END),
        _case(
            "robertson_1e11",
            problems.robertson,
            (1.0, 0.0, 0.0),
            1e11,
            (2.0833401499338e-08, 8.3333607712648e-14, 0.99999997916651873),
            1e-10,
            rates,
        ),
        # The published values of the middle two components differ, but the equation keeps their difference equal to the
        # fourth, which is zero.
        _case("e5", e5, (1.76e-3, 0.0, 0.0, 0.0), 1e13, (0.0, 8.86123352128e-23, 8.86123352128e-23, 0.0), 1e-20),
        *(
            _case(f"van_der_pol_2_{mu:.0e}", problems.van_der_pol, (2.0, 0.0), 2.0, end, args=mu)
            for mu, end in VAN_DER_POL.items()
        ),
    ]
    small = {"robertson": 1e-6, "hires": 1e-2}
    others = [Case(problem, small.get(name, 1.0)) for name, problem in problems.PROBLEMS.items()]
    return {case.problem.name: case for case in own + others}


class End(NamedTuple):
    """The solution at the end, its standard deviation, the number of attempts, and the result code in words."""

    u: np.ndarray
    std: np.ndarray
    attempts: int
    result: str


def ours(problem: problems.Problem, order: int, rtol: float, atol: float, max_steps: int, method: str) -> End:
    """The end by `TS1` and one of the `METHODS`, with the default parts except for a loop of `max_steps`."""
    import probode as po

    controller, loop = po.IntegralController(rtol, atol), po.ForwardLoop(max_steps)
    process = po.IWP(order) if method == "IWP" else po.RelativeScale(po.IWP(order))
    ode = po.ODE(problem.vector_field)
    constraint = po.TS1(ode.lifted(2), evaluations=2) if method == METHODS[2] else po.TS1(ode)
    solver = po.Solver(process, constraint, controller=controller, loop=loop)
    solution = solver.solve(problem.u0, problem.t0, problem.t1, args=problem.args, throw=False)
    good = solution.result == po.Result.successful
    words = "successful" if good else po.Result[solution.result].split(". ")[0]
    return End(np.asarray(solution.mean[-1]), np.asarray(solution.std[-1]), int(solution.stats["num_steps"]), words)


def kvaerno5(problem: problems.Problem, rtol: float, atol: float) -> End:
    """The end by diffrax's Kvaerno5, with the same tolerances; it has no standard deviation."""
    import diffrax

    start, end, dt0, u0 = jnp.asarray(problem.t0), jnp.asarray(problem.t1), None, jnp.asarray(problem.u0)
    controller = diffrax.PIDController(rtol=jnp.asarray(rtol), atol=jnp.asarray(atol))
    args = jax.tree.map(jnp.asarray, problem.args)
    parts = {"args": args, "stepsize_controller": controller, "max_steps": 2**17, "throw": False}
    term, method = diffrax.ODETerm(problem.vector_field), diffrax.Kvaerno5()
    solution = diffrax.diffeqsolve(term, method, start, end, dt0, u0, **parts)
    good = bool(solution.result == diffrax.RESULTS.successful)
    u = np.asarray(solution.ys[-1])
    return End(u, np.full_like(u, np.nan), int(solution.stats["num_steps"]), "successful" if good else "stopped")


@functools.cache
def _peer(name: str, rtol: float, atol: float) -> End:
    return kvaerno5(cases()[name].problem, rtol, atol)


def compared(case: Case, method: str, order: int, rtol: float, max_steps: int) -> dict:
    """A row of the table: a problem, method, order and tolerance."""
    atol = 1e-3 * rtol * case.small
    right = case.problem.u1
    own, peer = ours(case.problem, order, rtol, atol, max_steps, method), _peer(case.problem.name, rtol, atol)
    error, theirs = (np.abs(end.u - right) for end in (own, peer))
    tolerance = atol + rtol * np.abs(right)
    with np.errstate(divide="ignore", invalid="ignore"):
        chi2 = np.mean((error / own.std) ** 2)
    return {
        "problem": case.problem.name,
        "method": method,
        "order": order,
        "rtol": rtol,
        "atol": f"{atol:.1e}",
        "attempts": own.attempts,
        "error": f"{np.max(error / tolerance):.3g}",
        "chi2": f"{chi2:.3g}",
        "result": own.result,
        "kvaerno5_attempts": peer.attempts,
        "kvaerno5_error": f"{np.max(theirs / tolerance):.3g}",
        "kvaerno5_result": peer.result,
    }


def summary(rows: list[dict]) -> str:
    """How often errors are near the tolerance, and the ratio of attempts to Kvaerno5's, as text."""
    lines = []
    for method, order in sorted({(row["method"], row["order"]) for row in rows}):
        own = [row for row in rows if (row["method"], row["order"]) == (method, order)]
        good = [row for row in own if row["result"] == "successful"]
        near = sum(0.01 <= float(row["error"]) <= 10 for row in good)
        below = sum(float(row["error"]) <= 10 for row in good)
        both = [row for row in good if row["kvaerno5_result"] == "successful"]
        ratios = [row["attempts"] / row["kvaerno5_attempts"] for row in both] or [math.nan]
        theirs = sum(row["kvaerno5_result"] == "successful" and float(row["kvaerno5_error"]) <= 10 for row in own)
        lines.append(
            f"{method}, order {order}: {len(good)} of {len(own)} successful, {near} with errors in [0.01, 10] "
            f"tolerances, {below} below 10 (Kvaerno5 {theirs}); attempts over Kvaerno5's: "
            f"median {np.median(ratios):.2f}, {np.min(ratios):.2f} .. {np.max(ratios):.2f}"
        )
    return "\n".join(lines)


def table(output: pathlib.Path, quick: bool = False) -> None:
    """Solve all problems at all tolerances, or with `quick` the small ones at two; write the table, print a summary."""
    rows = []
    print(
        f"{'problem':<24}{'method':>22}{'order':>6}{'rtol':>8}{'attempts':>10}{'error':>10}{'chi2':>10}{'Kvaerno5':>10}{'error':>10}"
    )
    for case in cases().values():
        size = case.problem.dim
        if quick and size > LARGE:
            continue
        orders, rtols = (4,) if quick or size > LARGE else (4, 5), (1e-3, 1e-6) if quick else RTOLS
        for method, order in itertools.product(METHODS, orders):
            for rtol in rtols:
                row = compared(case, method, order, rtol, QUICK_STEPS if quick else MAX_STEPS)
                rows.append(row)
                names = ("problem", "method", "order", "rtol", "attempts", "error", "chi2")
                names += ("kvaerno5_attempts", "kvaerno5_error")
                widths = (24, 22, 6, 8, 10, 10, 10, 10, 10)
                line = "".join(f"{row[name]!s:>{width}}" for name, width in zip(names, widths, strict=True))
                print(line, "" if row["result"] == "successful" else row["result"], flush=True)
        jax.clear_caches()
    write_rows(result_file("stiff_end_points", output), rows)
    print(summary(rows))
