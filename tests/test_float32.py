"""Single precision: JAX's default, and a float32 state while double precision is on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .helpers import FACTORISATIONS, first_of, left_to_nox, logistic, lotka_volterra, name


U0 = np.array([20.0, 20.0], np.float32)


def make(factorisation, constraint=po.TS1, nu=4, rtol=1e-4, atol=1e-5):
    return po.Solver(
        po.IWP(nu),
        constraint(po.ODE(lotka_volterra)),
        factorisation=factorisation,
        controller=po.IntegralController(rtol=rtol, atol=atol),
        loop=po.BoundedLoop(256),
    )


def leaves_are_float32(tree):
    return all(x.dtype == jnp.float32 for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_the_state_decides_the_dtype(factorisation):
    solution = make(factorisation).solve(U0, 0.0, 5.0, save_at=np.linspace(0, 5, 4))
    # reference: DOP853 at rtol 1e-12
    np.testing.assert_allclose(solution.mean[-1], [2.67365767, 7.8452359], rtol=1e-3)
    assert leaves_are_float32((solution.t, solution.marginals, solution.output_scale, solution.mean, solution.std))
    assert np.all(np.isfinite(solution.std)) and np.all(solution.std[1:] > 0)


@pytest.mark.parametrize("nu", [3, *left_to_nox(1, 6, 8, 11)])
def test_orders_and_short_steps(nu):
    # dt^(nu + 1/2) underflows in single precision; the columns are scaled, so that nothing is lost
    solver = po.Solver(po.IWP(nu), po.TS1(po.ODE(logistic)), loop=po.ForwardLoop(512))
    u0 = np.array([0.1], np.float32)
    for dt0 in (None, 1e-4):
        solution = solver.solve(u0, 0.0, 2.0, dt0=dt0)
        exact = 0.1 * np.exp(1.0) / (0.9 + 0.1 * np.exp(1.0))
        assert abs(solution.mean[0, 0] - exact) < 2e-3
        assert np.all(np.isfinite(solution.std))


@pytest.mark.thorough
def test_fast_processes():
    # rates of a million: squares of the noise and of the residual leave the range of single precision
    decay = po.Solver(po.IWP(4), po.TS1(po.ODE(lambda t, u, args: -1e6 * u))).solve(np.float32(1.0), 0.0, 5e-6)
    np.testing.assert_allclose(decay.mean[0], np.exp(-5), rtol=1e-2)
    relaxation = po.Solver(po.IWP(4), po.TS1(po.ODE(lambda t, u, args: -1e7 * (u - jnp.cos(t)))))
    np.testing.assert_allclose(relaxation.solve(np.float32(1.0), 0.0, 1e-4).mean[0], 1.0, rtol=1e-4)
    growth = po.Solver(po.IWP(5), po.TS1(po.ODE(lambda t, u, args: 1e4 * u * (1 - u))))
    np.testing.assert_allclose(growth.solve(np.float32(0.1), 0.0, 2e-3).mean[0], 1.0, rtol=1e-3)


def test_high_orders_of_initial_derivatives():
    # 14! is not a 32-bit integer
    state = po.Solver(po.IWP(14), po.TS0(po.ODE(lambda t, u, args: u))).initialise(np.float32(1.0), 0.0)
    np.testing.assert_allclose(jnp.stack(state.mean), 1.0, rtol=1e-5)


def test_gradients_are_finite_and_right():
    def loss(rate):
        solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lambda t, u, args: -args * u)), loop=po.BoundedLoop(64))
        solution = solver.solve(np.ones(1, np.float32), 0.0, 1.0, args=rate)
        return solution.mean[-1, 0], solution.std[-1, 0]

    rate = jnp.asarray(0.8, jnp.float32)
    gradient = jax.jit(jax.grad(lambda rate: loss(rate)[0]))(rate)
    assert gradient.dtype == jnp.float32
    assert abs(gradient + np.exp(-0.8)) < 1e-3


def test_tolerances_below_round_off_are_refused():
    with pytest.raises(ValueError, match="float32"):
        make(po.Dense(), rtol=1e-7).solve(U0, 0.0, 1.0)


def test_late_times():
    # one unit of round-off at t = 1000 is 6e-5: steps live well above it, and end exactly at t1
    t0, t1 = np.float32(1000.0), np.float32(1001.0)
    solution = make(po.Isotropic(), po.TS0, nu=3).solve(U0, t0, t1)
    assert solution.t[0] == t1
    reference = make(po.Isotropic(), po.TS0, nu=3).solve(U0, 0.0, 1.0)
    np.testing.assert_allclose(solution.mean, reference.mean, rtol=2e-3)
