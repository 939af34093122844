"""Learning from data within the state: initial values, parameters among the components, latent forces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import central_differences, lotka_volterra, relative


def field(t, u, args):
    return jnp.stack([u[1] * u[0] * (1 - u[0]) + jnp.sin(t), 0.0 * u[1]])


@pytest.mark.parametrize("factorisation", [po.Dense(), po.BlockDiagonal()], ids=["Dense", "BlockDiagonal"])
def test_an_uncertain_start_moves_its_derivatives_along(factorisation):
    root, mean = np.array([[0.3, 0.1], [0.0, 0.2]]), np.array([0.4, 1.3])
    made = po.Solver(po.IWP(3), po.TS1(po.ODE(field)), factorisation=factorisation)
    state = made.initialise(po.Normal(jnp.asarray(mean), jnp.asarray(root)), 0.5)

    def derivatives(u0):
        return jnp.concatenate(made.initialise(u0, 0.5).mean)

    np.testing.assert_allclose(jnp.concatenate(state.mean), derivatives(mean), rtol=1e-14)
    moves = root @ central_differences(derivatives, mean, 1e-3).T
    covariance = moves.T @ moves
    if isinstance(factorisation, po.Dense):
        np.testing.assert_allclose(state.factor.T @ state.factor, covariance, rtol=1e-8, atol=1e-10)
    else:
        for i in range(2):
            np.testing.assert_allclose(
                state.factor[i].T @ state.factor[i], covariance[i::2, i::2], rtol=1e-8, atol=1e-10
            )
    with pytest.raises(ValueError, match="BlockDiagonal"):
        po.Solver(po.IWP(3), po.TS1(po.ODE(field)), factorisation=po.Isotropic()).initialise(po.Normal(mean, mean), 0.5)


@pytest.mark.thorough
def test_intervals_of_a_parameter_cover_it_as_often_as_they_say():
    # A growth rate as a component that does not change: 200 data sets from the model, one solve each.
    number, ts, noise, deviation = 200, np.linspace(0.5, 5.0, 10), 0.05, 0.3
    rng = np.random.default_rng(0)
    rates = 1.0 + deviation * rng.normal(size=number)
    values = 1 / (1 + 9 * np.exp(-rates[:, None] * ts)) + noise * rng.normal(size=(number, 10))
    ode = po.ODE(lambda t, u, args: {"x": u["rate"] * u["x"] * (1 - u["x"]), "rate": jnp.zeros(())})
    made = po.Solver(po.IWP(3), po.TS1(ode), strategy=po.FixedIntervalSmoother(), calibration=po.NoCalibration())
    start = made.initialise(po.Normal({"x": 0.1, "rate": 1.0}, {"x": 1e-9, "rate": deviation}), 0.0)

    @jax.jit
    @jax.vmap
    def posterior(values):
        data = po.Observations(ts, values, noise, observe=lambda t, u, args: u["x"])
        solution = po.solve_grid_iterated(made, start, np.linspace(0.0, 5.0, 21), data=data, max_iterations=16)
        return solution.mean["rate"][-1], solution.std["rate"][-1], solution.mean["rate"][0]

    mean, std, first = posterior(jnp.asarray(values))
    # it does not change
    assert relative(mean, first) < 1e-3
    assert 0.85 <= np.mean(abs(mean - rates) < 1.645 * std) <= 0.95
    # and was learnt
    assert np.mean(std) < 0.5 * deviation


@pytest.mark.thorough
def test_a_latent_force_in_one_pass():
    # x' = -x + force, where nobody knows the force but that it is smooth; its posterior is that of a linear problem.
    ts, noise = np.linspace(0.25, 6.0, 24), 0.02
    rng = np.random.default_rng(1)

    def truth(t, u, args):
        return -u + jnp.sin(t)

    exact = po.solve_ivp(truth, (0.0, 6.0), jnp.zeros(1), t_eval=ts, rtol=1e-9, atol=1e-9).mean[:, 0]
    data = po.Observations(ts, exact + noise * rng.normal(size=24), noise, observe=lambda t, u, args: u["x"])
    equation = po.Residual(lambda t, u, du, args: du["x"] + u["x"] - u["force"])
    rate = np.sqrt(5) / 2.0
    prior = po.LinearSDE(
        2,
        tuple({"x": 0.0, "force": -factor} for factor in (rate**3, 3 * rate**2, 3 * rate)),  # Matern for the force
        output_scale={"x": 3.0, "force": 3.0},
    )
    made = po.Solver(
        prior,
        po.TS1(equation),
        strategy=po.FixedPointSmoother(),
        calibration=po.NoCalibration(),
        error=po.StateError(norm=lambda error: jnp.abs(error[1])),  # no step makes the force any surer
        controller=po.IntegralController(1e-4, 1e-4, dt_max=0.25),
        initialisation=po.Diffuse(0),
    )
    certain = made.initialise({"x": 0.0, "force": 0.0}, 0.0)
    # everything but x is unknown; components go in the order of their names
    unknown = jnp.diag(jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    solution = made.solve(po.InitialState(certain.mean, unknown), 0.0, 6.0, data=data, save_at=ts)
    error = solution.mean["force"] - np.sin(ts)
    assert np.max(np.abs(error)) < 0.25
    assert 0.1 < np.mean(error**2 / solution.std["force"] ** 2) < 3
    assert np.max(np.abs(solution.mean["x"] - exact)) < 3 * noise


@pytest.mark.thorough
def test_a_start_is_learnt_as_the_push_forward_says():
    # Observed at the end alone, without noise to speak of: the start that leads there.
    rates = (0.5, 0.05, 0.5, 0.05)
    made = po.Solver(
        po.IWP(4),
        po.TS1(po.ODE(lotka_volterra)),
        strategy=po.FixedIntervalSmoother(),
        controller=po.IntegralController(1e-8, 1e-8),
    )
    true = jnp.array([21.0, 18.5])
    end = made.solve(true, 0.0, 2.0, args=rates).mean
    start = made.initialise(po.Normal(jnp.array([20.0, 18.0]), jnp.array([1.0, 1.0])), 0.0, args=rates)
    found = made.solve(start, 0.0, 2.0, args=rates, data=po.Observations([2.0], end, 1e-6))
    # One linearisation: off by the square of the distance.
    assert jnp.max(jnp.abs(found.evaluate(0.0).mean - true)) < 0.1
    assert jnp.max(jnp.abs(found.mean[-1] - end[0])) < 1e-4


@pytest.mark.parametrize("factorisation", [po.Dense(), po.BlockDiagonal()], ids=["Dense", "BlockDiagonal"])
def test_a_frozen_field_does_not_tell_about_an_uncertain_start(factorisation):
    # Derivatives that moved with u were residuals of the equation, and u was known after a step: 3e-5 instead of 1e-3.
    made = po.Solver(
        po.IWP(3), po.TS0(po.ODE(lotka_volterra)), factorisation=factorisation, calibration=po.NoCalibration()
    )
    start = made.initialise(po.Normal(jnp.array([20.0, 20.0]), 1e-3 * jnp.ones(2)), 0.0)
    np.testing.assert_allclose(made.solve_grid(start, np.linspace(0, 0.1, 11)).std[-1], 1e-3, rtol=1e-2)
