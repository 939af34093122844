"""Numbers that are none: a solve that is called successful has none of them, in nothing that it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import first_of, left_to_nox, lotka_volterra, name


def square_root(t, u, args):
    return -2 * jnp.sqrt(args * u)  # u = (1 - sqrt(a) t)^2, which touches the border of the field's domain


def parts(solver):
    return (
        f"{name(solver.constraint)}, {name(solver.factorisation)}, {name(solver.strategy)}, {name(solver.calibration)}"
    )


def assert_no_nan(solution, key=jax.random.key(0)):
    """Every number that a solution returns is a real one."""
    told = [solution.t, solution.marginals, solution.output_scale, solution.log_likelihood, solution.state.current]
    told += [(d.mean, d.std) for d in map(solution.derivative, range(solution.layout.num_derivatives + 1))]
    if solution.is_dense:
        ts = jnp.concatenate([jnp.linspace(solution.t[0], solution.t[-1], 30), (solution.t[1:] + solution.t[:-1]) / 2])
        between = solution.evaluate(ts)
        told += [(d.mean, d.std) for d in map(between.derivative, range(solution.layout.num_derivatives + 1))]
    if solution.is_smoothed:
        told.append(solution.sample(key, (3,)))
    for leaf in jax.tree.leaves(told):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    "strategy", first_of(po.Filter(), po.FixedPointSmoother(), po.FixedIntervalSmoother()), ids=name
)
@pytest.mark.parametrize("left", [1e-6, 0.0])
@pytest.mark.parametrize(
    "constraint",
    [
        po.TS0(po.ODE(square_root), evaluations=2),
        *left_to_nox(
            po.TS1(po.ODE(square_root), evaluations=2),
            po.TS0(po.ODE(square_root), evaluations=4),
            po.TS1(po.ODE(square_root), evaluations=2, relinearise=True),
            po.TS1(po.ODE(square_root), evaluations=4, relinearise=True),
        ),
    ],
    ids=lambda c: f"{name(c)}{c.evaluations}",
)
def test_a_further_evaluation_outside_the_domain(constraint, left, strategy):
    # The prediction lies in the domain of the field, the mean that it is corrected to does not.
    end = (1 - left) / np.sqrt(2)
    solver = po.Solver(po.IWP(4), constraint, strategy=strategy)
    solution = solver.solve(jnp.ones(1), 0.0, end, args=2.0, throw=False, save_at=po.SaveAt(ts=[end / 2], t1=True))
    assert solution.result in (po.Result.successful, po.Result.nonfinite)
    assert np.all(np.isfinite(solution.mean)) and np.all(np.isfinite(solution.std))
    np.testing.assert_allclose(solution.mean[0], 0.25, rtol=1e-3)
    np.testing.assert_allclose(solution.mean[1], 0, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("constraint", [po.TS0, *left_to_nox(po.TS1)], ids=name)
@pytest.mark.parametrize("mode", [jax.jacrev, *left_to_nox(jax.jacfwd)], ids=lambda mode: mode.__name__)
def test_the_derivative_of_a_step_that_was_spoilt(constraint, mode):
    # In lanes both branches run, and zero times what is not a number is none.
    end, a = (1 - 1e-6) / np.sqrt(2), jnp.array([1.0, 2.0])
    solver = po.Solver(po.IWP(4), constraint(po.ODE(square_root), evaluations=2), loop=po.BoundedLoop(64))

    def at_end(a):
        return solver.solve(jnp.ones(1), 0.0, end, args=a, throw=False).mean[0, 0]

    # The second lane is spoilt on its way to the singularity, where its slope is about as large as a step is short.
    slopes = jax.vmap(mode(at_end))(a)
    np.testing.assert_allclose(slopes, -end / np.sqrt(a) * (1 - np.sqrt(a) * end), rtol=1e-3, atol=0.1)
    np.testing.assert_allclose(slopes[0], -end * (1 - end), rtol=1e-3)
    np.testing.assert_allclose(slopes, [mode(at_end)(x) for x in a], rtol=1e-3)


@pytest.mark.parametrize(
    "strategy", first_of(po.FixedPointSmoother(), po.Filter(), po.FixedIntervalSmoother()), ids=name
)
@pytest.mark.parametrize("unit", first_of(1e-9, 1e-3))
def test_single_precision(strategy, unit):
    # In nanoseconds the scale of the fourth derivative leaves the range of float32.
    unit = jnp.float32(unit)
    flame = po.ODE(lambda t, u, unit: (u**2 - u**3) / unit)
    solver = po.Solver(po.IWP(4), po.TS1(flame), strategy=strategy)
    ts = jnp.linspace(0.05, 1, 20, dtype=jnp.float32) * 40 * unit
    solution = solver.solve(jnp.array([0.05], jnp.float32), 0.0, ts[-1], args=unit, save_at=ts, throw=False)
    assert solution.result == (po.Result.nonfinite if unit < 1e-6 else po.Result.successful)
    assert np.all(np.isfinite(solution.state.current.distribution.mean))
    reached = np.asarray(ts <= solution.state.t)
    assert np.all(np.isfinite(solution.mean[reached])) and np.all(np.isfinite(solution.std[reached]))
    if unit > 1e-6:
        np.testing.assert_allclose(solution.mean[-1], 1, rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("nu", [3, *left_to_nox(4)])
def test_an_innovation_without_variance_when_leaving_one_out(nu):
    # A component that has decayed, and one whose equation has nothing to say before its kink.
    kwargs = dict(factorisation=po.BlockDiagonal(), controller=po.IntegralController(1e-8, 1e-10))
    kwargs |= dict(strategy=po.FixedIntervalSmoother(), calibration=po.LeaveOneOutCalibration())
    decay = po.Solver(po.IWP(nu), po.TS1(po.ODE(lambda t, u, a: -a * u)), **kwargs)
    ts, a = jnp.array([0.001, 0.5, 1.0]), jnp.array([1.0, 400.0])
    solution = decay.solve(jnp.ones(2), 0.0, 1.0, args=a, save_at=ts)
    np.testing.assert_allclose(solution.mean, np.exp(-ts[:, None] * a), rtol=1e-6, atol=1e-12)
    assert_no_nan(solution)
    kinks = po.Solver(po.IWP(nu), po.TS1(po.ODE(lambda t, u, c: jnp.sign(c - t) + 0 * u)), **kwargs)
    solution = kinks.solve(jnp.zeros(2), 0.0, 1.0, args=jnp.array([0.3, 0.6]))
    np.testing.assert_allclose(solution.mean[-1], [-0.4, 0.2], atol=1e-6)
    assert_no_nan(solution)


class Nothing(po.AbstractCalibration):
    """Divides by the number of steps that it has been told of, which is none."""

    def init(self, shape, dtype):
        return jnp.zeros(shape, dtype)

    def scale(self, innovation, statistics):
        return innovation.unit

    def update(self, statistics, scale, whitened, informative):
        return statistics

    def finalise(self, statistics):
        return statistics / statistics


def test_a_calibration_that_ends_in_nothing():
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(lambda t, u, args: -u)), calibration=Nothing())
    assert solver.solve(1.0, 0.0, 1.0, throw=False).result == po.Result.nonfinite
    assert solver.solve_grid(1.0, np.linspace(0, 1, 5)).result == po.Result.nonfinite


CONFIGURATIONS = [
    po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)), strategy=po.FixedIntervalSmoother(), loop=po.ForwardLoop(256)),
    *left_to_nox(
        *[
            po.Solver(po.IWP(nu), constraint, factorisation=factorisation, strategy=strategy, calibration=calibration)
            for nu, constraint, factorisation, strategy, calibration in [
                (2, po.TS0(po.ODE(lotka_volterra)), po.Isotropic(), po.FixedIntervalSmoother(), po.MLECalibration()),
                (
                    5,
                    po.TS0(po.ODE(lotka_volterra), evaluations=2),
                    po.BlockDiagonal(),
                    po.FixedIntervalSmoother(),
                    po.LeaveOneOutCalibration(),
                ),
                (3, po.TS1(po.ODE(lotka_volterra)), po.Dense(), po.FixedPointSmoother(), po.NoCalibration()),
                (3, po.TS1(po.ODE(lotka_volterra)), po.Dense(), po.Filter(), po.DynamicCalibration(memory=0.5)),
            ]
        ]
    ),
]


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float64, *left_to_nox(jnp.float32)], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("solver", CONFIGURATIONS, ids=parts)
def test_everything_that_is_returned(solver, dtype):
    u0 = jnp.array([20.0, 20.0], dtype)
    for save_at in (po.SaveAt(t0=True, ts=[0.5, 1.5, 1.5], t1=True), po.SaveAt(t0=True, steps=True), None):
        solution = solver.solve(u0, 0.0, 2.0, save_at=save_at)
        assert solution.result == po.Result.successful
        assert_no_nan(solution)
        rest = solver.solve(jnp.array([10.0, 10.0], dtype), 0.0, 2.0, save_at=save_at)  # where nothing moves
        np.testing.assert_allclose(rest.mean, 10, rtol=1e-6)
        assert_no_nan(rest)
    assert_no_nan(solver.solve_grid(u0, np.linspace(0, 2, 9)))


# --- numbers whose squares are none ---


@pytest.mark.parametrize("dtype", first_of(jnp.float32, jnp.float64), ids=["float32", "float64"])
@pytest.mark.parametrize("factorisation", first_of(po.Dense(), po.BlockDiagonal(), po.Isotropic()), ids=name)
def test_units_in_which_squares_underflow(factorisation, dtype):
    # Errors that squares cannot show were zero: the step was the whole interval and the standard deviation zero.
    ode = po.ODE(lambda t, u, args: jnp.stack([u[1], -u[0]]))
    rtol = 1e-6 if dtype == jnp.float64 else 1e-4
    controller = po.IntegralController(rtol, 0.0)
    parts = dict(factorisation=factorisation, controller=controller, loop=po.BoundedLoop(512))
    solver = po.Solver(po.IWP(4), po.TS1(ode), **parts)
    in_range = (1.0, 1e-100, 1e-138, 1e140) if dtype == jnp.float64 else (1.0, 1e-20, 1e-28, 1e20)
    out_of_range = (1e-150, 1e-160, 1e-200, 1e-300) if dtype == jnp.float64 else (1e-32, 1e-33, 1e-36)
    for size in in_range:
        solution = solver.solve(jnp.array([size, 0.0], dtype), 0.0, 1.0)
        np.testing.assert_allclose(solution.mean[0] / size, [np.cos(1), -np.sin(1)], rtol=10 * rtol)
        assert np.all(solution.std > 0)
    for size in out_of_range:
        solution = solver.solve(jnp.array([size, 0.0], dtype), 0.0, 1.0, throw=False)
        assert solution.result == po.Result.tolerance_out_of_range
    huge = solver.solve(jnp.array([1e160 if dtype == jnp.float64 else 3e37, 0.0], dtype), 0.0, 1.0, throw=False)
    if huge.result == po.Result.successful:
        np.testing.assert_allclose(huge.mean[0] / huge.mean[0, 0], [1, -np.tan(1)], rtol=10 * rtol)
        assert np.all(np.isfinite(huge.std)) and np.all(huge.std > 0)
    assert np.all(np.isfinite(huge.mean))


def test_squares_underflow_on_a_grid():
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: -u)))
    grid = np.linspace(0, 1, 21)
    assert solver.solve_grid(jnp.array([1e-200]), grid).result == po.Result.tolerance_out_of_range
    small = solver.solve_grid(jnp.array([1e-130, 0.0]), grid)
    assert small.result == po.Result.successful
    np.testing.assert_allclose(small.mean[-1] / 1e-130, [np.exp(-1), 0], rtol=1e-4)


@pytest.mark.thorough
def test_a_component_that_decays_out_of_range():
    # exp(-400) = 2e-174 under a relative tolerance alone; an absolute one says that zero will do.
    ode = po.ODE(lambda t, u, args: -args * u)
    rates = jnp.array([1.0, 400.0])
    controllers = po.IntegralController(1e-6, 0.0), po.IntegralController(1e-6, 1e-9)
    strict, loose = (po.Solver(po.IWP(3), po.TS1(ode), controller=c, loop=po.ForwardLoop(10**5)) for c in controllers)
    assert strict.solve(jnp.ones(2), 0.0, 1.0, args=rates, throw=False).result != po.Result.successful
    np.testing.assert_allclose(loose.solve(jnp.ones(2), 0.0, 1.0, args=rates).mean[0], np.exp(-rates), atol=1e-8)
