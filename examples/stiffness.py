# %% [markdown]
# # Stiffness and stability
#
# An equation is stiff if perturbations of a solution decay much faster than the solution itself changes. A method that
# is not stable on it has to take steps as short as this decay, however smooth the solution is. This notebook shows
# which parts of a solver make it stable.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ

# %% [markdown]
# In Prothero and Robinson's problem the state is pulled towards `cos(t)` at a given rate. From `u(0) = 1` the solution
# is `cos(t)`, whatever the rate.


# %%
def pulled(t, u, rate):
    return -rate * (u - jnp.cos(t)) - jnp.sin(t)


ode = probode.ODE(pulled)
methods = {
    "EK0": probode.TS0(ode),
    "EK0, two evaluations": probode.TS0(ode, evaluations=2),
    "EK1": probode.TS1(ode),
}

# %% [markdown]
# `TS0` uses the value of the vector field alone. Like an explicit Runge-Kutta method it needs a number of steps that
# grows with the rate; a second evaluation makes the region of stability larger, not infinite. `TS1` uses the Jacobian
# and is stable at any rate.

# %%
rates = np.geomspace(1.0, 1e3 if SMALL else 1e4, 4 if SMALL else 9)
steps = {}
for name, constraint in methods.items():
    solver = probode.Solver(
        probode.IWP(3),
        constraint,
        controller=probode.IntegralController(1e-5, 1e-5),
        loop=probode.ForwardLoop(max_steps=200_000),
    )
    steps[name] = []
    for rate in rates:
        solution = solver.solve(1.0, 0.0, 10.0, args=float(rate), throw=False)
        if solution.result == probode.Result.successful:
            steps[name].append(int(solution.stats["num_accepted_steps"]))
    last = len(steps[name]) - 1
    print(f"{name:22s} steps: {steps[name][0]} at rate 1, {steps[name][-1]} at {rates[last]:.0e}")

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, numbers in steps.items():
    axes.loglog(rates[: len(numbers)], numbers, ".-", label=name)
axes.set(xlabel="rate of decay", ylabel="accepted steps", title="the same smooth solution, ever more stiff")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# EK0 is missing where 200,000 attempts were not enough: such a solve stops with the result `max_steps_reached`, whose
# message suggests `TS1`. For run times see `choosing_a_solver.py`, for priors with the decay of the equation
# `priors_and_samples.py`.
