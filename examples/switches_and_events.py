# %% [markdown]
# # Switches and events
#
# The right-hand side of an equation may jump at times that are known in advance: then the controller gets these times,
# or the equation is solved in pieces. Or something happens at a time that is not known, where the solution reaches a
# threshold: an event, which ends the solve or changes the solution.
#
# ## Switches

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)

# %% [markdown]
# A room cools, and a heater is on for one hour in three. At a switch the solution has a kink, where the prior assumes
# continuous derivatives. Without knowing the switches the solver rejects steps until they are short enough, and a long
# step may miss a short pulse altogether. `stop_at` names the switches: steps end there, and the derivatives behind a
# switch are computed anew from the equation that holds from then on.


# %%
def heated(t, u, args):
    return 5.0 * (jnp.mod(t, 3.0) < 1.0) - 0.2 * u


switches = np.sort(np.concatenate([np.arange(0.0, 24.0, 3.0), np.arange(1.0, 24.0, 3.0)]))[1:]


def exact(t1):
    """The temperature at `t1`: between two switches it relaxes to 25 or to 0."""
    u, times = 10.0, np.concatenate([[0.0], switches[switches < t1], [t1]])
    for a, b in itertools.pairwise(times):
        level = 25.0 if np.mod((a + b) / 2, 3.0) < 1.0 else 0.0
        u = level + (u - level) * np.exp(-0.2 * (b - a))
    return u


def room(stops=None):
    return probode.Solver(
        probode.IWP(3),
        probode.TS1(probode.ODE(heated)),
        controller=probode.IntegralController(1e-4, 1e-4, stop_at=stops),
    )


figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for i, (name, stops) in enumerate({"not told": None, "stop_at=switches": switches}.items()):
    solution = room(stops).solve(10.0, 0.0, 24.0, save_at=probode.SaveAt(steps=True))
    accepted, rejected = (int(solution.stats[f"num_{kind}_steps"]) for kind in ("accepted", "rejected"))
    t, mean = np.asarray(solution.t)[:accepted], np.asarray(solution.mean)[:accepted]
    print(f"{name:18s} {accepted:4d} steps, {rejected:4d} rejected, error {abs(mean[-1] - exact(24.0)):.1e}")
    axes[0].plot(t, mean, f"C{i}.-", linewidth=1, markersize=3, label=name)
    axes[1].semilogy(t, np.diff(t, prepend=0.0), f"C{i}.", markersize=3, label=name)
axes[0].set(xlabel="hours", title="temperature")
axes[1].set(xlabel="hours", title="step sizes")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# With `stop_at` no step crosses a switch. It does not matter which value the vector field has at the very time of a
# switch: the step that ends there uses its limit from the left, the next step its limit from the right. This is what
# solving the pieces one by one does, each with derivatives and a first step of its own, and with the uncertainty that
# the last piece ended with:


# %%
def piece(t, u, level):
    return 0.2 * (level - u)


solver = probode.Solver(
    probode.IWP(3), probode.TS1(probode.ODE(piece)), controller=probode.IntegralController(1e-4, 1e-4)
)
u, accepted = probode.Normal(10.0, 0.0), 0
for a, b in zip([0.0, *switches], [*switches, 24.0], strict=True):
    solution = solver.solve(u, a, b, args=25.0 if np.mod(a, 3.0) < 1.0 else 0.0)
    u = probode.Normal(solution.mean[-1], solution.std[-1])
    accepted += int(solution.stats["num_accepted_steps"])
print(f"{'in pieces':18s} {accepted:4d} steps, error {abs(float(u.mean) - exact(24.0)):.1e}")

# %% [markdown]
# ## Events
#
# When does a room without a heater reach ten degrees? That time is not known in advance. An `Event` is a function of
# the solution; where it crosses zero the solve ends, and the last saved time is that of the event. How sure the time is
# follows from the uncertainty of the temperature and from how fast it falls.


# %%
def cooling(t, u, rate):
    return -rate * u * (1 + 0.1 * jnp.sin(t))


ten_degrees = probode.Event(lambda t, u, args: u - 10.0, direction=-1)
solver = probode.Solver(
    probode.IWP(5), probode.TS1(probode.ODE(cooling)), controller=probode.IntegralController(1e-6, 1e-8)
)
solution = solver.solve(probode.Normal(25.0, 0.1), 0.0, 24.0, args=0.2, events=ten_degrees)
time = float(solution.t[0])
print(f"{solution.result}: ten degrees at t = {time:.6f} +- {solution.events.t_std[0]:.6f}")
print(f"check: {25.0 * np.exp(-0.2 * (time + 0.1 * (1 - np.cos(time)))):.8f} degrees then")
slope = jax.grad(lambda rate: solver.solve(25.0, 0.0, 24.0, args=rate, events=ten_degrees).t[0])(0.2)
print(f"with a rate larger by 0.01 it comes {-0.01 * slope:.4f} hours earlier")

# %% [markdown]
# ## Resets
#
# A thermostat turns the heater on below 18 degrees and off above 21. Whether it is on is a component of the solution
# that does not change by itself; two events with a `reset` change it. Neither ends the solve, so it goes on, with the
# derivatives of the equation that holds from then on.


# %%
def room_with_thermostat(t, u, args):
    return {"degrees": 5.0 * u["heater"] - 0.2 * u["degrees"], "heater": jnp.zeros_like(u["heater"])}


def switch(to):
    return lambda t, u, args: {"degrees": u["degrees"], "heater": jnp.full_like(u["heater"], to)}


too_cold = probode.Event(lambda t, u, args: u["degrees"] - 18.0, direction=-1, reset=switch(1.0))
too_warm = probode.Event(lambda t, u, args: u["degrees"] - 21.0, direction=1, reset=switch(0.0))
solver = probode.Solver(
    probode.IWP(4),
    probode.TS1(probode.ODE(room_with_thermostat)),
    controller=probode.IntegralController(1e-6, 1e-8),
    strategy=probode.FixedIntervalSmoother(),
)
solution = solver.solve({"degrees": 10.0, "heater": 1.0}, 0.0, 12.0, events=[too_cold, too_warm])
events = solution.events
names = ("on", "off")
happened = range(int(events.count))
print("heater", ", ".join(f"{names[int(events.which[i])]} at {events.t[i]:.3f}" for i in happened))
# Towards 25 degrees while it is on, towards zero while it is off.
heating, falling = 5 * np.log(7 / 4), 5 * np.log(21 / 18)
print(f"check: a cycle takes {heating + falling:.6f}, found {events.t[2] - events.t[0]:.6f}")
probode.plots.plot(solution, components=[0])
plt.show()

# %% [markdown]
# Doses, which come at known times, are in [doses](doses.py), a ball in [bouncing_ball](bouncing_ball.py), many neurons
# with spikes of their own in [spiking_neurons](spiking_neurons.py).
