"""What a gradient costs within NUTS, by NumPyro and by BlackJAX: `python -m benchmarks.nuts`.

The same posterior of two parameters of a logistic equation, the same step size and mass matrix (those NumPyro adapts),
as many draws: time per gradient, after compilation, and that of the gradient alone. NumPyro has the likelihood as
`probode.data_distribution`, BlackJAX as a function. `error` is the largest deviation of a posterior mean from that of
NumPyro, in standard deviations.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from .timing import Table, Timing, in_turns, parse, timed


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
    mcmc = numpyro.infer.MCMC(sampler, num_warmup=300, num_samples=options.draws, progress_bar=False)
    mcmc.warmup(jax.random.key(0))
    adapted = mcmc.post_warmup_state

    def by_numpyro():
        mcmc.post_warmup_state = adapted
        mcmc.run(jax.random.key(1), extra_fields=("num_steps",))
        return mcmc.get_samples()["z"], int(np.sum(mcmc.get_extra_fields()["num_steps"]))

    mass = next(iter(adapted.adapt_state.inverse_mass_matrix.values()))
    nuts = blackjax.nuts(log_density, adapted.adapt_state.step_size, mass)

    @jax.jit
    def draw(key, z):
        def step(state, key):
            state, info = nuts.step(key, state)
            return state, (state.position, info.num_integration_steps)

        return jax.lax.scan(step, nuts.init(z), jax.random.split(key, options.draws))[1]

    def by_blackjax():
        draws, steps = draw(jax.random.key(1), adapted.z["z"])
        return draws, int(np.sum(steps))

    gradient = jax.jit(jax.value_and_grad(log_density))
    runs = {"NumPyro": by_numpyro, "BlackJAX": by_blackjax}
    first = {name: timed(run) for name, run in runs.items()}
    timed(lambda: gradient(jnp.zeros(2)))
    taken = in_turns([*runs.values(), lambda: gradient(jnp.zeros(2))], repeats=3, seconds=5.0)
    table, alone = Table("nuts", options.output), taken[-1]
    mean, std = np.mean(first["NumPyro"][1][0], axis=0), np.std(first["NumPyro"][1][0], axis=0)
    for (name, (compiling, (draws, number))), seconds in zip(first.items(), taken, strict=False):
        best, median = np.min(seconds) / number, np.median(seconds) / number
        away = float(np.max(abs(np.mean(draws, axis=0) - mean) / std))
        table.add("logistic", name, Timing(compiling - np.min(seconds), best, median, None), error=away)
        print(f"{name}: {1e6 * best:.0f} us per gradient, {number} gradients, means within {away:.2f} std", flush=True)
    table.add("logistic", "the gradient alone", Timing(0.0, np.min(alone), np.median(alone), None), error=0.0)
    print(f"the gradient alone: {1e6 * np.min(alone):.0f} us")
    table.write()


if __name__ == "__main__":
    main()
