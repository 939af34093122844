# %% [markdown]
# # Coming from another library
#
# The table translates between libraries. Below, the same problem is solved with probode, and with SciPy and diffrax
# where they are installed.
#
# | SciPy | diffrax | probdiffeq | ProbNumDiffEq.jl | probode |
# |---|---|---|---|---|
# | `solve_ivp(f, (t0, t1), y0)` | `diffeqsolve(ODETerm(f), solver, t0, t1, dt0, y0)` | `solve_adaptive_save_at(...)` | `solve(ODEProblem(f, y0, tspan), EK1())` | `solve_ivp(f, (t0, t1), u0)`, `Solver(...).solve(u0, t0, t1)` |
# | `f(t, y)` | `f(t, y, args)` | `f(u, *, t)` | `f(du, u, p, t)` | `f(t, u, args)` |
# | `method="RK45"` | `Tsit5()` | `constraint_ode_ts0` | `EK0(order=4)` | `TS0(ode, evaluations=2)`, `IWP(4)` |
# | `method="DOP853"` | `Dopri8()` | | | `TS0(ode.lifted(4), evaluations=3)`, `IWP(5)`, `BlockDiagonal()` |
# | `method="Radau"` | `Kvaerno5()` | `constraint_ode_ts1` | `EK1(order=4)` | `TS1(ode)`, `IWP(4)` |
# | `rtol, atol` | `PIDController(rtol, atol)` | `rtol, atol` | `reltol, abstol` | `IntegralController(rtol, atol)`, `PIController` |
# | `t_eval` | `SaveAt(ts=ts)` | `save_at` | `saveat` | `save_at=ts` |
# | `dense_output=True` | `SaveAt(dense=True)` | `offgrid_marginals` | `sol(t)` | `FixedIntervalSmoother()`, `solution.evaluate(t)` |
# | | `max_steps` | | `maxiters` | `BoundedLoop(max_steps=...)` |
# | `sol.status` | `sol.result` | | `sol.retcode` | `solution.result` |
# | | `RecursiveCheckpointAdjoint()` | `while_loop=...` | | `CheckpointedLoop()` |
# | | | `solver_mle`, `solver_dynamic` | `FixedDiffusion`, `DynamicDiffusion` | `MLECalibration()`, `DynamicCalibration()` |
# | | | | `ManifoldUpdate(f)` | `Stack(TS1(ode), TS1(Residual(f, order=0)))` |

# %%
import importlib.util

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import probode


jax.config.update("jax_enable_x64", True)


def lotka_volterra(t, u, args):
    prey, predators = u
    return jnp.stack([0.5 * prey - 0.05 * prey * predators, -0.5 * predators + 0.05 * prey * predators])


u0, t1, ts = jnp.array([20.0, 20.0]), 20.0, np.linspace(0.0, 20.0, 5)
answers = {}

# %% [markdown]
# ## probode

# %%
solution = probode.solve_ivp(lotka_volterra, (0.0, t1), u0, t_eval=ts, rtol=1e-6, atol=1e-6)
answers["probode"] = solution.mean
print(solution.mean[-1], "+-", solution.std[-1])

# %% [markdown]
# ## SciPy

# %%
if importlib.util.find_spec("scipy"):
    from scipy.integrate import solve_ivp

    field = jax.jit(lotka_volterra)
    scipy = solve_ivp(lambda t, u: np.asarray(field(t, u, None)), (0.0, t1), u0, t_eval=ts, rtol=1e-6, atol=1e-6)
    answers["SciPy"] = scipy.y.T

# %% [markdown]
# ## diffrax

# %%
if importlib.util.find_spec("diffrax"):
    import diffrax

    answers["diffrax"] = diffrax.diffeqsolve(
        diffrax.ODETerm(lotka_volterra),
        diffrax.Tsit5(),
        0.0,
        t1,
        0.1,
        u0,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
    ).ys

# %% [markdown]
# The answers agree to the tolerance. Only probode also reports a standard deviation.

# %%
ax = plt.figure(layout="constrained").add_subplot()
for name, answer in answers.items():
    gap = np.max(np.abs(np.asarray(answer) - np.asarray(answers["probode"])), axis=1)
    if name != "probode":
        ax.semilogy(ts, gap, ".-", label=f"distance of {name} from probode")
ax.semilogy(ts, np.max(np.asarray(solution.std), axis=1), "k--", label="standard deviation of probode")
ax.set_xlabel("time")
ax.legend(frameon=False)

# %%
for name, answer in answers.items():
    print(f"{name:8s}", np.array2string(np.asarray(answer)[-1], precision=5))
    assert np.allclose(answer, answers["probode"], rtol=1e-3)
