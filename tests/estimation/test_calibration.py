"""Calibrations: against theory, dense formulas, and each other."""

from math import factorial

import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.algebra.innovation import innovate
from probode.algebra.normal import push

from .. import oracles
from ..helpers import FACTORISATIONS, first_of, left_to_nox, lotka_volterra, name


DECAY = po.ODE(lambda t, u, args: -u)
TENTHS = np.linspace(0, 1, 11)
factorisations = pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)


def solve(ode, u0, grid, nu=2, constraint=po.TS1, scale=1.0, **parts):
    return po.Solver(po.IWP(nu, output_scale=scale), constraint(ode), **parts).solve_grid(u0, grid)


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
@pytest.mark.parametrize("sliver", [False, True], ids=["plain", "sliver"])
def test_maximum_likelihood_oracle(factorisation, sliver):
    grid = np.concatenate([TENTHS[:-1], [np.nextafter(1.0, 0)], TENTHS[-1:]]) if sliver else TENTHS
    calibrated = solve(DECAY, jnp.ones(1), grid, factorisation=factorisation, calibration=po.MLECalibration())
    plain = solve(DECAY, jnp.ones(1), grid, factorisation=factorisation, calibration=po.NoCalibration())
    np.testing.assert_allclose(calibrated.output_scale**2, 0.0428314233992825, rtol=1e-12)
    np.testing.assert_allclose(plain.std[-1] ** 2, 7.983526359079e-08, rtol=1e-11)
    np.testing.assert_array_equal(calibrated.mean, plain.mean)
    np.testing.assert_allclose(calibrated.std, plain.std * np.sqrt(0.0428314233992825), rtol=1e-12, atol=1e-20)


@pytest.mark.parametrize(
    "strategy", first_of(po.FixedIntervalSmoother(), po.Filter(), po.FixedPointSmoother()), ids=name
)
@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_evidence_is_that_of_the_reported_covariances(factorisation, strategy):
    # Solving with the calibrated scale as the prior's own must give the same posterior and the same evidence.
    u0, parts = jnp.array([20.0, 18.0]), {"factorisation": factorisation, "strategy": strategy}
    ode = po.ODE(lotka_volterra)
    calibrated = solve(ode, u0, TENTHS, calibration=po.MLECalibration(), **parts)
    scale = calibrated.output_scale[0]
    again = solve(ode, u0, TENTHS, scale=scale, calibration=po.NoCalibration(), **parts)
    np.testing.assert_allclose(again.std, calibrated.std, rtol=1e-9)
    np.testing.assert_allclose(again.mean, calibrated.mean, rtol=1e-12)
    np.testing.assert_allclose(again.log_likelihood, calibrated.log_likelihood, rtol=1e-11)
    # the maximum of the likelihood over the scale
    for factor in (0.99, 1.01):
        other = solve(ode, u0, TENTHS, scale=factor * scale, calibration=po.NoCalibration(), **parts)
        assert other.log_likelihood < calibrated.log_likelihood


def test_block_diagonal_calibrates_each_component():
    def two(t, u, args):
        return jnp.stack([-u[0], -3 * u[1]])

    both = solve(po.ODE(two), jnp.ones(2), TENTHS, factorisation=po.BlockDiagonal(), calibration=po.MLECalibration())
    for i, rate in enumerate((1.0, 3.0)):
        one = solve(po.ODE(lambda t, u, args, r=rate: -r * u), jnp.ones(1), TENTHS, calibration=po.MLECalibration())
        np.testing.assert_allclose(both.output_scale[:, i], one.output_scale, rtol=1e-11)
        np.testing.assert_allclose(both.std[:, i], one.std[:, 0], rtol=1e-10)


def joint(solution):
    """Mean and covariance of all residuals of a linear scalar equation u' = -u under the prior of a solve."""
    n, scales = solution.layout.num_derivatives + 1, np.asarray(solution.output_scale[1:])
    moves = [oracles.iwp_transition(n - 1, dt) for dt in np.diff(solution.t)]
    moves = [(a, scale**2 * q) for (a, q), scale in zip(moves, scales, strict=True)]
    mean, covariance = oracles.joint_gaussian(np.asarray(solution.marginals.mean[0, :, 0]), np.zeros((n, n)), moves)
    h = np.kron(np.eye(len(moves) + 1)[1:], np.arange(n) < 2)
    return h @ mean, h @ covariance @ h.T


@pytest.mark.parametrize("dynamic", first_of(True, False))
def test_left_out_residuals_are_those_of_the_dense_formula(dynamic):
    grid = np.array([0.0, 0.3, 0.5, 0.6, 1.0, 1.5])
    calibration = po.DynamicCalibration() if dynamic else po.NoCalibration()
    solution = solve(DECAY, jnp.ones(1), grid, nu=3, calibration=calibration)
    z, s = joint(solution)
    expected = []
    for i in range(z.size):
        others = [j for j in range(z.size) if j != i]
        residuals, covariance = oracles.condition(z, s, np.eye(z.size)[others], z[others])
        expected.append(residuals[i] ** 2 / covariance[i, i])
    # residuals from the past alone: whitened by the Cholesky factor
    r2 = np.mean(np.linalg.solve(np.linalg.cholesky(s), z) ** 2)

    class Probe(po.AbstractLeaveOneOut):
        def init(self, shape, dtype):
            return None

        def scale(self, innovation, statistics):
            return innovation.scale if dynamic else innovation.unit

        def update(self, statistics, scale, whitened, informative):
            return None

        def leave_one_out(self, statistics, squares, weights):
            assert squares.shape == weights.shape == grid.shape
            return squares[3]

        def finalise(self, statistics):
            return jnp.sqrt(statistics)

    third = solve(DECAY, jnp.ones(1), grid, nu=3, calibration=Probe())
    np.testing.assert_allclose((third.std[-1] / solution.std[-1]) ** 2, expected[2], rtol=1e-7)
    if dynamic:
        left_out = solve(DECAY, jnp.ones(1), grid, nu=3, calibration=po.LeaveOneOutCalibration())
        np.testing.assert_array_equal(left_out.mean, solution.mean)
        factor = (left_out.std[-1] / solution.std[-1]) ** 2
        np.testing.assert_allclose(factor, min(np.mean(expected), r2), rtol=1e-7)
        np.testing.assert_allclose(left_out.output_scale[1:] / solution.output_scale[1:], np.sqrt(factor[0]), rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_leave_one_out_leaves_the_mean_alone_and_needs_the_steps(factorisation):
    u0, parts = jnp.array([20.0, 20.0]), {"factorisation": factorisation}
    controller = po.IntegralController(1e-6, 1e-8)

    def run(calibration, strategy, save_at=None):
        solver = po.Solver(
            po.IWP(3),
            po.TS1(po.ODE(lotka_volterra)),
            calibration=calibration,
            strategy=strategy,
            controller=controller,
            loop=po.ForwardLoop(1024),
            **parts,
        )
        return solver.solve(u0, 0.0, 5.0, save_at=save_at)

    dynamic = run(po.DynamicCalibration(), po.FixedIntervalSmoother())
    both = run(po.LeaveOneOutCalibration(), po.FixedIntervalSmoother())
    forward = run(po.LeaveOneOutCalibration(), po.Filter())
    kept = run(po.LeaveOneOutCalibration(), po.Filter(), po.SaveAt(dense=True))
    np.testing.assert_allclose(both.mean, dynamic.mean, rtol=1e-12)
    np.testing.assert_allclose(forward.mean, dynamic.mean, rtol=1e-12)
    assert np.all(both.std <= forward.std * (1 + 1e-9)) and np.all(forward.std < dynamic.std)
    np.testing.assert_allclose(kept.std, both.std, rtol=1e-9)


def scales_of_a_quadrature(nu, order, memory, steps):
    """The scales of ``u^(order) = t^k / k!`` with ``u^(nu + 1) = 1``, unit steps: plain covariances, from ``u = 0``."""
    n, k = nu + 1, nu + 1 - order
    a, noise = oracles.iwp_transition(nu, 1.0)
    mean, covariance, variances = np.zeros(n), np.zeros((n, n)), []
    for t in range(1, steps + 1):
        mean, covariance = a @ mean, a @ covariance @ a.T
        z = mean[order] - t**k / factorial(k)
        local = z**2 / noise[order, order]
        variances.append((1 - memory) * local + memory * min(variances[-1], 100 * local) if variances else local)
        covariance = covariance + variances[-1] * noise
        mean, covariance = oracles.condition(mean, covariance, np.eye(n)[order : order + 1], [z])
    return np.sqrt(variances)


@pytest.mark.parametrize(
    ("nu", "order", "memory"), [(3, 1, 0.0), (3, 1, 0.5), *left_to_nox((4, 2, 0.0), (4, 2, 0.5), (2, 1, 0.25))]
)
@pytest.mark.parametrize("calibration", first_of(po.DynamicCalibration, po.LeaveOneOutCalibration), ids=name)
def test_scales_with_and_without_memory(nu, order, memory, calibration):
    k = nu + 1 - order

    def field(t, u, *rest):
        return jnp.full_like(u, t**k / factorial(k))

    start = (jnp.zeros(1),) * order
    solver = po.Solver(po.IWP(nu), po.TS0(po.ODE(field, order=order)), calibration=calibration(memory=memory))
    solution = solver.solve_grid(start[0] if order == 1 else start, np.arange(31.0))
    scales, expected = solution.output_scale[1:], scales_of_a_quadrature(nu, order, memory, 30)
    if calibration is po.DynamicCalibration:
        np.testing.assert_allclose(scales[0], expected[0], rtol=1e-9)
    np.testing.assert_allclose(scales / scales[0], expected / expected[0], rtol=1e-9)
    # An even number of derivatives above the equation's: without memory, the loop of scale and gain never settles.
    ratios = np.abs(np.log(scales[-4:] / scales[-5:-1]))
    assert np.all(ratios > 0.5) if (nu - order) % 2 == 0 and memory == 0 else np.all(ratios < 1e-3)


def henon_heiles(t, u, du, args):
    return jnp.stack([-u[0] - 2 * u[0] * u[1], -u[1] - u[0] ** 2 + u[1] ** 2])


@pytest.mark.thorough
def test_with_a_memory_the_error_follows_the_tolerance():
    start, ode = (jnp.array([0.0, 0.1]), jnp.array([0.5, 0.0])), po.ODE(henon_heiles, order=2)

    def end(nu, tolerance, calibration):
        control = po.IntegralController(jnp.asarray(tolerance), jnp.asarray(tolerance))
        parts = {"calibration": calibration, "controller": control, "loop": po.ForwardLoop(4096)}
        return po.Solver(po.IWP(nu), po.TS0(ode), **parts).solve(start, 0.0, 50.0)

    exact = end(8, 1e-11, po.NoCalibration()).mean
    errors, steps = {}, {}
    for memory in (0.0, 0.5):
        ends = [end(4, tolerance, po.DynamicCalibration(memory=memory)) for tolerance in (1e-7, 1e-8, 1e-9)]
        errors[memory] = np.array([np.max(np.abs(solution.mean - exact)) for solution in ends])
        steps[memory] = np.array([solution.stats["num_accepted_steps"] for solution in ends])
    assert np.all(errors[0.5] < 50 * np.array([1e-7, 1e-8, 1e-9]))
    assert np.all(steps[0.5] < 0.95 * steps[0.0])
    # What it is for: alternating scales make gains that drift.
    assert errors[0.0][-1] > 20 * errors[0.5][-1] and errors[0.0][-1] > errors[0.0][0] / 10


@pytest.mark.thorough
def test_a_memory_forgets_what_a_stiff_problem_has_left_behind():
    """After the transient the scale falls by nine orders of magnitude; what lags behind would spoil the mean."""

    def end(nu, tolerance, calibration):
        ode = po.ODE(lambda t, u, args: jnp.stack([u[1], 50 * (1 - u[0] ** 2) * u[1] - u[0]]))
        parts = {"controller": po.IntegralController(tolerance, tolerance), "error": po.ResidualError()}
        solver = po.Solver(po.IWP(nu), po.TS1(ode), calibration=calibration, **parts)
        return solver.solve(jnp.array([2.0, 0.0]), 0.0, 30.0)

    exact = end(6, 1e-10, po.DynamicCalibration()).mean
    for memory in (0.0, 0.5):
        solution = end(3, 1e-6, po.DynamicCalibration(memory=memory))
        assert np.max(np.abs(solution.mean - exact)) < 1e-8 and np.max(solution.std) < 1e-6


@pytest.mark.parametrize("calibration", [po.DynamicCalibration, po.LeaveOneOutCalibration], ids=name)
@pytest.mark.parametrize("memory", [1.0, -0.1, float("nan")])
def test_a_memory_is_a_share(calibration, memory):
    with pytest.raises(ValueError, match=rf"{calibration.__name__}\(memory\) must be a number in \[0, 1\)"):
        calibration(memory=memory)


@pytest.mark.thorough
def test_a_constant_field_has_nothing_to_calibrate():
    half = po.DynamicCalibration(memory=0.5), po.LeaveOneOutCalibration(memory=0.5)
    for calibration in (po.DynamicCalibration(), po.MLECalibration(), po.LeaveOneOutCalibration(), *half):
        solution = solve(po.ODE(lambda t, u, args: jnp.ones_like(u)), jnp.zeros(2), TENTHS, calibration=calibration)
        np.testing.assert_allclose(solution.mean[:, 0], TENTHS, atol=1e-15)
        assert np.all(np.isfinite(solution.std)) and np.isfinite(solution.log_likelihood)


def test_relinearising_a_taylor_linearisation_changes_nothing():
    u0, ode = jnp.array([20.0, 20.0]), po.ODE(lotka_volterra)
    once = solve(ode, u0, TENTHS)
    twice = solve(ode, u0, TENTHS, calibration=po.DynamicCalibration(relinearise=True))
    np.testing.assert_allclose(twice.mean, once.mean, rtol=1e-13)
    np.testing.assert_allclose(twice.std, once.std, rtol=1e-9)


def test_relinearising_sees_the_whole_covariance():
    seen = []

    class Watched(po.AbstractConstraint):
        problem: po.ODE

        def linearise(self, t, predicted, layout, args):
            seen.append(predicted.factor.shape)
            return po.TS1(self.problem).linearise(t, predicted, layout, args)

    solver = po.Solver(po.IWP(2), Watched(DECAY), calibration=po.DynamicCalibration(relinearise=True))
    solver.step(solver.init(jnp.ones(1), 0.0), 0.1)
    assert seen == [(0, 3), (2, 3), (5, 3)]  # for its shape alone; without the noise of the step; then with it


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
@pytest.mark.parametrize("order", first_of(1, 2))
def test_state_error_is_the_posterior_deviation_of_the_noise(factorisation, order):
    """Against the dense formula ``Q_00 - Q_0z (Q_zz)^-1 Q_z0`` under the local scale."""
    if order == 1:
        ode, u0 = po.ODE(lotka_volterra), jnp.array([20.0, 18.0])
    else:
        ode, u0 = po.ODE(lambda t, u, du, args: -u + 0.3 * du * u[::-1], order=2), (jnp.array([1.0, 0.5]),) * 2
    solver = po.Solver(po.IWP(3), po.TS1(ode), factorisation=factorisation)
    state, dt = solver.init(u0, 0.0), jnp.asarray(0.1)
    layout = state.layout
    transition = solver.prior.transition(dt, layout)
    predicted = push(state.distribution, transition.matrix)
    equation = solver.constraint.linearise(dt, predicted, layout, None)
    unit = jnp.broadcast_to(transition.magnitude, layout.batch_shape)
    innovation = innovate(equation, transition.noise, unit)
    got = po.StateError().estimate(po.Attempt(transition, predicted.mean, equation, innovation, None), dt, layout)

    flat = [np.reshape(x, (-1, *x.shape[-2:])) for x in (transition.noise, equation.matrix, equation.residual)]
    std = []
    for noise, h, z in zip(*flat, strict=True):
        h = np.pad(h, ((0, 0), (0, noise.shape[1] - h.shape[1])))
        q, m = noise.T @ noise, h.shape[0]
        s = h @ q @ h.T
        scale = np.mean(np.einsum("ic,ij,jc->c", z, np.linalg.inv(s), z)) / m
        _, rest = oracles.condition(0, q, h, z)
        std.append(np.sqrt(scale * np.diagonal(rest)[:m]))
    expected = np.broadcast_to(np.ravel(std), (2,))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.thorough
def test_state_error_lands_closer_to_the_tolerance():
    u0, exact = jnp.array([20.0, 20.0]), jnp.array([6.479896814873224, 2.883884183537968])
    found = {}
    for error in (po.ResidualError(), po.StateError()):
        solver = po.Solver(
            po.IWP(5),
            po.TS1(po.ODE(lotka_volterra)),
            error=error,
            controller=po.PIController(1e-7, 1e-7),
            loop=po.ForwardLoop(4096),
        )
        solution = solver.solve(u0, 0.0, 50.0)
        found[name(error)] = int(solution.stats["num_accepted_steps"]), np.max(abs(solution.mean[0] - exact))
    (many, small), (few, larger) = found["ResidualError"], found["StateError"]
    assert few < 0.75 * many and small < larger < 1e-5


def test_a_step_of_no_length_is_left_out():
    solver = po.Solver(po.IWP(2), po.TS1(DECAY), calibration=po.LeaveOneOutCalibration())
    solution = solver.solve_grid(jnp.ones(1), np.array([0.0, 0.0, 1.0]))  # a step of no length
    assert np.all(np.isfinite(solution.std))
