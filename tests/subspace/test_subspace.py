"""Covariances on a subspace: what they share with dense ones, how sure they are, and how large they may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import probode as po
from probode.testing.laws import difference_quotient

from ..helpers import first_of, logistic, name, pendulum, relative


D = 8
LAPLACIAN = D**2 * (np.eye(D, k=1) + np.eye(D, k=-1) - 2 * np.eye(D))
MODES = np.linalg.eigh(LAPLACIAN)[1][:, ::-1]
U0 = jnp.sin(jnp.pi * jnp.linspace(0, 1, D)) + 0.2


def heat(t, u, args):
    """Reaction and diffusion; advection makes the Jacobian unsymmetric."""
    p = 1.0 if args is None else args
    slope = jnp.diff(u, prepend=0.0) * D
    return 0.02 * jnp.asarray(LAPLACIAN, u.dtype) @ u + p * (u - u**3) - 0.1 * slope


def solver(factorisation, field=heat, nu=2, tol=1e-4, **parts):
    parts = {"error": po.StateError(), "controller": po.IntegralController(tol, tol)} | parts
    return po.Solver(po.IWP(nu), po.TS1(po.ODE(field)), factorisation=factorisation, **parts)


@pytest.mark.thorough
@pytest.mark.parametrize("calibration", first_of(po.DynamicCalibration(), po.NoCalibration()), ids=name)
def test_the_whole_space_is_dense(calibration):
    basis = np.random.default_rng(0).normal(size=(D, D))
    ours, dense = (solver(f, calibration=calibration) for f in (po.Subspace(basis, tol=1e-12), po.Dense()))
    times = jnp.linspace(0.0, 1.0, 5)
    for run in (lambda s: s.solve(U0, 0.0, 1.0, save_at=times), lambda s: s.solve_grid(U0, jnp.linspace(0, 0.4, 9))):
        own, expected = run(ours), run(dense)
        assert own.stats["num_steps"] == expected.stats["num_steps"]
        for k in range(3):
            assert relative(own.derivative(k).mean, expected.derivative(k).mean) < 1e-8
            assert relative(own.derivative(k).std, expected.derivative(k).std) < 1e-8
    assert jnp.isnan(own.log_likelihood)


def fitzhugh_nagumo(t, y, args):
    k = y.size // 2
    u, v = y[:k], y[k:]

    def diffusion(u):
        p = jnp.pad(u, 1, mode="edge")
        return (p[2:] - 2 * u + p[:-2]) * k**2

    return jnp.concatenate([0.01 * diffusion(u) + 10 * (u - u**3 - v), 0.1 * diffusion(v) + 2 * (u - 0.5 * v + 0.1)])


@pytest.mark.thorough
def test_errors_are_as_large_as_they_say():
    x = jnp.linspace(0, 1, 30)
    u0 = jnp.concatenate([jnp.cos(3 * jnp.pi * x), 0.3 * jnp.cos(jnp.pi * x)])
    field, jacobian = (jax.jit(f) for f in (fitzhugh_nagumo, jax.jacfwd(fitzhugh_nagumo, 1)))
    reference = solve_ivp(
        lambda t, y: np.asarray(field(t, y, None)),
        (0, 1),
        np.asarray(u0),
        method="Radau",
        jac=lambda t, y: np.asarray(jacobian(t, y, None)),
        rtol=1e-8,
        atol=1e-10,
        dense_output=True,
    )
    norm = 1.2 * np.linalg.norm(jacobian(0.0, u0, None), 2)
    for rank, bound in ((10, norm), (24, None)):
        basis = po.rightmost_basis(po.ODE(fitzhugh_nagumo), 0.0, u0, rank)
        own = solver(po.Subspace(basis, norm=bound), fitzhugh_nagumo, loop=po.BoundedLoop(200))
        solution = own.solve(u0, 0.0, 1.0, save_at=po.SaveAt(steps=True))
        steps = int(solution.stats["num_accepted_steps"])
        assert steps < 40
        error = solution.mean[:steps] - reference.sol(np.asarray(solution.t[:steps])).T
        chi = np.mean((error / solution.std[:steps]) ** 2, axis=1)
        assert np.max(np.abs(error)) < 1e-2
        assert np.max(chi) < 10 and np.max(chi) > 1e-3


def cosines(n, r):
    """The smoothest modes of diffusion on a square without flux through its boundary, their rates, and those of an
    interval."""
    k = np.arange(n)
    rate = 4 * n**2 * np.sin(np.pi * k / 2 / n) ** 2
    wave = np.cos(np.pi * np.outer((k + 0.5) / n, k))
    wave /= np.linalg.norm(wave, axis=0)
    pairs = sorted(((i, j) for i in k for j in k), key=lambda ij: rate[ij[0]] + rate[ij[1]])[:r]
    modes = np.stack([np.outer(wave[:, i], wave[:, j]).ravel() for i, j in pairs], axis=1)
    return modes, np.array([rate[i] + rate[j] for i, j in pairs]), wave, rate


@pytest.mark.thorough
def test_ten_thousand_components():
    n, diffusivity = 100, 0.02
    modes, rates, wave, rate = cosines(n, 40)

    def field(t, u, args):
        p = jnp.pad(u, 1, mode="edge")
        laplacian = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u
        return diffusivity * n**2 * laplacian - u

    # A mixture of modes inside the basis and outside; the solution is known.
    weights = n * np.random.default_rng(0).normal(size=40) / (1 + np.arange(40))
    exact = lambda t: (modes @ (weights * np.exp(-(diffusivity * rates + 1) * t))).reshape(n, n)  # noqa: E731

    def fast(p11, p01, p00):
        eigenvalue = -diffusivity * (rate[:, None] + rate)
        scale = p11 - 2 * p01 * eigenvalue + p00 * eigenvalue**2
        return lambda v: (wave @ ((wave.T @ v.reshape(n, n) @ wave) / scale) @ wave.T).ravel()

    factorisation = po.Subspace(modes[:, :10], preconditioner=fast)
    own = solver(factorisation, field, tol=1e-3, loop=po.ForwardLoop(30))
    solution = own.solve(jnp.asarray(exact(0.0)), 0.0, 0.3)
    error = np.asarray(solution.mean[-1] - exact(0.3))
    assert np.sqrt(np.mean(error**2)) < 1e-2 * np.sqrt(np.mean(exact(0.3) ** 2))
    assert np.mean((error / solution.std[-1]) ** 2) < 10
    assert solution.std.shape == (1, n, n)


@pytest.mark.thorough
def test_derivatives_in_both_modes():
    own = solver(po.Subspace(MODES[:, :4], tol=1e-12), loop=po.BoundedLoop(16))

    @jax.jit
    def adaptive(p):
        solution = own.solve(U0 * p, 0.0, 0.1, args=p)
        return jnp.sum(solution.mean**2) + 1e3 * jnp.sum(solution.std**2)

    @jax.jit
    def on_grid(p):
        solution = own.solve_grid(U0, jnp.linspace(0.0, 0.2, 5), args=p)
        return jnp.sum(solution.mean**2) + 1e3 * jnp.sum(solution.std[1:])

    one, step = jnp.asarray(1.0), 1e-4
    expected = difference_quotient(lambda h: on_grid(one + h), step)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(on_grid))(one), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(on_grid))(one), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(adaptive))(one), jax.jit(jax.grad(adaptive))(one), rtol=1e-8)


@pytest.mark.thorough
def test_states_times_and_lanes():
    tree = {"a": U0[:5], "b": U0[5:].reshape(1, D - 5)}

    def field(t, u, args):
        flat = heat(t, jnp.concatenate([u["a"], u["b"].ravel()]), args)
        return {"a": flat[:5], "b": flat[5:].reshape(1, D - 5)}

    factorisation, times = po.Subspace(MODES[:, :4]), jnp.linspace(0.0, 0.5, 4)
    own = solver(factorisation, field).solve(tree, 0.0, 0.5, save_at=times)
    flat = solver(factorisation).solve(U0, 0.0, 0.5, save_at=times)
    assert own.mean["b"].shape == own.std["b"].shape == (4, 1, D - 5)
    np.testing.assert_allclose(own.std["b"][:, 0], flat.std[:, 5:], rtol=1e-6)
    assert np.all(flat.std[1:] > 0) and np.all(flat.std[0] == 0)

    lanes = jax.vmap(lambda u0: solver(factorisation).solve(u0, 0.0, 0.5, save_at=times))(jnp.stack([U0, 0.5 * U0]))
    np.testing.assert_allclose(lanes.mean[0], flat.mean, rtol=1e-6)
    np.testing.assert_allclose(lanes.std[0], flat.std, rtol=1e-4, atol=1e-12)

    # Between steps it predicts; at the end of one it is that step. A solve may go on.
    dense = solver(factorisation).solve(U0, 0.0, 0.5, save_at=po.SaveAt(dense=True, steps=True))
    np.testing.assert_allclose(dense.evaluate(times[1:]).std, flat.std[1:], rtol=1e-6)
    half = solver(factorisation).solve(U0, 0.0, 0.25)
    rest = solver(factorisation).solve(half.state, 0.25, 0.5)
    assert relative(rest.mean[-1], flat.mean[-1]) < 1e-3
    again = solver(factorisation).solve(solver(factorisation).initialise(U0, 0.0), 0.0, 0.5)
    np.testing.assert_allclose(again.mean[-1], flat.mean[-1], rtol=1e-8)


@pytest.mark.thorough
def test_single_precision():
    own = solver(po.Subspace(MODES[:, :4]), tol=1e-3)
    single, double = (own.solve(U0.astype(dtype), 0.0, 0.5) for dtype in (jnp.float32, jnp.float64))
    assert single.mean.dtype == single.std.dtype == jnp.float32
    assert relative(single.mean, double.mean) < 1e-3 and relative(single.std, double.std) < 0.1


@pytest.mark.thorough
def test_a_solve_without_convergence_is_no_answer():
    short = po.Subspace(MODES[:, :2], tol=1e-10, max_krylov=2)
    grid = solver(short).solve_grid(U0, jnp.linspace(0.0, 1.0, 5))
    assert grid.result == po.Result.nonfinite and jnp.all(jnp.isnan(grid.mean[1:]))
    # Steps get so short that the Jacobian does not matter; or the solve says that it did not arrive.
    patient = solver(short, loop=po.BoundedLoop(64)).solve(U0, 0.0, 1.0, throw=False)
    assert patient.result == po.Result.max_steps_reached and jnp.all(jnp.isfinite(patient.mean))
    assert patient.stats["num_rejected_steps"] > 5


@pytest.mark.thorough
def test_preconditioner():
    laplacian = 0.02 * LAPLACIAN

    def exact(p11, p01, p00):
        return lambda v: jnp.linalg.solve(p11 * jnp.eye(D) - 2 * p01 * laplacian + p00 * laplacian @ laplacian, v)

    plain = solver(po.Subspace(MODES[:, :4], tol=1e-10)).solve(U0, 0.0, 0.5)
    helped = po.Subspace(MODES[:, :4], tol=1e-10, preconditioner=exact)
    np.testing.assert_allclose(solver(helped).solve(U0, 0.0, 0.5).mean, plain.mean, rtol=1e-6)
    # It may take a third of the iterations.
    grid = jnp.linspace(0.0, 0.5, 4)
    few = po.Subspace(MODES[:, :4], tol=1e-10, max_krylov=10, preconditioner=exact)
    assert solver(few).solve_grid(U0, grid).result == po.Result.successful
    assert solver(po.Subspace(MODES[:, :4], tol=1e-10, max_krylov=5)).solve_grid(U0, grid).result == po.Result.nonfinite


def test_the_rightmost_modes():
    ode = po.ODE(lambda t, u, args: 0.02 * jnp.asarray(LAPLACIAN) @ u)
    basis = po.rightmost_basis(ode, 0.0, U0, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-10)
    np.testing.assert_allclose(basis @ (basis.T @ MODES[:, :3]), MODES[:, :3], atol=1e-6)
    assert po.rightmost_basis(ode, 0.0, U0, D).shape == (D, D)
    with pytest.raises(ValueError, match="order one"):
        po.rightmost_basis(po.ODE(pendulum, order=2), 0.0, (U0, U0), 2)
    with pytest.raises(ValueError, match="rank"):
        po.rightmost_basis(ode, 0.0, U0, D + 1)
    with pytest.raises(TypeError, match="must be an ODE"):
        po.rightmost_basis(heat, 0.0, U0, 2)


@pytest.mark.parametrize(
    ("basis", "settings", "words"),
    [
        (np.ones(3), {}, "shape"),
        (np.ones((2, 3)), {}, "1 <= r <= d"),
        (np.ones((3, 2)), {}, "linearly independent"),
        (np.full((3, 1), np.nan), {}, "finite"),
        (np.eye(3), {"tol": 0.0}, "tol"),
        (np.eye(3), {"norm": -1.0}, "norm"),
        (np.eye(3), {"max_krylov": 0}, "max_krylov"),
        (np.eye(3), {"preconditioner": 3}, "preconditioner"),
    ],
)
def test_settings_that_make_no_sense(basis, settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        po.Subspace(basis, **settings)


ODE = po.ODE(logistic)


@pytest.mark.parametrize(
    ("prior", "constraint", "parts", "words"),
    [
        (po.Matern(2, length_scale=1.0), po.TS1(ODE), {}, "use the prior IWP"),
        (po.IWP(2), po.TS0(ODE), {}, "TS1"),
        (po.IWP(2), po.TS1(ODE, evaluations=2), {}, "evaluations=1"),
        (po.IWP(2), po.TS1(po.Residual(lambda t, u, du, args: du - u)), {}, "must be an ODE"),
        (po.IWP(2), po.TS1(po.ODE(pendulum, order=2)), {}, "order one"),
        (po.IWP(2), po.TS1(po.ODE(logistic, jacobian=lambda t, u, args: u)), {}, "leave jacobian out"),
        (po.IWP(2), po.TS1(ODE), {"strategy": po.FixedIntervalSmoother()}, "strategy=Filter"),
        (po.IWP(2), po.TS1(ODE), {"calibration": po.LeaveOneOutCalibration()}, "DynamicCalibration"),
        (po.IWP(2), po.TS1(ODE), {"calibration": po.DynamicCalibration(memory=0.5)}, "MLECalibration"),
        (po.IWP(2), po.TS1(ODE), {"error": po.ResidualError()}, "StateError"),
    ],
)
def test_parts_that_it_has_no_formulas_for(prior, constraint, parts, words):
    with pytest.raises(ValueError, match=words):
        po.Solver(prior, constraint, factorisation=po.Subspace(np.eye(3, 2)), **parts)


@pytest.mark.thorough
def test_uses_that_it_has_no_formulas_for():
    factorisation = po.Subspace(MODES[:, :3])
    own = solver(factorisation)
    data = po.Observations(jnp.array([0.5]), jnp.ones((1, D)), 0.1)
    with pytest.raises(ValueError, match=f"{D} rows, but u has 5"):
        solver(factorisation, logistic).solve(U0[:5], 0.0, 1.0)
    with pytest.raises(ValueError, match="uncertain u0 is not available"):
        own.solve(po.Normal(U0, 0.1 * U0), 0.0, 1.0)
    with pytest.raises(ValueError, match="data is not available"):
        own.solve(U0, 0.0, 1.0, data=data)
    with pytest.raises(ValueError, match="use strategy=Filter"):
        po.fenrir_log_likelihood(own, U0, 0.0, 1.0, data)
    with pytest.raises(ValueError, match="data is not available"):
        po.filtering_log_likelihood(own, U0, 0.0, 1.0, data)
    with pytest.raises(ValueError, match="scalar output_scale"):
        po.Solver(po.IWP(2, output_scale=U0), po.TS1(po.ODE(heat)), factorisation=factorisation).solve(U0, 0.0, 1.0)
    solution = own.solve(U0, 0.0, 0.1)
    with pytest.raises(ValueError, match="Sampling is not available"):
        solution.sample(jax.random.key(0))
    with pytest.raises(ValueError, match="calibration_report is not available"):
        po.calibration_report(solution, lambda t: jnp.ones((1, D)), show=False)
    with pytest.raises(ValueError, match="prior_marginals is not available"):
        po.prior_marginals(po.IWP(2), jnp.ones(1), U0, factorisation=factorisation)
