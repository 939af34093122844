"""The share of fits that find the parameters: `python -m benchmarks.tempering [--problem pendulum] [--starts 50]`.

Three methods start from the same points, far from the optimum: least squares on accurate solves, Fenrir's likelihood
with an output scale of one, and the same likelihood with diffusion tempering, by `probode.fit` on the logarithms of the
parameters. A fit has converged if its parameters are within 5 % (root mean square, relative). The problems are similar
to those of Beck et al. (2024), "Diffusion tempering": a pendulum with an unknown length, a predator-prey model with two
unknown rates. The table's `error` is the share of starts from which a fit did not converge; its times include
compilation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .timing import Table, Timing, parse, timed


NOISE = 0.1
STEP = 0.05
ITERATIONS = 60


def lotka_volterra(t, u, args):
    """The vector field of a predator-prey model with two unknown rates, `args`; the other two rates are one."""
    return jnp.stack([args[0] * u[0] - u[0] * u[1], -args[1] * u[1] + u[0] * u[1]])


def pendulum(t, u, du, args):
    """The angular acceleration of a pendulum of unknown length `args[0]`."""
    return -9.81 / args[0] * jnp.sin(u)


# vector field, its order, initial value, true parameters, largest start, end, number of observations
PROBLEMS = {
    "pendulum": (pendulum, 2, ([jnp.pi / 4], [0.0]), [3.0], 10.0, 10.0, 100),
    "lotka_volterra": (lotka_volterra, 1, [1.0, 1.0], [1.5, 3.0], 5.0, 20.0, 40),
}


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tempering", description=__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, help="one of them alone")
    parser.add_argument("--starts", type=int, default=50)
    options = parse(parser)

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    for name in [options.problem] if options.problem else PROBLEMS:
        table = Table(f"tempering_{name}", options.output)
        true, fits = _problem(name, options.starts)
        for method, fit in fits.items():
            seconds, found = timed(fit)
            deviation = np.sqrt(np.mean((found / true - 1) ** 2, axis=1))
            fraction = float(np.mean(deviation < 0.05))
            print(f"{name}, {method}: {fraction:.2f} of {options.starts} converged", flush=True)
            table.add(name, method, Timing(0.0, seconds, seconds, found), error=1 - fraction)
        table.write()


def _problem(name: str, number: int) -> tuple[np.ndarray, dict[str, Callable[[], np.ndarray]]]:
    """The true parameters, and the methods by name: functions that return what was found from every start."""
    import probode

    field, order, u0, true, largest, t1, count = PROBLEMS[name]
    ode = probode.ODE(field, order=order)
    u0 = tuple(jnp.asarray(u) for u in u0) if order == 2 else jnp.asarray(u0)
    ts = np.linspace(0.0, t1, count + 1)[1:]
    rng = np.random.default_rng(1)
    accurate = probode.Solver(
        probode.IWP(6),
        probode.TS1(ode),
        controller=probode.IntegralController(1e-5, 1e-6),
        loop=probode.BoundedLoop(1024),
    )
    values = np.asarray(accurate.solve(u0, 0.0, t1, args=jnp.asarray(true), save_at=ts).mean)
    values = values + NOISE * rng.normal(size=values.shape)
    data = probode.Observations(ts, values, NOISE)
    starts = jnp.asarray(rng.uniform(0.1, largest, size=(number, len(true))))
    # Steps of fixed length: tolerances so loose that the longest step is always accepted.
    likely = probode.Solver(
        probode.IWP(2 + order),
        probode.TS1(ode),
        calibration=probode.NoCalibration(),
        controller=probode.IntegralController(1e3, 1e3, dt_max=STEP),
        loop=probode.BoundedLoop(512),
    )

    def closeness(solver, u0, t0, t1, data, *, args):
        solution = solver.solve(u0, t0, t1, args=args, save_at=data.ts, throw=False)
        squares = jnp.sum((solution.mean - values) ** 2) / (2 * NOISE**2)
        return jnp.where(solution.result == probode.Result.successful, -squares, -jnp.inf)

    def ends(solver, **how):
        """Where the searches from all starts end."""
        how = {"positive": True, "max_iterations": ITERATIONS, **how}
        return np.asarray(probode.fit(solver, u0, 0.0, t1, data, starts[0], starts=starts, **how).ends)

    fits = {
        "least squares": lambda: ends(accurate, likelihood=closeness),
        "Fenrir": lambda: ends(likely),
        "Fenrir, tempered": lambda: ends(likely, tempering=probode.DiffusionTempering()),
    }
    return np.asarray(true), fits


if __name__ == "__main__":
    main()
