# %% [markdown]
# # A bouncing ball, and how sure its times are
#
# A ball falls from a height that is known to a millimetre or so, and loses a fifth of its speed at every bounce. An
# `Event` is a function of the solution that crosses zero; its `reset` is what happens there. The solver finds the time
# of every impact, applies the reset, and goes on; the uncertainty goes through it, too.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)

GRAVITY, LOSS = 9.81, 0.8


def fall(t, u, args):
    return {"height": u["speed"], "speed": -GRAVITY * jnp.ones_like(u["speed"])}


def bounce(t, u, args):
    return {"height": u["height"], "speed": -LOSS * u["speed"]}


impact = probode.Event(lambda t, u, args: u["height"], direction=-1, reset=bounce)
solver = probode.Solver(
    probode.IWP(3),
    probode.TS1(probode.ODE(fall)),
    controller=probode.IntegralController(1e-6, 1e-8),
    strategy=probode.FixedIntervalSmoother(),
)
height, spread = 1.0, 0.02
start = probode.Normal({"height": height, "speed": 0.0}, {"height": spread, "speed": 0.0})
solution = solver.solve(start, 0.0, 2.3, events=impact)

# %% [markdown]
# The times have closed forms: the first impact is at `sqrt(2 h / g)`, and a start that is higher by `dh` comes down
# `dh / sqrt(2 g h)` later. After `k` impacts that has grown, with the time itself.

# %%
events = solution.events
first = np.sqrt(2 * height / GRAVITY)
for k in range(int(events.count)):
    exact = first * (1 + 2 * sum(LOSS**j for j in range(1, k + 1)))
    print(
        f"impact {k + 1}: t = {events.t[k]:.6f} +- {events.t_std[k]:.6f} (exact {exact:.6f} +- "
        f"{exact * spread / (2 * height):.6f}), speed {events.mean['speed'][k]:.3f} +- {events.std['speed'][k]:.3f}, "
        f"afterwards {events.mean_after['speed'][k]:.3f} +- {events.std_after['speed'][k]:.3f}"
    )

# %% [markdown]
# At the impact the height is known, it is zero; what is uncertain is the time and the speed. At a fixed time after the
# impact the height is uncertain again: that is the covariance with which the solve goes on, by the saltation matrix.
# Bands are first order, and grow where the ball might or might not have bounced.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
probode.plots.plot(solution, axes[0], components=[0])
axes[0].set(title="height, with the times of the impacts", ylim=(-0.1, 1.1))
ts = jnp.linspace(0.0, 2.3, 500)
for k, chance in enumerate(events.cdf(ts)[: int(events.count)]):
    axes[1].plot(ts, chance, label=f"impact {k + 1}")
axes[1].set(xlabel="time", title="probability that the ball has bounced by then")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# How many impacts the uncertainty allows for, against those that were found: equal numbers say that none was missed.

# %%
print(f"found {int(events.count)}, expected {events.expected_crossings[0]:.3f}")

# %% [markdown]
# Everything can be differentiated: by how much later does the fourth impact come if less speed is lost?


# %%
def fourth(loss):
    reset = lambda t, u, args: {"height": u["height"], "speed": -args * u["speed"]}  # noqa: E731
    event = probode.Event(lambda t, u, args: u["height"], direction=-1, reset=reset)
    return solver.solve({"height": height, "speed": 0.0}, 0.0, 2.3, args=loss, events=event).events.t[3]


print(f"by derivative {jax.grad(fourth)(LOSS):.6f}, exact {2 * first * (1 + 2 * LOSS + 3 * LOSS**2):.6f}")

# %% [markdown]
# A ball bounces infinitely often in finite time. Rather than falling through the floor, the solve says so:

# %%
solution = solver.solve({"height": 1.0, "speed": 0.0}, 0.0, 9.0, events=impact, max_events=300, throw=False)
limit = first * (1 + LOSS) / (1 - LOSS)
print(f"{solution.result}: {int(solution.events.count)} impacts until {solution.state.t:.9f} (the limit: {limit:.9f})")
