"""The calibration report against errors and covariances that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import FACTORISATIONS, lotka_volterra, name


GRID = np.linspace(0.0, 2.0, 21)
U0 = jnp.array([20.0, 20.0])


def solve(factorisation, strategy):
    parts = {"factorisation": factorisation, "strategy": strategy}
    return po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)), **parts).solve_grid(U0, GRID)


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_measures_of_known_errors(factorisation):
    """The reference is the mean plus what a plain NumPy formula says is one, two or three standard deviations."""
    solution = solve(factorisation, po.Filter())
    size = 1.0 + np.arange(GRID.size) % 3
    reference = np.asarray(solution.mean + 0.999 * size[:, None] * solution.std)
    report = po.calibration_report(solution, lambda t: reference, show=False)
    assert report.steps.shape == (1,) and report.coverage.shape == (1, 3) and np.isnan(report.smoothed[0])
    later = GRID > 0.2
    np.testing.assert_allclose(report.coverage[0], [np.mean(size[later] <= k) for k in (1, 2, 3)], rtol=1e-12)

    def chi(k):
        error, x = reference[k] - solution.mean[k], np.asarray(solution.marginals.factor[k])
        if isinstance(factorisation, po.Dense):
            covariance = (x.T @ x)[:2, :2]
        else:
            covariance = np.diag(np.asarray(solution.std[k]) ** 2)
        return error @ np.linalg.solve(covariance, error) / 2

    expected = np.array([chi(k) for k in np.flatnonzero(later)])
    np.testing.assert_allclose(report.anees[0], expected.mean(), rtol=1e-9)
    np.testing.assert_allclose(report.trajectory[0], np.exp(np.mean(np.log(expected))), rtol=1e-9)
    np.testing.assert_allclose(report.terminal[0], expected[-1], rtol=1e-9)
    np.testing.assert_allclose(report.inclination[0], 10 * np.mean(np.log10(expected)), rtol=1e-9)
    np.testing.assert_allclose(report.non_credibility[0], 10 * np.mean(abs(np.log10(expected))), rtol=1e-9)
    end = reference[-1] - solution.mean[-1]
    np.testing.assert_allclose(report.error[0], np.linalg.norm(end) / np.linalg.norm(reference[-1]), rtol=1e-6)


def test_smoothers_are_measured_twice():
    filtered, smoothed = solve(po.Dense(), po.Filter()), solve(po.Dense(), po.FixedIntervalSmoother())
    reference = np.asarray(smoothed.mean) * (1 + 1e-6)
    one, both = (po.calibration_report(s, lambda t: reference, show=False) for s in (filtered, smoothed))
    np.testing.assert_allclose(both.trajectory, one.trajectory, rtol=1e-6)
    assert np.isfinite(both.smoothed[0]) and not np.isclose(both.smoothed[0], both.trajectory[0])
    np.testing.assert_allclose(both.terminal, one.terminal, rtol=1e-6)


@pytest.mark.thorough
def test_draws_from_the_posterior_have_the_measures_of_a_gaussian():
    solution = solve(po.Dense(), po.FixedIntervalSmoother())
    samples = np.asarray(solution.sample(jax.random.key(0), (200,)))
    reports = [po.calibration_report(solution, lambda t, x=x: x, show=False) for x in samples]
    anees = np.array([r.anees[0] for r in reports])
    assert abs(anees.mean() - 1) < 4 * anees.std() / np.sqrt(200)
    coverage = np.mean([r.coverage[0] for r in reports], axis=0)
    np.testing.assert_allclose(coverage, [0.6827, 0.9545, 0.9973], atol=0.03)


@pytest.mark.thorough
def test_a_sweep_over_tolerances(capsys):
    def reference(t):
        return (np.exp(-2.0 * t), np.stack([np.exp(-2.0 * t)] * 2, axis=-1))

    u0 = (jnp.asarray(1.0), jnp.ones(2))
    solver = po.Solver(
        po.IWP(3),
        po.TS1(po.ODE(lambda t, u, args: (-args * u[0], -args * u[1]))),
        strategy=po.FixedIntervalSmoother(),
        calibration=po.LeaveOneOutCalibration(),
        loop=po.ForwardLoop(256),
    )
    sweep = {"u0": u0, "t0": 0.0, "t1": 2.0, "args": 2.0, "tolerances": (1e-3, 1e-5)}
    report = po.calibration_report(solver, reference, **sweep)
    assert capsys.readouterr().out.strip() == str(report).strip()
    assert len(str(report).splitlines()) == 3
    np.testing.assert_array_equal(report.rtol, [1e-3, 1e-5])
    assert report.successful.all() and report.error[1] < report.error[0] < 1e-3
    assert np.all((report.trajectory > 1e-3) & (report.trajectory < 10))


def test_a_failed_solve_has_no_measures():
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)), loop=po.ForwardLoop(5))
    report = po.calibration_report(solver, lambda t: 0, u0=U0, t0=0.0, t1=20.0, tolerances=(1e-6,), show=False)
    assert not report.successful[0] and np.isnan(report.terminal[0]) and "did not reach" in str(report)
