# %% [markdown]
# # Ensembles: many solves at once
#
# `solve_ensemble` solves an equation for a thousand parameters, initial values or intervals in one call. Each of these
# solves, called a lane, has its own steps, its own result code and its own uncertainty.

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
# A population grows up to a capacity, or dies out if it starts below a threshold (the Allee effect). The threshold is
# uncertain, so each lane has its own. `in_axes` says, as in `jax.vmap`, which of `(u0s, t0, t1, args)` have an axis of
# lanes: here `args` alone.


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
# There are two kinds of uncertainty. The standard deviation between lanes is due to the unknown threshold; the standard
# deviation within a lane is due to the discretisation. Here the second is far below the first, so tighter tolerances
# would not help.

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
# A lane that cannot be solved does not affect the others, which are equal bit by bit to what they are without it. Its
# result code says why it failed.

# %%
thresholds[3] = np.nan
again = solve(thresholds)
fine = np.asarray(again.result == probode.Result.successful)
unchanged = bool(jnp.all((again.mean == solutions.mean)[fine]))
print(f"lanes that failed: {np.flatnonzero(~fine)}; the others unchanged: {unchanged}")
