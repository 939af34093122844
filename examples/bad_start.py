# %% [markdown]
# # Fitting parameters from a bad start by diffusion tempering
#
# The likelihood of an oscillation has many local optima: if the frequency is wrong by a few periods, every small change
# of it makes the fit worse, and an optimiser stops there. A probabilistic solver can avoid this. The output scale is
# the size of the noise in its prior. If it is large, the solution may follow the data instead of the equation, and the
# likelihood is smooth in the parameters. Diffusion tempering reduces the output scale stage by stage, and starts every
# stage where the one before has ended (Beck et al. 2024, "Diffusion tempering improves parameter estimation with
# probabilistic integrators for ODEs").
#
# Needs `pip install 'probode[learn]'` (optax).

# %%
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ

# %% [markdown]
# The problem is a predator-prey model with two unknown rates and seven periods of noisy data. Both starts are far from
# the true rates. Rates are positive, so we fit their logarithms.


# %%
def lotka_volterra(t, u, args):
    prey, predators = u
    return jnp.stack([args[0] * prey - prey * predators, -args[1] * predators + prey * predators])


true, u0, t1, noise = jnp.array([1.5, 3.0]), jnp.array([1.0, 1.0]), 20.0, 0.1
ts = np.linspace(0.0, t1, 41)[1:]
exact = probode.solve_ivp(lotka_volterra, (0.0, t1), u0, t_eval=ts, args=true, rtol=1e-8, atol=1e-10)
values = np.asarray(exact.mean) + noise * np.random.default_rng(1).normal(size=(40, 2))
data = probode.Observations(ts, values, noise)
starts = jnp.log(jnp.array([[0.5, 4.5], [0.3, 0.7]]))
if SMALL:
    starts = starts[:1]

# %% [markdown]
# The steps have a fixed length, because a tolerance would mean something else at every output scale: tolerances of 1000
# accept every step of the largest length, `dt_max`. `Observations` and solvers are PyTrees, so that one compiled
# function serves all stages.
#
# `direct` is the result of the optimiser at the final output scale alone, `path` the result of each stage.

# %%
solver = probode.Solver(
    probode.IWP(3),
    probode.TS1(probode.ODE(lotka_volterra)),
    calibration=probode.NoCalibration(),
    controller=probode.IntegralController(1e3, 1e3, dt_max=0.1),
    loop=probode.BoundedLoop(max_steps=256),
)
optimiser = optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(20))


@eqx.filter_jit
def descend(starts, solver, iterations):
    def improbability(x):
        return -probode.fenrir_log_likelihood(solver, u0, 0.0, t1, data, args=jnp.exp(x))

    def step(carry, _):
        x, memory = carry
        value, gradient = jax.value_and_grad(improbability)(x)
        move, memory = optimiser.update(gradient, memory, x, value=value, grad=gradient, value_fn=improbability)
        return (jnp.where(jnp.isfinite(x + move).all(), x + move, x), memory), value

    def one(x):
        (x, _), values = jax.lax.scan(step, (x, optimiser.init(x)), None, length=iterations)
        return x, values[-1]

    return jax.lax.map(one, starts)


few, many = (2, 2) if SMALL else (8, 40)
direct, _ = descend(starts, solver, many)
path = [starts]
for stage in probode.DiffusionTempering(stages=2 if SMALL else 21).solvers(solver):
    found, _ = descend(path[-1], stage, few)
    path.append(found)
found, _ = descend(path[-1], stage, many)
path.append(found)

print("start            direct           tempered         (true: 1.5, 3.0)")
for rows in zip(starts, direct, path[-1], strict=True):
    print("".join(f"{float(a):8.3g}{float(b):8.3g} " for a, b in np.exp(np.asarray(rows))))

# %%
figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
for i in range(len(starts)):
    points = np.exp(np.array([x[i] for x in path]))
    axes.loglog(*points.T, "C0.-", linewidth=1, label="tempered" if i == 0 else None)
    axes.loglog(*np.exp(np.array([starts[i], direct[i]])).T, "C3.--", linewidth=1, label="direct" if i == 0 else None)
    axes.loglog(*points[0], "ko", markersize=5)
axes.loglog(*true, "k*", markersize=14)
axes.set(xlabel="birth", ylabel="death", title="from two starts (circles) to the truth (star)")
axes.legend(frameon=False)
plt.show()
