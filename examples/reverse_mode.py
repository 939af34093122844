# %% [markdown]
# # Reverse-mode derivatives through an adaptive solve
#
# The number of steps of an adaptive solve is not known in advance. How the solver's loop deals with this decides which
# modes of differentiation work. Here we solve the logistic equation from an initial state, a Gaussian over `(u, u')`,
# and want the gradient of `u(1)^2` with respect to this state.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import probode


def logistic(t, u, args):
    return 0.5 * u * (1.0 - u)


def solver_with(loop):
    return probode.Solver(
        prior=probode.IWP(1),
        constraint=probode.TS0(probode.ODE(logistic)),
        factorisation=probode.Isotropic(),
        calibration=probode.NoCalibration(),
        controller=probode.IntegralController(rtol=1e-3, atol=1e-3),
        loop=loop,
    )


def loss(solver, initial):
    return jnp.sum(solver.solve(initial, 0.0, 1.0, dt0=0.1).mean ** 2)


u0 = jnp.array([0.1], jnp.float32)
initial = solver_with(probode.BoundedLoop()).initialise(u0, 0.0)

# %% [markdown]
# `ForwardLoop` is a plain while loop. It does not store its steps, so reverse mode raises an error.

# %%
forward_only = solver_with(probode.ForwardLoop())
print(f"loss with a forward-only loop: {loss(forward_only, initial):.8f}")
try:
    jax.grad(lambda initial: loss(forward_only, initial))(initial)
except RuntimeError as error:
    print(f"its gradient: {type(error).__name__}: {str(error).splitlines()[0]}")

# %% [markdown]
# The default, `BoundedLoop`, has a largest number of steps, and can be differentiated in reverse and in forward mode.

# %%
bounded = solver_with(probode.BoundedLoop())
value, gradient = eqx.filter_value_and_grad(lambda initial: loss(bounded, initial))(initial)
print(f"loss with the bounded loop: {value:.8f}")
print("gradient in the initial mean of (u, u'):", ", ".join(f"{float(g[0]):.7f}" for g in gradient.mean))
print(f"gradient in the initial factor: {jnp.abs(gradient.factor).max():.1f} at most (the state is exact)")

# %% [markdown]
# A solver is a PyTree, so its parameters can be differentiated with respect to as well. Here it is the output scale of
# the prior. The gradient is zero: without calibration the mean does not depend on the output scale.

# %%
in_scale = eqx.filter_grad(loss)(bounded, initial).prior.output_scale
print(f"gradient in the output scale: {float(in_scale):.1e}")

# %% [markdown]
# The loss over the initial value, and its slopes by reverse mode.

# %%
starts = jnp.linspace(0.02, 0.3, 8)
losses, slopes = jax.vmap(jax.value_and_grad(lambda u: loss(bounded, bounded.initialise(u, 0.0))))(starts[:, None])
ax = plt.figure(layout="constrained").add_subplot()
ax.plot(starts, losses, ".-")
for u, value, slope in zip(starts, losses, slopes[:, 0], strict=True):
    ax.plot([u - 0.01, u + 0.01], [value - 0.01 * slope, value + 0.01 * slope], color="C1")
ax.set_xlabel("initial value")
ax.set_ylabel("loss")
