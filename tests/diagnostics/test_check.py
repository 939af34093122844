"""Reasons to doubt a solution: found where there are some, and nowhere else; the measures against other routes."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import probode as po
from probode.diagnostics import check
from probode.posterior.origin import origin_of, with_origin

from ..helpers import first_of, left_to_nox, lotka_volterra


matplotlib.use("Agg")


def forced(t, u, args):
    """Decay with a pulse, a step and a kink in the forcing, and a smooth one; all are numbers in ``args``."""
    pulse = args["pulse"] * jnp.exp(-(((t - args["at"]) / args["width"]) ** 2))
    step = args["step"] * (t > args["at"]) + args["kink"] * jnp.abs(t - args["at"])
    return -args["rate"] * u + pulse + step + args["wave"] * jnp.cos(t)


NOTHING = {"pulse": 0.0, "at": 5.3, "width": 0.01, "step": 0.0, "kink": 0.0, "rate": 1.0, "wave": 0.0}
SOLVER = po.Solver(po.RelativeScale(po.IWP(4)), po.TS1(po.ODE(forced)), controller=po.IntegralController(1e-4, 1e-6))
DENSE = po.SaveAt(t0=True, dense=True)


def solve(u0=0.0, t1=10.0, solver=SOLVER, save_at=DENSE, **args):
    return solver.solve(u0, 0.0, t1, args=NOTHING | args, save_at=save_at, throw=False)


@pytest.mark.parametrize(
    ("args", "kind", "t"),
    [
        ({"pulse": 1.0}, "unseen", 5.3),
        ({"pulse": 1.0, "width": 0.003, "at": 7.7}, "unseen", 7.7),
        ({"step": 1.0, "at": 3.3}, "jump", 3.3),
        ({"kink": 1.0, "at": 4.2}, "kink", 4.2),
        ({"u0": -0.3, "rate": -3.0, "wave": 1.0}, "sensitive", None),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_what_is_wrong_is_found(args, kind, t):
    report = solve(**args).check()
    assert not report.is_trusted
    found = {finding.kind: finding for finding in report.findings}
    assert kind in found
    if t is not None:
        assert abs(found[kind].t - t) < 0.05
    assert found[kind].message and found[kind].remedy and kind in str(report)


@pytest.mark.parametrize(
    "args",
    [
        {"wave": 1.0},
        {"pulse": 1.0, "width": 1.0, "wave": 1.0},
        {"rate": 100.0, "wave": 1.0},
        {"rate": -0.1, "wave": 1.0},
        {"pulse": 10.0, "width": 0.15, "wave": 1.0},  # steps are cut where it begins
    ],
)
def test_what_is_right_is_left_alone(args):
    report = solve(u0=1.0, **args).check()
    assert report.findings == () and report.is_trusted and report.not_looked_at == ()
    assert "No reason" in str(report)


def test_the_residual_is_that_of_the_prediction_between_the_steps():
    """By ``Solution.evaluate`` and the formula of an implicit step of Euler's method, in NumPy."""
    solution, args = solve(u0=1.0, wave=1.0, rate=2.0), NOTHING | {"wave": 1.0, "rate": 2.0}
    report = solution.check()
    t, at = report.t, report.residual_t
    step = np.searchsorted(t, at, side="right") - 1
    here = solution.evaluate(at)
    residual = np.asarray(here.derivative(1).mean - forced(at, here.mean, args))
    dt, u = np.diff(t)[step], np.abs(np.asarray(solution.evaluate(t).mean))
    allowed = np.maximum(1e-6 + 1e-4 * u[step], 1e-6 + 1e-4 * u[step + 1])
    np.testing.assert_allclose(report.residual, np.abs(dt / (1 + 2.0 * dt) * residual) / allowed, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("order", [1, *left_to_nox(2)])
def test_errors_grow_as_the_equation_says(order):
    """Against the exact transition of a linear equation: ``u'' = 4 u``, or the rate two."""
    if order == 1:
        ode, matrix, u0 = po.ODE(lambda t, u, args: 2.0 * u), np.array([[2.0]]), 1.0
    else:
        ode, matrix = po.ODE(lambda t, u, du, args: 4.0 * u, order=2), np.array([[0.0, 1.0], [4.0, 0.0]])
        u0 = (1.0, 2.0)
    solver = po.Solver(po.IWP(4), po.TS1(ode), controller=po.IntegralController(1e-6, 1e-6))
    solution = solver.solve(u0, 0.0, 3.0, save_at=DENSE)
    report = solution.check()
    values, vectors = np.linalg.eig(matrix)
    covariance, expected = np.zeros_like(matrix), [0.0]
    weight = 1e-6 + 1e-6 * np.abs(np.asarray(solution.evaluate(report.t).mean))
    for i, dt in enumerate(np.diff(report.t)):
        through = (vectors * np.exp(values * dt)) @ np.linalg.inv(vectors)
        covariance = through @ covariance @ through.T
        covariance[0, 0] += (0.3 * max(weight[i], weight[i + 1])) ** 2
        expected.append(np.sqrt(covariance[0, 0]) / weight[i + 1])
    np.testing.assert_allclose(report.growth, expected, rtol=2e-3)
    np.testing.assert_allclose(np.sort(report.eigenvalues.real[0]), np.sort(values.real), atol=1e-9)


def test_steps_that_were_not_kept_are_taken_again():
    kept, ended = solve(pulse=1.0), solve(pulse=1.0, save_at=None)
    one, two = kept.check(), ended.check()
    np.testing.assert_array_equal(one.t, two.t)
    assert [finding.kind for finding in one.findings] == [finding.kind for finding in two.findings]
    assert "solved again" in str(two) and "solved again" not in str(one)


@pytest.mark.parametrize("dense", first_of(False, True))
def test_the_deviation_of_an_uncertain_start_and_the_numerical_part_of_it(dense):
    """Without kept steps the solve is repeated from the same distribution, not from its mean."""
    start = po.Normal(1.0, 0.16)
    solution = po.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), start, dense_output=dense, rtol=1e-6, atol=1e-9)
    facts = dict(solution.check().facts)
    assert f"up to {np.max(solution.std):.2g} in u" in facts["standard deviation"]
    assert float(facts["numerical part"].split()[2]) < 1e-5
    assert ("steps" in facts) != dense


def test_a_successful_solution_that_is_not_a_number_is_doubted():
    solution = solve(pulse=1.0)
    spoilt = eqx.tree_at(lambda s: s.marginals.factor, solution, jnp.full_like(solution.marginals.factor, jnp.nan))
    report = with_origin(spoilt, origin_of(solution)).check()
    assert report.findings[0].kind == "nonfinite" and not report.is_trusted


@pytest.mark.thorough
def test_a_second_solve_finds_what_the_steps_do_not_show(monkeypatch):
    """Errors that grow, where the Jacobian is thought too large to look at, and the covariance does not know it."""
    monkeypatch.setattr(check, "_LARGEST", 0)
    solver = po.Solver(po.IWP(4), po.TS0(po.ODE(forced)), controller=SOLVER.controller)
    solution = solve(u0=-0.3, rate=-3.0, wave=1.0, solver=solver, t1=5.0)
    assert solution.check().is_trusted and "large" in solution.check().not_looked_at[0]
    assert [finding.kind for finding in solution.check(thorough=True).findings] == ["differs"]
    assert solve(u0=1.0, wave=1.0, solver=solver).check(thorough=True).findings == ()


def test_a_failed_solve_says_why():
    solver = po.Solver(SOLVER.prior, SOLVER.constraint, loop=po.BoundedLoop(5), controller=SOLVER.controller)
    finding = solve(u0=1.0, wave=1.0, solver=solver).check().findings[0]
    assert finding.kind == "failed" and "max_steps" in finding.message and "throw" not in finding.message


@pytest.mark.thorough
def test_standard_deviations_without_calibration_are_doubted():
    parts = {"calibration": po.NoCalibration(), "controller": po.IntegralController(1e-4, 1e-6)}
    solver = po.Solver(po.IWP(4), po.TS1(po.ODE(lotka_volterra)), **parts)
    report = solver.solve(jnp.array([20.0, 20.0]), 0.0, 10.0, save_at=DENSE).check()
    assert "miscalibrated" in [finding.kind for finding in report.findings]


@pytest.mark.thorough
def test_stiffness_is_advice_and_no_doubt():
    solver = po.Solver(po.IWP(3), po.TS0(po.ODE(forced)))
    report = solve(solver=solver, rate=300.0, wave=300.0, t1=1.5).check()
    assert [finding.kind for finding in report.findings] == ["stiff"]
    assert report.is_trusted and not report.findings[0].is_doubt and "cost less" in str(report)


@pytest.mark.thorough
def test_jumps_at_stops_and_events_are_expected():
    controller = po.IntegralController(1e-4, 1e-6, stop_at=[3.3])
    solver = po.Solver(SOLVER.prior, SOLVER.constraint, controller=controller)
    assert solve(solver=solver, step=1.0, at=3.3).check().findings == ()


def test_components_without_a_digit_are_told():
    kinds = [finding.kind for finding in solve(u0=1e-8).check().findings]
    assert kinds == ["tolerance"]


@pytest.mark.parametrize(
    "parts",
    left_to_nox(
        {"constraint": po.TS0(po.ODE(forced)), "factorisation": po.Isotropic()},
        {"constraint": po.TS0(po.ODE(forced).lifted(3)), "factorisation": po.BlockDiagonal()},
        {"constraint": po.TS1(po.ODE(forced)), "strategy": po.FixedIntervalSmoother()},
        {"constraint": po.TS1(po.ODE(forced)), "strategy": po.FixedPointSmoother()},
        {"constraint": po.TS1(po.ODE(forced)), "factorisation": po.Modal()},
        {"constraint": po.TS1(po.ODE(forced)), "calibration": po.MLECalibration()},
        {"constraint": po.SLR1(po.ODE(forced))},
        {"prior": po.Matern(3, 1.0), "constraint": po.TS1(po.ODE(forced))},
    ),
)
def test_with_all_kinds_of_parts(parts):
    constraint, prior = parts["constraint"], parts.get("prior", po.IWP(4))
    rest = {name: part for name, part in parts.items() if name not in ("constraint", "prior")}
    solver = po.Solver(prior, constraint, controller=SOLVER.controller, **rest)
    save_at = None if isinstance(rest.get("strategy"), po.FixedPointSmoother) else DENSE
    u0 = jnp.array([0.0, 0.5])
    pulse = solve(u0=u0, solver=solver, save_at=save_at, pulse=1.0, rate=0.2)
    end = (pulse.evaluate(10.0) if pulse.is_dense else pulse).mean
    # What the pulse leaves, in a component that is zero without it.
    left = np.sqrt(np.pi) * 0.01 * np.exp(-0.2 * (10 - 5.3))
    is_seen = abs(np.ravel(end)[0] - left) < 0.1 * left
    assert is_seen == isinstance(prior, po.Matern), "it takes short steps, as it forgets what lies far behind"
    assert is_seen == ("unseen" not in [finding.kind for finding in pulse.check().findings])
    assert solve(u0=1.0 + u0, solver=solver, save_at=save_at, wave=1.0).check().is_trusted


@pytest.mark.thorough
def test_other_problems_are_looked_at_as_far_as_possible():
    implicit = po.Residual(lambda t, u, du, args: du + u - jnp.cos(t))
    report = po.Solver(po.IWP(3), po.TS1(implicit)).solve(1.0, 0.0, 5.0, save_at=DENSE).check()
    assert report.findings == () and "Residual, not an ODE" in report.not_looked_at[0] and report.t.size > 3
    grid = SOLVER.solve_grid(0.0, np.linspace(0.0, 10.0, 21), args=NOTHING | {"pulse": 1.0, "rate": 0.1}).check()
    assert [finding.kind for finding in grid.findings] == ["unseen"]


@pytest.mark.thorough
def test_fields_that_are_not_finite_inside_of_a_step_are_told():
    """The filter's prediction between steps leaves the domain of the field, the solution does not."""
    root = po.ODE(lambda t, u, args: jnp.where(jnp.abs(t - 0.77) < 1e-3, jnp.nan, -u))
    solver = po.Solver(po.IWP(3), po.TS1(root), controller=po.IntegralController(1e-3, 1e-3))
    report = solver.solve(1.0, 0.0, 1.0, save_at=DENSE, throw=False).check()
    assert any("NaN" in words for words in report.not_looked_at) or report.findings[0].kind == "failed"
    assert np.all(np.isfinite(report.residual))


@pytest.mark.thorough
def test_boundary_values_large_systems_and_subspaces():
    bvp = po.solve_bvp(
        po.ODE(lambda t, u, du, args: -u, order=2), lambda a, b, args: (a[0], b[0] - 1.0), (0.0, 1.0), lambda t: t
    )
    assert not bvp.check().is_trusted and "boundary value" in bvp.check().not_looked_at[0]
    u0 = jnp.linspace(1.0, 2.0, 100)
    large = po.solve_ivp(lambda t, u, args: -u, (0.0, 2.0), u0, method="EK0", dense_output=True).check()
    assert large.is_trusted and large.growth is None and "large" in large.not_looked_at[0]


def test_solutions_of_compiled_functions_need_their_solver():
    made = jax.jit(lambda u0: SOLVER.solve(u0, 0.0, 10.0, args=NOTHING | {"pulse": 1.0}, save_at=DENSE))(0.0)
    report = made.check()
    assert report.findings == () and "check(solver" in report.not_looked_at[0]
    assert not report.is_trusted and "not looked at" in str(report)
    assert made.check(SOLVER, args=NOTHING | {"pulse": 1.0}).findings[0].kind == "unseen"
    solution = solve(wave=1.0)
    assert copy.copy(solution).check().not_looked_at and not solution.check().not_looked_at
    assert pickle.loads(pickle.dumps(SOLVER)) is not None  # and with it a solution, which does not hold its solver
    assert jax.tree.structure(solution) == jax.tree.structure(solve(u0=2.0, wave=1.0))


def test_wrong_use():
    solution = solve(wave=1.0)
    with pytest.raises(TypeError, match="thorough"):
        solution.check(thorough=1)
    with pytest.raises(TypeError, match="must be the Solver"):
        solution.check("EK1")
    lanes = jax.vmap(lambda u0: SOLVER.solve(u0, 0.0, 1.0, args=NOTHING))(jnp.arange(3.0))
    with pytest.raises(ValueError, match="batch"):
        lanes.check()


def test_the_picture_and_the_table():
    report = solve(pulse=1.0).check()
    ax = report.plot()
    assert len(ax.get_lines()) >= 4 and ax.get_yscale() == "log"
    assert "unseen" in report._repr_html_() and "<table>" in report._repr_html_()
