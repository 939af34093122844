"""Time of a thousand solves in one call: `python -m benchmarks.lanes [--plain] [--lanes 1000]`.

A lane is one of these solves; only its end is kept. Lanes of equal cost, Lotka-Volterra on [0, 10] at rtol 1e-5 from
initial values on a line: `solve_ensemble` in blocks of several sizes, and `jax.vmap` of all three JAX packages. Lanes
of different cost, Van der Pol with mu from 1 to 100: blocks of lanes in random order, and sorted by expected cost. On
an accelerator all lanes are one block, 100,000 lanes are measured too, and the table has a file of its own.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from . import peers
from .problems import PROBLEMS, van_der_pol
from .timing import Table, compare, parse


def uniform(lanes: int, dtype) -> dict:
    """Functions that are timed, by name, each with its arguments: lanes of equal cost."""
    import probode

    problem = PROBLEMS["lotka_volterra"]
    args = jax.tree.map(lambda x: jnp.asarray(x, dtype), problem.args)
    u0s = jnp.asarray(20.0 + np.linspace(0.0, 1.0, lanes)[:, None] * np.ones(2), dtype)
    programs, accelerator = {}, jax.default_backend() != "cpu"
    ode = probode.ODE(problem.vector_field)
    for method, nu in (("EK0", 3), ("EK0 twice", 3), ("EK0 twice", 4), ("Taylor twice", 3), ("Taylor", 4)):
        label = f"{method}({nu})"
        prior, constraint, factorisation = peers.probode_method(method, ode, nu)
        solver = probode.Solver(
            prior,
            constraint,
            factorisation=factorisation,
            controller=probode.IntegralController(1e-5, 1e-7),
            loop=probode.ForwardLoop(2000),
        )
        for block in (lanes,) if accelerator else (1, 16, 64, lanes):

            def solve(u0s, solver=solver, block=block):
                return probode.solve_ensemble(solver, u0s, 0.0, 10.0, args=args, lanes_per_block=block).mean[:, -1]

            programs[f"probode {label} blocks of {block}"] = solve, (u0s,)

        def one(u0, solver=solver):
            return solver.solve(u0, 0.0, 10.0, args=args, throw=False).mean[-1]

        if not accelerator:  # there the one block is the same program
            programs[f"probode {label} vmap"] = jax.vmap(one), (u0s,)
    shorter = problem.until(10.0)
    if dtype == jnp.float32:
        return programs  # the peers do not run in single precision while double is enabled
    if peers.available("probdiffeq"):
        for nu in (3, 4):
            solve = peers.probdiffeq_function(shorter, "TS0", nu, "dynamic", "residual", "integral")
            one = lambda u0, solve=solve: solve(u0, args, 1e-5, 1e-7).u  # noqa: E731
            programs[f"probdiffeq TS0({nu}) vmap"] = jax.vmap(one), (u0s,)
    if peers.available("diffrax"):
        solve = peers.diffrax_function(shorter, "Tsit5", False)
        programs["diffrax Tsit5 vmap"] = jax.vmap(lambda u0: solve(u0, args, 1e-5, 1e-7).u), (u0s,)
    return programs


def uneven(lanes: int) -> dict:
    """Functions that are timed, by name, each with its arguments: lanes whose cost varies by a factor of ten."""
    import probode

    mu = jnp.asarray(np.random.default_rng(0).permutation(np.geomspace(1.0, 100.0, lanes)))
    solver = probode.Solver(
        probode.IWP(4),
        probode.TS1(probode.ODE(van_der_pol)),
        controller=probode.IntegralController(1e-4, 1e-6),
        loop=probode.ForwardLoop(2000),
    )
    programs = {}
    for block in (1, 16, 64):
        for name, cost in (("in any order", None), ("sorted by cost", mu)):

            def solve(mu, block=block, cost=cost):
                return probode.solve_ensemble(
                    solver,
                    jnp.array([2.0, 0.0]),
                    0.0,
                    3.0,
                    args=mu,
                    in_axes=(None, None, None, 0),
                    lanes_per_block=block,
                    cost=cost,
                ).mean[:, -1]

            programs[f"probode EK1(4) blocks of {block}, {name}"] = solve, (mu,)
    return programs


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lanes", description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=1000)
    options = parse(parser)

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    table = Table("lanes", options.output)
    accelerator = jax.default_backend() != "cpu"
    for dtype in (jnp.float64, jnp.float32):
        for lanes in (options.lanes, 100_000) if accelerator else (options.lanes,):
            for name, timing in compare(uniform(lanes, dtype), repeats=10).items():
                table.add(f"{lanes} lanes {dtype.__name__}", name, timing)
    if not accelerator:
        for name, timing in compare(uneven(options.lanes), repeats=5).items():
            table.add(f"{options.lanes} uneven lanes", name, timing)
    table.write()


if __name__ == "__main__":
    main()
