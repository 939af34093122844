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


def solve(tolerance, times):
    solver = probode.Solver(
        prior=probode.IWP(2),
        constraint=probode.TS1(probode.ODE(lotka_volterra)),
        controller=probode.IntegralController(rtol=tolerance, atol=tolerance),
    )
    return solver.solve((20.0, 20.0), 0.0, 30.0, args=(0.5, 0.05, 0.5, 0.05), save_at=times)


def main(picture="lotka_volterra.png"):
    times = jnp.linspace(0.0, 30.0, 301)
    # A tolerance so loose that the uncertainty can be seen, and a tight one to see whether it is honest.
    solution, reference = solve(0.2, times), solve(1e-7, times)

    print("    time   prey               predators")
    (prey, predators), (prey_std, predators_std) = solution.mean, solution.std
    for i in range(0, 301, 50):
        print(
            f"{solution.t[i]:8.1f}   {prey[i]:7.3f} +- {prey_std[i]:6.3f}"
            f"   {predators[i]:7.3f} +- {predators_std[i]:6.3f}"
        )
    stats = solution.stats
    print(f"{stats['num_accepted_steps']} steps accepted, {stats['num_rejected_steps']} rejected")
    plot(solution, reference, picture)
    print(f"picture: {picture}")


def plot(solution, reference, picture):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    rows = zip(("prey", "predators"), solution.mean, solution.std, reference.mean, ("C0", "C3"), strict=True)
    for label, mean, std, truth, colour in rows:
        above.plot(solution.t, mean, colour, label=label)
        above.fill_between(solution.t, mean - 3 * std, mean + 3 * std, color=colour, alpha=0.25, linewidth=0)
        above.plot(solution.t, truth, "k:", linewidth=1)
        below.semilogy(solution.t[1:], jnp.abs(mean - truth)[1:], colour, label=f"error, {label}")
        below.semilogy(solution.t[1:], std[1:], colour, linestyle="--", label=f"standard deviation, {label}")
    above.set(ylabel="population", title="Lotka-Volterra at a loose tolerance: mean, three standard deviations, truth")
    below.set(xlabel="time", ylabel="size")
    above.legend(frameon=False)
    below.legend(frameon=False, ncols=2)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
