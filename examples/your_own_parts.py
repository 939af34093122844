# %% [markdown]
# # Parts of your own, and how to test them
#
# A part of your own is a subclass of an abstract class, with one or two methods: here a constraint and a controller.
# The functions of `probode.testing` check the laws that every part of its kind must satisfy, and name the law that it
# does not satisfy. Parts of all other kinds are in the folder `tests/extending`.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp

import probode


jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A constraint
#
# A constraint linearises the equation at the predicted mean: it returns a matrix that acts on the state `(u, u', ...)`,
# and a residual. This one computes the Jacobian of the vector field by finite differences. `Linearisation.explicit`
# makes both for an equation `u' = f(t, u)`, in the form of the solver's factorisation, from the Jacobian of `f` and the
# residual `u' - f`.


# %%
class Secants(probode.AbstractConstraint):
    """An ODE, linearised with a Jacobian by finite differences."""

    problem: probode.ODE
    step: jax.Array = eqx.field(converter=jnp.asarray, default=1e-6)

    def linearise(self, t, predicted, layout, args):
        field = probode.flat_field(self.problem, layout, args)  # on flat vectors: (order, d) to (d,)
        u, du = layout.unpack(predicted.mean)[:2]
        step = self.step.astype(u.dtype)
        shifted = jax.vmap(lambda e: field(t, (u + step * e)[None]) - field(t, u[None]))
        jacobian = shifted(jnp.eye(u.size, dtype=u.dtype)).T / step
        return probode.Linearisation.explicit(layout, [jacobian], du - field(t, u[None]))


def pendulum(t, u, args):
    return jnp.stack([u[1], -jnp.sin(u[0]) + 0.1 * jnp.cos(t)])


ode, u0 = probode.ODE(pendulum), jnp.array([1.0, 0.0])
for constraint in (Secants(ode), probode.TS1(ode)):
    solution = probode.Solver(probode.IWP(3), constraint).solve(u0, 0.0, 5.0)
    print(f"{type(constraint).__name__:8s} u = {solution.mean[0]}")

# %% [markdown]
# ## Is it right?
#
# The laws of a constraint are: its residual is that of the equation, at the right time; its matrix has the form that it
# says; it works in single precision, under `jit` and `vmap`, and can be differentiated; solutions converge as steps get
# shorter.

# %%
probode.testing.check_constraint(Secants(ode), u0)
print("the constraint obeys the laws")


# %% [markdown]
# A constraint with a mistake: it evaluates the vector field at the wrong time.


# %%
class Late(Secants):
    def linearise(self, t, predicted, layout, args):
        return Secants(self.problem).linearise(t + 0.1, predicted, layout, args)


try:
    probode.testing.check_constraint(Late(ode), u0)
except probode.testing.LawBroken as error:
    print(f"{type(error).__name__}: {error}")


# %% [markdown]
# ## A controller
#
# A controller decides from numbers alone: the length of a step, the norm of its error in units of the tolerance (up to
# 1 is good enough), and the order.


# %%
class HalveOrDouble(probode.AbstractController):
    """A step is halved if it is rejected, and doubled if the error would stay below the tolerance."""

    tolerances: probode.Tolerances = eqx.field(default_factory=probode.Tolerances)
    limits: probode.Limits = eqx.field(default_factory=probode.Limits)

    def init(self, dtype):
        return None

    def propose(self, dt, error_norm, order, state):
        good = error_norm <= 1
        longer = jnp.where(error_norm < 0.5**order, 2 * dt, dt)
        return good, jnp.where(good, longer, dt / 2), None


probode.testing.check_controller(HalveOrDouble())
doubling = HalveOrDouble(probode.Tolerances(1e-5, 1e-7))
solution = probode.Solver(probode.IWP(3), Secants(ode), controller=doubling).solve(u0, 0.0, 5.0)
print(solution.summary())

# %% [markdown]
# The lengths of its steps, all but the last powers of two times the first:

# %%
kept = probode.Solver(probode.IWP(3), Secants(ode), controller=doubling).solve(
    u0, 0.0, 5.0, save_at=probode.SaveAt(t0=True, dense=True)
)
probode.plots.plot_steps(kept)

# %% [markdown]
# ## Property-based tests
#
# With hypothesis, `probode.testing` generates equations with known solutions, grids, priors and solvers:
#
# ```python
# from hypothesis import given
#
# @given(known=probode.testing.problems())
# def test_my_filter(known):
#     solver = probode.Solver(probode.IWP(3), Secants(known.problem))
#     end = solver.solve(known.u0, 0.0, known.t1, args=known.args).mean[-1]
#     assert jnp.allclose(end, known.solution(known.t1, known.args), atol=1e-2)
# ```
