"""Time of a log likelihood with its gradient: `python -m benchmarks.inference [--plain]`.

Lotka-Volterra on [0, 10] with 100 noisy observations of both components, at a tolerance of 1e-5, with respect to the
four parameters: the three likelihoods of probode, and probdiffeq's (a fixed-point smoother at the times of the data,
then the marginal likelihood of a time series). All are compiled in one process and run in turns.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from . import peers
from .problems import PROBLEMS
from .timing import Table, compare, parse


TOLERANCE = 1e-5
TIMES = np.linspace(0.0, 10.0, 101)[1:]
NOISE = 1.0
MAX_STEPS = 256


def main() -> None:
    """Measure, print and write the table."""
    options = parse(argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0]))

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    values, reference = _data()
    table = Table("inference", options.output)
    rates = jnp.asarray(PROBLEMS["lotka_volterra"].args)
    programs = {name: (jax.value_and_grad(fn), (rates,)) for name, fn in [*_ours(values), *_theirs(values)]}
    for name, timing in compare(programs).items():
        error = abs(float(timing.value[0]) / reference - 1)
        table.add("Lotka-Volterra, 100 data", name, timing, error=error)
    table.write()


def _data():
    """Noisy observations, and their log likelihood given the solution at a tolerance of 1e-12."""
    import probode

    problem = PROBLEMS["lotka_volterra"]
    solver = probode.Solver(
        probode.IWP(8),
        probode.TS1(probode.ODE(problem.vector_field)),
        controller=probode.IntegralController(1e-12, 1e-12),
    )
    truth = np.asarray(solver.solve(problem.u0, 0.0, 10.0, args=problem.args, save_at=TIMES).mean)
    noise = NOISE * np.random.default_rng(0).normal(size=truth.shape)
    density = -np.sum(noise**2) / (2 * NOISE**2) - noise.size * np.log(NOISE * np.sqrt(2 * np.pi))
    return truth + noise, density


def _ours(values):
    import probode

    problem = PROBLEMS["lotka_volterra"]
    data = probode.Observations(TIMES, values, NOISE)
    for method, nu in (("EK0", 3), ("EK0 twice", 4), ("EK1", 3)):
        prior, constraint, factorisation = peers.probode_method(method, probode.ODE(problem.vector_field), nu)
        solver = probode.Solver(
            prior,
            constraint,
            factorisation=factorisation,
            controller=probode.IntegralController(TOLERANCE, TOLERANCE),
            loop=probode.BoundedLoop(max_steps=MAX_STEPS),
        )
        for name in ("fenrir", "filtering", "dalton"):
            likelihood = getattr(probode, f"{name}_log_likelihood")

            def evaluate(rates, solver=solver, likelihood=likelihood):
                return likelihood(solver, problem.u0, 0.0, 10.0, data, args=rates)

            yield f"probode {method}({nu}) {name}", evaluate


def _theirs(values):
    import equinox.internal as eqxi
    from probdiffeq import ivpsolve
    from probdiffeq import probdiffeq as parts

    problem = PROBLEMS["lotka_volterra"]

    def loop(cond, body, init):
        return eqxi.while_loop(cond, body, init, kind="bounded", max_steps=32)

    for method, nu in (("TS0", 3), ("TS1", 3)):

        def evaluate(rates, method=method, nu=nu):
            def field(u, *, t):
                return problem.vector_field(t, u, rates)

            ode = parts.ode(field, jacobian=parts.jacobian_materialize())
            coefficients, _ = parts.jetexpand_ode_padded_scan(num=nu)(ode, (jnp.asarray(problem.u0),), t=0.0)
            model, constraint = peers.probdiffeq_method(method, ode)
            run = ivpsolve.solve_adaptive_save_at(
                solver=parts.solver_dynamic(strategy=parts.strategy_smoother_fixedpoint(), constraint=constraint),
                error=parts.error_residual_std(constraint=constraint),
                control=ivpsolve.control_proportional_integral(),
                while_loop=loop,
            )
            times = jnp.concatenate([jnp.zeros(1), TIMES])
            solution = run(
                model.prior_wiener_integrated(coefficients), save_at=times, rtol=TOLERANCE, atol=TOLERANCE, dt0=0.01
            )
            # probdiffeq's likelihood needs a datum at every saved time, the start included: the initial value itself.
            seen = jnp.concatenate([jnp.asarray(problem.u0)[None], values])
            std = jnp.ones_like(solution.u.std[0])
            loss = parts.loss_lml_timeseries(average_pdfs=False)
            density = loss(seen, posterior=solution.solution_full, std=NOISE * std)
            # The other likelihoods have no datum at the start: without this they would differ by its log density.
            return density + 2 * jnp.log(NOISE * jnp.sqrt(2 * jnp.pi))

        yield f"probdiffeq {method}({nu})", evaluate


if __name__ == "__main__":
    main()
