# %% [markdown]
# # Derivatives at the start of a solve: Taylor coefficients
#
# The state of a probabilistic solver is `(u, u', ..., u^(nu))`, so a solve needs derivatives of the solution at `t0`.
# They follow from the equation by differentiating it with respect to time again and again. `TaylorMode`, the default,
# computes them exactly, by automatic differentiation.

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)


# %%
def logistic(t, u, rate):
    return rate * u * (1 - u)


def exact(t):
    return 1 / (1 + 9 * np.exp(-np.asarray(t)))


def solver(initialisation):
    return probode.Solver(
        probode.IWP(4),
        probode.TS0(probode.ODE(logistic), evaluations=2),
        initialisation=initialisation,
        controller=probode.IntegralController(1e-6, 1e-6),
    )


start = solver(probode.TaylorMode()).initialise(0.1, 0.0, args=1.0)
print("u, u', u'', ... at 0:", ", ".join(f"{float(u):.4g}" for u in start.mean))

# %% [markdown]
# Divided by factorials they are the coefficients of the Taylor series. It converges up to the nearest pole of the
# solution in the complex plane, here at a distance of about 3.8 (vertical line). However many coefficients there are,
# the series is of no use beyond, so a solver has to take steps.

# %%
ts = np.linspace(0.0, 6.0, 121)
coefficients = [float(u) / math.factorial(k) for k, u in enumerate(start.mean)]
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
axes[0].plot(ts, exact(ts), "k", label="solution")
for order in (2, 3, 4):
    axes[0].plot(ts, np.polynomial.Polynomial(coefficients[: order + 1])(ts), label=f"{order} derivatives")
axes[0].axvline(np.hypot(np.log(9), np.pi), color="0.7", linewidth=1)
axes[0].set(ylim=(-0.5, 1.5), xlabel="time", title="Taylor polynomials, and how far the series converges")
axes[0].legend(frameon=False)

# %% [markdown]
# Some vector fields cannot be differentiated four times. `Diffuse(1)` computes the first derivative alone and takes the
# others as unknown, with mean zero and a standard deviation of one. The first steps then determine them; these steps
# are short, and their standard deviations are larger.

# %%
starts = {
    "TaylorMode()": probode.TaylorMode(),
    "Diffuse(1)": probode.Diffuse(1),
}
for i, (name, initialisation) in enumerate(starts.items()):
    solution = solver(initialisation).solve(0.1, 0.0, 6.0, args=1.0, save_at=probode.SaveAt(steps=True))
    n = int(solution.stats["num_accepted_steps"])
    t, mean, std = (np.asarray(x)[:n] for x in (solution.t, solution.mean, solution.std))
    error = abs(mean - exact(t))
    print(f"{name:14s} {n:3d} steps, first one {t[0]:.1e}, largest error {error.max():.1e}")
    axes[1].semilogy(t, error, f"C{i}.-", label=f"{name}: error")
    axes[1].semilogy(t, std, f"C{i}--", label=f"{name}: standard deviation")
axes[1].set(xlabel="time", title="the same solve from two starts")
axes[1].legend(frameon=False, fontsize="small")
plt.show()

# %% [markdown]
# The state at the start can be differentiated with respect to everything that it depends on, here with respect to the
# rate. The k-th derivative of the solution is proportional to the k-th power of the rate, so at a rate of one its
# derivative with respect to the rate is k times itself.


# %%
def derivatives(rate):
    return jnp.stack(solver(probode.TaylorMode()).initialise(0.1, 0.0, args=rate).mean)


slopes = jax.jacfwd(derivatives)(jnp.array(1.0))
print("agrees:", np.allclose(slopes, np.arange(5) * np.asarray(derivatives(jnp.array(1.0)))))
