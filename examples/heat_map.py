# %% [markdown]
# # A partial differential equation, with a map of its uncertainty
#
# Two chemicals react and diffuse on a square (Gray and Scott's model). On a grid of 32 x 32 points this is a system of
# 2,048 ordinary differential equations. A full covariance would be far too large; one small block for each component is
# not.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ
n, t1 = (16, 50.0) if SMALL else (32, 400.0)

# %% [markdown]
# The state is a dictionary of two fields on the grid; it may be any PyTree of arrays. Boundaries are periodic.


# %%
def laplacian(u):
    p = jnp.pad(u, 1, mode="wrap")
    return (p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u) * (n / 64) ** 2 * 4


def gray_scott(t, u, args):
    feed, kill = args
    a, b = u["substrate"], u["catalyst"]
    reaction = a * b**2
    return {
        "substrate": 0.16 * laplacian(a) - reaction + feed * (1 - a),
        "catalyst": 0.08 * laplacian(b) + reaction - (feed + kill) * b,
    }


x = (jnp.arange(n) + 0.5) / n
bump = jnp.exp(-80 * ((x[:, None] - 0.45) ** 2 + (x - 0.5) ** 2))
u0 = {"substrate": 1 - 0.5 * bump, "catalyst": 0.4 * bump + 0.02 * jnp.sin(6 * jnp.pi * x)[:, None] ** 2}
rates = (0.04, 0.06)

# %% [markdown]
# `TS0`, here with a second evaluation of the vector field per step, needs no Jacobian. `BlockDiagonal` keeps one
# covariance of `(u, u', ...)` for every point and chemical.

# %%
solver = probode.Solver(
    probode.IWP(4),
    probode.TS0(probode.ODE(gray_scott), evaluations=2),
    factorisation=probode.BlockDiagonal(),
    controller=probode.IntegralController(1e-3, 1e-4),
)
times = jnp.linspace(0.0, t1, 4)[1:]
solution = solver.solve(u0, 0.0, t1, args=rates, save_at=times)
print(solution.summary())

# %% [markdown]
# Is the standard deviation as large as the error? The error is the difference from a solve at a much tighter tolerance.

# %%
tight = probode.Solver(
    probode.IWP(6),
    probode.TS0(probode.ODE(gray_scott), evaluations=2),
    factorisation=probode.Isotropic(),
    controller=probode.IntegralController(1e-7, 1e-8),
    loop=probode.ForwardLoop(max_steps=20_000),
)
truth = tight.solve(u0, 0.0, t1, args=rates)
error = np.abs(np.asarray(solution.mean["catalyst"][-1] - truth.mean["catalyst"][-1]))
std = np.asarray(solution.std["catalyst"][-1])
print(f"largest error {error.max():.1e}, largest standard deviation {std.max():.1e}")
print(f"within two standard deviations at {np.mean(error < 2 * std):.0%} of the points")

# %%
figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
for ax, t, field in zip(axes[0], times, solution.mean["catalyst"], strict=True):
    image = ax.imshow(field, cmap="viridis", vmin=0, vmax=0.4)
    ax.set(title=f"catalyst at t = {float(t):.0f}", xticks=[], yticks=[])
figure.colorbar(image, ax=axes[0])
limit = np.log10(max(error.max(), std.max()))
maps = {"log10 of the error": error, "log10 of the standard deviation": std}
for ax, (title, values) in zip(axes[1], maps.items(), strict=False):
    image = ax.imshow(np.log10(np.maximum(values, 1e-12)), cmap="magma", vmin=limit - 4, vmax=limit)
    ax.set(title=title, xticks=[], yticks=[])
figure.colorbar(image, ax=axes[1, :2])
axes[1, 2].hist(np.log10(np.maximum(error / std, 1e-6)).ravel(), bins=30)
axes[1, 2].set(title="log10 of error / standard deviation")
plt.show()
