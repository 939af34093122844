# %% [markdown]
# # A neural network as vector field
#
# We have noisy measurements of an oscillation that loses energy, and do not know its equation. A small network is the
# vector field, and we look for the weights that make the data most probable. The likelihood includes the uncertainty of
# the solver: where a loose tolerance leaves the solution uncertain the data count for less, so that the weights are not
# fitted to numerical error.
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
SMALL = "PROBODE_SMALL" in os.environ  # a few iterations, to see that it runs

# %% [markdown]
# The data are simulated with a damped oscillator that has a cubic spring.


# %%
def truth(t, u, args):
    position, velocity = u
    return jnp.stack([velocity, -(position**3) - 0.2 * velocity])


u0, t1, noise = jnp.array([1.5, 0.0]), 6.0, 0.05
ts = np.linspace(0.0, t1, 41)[1:]
exact = probode.solve_ivp(truth, (0.0, t1), u0, t_eval=ts, rtol=1e-8, atol=1e-10)
values = np.asarray(exact.mean) + noise * np.random.default_rng(0).normal(size=(40, 2))
data = probode.Observations(ts, values, noise)

# %% [markdown]
# An Equinox network is a PyTree, so it can be passed as `args`, and the likelihood can be differentiated with respect
# to its weights. `TS0` does not need the Jacobian of the network.


# %%
class Field(eqx.Module):
    network: eqx.nn.MLP

    def __call__(self, u):
        return self.network(u)


solver = probode.Solver(
    probode.IWP(3),
    probode.TS0(probode.ODE(lambda t, u, field: field(u)), evaluations=2),
    factorisation=probode.BlockDiagonal(),
    controller=probode.IntegralController(1e-3, 1e-4),
    loop=probode.BoundedLoop(max_steps=256),
)
field = Field(eqx.nn.MLP(2, 2, width_size=16, depth=2, activation=jnp.tanh, key=jax.random.key(0)))
field = jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, field)


def improbability(field, data):
    """The negative log likelihood divided by the number of data, on which a good learning rate depends otherwise."""
    return -probode.filtering_log_likelihood(solver, u0, 0.0, t1, data, args=field) / data.values.size


# %% [markdown]
# As long as the vector field is wrong, the later part of a trajectory is far from the data and of little use. So the
# fit begins with the first quarter of the interval and extends it. The mask leaves out later data; unlike a shorter
# array it compiles nothing anew.

# %%
optimiser = optax.adam(optax.cosine_decay_schedule(2e-2, 600))
memory = optimiser.init(eqx.filter(field, eqx.is_inexact_array))


@eqx.filter_jit
def improve(field, memory, mask):
    shown = probode.Observations(ts, values, noise, mask=mask)
    value, gradient = eqx.filter_value_and_grad(improbability)(field, shown)
    # no special case for solves that fail: the likelihood is then minus infinity and its gradient zero
    updates, memory = optimiser.update(gradient, memory)
    return eqx.apply_updates(field, updates), memory, value


for i in range(6 if SMALL else 600):
    until = t1 * min(1.0, 0.25 + i / 300)
    field, memory, value = improve(field, memory, ts <= until)
    if i % 100 == 0:
        print(f"iteration {i:4d}, data until {until:.1f}: minus log likelihood per number {float(value):10.3f}")

# %% [markdown]
# The fit, and its prediction beyond the data. There the network is an extrapolation, and nothing here measures how
# wrong it is: the standard deviations of the solver are about the discretisation alone.

# %%
later = np.linspace(0.0, 1.5 * t1, 181)
fitted = solver.solve(u0, 0.0, float(later[-1]), args=field, save_at=later)
reference = probode.solve_ivp(truth, (0.0, float(later[-1])), u0, t_eval=later, rtol=1e-8, atol=1e-10)
within = later <= t1
error = np.sqrt(np.mean((np.asarray(fitted.mean) - np.asarray(reference.mean))[within] ** 2))
print(f"root mean square error where there are data: {error:.3f}, noise {noise}")

figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for i, name in enumerate(("position", "velocity")):
    axes.plot(later, reference.mean[:, i], "k:", linewidth=1)
    axes.plot(later, fitted.mean[:, i], f"C{i}", label=name)
    axes.plot(ts, values[:, i], f"C{i}.", markersize=4)
axes.axvline(t1, color="0.7", linewidth=1)
axes.set(xlabel="time", title="a network as vector field: data (dots), fit (lines), truth (dotted)")
axes.legend(frameon=False)
plt.show()
