# %% [markdown]
# # Priors, and samples of solutions
#
# A probabilistic solver starts from a prior, a stochastic process that describes solutions before the equation is used:
# how smooth they are, whether they return to zero, over which times they are correlated. Conditioning on the equation
# gives the posterior, from which samples can be drawn.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import probode


jax.config.update("jax_enable_x64", True)

# %% [markdown]
# Samples of three priors, without any equation. The integrated Wiener process has a variance that grows without bound;
# in the integrated Ornstein-Uhlenbeck process the highest derivative is pulled back to zero; the Matern process is
# stationary.

# %%
ts = jnp.linspace(0.0, 5.0, 200)
priors = {
    "IWP(2)": probode.IWP(2),
    "IOUP(2), rate -2": probode.IOUP(2, rate=-2.0),
    "Matern(2), length scale 1": probode.Matern(2, length_scale=1.0),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for ax, (name, prior) in zip(axes, priors.items(), strict=True):
    draws = probode.sample_prior(prior, jax.random.key(1), ts, jnp.zeros(()), shape=(12,))
    band = probode.prior_marginals(prior, ts, jnp.zeros(()))
    ax.plot(ts, draws.T, "C0", linewidth=0.6)
    ax.fill_between(ts, -2 * band.std, 2 * band.std, color="C0", alpha=0.2, linewidth=0)
    ax.set_title(name)
plt.show()

# %% [markdown]
# Samples of a posterior, at a tolerance so loose that they differ visibly. The equation is used at the ends of the
# steps (black marks).


# %%
def pendulum(t, u, du, args):
    return -jnp.sin(u) - 0.1 * du


solver = probode.Solver(
    probode.IWP(3),
    probode.TS1(probode.ODE(pendulum, order=2)),
    strategy=probode.FixedIntervalSmoother(),
    calibration=probode.LeaveOneOutCalibration(),
    controller=probode.IntegralController(0.02, 0.02),
)
solution = solver.solve((2.0, 0.0), 0.0, 15.0)
print(solution.summary())
figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
solution.plot(above, samples=20, magnify=10)
steps = solution.trajectory.rows.t[solution.trajectory.reached]
above.plot(steps, 0 * steps, "k|")
above.set_ylabel("angle")
probode.plots.plot_local_error(solution, below)
plt.show()

# %% [markdown]
# A prior that contains the stiff linear part of an equation allows longer steps. Such solvers are the probabilistic
# counterpart of exponential integrators. Here one linear component decays a hundred times faster than the other, and
# the nonlinear part is small. `RosenbrockIOUP` takes the linear part from the Jacobian in every step.

# %%
stiff = jnp.array([[-1.0, 1.0], [0.0, -100.0]])
ode = probode.ODE(lambda t, u, args: stiff @ u + 0.1 * jnp.stack([jnp.sin(u[1]), u[0] * u[1]]))
for name, prior in {
    "IWP": probode.IWP(3),
    "IOUP with the linear part": probode.IOUP(3, rate=stiff),
    "RosenbrockIOUP": probode.RosenbrockIOUP(3),
}.items():
    own = probode.Solver(prior, probode.TS1(ode), controller=probode.IntegralController(1e-6, 1e-6))
    result = own.solve(jnp.array([1.0, 1.0]), 0.0, 1.0)
    print(f"{name:26s} {int(result.stats['num_accepted_steps']):5d} steps")
