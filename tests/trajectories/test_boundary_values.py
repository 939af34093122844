"""Boundary value problems against closed forms, their derivatives, uncertain values, and what cannot be solved."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

import probode as po
from tests.helpers import difference_quotient, left_to_nox


def line(a, b, t0=0.0, t1=1.0):
    """The guess that is linear between two values."""
    return lambda t: a + (t - t0) / (t1 - t0) * (b - a)


def ends(a, b):
    """The conditions ``u(t0) = a`` and ``u(t1) = b``, numbers or functions of ``args``."""
    at = lambda x, args: x(args) if callable(x) else x  # noqa: E731
    return lambda ua, ub, args: (ua[0] - at(a, args), ub[0] - at(b, args))


def convection(t, small):
    return -np.expm1((t - 1) / small) / -np.expm1(-1 / small)


def decay(t, small):
    width = np.sqrt(small)
    return (np.exp(-t / width) - np.exp((t - 2) / width)) / -np.expm1(-2 / width)


def forced(t, u, du, small):
    return -(t * du + small * jnp.pi**2 * jnp.cos(jnp.pi * t) + jnp.pi * t * jnp.sin(jnp.pi * t)) / small


def turning(t, small):
    return np.cos(np.pi * t) + np.asarray(erf(t / np.sqrt(2 * small))) / math.erf(1 / math.sqrt(2 * small))


def corner(t, small):
    return 1 + small * (jnp.logaddexp((t - 0.745) / small, (0.745 - t) / small) - jnp.log(2.0))


def bratu(t, small):
    th = 1.5171645990507543
    return -2 * np.log(np.cosh((t - 0.5) * th / 2) / np.cosh(th / 4))


def at_origin(t, u, du, small):
    """The equation of a polytrope, whose field is 0/0 at the origin: there ``-2 u'/t`` is ``-2 u''``."""
    return jnp.where(t == 0, -(u**5) / 3, -2 * du / jnp.where(t == 0, 1.0, t) - u**5)


# Vector field, conditions, interval, guess, solution. The numbers are those of a collection of test problems.
PROBLEMS = {
    "decay": (lambda t, u, du, small: u / small, ends(1.0, 0.0), (0.0, 1.0), line(1.0, 0.0), decay),
    "convection": (lambda t, u, du, small: du / small, ends(1.0, 0.0), (0.0, 1.0), line(1.0, 0.0), convection),
    "turning": (
        forced, ends(-2.0, 0.0), (-1.0, 1.0), line(-2.0, 0.0, -1.0), turning,
    ),
    "peak": (
        lambda t, u, du, small: -(4 * t * du + 2 * u) / (small + t**2),
        ends(lambda small: 1 / (1 + small), lambda small: 1 / (1 + small)), (-1.0, 1.0), lambda t: 1.0 + 0 * t,
        lambda t, small: 1 / (small + t**2),
    ),
    "corner": (
        lambda t, u, du, small: (1 - du**2) / small,
        ends(lambda small: corner(0.0, small), lambda small: corner(1.0, small)), (0.0, 1.0), line(1.7, 1.2), corner,
    ),
    "square": (
        lambda t, u, du, small: (u + u**2 - jnp.exp(-2 * t / jnp.sqrt(small))) / small,
        ends(1.0, lambda small: jnp.exp(-1 / jnp.sqrt(small))), (0.0, 1.0), line(1.0, 0.0),
        lambda t, small: np.exp(-t / np.sqrt(small)),
    ),
    "bratu": (lambda t, u, du, small: -jnp.exp(u), ends(0.0, 0.0), (0.0, 1.0), lambda t: 0 * t, bratu),
    "polytrope": (
        at_origin, lambda ua, ub, small: (ua[1], ub[0] - math.sqrt(3) / 2), (0.0, 1.0), lambda t: 1.0 + 0 * t,
        lambda t, small: 1 / np.sqrt(1 + t**2 / 3),
    ),
}  # fmt: skip
CASES = [
    ("decay", [(1e-1, 1e-4), (1e-2, 1e-6), (1e-4, 1e-8)]),
]
MORE = [
    ("turning", [(1e-1, 1e-6), (1e-2, 1e-8), (1e-4, 1e-4)]),
    ("corner", [(1e-1, 1e-4), (1e-1, 1e-8), (1e-2, 1e-6)]),
    ("polytrope", [(1.0, 1e-4), (1.0, 1e-8)]),
    ("convection", [(1e-1, 1e-4), (1e-2, 1e-6), (1e-3, 1e-6), (1e-4, 1e-8)]),
    ("peak", [(1e-1, 1e-4), (1e-2, 1e-6), (1e-4, 1e-8)]),
    ("square", [(1e-1, 1e-4), (1e-2, 1e-6), (1e-4, 1e-8)]),
    ("bratu", [(1.0, 1e-4)]),
]


def solved(name, small, tol, **options):
    field, conditions, span, guess, _ = PROBLEMS[name]
    ode = FIELDS.setdefault(name, po.ODE(field, order=2))
    return po.solve_bvp(ode, conditions, span, guess, args=small, rtol=tol, atol=tol, **options)


FIELDS: dict = {}


def nodes_of(solution):
    return np.asarray(solution.t)[: int(solution.stats["num_nodes"])]


@pytest.mark.parametrize(("name", "cases"), [*CASES, *left_to_nox(*MORE)], ids=str)
def test_closed_forms(name, cases):
    """Errors are below the tolerances, at the nodes and between them, and as large as the standard deviations say."""
    for small, tol in cases:
        solution = solved(name, small, tol)
        t = nodes_of(solution)
        t = np.sort(np.concatenate([t, t[:-1] + 0.4 * np.diff(t)]))
        exact = PROBLEMS[name][-1](t, small)
        got = solution.evaluate(t)
        error, std = np.abs(got.mean - exact), np.asarray(got.std)
        assert np.all(error < 2 * (tol + tol * np.abs(exact))), (name, small, tol)
        assert np.all(std < 2 * (tol + tol * np.abs(exact)))
        # Where a value is given, and at round-off, there is nothing to compare.
        told = std > 1e-14 * (1 + np.abs(exact))
        assert not told.any() or 0.01 < np.mean((error[told] / std[told]) ** 2) < 10, (name, small, tol)


@pytest.mark.thorough
def test_the_limits_of_the_mesh():
    """Unused rows repeat the last node; a solution that needs more nodes than there may be is no success."""
    solution = solved("turning", 1e-4, 1e-8, max_nodes=40, throw=False)
    assert solution.result == po.Result.max_nodes_reached and solution.t.shape == (40,)
    solution = solved("turning", 1e-1, 1e-4, max_nodes=40)
    number = int(solution.stats["num_nodes"])
    assert number < 40 and np.all(solution.t[number - 1 :] == 1.0)
    np.testing.assert_array_equal(solution.mean[number - 1 :], solution.mean[-1])
    with pytest.raises(RuntimeError, match="max_nodes"):
        solved("turning", 1e-4, 1e-8, max_nodes=40)


@pytest.mark.thorough
def test_continuation():
    """A corner of width 1e-4, which Newton's method does not find from a line, from the solution of a wider one."""
    solution, small = None, 0.1
    while small > 1e-4:
        small = max(small / 3, 1e-4)
        _, conditions, span, guess, exact = PROBLEMS["corner"]
        options = {"args": small, "rtol": 1e-8, "atol": 1e-8}
        ode = FIELDS.setdefault("corner", po.ODE(PROBLEMS["corner"][0], order=2))
        solution = po.solve_bvp(ode, conditions, span, guess if solution is None else solution, **options)
    t = nodes_of(solution)
    np.testing.assert_allclose(solution.mean[: t.size], exact(t, small), atol=3e-8)


@pytest.mark.thorough
def test_both_solutions_of_bratus_problem():
    _, conditions, span, *_ = PROBLEMS["bratu"]
    field = FIELDS.setdefault("bratu", po.ODE(PROBLEMS["bratu"][0], order=2))
    for height, expected in ((0.0, 0.1405392144), (4.0, 4.09146724619)):
        guess = jnp.array([0.0, height, 0.0])
        solution = po.solve_bvp(field, conditions, span, guess, args=1.0, rtol=1e-8, atol=1e-8)
        assert abs(float(solution.evaluate(0.5).mean) - expected) < 1e-8 + 1e-8 * expected


@pytest.mark.thorough
def test_an_eigenvalue():
    """``u'' = -k^2 u`` that is zero at both ends: ``k`` is a multiple of pi, with an error as large as it says."""
    field = po.ODE(lambda t, u, du, args: -(args[0] ** 2) * u, order=2)
    conditions = lambda ua, ub, args: {"ends": jnp.stack([ua[0], ub[0]]), "slope": ua[1] - args[0]}  # noqa: E731
    guess = lambda t: jnp.sin(6.0 * t)  # noqa: E731
    solution = po.solve_bvp(field, conditions, (0.0, 1.0), guess, parameters=6.0, rtol=1e-6, atol=1e-6)
    error = abs(float(solution.parameters.mean) - 2 * math.pi)
    assert 0.5 * error < float(solution.parameters.factor[0, 0]) < 1e-6


@pytest.mark.thorough
def test_measured_ends():
    """``u'' = 0`` between two measured values: the standard deviation is known in closed form, also of samples."""
    conditions = lambda ua, ub, args: [po.Normal(ua[0] - 1.0, 0.1), po.Normal(ub[0] - 2.0, 0.3)]  # noqa: E731
    solution = po.solve_bvp(po.ODE(lambda t, u, du, args: 0 * u, order=2), conditions, (0.0, 1.0), line(0.0, 1.0))
    t = np.array([0.0, 0.25, 0.5, 1.0])
    expected = np.hypot(0.1 * (1 - t), 0.3 * t)
    np.testing.assert_allclose(solution.evaluate(t).std, expected, rtol=1e-7)
    samples = solution.sample(jax.random.key(0), (4000,), ts=t)
    np.testing.assert_allclose(np.std(samples, axis=0), expected, rtol=0.05)
    np.testing.assert_allclose(np.corrcoef(samples[:, 0], samples[:, 3])[0, 1], 0.0, atol=0.05)


@pytest.mark.thorough
def test_samples_have_the_moments_of_the_posterior():
    solution = solved("turning", 1e-2, 1e-3)
    t = jnp.asarray(np.sort(np.random.default_rng(0).uniform(-1, 1, 8)))
    known, samples = solution.evaluate(t), solution.sample(jax.random.key(0), (4000,), ts=t)
    assert np.all(np.abs(np.mean(samples, axis=0) - known.mean) < 5 * known.std / math.sqrt(4000))
    np.testing.assert_allclose(np.std(samples, axis=0), known.std, rtol=0.06)
    at_nodes = solution.sample(jax.random.key(1), (500,))
    number = int(solution.stats["num_nodes"])
    np.testing.assert_allclose(np.std(at_nodes, axis=0)[1 : number - 1], solution.std[1 : number - 1], rtol=0.2)


@pytest.mark.thorough
def test_systems_backwards_and_of_any_structure():
    """``x' = y, y' = -x`` as a dictionary, forwards and backwards: the same solution, and that of order two."""
    field = lambda t, u, args: {"x": u["y"], "y": -u["x"]}  # noqa: E731
    guess = lambda t: {"x": 1.0, "y": 0.0 * t}  # noqa: E731
    first = lambda ua, ub, args: (ua["x"] - 1.0, ub["y"])  # noqa: E731
    forwards = po.solve_bvp(field, first, (0.0, 1.0), guess, rtol=1e-8, atol=1e-8)
    backwards = po.solve_bvp(field, lambda ua, ub, args: first(ub, ua, args), (1.0, 0.0), guess, rtol=1e-8, atol=1e-8)
    t = np.linspace(0, 1, 7)
    exact = np.cos(t) + math.tan(1.0) * np.sin(t)
    for solution in (forwards, backwards):
        np.testing.assert_allclose(solution.evaluate(t).mean["x"], exact, atol=1e-10)
        np.testing.assert_allclose(solution.evaluate(t).derivative(2).mean["x"], -exact, atol=1e-8)
    assert "mesh" in forwards.summary() and "u" in repr(forwards)


def centre(k, t1=1.0, **options):
    solution = po.solve_bvp(BRATU, ends(0.0, 0.0), (0.0, t1), lambda t: 0 * t, args=k, rtol=1e-8, atol=1e-8, **options)
    return solution.evaluate(0.5 * t1).mean


BRATU = po.ODE(lambda t, u, du, k: -k * jnp.exp(u), order=2)


def exact_centre(k):
    """By the fixed point of the equation for ``th``."""
    th = 1.0
    for _ in range(300):
        th = math.sqrt(2 * k) * math.cosh(th / 4)
    return 2 * math.log(math.cosh(th / 4))


@pytest.mark.thorough
def test_derivatives_of_first_and_second_order():
    first = difference_quotient(lambda h: exact_centre(1.0 + h), 1e-3)
    second = (exact_centre(1.001) - 2 * exact_centre(1.0) + exact_centre(0.999)) / 1e-6
    np.testing.assert_allclose(jax.grad(centre)(1.0), first, rtol=1e-7)
    np.testing.assert_allclose(jax.jvp(centre, (1.0,), (1.0,))[1], first, rtol=1e-7)
    np.testing.assert_allclose(jax.hessian(centre)(1.0), second, rtol=1e-6)
    # The interval: with u(s t1), s in [0, 1], it is the equation with k t1^2.
    by_t1 = jax.jacfwd(lambda t1: centre(1.0, t1))(1.0)
    np.testing.assert_allclose(by_t1, 2 * first, rtol=1e-7)


@pytest.mark.thorough
def test_derivatives_through_what_functions_close_over_and_of_standard_deviations():
    def value(x):
        conditions = lambda ua, ub, args: (ua[0] - x, ub[0] - 1.0)  # noqa: E731
        ode = po.ODE(lambda t, u, du, args: -x * jnp.sin(u), order=2)
        # So few nodes that the standard deviations are far above round-off, and above what Newton's method leaves.
        guess, mesh = line(0.3, 1.0, 0.0, 2.0), jnp.array([0.0, 1.0, 2.0])
        solution = po.solve_bvp(ode, conditions, (0.0, 2.0), guess, mesh=mesh, rtol=1e-3, atol=1e-3)
        known = solution.evaluate(jnp.array([0.5, 1.5]))
        return jnp.concatenate([known.mean, 1e3 * known.std])

    compiled = jax.jit(value)
    expected = difference_quotient(lambda h: compiled(0.7 + h), 1e-4)
    np.testing.assert_allclose(jax.jacfwd(value)(0.7), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.jacrev(value)(0.7), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_lanes():
    ks = jnp.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(jax.vmap(centre)(ks), [exact_centre(float(k)) for k in ks], rtol=1e-8)


@pytest.mark.thorough
def test_strict_promotion():
    """No implicit promotion of shapes or of types, in values and derivatives."""
    number = jnp.asarray

    def values(k):
        conditions = lambda ua, ub, k: (ua[0], po.Normal(ub[0] - number(1.0), number(0.1)), ua[1] - k[0])  # noqa: E731
        ode = po.ODE(lambda t, u, du, k: -k[0] * u, order=2)
        solution = po.solve_bvp(ode, conditions, (0.0, 1.0), number([0.0, 1.0, 0.0]), parameters=k, throw=False)
        t = number([0.1, 0.5])
        samples = solution.sample(jax.random.key(0), (2,), ts=t)
        return solution.std, solution.evaluate(t).std, samples, solution.parameters, solution.output_scale

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda k: jax.jvp(values, (k,), (jnp.ones_like(k),)), number(9.0))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("t0", "span", "scale"), [(0.0, 1e-9, 1.0), (0.0, 1e9, 1.0), (0.0, 1.0, 1e-12), (1.7e9, 1.0, 1e12)]
)
def test_any_units(t0, span, scale):
    oscillator = po.ODE(lambda t, u, du, w: -(w**2) * u, order=2)
    guess, tol = lambda t: 0 * t, 1e-6
    span_of = (t0, t0 + span)
    solution = po.solve_bvp(oscillator, ends(0.0, scale), span_of, guess, args=2 / span, rtol=tol, atol=tol * scale)
    got = solution.evaluate(t0 + 0.25 * span).mean / scale
    np.testing.assert_allclose(got, math.sin(0.5) / math.sin(2.0), rtol=1e-6)


@pytest.mark.thorough
def test_single_precision():
    ode = po.ODE(lambda t, u, du, args: -jnp.exp(u), order=2)
    guess = jnp.zeros(5, jnp.float32)
    solution = po.solve_bvp(ode, ends(0.0, 0.0), (0.0, 1.0), guess, rtol=1e-4, atol=1e-4)
    assert solution.mean.dtype == jnp.float32
    np.testing.assert_allclose(solution.evaluate(0.5).mean, 0.14053921, atol=1e-6)


@pytest.mark.thorough
def test_what_has_no_solution_says_so():
    steep = po.solve_bvp(BRATU, ends(0.0, 0.0), (0.0, 1.0), lambda t: 0 * t, args=10.0, throw=False)
    assert steep.result in (po.Result.no_progress, po.Result.singular, po.Result.nonfinite)
    undefined = po.ODE(lambda t, u, du, args: jnp.sqrt(u), order=2)
    solution = po.solve_bvp(undefined, ends(-1.0, -1.0), (0.0, 1.0), lambda t: -1.0 + 0 * t, throw=False)
    assert solution.result == po.Result.nonfinite


@pytest.mark.thorough
def test_conditions_without_a_solution_are_singular():
    """``u'' = -u`` over a half of its period: the value at one end determines that at the other."""
    oscillator = po.ODE(lambda t, u, du, args: -u, order=2)
    with pytest.raises(RuntimeError, match="do not determine"):
        po.solve_bvp(oscillator, ends(0.0, 1.0), (0.0, math.pi), lambda t: t)


def wrong(**changes):
    arguments = {
        "problem": po.ODE(lambda t, u, du, args: -u, order=2),
        "boundary": ends(0.0, 1.0),
        "t_span": (0.0, 1.0),
        "guess": lambda t: 0 * t,
    }
    return po.solve_bvp(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"boundary": lambda ua, ub, args: ua[0]}, ValueError, "as many numbers as there are conditions, 2"),
        ({"boundary": lambda ua, ub, args: (ua, ub)}, ValueError, "got 4"),
        ({"boundary": 1.0}, TypeError, "callable"),
        ({"parameters": 1.0}, ValueError, "3 .*parameters"),
        ({"mesh": [0.0, 0.5, 0.5, 1.0]}, ValueError, "without repeating"),
        ({"mesh": [0.0, 0.5]}, ValueError, "from t0 to t1"),
        ({"mesh": [1.0]}, ValueError, "2 to max_nodes"),
        ({"guess": 1.0}, ValueError, "row for each"),
        ({"guess": jnp.zeros(4), "mesh": [0.0, 0.5, 1.0]}, ValueError, "4 rows"),
        ({"guess": lambda t, u: t}, TypeError, "function of the time"),
        ({"guess": po.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)}, ValueError, "not kept"),
        ({"problem": po.Residual(lambda t, u, du, args: du + u)}, TypeError, "explicit"),
        ({"t_span": (0.0, 0.0)}, ValueError, "same time"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"rtol": 1e-17}, ValueError, "round-off"),
        ({"max_nodes": 2}, ValueError, "max_nodes"),
        ({"boundary": lambda ua, ub, args: (ua[0], po.Normal(ub[0], jnp.ones(3)))}, ValueError, "standard deviations"),
        ({"data": 1.0}, ValueError, "not available"),
    ],
    ids=lambda x: str(x)[:24] if isinstance(x, dict) else None,
)
def test_wrong_use_is_named(changes, error, words):
    with pytest.raises(error, match=words):
        wrong(**changes)
