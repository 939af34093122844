# %% [markdown]
# # Two points instead of a start
#
# A boundary value problem says what holds at both ends of an interval. Shooting, that is to guess the start and to
# improve it until the end fits, fails where solutions grow: with a layer of width 0.01 an error of one unit of
# round-off at the start is larger than everything else at the end. `solve_bvp` solves for the whole trajectory at once,
# on a mesh of its own, and says how far it is from the true solution.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)


# %% [markdown]
# ## A problem that shooting cannot solve
#
# `w u'' = -t u'` with a jump of `u` in the middle that is `sqrt(w)` wide. Solutions grow by `exp(1 / (2 w))` from the
# middle to the ends.


# %%
def layer(t, u, du, width):
    return -t * du / width


def ends(ua, ub, args):
    return ua[0] + 1.0, ub[0] - 1.0


equation = probode.ODE(layer, order=2)
solution = probode.solve_bvp(equation, ends, (-1.0, 1.0), lambda t: t, args=1e-4, rtol=1e-6, atol=1e-6)
print(solution.summary())

t = np.linspace(-1, 1, 2001)
exact = np.asarray(jax.scipy.special.erf(t / np.sqrt(2e-4)))
known = solution.evaluate(t)
error = np.abs(known.mean - exact)
print(f"largest error {error.max():.1e}, largest standard deviation {known.std.max():.1e}")

# %% [markdown]
# The nodes are where the solution bends. Errors are as large as the standard deviations say, also between the nodes.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
nodes = np.asarray(solution.t)[: int(solution.stats["num_nodes"])]
axes[0].plot(t, known.mean)
axes[0].plot(nodes, solution.mean[: nodes.size], ".")
axes[0].set_xlabel("time")
axes[1].semilogy(t, error + 1e-18, label="error")
axes[1].semilogy(t, known.std + 1e-18, label="standard deviation")
axes[1].set_ylim(1e-16, 1e-5)
axes[1].set_xlim(-0.2, 0.2)
axes[1].legend()

# %% [markdown]
# ## Several solutions, and how they depend on a parameter
#
# Bratu's problem has two solutions: the guess decides. The derivative with respect to a parameter is that of the
# solution, whatever the number of Newton steps was.

# %%
bratu = probode.ODE(lambda t, u, du, k: -k * jnp.exp(u), order=2)


def middle(k, height):
    """The solution in the middle, from a guess of that height."""
    guess = jnp.array([0.0, height, 0.0])
    zero = lambda ua, ub, args: (ua[0], ub[0])  # noqa: E731
    return probode.solve_bvp(bratu, zero, (0.0, 1.0), guess, args=k, rtol=1e-8, atol=1e-8).evaluate(0.5).mean


print(f"lower solution {middle(1.0, 0.0):.8f}, upper solution {middle(1.0, 4.0):.8f}")
print(f"derivative of the lower one {jax.grad(middle)(1.0, 0.0):.6f}")

# %% [markdown]
# ## An unknown parameter
#
# A string that is fixed at both ends: at which frequency can it move? One more unknown needs one more condition, here
# the slope at the start. The parameter has a posterior, too.

# %%
string = probode.ODE(lambda t, u, du, args: -(args[0] ** 2) * u, order=2)
tone = probode.solve_bvp(
    string,
    lambda ua, ub, args: (ua[0], ub[0], ua[1] - args[0]),
    (0.0, 1.0),
    lambda t: jnp.sin(6 * t),
    parameters=6.0,
    rtol=1e-5,
)
k, std = tone.parameters.mean, tone.parameters.factor[0, 0]
print(f"frequency 2 pi + {k - 2 * np.pi:.1e} +- {std:.1e}")

# %% [markdown]
# ## Ends that were measured
#
# A condition may hold up to a deviation. Here a cannon ball was seen at two points, each to some centimetres; in
# between its height is uncertain by what both leave open.

# %%
ball = probode.ODE(lambda t, u, du, args: -9.81 * jnp.ones_like(u), order=2)
flight = probode.solve_bvp(
    ball,
    lambda ua, ub, args: (probode.Normal(ua[0] - 1.0, 0.02), probode.Normal(ub[0] - 3.0, 0.05)),
    (0.0, 2.0),
    lambda t: 1.0 + t,
)
for t in (0.0, 1.0, 2.0):
    at = flight.evaluate(t)
    speed = at.derivative(1)
    print(f"t = {t}: height {at.mean:.3f} +- {at.std:.3f}, speed {speed.mean:.3f} +- {speed.std:.3f}")
