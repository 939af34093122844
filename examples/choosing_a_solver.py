# %% [markdown]
# # Choosing a solver
#
# A solver is composed of parts, which decide what it costs and which problems it can solve. This notebook solves one
# problem that is not stiff and one that is, with six methods each, and compares their times and errors.

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ


# %%
def lotka_volterra(t, u, args):
    return jnp.stack([0.5 * u[0] - 0.05 * u[0] * u[1], -0.5 * u[1] + 0.05 * u[0] * u[1]])


def van_der_pol(t, u, args):
    return jnp.stack([u[1], 1000.0 * ((1 - u[0] ** 2) * u[1] - u[0])])


problems = {
    "Lotka-Volterra": (lotka_volterra, jnp.array([20.0, 20.0]), 20.0),
    "Van der Pol, stiff": (van_der_pol, jnp.array([2.0, 0.0]), 5.0),
}

# %% [markdown]
# - `TS0` evaluates the vector field alone, once or twice per step. One covariance can serve all components
#   (`Isotropic`), and a step costs little. With one evaluation the method is known as EK0.
# - `TS1` uses the Jacobian too, with a full covariance (`Dense`), and is stable on stiff problems. The method is known
#   as EK1.
# - `lifted` observes further derivatives of the solution in every step, which the equation tells. With `TS0` and all of
#   them, steps are as long as those of Runge-Kutta methods of high order; with `TS1` and three, those on stiff problems
#   are half as many (see the notebook `observing_derivatives`).
# - The number of derivatives in the prior, in brackets, determines the order: more derivatives need fewer steps at
#   tight tolerances.

# %%
methods = {
    "EK0(3)": (probode.IWP(3), 0, probode.TS0, {}, probode.Isotropic()),
    "EK0(5), two evaluations": (probode.IWP(5), 0, probode.TS0, {"evaluations": 2}, probode.Isotropic()),
    "all derivatives(5)": (probode.IWP(5), 4, probode.TS0, {"evaluations": 3}, probode.BlockDiagonal()),
    "EK1(3)": (probode.IWP(3), 0, probode.TS1, {}, probode.Dense()),
    "EK1(5)": (probode.IWP(5), 0, probode.TS1, {}, probode.Dense()),
    "EK1(5), three derivatives": (probode.IWP(5), 2, probode.TS1, {"evaluations": 2}, probode.Dense()),
}


def run(name, field, u0, t1, tolerance):
    prior, levels, constraint, options, factorisation = methods[name]
    ode = probode.ODE(field)
    solver = probode.Solver(
        prior,
        constraint(ode.lifted(levels) if levels else ode, **options),
        factorisation=factorisation,
        controller=probode.IntegralController(tolerance, tolerance),
        loop=probode.ForwardLoop(max_steps=20_000),
    )
    solve = lambda: jax.block_until_ready(solver.solve(u0, 0.0, t1, throw=False))  # noqa: E731
    solution = solve()  # compiles
    start = time.perf_counter()
    for _ in range(3):
        solve()
    return solution, (time.perf_counter() - start) / 3


# %% [markdown]
# The plots show time against error: lower is faster, further right is more accurate. Solves that need more than 20,000
# attempted steps are left out. On the stiff problem these are all solves by EK0.

# %%
tolerances = (1e-4, 1e-6) if SMALL else (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for ax, (title, (field, u0, t1)) in zip(axes, problems.items(), strict=True):
    accurate = probode.Solver(
        probode.IWP(7),
        probode.TS1(probode.ODE(field)),
        controller=probode.IntegralController(1e-11, 1e-11),
        loop=probode.ForwardLoop(max_steps=20_000),
    )
    truth = accurate.solve(u0, 0.0, t1).mean[-1]
    results = {}
    for name in methods:
        points = []
        for tolerance in tolerances:
            solution, seconds = run(name, field, u0, t1, tolerance)
            error = float(np.linalg.norm((solution.mean[-1] - truth) / truth))
            if solution.result == probode.Result.successful:
                points.append((seconds, error))
                steps = int(solution.stats["num_accepted_steps"])
                print(f"{title:20s} {name:26s} {tolerance:.0e}: {steps:5d} steps, {1e3 * seconds:7.2f} ms, {error:.1e}")
        if points:
            results[name] = tuple(zip(*points, strict=True))
    probode.plots.plot_work_precision(results, ax)
    ax.set_title(title)
plt.show()

# %% [markdown]
# The README of this folder has a table, "Choosing", with more kinds of problems.
