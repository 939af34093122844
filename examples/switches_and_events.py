# %% [markdown]
# # Switches and events
#
# The right-hand side of an equation may jump at times that are known in advance: then the controller gets these times,
# or the equation is solved in pieces. Or a solve has to end at a time that is not known, when some event happens: then
# we take the steps ourselves.
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
# ## Doses
#
# A dose is a jump of `u` itself, not of the equation. So a solve goes up to the dose, and the next one starts where it
# ended, with the dose. `solution.end` is the distribution at the end, and `Normal(end.mean + dose, end.factor)` keeps
# its uncertainty. Of means alone equal intervals are a `lax.scan`, compiled once and differentiable:


# %%
def eliminated(t, u, rate):
    return -rate * u


drug = probode.Solver(
    probode.IWP(4), probode.TS1(probode.ODE(eliminated)), controller=probode.IntegralController(1e-6, 1e-9)
)


def after_doses(rate, dose):
    """The amount 8 hours after the last of seven doses, one every 8 hours."""

    def interval(u, _):
        return drug.solve(u + dose, 0.0, 8.0, args=rate).mean[-1], None

    return jax.lax.scan(interval, jnp.zeros(()), length=7)[0]


amount, (by_rate, by_dose) = jax.jit(jax.value_and_grad(after_doses, argnums=(0, 1)))(0.1, 2.0)
decays = np.exp(-0.8 * np.arange(1, 8))
expected = 2 * decays.sum(), -16 * (np.arange(1, 8) * decays).sum(), decays.sum()
print(f"seven doses: {amount:.6f}, by rate {by_rate:.5f}, by dose {by_dose:.6f}")
print("check:       {:.6f}, by rate {:.5f}, by dose {:.6f}".format(*expected))

first = drug.solve(2.0, 0.0, 8.0, args=0.1).end
second = drug.solve(probode.Normal(first.mean + 2.0, first.factor), 8.0, 16.0, args=0.1)
print(f"after two of them: {second.mean[-1]:.6f} +- {second.std[-1]:.0e}")

# %% [markdown]
# ## Events
#
# When does the room, without a heater, reach ten degrees? `init` returns the state at the start, and `step` a new state
# after one step of given length; the old state is not changed, so a step can be repeated with another length. We take
# steps until the temperature is below ten degrees, and then find the length of the last step by Newton's method, with
# the derivative of the temperature, which is part of the state.


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
