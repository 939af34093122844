"""Powers along a curve, by whole series and by recurrences: exponents of every kind, at and beside zero."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import probode as po
from probode.equations.taylor import recurrences
from probode.equations.taylor.derivatives import _along_by_series

from ..helpers import central_differences, relative


# Plain derivatives of the curve from the first on.
MOVING = np.array([1.3, -0.4, 0.2, 0.9])
BESIDE = np.array([0.3, -0.5, 0.1, 0.7])


def by_series(closed, curve):
    t = jnp.zeros((), curve.dtype)
    return _along_by_series(closed, t, curve[:1], len(curve) - 1)(curve[:, None])


def by_recurrences(closed, curve):
    return recurrences.along(closed, jnp.zeros((), curve.dtype), curve[:, None])


ROUTES = pytest.mark.parametrize("route", (by_series, by_recurrences))


def derivatives(route, fn, curve, *known):
    """``fn(x, *known)`` and its derivatives where ``x`` moves along the curve; ``known`` at run time alone."""

    def along(curve, known):
        closed = jax.make_jaxpr(lambda t, x: fn(x[0], *known))(jnp.zeros((), curve.dtype), curve[:1])
        return route(closed, curve)

    return np.asarray(jax.jit(along)(jnp.asarray(curve), tuple(map(jnp.asarray, known))))


def curve(start, rest=MOVING):
    return np.array([start, *rest])[:, None]


def polynomial(start, rest=MOVING):
    return lambda t: sum(mpmath.mpf(float(c)) * t**k / mpmath.factorial(k) for k, c in enumerate([start, *rest]))


def exact(fn):
    with mpmath.workdps(60):
        return [float(mpmath.re(mpmath.diff(fn, 0, k))) for k in range(len(MOVING) + 1)]


@ROUTES
@pytest.mark.parametrize("exponent", (2.0, 2.5, -1.5, np.int32(3)))
def test_an_exponent_that_is_known_at_run_time(route, exponent):
    expected = exact(lambda t: polynomial(0.7)(t) ** mpmath.mpf(float(exponent)))
    assert relative(derivatives(route, lambda u, n: u**n, curve(0.7), exponent)[:, 0], expected) < 1e-14
    if float(exponent).is_integer():
        expected = exact(lambda t: polynomial(-0.7)(t) ** int(exponent))
        assert relative(derivatives(route, lambda u, n: u**n, curve(-0.7), exponent)[:, 0], expected) < 1e-14


@ROUTES
def test_integers_at_zero_and_beside_it(route):
    """Exact, where the recursion of other powers would divide by zero, or lose all digits."""
    for start in (0.0, 1e-9, -1e-9):
        for exponent in range(5):
            expected = exact(lambda t, n=exponent, x0=start: polynomial(x0)(t) ** n)
            got = derivatives(route, lambda u, n: u**n, curve(start), float(exponent))[:, 0]
            np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-100)


@ROUTES
@pytest.mark.parametrize("exponent", (2.5, 1.5, 0.5, -1.0))
def test_other_exponents_at_zero(route, exponent):
    """The derivatives of orders below the exponent are zero; the others do not exist."""
    of_known = derivatives(route, lambda u, n: u**n, curve(0.0), exponent)[:, 0]
    of_literal = derivatives(route, lambda u: u**exponent, curve(0.0))[:, 0]
    exist = np.arange(len(of_known)) < exponent
    for got in (of_known, of_literal):
        np.testing.assert_array_equal(got[exist], 0)
        assert not np.any(np.isfinite(got[1:][~exist[1:]]))


@ROUTES
def test_bases_and_exponents_that_move(route):
    both = np.concatenate([curve(0.7), curve(1.2, BESIDE)], axis=1)
    got = derivatives(route, lambda u: u[:1] ** u[1:], both)[:, 0]
    assert relative(got, exact(lambda t: polynomial(0.7)(t) ** polynomial(1.2, BESIDE)(t))) < 1e-14
    for base in (1.7, 2.0):
        expected = exact(lambda t, base=base: mpmath.mpf(base) ** polynomial(0.7)(t))
        assert relative(derivatives(route, lambda u, b: b**u, curve(0.7), base)[:, 0], expected) < 1e-14
    expected = exact(lambda t: mpmath.mpf(2) ** polynomial(0.7)(t))
    assert relative(derivatives(route, lambda u: 2.0**u, curve(0.7))[:, 0], expected) < 1e-14
    np.testing.assert_array_equal(derivatives(route, lambda u, b: b**u, curve(0.7), 0.0), 0)
    assert not np.any(np.isfinite(derivatives(route, lambda u, b: b**u, curve(-0.7), 0.0)))


@ROUTES
def test_an_exponent_in_the_state_that_does_not_move(route):
    still = np.zeros_like(BESIDE)
    for start in (0.0, -0.5, 0.7):
        both = np.concatenate([curve(start), curve(2.0, still)], axis=1)
        expected = exact(lambda t, x0=start: polynomial(x0)(t) ** 2)
        np.testing.assert_allclose(derivatives(route, lambda u: u[:1] ** u[1:], both)[:, 0], expected, atol=1e-14)
    both = np.concatenate([curve(0.0), curve(2.0, BESIDE)], axis=1)
    assert not np.any(np.isfinite(derivatives(route, lambda u: u[:1] ** u[1:], both)[1:]))


@ROUTES
@pytest.mark.parametrize("exponent", (2.5, 2.0, 1 + 0.5j))
def test_complex_numbers(route, exponent):
    power = mpmath.mpmathify(exponent)
    expected = exact(lambda t: (polynomial(0.7)(t) + mpmath.mpc(0, 0.3)) ** power)
    for fn, known in (
        (lambda u: jnp.real((u + 0.3j) ** exponent), ()),
        (lambda u, n: jnp.real((u + 0.3j) ** n), (exponent,)),
    ):
        assert relative(derivatives(route, fn, curve(0.7), *known)[:, 0], expected) < 1e-14
    expected = exact(lambda t: mpmath.mpc(2, 1) ** polynomial(0.7)(t))
    assert relative(derivatives(route, lambda u: jnp.real((2 + 1j) ** u), curve(0.7))[:, 0], expected) < 1e-14


@ROUTES
@pytest.mark.parametrize(
    "fn", (jnp.sqrt, jnp.cbrt, lambda u: jnp.linalg.norm(u)[None], lambda u: u**0.5, lambda u: jnp.sqrt(jnp.abs(u)))
)
def test_what_has_no_derivative_at_zero_is_not_finite(route, fn):
    values = derivatives(route, fn, curve(0.0))
    assert values[0] == 0 and not np.any(np.isfinite(values[1:]))


@ROUTES
def test_single_precision_stays_single(route):
    single = derivatives(route, lambda u, n: u**n, curve(0.7).astype(np.float32), np.float32(2.5))
    assert single.dtype == np.float32
    assert relative(single, derivatives(route, lambda u, n: u**n, curve(0.7), 2.5)) < 1e-5


@ROUTES
@pytest.mark.parametrize(("start", "exponent"), ((0.7, 2.0), (0.7, 2.5), (0.0, 3.0), (-0.4, 2.0)))
def test_derivatives_of_the_derivatives(route, start, exponent):
    """In both modes, with respect to the curve, and to the exponent where there is a logarithm, at an integer too."""

    def flat(x, n):
        closed = jax.make_jaxpr(lambda t, u: u[0] ** n)(jnp.zeros(()), x[:, None][:1])
        return route(closed, x[:, None])[:, 0]

    x, n = jnp.array([start, *MOVING[:3]]), jnp.asarray(exponent)
    expected = central_differences(jax.jit(lambda x: flat(x, n)), x, 1e-4)
    of_exponent = (
        np.zeros(4)
        if start == 0
        else central_differences(jax.jit(lambda n: flat(jnp.asarray(x), n[0])), np.array([n]))[:, 0]
    )
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert relative(jax.jit(jacobian(flat))(x, n), expected) < 1e-8
        if start >= 0:
            np.testing.assert_allclose(jax.jit(jacobian(flat, 1))(x, n), of_exponent, rtol=1e-8, atol=1e-8)


@pytest.mark.thorough
def test_a_power_with_a_parameter_from_zero():
    """``u' = 1 + u^n`` from zero: the tangent for ``n = 2``, whatever type the number has."""
    solver = po.Solver(
        po.IWP(4), po.TS1(po.ODE(lambda t, u, n: 1.0 + u**n)), controller=po.IntegralController(1e-7, 1e-9)
    )
    for n in (2.0, jnp.asarray(2)):
        np.testing.assert_allclose(solver.solve(0.0, 0.0, 1.0, args=n).mean, np.tan(1.0), rtol=1e-6)


@pytest.mark.thorough
def test_the_repressilator_without_proteins():
    def field(t, u, args):
        (m, p), (alpha, n) = (u[:3], u[3:]), args
        return jnp.concatenate([-m + alpha / (1 + jnp.roll(p, 1) ** n) + 0.2, -5 * (p - m)])

    u0 = jnp.array([1.0, 0, 0, 0, 0, 0])
    solver = po.Solver(po.IWP(4), po.TS1(po.ODE(field)), controller=po.IntegralController(1e-6, 1e-8))
    mean = solver.solve(u0, 0.0, 10.0, args=(200.0, 2.0)).mean[0]
    np.testing.assert_allclose(mean[:3], [12.1729, 5.0151, 3.8978], rtol=2e-4)  # LSODA


def test_a_lifted_equation_with_a_base():
    """By recurrences in every step: ``u' = 2^-u``, so ``u = log2(log(2) t + 2^u0)``."""
    solver = po.Solver(po.IWP(5), po.TS0(po.ODE(lambda t, u, args: 2.0**-u).lifted(2)))
    expected = np.log2(np.log(2) + 2**0.3)
    np.testing.assert_allclose(solver.solve(0.3, 0.0, 1.0).mean, expected, rtol=1e-3)
