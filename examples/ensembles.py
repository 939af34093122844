# %% [markdown]
# # Ensembles: many solves at once
#
# A thousand parameters, initial values or intervals are one call. Every lane takes its own steps, fails on its own, and
# brings its own uncertainty.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ

# %% [markdown]
# Cells grow up to a capacity or, if they start below a threshold, die out; where the threshold is, is uncertain. Each
# lane has its own threshold; `in_axes` says so, as in `jax.vmap`.


# %%
def allee(t, u, args):
    return u * (u / args["threshold"] - 1) * (1 - u)


lanes = 16 if SMALL else 1000
thresholds = 0.3 + 0.05 * np.random.default_rng(0).normal(size=lanes)
solver = probode.Solver(
    probode.IWP(4),
    probode.TS0(probode.ODE(allee), evaluations=2),
    controller=probode.IntegralController(1e-5, 1e-7),
    loop=probode.ForwardLoop(),
)
ts = np.linspace(0.0, 15.0, 61)


def solve(thresholds):
    args = {"threshold": thresholds}
    return probode.solve_ensemble(solver, 0.3, 0.0, 15.0, args=args, in_axes=(None, None, None, 0), save_at=ts)


solutions = solve(thresholds)
print("shape of the means (lanes, times):", solutions.mean.shape)
steps = np.asarray(solutions.stats["num_accepted_steps"])
print(f"steps: {steps.min()} to {steps.max()}; {np.mean(solutions.mean[:, -1] < 0.5):.0%} of the lanes die out")

# %% [markdown]
# Two kinds of uncertainty, side by side: what the threshold leaves open is the spread of the lanes, what the
# discretisation leaves open is the standard deviation within each. Here the second is far below the first, so there is
# no point in tighter tolerances.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
axes[0].plot(ts, np.asarray(solutions.mean[:100]).T, "C0", linewidth=0.5, alpha=0.5)
axes[0].set(xlabel="time", title="lanes")
axes[1].semilogy(ts[1:], np.std(solutions.mean, axis=0)[1:], label="between lanes")
axes[1].semilogy(ts[1:], np.max(solutions.std, axis=0)[1:], label="within a lane, at most")
axes[1].set(xlabel="time", title="standard deviations")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# A lane that cannot be solved disturbs nobody. Its result says what happened; the others are bit for bit what they are
# without it.

# %%
thresholds[3] = np.nan
again = solve(thresholds)
fine = np.asarray(again.result == probode.Result.successful)
unchanged = bool(jnp.all((again.mean == solutions.mean)[fine]))
print(f"lanes that failed: {np.flatnonzero(~fine)}; the others unchanged: {unchanged}")
