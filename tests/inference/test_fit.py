"""Fits: against closed forms, finite differences, several starts, and what is said when they fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po


TS = np.array([0.5, 1.0, 2.0, 3.0])
SOLVER = po.Solver(
    po.IWP(3),
    po.TS1(po.ODE(lambda t, u, args: -args["rate"] * u)),
    controller=po.IntegralController(1e-8, 1e-8),
    loop=po.BoundedLoop(512),
)
NOISE = 0.05
VALUES = 2.0 * np.exp(-1.3 * TS) + NOISE * np.array([0.3, -0.5, 0.8, 0.1])
DATA = po.Observations(TS, VALUES, NOISE)


def start(parameters):
    return parameters["size"]


def residuals(size, rate):
    return (VALUES - size * np.exp(-rate * TS)) / NOISE


def least_squares(prior=None):
    """The optimum by Newton's method with the exact solution, and the inverse of the Hessian there."""

    def objective(x):
        z = (jnp.asarray(VALUES) - x[1] * jnp.exp(-x[0] * jnp.asarray(TS))) / NOISE
        away = 0.0 if prior is None else jnp.sum(((x - prior[0]) / prior[1]) ** 2)
        return 0.5 * (jnp.sum(z**2) + away)

    x = jnp.array([1.3, 2.0])
    for _ in range(20):
        x = x - jnp.linalg.solve(jax.hessian(objective)(x), jax.grad(objective)(x))
    return np.asarray(x), np.asarray(jnp.linalg.inv(jax.hessian(objective)(x)))


def test_the_optimum_and_its_curvature_are_those_of_least_squares():
    guess = {"rate": 1.0, "size": 1.5}
    found = po.fit(SOLVER, start, 0.0, 3.0, DATA, guess, args=lambda p: {"rate": p["rate"]})
    expected, covariance = least_squares()
    np.testing.assert_allclose([found.parameters["rate"], found.parameters["size"]], expected, rtol=1e-5)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-3)
    np.testing.assert_allclose(found.std["size"] ** 2, found.covariance[1, 1])
    assert found.converged.shape == (1,) and bool(found.converged[0]) and "rate" in found.summary()
    density = -0.5 * np.sum(residuals(*expected[::-1]) ** 2) - TS.size * np.log(NOISE * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found.log_density, density, rtol=1e-6)
    np.testing.assert_allclose(found.solution.mean, expected[1] * np.exp(-expected[0] * TS), rtol=1e-6)


@pytest.mark.thorough
def test_a_prior_is_added_and_several_starts_agree():
    """Positive parameters are found by their logarithms."""
    prior = po.Normal({"rate": 1.0, "size": 1.5}, {"rate": 0.1, "size": 0.2})
    many = po.fit(SOLVER, start, 0.0, 3.0, DATA, prior, args=lambda p: {"rate": p["rate"]}, starts=3, positive=True)
    expected, covariance = least_squares((np.array([1.0, 1.5]), np.array([0.1, 0.2])))
    np.testing.assert_allclose([many.parameters["rate"], many.parameters["size"]], expected, rtol=1e-5)
    np.testing.assert_allclose(many.covariance, covariance, rtol=0.1)  # of the logarithms
    np.testing.assert_allclose(many.log_densities, many.log_density, rtol=1e-6)
    assert many.ends["rate"].shape == (3,) and many.starts["rate"][0] == 1.0


@pytest.mark.thorough
def test_a_prior_may_have_any_square_root():
    """A full one, turned by a rotation, is the same prior as the triangular one."""
    root, turn = np.array([[0.1, 0.03], [0.0, 0.2]]), np.array([[0.6, 0.8], [-0.8, 0.6]])
    args = lambda p: {"rate": p["rate"]}  # noqa: E731
    guess = {"rate": 1.0, "size": 1.5}
    one, two = (
        po.fit(SOLVER, start, 0.0, 3.0, DATA, po.Normal(guess, jnp.asarray(x)), args=args) for x in (root, turn @ root)
    )
    np.testing.assert_allclose(two.log_density, one.log_density, rtol=1e-9)
    np.testing.assert_allclose(two.parameters["rate"], one.parameters["rate"], rtol=1e-5)
    inverse = np.linalg.inv(root.T @ root)
    away = np.array([one.parameters["rate"] - 1.0, one.parameters["size"] - 1.5])
    density = -0.5 * np.sum(residuals(one.parameters["size"], one.parameters["rate"]) ** 2)
    density -= TS.size * np.log(NOISE * np.sqrt(2 * np.pi)) + 0.5 * away @ inverse @ away
    np.testing.assert_allclose(one.log_density, density, rtol=1e-6)


@pytest.mark.thorough
def test_tempering_finds_what_a_plain_fit_does_not():
    """A pendulum of unknown length, from a start with another number of swings."""
    ts = np.linspace(0.0, 10.0, 101)[1:]
    ode = po.ODE(lambda t, u, du, args: -9.81 / args * jnp.sin(u), order=2)
    u0 = (jnp.pi / 4, 0.0)
    exact = po.Solver(po.IWP(6), po.TS1(ode), controller=po.IntegralController(1e-8, 1e-8))
    noise = 0.1 * np.random.default_rng(0).normal(size=ts.size)
    data = po.Observations(ts, exact.solve(u0, 0.0, 10.0, args=3.0, save_at=ts).mean + noise, 0.1)
    fixed = po.IntegralController(1e3, 1e3, dt_max=0.05)
    solver = po.Solver(po.IWP(4), po.TS1(ode), calibration=po.NoCalibration(), controller=fixed)
    starts = jnp.array([0.5, 1.0, 1.5])
    plain = po.fit(solver, u0, 0.0, 10.0, data, 1.0, starts=starts, positive=True)
    tempered = po.fit(
        solver, u0, 0.0, 10.0, data, 1.0, starts=starts, positive=True, tempering=po.DiffusionTempering(stages=11)
    )
    near = lambda found: np.sum(abs(np.asarray(found.ends) / 3 - 1) < 0.05)  # noqa: E731
    assert near(tempered) == 3 > near(plain)


def test_wrong_use():
    solve = lambda guess, **options: po.fit(SOLVER, 1.0, 0.0, 3.0, DATA, guess, **options)  # noqa: E731
    with pytest.raises(ValueError, match="draws starts from a Normal"):
        solve({"rate": 1.0}, starts=4)
    with pytest.raises(ValueError, match="guess that is positive"):
        solve({"rate": -1.0}, positive=True)
    with pytest.raises(ValueError, match="PyTree like the guess"):
        solve({"rate": 1.0}, starts={"rates": jnp.ones(3)})
    with pytest.raises(TypeError, match="function of the parameters"):
        solve({"rate": 1.0}, args={"rate": 1.0})
    with pytest.raises(ValueError, match="nothing to fit"):
        solve({})
    with pytest.raises(ValueError, match="prior of the parameters"):
        solve(po.Normal({"rate": 1.0}, {"rate": -1.0}))
