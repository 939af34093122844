# %% [markdown]
# # Learning a differential-algebraic equation
#
# A diode clipper is a circuit of guitar pedals: a capacitor is charged through a resistor and discharged by a diode.
# The current through the diode is given by its voltage in an algebraic equation. We measure the voltage, with noise,
# and estimate the resistance and the saturation current of the diode, whose order of magnitude is unknown.
#
# Needs `pip install 'probode[learn]'` (optax).

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ

# %% [markdown]
# There are two unknowns, the voltage and the current through the diode, and two equations, of which only one has a
# derivative. A `Residual` returns what has to be zero. The solver finds a consistent start and conditions on both
# equations in every step.


# %%
def clipper(t, u, du, args):
    source = 2.0 * jnp.sin(t)
    current = (source - u["voltage"]) / args["resistance"]
    return {
        "node": du["voltage"] - (current - u["current"]),
        "diode": u["current"] - args["saturation"] * (jnp.exp(u["voltage"] / 0.1) - 1),
    }


true = {"resistance": jnp.array(0.8), "saturation": jnp.array(1e-3)}
u0, t1, noise = {"voltage": 0.0, "current": 0.0}, 8.0, 0.03
solver = probode.Solver(
    probode.IWP(2),
    probode.TS1(probode.Residual(clipper)),
    controller=probode.IntegralController(1e-3, 1e-4),
    loop=probode.BoundedLoop(max_steps=1024),
)
times = np.linspace(0.0, t1, 201)[1:]
exact = solver.solve(u0, 0.0, t1, args=true, save_at=times)
ts = times[4::5]
values = np.asarray(exact.mean["voltage"])[4::5] + noise * np.random.default_rng(0).normal(size=ts.size)
data = probode.Observations(ts, values, noise, observe=lambda t, u, args: u["voltage"])
print(f"{int(exact.stats['num_accepted_steps'])} steps")

# %% [markdown]
# We fit the logarithms of both parameters by gradient descent (Adam), from values that are wrong by factors of four and
# thirty. The filtering likelihood needs a single pass and no smoother.


# %%
def parameters(logs):
    return dict(zip(true, jnp.exp(logs), strict=True))


def improbability(logs):
    return -probode.filtering_log_likelihood(solver, u0, 0.0, t1, data, args=parameters(logs)) / ts.size


logs = jnp.log(jnp.array([0.2, 3e-2]))
iterations = 5 if SMALL else 150
optimiser = optax.adam(optax.cosine_decay_schedule(0.3, iterations))
memory = optimiser.init(logs)


@jax.jit
def improve(logs, memory):
    value, gradient = jax.value_and_grad(improbability)(logs)
    move, memory = optimiser.update(gradient, memory)
    return logs + move, memory, value


for i in range(iterations):
    logs, memory, value = improve(logs, memory)
    if i % 25 == 0:
        resistance, saturation = np.exp(np.asarray(logs))
        print(f"{i:3d} {-float(value):12.3f}  resistance {resistance:.3f}, saturation {saturation:.2e}")

# %% [markdown]
# How accurate are the estimates? With the Jacobian `J` of the voltages with respect to the logarithms, divided by the
# standard deviation of the noise, the Fisher information is `J^T J`. The square roots of the diagonal of its inverse
# are relative standard deviations of the parameters. There are only two parameters, so `J` is computed in forward mode.


# %%
def voltages(logs):
    return solver.solve(u0, 0.0, t1, args=parameters(logs), save_at=ts).mean["voltage"]


moves = np.asarray(jax.jit(jax.jacfwd(voltages))(logs)) / noise
deviations = np.sqrt(np.diag(np.linalg.inv(moves.T @ moves)))
fit = parameters(logs)
for name, deviation in zip(true, deviations, strict=True):
    print(f"{name}: {float(fit[name]):.4g} within {100 * deviation:.0f} %, true {float(true[name]):.4g}")

# %%
fitted = solver.solve(u0, 0.0, t1, args=fit, save_at=times)
figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
above.plot(ts, values, "k.", label="measured")
above.plot(times, fitted.mean["voltage"], label="fitted")
above.plot(times, 2 * np.sin(times), "0.7", linewidth=1, label="source")
above.set(ylabel="voltage")
above.legend(frameon=False)
below.plot(times, fitted.mean["current"], "C1")
below.plot(times, exact.mean["current"], "k:")
below.set(xlabel="time", ylabel="current, not measured")
plt.show()
