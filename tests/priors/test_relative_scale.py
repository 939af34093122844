"""Priors whose components move by as much as they are large: independent of units, and what that does for stiffness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.algebra.factorisations import layout_of

from ..helpers import check_jacobians, covariance, left_to_nox, lotka_volterra, name, relative


def robertson(t, u, args):
    slow, fast, back = 0.04 * u[0], 3e7 * u[1] ** 2, 1e4 * u[1] * u[2]
    return jnp.stack([-slow + back, slow - fast - back, fast])


def solver(constraint=po.TS1, *, nu=4, rtol=1e-5, **parts):
    parts = {"controller": po.IntegralController(rtol, rtol * 1e-6), "loop": po.ForwardLoop(2048)} | parts
    return po.Solver(po.RelativeScale(po.IWP(nu)), constraint(po.ODE(robertson)), **parts)


@pytest.mark.parametrize("nu", [4, *left_to_nox(5)])
def test_robertson_to_its_end(nu):
    # Mazzia & Magherini (2008), "Test Set for Initial Value Problem Solvers": u at t = 1e11.
    end = np.array([2.083340149701255e-8, 8.333360770334713e-14, 0.9999999791665050])
    for rtol in (1e-3, 1e-5):
        own = solver(nu=nu, rtol=rtol)
        solution = own.solve(jnp.array([1.0, 0.0, 0.0]), 0.0, 1e11)
        tolerance = rtol * (end + 1e-6)
        assert np.max(np.abs(solution.mean[0] - end) / tolerance) < 10
        assert solution.stats["num_steps"] < {1e-3: 400, 1e-5: 800}[rtol]


@pytest.mark.parametrize(
    ("constraint", "factorisation"),
    [(po.TS1, po.Dense()), *left_to_nox((po.TS0, po.Dense()), (po.TS1, po.BlockDiagonal()))],
    ids=name,
)
def test_the_solution_does_not_depend_on_units(constraint, factorisation):
    def f(t, u, units):
        return units * lotka_volterra(t, u / units, None)

    @jax.jit
    def solve(units):
        own = po.Solver(po.RelativeScale(po.IWP(3), 1e-30), constraint(po.ODE(f)), factorisation=factorisation)
        return own.solve_grid(units * 20, np.linspace(0, 2, 11), args=units)

    units = jnp.array([1.0, 1e-6])
    one, other = solve(jnp.ones(2)), solve(units)
    for k in range(4):
        a, b = one.marginals, other.marginals
        a, b = (po.Posterior(one.t, x, one.layout).derivative(k) for x in (a, b))
        np.testing.assert_allclose(b.mean, a.mean * units, rtol=1e-8)
        np.testing.assert_allclose(b.std[1:], a.std[1:] * units, rtol=1e-6)


def test_of_one_component_it_is_the_prior_itself():
    # The dynamic scale makes up for any factor.
    def f(t, u, args):
        return -u * jnp.cos(3 * t)

    grid = np.linspace(0, 2, 21)
    plain, own = (po.Solver(prior, po.TS1(po.ODE(f))) for prior in (po.IWP(3), po.RelativeScale(po.IWP(3))))
    one, other = (one.solve_grid(jnp.array([0.5]), grid) for one in (plain, own))
    np.testing.assert_allclose(other.mean, one.mean, rtol=1e-10)
    np.testing.assert_allclose(other.std, one.std, rtol=1e-8)


def test_sizes():
    layout = layout_of(jnp.zeros(2), 2, po.Dense())

    def scale(us, second=(0.0, 0.0), dt=None, **parts):
        us, prior, ode = jnp.array([*us, second]), po.RelativeScale(po.IWP(2, **parts), 1e-2), po.ODE(lambda t, u, _: u)
        dt = None if dt is None else jnp.asarray(dt)
        return prior.at(jnp.zeros(()), us, ode, layout, None, dt).output_scale

    # The smallest size is 0.01 times 3.
    own = scale([[3.0, 0.0], [0.0, 3.0]], dt=-0.1, output_scale=np.array([2.0, 3.0]))
    np.testing.assert_allclose(own, [2 * 3.03, 3 * (0.03 + 0.3)], rtol=1e-14)
    np.testing.assert_allclose(scale([[-3.0, 1.0], [0.0, 0.0]]), [3.03, 1.03], rtol=1e-14)
    np.testing.assert_allclose(scale([[0.0, 0.0], [0.0, 0.0]]), [1.0, 1.0], rtol=1e-14)
    # Of a component at zero u' and u'' say that it will be as large as 3^2 / 18, however long the step is.
    for dt, change in ((0.01, 0.03), (1.0, 0.5), (None, 0.5)):
        changed = scale([[3.0, 0.0], [0.0, 3.0]], (0.0, 18.0), dt)
        np.testing.assert_allclose(changed, [3.03, 0.03 + change], rtol=1e-14)
    # A root of a covariance keeps its correlations.
    root = np.array([[1.0, 0.5], [0.0, -1.0]])
    changed = scale([[-3.0, 1.0], [0.0, 0.0]], output_scale=root)
    np.testing.assert_allclose(covariance(changed), covariance(root * [3.03, 1.03]), rtol=1e-14)


@pytest.mark.parametrize("rate", [1e7, *left_to_nox(1e3)])
@pytest.mark.parametrize(("nu", "levels"), [(4, 0), *left_to_nox((2, 0), (3, 0), (5, 0), (5, 2))])
def test_a_fast_component_that_starts_from_zero(nu, levels, rate):
    # With a size of round-off for the fast component its residual moved the slow one: 0.52 +- 0.0004, right 0.9999995.
    def f(t, u, rate):
        return jnp.stack([u[1], -rate * u[1] - u[0]])

    ode = po.ODE(f)
    constraint = po.TS1(ode.lifted(levels), evaluations=2) if levels else po.TS1(ode)
    own = po.Solver(po.RelativeScale(po.IWP(nu)), constraint, controller=po.IntegralController(1e-5, 1e-9))
    solution = own.solve(jnp.array([1.0, 0.0]), 0.0, 5.0, args=rate)
    # What is left of two exponentials.
    slow = -2 / (rate + np.sqrt(rate**2 - 4))
    fast = -rate - slow
    end = fast / (fast - slow) * np.exp(5 * slow) * np.array([1, slow])
    error = np.abs(solution.mean[0] - end)
    assert np.max(error / (1e-9 + 1e-5 * np.abs(end))) < 1
    assert np.max(error / solution.std[0]) < 3


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", [po.FixedIntervalSmoother(), *left_to_nox(po.FixedPointSmoother())], ids=name)
def test_smoothed_trees_and_the_prior_of_other_equations(strategy):
    def f(t, u, args):
        x = lotka_volterra(t, jnp.stack([u["prey"], 1e3 * u["hunters"]]), args)
        return {"prey": x[0], "hunters": x[1] / 1e3}

    u0 = {"prey": jnp.array(20.0), "hunters": jnp.array(0.02)}
    prior = po.RelativeScale(po.RosenbrockIOUP(3))
    own = po.Solver(prior, po.TS1(po.ODE(f)), strategy=strategy, controller=po.IntegralController(1e-8, 1e-11))
    ts = np.linspace(0, 2, 5)
    solution = own.solve(u0, 0.0, 2.0, save_at=ts)
    expected = po.solve_ivp(lotka_volterra, (0.0, 2.0), jnp.array([20.0, 20.0]), t_eval=ts, rtol=1e-10, atol=1e-10)
    assert relative(solution.mean["prey"], expected.mean[:, 0]) < 1e-7
    assert relative(1e3 * solution.mean["hunters"], expected.mean[:, 1]) < 1e-7


@pytest.mark.thorough
def test_derivatives():
    def mean(x):
        prior = po.RelativeScale(po.IWP(2), x[2])
        own = po.Solver(prior, po.TS1(po.ODE(lotka_volterra)), calibration=po.NoCalibration())
        return own.solve_grid(x[:2], np.linspace(0.0, 1.0, 6)).mean[-1]

    check_jacobians(mean, jnp.array([20.0, 15.0, 0.5]))


def test_errors():
    with pytest.raises(ValueError, match=r"RelativeScale\(floor\)"):
        po.RelativeScale(po.IWP(2), 0.0)
    with pytest.raises(ValueError, match=r"needs a prior with u'' at least.*num_derivatives=1"):
        po.RelativeScale(po.IWP(1))
    with pytest.raises(TypeError, match="a prior with an output_scale"):
        po.RelativeScale(po.TS1)
    with pytest.raises(ValueError, match=r"Isotropic\(\) has one output scale"):
        solver(po.TS0, factorisation=po.Isotropic()).solve_grid(jnp.ones(3), [0.0, 1.0])
    with pytest.raises(ValueError, match="from an equation and the state where a step starts"):
        po.sample_prior(po.RelativeScale(po.IWP(2)), jax.random.key(0), [0.0, 1.0], jnp.ones(1))


def test_a_body_at_rest_that_falls_with_drag_from_an_uncertain_height():
    """``u' = 0`` beside ``u''' != 0``: the size of the change is a root of zero, whose derivative is infinite."""
    fall = lambda t, u, args: jnp.stack([u[1], -9.81 - 0.1 * u[1]])  # noqa: E731
    solver = po.Solver(po.RelativeScale(po.IWP(4)), po.TS1(po.ODE(fall)), controller=po.IntegralController(1e-6, 1e-6))
    spread = np.diag([0.02, 0.01])
    solution = solver.solve(po.Normal(jnp.array([1.0, 0.0]), jnp.asarray(spread)), 0.0, 0.5)
    flow = np.array([[1, (1 - np.exp(-0.05)) / 0.1], [0, np.exp(-0.05)]])
    np.testing.assert_allclose(solution.std[0], np.linalg.norm(flow @ spread, axis=1), rtol=1e-5)
    slope = jax.jit(jax.jacfwd(lambda u0: solver.solve(u0, 0.0, 0.5).mean[0]))(jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(slope, flow, atol=1e-5)
