# %% [markdown]
# # Observing derivatives
#
# A step of EK0 or EK1 observes that `u' = f(t, u)` holds at its end, and guesses all higher derivatives from the steps
# before. But the equation tells these, too: `u'' = df/dt + (df/du) f`, and so on. `ode.lifted(L)` is the equation
# together with its first `L` time derivatives; a step that observes all of them is longer, its derivatives do not
# collect errors from step to step, whatever the order, and it knows better how wrong it is. This notebook shows each of
# these.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ


# %%
def lotka_volterra(t, u, args):
    prey, predators = u
    return jnp.stack([0.5 * prey - 0.05 * prey * predators, -0.5 * predators + 0.05 * prey * predators])


u0, ode = jnp.array([20.0, 20.0]), probode.ODE(lotka_volterra)
accurate = probode.Solver(
    probode.IWP(9),
    probode.TS0(ode.lifted(8), evaluations=4),
    factorisation=probode.BlockDiagonal(),
    strategy=probode.FixedIntervalSmoother(),
    controller=probode.IntegralController(1e-12, 1e-12),
)
truth = accurate.solve(u0, 0.0, 20.0)

# %% [markdown]
# ## One step
#
# A single step of length `h` from exact derivatives. With `IWP(5)` the prediction is the Taylor polynomial of degree
# five, which is wrong by `h^6`. `TS0(ode)` corrects it with the residual of `u'` at the end. With `lifted(1)`,
# `lifted(2)`, ... the residuals of `u''`, `u'''`, ... correct it as well, and the error becomes smaller. With all of
# them nothing is left to guess: the weights are those of the two-point Hermite quadrature, and the order jumps. The
# field is frozen at the prediction, though; every further evaluation, at the corrected solution, removes one order of
# what this leaves wrong. With `m` evaluations the error falls as `h^(nu + m + 1)`, up to `h^(2 nu + 1)`.

# %%
lengths = np.geomspace(0.1, 1.0, 5 if SMALL else 12)
figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for levels in (0, 1, 2, 4):
    equation = ode.lifted(levels) if levels else ode
    constraint = probode.TS0(equation, evaluations=4)
    solver = probode.Solver(probode.IWP(5), constraint, factorisation=probode.BlockDiagonal())
    start = solver.init(u0, 0.0)
    errors = [
        float(np.linalg.norm(solver.step(start, h).mean - truth.evaluate(jnp.array([h])).mean[0])) for h in lengths
    ]
    slope = np.polyfit(np.log(lengths[:3]), np.log(errors[:3]), 1)[0]
    ax.loglog(lengths, errors, "o-", label=f"up to the derivative {levels + 1}: error ~ h^{slope:.1f}")
ax.set(xlabel="length h of the step", ylabel="error after one step", title="IWP(5), four evaluations")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Fewer steps
#
# `solve_ivp(..., method="Taylor")` takes `IWP(5)`, all five derivatives, and three evaluations. The number of steps
# until `t = 20`, against EK0:

# %%
methods = {
    "EK0": dict(method="EK0", num_derivatives=5),
    "all derivatives": dict(method="Taylor", num_derivatives=5),
    "all derivatives, order 8": dict(method="Taylor", num_derivatives=8),
}
tolerances = (1e-4, 1e-6) if SMALL else (1e-4, 1e-6, 1e-8, 1e-10)
for name, options in methods.items():
    counts = []
    for tolerance in tolerances:
        solution = probode.solve_ivp(lotka_volterra, (0.0, 20.0), u0, rtol=tolerance, atol=tolerance, **options)
        counts.append(int(solution.stats["num_accepted_steps"]))
    print(f"{name:26s}", *(f"{tolerance:.0e}: {count:4d}" for tolerance, count in zip(tolerances, counts, strict=True)))

# %% [markdown]
# ## Uncertainty that sees the errors, without smoothing
#
# EK0 estimates the scale of its noise from residuals, and holds the vector field constant while it corrects: that
# neighbouring solutions diverge from the mean is not in its covariance. A filter that observes all derivatives knows
# more: how far its last evaluation has moved the solution, and how far two rules of different order are apart. What
# these say of the error is carried along the solution. The pictures show filters alone, at the ends of their steps, on
# an equation whose neighbouring solutions diverge like `exp(3 t)`; the right one is `cos t`.

# %%
unstable = probode.ODE(lambda t, u, args: 3.0 * (u - jnp.cos(t)) - jnp.sin(t))
filters = {
    "EK0": probode.TS0(unstable),
    "all derivatives": probode.TS0(unstable.lifted(4), evaluations=3),
}
figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for ax, (name, constraint) in zip(axes, filters.items(), strict=True):
    solver = probode.Solver(
        probode.IWP(5),
        constraint,
        factorisation=probode.BlockDiagonal(),
        controller=probode.IntegralController(1e-6, 1e-6),
    )
    solution = solver.solve(jnp.array([1.0]), 0.0, 3.0, save_at=probode.SaveAt(steps=True))
    number = int(solution.stats["num_accepted_steps"])
    t, std = solution.t[:number], solution.std[:number, 0]
    errors = jnp.abs(solution.mean[:number, 0] - jnp.cos(t))
    ax.semilogy(t, errors, "o-", label="error")
    ax.semilogy(t, std, "s--", label="standard deviation")
    ax.set(xlabel="time", title=f"{name}: off by {errors[-1] / std[-1]:.0f} standard deviations")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# The error of EK0 is two thousand times what it says; that of the other filter, in a tenth of the steps, is four times.
# Between its steps a filter has only the prediction, and its uncertainty there is larger; a smoother improves both.
#
# ## Stiff equations
#
# `TS1(ode.lifted(L))` linearises the equation and its derivatives in `u, u', ..., u^(L+1)`, so that only first powers
# of the Jacobian occur. Steps are longer, and an attempt costs about as much as without. Van der Pol's equation with
# `mu = 1000`, to 1e-6:


# %%
def van_der_pol(t, u, mu):
    return jnp.stack([u[1], mu * ((1 - u[0] ** 2) * u[1] - u[0])])


stiff = probode.ODE(van_der_pol)
for name, constraint in {
    "EK1": probode.TS1(stiff),
    "EK1, three derivatives": probode.TS1(stiff.lifted(2), evaluations=2),
}.items():
    solver = probode.Solver(
        probode.RelativeScale(probode.IWP(5)), constraint, controller=probode.IntegralController(1e-6, 1e-9)
    )
    solution = solver.solve(jnp.array([2.0, 0.0]), 0.0, 2.0, args=1000.0)
    u, std = solution.mean[-1, 0], solution.std[-1, 0]
    print(f"{name:26s} {int(solution.stats['num_steps']):4d} attempts, u = {u:.9f} +- {std:.0e}")

# %% [markdown]
# ## Which, and how many
#
# - Not stiff, a cheap field, tolerances of 1e-5 or tighter: all derivatives (`lifted(nu - 1)`) with `evaluations=3`,
#   and `IWP(5)` to `IWP(7)`.
# - Stiff, tolerances of 1e-5 or tighter: `TS1(ode.lifted(2), evaluations=2)` and `RelativeScale(IWP(5))`.
# - An expensive field, as a neural network: a series of `L` derivatives costs about `L^2 / 2` evaluations of nonlinear
#   operations and `L` of linear ones, so that fewer derivatives pay, or none.
# - A field with kinks: the higher derivatives do not exist there, and standard deviations become too small.
