# %% [markdown]
# # Is it right?
#
# A solver that says `successful` may be wrong: it may have stepped over something, or the equation may make every error
# grow. `solution.check()` looks for reasons to doubt a solution. It evaluates the equation inside of the steps, where
# the solver has not looked, lets errors of the size of the tolerances grow along the solution, and looks at the steps.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A pulse that was stepped over
#
# Until the pulse nothing happens, so that the steps are long. The solver finds zero, with a standard deviation of zero.


# %%
def pulse(t, u, args):
    return jnp.exp(-(((t - 5.3) / 0.01) ** 2)) - 0.1 * u


solution = probode.solve_ivp(pulse, (0.0, 10.0), 0.0, dense_output=True)
report = solution.check()
print(f"u(10) = {solution.mean[-1]:.3g} +- {solution.std[-1]:.3g}")
print(report)
assert report.findings[0].kind == "unseen" and not report.is_trusted

# %% [markdown]
# The remedy that it names: a longest step that is not much longer than the pulse, or the time of the pulse.

# %%
narrow = probode.solve_ivp(pulse, (0.0, 10.0), 0.0, dense_output=True, max_step=0.02)
exact = 0.01 * np.sqrt(np.pi) * np.exp(-0.1 * (10 - 5.3) + (0.1 * 0.01 / 2) ** 2)
print(f"u(10) = {narrow.mean[-1]:.6f} +- {narrow.std[-1]:.1g}, right is {exact:.6f}")
print(narrow.check())

# %% [markdown]
# ## Chaos
#
# Lorenz's equations make errors grow by a factor of about 2.5 in a unit of time. At a tolerance of 1e-6 nothing is
# known after t = 18 or so, whatever the solver. With EK0 the standard deviations do not know that: they stay small.


# %%
def lorenz(t, u, args):
    x, y, z = u[0], u[1], u[2]
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


options = {"method": "EK0", "rtol": 1e-6, "atol": 1e-6, "dense_output": True, "max_steps": 16384}
chaos = probode.solve_ivp(lorenz, (0.0, 30.0), jnp.ones(3), **options)
doubt = chaos.check()
print(doubt)
assert "sensitive" in [finding.kind for finding in doubt.findings]

figure, axes = plt.subplots(2, 1, layout="constrained", figsize=(7, 7))
report.plot(axes[0]).set_title("a pulse that was stepped over")
doubt.plot(axes[1]).set_title("Lorenz's equations")
if "PROBODE_SMALL" not in os.environ:
    figure.savefig("is_it_right.png")

# %% [markdown]
# ## What is right is left alone


# %%
def lotka_volterra(t, u, args):
    return jnp.stack([0.5 * u[0] - 0.05 * u[0] * u[1], -0.5 * u[1] + 0.05 * u[0] * u[1]])


fine = probode.solve_ivp(lotka_volterra, (0.0, 50.0), jnp.array([20.0, 20.0]), dense_output=True)
print(fine.check(thorough=True))  # solves once more, with a tenth of the tolerances, and compares
assert fine.check().is_trusted
