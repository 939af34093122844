"""JAX's strict modes, in which arrays of different ranks, or of different dtypes, cannot be combined."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .helpers import FACTORISATIONS, left_to_nox


U0, RATE, TIMES = np.array([1.0, 0.5]), 2.0, np.array([0.5, 1.0])


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def field(t, u, args):
    return -args * u * (1.0 + 0.1 * jnp.sin(t)) + 0.1 * u[::-1]


def oscillator(t, u, du, args):
    return -args * u - 0.1 * du


def powers(t, u, args):
    return (
        jnp.maximum(u, 0.1) ** args - jnp.clip(u, -1.0, 1.0) / (1.0 + u**1.5) + 2.0**u - jnp.abs(jnp.max(u) * u) % 0.3
    )


def ode():
    return po.ODE(field)


def everything(solution):
    values = [solution.mean, solution.std, solution.derivative(1).std, solution.output_scale, solution.log_likelihood]
    if solution.is_dense:
        values += [solution.evaluate(0.3).std, solution.evaluate(TIMES).derivative(1).mean]
        if solution.is_smoothed:
            values.append(solution.sample(jax.random.key(0), (2,), ts=TIMES))
    return values


def trace(u0=U0, *, constraint=po.TS1, nu=3, save_at=None, t1=1.0, data=None, reverse=False, **parts):
    """The solve with all that is read off its solution, as a program that is not run: promotions happen in Python."""
    prior = parts.pop("prior", None)
    constraint = constraint(ode()) if constraint in (po.TS0, po.TS1) else constraint()
    solver = po.Solver(prior() if prior else po.IWP(nu), constraint, loop=po.BoundedLoop(16), **parts)

    def values(args):
        return everything(solver.solve(u0, 0.0, t1, args=args, save_at=save_at, data=data, throw=False))

    def total(args):
        return sum(jnp.sum(x) for x in jax.tree.leaves(values(args)))

    jax.eval_shape(jax.grad(total) if reverse else values, RATE)


@pytest.mark.thorough
def test_values_are_what_they_are_without():
    solver = po.Solver(po.IWP(2), po.TS1(ode()), strategy=po.FixedPointSmoother(), loop=po.ForwardLoop(64))

    def values():
        solution = solver.solve(U0, 0.0, 1.0, args=RATE, save_at=TIMES)
        return solution.mean, solution.std

    got = values()
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = values()
    jax.tree.map(np.testing.assert_array_equal, got, expected)


STRATEGIES = {
    "filter": {"save_at": po.SaveAt(ts=TIMES, t0=True)},
    "dense": {"strategy": po.FixedIntervalSmoother(), "save_at": po.SaveAt(dense=True)},
    "fixed point": {"strategy": po.FixedPointSmoother(), "save_at": TIMES},
}
CASES = [
    (f"{type(f).__name__}, {c.__name__}, {name}", {"factorisation": f, "constraint": c} | kwargs)
    for f, c, (name, kwargs) in itertools.product(FACTORISATIONS, (po.TS0, po.TS1), STRATEGIES.items())
]
CALIBRATIONS = (po.NoCalibration(), po.MLECalibration(), po.LeaveOneOutCalibration())
SMOOTH = STRATEGIES["dense"]
CASES += [
    (f"{type(f).__name__}, {type(c).__name__}", {"factorisation": f, "calibration": c} | SMOOTH)
    for f, c in itertools.product(FACTORISATIONS, CALIBRATIONS)
]
CASES += [
    (f"{type(f).__name__}, {name}", {"factorisation": f, "constraint": po.TS1} | kwargs)
    for f, (name, kwargs) in itertools.product((po.Blocks(1), po.Modal()), STRATEGIES.items())
]
CASES += [
    (f"{type(f).__name__}, {name}", {"factorisation": f} | kwargs)
    for f in FACTORISATIONS
    for name, kwargs in {
        "lifted TS0": {"constraint": lambda: po.TS0(ode().lifted(2)), "nu": 5},
        "lifted TS1": {"constraint": lambda: po.TS1(ode().lifted(2)), "nu": 5} | SMOOTH,
        "evaluations": {"constraint": lambda: po.TS1(ode(), evaluations=2, relinearise=True)},
        "SLR1": {"constraint": lambda: po.SLR1(ode())},
        "second order": {"constraint": lambda: po.TS1(po.ODE(oscillator, order=2)), "u0": (U0, U0)},
        "powers": {"constraint": lambda: po.TS1(po.ODE(powers))},
        "Diffuse": {"initialisation": po.Diffuse(1)},
        "stops": {"controller": po.IntegralController(stop_at=[0.3])} | SMOOTH,
        "PI, state error": {"controller": po.PIController(), "error": po.StateError()},
        "Matern": {"prior": lambda: po.Matern(3, 1.0)} | SMOOTH,
        "IOUP": {"prior": lambda: po.IOUP(3, -1.0)},
        "LinearSDE": {"prior": lambda: po.LinearSDE(1, (-1.0, -0.1))},
        "RosenbrockIOUP": {"prior": lambda: po.RosenbrockIOUP(3)},
        "float32": {"u0": U0.astype(np.float32), "save_at": TIMES, "strategy": po.FixedPointSmoother()},
        "gradients": {"reverse": True} | SMOOTH,
    }.items()
]
CASES += [
    (name, kwargs)
    for name, kwargs in {
        "RelativeScale": {"prior": lambda: po.RelativeScale(po.IWP(3))},
        "rate as a matrix": {"prior": lambda: po.IOUP(2, np.array([[-1.0, 0.5], [0.0, -2.0]]))},
        "a rate for each": {"prior": lambda: po.IOUP(3, np.array([-1.0, -2.0])), "factorisation": po.BlockDiagonal()},
        "residual": {"constraint": lambda: po.TS1(po.Residual(lambda t, u, du, a: du - field(t, u, a)))},
        "stack": {
            "constraint": lambda: po.Stack(
                po.TS1(ode()), po.Noisy(po.TS1(po.Residual(lambda t, u, du, a: jnp.sum(u * du)[None] + a)), 0.1)
            )
        },
        "Jacobians": {"constraint": lambda: po.TS1(po.ODE(field, jacobian=po.BandedJacobian(1, 1)))},
        "Hutchinson": {
            "constraint": lambda: po.TS1(po.ODE(field, jacobian=po.HutchinsonDiagonal(jax.random.key(0)))),
            "factorisation": po.BlockDiagonal(),
        },
        "uncertain": {"u0": po.Normal(U0, np.array([0.1, 0.2])), "save_at": TIMES},
        "backwards": {"t1": -1.0},
    }.items()
]
IN_EVERY_RUN = (
    "Dense, TS1, dense", "BlockDiagonal, TS0, fixed point", "Isotropic, TS1, filter", "BlockDiagonal, MLECalibration",
    "Dense, stops", "Dense, powers", "Dense, float32", "stack",
)  # fmt: skip


@pytest.mark.parametrize(
    "kwargs", [pytest.param(k, id=n, marks=() if n in IN_EVERY_RUN else pytest.mark.thorough) for n, k in CASES]
)
def test_every_configuration(kwargs):
    trace(**kwargs)


@pytest.mark.parametrize(("d", "nu"), left_to_nox((1, 2), (7, 3), (26, 2), (100, 1)))
def test_every_size(d, nu):
    """The eliminations of small, middle and large matrices are others."""
    solver = po.Solver(po.IWP(nu), po.TS1(po.ODE(lambda t, u, args: -u)), strategy=po.FixedIntervalSmoother())
    jax.eval_shape(lambda u: everything(solver.solve(u, 0.0, 1.0, save_at=TIMES, throw=False)), jnp.ones(d))


@pytest.mark.thorough
def test_data_and_likelihoods():
    data = po.Observations(TIMES, np.array([[0.9, 0.5], [0.6, 0.3]]), 0.1)
    counts = po.Observations(TIMES, np.array([[3.0], [5.0]]), observe=lambda t, u, a: u[:1],
                             log_density=lambda n, u, a: n * jnp.log(u) - u)  # fmt: skip
    solver = po.Solver(po.IWP(3), po.TS1(ode()), calibration=po.NoCalibration(), loop=po.BoundedLoop(16))
    for likelihood in (po.fenrir_log_likelihood, po.dalton_log_likelihood, po.filtering_log_likelihood):
        for seen in (data, counts):
            jax.eval_shape(jax.grad(lambda a: likelihood(solver, U0, 0.0, 1.0, seen, args=a)), RATE)  # noqa: B023
    smoother = po.Solver(po.IWP(3), po.TS1(ode()), calibration=po.NoCalibration(), strategy=po.FixedIntervalSmoother())
    grid = np.linspace(0.0, 1.0, 5)
    jax.eval_shape(lambda a: everything(po.solve_grid_iterated(smoother, U0, grid, args=a, data=data)), RATE)
    state = smoother.initialise(po.Normal(U0, np.array([0.1, 0.2])), 0.0, args=RATE)
    jax.eval_shape(lambda a: everything(smoother.solve_grid(state, grid, args=a)), RATE)


@pytest.mark.thorough
def test_priors_alone_a_subspace_and_an_ensemble():
    for factorisation in FACTORISATIONS:
        po.sample_prior(po.IWP(2), jax.random.key(0), TIMES, U0, factorisation=factorisation, shape=(2,))
        assert po.prior_marginals(po.Matern(2, 1.0), TIMES, U0, factorisation=factorisation).std.shape == (2, 2)
    ring = po.ODE(lambda t, u, args: jnp.roll(u, 1) - 2.0 * u + jnp.roll(u, -1))
    u0 = jnp.sin(jnp.arange(12.0))
    basis = po.rightmost_basis(ring, 0.0, u0, 3)
    solver = po.Solver(po.IWP(2), po.TS1(ring), factorisation=po.Subspace(basis), loop=po.BoundedLoop(16))
    jax.eval_shape(lambda u: solver.solve(u, 0.0, 1.0, throw=False).std, u0)
    solver = po.Solver(po.IWP(2), po.TS1(ode()), loop=po.BoundedLoop(16))
    jax.eval_shape(lambda u: po.solve_ensemble(solver, u, 0.0, 1.0, args=RATE).std, jnp.ones((3, 2)))
