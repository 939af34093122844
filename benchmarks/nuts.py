"""What a gradient costs within NUTS, by NumPyro and by BlackJAX: `python -m benchmarks.nuts`.

The same posterior of two parameters of a logistic equation, the same step size and mass matrix (those NumPyro adapts),
as many draws: the time per gradient without compilation. NumPyro has the likelihood as
`probode.data_distribution`, BlackJAX as a function. `error` is the largest deviation of a posterior mean from that of
NumPyro, in standard deviations.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from .timing import Table, Timing, parse, timed


REPEATS = 3
TIMES, NOISE, RATE, CAPACITY, START = np.linspace(0.0, 8.0, 13)[1:], 0.08, 0.8, 2.0, 0.1


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nuts", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=500)
    options = parse(parser)

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    import blackjax
    import numpyro
    import numpyro.distributions as dist

    few, many = options.draws, 5 * options.draws
    exact = CAPACITY / (1 + (CAPACITY / START - 1) * np.exp(-RATE * TIMES))
    values = exact + NOISE * np.random.default_rng(3).normal(size=TIMES.size)
    data = probode.Observations(TIMES, values, NOISE)
    solver = probode.Solver(
        probode.IWP(3),
        probode.TS1(probode.ODE(lambda t, u, args: args[0] * u * (1 - u / args[1]))),
        controller=probode.IntegralController(1e-5, 1e-7),
        loop=probode.BoundedLoop(256),
    )
    args_of = lambda z: jnp.exp(0.5 * z)  # noqa: E731
    interval = START, 0.0, float(TIMES[-1])

    def model():
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        how = {"args": args_of(z), "likelihood": probode.filtering_log_likelihood}
        seen = probode.data_distribution(solver, *interval, TIMES, NOISE, **how)
        numpyro.sample("data", seen, obs=values)

    def log_density(z):
        likelihood = probode.filtering_log_likelihood(solver, *interval, data, args=args_of(z))
        return likelihood - jnp.sum(z**2) / 2

    sampler = numpyro.infer.NUTS(model, init_strategy=numpyro.infer.init_to_value(values={"z": jnp.zeros(2)}))
    mcmc = numpyro.infer.MCMC(sampler, num_warmup=300, num_samples=1, progress_bar=False)
    mcmc.warmup(jax.random.key(0))
    adapted = mcmc.post_warmup_state
    nuts = blackjax.nuts(
        log_density,
        adapted.adapt_state.step_size,
        next(iter(adapted.adapt_state.inverse_mass_matrix.values())),
    )

    def by_numpyro(number):
        mcmc = numpyro.infer.MCMC(sampler, num_warmup=0, num_samples=number, progress_bar=False)
        mcmc.post_warmup_state = adapted
        mcmc.run(jax.random.key(1), extra_fields=("num_steps",))
        return mcmc.get_samples()["z"], mcmc.get_extra_fields()["num_steps"]

    def by_blackjax(number):
        def step(state, key):
            state, info = nuts.step(key, state)
            return state, (state.position, info.num_integration_steps)

        def draw(key, z):
            return jax.lax.scan(step, nuts.init(z), jax.random.split(key, number))[1]

        return jax.jit(draw)(jax.random.key(1), adapted.z["z"])

    table, known = Table("nuts", options.output), None
    for name, run in {"NumPyro": by_numpyro, "BlackJAX": by_blackjax}.items():
        # Each call compiles again: what two of different length differ by is the time of draws.
        pairs = [(timed(lambda: run(few)), timed(lambda: run(many))) for _ in range(REPEATS)]  # noqa: B023
        (_, (_, steps)), (_, (draws, more_steps)) = pairs[0]
        number = int(np.sum(more_steps)) - int(np.sum(steps))
        per_gradient = [(long[0] - short[0]) / number for short, long in pairs]
        mean, std = np.mean(draws, axis=0), np.std(draws, axis=0)
        known = mean if known is None else known
        compiling = min(short[0] for short, _ in pairs) - int(np.sum(steps)) * min(per_gradient)
        timing = Timing(compiling, min(per_gradient), float(np.median(per_gradient)), None)
        table.add("logistic", name, timing, error=float(np.max(abs(mean - known) / std)))
    table.write()


if __name__ == "__main__":
    main()
