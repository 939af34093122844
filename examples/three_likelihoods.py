# %% [markdown]
# # Three likelihoods of the same data
#
# How probable are data under an equation that the solver does not solve exactly? There are three likelihoods. *Fenrir*
# solves the equation and then conditions the posterior on the data. *Dalton* conditions on equation and data in one
# filter. *Filtering* predicts every datum from the data before it. They agree where the solution is certain. Where it
# is uncertain they differ, and so do the parameters at which they are largest.
#
# Needs `pip install 'probode[learn]'` (optimistix).

# %%
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ

# %% [markdown]
# A pendulum whose length is unknown.


# %%
def pendulum(t, u, du, length):
    return -9.81 / length * jnp.sin(u)


true, u0, t1, noise = 3.0, (jnp.array([0.8]), jnp.zeros(1)), 10.0, 0.1
ts = np.linspace(0.0, t1, 51)[1:]
ode = probode.ODE(pendulum, order=2)
accurate = probode.Solver(probode.IWP(6), probode.TS1(ode), controller=probode.IntegralController(1e-8, 1e-8))
values = np.asarray(accurate.solve(u0, 0.0, t1, args=true, save_at=ts).mean)
data = probode.Observations(ts, values + noise * np.random.default_rng(0).normal(size=(50, 1)), noise)

likelihoods = {
    "Fenrir": probode.fenrir_log_likelihood,
    "Dalton": probode.dalton_log_likelihood,
    "filtering": probode.filtering_log_likelihood,
}

# %% [markdown]
# We compute each likelihood over a range of lengths, at two output scales. With the small one the solution is
# determined by the equation; with the large one it may follow the data instead.

# %%
lengths = jnp.linspace(1.0, 6.0, 5 if SMALL else 161)


def solver(scale):
    return probode.Solver(
        probode.IWP(3, output_scale=scale),
        probode.TS1(ode),
        calibration=probode.NoCalibration(),
        controller=probode.IntegralController(1e3, 1e3, dt_max=0.1),
        loop=probode.BoundedLoop(max_steps=256),
    )


@eqx.filter_jit
def profile(likelihood, solver):
    return jax.vmap(lambda length: likelihood(solver, u0, 0.0, t1, data, args=length))(lengths)


figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for ax, scale in zip(axes, (1.0, 1e4), strict=True):
    for name, likelihood in likelihoods.items():
        values = np.asarray(profile(likelihood, solver(scale)))
        best = float(lengths[np.argmax(values)])
        print(
            f"output scale {scale:7.0f}, {name:9s}: most probable length {best:.2f}, log likelihood {values.max():.1f}"
        )
        ax.plot(lengths, values - values.max(), label=name)
    ax.axvline(true, color="0.7", linewidth=1)
    ax.set(xlabel="length", title=f"output scale {scale:g}")
axes[0].set_yscale("symlog")
axes[0].set_ylabel("log likelihood, less its maximum")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# On the left the largest value is at the true length (grey line), but from shorter lengths an optimiser would have to
# cross a minimum. All three agree, since the steps are short and the solution is nearly certain. On the right the
# equation has little weight: Dalton and filtering have one broad maximum, which is not at the true length. Tempering
# (see `bad_start.py`) begins with the scale on the right and ends with the one on the left.
#
# The three differ in cost, and in whether the equation at later times corrects the prediction of earlier data:
#
# | | cost | uses the equation at later times |
# |---|---|---|
# | filtering | one filter | no |
# | Dalton | two filters | yes |
# | Fenrir | one smoother and one pass back | yes |

# %% [markdown]
# Every optimiser for differentiable functions can maximise these likelihoods. Here it is BFGS of optimistix at the
# small output scale, from a length on the same side of the minimum as the true one, and from one on the other side.


# %%
def improbability(log_length, solver):
    return -probode.filtering_log_likelihood(solver, u0, 0.0, t1, data, args=jnp.exp(log_length))


@eqx.filter_jit
def fit(length, solver):
    bfgs = optimistix.BFGS(rtol=1e-6, atol=1e-6)
    return optimistix.minimise(improbability, bfgs, jnp.log(length), solver, throw=False, max_steps=64)


for start in (2.0, 1.0):
    found = fit(start, solver(1.0))
    print(
        f"from {start:.1f}: length {float(jnp.exp(found.value)):.2f} after {int(found.stats['num_steps'])} iterations"
    )
