"""Growth with the dimension: `python -m benchmarks.dimension [--largest 1000000]`.

The Brusselator with weak diffusion on a circle, d = 10^3 .. 10^6: the time of a solve of twenty steps of fixed length,
its initial derivatives included, over the number of accepted steps, by EK0 (isotropic, and block-diagonal up to 10^5)
and by Tsit5. And Burgers' equation, which is stiff on fine grids, d = 16 .. 128: the time of a solve by EK1 (dense) and
by Kvaerno5.
"""

from __future__ import annotations

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np

from .timing import Table, compare, parse


STEPS = 20


def brusselator(t, u, args):
    """The Brusselator's vector field on a circle, with diffusion of strength one; `u` is x followed by y."""
    x, y = jnp.split(u, 2)
    reaction = x * x * y

    def diffusion(x):
        return jnp.roll(x, 1) - 2.0 * x + jnp.roll(x, -1)

    return jnp.concatenate([1.0 + reaction - 4.0 * x + diffusion(x), 3.0 * x - reaction + diffusion(y)])


def burgers(t, u, args):
    """The vector field of Burgers' equation by central differences: viscosity `args`, boundary values zero."""
    cells = u.size + 1
    padded = jnp.pad(u, 1)
    return args * cells**2 * (padded[2:] - 2.0 * u + padded[:-2]) - cells / 4.0 * (padded[2:] ** 2 - padded[:-2] ** 2)


def explicit(d: int, dtype) -> dict:
    """Functions that are timed, by name, each with its arguments: `STEPS` steps of fixed length on the Brusselator."""
    import diffrax

    import probode

    angle = 2.0 * math.pi * np.arange(d // 2) / (d // 2)
    u0 = jnp.asarray(np.concatenate([1.0 + 0.5 * np.sin(angle), 3.0 + 0.5 * np.cos(angle)]), dtype)
    dt = 0.01
    programs = {}
    for label, factorisation in (("isotropic", probode.Isotropic()), ("block-diagonal", probode.BlockDiagonal())):
        if label == "block-diagonal" and d > 100_000:
            continue
        solver = probode.Solver(
            probode.IWP(3),
            probode.TS0(probode.ODE(brusselator)),
            factorisation=factorisation,
            controller=probode.IntegralController(1e-1, 1e-1, dt_max=dt),
            loop=probode.ForwardLoop(1000),
        )

        def solve(u0, solver=solver):
            solution = solver.solve(u0, 0.0, STEPS * dt, dt0=dt, throw=False)
            return solution.mean[-1], solution.stats["num_accepted_steps"]

        programs[f"probode EK0(3) {label}"] = solve, (u0,)

    def tsit5(u0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(brusselator),
            diffrax.Tsit5(),
            0.0,
            STEPS * dt,
            dt,
            u0,
            adjoint=diffrax.ForwardMode(),
            stepsize_controller=diffrax.PIDController(1e-1, 1e-1, dtmax=dt),
        )
        return solution.ys[-1], solution.stats["num_accepted_steps"]

    return programs | {"diffrax Tsit5": (tsit5, (u0,))}


def stiff(d: int) -> dict:
    """Functions that are timed, by name, each with its arguments: Burgers' equation at rtol 1e-5."""
    import diffrax

    import probode

    u0 = jnp.asarray(np.sin(2.0 * math.pi * np.arange(1, d + 1) / (d + 1)))
    solver = probode.Solver(
        probode.IWP(3),
        probode.TS1(probode.ODE(burgers)),
        error=probode.StateError(),
        controller=probode.IntegralController(1e-5, 1e-5),
        loop=probode.ForwardLoop(2000),
    )

    def solve(u0):
        return solver.solve(u0, 0.0, 0.5, args=0.05, throw=False).mean[-1], jnp.zeros(())

    def kvaerno5(u0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(burgers),
            diffrax.Kvaerno5(),
            0.0,
            0.5,
            None,
            u0,
            args=0.05,
            adjoint=diffrax.ForwardMode(),
            stepsize_controller=diffrax.PIDController(1e-5, 1e-5),
        )
        return solution.ys[-1], jnp.zeros(())

    return {"probode EK1(3) dense": (solve, (u0,)), "diffrax Kvaerno5": (kvaerno5, (u0,))}


def slope(measured: dict[int, float]) -> float:
    """The exponent `p` in `value ~ size^p`, by least squares on logarithms; `measured` maps sizes to values."""
    return float(np.polyfit(np.log(list(measured)), np.log(list(measured.values())), 1)[0])


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dimension", description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=1_000_000, metavar="D")
    options = parse(parser)

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    table, growth = Table("dimension", options.output), {}
    for d in (10**k for k in range(3, round(math.log10(options.largest)) + 1)):
        for name, timing in compare(explicit(d, jnp.float64), repeats=10).items():
            steps = int(timing.value[1])
            table.add(f"Brusselator per step, d = {d}", name, timing, per=steps)
            growth.setdefault(name, {})[d] = timing.fastest / steps
    for d in (16, 32, 64, 128):
        timings = compare(stiff(d), repeats=5)
        ends = [timing.value[0] for timing in timings.values()]
        for name, timing in timings.items():
            table.add(f"Burgers, d = {d}", name, timing, error=float(jnp.max(jnp.abs(ends[0] - ends[1]))))
    for name, per_step in growth.items():
        print(f"{name}: time per step grows like d^{slope(per_step):.2f}")
    table.write()


if __name__ == "__main__":
    main()
