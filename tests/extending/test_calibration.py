"""A calibration written outside the package."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import FACTORISATIONS, first_of, name


class MaximumLikelihood(po.AbstractCalibration):
    """One scale for the whole solve: the mean of the whitened residuals squared (Tronarp et al. 2019)."""

    def init(self, shape, dtype):
        return jnp.zeros(shape, dtype), jnp.zeros((), dtype)

    def scale(self, innovation, statistics):
        return innovation.unit

    def update(self, statistics, scale, whitened, informative):
        total, count = statistics
        return total + jnp.where(informative, jnp.mean(whitened**2, axis=(-2, -1)), 0), count + informative

    def finalise(self, statistics):
        total, count = statistics
        return jnp.sqrt(total / count)


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS[::-1]), ids=name)
def test_a_calibration_that_collects_statistics(factorisation):
    def solve(calibration, scale=1.0):
        prior = po.IWP(2, output_scale=scale)
        constraint = po.TS1(po.ODE(lambda t, u, args: -u))
        solver = po.Solver(prior, constraint, factorisation=factorisation, calibration=calibration)
        return solver.solve_grid(jnp.array([1.0]), np.linspace(0, 1, 11))

    calibrated, plain = solve(MaximumLikelihood()), solve(po.NoCalibration())
    np.testing.assert_allclose(calibrated.output_scale**2, 0.0428314233992825, rtol=1e-12)
    np.testing.assert_array_equal(calibrated.mean, plain.mean)
    np.testing.assert_allclose(calibrated.std, plain.std * jnp.sqrt(0.0428314233992825), rtol=1e-12)
    # whatever the prior's own scale, the calibrated uncertainty is the same
    np.testing.assert_allclose(solve(MaximumLikelihood(), 7.0).std, calibrated.std, rtol=1e-11)


@pytest.mark.parametrize("factorisation", first_of(po.Dense(), po.BlockDiagonal()), ids=name)
def test_one_that_rescales_has_no_place_beside_what_is_known(factorisation):
    # It would scale the noise of data, and the spread of an uncertain start, by what it has found.
    def solver(calibration):
        constraint = po.TS1(po.ODE(lambda t, u, args: -u))
        return po.Solver(po.IWP(3), constraint, calibration=calibration, factorisation=factorisation)

    assert [c.rescales for c in (po.NoCalibration(), po.DynamicCalibration())] == [False, False]
    data = po.Observations(jnp.array([0.5, 1.0]), jnp.array([0.6, 0.37]), 0.1, observe=lambda t, u, args: u)
    known = solver(po.NoCalibration())
    learnt = known.solve(known.initialise(po.Normal(1.0, 0.3), 0.0), 0.0, 1.0, data=data)
    # u(1) = u0 exp(-1), with the precision of the start and of both data.
    precision = 0.3**-2 + (np.exp(-0.5) / 0.1) ** 2 + (np.exp(-1) / 0.1) ** 2
    np.testing.assert_allclose(learnt.std[-1], np.exp(-1) / np.sqrt(precision), rtol=1e-2)
    for calibration in (MaximumLikelihood(), po.MLECalibration(), po.LeaveOneOutCalibration()):
        assert calibration.rescales
        refused = solver(calibration)
        start = refused.initialise(po.Normal(1.0, 0.3), 0.0)
        with pytest.raises(ValueError, match="rescales all covariances"):
            refused.solve(start, 0.0, 1.0, data=data)
        with pytest.raises(ValueError, match="rescales all covariances"):
            refused.solve_grid(start, np.linspace(0, 1, 5), data=data)
        with pytest.raises(ValueError, match="rescales all covariances"):
            refused.solve(po.Normal(1.0, 0.3), 0.0, 1.0)
        # The uncertainty is in a state that the user has made; without data.
        with pytest.raises(ValueError, match="rescales all covariances"):
            refused.solve_grid(start, np.linspace(0, 1, 5))
        smoother = dataclasses.replace(refused, strategy=po.FixedIntervalSmoother())
        with pytest.raises(ValueError, match="rescales all covariances"):
            po.solve_grid_iterated(smoother, po.Normal(1.0, 0.3), np.linspace(0, 1, 5))
        # Variances of higher derivatives are the model's own.
        diffuse = dataclasses.replace(refused, initialisation=po.Diffuse(1))
        assert np.all(np.isfinite(diffuse.solve_grid(diffuse.initialise(1.0, 0.0), np.linspace(0, 1, 5)).std))


class OnePerComponent(MaximumLikelihood):
    """For ``BlockDiagonal`` alone."""

    def init(self, shape, dtype):
        (d,) = shape
        return jnp.zeros(d, dtype), jnp.zeros((), dtype)


def test_one_for_a_factorisation_alone_is_refused_with_data_in_the_same_words():
    constraint = po.TS1(po.ODE(lambda t, u, args: -u))
    solver = po.Solver(po.IWP(2), constraint, calibration=OnePerComponent(), factorisation=po.BlockDiagonal())
    data = po.Observations(jnp.array([0.5]), jnp.array([0.6]), 0.1, observe=lambda t, u, args: u[0])
    with pytest.raises(ValueError, match=r"OnePerComponent\(\) rescales all covariances"):
        solver.solve(jnp.array([1.0]), 0.0, 1.0, data=data)


@pytest.mark.parametrize(
    ("made_by", "goes_on", "words"),
    [
        ({}, {"calibration": po.NoCalibration()}, r"another calibration, NoCalibration\(\)"),
        ({}, {"calibration": MaximumLikelihood()}, r"another calibration, MaximumLikelihood\(\)"),
        ({"calibration": po.MLECalibration()}, {}, r"another calibration, DynamicCalibration\(\)"),
        ({}, {"calibration": po.DynamicCalibration(memory=0.5)}, r"other options, DynamicCalibration\(.*memory=0.5"),
        ({}, {"prior": po.IWP(3)}, "2 derivatives, this solver's prior has 3"),
        ({}, {"factorisation": po.BlockDiagonal()}, r"factorisation Dense\(\), this solver has BlockDiagonal"),
    ],
    ids=name,
)
def test_a_step_goes_on_with_the_same_parts(made_by, goes_on, words):
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(lambda t, u, args: -u)))
    state = dataclasses.replace(solver, **made_by).init(jnp.ones(2), 0.0)
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(solver, **goes_on).step(state, 0.1)
