"""Solve a predator-prey model with uncertainty: print a table, save a picture.

Run from anywhere: ``python examples/quickstart.py [picture.png]``.
"""

import sys

import jax
import jax.numpy as jnp

import probode


jax.config.update("jax_enable_x64", True)


def lotka_volterra(t, u, args):
    prey, predators = u
    birth, hunt, death, feed = args
    return birth * prey - hunt * prey * predators, -death * predators + feed * prey * predators


def main(picture="lotka_volterra.png"):
    # A loose tolerance, so that the uncertainty is wide enough to be seen.
    solver = probode.Solver(
        prior=probode.IWP(3),
        constraint=probode.TS1(probode.ODE(lotka_volterra)),
        controller=probode.IntegralController(rtol=1e-2, atol=1e-2),
    )
    times = jnp.linspace(0.0, 30.0, 301)
    rates = (0.5, 0.05, 0.5, 0.05)
    solution = solver.solve((20.0, 20.0), 0.0, 30.0, args=rates, save_at=times)

    print("    time   prey               predators")
    (prey, predators), (prey_std, predators_std) = solution.mean, solution.std
    for i in range(0, 301, 50):
        print(
            f"{solution.t[i]:8.1f}   {prey[i]:7.3f} +- {prey_std[i]:6.3f}   {predators[i]:7.3f} +- {predators_std[i]:6.3f}"
        )
    stats = solution.stats
    print(f"{stats['num_accepted_steps']} steps accepted, {stats['num_rejected_steps']} rejected")
    plot(solution, picture)
    print(f"picture: {picture}")


def plot(solution, picture):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for label, mean, std, colour in zip(("prey", "predators"), solution.mean, solution.std, ("C0", "C3"), strict=True):
        axes.plot(solution.t, mean, colour, label=label)
        axes.fill_between(solution.t, mean - 3 * std, mean + 3 * std, color=colour, alpha=0.25, linewidth=0)
    axes.set(xlabel="time", ylabel="population", title="Lotka-Volterra: posterior mean and three standard deviations")
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
