# %% [markdown]
# # An epidemic with an unknown contact rate
#
# Infections spread as people meet, and the rate of contacts changes with the seasons and with restrictions. Here this
# rate is an unknown function of time, of which we assume only that it is smooth. From noisy counts of infected people
# we infer the course of the epidemic *and* the rate, each with its uncertainty. The method follows Schmidt, Kraemer &
# Hennig 2021, "A probabilistic state space model for joint inference from differential equations and data".

# %%
import math
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)

SMALL = "PROBODE_SMALL" in os.environ
DAYS = 40 if SMALL else 100
RECOVERY = 0.2
NOISE = 0.002

# %% [markdown]
# First we simulate data with a rate that has a period of two months. The inference below does not know this rate.


# %%
def true_rate(t):
    return 0.35 * jnp.exp(0.4 * jnp.cos(2 * jnp.pi * t / 60))


def simulate(days):
    def field(t, u, args):
        susceptible, infected = u
        infections = true_rate(t) * susceptible * infected
        return -infections, infections - RECOVERY * infected

    solution = probode.solve_ivp(field, (0.0, float(days[-1])), (0.99, 0.01), t_eval=days, rtol=1e-8, atol=1e-10)
    noise = NOISE * np.random.default_rng(0).normal(size=days.size)
    return np.asarray(solution.mean[1]), np.asarray(solution.mean[1]) + noise


# %% [markdown]
# There are two equations for three unknowns: the logarithm of the rate is a component of the state without an equation
# of its own. Its prior is a Matern process with a length scale of two weeks; the other two components have an
# integrated Wiener process. A prior whose components follow different processes is a `LinearSDE`. Its drift has factors
# for each of `u, u', ...`: the coefficients of the Matern process for the log rate, and zero for the other two.


# %%
def equations(t, u, du, args):
    infections = jnp.exp(u["log rate"]) * u["susceptible"] * u["infected"]
    return du["susceptible"] + infections, du["infected"] - infections + RECOVERY * u["infected"]


def prior(length_scale, spread):
    n = 4
    decay = math.sqrt(2 * n - 1) / length_scale
    drift = [{"susceptible": 0.0, "infected": 0.0, "log rate": -math.comb(n, i) * decay ** (n - i)} for i in range(n)]
    # Scaled so that the stationary standard deviation of the log rate is `spread`.
    alone = probode.Matern(n - 1, length_scale)
    stationary = probode.prior_marginals(alone, [0.0], jnp.zeros(()), initial=alone.stationary)
    scale = spread / float(stationary.std[0])
    return probode.LinearSDE(
        n - 1, tuple(drift), output_scale={"susceptible": 0.1, "infected": 0.1, "log rate": scale}
    ), [scale * float(stationary.derivative(i).std[0]) for i in range(n)]


# %% [markdown]
# A single pass of an extended Kalman filter would linearise at poor estimates in the early days, when the epidemic
# grows exponentially, and all later estimates would suffer. So the smoother is iterated: equations and data are
# linearised along the trajectory of the pass before, until it does not change.


# %%
def infer(days, counts, iterations):
    process, spreads = prior(length_scale=14.0, spread=0.5)
    solver = probode.Solver(
        process,
        probode.TS1(probode.Residual(equations)),
        strategy=probode.FixedIntervalSmoother(),
        calibration=probode.NoCalibration(),
        initialisation=probode.Diffuse(0),
    )
    start = solver.initialise({"susceptible": 0.99, "infected": 0.01, "log rate": math.log(0.35)}, 0.0)
    # Components are sorted by name: infected, log rate, susceptible. The first and the last are known at the start,
    # their derivatives are not. The log rate starts with its stationary standard deviations.
    deviations = [entry for i, spread in enumerate(spreads) for entry in (0.1 * (i > 0), spread, 0.1 * (i > 0))]
    start = probode.InitialState(start.mean, jnp.diag(jnp.array(deviations)))
    data = probode.Observations(days, counts, NOISE, observe=lambda t, u, args: u["infected"])
    grid = np.linspace(0.0, days[-1], 4 * days.size + 1)
    return probode.solve_grid_iterated(solver, start, grid, data=data, max_iterations=iterations, tolerance=1e-3)


days = np.arange(1.0, DAYS + 1)
infected, counts = simulate(days)
solution = infer(days, counts, iterations=64)
rate, spread = solution.mean["log rate"], solution.std["log rate"]
error = (rate - jnp.log(true_rate(solution.t))) / spread
print("  day   infected  contact rate (two standard deviations)   true")
for i in range(0, solution.t.size, max(1, solution.t.size // 10)):
    low, high = jnp.exp(rate[i] - 2 * spread[i]), jnp.exp(rate[i] + 2 * spread[i])
    print(
        f"{solution.t[i]:5.0f}{solution.mean['infected'][i]:11.3f}"
        f"        {jnp.exp(rate[i]):.3f} ({low:.3f} .. {high:.3f}){true_rate(solution.t[i]):22.3f}"
    )
print(f"the truth lies within two standard deviations on {jnp.mean(abs(error) < 2):.0%} of the days")

# %% [markdown]
# Above: the counts, and the inferred fraction of infected people. Below: the inferred rate and the true rate (black).
# Where few people are infected the data say little about the rate, and the band of two standard deviations is wide.


# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
above.plot(days, counts, ".", color="0.5", markersize=4, label="counted")
above.plot(days, infected, color="black", linewidth=1, label="true")
mean, std = solution.mean["infected"], solution.std["infected"]
above.plot(solution.t, mean, color="C0", label="inferred")
above.fill_between(solution.t, mean - 2 * std, mean + 2 * std, color="C0", alpha=0.3, linewidth=0)
above.set_ylabel("fraction infected")
above.legend(frameon=False)
below.plot(solution.t, true_rate(solution.t), color="black", linewidth=1)
below.plot(solution.t, jnp.exp(rate), color="C3")
low, high = jnp.exp(rate - 2 * spread), jnp.exp(rate + 2 * spread)
below.fill_between(solution.t, low, high, color="C3", alpha=0.25, linewidth=0)
below.set_ylabel("contacts per day")
below.set_xlabel("day")
below.set_ylim(0, 1)
plt.show()
