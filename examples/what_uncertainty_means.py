# %% [markdown]
# # What the uncertainty means
#
# If the standard deviations that a solver reports are right, errors are about as large. This notebook shows how to
# check this against a reference solution, and how the result depends on the calibration and on what a step observes.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import probode


jax.config.update("jax_enable_x64", True)
SMALL = "PROBODE_SMALL" in os.environ


# %%
def fitzhugh_nagumo(t, u, args):
    v, w = u
    return jnp.stack([3.0 * (v - v**3 / 3 + w), -(v - 0.2 + 0.2 * w) / 3.0])


u0, t1 = jnp.array([-1.0, 1.0]), 10.0
ode = probode.ODE(fitzhugh_nagumo)
accurate = probode.Solver(
    probode.IWP(8),
    probode.TS1(ode),
    strategy=probode.FixedIntervalSmoother(),
    controller=probode.IntegralController(1e-11, 1e-11),
)
truth = accurate.solve(u0, 0.0, t1)


def reference(times):
    return truth.evaluate(times).mean


# %% [markdown]
# We compare two calibrations of the same solver. The default, `DynamicCalibration`, estimates the scale of the noise in
# every step from the residual of this step. It costs nothing, and its standard deviations are too large rather than too
# small. `LeaveOneOutCalibration` also compares every residual with its prediction from all others, and rescales all
# covariances at the end. It needs a solve that keeps its steps.

# %%
solvers = {
    type(calibration).__name__: probode.Solver(
        probode.IWP(3),
        probode.TS1(ode),
        strategy=probode.FixedIntervalSmoother(),
        calibration=calibration,
        controller=probode.IntegralController(1e-3, 1e-5),
    )
    for calibration in (probode.DynamicCalibration(), probode.LeaveOneOutCalibration())
}
figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for ax, (name, solver) in zip(axes, solvers.items(), strict=True):
    solution = solver.solve(u0, 0.0, t1, save_at=jnp.linspace(0.0, t1, 200))
    probode.plots.plot_errors(solution, reference, ax, labels=["v", "w"])
    ax.set_title(name)
plt.show()

# %% [markdown]
# Both are smoothers. A filter alone, which needs no second pass and no steps to be kept, has about the right
# uncertainty if every step observes all derivatives of the solution, as the notebook `observing_derivatives` explains.

# %%
solvers["filter, all derivatives"] = probode.Solver(
    probode.IWP(5),
    probode.TS0(ode.lifted(4), evaluations=3),
    factorisation=probode.BlockDiagonal(),
    controller=probode.IntegralController(1e-3, 1e-5),
)

# %% [markdown]
# `calibration_report` does this for several tolerances. `chi^2 / d` is the squared error over the reported variance: 1
# is right, much less means that standard deviations are too large, much more that they are too small. The shares of
# errors within one, two and three standard deviations (`std`) would be 68, 95 and 99.7 % for a perfect Gaussian.

# %%
tolerances = (1e-3, 1e-5) if SMALL else (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
reports = {}
for name, solver in solvers.items():
    print(name)
    reports[name] = probode.calibration_report(solver, reference, u0=u0, t0=0.0, t1=t1, tolerances=tolerances)

# %%
figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for name, report in reports.items():
    ratio = report.trajectory if name.startswith("filter") else report.smoothed
    ax.loglog(report.rtol, ratio, "o-", label=name)
ax.axhspan(0.1, 10, color="0.9", zorder=0)
ax.axhline(1, color="0.6", linewidth=1)
ax.invert_xaxis()
ax.set(xlabel="tolerance", ylabel="chi^2 / d along the trajectory", title="right is 1")
ax.legend(frameon=False)
plt.show()
