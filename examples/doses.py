# %% [markdown]
# # Doses at known times, and a clearance that is fitted
#
# A drug is absorbed from the gut and cleared from the blood. A dose every twelve hours is an `Event` at known times,
# with a `reset` that adds to the gut. Steps end there, and the solution jumps.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)


def kinetics(t, u, args):
    gut, blood = u
    absorption, clearance = args
    return -absorption * gut, absorption * gut - clearance * blood


hours = jnp.arange(12.0, 72.0, 12.0)
doses = probode.Event(hours, reset=lambda t, u, args: (u[0] + 100.0, u[1]))
solver = probode.Solver(
    probode.IWP(4),
    probode.TS1(probode.ODE(kinetics)),
    controller=probode.IntegralController(1e-6, 1e-6),
    strategy=probode.FixedPointSmoother(),
)
# The first dose is the initial value.
start, truth = (100.0, 0.0), (1.0, 0.15)
ts = jnp.linspace(0.5, 84.0, 168)
solution = solver.solve(start, 0.0, 84.0, args=truth, events=doses, save_at=ts)
print(f"{int(solution.events.count)} further doses, {int(solution.stats['num_accepted_steps'])} steps")

# %% [markdown]
# The closed form is a sum over doses, one exponential for each rate:

# %%
a, c = truth
since = np.clip(np.asarray(ts)[:, None] - np.concatenate([[0.0], hours]), 0, None)
exact = np.sum(100 * a / (a - c) * (np.exp(-c * since) - np.exp(-a * since)), axis=1)
print(f"largest error in the blood {np.max(np.abs(solution.mean[1] - exact)):.1e} of {exact.max():.0f}")

# %% [markdown]
# Six blood samples, with noise, and both rates unknown. The likelihood of the measurements is a function of the rates,
# through all doses; its gradient takes a few Gauss-Newton steps to the best fit.

# %%
seen_at = jnp.asarray([2.0, 10.0, 26.0, 35.0, 50.0, 80.0])
noise = 2.0
key = jax.random.key(1)
observed = jnp.interp(seen_at, ts, jnp.asarray(exact)) + noise * jax.random.normal(key, seen_at.shape)


@jax.jit
def misfit(log_rates):
    rates = tuple(jnp.exp(log_rates))
    return (solver.solve(start, 0.0, 84.0, args=rates, events=doses, save_at=seen_at).mean[1] - observed) / noise


guess = jnp.log(jnp.asarray([0.7, 0.3]))
jacobian = jax.jit(jax.jacfwd(misfit))
for _ in range(8):
    moves = jacobian(guess)
    guess = guess - jnp.linalg.lstsq(moves, misfit(guess))[0]
spread = jnp.sqrt(jnp.diagonal(jnp.linalg.inv(moves.T @ moves)))
for name, value, std, true in zip(("absorption", "clearance"), guess, spread, truth, strict=True):
    print(f"{name:10s} {jnp.exp(value):.3f} +- {jnp.exp(value) * std:.3f} per hour (true {true})")

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
fitted = solver.solve(start, 0.0, 84.0, args=tuple(jnp.exp(guess)), events=doses, save_at=ts)
axes.plot(ts, exact, "0.6", label="truth")
axes.plot(ts, fitted.mean[1], label="fitted")
axes.errorbar(seen_at, observed, noise, fmt="k.", label="measured")
for hour in hours:
    axes.axvline(hour, color="0.8", linewidth=0.8, zorder=0)
axes.set(xlabel="hours", ylabel="amount in the blood")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The times themselves can be differentiated: does it matter when the last dose is taken?


# %%
def at_the_end(hours):
    event = probode.Event(hours, reset=lambda t, u, args: (u[0] + 100.0, u[1]))
    return solver.solve(start, 0.0, 84.0, args=truth, events=event).mean[1][-1]


print("by an hour later of each dose:", np.round(jax.grad(at_the_end)(hours), 4))
