# %% [markdown]
# # A limit cycle, and how sure its period is
#
# After a while the Van der Pol oscillator goes round and round the same orbit, whatever its start. To wait for it takes
# many rounds, and the length of one is known only as well as an initial value problem is solved. `solve_periodic`
# solves for the orbit and its period at once.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)

oscillator = probode.ODE(lambda t, u, du, mu: mu * (1 - u**2) * du - u, order=2)
orbit = probode.solve_periodic(oscillator, (2.0, 0.0), 6.5, args=1.0)
print(orbit.summary())
reference = 6.66328685932313
print(f"period {orbit.period.mean:.12f} +- {orbit.period.std:.1e}, error {orbit.period.mean - reference:.1e}")

# %% [markdown]
# ## The period as a function of the damping
#
# The orbit of one value is the guess for the next one (continuation): so the stiff ones are found, too. For large `mu`
# the period is about `(3 - 2 log 2) mu`.

# %%
orbits, mu = {1.0: orbit}, 1.0
while mu < 20:
    mu = min(1.5 * mu, 20.0)
    orbit = probode.solve_periodic(oscillator, orbit, orbit.period.mean, args=mu)
    orbits[mu] = orbit
    print(f"mu = {mu:6.2f}: period {orbit.period.mean:.8f} +- {orbit.period.std:.0e}")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for mu, orbit in orbits.items():
    phase = np.linspace(0, 1, 400)
    at = orbit.evaluate(phase * float(orbit.period.mean))
    axes[0].plot(at.mean, at.derivative(1).mean / (1 + mu))
axes[0].set_xlabel("u")
axes[0].set_ylabel("u' / (1 + mu)")
mus = np.array(list(orbits))
axes[1].loglog(mus, [float(orbit.period.mean) for orbit in orbits.values()], ".-", label="period")
axes[1].loglog(mus, (3 - 2 * np.log(2)) * mus, "--", label="(3 - 2 log 2) mu")
axes[1].set_xlabel("mu")
axes[1].legend()

# %% [markdown]
# ## Forced orbits
#
# If the equation depends on the time the period is that of the force, and known. Here a damped pendulum is driven.

# %%
driven = probode.ODE(lambda t, u, du, args: -jnp.sin(u) - 0.3 * du + 0.4 * jnp.cos(t), order=2)
forced = probode.solve_periodic(driven, lambda t: -0.5 * jnp.cos(t), 2 * np.pi)
print(f"largest angle {jnp.max(jnp.abs(forced.mean)):.6f}, standard deviation at most {jnp.max(forced.std):.0e}")
