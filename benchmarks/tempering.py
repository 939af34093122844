"""The share of fits that find the parameters: `python -m benchmarks.tempering [--problem pendulum] [--starts 50]`.

Three methods start from the same points, far from the optimum: least squares on accurate solves, Fenrir's likelihood
with an output scale of one, and the same likelihood with diffusion tempering. All use L-BFGS on the logarithms of the
parameters. The fourth is `probode.fit` with eight starts, by Fenrir's likelihood, too: the best of eight ends, for 500
random choices of eight from all starts. A fit has converged if its parameters are within 5 % (root mean square,
relative). The problems are similar to those of Beck et al. (2024), "Diffusion tempering": a pendulum with an unknown
length, a predator-prey model with two unknown rates. The table's `error` is the share of fits that did not converge;
its times include compilation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .timing import Table, Timing, parse, timed


GROUP = 8
NOISE = 0.1
STEP = 0.05


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
        true, starts, fits = _problem(name, options.starts)
        for method, fit in fits.items():
            seconds, found = timed(lambda fit=fit, starts=starts: fit(starts))
            deviation = np.sqrt(np.mean((np.exp(np.asarray(found)) / true - 1) ** 2, axis=1))
            fraction = float(np.mean(deviation < 0.05))
            print(f"{name}, {method}: {fraction:.2f} of {options.starts} converged", flush=True)
            table.add(name, method, Timing(0.0, seconds, seconds, found), error=1 - fraction)
        table.write()


def _problem(name: str, number: int) -> tuple[np.ndarray, jax.Array, dict[str, Callable]]:
    """The true parameters, starts for their logarithms, and the methods that fit them by name."""
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
    starts = jnp.log(jnp.asarray(rng.uniform(0.1, largest, size=(number, len(true)))))
    # Steps of fixed length: tolerances so loose that the longest step is always accepted.
    likely = probode.Solver(
        probode.IWP(2 + order),
        probode.TS1(ode),
        calibration=probode.NoCalibration(),
        controller=probode.IntegralController(1e3, 1e3, dt_max=STEP),
        loop=probode.BoundedLoop(512),
    )

    def misfit(parameters, solver):
        args = jnp.exp(parameters)
        solution = solver.solve(u0, 0.0, t1, args=args, save_at=ts, throw=False)
        squares = jnp.sum((solution.mean - values) ** 2) / (2 * NOISE**2)
        return jnp.where(solution.result == probode.Result.successful, squares, jnp.inf)

    def improbability(parameters, solver):
        return -probode.fenrir_log_likelihood(solver, u0, 0.0, t1, data, args=jnp.exp(parameters))

    def tempered(starts):
        few, many = _descent(improbability, 8), _descent(improbability, 30)
        for stage in probode.DiffusionTempering().solvers(likely):
            starts, last = few(starts, stage), stage
        return many(starts, last)

    def best_of_group(starts):
        options = {"starts": jnp.exp(starts), "positive": True}
        found = probode.fit(likely, u0, 0.0, t1, data, jnp.ones(len(true)), **options)
        groups = np.stack([rng.choice(number, GROUP, replace=False) for _ in range(500)])
        densities = np.asarray(found.log_densities)
        return jnp.log(found.ends)[np.array([group[np.argmax(densities[group])] for group in groups])]

    fits = {
        "least squares": lambda starts: _descent(misfit, 60)(starts, accurate),
        "Fenrir": lambda starts: _descent(improbability, 60)(starts, likely),
        "Fenrir, tempered": tempered,
        f"fit, {GROUP} starts": best_of_group,
    }
    return np.asarray(true), starts, fits


def _descent(fn: Callable, iterations: int) -> Callable:
    """A function of starts and solver: the ends of at most `iterations` iterations of L-BFGS from every start."""
    import equinox as eqx
    import optax

    optimiser = optax.lbfgs(memory_size=10)

    @eqx.filter_jit
    def run(starts, solver):
        def objective(x):
            return fn(x, solver)

        value_and_grad = optax.value_and_grad_from_state(objective)

        def step(carry):
            x, state, count, _ = carry
            value, grad = value_and_grad(x, state=state)
            move, state = optimiser.update(grad, state, x, value=value, grad=grad, value_fn=objective)
            new = x + move
            new = jnp.where(jnp.all(jnp.isfinite(new)), new, x)
            return new, state, count + 1, jnp.max(jnp.abs(new - x))

        def goes_on(carry):
            *_, count, moved = carry
            return (count < iterations) & (moved > 1e-6)  # of logarithms: a relative change of the parameters

        def one(start):
            return jax.lax.while_loop(goes_on, step, (start, optimiser.init(start), 0, jnp.inf))[0]

        return jax.lax.map(one, starts)  # one by one: under vmap every line search would take as long as the longest

    return run


if __name__ == "__main__":
    main()
