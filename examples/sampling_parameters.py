# %% [markdown]
# # Initial values and rates by Hamiltonian Monte Carlo
#
# An optimiser finds one set of parameters; a sampler draws from the posterior over all of them. The no-U-turn sampler
# of blackjax needs gradients of the log density, many times. The log likelihood of the data is differentiable and takes
# milliseconds. Where a solve fails it is minus infinity, so that the sampler rejects these parameters.
#
# Needs `pip install 'probode[learn]'` (blackjax).

# %%
import os

import blackjax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ


# %%
def lotka_volterra(t, u, args):
    prey, predators = u
    birth, death = args
    return jnp.stack([birth * prey - 0.05 * prey * predators, -death * predators + 0.05 * prey * predators])


true = {"rates": jnp.array([0.5, 0.5]), "u0": jnp.array([20.0, 20.0])}
ts, noise = np.linspace(0.0, 12.0, 13)[1:], 2.0
exact = probode.solve_ivp(lotka_volterra, (0.0, 12.0), true["u0"], t_eval=ts, args=true["rates"], rtol=1e-8, atol=1e-8)
values = np.asarray(exact.mean) + noise * np.random.default_rng(2).normal(size=(12, 2))
data = probode.Observations(ts, values, noise)

solver = probode.Solver(
    probode.IWP(3),
    probode.TS0(probode.ODE(lotka_volterra), evaluations=2),
    factorisation=probode.BlockDiagonal(),
    controller=probode.IntegralController(1e-4, 1e-4),
    loop=probode.BoundedLoop(max_steps=256),
)

# %% [markdown]
# Rates and initial values are positive, so we sample their logarithms. Their prior is a normal distribution about a
# guess, with a standard deviation of one.

# %%
guess = {"rates": jnp.log(jnp.array([0.4, 0.6])), "u0": jnp.log(jnp.array([15.0, 25.0]))}


def log_density(x):
    parameters = jax.tree.map(jnp.exp, x)
    likelihood = probode.filtering_log_likelihood(solver, parameters["u0"], 0.0, 12.0, data, args=parameters["rates"])
    deviations = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), x, guess)
    return likelihood - sum(jax.tree.leaves(deviations)) / 2


# %% [markdown]
# The warm-up adapts the step size of the sampler and its scales, then the chain runs.

# %%
warm_up, draws = (10, 10) if SMALL else (300, 700)
key = jax.random.key(0)
adaptation = blackjax.window_adaptation(blackjax.nuts, log_density, target_acceptance_rate=0.9)
(state, parameters), _ = jax.jit(adaptation.run, static_argnames="num_steps")(key, guess, num_steps=warm_up)
kernel = blackjax.nuts(log_density, **parameters)


@jax.jit
def run(state, keys):
    def step(state, key):
        state, info = kernel.step(key, state)
        return state, (state.position, info.is_divergent)

    return jax.lax.scan(step, state, keys)[1]


positions, diverged = run(state, jax.random.split(jax.random.key(1), draws))
samples = jax.tree.map(lambda x: np.exp(np.asarray(x)), positions)
print(f"{int(diverged.sum())} of {draws} transitions diverged")
for name, truth in true.items():
    low, middle, high = np.quantile(samples[name], [0.05, 0.5, 0.95], axis=0)
    for i in range(2):
        print(f"{name}[{i}]: {middle[i]:7.3f} ({low[i]:.3f} .. {high[i]:.3f}), true {float(truth[i]):.3f}")

# %% [markdown]
# Left: samples of the two rates, and the true rates (star). Right: the trajectories of thirty samples, solved in one
# call, and the data.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.plot(*samples["rates"].T, ".", markersize=3, alpha=0.5)
left.plot(*true["rates"], "k*", markersize=12)
left.set(xlabel="birth", ylabel="death", title="posterior of the rates")
later = jnp.linspace(0.0, 15.0, 100)
some = jax.tree.map(lambda x: x[:: max(1, draws // 30)], samples)
paths = probode.solve_ensemble(
    solver, some["u0"], 0.0, 15.0, args=some["rates"], save_at=later, in_axes=(0, None, None, 0)
)
for i in range(2):
    right.plot(later, paths.mean[:, :, i].T, f"C{i}", linewidth=0.5, alpha=0.5)
    right.plot(ts, values[:, i], f"C{i}o", markersize=4)
right.set(xlabel="time", ylabel="population", title="trajectories of thirty draws")
plt.show()
