"""Likelihoods of data: they agree where the equation is linear, with each other and with the joint Gaussian."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .. import oracles
from ..helpers import central_differences, first_of, lotka_volterra
from ..information.test_observations import GRID, MASK, MATRIX, ROOT, SEEN, VALUES, joint, linear, solver, start


LIKELIHOODS = (po.fenrir_log_likelihood, po.dalton_log_likelihood, po.filtering_log_likelihood)
# So loose that the steps are those between the times to be hit: those of data on the whole grid, some of them unseen.
ON_GRID = po.IntegralController(1e3, 1e3, dt_min=1.0)
UNTIL = float(GRID[-1])


def on_the_grid(values, mask, seen):
    """The data with a time for every point of the grid."""
    everywhere, there = np.zeros((GRID.size, 2)), np.zeros((GRID.size, 2), bool)
    everywhere[seen], there[seen] = values, True if mask is None else mask
    return po.Observations(GRID, everywhere, ROOT, mask=there)


@pytest.mark.parametrize("mask", first_of(MASK, None), ids=["some", "all"])
@pytest.mark.parametrize("likelihood", first_of(*LIKELIHOODS[:2]), ids=lambda f: f.__name__)
def test_the_density_given_the_whole_equation(likelihood, mask):
    made = solver(controller=ON_GRID)
    data = on_the_grid(VALUES, mask, SEEN)
    got = likelihood(made, start(made), 0.0, UNTIL, data)
    mean, covariance, z, y, r = joint(made, mask)
    x, p = oracles.condition(mean, covariance, z, z @ mean)
    expected = oracles.log_density(VALUES.ravel() if mask is None else VALUES[mask], y @ x, y @ p @ y.T + r)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", first_of(*LIKELIHOODS[::-1]), ids=lambda f: f.__name__)
def test_of_the_end_alone_it_is_the_density_of_what_the_filter_says(likelihood):
    made = solver(controller=ON_GRID)
    data = on_the_grid(VALUES[-1:], None, [-1])
    nothing = on_the_grid(VALUES[-1:], np.zeros((1, 2), bool), [-1])
    end = made.solve(start(made), 0.0, UNTIL, data=nothing).marginals
    factor = np.asarray(end.factor[-1])[:, :2]
    expected = oracles.log_density(VALUES[-1], np.asarray(end.mean[-1, :2, 0]), factor.T @ factor + ROOT.T @ ROOT)
    np.testing.assert_allclose(likelihood(made, start(made), 0.0, UNTIL, data), expected, rtol=1e-9)


def certain():
    """The prior that knows the equation, and how little there is to learn: no step makes any error."""
    prior = po.IOUP(2, MATRIX, output_scale=1e-7)
    return po.Solver(prior, po.TS1(po.ODE(linear)), calibration=po.NoCalibration(), controller=ON_GRID)


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", first_of(*LIKELIHOODS), ids=lambda f: f.__name__)
def test_all_agree_where_the_solution_is_certain(likelihood):
    ts = np.array([0.3, 0.31, 2.0])
    data = po.Observations(ts, VALUES[:3], ROOT)
    u = jax.vmap(lambda t: jax.scipy.linalg.expm(t * MATRIX) @ jnp.array([1.0, 0.5]))(ts)
    expected = sum(oracles.log_density(y, np.asarray(m), ROOT.T @ ROOT) for y, m in zip(VALUES, u, strict=False))
    got = likelihood(certain(), jnp.array([1.0, 0.5]), 0.0, UNTIL, data)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def pair(t, u, args):
    return lotka_volterra(t, u, tuple(args[:4]))


PARAMETERS = np.array([0.5, 0.05, 0.5, 0.05, 20.0, 18.0, 0.7, 1.3])  # rates, u0, noise, output scale
TS = np.array([0.4, 1.0, 1.5, 2.0])
SEEN_PREY = 20 + np.random.default_rng(4).normal(size=(4, 1))


def prey(t, u, args):
    return u[:1]


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", first_of(*LIKELIHOODS), ids=lambda f: f.__name__)
def test_derivatives(likelihood):
    stops = np.array([0.25, 0.8, 1.2, 1.8])
    controller = po.IntegralController(1e3, 1e3, stop_at=stops, dt_min=2.0)

    @jax.jit
    def evidence(x):
        parts = {"calibration": po.NoCalibration(), "controller": controller, "loop": po.BoundedLoop(16)}
        made = po.Solver(po.IWP(1, output_scale=x[7]), po.TS1(po.ODE(pair)), **parts)
        data = po.Observations(TS, SEEN_PREY, x[6], observe=prey)
        return likelihood(made, x[4:6], 0.0, 2.0, data, args=x[:4])

    expected = central_differences(lambda x: evidence(x)[None], PARAMETERS, 1e-4)[0]
    gradient = jax.jit(jax.grad(evidence))(jnp.asarray(PARAMETERS))
    assert np.min(np.abs(expected)) > 1e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", first_of(*LIKELIHOODS), ids=lambda f: f.__name__)
def test_adaptive_likelihoods_agree_with_the_solution(likelihood):
    # At tight tolerances the solver's uncertainty is nothing against the noise. Dalton's likelihood is a difference of
    # two solves, whose dynamic scales would be those of residuals at round-off.
    dalton = likelihood is po.dalton_log_likelihood
    parts = {"calibration": po.NoCalibration() if dalton else po.DynamicCalibration()}
    parts |= {"controller": po.IntegralController(1e-9, 1e-9), "factorisation": po.Isotropic()}
    made = po.Solver(po.IWP(4), po.TS0(po.ODE(pair)), **parts)
    rates, u0 = jnp.asarray(PARAMETERS[:4]), jnp.array([20.0, 18.0])
    values = made.solve(u0, 0.0, 2.0, args=rates, save_at=TS).mean + 0.1 * np.random.default_rng(3).normal(size=(4, 2))
    data = po.Observations(TS, values, 0.1, mask=np.array([True, True, False, True]))
    deviation = (values - made.solve(u0, 0.0, 2.0, args=rates, save_at=TS).mean)[np.array([0, 1, 3])] / 0.1
    expected = -jnp.sum(deviation**2) / 2 - 6 * np.log(0.1 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(likelihood(made, u0, 0.0, 2.0, data, args=rates), expected, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", first_of(*LIKELIHOODS), ids=lambda f: f.__name__)
def test_bad_parameters_are_improbable_and_have_finite_gradients(likelihood):
    made = po.Solver(po.IWP(1), po.TS1(po.ODE(lambda t, u, args: args * u**2)), loop=po.BoundedLoop(64))
    data = po.Observations([0.5, 1.0], np.ones((2, 1)), 0.1)

    def evidence(rate):
        return likelihood(made, jnp.ones(1), 0.0, 2.0, data, args=rate)

    # blows up at t = 1 / 5
    both = jax.jit(jax.vmap(jax.value_and_grad(evidence)))(jnp.array([5.0, -0.5]))
    assert both[0][0] == -jnp.inf and jnp.isfinite(both[0][1])
    assert both[1][0] == 0 and jnp.isfinite(both[1][1]) and both[1][1] != 0


def test_wrong_use():
    data = po.Observations([0.5], VALUES[:1], 0.1)
    for likelihood in LIKELIHOODS[1:]:
        with pytest.raises(ValueError, match="rescales"):
            likelihood(solver(calibration=po.MLECalibration()), jnp.ones(2), 0.0, 1.0, data)
    with pytest.raises(ValueError, match="lie in"):
        po.fenrir_log_likelihood(solver(), jnp.ones(2), 0.0, 0.4, data)
    with pytest.raises(TypeError, match="Observations"):
        po.fenrir_log_likelihood(solver(), jnp.ones(2), 0.0, 0.4, VALUES)


@pytest.mark.thorough
def test_tempering_finds_what_a_direct_fit_does_not():
    # The frequency of an oscillator from a start that is off by half: uphill on a grid, stage by stage.
    true, ts, rates = 2.0, np.linspace(0.0, 10.0, 41)[1:], np.linspace(0.5, 4.5, 101)
    ode = po.ODE(lambda t, u, du, args: -(args**2) * u, order=2)
    values = np.cos(true * ts)[:, None] + 0.05 * np.random.default_rng(0).normal(size=(40, 1))
    data = po.Observations(ts, values, 0.05)
    solver = po.Solver(po.IWP(3), po.TS1(ode), controller=po.IntegralController(1e3, 1e3, dt_max=0.25))

    @eqx.filter_jit
    def evidence(solver):
        u0 = (jnp.ones(1), jnp.zeros(1))
        return jax.vmap(lambda rate: po.fenrir_log_likelihood(solver, u0, 0.0, 10.0, data, args=rate))(rates)

    def uphill(values, i):
        while (best := max(range(max(i - 1, 0), min(i + 2, len(values))), key=values.__getitem__)) != i:
            i = best
        return i

    start = tempered = int(np.argmin(abs(rates - 3.0)))
    for stage in po.DiffusionTempering(largest=1e4, stages=9).solvers(solver):
        values = np.asarray(evidence(stage))
        tempered = uphill(values, tempered)
    assert abs(rates[tempered] - true) < 0.05 and abs(rates[uphill(values, start)] - true) > 0.5


def test_a_schedule_is_geometric_and_keeps_the_prior():
    schedule = po.DiffusionTempering()
    np.testing.assert_allclose(schedule.scales**2, 10.0 ** (20 - np.arange(21)), rtol=1e-12)
    made = po.Solver(po.IWP(2, output_scale={"a": 2.0, "b": 3.0}), po.TS1(po.ODE(linear)))
    last = list(schedule.solvers(made))[-1]
    assert last.prior.output_scale == {"a": 2.0, "b": 3.0} and isinstance(last.calibration, po.NoCalibration)
    with pytest.raises(ValueError, match="smallest"):
        po.DiffusionTempering(largest=0.1)
    with pytest.raises(ValueError, match="stages"):
        po.DiffusionTempering(stages=0)
