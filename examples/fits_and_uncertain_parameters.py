# %% [markdown]
# # Fits, and what uncertain parameters mean
#
# `fit` finds the most probable parameters given data, from several starts, and how uncertain they are. `marginalise`
# says what uncertain parameters mean for a prediction, and which part of its uncertainty is the solver's. NumPyro
# samples the whole posterior.
#
# Needs `pip install 'probode[numpyro]'`.

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ


# %%
def growth(t, u, args):
    return args["rate"] * u * (1 - u / args["capacity"])


true = {"rate": 0.8, "capacity": 2.0}
ts, noise = np.linspace(0.0, 8.0, 13)[1:], 0.08
exact = 2.0 / (1 + 19 * np.exp(-0.8 * ts))
values = exact + noise * np.random.default_rng(3).normal(size=ts.size)
data = probode.Observations(ts, values, noise)
solver = probode.Solver(
    probode.IWP(3),
    probode.TS1(probode.ODE(growth)),
    controller=probode.IntegralController(1e-5, 1e-7),
    loop=probode.BoundedLoop(max_steps=256),
)

# %% [markdown]
# ## A fit from several starts
#
# The guess is a `Normal`: the prior of the parameters. The first start is its mean, the others are drawn from it.

# %%
prior = probode.Normal({"rate": 1.0, "capacity": 1.5}, {"rate": 0.5, "capacity": 1.0})
found = probode.fit(solver, 0.1, 0.0, 8.0, data, prior, starts=2 if SMALL else 5, positive=True)
print(found.summary())
assert all(abs(found.parameters[name] - true[name]) < 4 * found.std[name] for name in true)

# %% [markdown]
# ## What it means for a prediction
#
# The parameters of the fit, with their covariance, are integrated over. The numerical part of the variance is small
# here: solving more accurately would not help, more data would.

# %%
later = np.linspace(0.0, 14.0, 57)[1:]
marginal = probode.marginalise(solver, 0.1, 0.0, 14.0, args=found.distribution, save_at=later)
print(f"parametric {np.max(marginal.parametric_std):.1e}, numerical {np.max(marginal.numerical_std):.1e}")

# %% [markdown]
# ## The whole posterior, by NUTS
#
# `data_distribution` is the likelihood as a distribution of NumPyro.


# %%
def model(values=None):
    rate = numpyro.sample("rate", dist.TruncatedNormal(1.0, 0.5, low=0.0))
    capacity = numpyro.sample("capacity", dist.TruncatedNormal(1.5, 1.0, low=0.0))
    args = {"rate": rate, "capacity": capacity}
    seen = probode.data_distribution(
        solver, 0.1, 0.0, 8.0, ts, noise, args=args, likelihood=probode.filtering_log_likelihood
    )
    numpyro.sample("data", seen, obs=values)


warm_up, draws = (5, 5) if SMALL else (300, 700)
sampler = numpyro.infer.NUTS(model, init_strategy=numpyro.infer.init_to_value(values=found.parameters))
mcmc = numpyro.infer.MCMC(sampler, num_warmup=warm_up, num_samples=draws, progress_bar=False)
mcmc.run(jax.random.key(0), values)
samples = {name: np.asarray(x) for name, x in mcmc.get_samples().items()}
for name, x in samples.items():
    print(f"{name}: {x.mean():.3f} +- {x.std():.3f}, fit {found.parameters[name]:.3f} +- {found.std[name]:.3f}")

# %%
figure, axes = plt.subplots(1, 2, layout="constrained", figsize=(10, 4))
width = 2 * marginal.std
axes[0].plot(later, marginal.mean, label="mean over the parameters")
axes[0].fill_between(later, marginal.mean - width, marginal.mean + width, alpha=0.3, label="two standard deviations")
axes[0].plot(ts, values, "k.", label="data")
axes[0].legend(frameon=False)
axes[0].set_xlabel("time")
axes[1].plot(samples["rate"], samples["capacity"], ".", alpha=0.4, label="NUTS")
axes[1].errorbar(
    *(found.parameters[name] for name in true), xerr=2 * found.std["rate"], yerr=2 * found.std["capacity"], fmt="o",
    color="C1", capsize=3, label="fit",
)  # fmt: skip
axes[1].set_xlabel("rate")
axes[1].set_ylabel("capacity")
axes[1].legend(frameon=False)
if not SMALL:
    figure.savefig("fits_and_uncertain_parameters.png")
