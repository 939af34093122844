"""Derivatives of adaptive solves: those of the accepted steps, frozen; through loops, lanes, rejections, closures."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .helpers import central_differences, first_of, lotka_volterra, name, relative
from .test_gradients import PARAMETERS, rates_field


def adaptive_solver(
    constraint=po.TS1,
    factorisation=po.Dense(),
    loop=po.BoundedLoop(256),
    calibration=po.NoCalibration(),
    rtol=1e-5,
):
    return po.Solver(
        po.IWP(2),
        constraint(po.ODE(rates_field)),
        factorisation=factorisation,
        calibration=calibration,
        controller=po.IntegralController(rtol=rtol, atol=rtol / 100),
        loop=loop,
    )


def zeroth_order_lifted(ode):
    return po.TS0(ode.lifted(1), evaluations=2)


def first_order_lifted(ode):
    return po.TS1(ode.lifted(1))


# Compiles twice as fast as more steps, and is enough for seven of them and three rejections.
FEW = {"loop": po.BoundedLoop(16), "rtol": 1e-3}


def frozen_times(solver, x):
    solution = solver.solve(x[:2], 0.0, 2.0, args=x[2:], save_at=po.SaveAt(t0=True, steps=True))
    return solution.t[: int(solution.stats["num_accepted_steps"]) + 1]


@pytest.mark.parametrize(
    ("constraint", "calibration"),
    first_of(
        (po.TS0, po.DynamicCalibration()),
        (po.TS1, po.NoCalibration()),
        (po.TS0, po.NoCalibration()),
        (po.TS1, po.DynamicCalibration()),
        (zeroth_order_lifted, po.DynamicCalibration()),
        (first_order_lifted, po.DynamicCalibration()),
    ),
    ids=name,
)
@pytest.mark.thorough
def test_adaptive_equals_frozen_steps(constraint, calibration):
    solver = adaptive_solver(constraint, calibration=calibration, **FEW)
    x = jnp.asarray(PARAMETERS)
    times = frozen_times(solver, x)

    def adaptive(x):
        return solver.solve(x[:2], 0.0, 2.0, args=x[2:]).mean[-1]

    def frozen(x):
        return solver.solve_grid(x[:2], times, args=x[2:]).mean[-1]

    np.testing.assert_allclose(adaptive(x), frozen(x), rtol=1e-12)
    expected, jacobian = jax.jit(jax.jacrev(frozen))(x), jax.jit(jax.jacfwd(adaptive))(x)
    assert relative(jax.jit(jax.jacrev(adaptive))(x), expected) < 1e-9
    assert relative(jacobian, expected) < 1e-9
    if isinstance(calibration, po.NoCalibration):
        assert relative(jacobian, central_differences(jax.jit(frozen), PARAMETERS, 1e-3)) < 1e-6


@pytest.mark.thorough
@pytest.mark.parametrize("checkpoints", first_of(5, None))
def test_loops_agree_and_the_forward_loop_says_what_to_do(checkpoints):
    x = jnp.asarray(PARAMETERS)

    def loss(x, loop):
        return jnp.sum(adaptive_solver(loop=loop, rtol=1e-3).solve(x[:2], 0.0, 2.0, args=x[2:]).mean ** 2)

    gradient = jax.jit(jax.grad(loss))
    bounded = gradient(x, po.BoundedLoop(16))
    assert relative(gradient(x, po.CheckpointedLoop(16, checkpoints=checkpoints)), bounded) < 1e-10
    tangent = jnp.asarray(np.random.default_rng(0).normal(size=6))
    for loop in (
        po.ForwardLoop(16),
        po.CheckpointedLoop(16, checkpoints=checkpoints) if checkpoints else po.BoundedLoop(16),
    ):
        along = functools.partial(jax.jvp, functools.partial(loss, loop=loop))
        _, derivative = jax.jit(along)((x,), (tangent,))
        assert abs(derivative - bounded @ tangent) < 1e-9 * abs(derivative)
    with pytest.raises(RuntimeError, match="BoundedLoop"):
        jax.grad(loss)(x, po.ForwardLoop(16))


@pytest.mark.thorough
def test_end_points_in_time():
    # d u(t1) / d t1 = f(t1, u(t1)) and d u(t1) / d t0 = -du/du0 f(t0, u0), to the accuracy of the solve
    solver = po.Solver(
        po.IWP(4),
        po.TS1(po.ODE(lotka_volterra)),
        controller=po.IntegralController(rtol=1e-9, atol=1e-11),
        loop=po.BoundedLoop(1024),
    )
    u0 = jnp.array([20.0, 18.0])

    def end(u0, t0, t1):
        return solver.solve(u0, t0, t1).mean[-1]

    in_u0, in_t0, in_t1 = jax.jit(jax.jacfwd(end, argnums=(0, 1, 2)))(u0, 0.3, 1.9)
    u1 = end(u0, 0.3, 1.9)
    np.testing.assert_allclose(in_t1, lotka_volterra(1.9, u1, None), rtol=1e-5)
    np.testing.assert_allclose(in_t0, -in_u0 @ lotka_volterra(0.3, u0, None), rtol=1e-5)
    reverse = jax.jit(jax.jacrev(end, argnums=(0, 1, 2)))(u0, 0.3, 1.9)
    for a, b in zip(reverse, (in_u0, in_t0, in_t1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.thorough
def test_save_times_are_differentiable():
    solver = adaptive_solver()
    x = jnp.asarray(PARAMETERS)

    def at(ts):
        return solver.solve(x[:2], 0.0, 2.0, args=x[2:], save_at=ts).mean[:, 0]

    ts = jnp.array([0.31, 0.9, 1.7])
    jacobian = jax.jit(jax.jacrev(at))(ts)
    # between steps the mean is a polynomial in t: its derivative is the filter's own first derivative
    slopes = solver.solve(x[:2], 0.0, 2.0, args=x[2:], save_at=ts).derivative(1).mean[:, 0]
    np.testing.assert_allclose(jacobian, jnp.diag(slopes), rtol=1e-10, atol=1e-12)
    _, tangent = jax.jit(lambda ts: jax.jvp(at, (ts,), (jnp.ones(3),)))(ts)
    np.testing.assert_allclose(tangent, slopes, rtol=1e-10)


@pytest.mark.thorough
def test_lanes_with_different_numbers_of_steps():
    solver = adaptive_solver()
    xs = jnp.asarray(PARAMETERS) * jnp.array([[1.0], [0.3], [2.5]])

    def loss(x):
        solution = solver.solve(x[:2], 0.0, 2.0, args=x[2:])
        return jnp.sum(solution.mean**2), solution.stats["num_steps"]

    gradient_and_steps = jax.grad(loss, has_aux=True)
    grads, steps = jax.jit(jax.vmap(gradient_and_steps))(xs)
    assert len(set(np.asarray(steps).tolist())) == 3
    assert np.all(np.isfinite(grads))
    alone = jax.jit(gradient_and_steps)
    for x, gradient in zip(xs, grads, strict=True):
        assert relative(gradient, alone(x)[0]) < 1e-9


@pytest.mark.thorough
@pytest.mark.parametrize("lanes", first_of(True, False), ids=["lanes", "alone"])
def test_rejected_attempts_that_are_not_finite_leave_gradients_finite(lanes):
    # sqrt leaves its domain on the attempts that are too long; they are rejected and must not reach the gradient
    def field(t, u, args):
        return -args * jnp.sqrt(u) ** 2

    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(field)), controller=po.IntegralController(rtol=1e-6, atol=1e-8))

    def end(rate):
        solution = solver.solve(jnp.array([1.0]), 0.0, 3.0, args=rate, dt0=10.0)
        return solution.mean[-1, 0], solution.stats["num_rejected_steps"]

    def first_of_two_lanes(rate):
        return jax.tree.map(lambda x: x[0], jax.vmap(end)(jnp.stack([rate, 0.1 * rate])))

    derivative = jax.jit(jax.value_and_grad(first_of_two_lanes if lanes else end, has_aux=True))
    (value, rejected), gradient = derivative(1.0)
    assert rejected > 0
    np.testing.assert_allclose(value, np.exp(-3), rtol=1e-4)
    np.testing.assert_allclose(gradient, -3 * np.exp(-3), rtol=1e-3)


@pytest.mark.thorough
def test_fields_that_are_modules_and_closures():
    class Field(eqx.Module):
        rate: jax.Array

        def __call__(self, t, u, args):
            return -self.rate * u

    def loss(field):
        solver = po.Solver(po.IWP(3), po.TS1(po.ODE(field)), controller=po.IntegralController(rtol=1e-8, atol=1e-10))
        return solver.solve(jnp.array([1.0]), 0.0, 1.0).mean[-1, 0]

    rate = jnp.array(0.8)
    expected = -np.exp(-0.8)
    assert abs(eqx.filter_jit(eqx.filter_grad(loss))(Field(rate)).rate - expected) < 1e-6
    assert abs(jax.jit(jax.grad(lambda rate: loss(lambda t, u, args: -rate * u)))(rate) - expected) < 1e-6
    assert abs(jax.jit(jax.jacfwd(lambda rate: loss(lambda t, u, args: -rate * u)))(rate) - expected) < 1e-6


@pytest.mark.thorough
def test_second_derivatives():
    def end(rate):
        ode = po.ODE(lambda t, u, args: -args * u)
        solver = po.Solver(po.IWP(3), po.TS1(ode), loop=po.BoundedLoop(64))
        return solver.solve(jnp.array([1.0]), 0.0, 1.0, args=rate).mean[-1, 0]

    expected = np.exp(-0.8)
    assert abs(jax.jit(jax.jacfwd(jax.grad(end)))(0.8) - expected) < 1e-3
    assert abs(jax.jit(jax.grad(jax.grad(end)))(0.8) - expected) < 1e-3


@pytest.mark.thorough
def test_zero_residual_and_zero_start_are_differentiable():
    # a constant field has no residual at all: scale, innovation and standard deviation are zero
    solver = po.Solver(
        po.IWP(2), po.TS0(po.ODE(lambda t, u, args: args * jnp.ones_like(u))), factorisation=po.Isotropic()
    )

    def end(rate):
        solution = solver.solve(jnp.zeros(2), 0.0, 1.0, args=rate)
        return solution.mean[-1, 0] + jnp.sum(solution.std)

    value, gradient = jax.jit(jax.value_and_grad(end))(0.7)
    assert abs(value - 0.7) < 1e-12
    assert abs(gradient - 1.0) < 1e-9
