# %% [markdown]
# # Switches and events
#
# An equation may jump at times that are known in advance, and a solve may have to end at a time that is not. The first
# is a matter of the controller or of solving in pieces, the second of taking steps oneself.
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
# A room that cools, and a heater that is on for one hour in three. No prior expects a kink: a solver that is not told
# finds each by rejecting steps, and the long step before it may miss a short pulse altogether. `stop_at` names them:
# steps end there, and the derivatives behind a switch start anew from the equation that holds from then on.


# %%
def heated(t, u, args):
    return 5.0 * (jnp.mod(t, 3.0) < 1.0) - 0.2 * u


switches = np.sort(np.concatenate([np.arange(0.0, 24.0, 3.0), np.arange(1.0, 24.0, 3.0)]))[1:]


def exact(t1):
    """Between two switches the temperature relaxes to 25 or to 0."""
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
# `stop_at` finds every switch and no step crosses one. It does not matter what the equation says of the time of a
# switch itself: the step before it sees it from the left, the next one from the right. That is what solving the pieces
# one by one does, each from its own derivatives and from the last one's uncertainty.


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
# When does the room, without a heater, reach ten degrees? `init` and `step` are the solver without its loop: a state is
# a value, steps can be taken, looked at and thrown away. March until the sign changes, then Newton's method on the
# length of the last step, with the derivative that the state knows.


# %%
def cooling(t, u, args):
    return -0.2 * u * (1 + 0.1 * jnp.sin(t))


solver = probode.Solver(probode.IWP(5), probode.TS1(probode.ODE(cooling)))
before = after = solver.init(25.0, 0.0)
while after.mean > 10.0:
    before, after = after, solver.step(after, 0.5)
dt = 0.25
for _ in range(8):
    at = solver.step(before, dt)
    dt = dt - (float(at.mean) - 10.0) / float(at.derivative(1).mean)
time = float(at.t)
print(f"ten degrees at t = {time:.6f}, give or take {float(at.std / abs(at.derivative(1).mean)):.0e}")
print(f"check: {25.0 * np.exp(-0.2 * (time + 0.1 * (1 - np.cos(time)))):.8f} degrees then")
