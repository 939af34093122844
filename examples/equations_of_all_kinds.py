# %% [markdown]
# # Equations of all kinds
#
# Equations of second order, equations with a conserved quantity and differential-algebraic equations are written down
# as they are, without a transformation to first-order form, and solved by the same solver.

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
# ## Second order
#
# An equation `u'' = f(t, u, u', args)` is solved from the pair `(u, u')`. Velocity and acceleration are part of the
# posterior: `solution.derivative(1)` and `solution.derivative(2)`.


# %%
def kepler(t, u, du, args):
    return -u / jnp.linalg.norm(u) ** 3


orbit = probode.Solver(
    probode.IWP(6),
    probode.TS1(probode.ODE(kepler, order=2)),
    strategy=probode.FixedIntervalSmoother(),
    controller=probode.IntegralController(1e-6, 1e-6),
    loop=probode.BoundedLoop(max_steps=256),
)
solution = orbit.solve((jnp.array([0.4, 0.0]), jnp.array([0.0, 2.0])), 0.0, 6.28)
print(solution.summary())
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
probode.plots.plot_phase(solution, left)
left.set(aspect="equal", title="an orbit")
probode.plots.plot_steps(solution, right)
right.set_title("short steps where it is close to the sun")
plt.show()

# %% [markdown]
# ## Conserved quantities
#
# A `Stack` conditions on several equations in every step. Here these are the equation of an oscillator and the
# conservation of its energy. With the second, the energy stays constant for a hundred periods; without it, it drifts.

# %%
oscillator = probode.ODE(lambda t, u, args: jnp.stack([u[1], -u[0]]))
energy = probode.Residual(lambda t, u, args: u @ u - 1, order=0)
periods = 2 if SMALL else 100
for name, constraint in {
    "equation alone": probode.TS1(oscillator),
    "and its energy": probode.Stack(probode.TS1(oscillator), probode.TS1(energy, evaluations=2, relinearise=True)),
}.items():
    solver = probode.Solver(
        probode.IWP(3),
        constraint,
        controller=probode.IntegralController(1e-3, 1e-3),
        loop=probode.ForwardLoop(max_steps=20_000),
    )
    end = solver.solve(jnp.array([1.0, 0.0]), 0.0, 2 * np.pi * periods).mean[0]
    print(f"{name}: energy off by {abs(float(end @ end) - 1):.1e} after {periods} periods")

# %% [markdown]
# ## Differential-algebraic equations
#
# Robertson's reaction has three chemicals, rates that span nine orders of magnitude, and here a conservation law in
# place of the third differential equation. The solver finds consistent derivatives at the start.
#
# - Long steps change `b` so much that one linearisation is not accurate, which the error estimate of a `Residual` does
#   not see. So every accepted step evaluates and linearises the equation four times, each time at the mean of the
#   update before (`evaluations=4, relinearise=True`). `stats["last_move"]` shows that these iterations have converged.
# - `b` is far smaller than `a` and `c`, so it has a smaller output scale. With one scale for all components it would be
#   far too uncertain between the steps.


# %%
def robertson(t, u, du, args):
    a, b, c = u
    slow, fast = 0.04 * a, 1e4 * b * c
    return jnp.stack([du[0] + slow - fast, du[1] - slow + fast + 3e7 * b**2, a + b + c - 1])


solver = probode.Solver(
    probode.IWP(3, output_scale=jnp.array([1.0, 1e-4, 1.0])),
    probode.TS1(probode.Residual(robertson), evaluations=4, relinearise=True),
    controller=probode.IntegralController(1e-4, 1e-8),
)
times = np.geomspace(1e-4, 1e2 if SMALL else 1e5, 60)
solution = solver.solve(jnp.array([1.0, 0.0, 0.0]), 0.0, float(times[-1]), save_at=times)
off = abs(float(jnp.sum(solution.mean[-1])) - 1)
print(f"{int(solution.stats['num_accepted_steps'])} steps; at the end of the last one mass is off by {off:.1e}")
print(f"the last iteration moved no step by more than {float(solution.stats['last_move']):.1e} standard deviations")
ax = solution.plot(labels=["a", "b", "c"])
ax.set_xscale("log")
ax.set_yscale("symlog", linthresh=1e-6)
ax.set_ylim(-1e-6, 2)
plt.show()
