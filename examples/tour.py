# %% [markdown]
# # A tour
#
# Every feature in a few lines. The README of the repository lists the parts of a solver, the README of this folder says
# which to choose.

# %% [markdown]
# `solve_ivp` has the form of SciPy's function of that name. A vector field is a function `f(t, u, args)`; the state `u`
# is any PyTree of real arrays.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp

import probode


jax.config.update("jax_enable_x64", True)


def lotka_volterra(t, u, args):
    prey, predators = u
    birth, hunt, death, feed = args
    return birth * prey - hunt * prey * predators, -death * predators + feed * prey * predators


rates = (0.5, 0.05, 0.5, 0.05)
solution = probode.solve_ivp(lotka_volterra, (0.0, 10.0), (20.0, 20.0), args=rates, t_eval=jnp.linspace(0, 10, 5))
prey, predators = solution.mean
prey_std, predators_std = solution.std
assert prey.shape == prey_std.shape == (5,)

# %% [markdown]
# A `Solver` is composed of parts. Each can be replaced by another one, or by a subclass of your own.

# %%
solver = probode.Solver(
    prior=probode.IWP(4),  # four derivatives: a method of order five
    constraint=probode.TS1(probode.ODE(lotka_volterra)),  # EK1, for stiff problems too; TS0 needs no Jacobian
    factorisation=probode.Dense(),  # or BlockDiagonal(), Isotropic(): cost linear in the dimension
    controller=probode.IntegralController(rtol=1e-6, atol=1e-8),
)
solution = solver.solve((20.0, 20.0), 0.0, 10.0, args=rates)
assert solution.mean[0].shape == (1,)  # save_at=None keeps t1 alone
velocity = solution.derivative(1).mean  # every derivative is part of the posterior
print(solution.result == probode.Result.successful, solution.stats["num_accepted_steps"])

# %% [markdown]
# A solve returns the times that `save_at` asks for, or every step. `solve_grid` takes one step between any two points
# of a grid, without error control. `init` and `step` take single steps. A solve can be resumed from the state of
# another:

# %%
ts = jnp.linspace(0.0, 10.0, 101)
at_times = solver.solve((20.0, 20.0), 0.0, 10.0, args=rates, save_at=ts)
every_step = solver.solve((20.0, 20.0), 0.0, 10.0, args=rates, save_at=probode.SaveAt(t0=True, steps=True))
on_a_grid = solver.solve_grid((20.0, 20.0), ts, args=rates)

state = solver.init((20.0, 20.0), 0.0, args=rates)
state = solver.step(state, 0.1, args=rates)
print(state.t, state.mean, state.std)

first = solver.solve((20.0, 20.0), 0.0, 5.0, args=rates)
second = solver.solve(first.state, 5.0, 10.0, args=rates)  # from where the first one stopped

# %% [markdown]
# A filter estimates every time from the steps before it, a smoother from all steps. `FixedPointSmoother` needs memory
# for the times that are asked for alone; `FixedIntervalSmoother` keeps all steps, so that the solution can be evaluated
# and sampled at any time.

# %%
smoother = probode.Solver(
    prior=probode.IWP(4),
    constraint=probode.TS1(probode.ODE(lotka_volterra)),
    strategy=probode.FixedIntervalSmoother(),
    calibration=probode.LeaveOneOutCalibration(),
    controller=probode.IntegralController(rtol=1e-4, atol=1e-6),
)
solution = smoother.solve((20.0, 20.0), 0.0, 10.0, args=rates)
posterior = solution.evaluate(ts)  # mean, std, derivative(k), at any times of the interval
acceleration = posterior.derivative(2).std
draws = solution.sample(jax.random.key(0), (50,), ts=ts)  # joint samples: leaves (50, 101)
assert draws[0].shape == (50, 101)
print(solution.log_likelihood, solution.output_scale[-1])

# %% [markdown]
# `summary()` describes a solve in words, `plot` draws means, bands of uncertainty and samples. `probode.plots` has
# phase portraits with ellipses, step sizes, residuals, and errors beside standard deviations. With
# `progress=probode.TextProgress()` or `TqdmProgress()` a long solve reports its progress, also under `jit`, `vmap` and
# `grad`.

# %%
print(solution.summary())
axes = solution.plot(samples=10, labels=["prey", "predators"])  # pip install 'probode[plot]'
probode.plots.plot_phase(solution)

# %% [markdown]
# Is the uncertainty right? `calibration_report` compares it with the true error over a sweep of tolerances:

# %%
decay = probode.Solver(
    probode.IWP(3),
    probode.TS1(probode.ODE(lambda t, u, args: -u)),
    strategy=probode.FixedIntervalSmoother(),
    calibration=probode.LeaveOneOutCalibration(),
)
report = probode.calibration_report(
    decay, lambda t: jnp.exp(-t)[:, None], u0=jnp.ones(1), t0=0.0, t1=5.0, tolerances=(1e-3, 1e-5, 1e-7)
)
assert (report.coverage[:, 1] > 0.9).all()  # within two standard deviations

# %% [markdown]
# Solves can be differentiated, in reverse and in forward mode, and batched with `vmap`. The derivative of an adaptive
# solve is that of its accepted steps, whose lengths are chosen for the accuracy of the value alone: from an
# equilibrium, where nothing moves, they are too long for an accurate derivative with respect to `u0`. For an uncertain
# `u0` (below) steps are chosen for this derivative as well.


# %%
def final_prey(birth):
    prey, _ = solver.solve((20.0, 20.0), 0.0, 10.0, args=(birth, *rates[1:])).mean
    return prey[-1]


slope = jax.grad(final_prey)(0.5)
lanes = jax.vmap(final_prey)(jnp.array([0.4, 0.5, 0.6]))

# %% [markdown]
# `solve_ensemble` makes many solves in one call, over the cores and devices of a `jax.sharding.Mesh` if there is one. A
# solve that fails does not affect the others, and fast ones do not wait for slow ones:

# %%
u0s = (jnp.linspace(10.0, 30.0, 50), 20.0)
solutions = probode.solve_ensemble(solver, u0s, 0.0, 10.0, args=rates, in_axes=((0, None), None, None, None))
assert solutions.mean[0].shape == (50, 1)
assert (solutions.result == probode.Result.successful).all()

# %% [markdown]
# An equation of higher order, `u'' = f(t, u, u', args)`, is solved from the tuple `(u, u')`, without a transformation
# to first order. Time may run backwards.


# %%
def pendulum(t, u, du, args):
    return -jnp.sin(u)


swing = probode.Solver(probode.IWP(5), probode.TS1(probode.ODE(pendulum, order=2)))
angle = swing.solve((1.0, 0.0), 0.0, -3.0, save_at=[-1.0, -2.0, -3.0]).mean

# %% [markdown]
# A `Residual` is an implicit or differential-algebraic equation, or an invariant, and a `Stack` has several equations.
# The solver finds consistent derivatives at the start. Algebraic equations and invariants then hold at every step, to
# round-off if they are linear:


# %%
def epidemic(t, u, du, args):
    susceptible, infected, recovered = u
    infections = 0.3 * susceptible * infected / 1000
    return du[0] + infections, du[1] - infections + 0.1 * infected, susceptible + infected + recovered - 1000


dae = probode.Solver(probode.IWP(4), probode.TS1(probode.Residual(epidemic)))
population = dae.solve(jnp.array([998.0, 1.0, 1.0]), 0.0, 60.0).mean.sum()
assert abs(population - 1000) < 1e-2

oscillator = probode.ODE(lambda t, u, args: jnp.stack([u[1], -u[0]]))
energy = probode.Residual(lambda t, u, args: u @ u - 1, order=0)
stack = probode.Stack(probode.TS1(oscillator), probode.TS1(energy))
kept = probode.Solver(probode.IWP(3), stack).solve(jnp.array([1.0, 0.0]), 0.0, 60.0).mean[0]
assert abs(kept @ kept - 1) < 1e-4

# %% [markdown]
# Other priors, linearisations and initialisations can be combined with the remaining parts:

# %%
ode = probode.ODE(lambda t, u, args: jnp.stack([-50.0 * (u[0] - jnp.cos(t)), u[0] * u[1]]))
stiff_part = jnp.array([[-50.0, 0.0], [0.0, 0.0]])
given = probode.ODE(ode.vector_field, jacobian=lambda t, u, args: jnp.array([[-50.0, 0.0], [u[1], u[0]]]))
for constraint, prior, parts in (
    (probode.TS1(ode), probode.IOUP(3, rate=stiff_part), {}),  # contains the stiff linear part exactly
    (probode.TS1(ode), probode.RosenbrockIOUP(3), {}),  # takes it from the Jacobian, step by step
    (probode.TS1(ode), probode.RelativeScale(probode.IWP(3)), {}),  # noise in proportion to the size of each component
    (probode.TS1(ode), probode.Matern(3, length_scale=1.0), {}),
    (probode.TS1(ode), probode.LinearSDE(2, (0.0, stiff_part, -1.0)), {}),  # any linear drift: factors of u, u', u''
    (probode.TS1(ode), probode.IWP(3, output_scale=jnp.array([[1.0, 0.5], [0.0, 1.0]])), {}),  # correlated noise
    (probode.TS1(given), probode.IWP(3), {}),  # a Jacobian of your own; also BandedJacobian, SparseJacobian
    (probode.TS1(ode, evaluations=3, relinearise=True), probode.IWP(3), {}),  # iterated: Gauss-Newton in every step
    (probode.SLR1(ode, cubature=probode.UnscentedTransform()), probode.IWP(3), {}),  # statistical linear regression
    (probode.TS1(ode.lifted(1)), probode.IWP(4), {}),  # the equation and its time derivative
    (probode.Noisy(probode.TS1(ode), 1e-3), probode.IWP(3), {}),  # an equation that holds up to noise
    (probode.TS1(ode), probode.IWP(4), {"initialisation": probode.Diffuse(1, scale=100.0)}),  # unknown derivatives
):
    assert probode.Solver(prior, constraint, **parts).solve(jnp.array([0.0, 1.0]), 0.0, 1.0).mean.shape == (1, 2)

# %% [markdown]
# The uncertainty of an initial value is pushed forward along the solution, to first order, which is exact for linear
# equations. Steps are short enough for all directions in which the initial value is uncertain, also where the mean is
# at rest. The solve can be resumed from `.state`:

# %%
u0 = probode.Normal((20.0, 20.0), (1.0, 0.5))  # mean and standard deviations, or the root of a covariance
uncertain = solver.solve(u0, 0.0, 10.0, args=rates)
print(uncertain.std)
later = solver.solve(uncertain.state, 10.0, 12.0, args=rates)
moves = uncertain.spread.means  # derivatives along the rows of the root: for the identity, the Jacobian

# %% [markdown]
# ## Learning from data

# %% [markdown]
# A solve can be conditioned on noisy observations of any function of the state, in the same pass as on the equation.
# The posterior is that given both, with every strategy. An unknown parameter is a component of the state that does not
# change with time; its prior is an uncertain initial value:


# %%
def growth(t, u, args):
    return {"size": u["rate"] * u["size"] * (1 - u["size"]), "rate": 0.0 * u["rate"]}


ts = jnp.linspace(0.5, 5.0, 10)
values = 1 / (1 + 9 * jnp.exp(-1.3 * ts)) + 0.02 * jax.random.normal(jax.random.key(0), (10,))
data = probode.Observations(ts, values, noise=0.02, observe=lambda t, u, args: u["size"])
learner = probode.Solver(
    probode.IWP(3),
    probode.TS1(probode.ODE(growth)),
    strategy=probode.FixedIntervalSmoother(),
    calibration=probode.NoCalibration(),  # a scale found from the equation alone would be too sure of the parameters
)
start = learner.initialise(probode.Normal({"size": 0.1, "rate": 1.0}, {"size": 1e-6, "rate": 0.5}), 0.0)
posterior = learner.solve(start, 0.0, 5.0, data=data)
assert abs(posterior.mean["rate"][-1] - 1.3) < 0.1 and posterior.std["rate"][-1] < 0.1

# %% [markdown]
# For counts, binary outcomes and data with outliers, pass the log density of each number in place of `noise`. The
# posterior is then the normal approximation about its mode (Laplace's method):

# %%
counts = jnp.array([3.0, 1.0, 2.0, 4.0, 7.0, 5.0, 6.0, 9.0, 8.0, 9.0])
poisson = probode.Observations(
    ts, counts, observe=lambda t, u, args: 10 * u["size"], log_density=lambda n, mean, args: n * jnp.log(mean) - mean
)
assert learner.solve(start, 0.0, 5.0, data=poisson).std["rate"][-1] > posterior.std["rate"][-1]

# %% [markdown]
# One pass may be too inaccurate where equation or data are far from linear. Then
# `solve_grid_iterated(learner, start, grid, data=data)` linearises both along the trajectory of the pass before, until
# nothing changes. The result is the most probable trajectory given both.
#
# There are three likelihoods of parameters, with adaptive steps and differentiable: Fenrir (solve, then condition the
# posterior on the data), Dalton (equation and data in one filter), and filtering (predict each datum from those before
# it). Where a solve fails they are minus infinity. `DiffusionTempering` begins with a large output scale, where the
# likelihood is smooth in the parameters, and reduces it stage by stage:


# %%
@eqx.filter_jit  # solvers are PyTrees: one compilation serves all stages
def value_and_slope(solver, birth):
    def log_likelihood(birth):
        args = (birth, *rates[1:])
        return probode.fenrir_log_likelihood(solver, (20.0, 20.0), 0.0, 10.0, data, args=args)

    return jax.value_and_grad(log_likelihood)(birth)


seen = (jnp.array([14.0, 3.0, 7.0]), jnp.array([28.0, 12.0, 3.0]))
data = probode.Observations([2.0, 6.0, 10.0], seen, noise=1.0)
for stage in probode.DiffusionTempering(largest=1e3, stages=2).solvers(solver):
    print(value_and_slope(stage, 0.45))  # an optimiser goes from stage to stage

# %% [markdown]
# ## A part of your own

# %% [markdown]
# A part of your own is a subclass of an abstract class. This constraint computes the Jacobian by finite differences:


# %%
class FiniteDifferences(probode.AbstractConstraint):
    problem: probode.ODE
    step: float = 1e-6

    def linearise(self, t, predicted, layout, args):
        field = probode.flat_field(self.problem, layout, args)  # on flat vectors: (order, d) to (d,)
        u, du = layout.unpack(predicted.mean)[:2]
        shifted = jax.vmap(lambda e: field(t, (u + self.step * e)[None]) - field(t, u[None]))
        jacobian = shifted(jnp.eye(u.size)).T / self.step
        return probode.Linearisation.explicit(layout, [jacobian], du - field(t, u[None]))


own = probode.Solver(probode.IWP(4), FiniteDifferences(probode.ODE(lotka_volterra)))
assert jnp.allclose(own.solve((20.0, 20.0), 0.0, 1.0, args=rates).mean[0], at_times.mean[0][10], rtol=1e-2)

# %% [markdown]
# `probode.testing` checks the laws that every part of a kind must satisfy, for thirteen kinds and for whole solvers.
# The error names the law that a part does not satisfy. There are also hypothesis strategies for priors, grids, solvers
# and equations with known solutions:


# %%
class OnePoint(probode.AbstractCubature):
    def rule(self, dim):
        return jnp.zeros((1, dim)), jnp.ones(1)


probode.testing.check_cubature(probode.GaussHermite(3))
try:
    probode.testing.check_cubature(OnePoint())
except probode.testing.LawBroken as error:
    print(error)  # OnePoint: the covariance is the identity. Found: ...
