# %% [markdown]
# # Quickstart: a predator-prey model with uncertainty
#
# This script solves an equation, prints the solution with its standard deviation, and saves a picture.
#
# Run it with `python examples/quickstart.py [picture.png]`.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import probode


jax.config.update("jax_enable_x64", True)
picture = next((word for word in sys.argv[1:] if word.endswith(".png")), "lotka_volterra.png")

# %% [markdown]
# A vector field is a function of time, state and parameters. The state may be any PyTree of arrays or numbers, here a
# pair.


# %%
def lotka_volterra(t, u, args):
    prey, predators = u
    birth, hunt, death, feed = args
    return birth * prey - hunt * prey * predators, -death * predators + feed * prey * predators


# %% [markdown]
# A solver is composed of parts. Here these are the prior (an integrated Wiener process with two derivatives), the
# equation with its linearisation (`TS1`, by the exact Jacobian), a smoother, and the controller of the step size, which
# has the tolerances. The first solve has a tolerance so loose that its uncertainty is visible; the second, at a tight
# one, is the reference.


# %%
def solve(tolerance, times):
    solver = probode.Solver(
        prior=probode.IWP(2),
        constraint=probode.TS1(probode.ODE(lotka_volterra)),
        strategy=probode.FixedIntervalSmoother(),
        controller=probode.IntegralController(rtol=tolerance, atol=tolerance),
    )
    return solver.solve((20.0, 20.0), 0.0, 30.0, args=(0.5, 0.05, 0.5, 0.05), save_at=times)


times = jnp.linspace(0.0, 30.0, 301)
solution, reference = solve(0.2, times), solve(1e-7, times)

print("    time   prey               predators")
(prey, predators), (prey_std, predators_std) = solution.mean, solution.std
for i in range(0, 301, 50):
    print(
        f"{solution.t[i]:8.1f}   {prey[i]:7.3f} +- {prey_std[i]:6.3f}   {predators[i]:7.3f} +- {predators_std[i]:6.3f}"
    )
print(solution.summary())

# %% [markdown]
# Above: the mean with three standard deviations, and the reference (dotted). The smoother knows the solution at every
# time given the whole solve; a filter alone, the default, knows it at the end. Below: the error, in the band of three
# standard deviations that the solver reports.

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
solution.plot(above, std=3.0, labels=["prey", "predators"])
for truth, mean, std in zip(reference.mean, solution.mean, solution.std, strict=True):
    (line,) = below.plot(times, mean - truth)
    below.fill_between(times, -3 * std, 3 * std, color=line.get_color(), alpha=0.25, linewidth=0)
    (dotted,) = above.plot(times, truth, "k:", linewidth=1)
dotted.set_label("reference")
above.legend(frameon=False, ncols=3, loc="upper center")
above.set(xlabel="", ylabel="population", ylim=(0.0, 34.0), title="Lotka-Volterra at a loose tolerance")
below.set(xlabel="time", ylabel="error", xlim=(0.0, 30.0))
figure.savefig(picture, dpi=150)
print(f"picture: {picture}")
