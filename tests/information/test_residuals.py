"""Implicit and differential-algebraic equations, invariants and stacks of equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .. import oracles
from ..helpers import FACTORISATIONS, check_jacobians, first_of, left_to_nox, lotka_volterra, name, pendulum, relative


U0 = jnp.array([20.0, 20.0])
GRID = np.linspace(0.0, 1.0, 11)


def on_grid(constraint, u0=U0, grid=GRID, nu=3, **parts):
    parts = {"calibration": po.NoCalibration()} | parts
    return po.Solver(po.IWP(nu), constraint, **parts).solve_grid(u0, grid)


def same(a, b, tolerance=1e-11):
    assert relative(a.mean, b.mean) < tolerance
    assert relative(a.std, b.std) < tolerance
    np.testing.assert_allclose(a.log_likelihood, b.log_likelihood, rtol=1e-8)


# --- An ODE as a residual is the ODE


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_the_residual_of_an_ode_is_the_ode(factorisation):
    explicit = po.TS1(po.ODE(lotka_volterra))
    implicit = po.TS1(po.Residual(lambda t, u, du, args: du - lotka_volterra(t, u, args)))
    parts = {"factorisation": factorisation, "strategy": po.FixedIntervalSmoother()}
    same(on_grid(explicit, **parts), on_grid(implicit, **parts))


@pytest.mark.thorough
def test_one_member_in_a_stack_is_that_member():
    ode = po.TS1(po.ODE(lotka_volterra))
    same(on_grid(ode), on_grid(po.Stack(ode)))
    same(on_grid(po.TS0(po.ODE(lotka_volterra))), on_grid(po.Stack(po.TS0(po.ODE(lotka_volterra)))))


@pytest.mark.thorough
@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_a_factor_in_front_of_the_equation_moves_the_evidence_alone(factorisation):
    plain = po.Residual(lambda t, u, du, args: du - lotka_volterra(t, u, args))
    scaled = po.Residual(lambda t, u, du, args: -100.0 * (du - lotka_volterra(t, u, args)))
    a, b = (on_grid(po.TS1(problem), factorisation=factorisation) for problem in (plain, scaled))
    assert relative(a.mean, b.mean) < 1e-12 and relative(a.std, b.std) < 1e-11
    # Two components in ten steps, each a hundred times as far apart.
    np.testing.assert_allclose(a.log_likelihood - b.log_likelihood, 20 * np.log(100.0), rtol=1e-6)


@pytest.mark.thorough
def test_of_second_order():
    explicit = po.TS1(po.ODE(pendulum, order=2))
    implicit = po.TS1(po.Residual(lambda t, u, du, ddu, args: 2 * (ddu - pendulum(t, u, du, args)), order=2))
    a, b = (on_grid(c, (jnp.array(1.0), jnp.array(0.0))) for c in (explicit, implicit))
    assert relative(a.mean, b.mean) < 1e-12 and relative(a.std, b.std) < 1e-10


# --- Against full covariances


def kalman(matrix_of, offset_of, noise, grid, derivatives):
    """The filter for ``H(t) x = c(t)``, prior IWP(2) in two components."""

    def linearise(i, mean):
        return matrix_of(grid[i]), matrix_of(grid[i]) @ mean - offset_of(grid[i])

    transitions = [oracles.iwp_transition(2, dt, 2) for dt in np.diff(grid)]
    return oracles.kalman_filter(np.concatenate(derivatives), np.zeros((6, 6)), transitions, linearise, noise)


def row(t):
    return np.array([[1.0, 2.0 + t, 0.5, -1.0, 0.3 * t, 0.0]])


def rows(t):
    return np.array(
        [[0.5, 1.0, 1.0, 0.2, 0.0, 0.1], [0.0, -1.0, 0.3, 1.0 + t, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.2, 1.0]]
    )


@pytest.mark.parametrize(("matrix_of", "offsets"), [(row, [0.7]), (rows, [1.0, -0.5, 0.3])])
def test_fewer_and_more_equations_than_components(matrix_of, offsets):
    offsets = jnp.array(offsets)

    def residual(t, u, du, ddu, args):
        x = jnp.concatenate([u, du, ddu])
        top = jnp.asarray(matrix_of(0.0))
        slope = jnp.asarray(matrix_of(1.0)) - top
        return (top + t * slope) @ x - offsets * jnp.cos(t)

    derivatives = np.array([[1.0, -1.0], [0.5, 0.2], [0.1, 0.3]])
    solver = po.Solver(po.IWP(2), po.TS1(po.Residual(residual, order=2)), calibration=po.NoCalibration())
    start = po.InitialState(tuple(jnp.asarray(derivatives)), jnp.zeros((6, 6)))
    solution = solver.solve_grid(start, GRID)
    mean, covariance, evidence = kalman(matrix_of, lambda t: np.asarray(offsets) * np.cos(t), 0.0, GRID, derivatives)
    np.testing.assert_allclose(solution.marginals.mean[-1, :, 0], mean, rtol=1e-8, atol=1e-10)
    factor = np.asarray(solution.marginals.factor[-1])
    np.testing.assert_allclose(factor.T @ factor, covariance, rtol=0, atol=1e-11 * np.max(np.abs(covariance)))
    np.testing.assert_allclose(solution.log_likelihood, evidence, rtol=1e-9)


class Noisy(po.AbstractConstraint):
    """Somebody's own constraint: an equation that holds up to noise."""

    problem: po.Residual
    std: float

    def linearise(self, t, predicted, layout, args):
        equation = po.TS1(self.problem).linearise(t, predicted, layout, args)
        noise = self.std * jnp.eye(equation.residual.shape[0])
        return type(equation)(equation.matrix, equation.residual, noise=noise)


def test_an_equation_with_noise():
    def residual(t, u, du, ddu, args):
        return jnp.asarray(row(0.0))[0] @ jnp.concatenate([u, du, ddu]) - 0.7

    derivatives = np.array([[1.0, -1.0], [0.5, 0.2], [0.1, 0.3]])
    constraint = Noisy(po.Residual(residual, order=2), 0.1)
    start = po.InitialState(tuple(jnp.asarray(derivatives)), jnp.zeros((6, 6)))
    solution = po.Solver(po.IWP(2), constraint, calibration=po.NoCalibration()).solve_grid(start, GRID)
    mean, covariance, evidence = kalman(lambda t: row(0.0), lambda t: np.array([0.7]), 0.01, GRID, derivatives)
    np.testing.assert_allclose(solution.marginals.mean[-1, :, 0], mean, rtol=1e-9, atol=1e-11)
    factor = np.asarray(solution.marginals.factor[-1])
    np.testing.assert_allclose(factor.T @ factor, covariance, rtol=0, atol=1e-12 * np.max(np.abs(covariance)))
    np.testing.assert_allclose(solution.log_likelihood, evidence, rtol=1e-10)


@pytest.mark.thorough
def test_noise_in_a_stack():
    plain = po.TS1(po.ODE(lotka_volterra))
    sum_of_both = po.Residual(lambda t, u, args: u.sum() - 40.0, order=0)
    loud = on_grid(po.Stack(plain, Noisy(sum_of_both, 1e6)))
    assert relative(loud.mean, on_grid(plain).mean) < 1e-10
    quiet = on_grid(po.Stack(plain, Noisy(sum_of_both, 1e-9)))
    exact = on_grid(po.Stack(plain, po.TS1(sum_of_both)))
    assert relative(quiet.mean, exact.mean) < 1e-7


# --- Differential-algebraic equations


def robertson(t, u, du, args):
    f1 = -0.04 * u[0] + 1e4 * u[1] * u[2]
    f2 = 0.04 * u[0] - 1e4 * u[1] * u[2] - 3e7 * u[1] ** 2
    return jnp.stack([du[0] - f1, du[1] - f2, u.sum() - 1])


@pytest.mark.thorough
def test_robertson_keeps_its_mass():
    solver = po.Solver(
        po.IWP(3),
        po.TS1(po.Residual(robertson)),
        controller=po.IntegralController(1e-7, 1e-11),
        loop=po.ForwardLoop(4096),
    )
    solution = solver.solve(jnp.array([1.0, 0.0, 0.0]), 0.0, 40.0, save_at=po.SaveAt(steps=True))
    assert np.max(np.abs(solution.mean.sum(axis=1) - 1)) < 1e-13
    # Hairer & Wanner (1996), section IV.10: u at t = 40.
    np.testing.assert_allclose(solution.mean[-1], [0.7158270688, 9.18553477e-06, 0.2841637457], rtol=1e-5)


@pytest.mark.thorough
def test_robertson_to_its_end_by_iterated_linearisations():
    # With one linearisation in a step, errors that its estimate does not see make the steps collapse again and again.
    solver = po.Solver(
        po.IWP(3),
        po.TS1(po.Residual(robertson), evaluations=4, relinearise=True),
        error=po.StateError(),  # what a single linearisation leaves out the iterations find
        controller=po.PIController(1e-4, 1e-8),  # steps that collapsed recover more slowly with one that never hurries
        loop=po.ForwardLoop(2048),
    )
    solution = solver.solve(jnp.array([1.0, 0.0, 0.0]), 0.0, 1e11)
    # Mazzia & Magherini (2008), "Test Set for Initial Value Problem Solvers": u at t = 1e11.
    end = [2.083340149701255e-8, 8.333360770334713e-14, 0.9999999791665050]
    np.testing.assert_allclose(solution.mean[-1], end, rtol=1e-3)
    assert solution.stats["last_move"] < 1e-2


def sir(t, u, args):
    infections, recoveries = 0.3 * u["s"] * u["i"] / 1000, 0.1 * u["i"]
    return {"s": -infections, "i": infections - recoveries, "r": recoveries}


@pytest.mark.thorough
def test_an_epidemic_with_its_conserved_population():
    def residual(t, u, du, args):
        f = sir(t, u, args)
        return du["s"] - f["s"], du["i"] - f["i"], u["s"] + u["i"] + u["r"] - 1000

    u0 = {"s": jnp.array(998.0), "i": jnp.array(1.0), "r": jnp.array(1.0)}
    controller = po.IntegralController(1e-9, 1e-9)
    ends = [
        po.Solver(po.IWP(5), po.TS1(problem), controller=controller, error=po.StateError()).solve(u0, 0.0, 60.0).mean
        for problem in (po.ODE(sir), po.Residual(residual))
    ]
    for key in u0:
        np.testing.assert_allclose(ends[0][key], ends[1][key], rtol=1e-6)
    np.testing.assert_allclose(sum(ends[1].values()), 1000, rtol=1e-13)


def swinging(index):
    """A pendulum in Cartesian coordinates with its rod's force, ``u = (x, y, vx, vy, force)``."""

    def residual(t, u, du, args):
        x, y, vx, vy, force = u
        constraint = {3: x**2 + y**2 - 1, 2: x * vx + y * vy, 1: vx**2 + vy**2 - force * (x**2 + y**2) - 9.81 * y}
        newton = [du[0] - vx, du[1] - vy, du[2] + force * x, du[3] + force * y + 9.81]
        return jnp.stack([*newton, constraint[index]])

    return po.Residual(residual)


@pytest.mark.thorough
@pytest.mark.parametrize("index", first_of(3, 2, 1))
def test_a_pendulum_of_any_index(index):
    controller = po.IntegralController(1e-8, 1e-8)
    solver = po.Solver(po.IWP(4), po.TS1(swinging(index)), controller=controller)
    u0 = jnp.array([1.0, 0.0, 0.0, 0.0, 0.0])
    solution = solver.solve(u0, 0.0, 1.0)
    # In polar coordinates: the angle from the horizontal falls with 9.81 cos(angle).
    polar = po.Solver(
        po.IWP(6), po.TS1(po.ODE(lambda t, a, da, args: -9.81 * jnp.cos(a), order=2)), controller=controller
    )
    angle = polar.solve((0.0, 0.0), 0.0, 1.0)
    a, da = angle.mean[0], angle.derivative(1).mean[0]
    expected = [jnp.cos(a), jnp.sin(a), -da * jnp.sin(a), da * jnp.cos(a), da**2 - 9.81 * jnp.sin(a)]
    error = np.abs(solution.mean[0] - jnp.stack(expected))
    assert np.max(error[:4]) < 1e-6
    # Every index above one costs the multiplier an order (Hairer & Wanner 1996, section VII.6); it knows.
    assert error[4] < {1: 1e-6, 2: 1e-5, 3: 1e-3}[index] and error[4] < 3 * solution.std[0, 4]
    if index == 3:
        np.testing.assert_allclose(solution.mean[0, 0] ** 2 + solution.mean[0, 1] ** 2, 1, rtol=1e-8)


@pytest.mark.thorough
def test_a_mass_matrix():
    mass = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    implicit = po.Residual(lambda t, u, du, args: mass @ du - lotka_volterra(t, u, None))
    explicit = po.ODE(lambda t, u, args: jnp.linalg.solve(mass, lotka_volterra(t, u, None)))
    a, b = (on_grid(po.TS1(problem)) for problem in (implicit, explicit))
    assert relative(a.mean, b.mean) < 1e-12 and relative(a.std, b.std) < 1e-11


@pytest.mark.thorough
def test_energy_is_kept_for_a_hundred_periods():
    oscillator = po.ODE(lambda t, u, args: jnp.stack([u[1], -u[0]]))
    energy = po.Residual(lambda t, u, args: (u @ u - 1) / 2, order=0)
    end = 200 * np.pi
    controller = po.IntegralController(1e-7, 1e-7)
    constraint = po.Stack(po.TS1(oscillator), po.TS1(energy))
    solver = po.Solver(po.IWP(5), constraint, controller=controller, loop=po.ForwardLoop(20_000))
    kept = solver.solve(jnp.array([1.0, 0.0]), 0.0, end, save_at=po.SaveAt(steps=True))
    drift = jnp.abs(jnp.sum(kept.mean**2, axis=1) - 1)
    assert jnp.max(drift) < 1e-8
    free = po.Solver(po.IWP(5), po.TS1(oscillator), error=po.StateError(), controller=controller)
    lost = free.solve(jnp.array([1.0, 0.0]), 0.0, end / 10)
    assert abs(jnp.sum(lost.mean**2) - 1) > jnp.max(drift)


# --- The derivatives at the start


@pytest.mark.parametrize("nu", first_of(4, 1, 9))
def test_consistent_derivatives_are_those_of_the_ode(nu):
    def field(t, u, args):
        return jnp.stack([jnp.sin(t) * u[0] + t**2, -u[0] * u[1]])

    u0, t0 = jnp.array([0.7, -0.3]), 0.4
    implicit = po.Residual(lambda t, u, du, args: 3.0 * (du - field(t, u, args)))
    a, b = (po.Solver(po.IWP(nu), po.TS1(problem)).initialise(u0, t0).mean for problem in (po.ODE(field), implicit))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


@pytest.mark.parametrize("rate", [1e5, *left_to_nox(1e2, 1e9)])
def test_consistent_derivatives_of_a_stiff_residual(rate):
    # The first Newton step had units in which the pseudo-inverse dropped what is stiff: it did not start.
    def field(t, u, args):
        return jnp.stack([u[1], -rate * u[1] - u[0]])

    implicit = po.Residual(lambda t, u, du, args: du - field(t, u, args))
    u0 = jnp.array([1.0, 0.5])
    a, b = (po.Solver(po.IWP(4), po.TS1(problem)).initialise(u0, 0.0).mean for problem in (po.ODE(field), implicit))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


def test_what_an_algebraic_equation_says_at_the_start():
    solver = po.Solver(po.IWP(3), po.TS1(swinging(3)))
    u0 = jnp.array([1.0, 0.0, 0.0, 2.0, 4.0])
    mean = solver.initialise(u0, 0.0).mean
    # x = cos a, y = sin a, a' = 2, a'' = -9.81 cos a; force = a'^2 - 9.81 sin a.
    np.testing.assert_allclose(mean[1], [0.0, 2.0, -4.0, -9.81, -3 * 2 * 9.81], rtol=1e-10, atol=1e-10)


@pytest.mark.thorough
def test_an_inconsistent_start_is_refused():
    solver = po.Solver(po.IWP(3), po.TS1(swinging(1)))
    wrong = jnp.array([1.0, 0.0, 0.0, 0.0, 3.0])
    assert solver.solve(wrong, 0.0, 1.0, throw=False).result == po.Result.initial_state_nonfinite
    with pytest.raises(RuntimeError, match="no derivatives satisfy a Residual together with u0"):
        solver.solve(wrong, 0.0, 1.0)


# --- Derivatives


@pytest.mark.thorough
def test_gradients_through_a_dae():
    def residual(t, u, du, args):
        return du[0] + args[0] * u[0] * u[1], u[1] ** 3 + u[1] - args[1] * u[0] - 1.0

    def quantities(args):
        start = jnp.stack([jnp.ones(()), y_of(args[1])])
        solver = po.Solver(po.IWP(2), po.TS1(po.Residual(residual)), calibration=po.NoCalibration())
        solution = solver.solve_grid(start, np.linspace(0.0, 1.0, 5), args=args)
        return jnp.concatenate([solution.mean[-1], jnp.log(solution.std[-1]), solution.log_likelihood[None]])

    def y_of(a):
        y = jax.lax.stop_gradient(jax.lax.fori_loop(0, 50, lambda i, y: y - (y**3 + y - a - 1) / (3 * y**2 + 1), 1.0))
        return y - (y**3 + y - a - 1) / (3 * y**2 + 1)

    x = jnp.array([0.8, 0.5])
    check_jacobians(quantities, x)


# --- Wrong use


def test_errors():
    with pytest.raises(TypeError):  # in the words of beartype, where the import hook is on
        po.Residual(3)
    with pytest.raises(ValueError, match="order"):
        po.Residual(lambda t, u, args: u, order=-1)
    with pytest.raises(TypeError, match="not a Residual: use TS1"):
        po.TS0(po.Residual(lambda t, u, du, args: du))
    with pytest.raises(TypeError, match="members are constraints"):
        po.Stack(po.ODE(lotka_volterra))
    with pytest.raises(ValueError, match="at least one"):
        po.Stack()
    short = po.TS1(po.Residual(lambda t, u, args: u, order=1))
    with pytest.raises(TypeError, match=r"called as r\(t, u, du, args\)"):
        po.Solver(po.IWP(2), short).solve(U0, 0.0, 1.0)
    nothing = po.TS1(po.Residual(lambda t, u, du, args: ()))
    with pytest.raises(ValueError, match="returns no numbers"):
        po.Solver(po.IWP(2), nothing).solve(U0, 0.0, 1.0)
    whole = po.TS1(po.Residual(lambda t, u, du, args: jnp.arange(2)))
    with pytest.raises(TypeError, match="floating-point"):
        po.Solver(po.IWP(2), whole).solve(U0, 0.0, 1.0)
    with pytest.raises(ValueError, match="order 3 needs a prior"):
        po.Solver(po.IWP(2), po.TS1(po.Residual(lambda *xs: xs[4], order=3)))
    one = po.TS1(po.Residual(lambda t, u, du, args: du[0]))
    for factorisation in FACTORISATIONS[1:]:
        with pytest.raises(ValueError, match=r"1 equations for 2 components\. Use Dense"):
            po.Solver(po.IWP(2), one, factorisation=factorisation).solve_grid(U0, GRID)
    equation = po.TS1(po.Residual(lambda t, u, du, args: du + u))
    with pytest.raises(ValueError, match="Use error=StateError"):
        po.Solver(po.IWP(2), equation, error=po.ResidualError()).solve(U0, 0.0, 1.0)


# --- Time derivatives of the equation


@pytest.mark.thorough
@pytest.mark.parametrize("problem", first_of("residual", "second order", "ode"))
def test_lifted_equations_are_time_derivatives(problem):
    def curve(t):
        return jnp.stack([jnp.sin(2 * t), jnp.exp(-t)])

    if problem == "ode":
        own = po.ODE(lambda t, u, args: jnp.stack([u[0] * u[1] + t, jnp.sin(u[0])]))
    elif problem == "second order":
        own = po.ODE(lambda t, u, du, args: jnp.stack([u[0] * du[1] + t, jnp.sin(du[0])]), order=2)
    else:
        own = po.Residual(lambda t, u, du, args: u[0] * du[1] * t)

    derivatives = [curve]
    for _ in range(5):
        derivatives.append(jax.jacfwd(derivatives[-1]))

    def along(t):
        return own.residual_of(t, tuple(d(t) for d in derivatives), None)

    t, expected = jnp.array(0.7), []
    for _ in range(3):
        expected.append(along(t))
        along = jax.jacfwd(along)
    lifted = own.lifted(2)
    assert lifted.order == own.order + 2 and lifted.num_initial_values == own.order
    got = lifted.residual_of(t, tuple(d(t) for d in derivatives), None)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.thorough
def test_lifting_makes_longer_steps():
    ode, controller = po.ODE(lotka_volterra), po.IntegralController(1e-6, 1e-6)
    steps = []
    for problem in (ode, ode.lifted(0), ode.lifted(2)):
        solver = po.Solver(po.IWP(5), po.TS1(problem), error=po.StateError(), controller=controller)
        solution = solver.solve(U0, 0.0, 10.0)
        assert relative(solution.mean[0], [11.86150846, 2.63118858]) < 1e-5  # SciPy's DOP853 at 1e-13
        steps.append(int(solution.stats["num_accepted_steps"]))
    assert steps[0] == steps[1] and steps[2] < steps[0] / 2


@pytest.mark.thorough
@pytest.mark.parametrize("levels", first_of(1, 0, 3))
def test_conditioning_a_diffuse_start_makes_exact_what_the_equation_determines(levels):
    ode = po.ODE(lotka_volterra)
    exact = po.Solver(po.IWP(4), po.TS1(ode)).initialise(U0, 0.0).mean
    start = po.Diffuse(0, scale=10.0, conditioned=True)
    state = po.Solver(po.IWP(4), po.TS1(ode.lifted(levels)), initialisation=start).init(U0, 0.0)
    for k in range(5):
        if k <= levels + 1:
            np.testing.assert_allclose(state.derivative(k).mean, exact[k], rtol=1e-12, atol=1e-12)
            np.testing.assert_array_less(state.derivative(k).std, 1e-12)
        else:
            assert jnp.all(state.derivative(k).std > 1)


def test_a_diffuse_start_of_a_dae_is_conditioned_where_it_can_be():
    # The algebraic equation is about what is certain: nothing to learn, and nothing to divide by.
    start = po.Diffuse(0, scale=10.0, conditioned=True)
    solver = po.Solver(po.IWP(3), po.TS1(swinging(1)), initialisation=start)
    state = solver.init(jnp.array([1.0, 0.0, 0.0, 2.0, 4.0]), 0.0)
    np.testing.assert_allclose(state.derivative(1).mean[:4], [0.0, 2.0, -4.0, -9.81], atol=1e-12)
    assert jnp.all(state.derivative(1).std[:4] < 1e-12) and state.derivative(1).std[4] == 10


# --- Iterated linearisation, noise


@pytest.mark.thorough
def test_the_iterated_update_is_the_most_probable_state():
    # One long step from a certain start; the minimum of |R^-T (x - m)|^2 where the equation holds, by Newton's method.
    def field(t, u, args):
        return jnp.stack([-(u[0] ** 3), u[0] * u[1]])

    dt, u0 = 1.5, jnp.array([1.0, 0.5])
    constraint = po.TS1(po.ODE(field), evaluations=30, relinearise=True)
    solver = po.Solver(po.IWP(1), constraint, calibration=po.NoCalibration())
    solution = solver.solve_grid(u0, jnp.array([0.0, dt]))
    velocity = field(0.0, u0, None)
    mean = jnp.concatenate([u0 + dt * velocity, velocity])
    precision = jnp.linalg.inv(oracles.iwp_transition(1, dt, 2)[1])

    def lagrangian(y):
        x, multiplier = y[:4], y[4:]
        deviation = x - mean
        return deviation @ precision @ deviation / 2 + multiplier @ (x[2:] - field(0.0, x[:2], None))

    y = jnp.concatenate([solution.marginals.mean[-1, :, 0], jnp.zeros(2)])
    for _ in range(20):
        y = y - jnp.linalg.solve(jax.hessian(lagrangian)(y), jax.grad(lagrangian)(y))
    np.testing.assert_allclose(solution.marginals.mean[-1, :, 0], y[:4], rtol=1e-9)
    once = po.Solver(po.IWP(1), po.TS1(po.ODE(field)), calibration=po.NoCalibration()).solve_grid(u0, [0.0, dt])
    assert relative(once.marginals.mean[-1, :, 0], y[:4]) > 1e-3
    assert solution.stats["last_move"] < 1e-12 and "last_move" not in once.stats


@pytest.mark.thorough
def test_a_solve_says_whether_its_iterations_have_converged():
    def solver(number):
        constraint = po.TS1(po.ODE(lotka_volterra), evaluations=number, relinearise=True)
        return po.Solver(po.IWP(2), constraint, controller=po.IntegralController(1e-2, 1e-2))

    u0 = jnp.array([20.0, 20.0])
    two, three, six = (solver(number).solve(u0, 0.0, 5.0) for number in (2, 3, 6))
    # Gauss-Newton with the Jacobian of a quadratic field: the distance to the limit shrinks faster than geometrically.
    assert 1e-5 < two.stats["last_move"] < 1e-2 and six.stats["last_move"] < 1e-9
    assert 0 < three.stats["last_move"] < two.stats["last_move"] ** 1.5
    halfway = solver(3).solve(u0, 0.0, 2.5)  # after six nothing moves, to the last bit
    resumed = solver(3).solve(halfway.state, 2.5, 5.0)
    assert resumed.stats["last_move"] >= halfway.stats["last_move"] > 0
    once = po.Solver(po.IWP(2), po.TS1(po.ODE(lotka_volterra)))
    assert "last_move" not in once.solve(halfway.state, 2.5, 5.0).stats
    assert solver(2).solve(once.solve(u0, 0.0, 2.5).state, 2.5, 5.0).stats["last_move"] > 0


@pytest.mark.parametrize(
    "wrap",
    first_of(
        lambda ode, **parts: po.Noisy(po.TS1(ode, **parts), 1e-9),
        lambda ode, **parts: po.SLR1(ode, **parts),
        lambda ode, **parts: po.Stack(po.TS1(ode), **parts),
    ),
    ids=["Noisy", "SLR1", "Stack"],
)
def test_whatever_is_linearised_to_first_order_can_be_iterated(wrap):
    # One long step from a certain start, where averages are values: the same point as that of TS1.
    ode, grid, u0 = po.ODE(lambda t, u, args: -(u**3)), jnp.array([0.0, 1.5]), jnp.array([1.0])

    def end(constraint):
        solution = po.Solver(po.IWP(1), constraint, calibration=po.NoCalibration()).solve_grid(u0, grid)
        return solution.marginals.mean[-1]

    iterated = {"evaluations": 20, "relinearise": True}
    np.testing.assert_allclose(end(wrap(ode, **iterated)), end(po.TS1(ode, **iterated)), rtol=1e-9)
    assert relative(end(wrap(ode)), end(po.TS1(ode, **iterated))) > 1e-3


@pytest.mark.parametrize("factorisation", first_of(*FACTORISATIONS), ids=name)
def test_noise_that_is_small_changes_little_and_is_seen(factorisation):
    plain = po.TS1(po.ODE(lotka_volterra))
    exact, quiet, loud = (
        on_grid(constraint, factorisation=factorisation)
        for constraint in (plain, po.Noisy(plain, 1e-9), po.Noisy(plain, 0.1))
    )
    assert relative(quiet.mean, exact.mean) < 1e-8
    assert jnp.all(loud.std[1:] > exact.std[1:])


def test_noise_twice_is_noise_of_both():
    plain = po.TS1(po.ODE(lotka_volterra))
    a, b = on_grid(po.Noisy(po.Noisy(plain, 0.3), 0.4)), on_grid(po.Noisy(plain, 0.5))
    assert relative(a.mean, b.mean) < 1e-12 and relative(a.std, b.std) < 1e-11
    with pytest.raises(ValueError, match="finite and positive"):
        po.Noisy(plain, 0.0)
    with pytest.raises(TypeError, match="first argument is a constraint"):
        po.Noisy(po.ODE(lotka_volterra), 1.0)


@pytest.mark.thorough
def test_single_precision_stays_so():
    equation = po.Residual(lambda t, u, du, args: jnp.stack([du[0] + u[0], u[0] + u[1] - 2]))
    solver = po.Solver(po.IWP(3), po.TS1(equation), controller=po.IntegralController(1e-4, 1e-4))
    mean = solver.solve(jnp.ones(2, jnp.float32), 0.0, -1.0).mean
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean[0], [np.e, 2 - np.e], rtol=1e-3)
