# %% [markdown]
# # Neurons that fire, many at once, with gradients through their spikes
#
# A leaky integrate-and-fire neuron relaxes to a voltage that its input drives; where it reaches a threshold it fires,
# and is set back. Each neuron has its own current, and fires at its own times: lanes of `jax.vmap` with their own
# events.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import probode


jax.config.update("jax_enable_x64", True)

THRESHOLD = 1.0


def membrane(t, u, current):
    return current - u


fires = probode.Event(lambda t, u, args: u - THRESHOLD, direction=1, reset=lambda t, u, args: 0.0 * u)
solver = probode.Solver(
    probode.IWP(3), probode.TS1(probode.ODE(membrane)), controller=probode.IntegralController(1e-6, 1e-8)
)


def spikes(current):
    """The times at which a neuron fires, NaN behind the last, and their number."""
    events = solver.solve(0.0, 0.0, 10.0, args=current, events=fires, max_events=32).events
    return events.t, events.count


# %% [markdown]
# Between spikes pass `log(I / (I - 1))` for a current `I > 1`; below, the neuron never fires.

# %%
currents = jnp.linspace(0.9, 3.0, 50)
times, counts = jax.jit(jax.vmap(spikes))(currents)
for i in (0, 10, 30, 49):
    current = float(currents[i])
    period = np.log(current / (current - 1)) if current > 1 else np.inf
    exact = period * np.arange(1, int(counts[i]) + 1)
    error = np.max(np.abs(times[i, : int(counts[i])] - exact), initial=0.0)
    print(f"current {current:.2f}: {int(counts[i]):2d} spikes, largest error {error:.0e}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for i, current in enumerate(currents):
    axes[0].plot(times[i], np.full(times.shape[1], current), "k|", markersize=4)
axes[0].set(xlabel="time", ylabel="current", title="spikes")
axes[1].plot(currents, counts / 10)
axes[1].set(xlabel="current", ylabel="spikes per unit of time", title="firing rate")
plt.show()

# %% [markdown]
# The third spike shall come at a given time: its derivative with respect to the current is exact, through the resets.

# %%
wanted = 2.5
loss = lambda current: (spikes(current)[0][2] - wanted) ** 2  # noqa: E731
step = jax.jit(jax.value_and_grad(loss))
optimiser = optax.adam(0.05)
current = jnp.asarray(2.5)
state = optimiser.init(current)
for _ in range(150):
    value, slope = step(current)
    updates, state = optimiser.update(slope, state)
    current = optax.apply_updates(current, updates)
exact = 1 / (1 - np.exp(-wanted / 3))
print(f"current {current:.4f} (exact {exact:.4f}), third spike at {spikes(current)[0][2]:.4f}")
