"""The default error estimate: its formula on full covariances, what it sees inside a step, stiff systems at rest.

And what may be called successful: scales that do not explain residuals, scales of zero, priors that return to zero.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.algebra.factorisations import layout_of
from probode.stepping.residuals import INSIDE, with_defects
from probode.stepping.step import Step

from .. import oracles
from ..helpers import FACTORISATIONS, first_of, name


NU = 3
U0, T, DT = jnp.array([0.7, -0.4]), 0.3, 0.25


def field(t, u, args):
    return jnp.stack([jnp.sin(t) * u[1] - u[0] ** 2, u[0] * u[1] + t])


def attempted(constraint):
    """A step of ``DT`` from derivatives that are not exact, with the residuals of the corrected mean."""
    layout = layout_of(U0, NU, po.Dense())
    mean = jnp.stack([U0, jnp.array([0.2, 0.5]), jnp.array([-1.0, 0.3]), jnp.array([0.4, 2.0])]).reshape(-1, 1)
    step = Step(po.IWP(NU), constraint, po.DynamicCalibration(), layout)
    state = step.start(jnp.asarray(T), po.Normal(mean, jnp.zeros((0, mean.size))))
    dt = jnp.asarray(DT)
    got = step.attempt(state.distribution, T + dt, dt)
    looked = with_defects(constraint, step.prior, state.distribution, T + dt, dt, got, layout, None)
    return got, looked.innovation, po.LocalError().estimate(looked, dt, layout), mean[:, 0]


@pytest.mark.parametrize("constraint", first_of(po.TS0, po.TS1), ids=name)
def test_the_estimate_is_its_formula(constraint):
    """In plain NumPy, on full covariances: the corrected mean at both times, its residuals, and what they amount to."""
    got, innovation, estimate, mean = attempted(constraint(po.ODE(field)))
    a, q = oracles.iwp_transition(NU, DT, 2)
    predicted = a @ mean
    jacobian = np.asarray(jax.jacfwd(field, 1)(T + DT, jnp.asarray(predicted[:2]), None))
    jacobian = jacobian if constraint is po.TS1 else np.zeros((2, 2))
    h = np.concatenate([-jacobian, np.eye(2), np.zeros((2, 4))], axis=1)

    def residual(t, x):
        return x[2:4] - np.asarray(field(t, jnp.asarray(x[:2]), None))

    z, s = residual(T + DT, predicted), h @ q @ h.T
    scale = np.sqrt(z @ np.linalg.solve(s, z) / 2)
    a_in, q_in = oracles.iwp_transition(NU, INSIDE * DT, 2)
    a_out, _ = oracles.iwp_transition(NU, (1 - INSIDE) * DT, 2)
    inside = residual(T + INSIDE * DT, a_in @ mean - q_in @ a_out.T @ h.T @ np.linalg.solve(s, z))
    scale_inside = np.sqrt(inside @ np.linalg.solve(s, inside) / 2)
    got_inside = np.sqrt(np.mean(innovation.inside**2)) / np.asarray(got.transition.magnitude)
    np.testing.assert_allclose(got_inside, scale_inside, rtol=1e-9)
    scale = max(scale, scale_inside)
    if constraint is po.TS0:
        assert innovation.remainder is None
        np.testing.assert_allclose(estimate[0], DT * scale * np.sqrt(np.diag(s)), rtol=1e-9)
        return
    corrected, rest = oracles.condition(predicted, q, h, z)
    left_out = np.abs(q @ h.T @ np.linalg.solve(s, residual(T + DT, corrected)))[:2]
    std = scale * np.sqrt(np.diag(rest))[:2]
    np.testing.assert_allclose(estimate[0], 5 * std + (2 ** (NU + 1) - 1) * left_out, rtol=1e-7)


def test_affine_equations_leave_nothing_out():
    _, innovation, _, _ = attempted(po.TS1(po.ODE(lambda t, u, args: jnp.stack([-u[0] + 3 * u[1], t - u[0]]))))
    assert np.max(np.abs(innovation.remainder)) < 1e-12 < np.max(np.abs(innovation.inside))


@pytest.mark.thorough
def test_second_order_errors_of_both_initial_values():
    solver = po.Solver(po.IWP(4), po.TS1(po.ODE(lambda t, u, du, args: -jnp.sin(u) - du, order=2)))
    layout = layout_of(jnp.ones(2), 4, po.Dense())
    state, dt = solver.init((jnp.ones(2), jnp.zeros(2)), 0.0), jnp.asarray(0.5)
    got = Step(solver.prior, solver.constraint, solver.calibration, layout).attempt(state.distribution, dt, dt)
    looked = with_defects(solver.constraint, solver.prior, state.distribution, dt, dt, got, layout, None)
    error = solver.error.estimate(looked, dt, layout)
    assert error.shape == (2, 2) and np.all(error > 0)


# Fields that vanish, with their derivatives, where a solve starts, and nearly where a step over everything would end.
UNSEEN = {
    "smooth": (lambda t, u, args: jnp.sin(jnp.pi * t) ** 4 - u, 1.0, 0.22973431118),
    "bump": (lambda t, u, args: jnp.exp(-(((t - 5.0) / 0.8) ** 2)) + 0 * u, 10.0, 1.4179630807),
    "day and night": (
        lambda t, u, args: jnp.where(jnp.abs(jnp.mod(t, 24) - 12) < 6, 1.0, 0.0) - 0.1 * u,
        240.0,
        4.2177,
    ),
}
METHODS = [(po.TS1, po.Dense()), (po.TS0, po.Isotropic()), (po.TS0, po.BlockDiagonal()), (po.TS1, po.BlockDiagonal())]


@pytest.mark.parametrize(("constraint", "factorisation"), first_of(*METHODS))
@pytest.mark.parametrize("case", first_of(*UNSEEN))
def test_what_happens_inside_a_step_is_seen(case, constraint, factorisation):
    vector_field, t1, right = UNSEEN[case]
    ode = po.ODE(lambda t, u, args: vector_field(args * t, u, None) * args)
    for dtype, rtol, atol in ((jnp.float64, 1e-6, 1e-9), (jnp.float32, 1e-3, 1e-4)):
        controller = po.IntegralController(rtol, atol)
        solver = po.Solver(po.IWP(4), constraint(ode), factorisation=factorisation, controller=controller)
        for direction in (1.0, -1.0):
            # Backwards the field is that of the reflected time.
            solution = solver.solve(
                jnp.zeros(1, dtype), 0.0, direction * t1, args=jnp.asarray(direction, dtype), throw=False
            )
            if case == "day and night" and constraint is po.TS0 and dtype == jnp.float32:
                # Behind a jump without stop_at the derivatives of a step may need shorter ones than times can tell.
                if solution.result == po.Result.step_size_too_small:
                    continue
            assert solution.result == po.Result.successful
            np.testing.assert_allclose(solution.mean[0, 0], right, rtol=20 * rtol)


@pytest.mark.thorough
def test_a_first_length_is_trusted():
    # One step over everything, as asked for: whoever names a first step knows the problem.
    solver = po.Solver(po.IWP(4), po.TS1(po.ODE(lambda t, u, args: jnp.ones_like(u))))
    assert solver.solve(0.0, 0.0, 1.0, dt0=1.0).stats["num_steps"] == 1
    for longest, slope in ((1 / 4, 1.0), (1 / 50, 0.0)):  # no derivative says how long a step from rest may be
        solver = po.Solver(po.IWP(4), po.TS1(po.ODE(lambda t, u, slope: slope + jnp.zeros_like(u))))
        steps = solver.solve(0.0, 0.0, 1.0, args=slope, save_at=po.SaveAt(t0=True, steps=True))
        lengths = np.diff(steps.t[: int(steps.stats["num_accepted_steps"]) + 1])
        np.testing.assert_allclose(lengths[0], longest, rtol=1e-12)
        assert np.all(lengths[1:] <= 3 * lengths[:-1] * (1 + 1e-9))
        np.testing.assert_allclose(steps.mean[-1], slope, rtol=1e-14)


@pytest.mark.parametrize("nu", first_of(4, 5))
def test_stiff_and_at_rest(nu):
    """Round-off of the field, ``k eps``, is no residual: attempts grow with the logarithm of the span."""
    solver = po.Solver(
        po.IWP(nu),
        po.TS1(po.ODE(lambda t, u, k: -k * (u - 1))),
        controller=po.IntegralController(1e-6, 1e-9),
        loop=po.ForwardLoop(1000),
    )
    for k, t1 in ((1e6, 1e6), (1e9, 1e4), (1e9, 1e6)):
        solution = solver.solve(0.0, 0.0, t1, args=k)
        assert abs(solution.mean[0] - 1) < 1e-8 and solution.stats["num_steps"] < 120


@pytest.mark.parametrize("nu", first_of(5, 4))
def test_what_the_linearisation_leaves_out_is_seen(nu):
    """A flame: Newton's step from a prediction far off is not the solution of the equation."""
    ode = po.ODE(lambda t, u, args: u**2 - u**3)
    solver = po.Solver(po.IWP(nu), po.TS1(ode), controller=po.IntegralController(1e-2, 1e-5))
    solution = solver.solve(jnp.full(1, 0.1), 0.0, 20.0)
    np.testing.assert_allclose(solution.mean[0, 0], 0.99985, atol=1e-2)


def robertson(t, u, du, args):
    r1, r2, r3 = 0.04 * u[0], 3e7 * u[1] ** 2, 1e4 * u[1] * u[2]
    return jnp.stack([du[0] + r1 - r3, du[1] - r1 + r2 + r3, u.sum() - 1])


@pytest.mark.thorough
def test_robertson_as_a_differential_algebraic_equation():
    """It was off by 0.12 with a standard deviation of 6e-4."""
    right = np.array([0.7158270688, 9.18553477e-06, 0.2841637457])
    parts = {"controller": po.IntegralController(1e-4, 1e-8), "loop": po.ForwardLoop(5000)}
    solution = po.Solver(po.IWP(4), po.TS1(po.Residual(robertson)), **parts).solve(jnp.array([1.0, 0, 0]), 0.0, 40.0)
    np.testing.assert_allclose(solution.mean[0], right, rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("calibration", [po.NoCalibration(), po.MLECalibration()], ids=name)
def test_a_scale_that_does_not_explain_a_jump_is_named(calibration):
    jump = po.ODE(lambda t, u, args: jnp.sign(args - t) + 0 * u)  # u(1) = -0.5
    stopped = po.Solver(po.IWP(4), po.TS1(jump), calibration=calibration).solve(0.0, 0.0, 1.0, args=0.25, throw=False)
    assert stopped.result == po.Result.scale_mismatch
    np.testing.assert_allclose(stopped.t[0], 0.25, atol=1e-3)
    told = po.Solver(po.IWP(4), po.TS1(jump), calibration=calibration, controller=po.IntegralController(stop_at=[0.25]))
    np.testing.assert_allclose(told.solve(0.0, 0.0, 1.0, args=0.25).mean[0], -0.5, atol=1e-9)


@pytest.mark.thorough
def test_a_scale_that_does_not_explain_a_fast_phase_is_named():
    """FitzHugh-Nagumo's slow phases make steps whose uncertainty explains, falsely, what comes in the fast ones."""

    def nerve(t, u, args):
        return jnp.stack([10 * (u[0] - u[0] ** 3 / 3 + u[1]), -(u[0] - 0.2 + 0.2 * u[1]) / 10])

    for calibration in (po.NoCalibration(), po.DynamicCalibration()):
        solution = po.Solver(po.IWP(4), po.TS1(po.ODE(nerve)), calibration=calibration).solve(
            jnp.array([-1.0, 1.0]), 0.0, 20.0, throw=False
        )
        if solution.result == po.Result.successful:
            np.testing.assert_allclose(solution.mean[0, 0], -1.17341651, atol=2e-2)
        else:
            assert solution.result == po.Result.scale_mismatch and isinstance(calibration, po.NoCalibration)


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
@pytest.mark.parametrize("strategy", first_of(po.FixedPointSmoother(), po.FixedIntervalSmoother()), ids=name)
def test_smoothing_over_steps_without_residuals(strategy, factorisation):
    """Before a kink residuals are zero: smoothed means there were 1e108."""
    ts = jnp.linspace(0.02, 1.0, 50)
    kinks = jnp.array([0.3, 0.9])
    solver = po.Solver(
        po.IWP(2),
        po.TS1(po.ODE(lambda t, u, c: jnp.sign(c - t) + 0 * u)),
        factorisation=factorisation,
        strategy=strategy,
    )
    solution = solver.solve(jnp.zeros(2), 0.0, 1.0, args=kinks, save_at=ts)
    right = np.where(ts[:, None] < kinks, ts[:, None], 2 * kinks - ts[:, None])
    np.testing.assert_allclose(solution.mean, right, atol=3e-3)
    assert np.all(solution.std > 0) and np.all(solution.std < 3e-3)


@pytest.mark.thorough
def test_a_component_that_has_nothing_to_do_in_one_step():
    """The prediction satisfies ``u' = v`` by accident, with a ``v`` that is wrong: that is not certainty."""
    ode = po.ODE(lambda t, u, args: jnp.stack([u[1], -u[0]]))
    for constraint in (po.TS0(ode), po.TS0(ode, evaluations=2)):
        solver = po.Solver(
            po.IWP(4), constraint, factorisation=po.BlockDiagonal(), controller=po.PIController(1e-2, 1e-2)
        )
        steps = solver.solve(jnp.array([1.0, 0.0]), 0.0, 3.0, save_at=po.SaveAt(steps=True))
        t = float(steps.t[0])
        error = np.abs(np.asarray(steps.mean[0]) - [np.cos(t), -np.sin(t)])
        assert np.all(error < 10 * np.asarray(steps.std[0]))


def test_a_solution_that_stays_is_certain():
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: 0 * u)))
    solution = solver.solve(2.0, 0.0, 1.0)
    assert solution.mean[0] == 2.0 and solution.std[0] == 0.0


PRIORS = [po.Matern(3, 1.0), po.Matern(1, 1.0), po.LinearSDE(1, (-1.0, -2.0))]


@pytest.mark.thorough
@pytest.mark.parametrize("prior", first_of(*PRIORS), ids=["Matern(3)", "Matern(1)", "LinearSDE"])
def test_a_prior_that_returns_to_zero_is_not_followed_there(prior):
    """Over steps longer than its memory it predicts zero, where the field is zero too: that was 0 +- 0."""
    solver = po.Solver(prior, po.TS1(po.ODE(lambda t, u, rate: -rate * u)), loop=po.ForwardLoop(2000))
    for rate, t1 in ((1e-2, 1e2), (1e-4, 1e4), (0.0, 1e3)):
        solution = solver.solve(jnp.ones(1), 0.0, t1, args=rate, throw=False)
        reached = float(solution.t[0])
        error = abs(float(solution.mean[0, 0]) - np.exp(-rate * reached))
        assert reached > 0 and error < 0.5 and error < 100 * float(solution.std[0, 0])
        assert solution.result == po.Result.max_steps_reached or reached == t1


def end(solver, u0):
    return solver.solve(u0, 0.0, 1.0, args=0.6).mean[0]


@eqx.filter_jit
def slope(solver, u0):
    return jax.grad(ft.partial(end, solver))(u0)


@pytest.mark.thorough
def test_looks_do_not_enter_derivatives():
    """The estimate decides on lengths alone: a gradient is that of the accepted steps, under ``vmap`` as well."""
    ode = po.ODE(lambda t, u, args: -args * u)
    for constraint in (po.TS1(ode), po.TS0(ode)):
        solver = po.Solver(po.IWP(3), constraint, controller=po.IntegralController(1e-7, 1e-9), loop=po.BoundedLoop(64))
        np.testing.assert_allclose(slope(solver, 1.0), np.exp(-0.6), rtol=1e-6)
        lanes = jax.vmap(ft.partial(end, solver))(jnp.array([1.0, 2.0, 1e-3]))
        np.testing.assert_allclose(lanes, np.exp(-0.6) * np.array([1.0, 2.0, 1e-3]), rtol=1e-5)
