"""Statistical linear regression against exact moments, the Taylor linearisation, and full covariances."""

import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.algebra.factorisations import Layout

from ..helpers import FACTORISATIONS, check_jacobians, first_of, lotka_volterra, name, pendulum, relative


U0 = jnp.array([20.0, 20.0])
GRID = np.linspace(0.0, 1.0, 6)
RULES = (po.SphericalCubature(), po.UnscentedTransform(), po.GaussHermite(3))


def affine(t, u, args):
    return jnp.array([[0.5, -0.2], [0.1, -0.5]]) @ u + jnp.cos(t)


def diagonal(t, u, args):
    return jnp.array([0.5, -0.5]) * u + jnp.cos(t)


def on_grid(constraint, nu=2, u0=U0, **parts):
    return po.Solver(po.IWP(nu), constraint, **{"calibration": po.NoCalibration()} | parts).solve_grid(u0, GRID)


def uncertain(factorisation=po.Dense(), n=3, seed=0):
    """A layout, and a state whose factor has more rows than it needs."""
    layout = Layout(factorisation, n - 1, 2, lambda u: u, jnp.dtype("float64"))
    rng = np.random.default_rng(seed)
    mean = layout.pack(jnp.asarray(rng.standard_normal((n, 2))))
    factor = jnp.asarray(0.3 * rng.standard_normal((*layout.batch_shape, mean.shape[-2] + 2, mean.shape[-2])))
    return layout, po.Normal(mean, factor)


# --- Rules


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("cubature", RULES, ids=name)
def test_rules_are_exact_to_degree_three(cubature, dim):
    points, weights = cubature.rule(dim)
    assert np.all(weights > 0) and abs(np.sum(weights) - 1) < 1e-14
    np.testing.assert_allclose(weights @ points, 0, atol=1e-14)
    np.testing.assert_allclose((points.T * weights) @ points, np.eye(dim), atol=1e-13)
    np.testing.assert_allclose(np.einsum("p,pi,pj,pk", weights, points, points, points), 0, atol=1e-13)


def test_gauss_hermite_is_exact_to_its_degree():
    points, weights = po.GaussHermite(4).rule(2)
    moments = [weights @ (points[:, 0] ** i * points[:, 1] ** j) for i, j in [(2, 4), (6, 0), (4, 6), (7, 0)]]
    np.testing.assert_allclose(moments, [3, 15, 45, 0], atol=1e-11)


def test_the_unscented_transform_matches_fourth_moments():
    points, weights = po.UnscentedTransform(kappa=1.0).rule(2)
    np.testing.assert_allclose(weights @ points[:, 0] ** 4, 3, rtol=1e-13)


# --- Linearisations


@pytest.mark.parametrize("cubature", RULES, ids=name)
def test_moments_of_a_quadratic_field(cubature):
    # Of u0 u1 the mean is m0 m1 + P01, the slope (m1, m0).
    layout, state = uncertain()
    covariance = np.asarray(state.factor.T @ state.factor)
    m = np.asarray(layout.unpack(state.mean))
    equation = po.SLR1(po.ODE(lotka_volterra), cubature=cubature).linearise(jnp.array(0.0), state, layout, None)
    product = m[0, 0] * m[0, 1] + covariance[0, 1]
    field = np.array([0.5 * m[0, 0] - 0.05 * product, -0.5 * m[0, 1] + 0.05 * product])
    slope = np.array([[0.5 - 0.05 * m[0, 1], -0.05 * m[0, 0]], [0.05 * m[0, 1], -0.5 + 0.05 * m[0, 0]]])
    np.testing.assert_allclose(equation.residual[:, 0], m[1] - field, rtol=1e-12)
    np.testing.assert_allclose(equation.matrix, np.concatenate([-slope, np.eye(2)], axis=1), rtol=1e-12, atol=1e-14)
    assert equation.gives == range(1, 2) and equation.noise is None


def test_what_a_quadratic_field_leaves_unexplained():
    # The variance of u0 u1 beyond its linear part is P00 P11 + P01^2 (Isserlis); degree four asks for three points.
    layout, state = uncertain()
    covariance = np.asarray(state.factor.T @ state.factor)
    constraint = po.SLR1(po.ODE(lotka_volterra), cubature=po.GaussHermite(3), noise=True)
    equation = constraint.linearise(jnp.array(0.0), state, layout, None)
    variance = covariance[0, 0] * covariance[1, 1] + covariance[0, 1] ** 2
    expected = 0.05**2 * variance * np.array([[1, -1], [-1, 1]])
    np.testing.assert_allclose(equation.noise.T @ equation.noise, expected, rtol=1e-11)
    assert equation.gives is None


def test_zeroth_order():
    layout, state = uncertain()
    covariance, m = np.asarray(state.factor.T @ state.factor), np.asarray(layout.unpack(state.mean))
    equation = po.SLR0(po.ODE(lotka_volterra)).linearise(jnp.array(0.0), state, layout, None)
    product = m[0, 0] * m[0, 1] + covariance[0, 1]
    field = np.array([0.5 * m[0, 0] - 0.05 * product, -0.5 * m[0, 1] + 0.05 * product])
    np.testing.assert_allclose(equation.residual[:, 0], m[1] - field, rtol=1e-12)
    np.testing.assert_array_equal(equation.matrix, np.concatenate([np.zeros((2, 2)), np.eye(2)], axis=1))


@pytest.mark.parametrize("cubature", first_of(*RULES), ids=name)
@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_affine_fields_are_taken_as_they_are(factorisation, cubature):
    a = on_grid(po.TS1(po.ODE(affine)), factorisation=factorisation)
    b = on_grid(po.SLR1(po.ODE(affine), cubature=cubature), factorisation=factorisation)
    assert relative(a.mean, b.mean) < 1e-13 and relative(a.std, b.std) < 1e-12


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS[:2]), ids=name)
def test_affine_fields_leave_nothing_unexplained(factorisation):
    a = on_grid(po.TS1(po.ODE(diagonal)), factorisation=factorisation)
    b = on_grid(po.SLR1(po.ODE(diagonal), noise=True), factorisation=factorisation)
    assert relative(a.mean, b.mean) < 1e-13 and relative(a.std, b.std) < 1e-12


def test_what_the_structure_does_not_keep_becomes_noise():
    exact = on_grid(po.TS1(po.ODE(affine)))
    blind = on_grid(po.SLR1(po.ODE(affine)), factorisation=po.BlockDiagonal())
    aware = on_grid(po.SLR1(po.ODE(affine), noise=True), factorisation=po.BlockDiagonal())
    assert jnp.all(aware.std[2:] > blind.std[2:])  # until then there is no spread
    assert relative(aware.mean, exact.mean) < 1e-3


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_a_certain_state_is_no_special_case(factorisation):
    layout, state = uncertain(factorisation)
    certain = po.Normal(state.mean, 0 * state.factor)
    for regression, taylor in ((po.SLR1, po.TS1), (po.SLR0, po.TS0)):
        a, b = (
            c(po.ODE(lotka_volterra)).linearise(jnp.array(0.0), certain, layout, None) for c in (regression, taylor)
        )
        np.testing.assert_allclose(a.matrix, b.matrix, rtol=1e-13)
        np.testing.assert_allclose(a.residual, b.residual, rtol=1e-13)


@pytest.mark.thorough
def test_residuals_and_higher_orders():
    implicit = po.Residual(lambda t, u, du, args: 2 * (du - lotka_volterra(t, u, args)))
    a, b = on_grid(po.SLR1(implicit)), on_grid(po.TS1(po.ODE(lotka_volterra)))
    assert relative(a.mean, b.mean) < 1e-5 and relative(a.mean, b.mean) > 0
    start = (jnp.array(1.0), jnp.array(0.0))
    a, b = (on_grid(c(po.ODE(pendulum, order=2)), 3, start) for c in (po.SLR1, po.TS1))
    assert relative(a.mean, b.mean) < 1e-6 and relative(a.mean, b.mean) > 0


# --- Solves


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("constraint", "calibration"),
    first_of(
        (lambda ode: po.SLR1(ode), po.DynamicCalibration(relinearise=True)),
        (lambda ode: po.SLR1(ode, noise=True), po.DynamicCalibration()),
        (lambda ode: po.SLR0(ode), po.DynamicCalibration()),
    ),
)
def test_adaptive_solves(constraint, calibration):
    solver = po.Solver(
        po.IWP(4),
        constraint(po.ODE(lotka_volterra)),
        calibration=calibration,
        strategy=po.FixedPointSmoother(),
        controller=po.IntegralController(1e-6, 1e-6),
    )
    solution = solver.solve(U0, 0.0, 10.0, save_at=np.array([5.0, 10.0]))
    reference = np.array([11.86150846, 2.63118858])  # SciPy's DOP853 at 1e-13
    assert relative(solution.mean[1], reference) < 1e-4
    assert jnp.all(jnp.abs(solution.mean[1] - reference) < 10 * solution.std[1])


@pytest.mark.thorough
def test_gradients():
    def quantities(x):
        constraint = po.SLR1(po.ODE(lotka_volterra), noise=True)
        solver = po.Solver(po.IWP(2, output_scale=x[3]), constraint, calibration=po.NoCalibration())
        solution = solver.solve_grid(x[:2], GRID, args=(x[2], 0.05, 0.5, 0.05))
        return jnp.concatenate([solution.mean[-1], jnp.log(solution.std[-1]), solution.log_likelihood[None]])

    x = jnp.array([20.0, 20.0, 0.5, 3.0])
    check_jacobians(quantities, x)


# --- Wrong use


def test_errors():
    ode = po.ODE(lotka_volterra)
    with pytest.raises(TypeError):
        po.SLR1(lotka_volterra)
    with pytest.raises(TypeError):
        po.SLR0(po.Residual(lambda t, u, du, args: du))
    with pytest.raises(TypeError):
        po.SLR1(ode, cubature="unscented")
    with pytest.raises(ValueError, match="positive"):
        po.UnscentedTransform(kappa=-0.5)
    with pytest.raises(ValueError, match="GaussHermite"):
        po.GaussHermite(0)
    with pytest.raises(ValueError, match="use SphericalCubature"):
        po.GaussHermite(3).rule(20)
    with pytest.raises(ValueError, match="one covariance for all components"):
        on_grid(po.SLR1(ode, noise=True), factorisation=po.Isotropic())
