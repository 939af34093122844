"""Derivatives at the initial value: closed forms, the two routes against each other and against a plain recursion."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import probode.equations.taylor.derivatives
from probode.equations.taylor.derivatives import taylor_derivatives
from probode.equations.taylor.rules import MissingRule

from ..helpers import central_differences, equations, left_to_nox, relative


T0 = 0.3
U4 = np.array([[0.3, 0.7, -0.2, 0.5]])
MATRIX = np.random.default_rng(0).normal(size=(4, 4))
TANH, RELU = (eqx.nn.MLP(4, 4, 8, 1, act, key=jax.random.key(1), dtype=float) for act in (jnp.tanh, jax.nn.relu))


def derivatives(f, t0, u0, num):
    u0 = jnp.asarray(u0)
    return np.asarray(jax.jit(lambda t, u: taylor_derivatives(f, t, u, num))(jnp.asarray(t0, u0.dtype), u0))


def recursion(f, t0, u0, num):
    """What the methods must agree with: differentiate ``f`` along the flow of the equation, again and again."""

    def flow(t, us):
        return jnp.ones_like(t), jnp.concatenate([us[1:], f(t, us)[None]])

    def next_derivative(g):
        return lambda t, us: jax.jvp(g, (t, us), flow(t, us))[1]

    rows, g = [*u0], f
    for _ in range(num + 1 - len(u0)):
        rows.append(jax.jit(g)(jnp.asarray(t0), jnp.asarray(u0)))
        g = next_derivative(g)
    return np.stack(rows)


def lotka_volterra(t, us):
    x, y = us[0]
    return jnp.stack([0.5 * x - 0.05 * x * y, -0.5 * y + 0.05 * x * y])


def pleiades(t, us):
    x, y, mass = us[0, :7], us[0, 7:], jnp.arange(1.0, 8.0)
    dx, dy = x[:, None] - x, y[:, None] - y
    squared = dx**2 + dy**2
    cubed = jnp.where(squared > 0, squared, 1.0) ** 1.5
    return -jnp.concatenate([jnp.sum(mass * dx / cubed, axis=1), jnp.sum(mass * dy / cubed, axis=1)])


def hamiltonian(t, us):
    gradient = jax.grad(lambda z: 0.5 * jnp.sum(z[2:] ** 2) - jnp.cos(z[0]) * z[1] ** 2)(us[0])
    return jnp.concatenate([gradient[2:], -gradient[:2]])


SERIES = {
    "forced pendulum": (lambda t, us: -jnp.sin(us[0]) - 0.1 * us[1] + jnp.cos(2 * t), np.array([[0.4], [-0.2]])),
    "third order": (lambda t, us: jnp.exp(-t) * us[0] * us[2] - us[1] ** 3, np.array([[0.4, 0], [-0.2, 1], [0, 0.3]])),
    "pleiades": (pleiades, np.random.default_rng(1).normal(size=(2, 14))),
    "hamiltonian": (hamiltonian, U4),
    "network": (lambda t, us: TANH(us[0]) * t, U4),
    "rectified network": (lambda t, us: RELU(jnp.sin(us[0])), U4),
    "products": (lambda t, us: jnp.einsum("i,ij,j->i", us[0], MATRIX, us[0]) + jnp.outer(us[0], us[0]) @ us[0], U4),
    "large": (
        lambda t, us: us[0] * us[0, ::-1] * t + jnp.tanh(us[0]) / (2 + us[0] ** 2),
        np.random.default_rng(2).uniform(size=(1, 300)),
    ),
    "convolution": (
        lambda t, us: jnp.convolve(us[0], us[0] ** 2, mode="same") + jnp.convolve(us[0], MATRIX[0])[:4],
        U4,
    ),
    "quotients": (lambda t, us: us[0] / (1 + us[0, ::-1] ** 2) + 1 / (us[0] + 2.0) + us[0] ** -2 + us[0] / 3, U4),
    "powers": (lambda t, us: us[0] ** 2.0 + us[0] ** 0 + (1 + us[0]) ** 1.7 + us[0] ** 5 + us[0] ** -1.0, U4),
    "moving powers": (lambda t, us: us[0] ** us[0, ::-1] ** 2, np.array([[0.3, 0.7]])),
    "known at run time": (
        lambda t, us: us[0] ** jnp.arange(4) + (1 + us[0]) ** MATRIX[0] + abs(MATRIX[1]) ** us[0],
        U4,
    ),
    "bases": (lambda t, us: jnp.log(2 + us[0]) + 2.0 ** us[0] + jnp.exp2(us[0]) / jnp.sqrt(1 + us[0] ** 2), U4),
    "roots": (lambda t, us: jnp.cbrt(2 + us[0]) * jax.lax.rsqrt(1 + us[0] ** 2), U4),
    "hyperbolic": (lambda t, us: jnp.sinh(us[0]) * jnp.cosh(t) + jnp.tanh(us[0]) + jax.nn.sigmoid(us[0]), U4),
    "circular": (lambda t, us: jnp.tan(us[0] + t) + jnp.arctan(us[0]) + jnp.arcsin(us[0]) * jnp.arccos(us[0] / 2), U4),
    "inverse hyperbolic": (lambda t, us: jnp.arcsinh(us[0]) + jnp.arccosh(2 + us[0]) + jnp.arctanh(us[0]), U4),
    "error functions": (
        lambda t, us: jax.lax.erf(us[0]) + jax.lax.erfc(us[0] * t) + jax.lax.erf_inv(us[0] / 2),
        U4,
    ),
    "pieces": (lambda t, us: jnp.where(us[0] > 0, us[0] ** 2, 0.0) + jnp.maximum(us[0], 0.1) + jnp.abs(us[0]), U4),
    "ties": (lambda t, us: jnp.maximum(us[0], us[0, ::-1]) ** 2 + jnp.max(us[0]), np.array([[0.4, 0.4, -0.1]])),
    "bounds": (lambda t, us: jnp.clip(us[0] * us[0, ::-1] + t, -0.1, 5.0) + jax.lax.clamp(-0.5, us[0], 0.2), U4),
    "steps": (lambda t, us: us[0] * us[0].astype(int) + jnp.floor(us[0]) * us[0], np.array([[1.3, -2.4]])),
    "remainders": (lambda t, us: us[0] * jnp.fmod(us[0], 0.25) + us[0] % 0.3, np.array([[-0.3, 0.4]])),
    "angles": (lambda t, us: jnp.arctan2(1 + us[0] ** 2, us[0]), np.array([[0.0, 0.4]])),
    "indices": (lambda t, us: jnp.roll(us[0], 1) * us[0, jnp.array([0, 2, 2, 1])] + us[0].at[1].add(us[0, 2] ** 2), U4),
    "scatter": (lambda t, us: (us[0] ** 2).at[1].set(us[0, 0] * us[0, 2] + t), U4),
    "reductions": (lambda t, us: jnp.cumsum(us[0]) * jnp.max(us[0]) + jax.nn.softmax(us[0]) * jnp.var(us[0]), U4),
    "own derivatives": (
        lambda t, us: jax.nn.softplus(MATRIX @ us[0]) * t + jax.nn.gelu(us[0]) + jax.nn.relu(us[0]),
        U4,
    ),
    "logaddexp of equals": (lambda t, us: jnp.logaddexp(us[0], us[0, ::-1] ** 2), np.array([[0.25, 0.5]])),
    "constants of loops": (lambda t, us: us[0] * jax.lax.fori_loop(0, 3, lambda _, x: 2 * x, 1.0), U4),
    "cond": (lambda t, us: jax.lax.cond(us[0, 0] > 0, lambda u: jnp.sin(u) * t, jnp.cos, us[0]), U4),
    "scan": (
        lambda t, us: sum(jax.lax.scan(lambda c, x: (jnp.sin(c) * us[0] + t, x * c[0]), us[0], us[0])),
        U4,
    ),
    "while": (lambda t, us: jax.lax.fori_loop(0, jnp.int32(3) + (us[0, 0] > 0), lambda _, c: c * us[0], us[0]), U4),
    "solve": (lambda t, us: jnp.linalg.solve(4 * jnp.eye(4) + jnp.outer(us[0], us[0]), us[0] + t), U4),
    "solve by a constant": (lambda t, us: jnp.linalg.solve(4 * jnp.eye(4) + MATRIX, us[0] ** 2 + t), U4),
    "checkpoint": (lambda t, us: jax.checkpoint(lambda u: jnp.sin(u) * u)(us[0]), U4),
    "fourier": (lambda t, us: jnp.fft.irfft(jnp.fft.rfft(us[0] ** 2) * jnp.fft.rfft(us[0])), U4),
}
# Where a formula that is right elsewhere loses its digits.
DELICATE = {
    "asinh": (lambda t, us: jnp.arcsinh(us[0]), np.array([[-1e4, 0.4]])),
    "expm1": (lambda t, us: -jnp.expm1(us[0]), np.array([[1e-12]])),
    "log1p": (lambda t, us: -jnp.log1p(us[0]), np.array([[1e-12]])),
    "atanh": (lambda t, us: -jnp.arctanh(us[0]), np.array([[1e-12]])),
    "erfc": (lambda t, us: jax.scipy.special.erfc(us[0]), np.array([[6.0]])),
    "min": (lambda t, us: jnp.minimum(us[0] ** 2, 0.3), np.array([[-0.3, 0.4]])),
}
NESTED = {
    "cholesky": (lambda t, us: jnp.linalg.cholesky(4 * jnp.eye(4) + jnp.outer(us[0], us[0]))[:, 0] + t, U4),
    "sort": (lambda t, us: jnp.sort(us[0] ** 2) * t, U4),
    "lgamma": (lambda t, us: jax.lax.lgamma(us[0] + 2), U4),
    "cumprod": (lambda t, us: jnp.cumprod(us[0] + t), U4),
}


def assert_close(actual, expected, rtol):
    """Relative to the largest entry of each derivative."""
    scale = np.max(np.abs(expected), axis=1, keepdims=True)
    assert np.max(np.abs(actual - expected) / np.where(scale > 0, scale, 1.0)) < rtol


@pytest.mark.parametrize("num", (1, 4, 11))
def test_exponential_and_harmonic_oscillator(num):
    actual = derivatives(lambda t, us: -2 * us[0], 0.0, [[1.5]], num)
    np.testing.assert_allclose(actual[:, 0], 1.5 * (-2.0) ** np.arange(num + 1))
    expected = [(2 * 3.0**i) * math.cos(0.4 + i * math.pi / 2) for i in range(num + 1)]
    u0 = np.array([[expected[0]], [expected[1]]])
    np.testing.assert_allclose(derivatives(lambda t, us: -9 * us[0], 0.0, u0, num)[:, 0], expected, rtol=1e-13)


def test_logistic():
    with mpmath.workdps(50):
        x = mpmath.log(mpmath.mpf("0.2") / mpmath.mpf("0.8"))
        coefficients = mpmath.taylor(lambda t: 1 / (1 + mpmath.exp(-t)), x, 11)
        expected = [float(c * mpmath.factorial(i)) for i, c in enumerate(coefficients)]
    actual = derivatives(lambda t, us: us[0] * (1 - us[0]), 0.0, [[0.2]], 11)
    np.testing.assert_allclose(actual[:, 0], expected, rtol=1e-11)


@pytest.mark.parametrize("order", (1, 2), ids=["first order", "second order"])
@pytest.mark.parametrize("num", (2, 5, 8, 11))
def test_time_is_differentiated(order, num):
    """``u^(k) = sin(t) u + t^2``, against the recursion for its Taylor coefficients in 50 digits."""
    t, u0 = mpmath.mpf("0.75"), [mpmath.mpf("0.5"), mpmath.mpf("-0.25")][:order]
    with mpmath.workdps(50):
        sine = mpmath.taylor(mpmath.sin, t, num)
        square = [t**2, 2 * t, mpmath.mpf(1), *[mpmath.mpf(0)] * num]
        c = list(u0)
        for n in range(num + 1 - order):
            value = mpmath.fsum(sine[i] * c[n - i] for i in range(n + 1)) + square[n]
            c.append(value * mpmath.factorial(n) / mpmath.factorial(n + order))
        expected = [float(x * mpmath.factorial(i)) for i, x in enumerate(c)]
    actual = derivatives(lambda t, us: jnp.sin(t) * us[0] + t**2, 0.75, [[float(x)] for x in u0], num)
    np.testing.assert_allclose(actual[:, 0], expected, rtol=1e-12)


def without_rules(field, *args):
    raise MissingRule("everything")


@pytest.mark.parametrize("name", [*list(SERIES)[::3], *left_to_nox(*(n for i, n in enumerate(SERIES) if i % 3))])
def test_the_two_routes_and_the_recursion_agree(name, monkeypatch):
    f, u0 = SERIES[name]
    monkeypatch.setattr(probode.equations.taylor.derivatives, "MAX_NESTED", 0)
    by_series = derivatives(f, T0, u0, 5)
    assert np.all(np.isfinite(by_series))
    monkeypatch.undo()
    monkeypatch.setattr(probode.equations.taylor.derivatives, "compose", without_rules)
    assert_close(by_series[:5], recursion(f, T0, u0, 4), 1e-11)
    assert_close(derivatives(f, T0, u0, 5), by_series, 1e-11)


@pytest.mark.parametrize("name", NESTED)
def test_fields_without_a_rule(name):
    f, u0 = NESTED[name]
    assert_close(derivatives(f, T0, u0, 4), recursion(f, T0, u0, 4), 1e-12)
    with pytest.raises(ValueError, match=f"`{name}`.*smaller num_derivatives.*`Diffuse`"):
        derivatives(f, T0, u0, 9)


@pytest.mark.parametrize("name", DELICATE)
def test_no_digits_are_lost(name):
    f, u0 = DELICATE[name]
    actual = derivatives(f, T0, u0, 4)
    assert np.all(np.isfinite(actual))
    np.testing.assert_allclose(actual, recursion(f, T0, u0, 4), rtol=1e-11, atol=1e-300)


def test_zero_to_a_power():
    # u' = (1 + u)^2.0 and v' = t^3.0 from zero: 1 / (1 - t) - 1 and t^4 / 4; JAX's own rule is NaN for the latter.
    actual = derivatives(lambda t, us: jnp.stack([(1 + us[0, 0]) ** 2.0, t**3.0]), 0.0, [[0.0, 0.0]], 6)
    expected = np.array([[0, 1, 2, 6, 24, 120, 720], [0, 0, 0, 0, 6, 0, 0]]).T
    np.testing.assert_allclose(actual, expected, rtol=1e-14)


def test_functions_with_a_reverse_rule_alone():
    sine = jax.custom_vjp(jnp.sin)
    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    of, plain = (derivatives(lambda t, us, f=f: f(us[0]) * t, T0, U4, 9) for f in (sine, jnp.sin))
    np.testing.assert_array_equal(of, plain)


def test_what_does_not_depend_on_the_solution_needs_no_rule():
    constant = derivatives(lambda t, us: jnp.sort(jnp.linalg.cholesky(MATRIX @ MATRIX.T)[:, 0]) * us[0], T0, U4, 11)
    expected = np.sort(np.linalg.cholesky(MATRIX @ MATRIX.T)[:, 0]) ** np.arange(12)[:, None] * U4
    np.testing.assert_allclose(constant, expected, rtol=1e-12)


def test_order_eleven():
    actual = derivatives(lotka_volterra, 0.0, [[20.0, 15.0]], 11)
    with mpmath.workdps(50):
        x, y = [mpmath.mpf(20)], [mpmath.mpf(15)]
        a, b = mpmath.mpf(0.5), mpmath.mpf(0.05)
        for n in range(11):
            xy = mpmath.fsum(x[i] * y[n - i] for i in range(n + 1))
            x.append((a * x[n] - b * xy) / (n + 1))
            y.append((b * xy - a * y[n]) / (n + 1))
        expected = [[float(c * mpmath.factorial(i)) for c in pair] for i, pair in enumerate(zip(x, y, strict=True))]
    assert_close(actual, np.array(expected), 1e-11)


def test_order_eight_is_the_last_without_a_rule():
    f, u0 = NESTED["cumprod"]
    assert_close(derivatives(f, T0, u0, 8)[:5], recursion(f, T0, u0, 4), 1e-11)


def test_known_derivatives_are_handed_back():
    u0 = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(derivatives(lambda t, us: us[0] * us[1], T0, u0, 1), u0)
    np.testing.assert_array_equal(derivatives(lambda t, us: us[0] * us[1], T0, u0, 2), [*u0, u0[0] * u0[1]])


def flat_derivatives(make_field, k, num):
    """Of ``(t0, *u0, theta)``, all derivatives in one vector: ``theta`` is closed over by the field."""

    def fn(x):
        t0, u0, theta = x[0], x[1:-1].reshape(k, -1), x[-1]
        return taylor_derivatives(make_field(theta), t0, u0, num).ravel()

    return jax.jit(fn)


GRADIENTS = {
    "products": (lambda a: lambda t, us: jnp.sin(a * t) * us[0] + us[0] ** 2 * us[0, ::-1] + t**2, 1, 5),
    "second order": (lambda a: lambda t, us: -a * jnp.sin(us[0]) - us[1] * t / (1 + us[0] ** 2), 2, 5),
    "jit": (lambda a: lambda t, us: jax.jit(lambda u: jnp.tanh(a * u) * t)(us[0]), 1, 4),
    "custom_jvp_call": (lambda a: lambda t, us: jax.nn.softplus(a * us[0] + t) * us[0, ::-1], 1, 4),
    "scan": (lambda a: lambda t, us: jax.lax.scan(lambda c, _: (a * c * us[0] + t, None), us[0], None, 2)[0], 1, 3),
    "cumprod": (lambda a: lambda t, us: jnp.cumprod(a * us[0] + t), 1, 4),
    "solve": (lambda a: lambda t, us: jnp.linalg.solve(jnp.array([[2.0, 0.3], [t, a + 1.0]]), us[0] ** 2), 1, 3),
}


@pytest.mark.parametrize("name", ["products", "second order", *left_to_nox(*list(GRADIENTS)[2:])])
def test_gradients_in_both_modes_also_at_zero(name):
    make_field, k, num = GRADIENTS[name]
    fn = flat_derivatives(make_field, k, num)
    forward, reverse = jax.jit(jax.jacfwd(fn)), jax.jit(jax.jacrev(fn))
    for scale in (1.0, 0.0):
        x = np.array([0.3, *scale * np.array([0.4, -0.6, 0.2, 0.5])[: 2 * k], 0.8])
        assert relative(forward(x), central_differences(fn, x, step=1e-3)) < 1e-8
        assert relative(reverse(x), forward(x)) < 1e-12


@pytest.mark.parametrize("name", ("custom_jvp_call", "products", "cumprod"))
def test_vmap(name):
    make_field, k, num = GRADIENTS[name]
    fn, xs = flat_derivatives(make_field, k, num), np.random.default_rng(2).uniform(0.1, 1.0, size=(3, 4))
    np.testing.assert_allclose(jax.vmap(fn)(xs), np.stack([fn(x) for x in xs]), rtol=1e-12)


@pytest.mark.parametrize("f", [lotka_volterra, lambda t, us: jnp.cumprod(us[0] / 99) + t], ids=["series", "nested"])
def test_single_precision_stays_single(f):
    u0 = np.array([[20.0, 15.0]])
    actual = derivatives(f, T0, u0.astype(np.float32), 8)
    assert actual.dtype == np.float32
    assert_close(actual, derivatives(f, T0, u0, 8), 1e-4)
    out = jax.eval_shape(lambda u: taylor_derivatives(f, jnp.asarray(T0), u, 3), jnp.asarray(u0, jnp.float32))
    assert out.dtype == jnp.float32


def program_size(f, u0, num):
    closed = jax.make_jaxpr(lambda t, u: taylor_derivatives(f, t, u, num))(jnp.asarray(T0), jnp.asarray(u0))
    return sum(1 for _ in equations(closed.jaxpr))


def test_programs_are_as_large_for_every_order():
    for name in ("pleiades", "network", "quotients", "circular", "error functions", "scan", "solve"):
        sizes = {program_size(*SERIES[name], num) for num in (4, 8, 11)}
        assert len(sizes) == 1, name


def test_programs_grow_mildly_without_rules():
    for name in ("sort", "lgamma", "cumprod"):
        small, large = (program_size(*NESTED[name], num) for num in (4, 8))
        assert large < (8 / 4) ** 3 * small, name  # doubling with every derivative makes 16


def test_the_field_is_traced_once():
    calls = []

    def f(t, us):
        calls.append(None)
        return us[0] * jnp.cos(t)

    derivatives(f, T0, U4, 8)
    assert len(calls) == 1
