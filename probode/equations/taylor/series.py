"""Truncated Taylor series: their products, and functions of them.

A series is an array with the coefficients ``x_k = x^(k) / k!`` on its leading axis, where ``x`` is a function of time.
Functions act on the whole axis at once, so that the size of a program does not depend on the order, except for large
arrays (see ``convolve``). Griewank & Walther (2008), "Evaluating derivatives", ch. 13.

Axes: ``n`` coefficients, those of degree 0 to ``n - 1``.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, PyTree


Coefficients = Inexact[Array, "n ..."]

# From so many elements of a coefficient on, sums and recursions over coefficients are unrolled (see `convolve`).
_LARGE = 256


def constant(x: Inexact[Array, "..."], n: int) -> Coefficients:
    """The series of a constant, with ``n`` coefficients."""
    return jnp.zeros((n, *jnp.shape(x)), jnp.result_type(x)).at[0].set(x)


def derivative(x: Coefficients) -> Coefficients:
    """The series of ``x'``. Its last coefficient is unknown and set to zero, so that the length stays the same."""
    return jnp.concatenate([_degrees(x) * x[1:], jnp.zeros_like(x[:1])])


def integral(start: Inexact[Array, "..."], dx: Coefficients) -> Coefficients:
    """The series of ``x`` from ``start``, its value ``x_0``, and ``dx``, the series of ``x'``."""
    return jnp.concatenate([start[None], dx[:-1] / _degrees(dx)])


def convolve(product: Callable, x: Coefficients, y: Coefficients) -> Coefficients:
    """The series of a bilinear product, ``z_k = sum_i product(x_i, y_(k-i))``.

    The terms are rows of a matrix, so that the program has one size for all orders. For large arrays, where copying the
    rows would cost more than compilation, they are unrolled.
    """
    n = y.shape[0]
    if max(x.size, y.size) >= _LARGE * n:
        xs, ys = jnp.unstack(x), jnp.unstack(y)
        return jnp.stack([sum(product(xs[i], ys[k - i]) for i in range(k + 1)) for k in range(n)])
    rows = jax.vmap(jax.vmap(product, in_axes=(None, 0)))(x, _shifted(y))
    return jnp.sum(rows, axis=0)


def times(x: Coefficients, y: Coefficients) -> Coefficients:
    """The series of ``x y``."""
    return convolve(jnp.multiply, x, y)


def coefficient(x: Coefficients, y: Coefficients, k: int | Array) -> Inexact[Array, "..."]:
    """The ``k``-th coefficient of ``x y`` without the others; ``k`` may be traced."""
    if isinstance(k, int):
        xs, ys = jnp.unstack(x), jnp.unstack(y)
        return sum(xs[i] * ys[k - i] for i in range(k + 1))  # type: ignore[return-value]  # there are some
    n = y.shape[0]
    backwards = jnp.concatenate([y[::-1], jnp.zeros_like(y)])
    return jnp.sum(x * lax.dynamic_slice_in_dim(backwards, n - 1 - k, n), axis=0)


def grown(start: PyTree, following: Callable, n: int) -> PyTree:
    """A tree of series, built up by a recursion: coefficient ``k`` is ``following(y, k)``.

    ``start``: the coefficients of degree zero. ``y``: the series so far, zero from coefficient ``k`` on. The recursion
    is a loop, and unrolled for large arrays.
    """
    y = jax.tree.map(lambda x: constant(x, n), start)

    def one_more(y, k):
        put = lambda ys, new: lax.dynamic_update_index_in_dim(ys, new, k, 0)  # noqa: E731
        return jax.tree.map(put, y, following(y, k)), None

    if any(x.size >= _LARGE for x in jax.tree.leaves(start)):
        for k in range(1, n):
            y = jax.tree.map(lambda ys, new: jnp.concatenate([ys[:k], new[None], ys[k + 1 :]]), y, following(y, k))  # noqa: B023
        return y
    return lax.scan(one_more, y, jnp.arange(1, n))[0]


def divide(x: Coefficients, y: Coefficients) -> Coefficients:
    """The series of ``x / y``."""
    return grown(x[0] / y[0], lambda q, k: (x[k] - coefficient(q, y, k)) / y[0], x.shape[0])


def power(x: Coefficients, exponent: int | float | complex) -> Coefficients:
    """The series of ``y = x^exponent``, from ``x y' = exponent y x'``; for an integer from zero on by products."""
    if is_integer(exponent):
        return _integer_power(x, int(exponent.real))
    return _power_from(x[0] ** exponent, x, exponent)


def is_integer(number: int | float | complex) -> bool:
    """Whether a number of Python's is an integer, of whatever type."""
    return number.imag == 0 and float(number.real).is_integer()


def power_of_unknown(x: Coefficients, exponent: Inexact[Array, "..."]) -> Coefficients:
    """The series of ``x^exponent`` for a constant exponent whose value is not known when the program is traced.

    It is ``sum_m binomial(exponent, m) x_0^(exponent - m) (x - x_0)^m``. Where ``x_0`` is zero this is exact for an
    exponent ``0, 1, 2, ...``; for any other it is zero below the exponent, and infinite or NaN from there on. (By the
    recursion of ``power``, which divides by ``x_0``, an integer exponent would lose its digits near zero.)
    """
    n = x.shape[0]
    lower, upper = (jnp.arange(n, dtype=x.dtype).reshape(shape + (1,) * exponent.ndim) for shape in ((1, n), (n, 1)))
    factors = jnp.where(lower.real < upper.real, (exponent[None, None] - lower) / (lower + 1), 1)
    terms = weighted_power(jnp.prod(factors, axis=1), x[:1], exponent[None], upper[:, 0])
    # (x - x_0) / t: where higher terms are infinite, zeros times them would spoil the degrees below.
    moved = jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])

    def outwards(y, term):
        return jnp.concatenate([term[None], times(moved, y)[:-1]]), None

    return lax.scan(outwards, jnp.zeros_like(x), terms, reverse=True)[0]


def weighted_power(weight: Array, x: Array, exponent: Array, m: Array | int) -> Array:
    """``weight x^(exponent - m)``, and zero where ``x`` and the weight are zero, whatever the power is.

    Where ``x`` is zero its derivative with respect to the exponent is zero, as JAX has it for the power itself.
    """
    zero = x == 0
    nothing, left = zero & (weight == 0), exponent - m
    # JAX's derivative of zero to the power zero is NaN.
    base = jnp.where(nothing | (left == 0), 1, x)
    at_zero = lax.stop_gradient(weight) * base ** lax.stop_gradient(left)
    return jnp.where(nothing, 0, jnp.where(zero, at_zero, weight * jnp.where(zero, 1, x) ** left))


def exponential(base: Inexact[Array, "..."], x: Coefficients) -> Coefficients:
    """The series of ``base^x`` for a constant base. That of zero is zero for a positive ``x``."""
    zero = base == 0
    log = jnp.where(zero & (x[0].real > 0), 0, jnp.log(base))
    return exponential_like(lambda y: log[None] * y, lambda start: base**start)(x)


def power_of_moving(x: Coefficients, exponent: Coefficients) -> Coefficients:
    """The series of ``x^exponent`` where both move: ``x^(exponent_0) exp((exponent - exponent_0) log x)``.

    It is finite for an ``x`` without a logarithm, too, where the exponent does not move after all: that of a parameter
    that is a component of the state.
    """
    still, rest = power_of_unknown(x, exponent[0]), exponent.at[0].set(0)
    outside = (x[0] == 0) if jnp.iscomplexobj(x) else ~(x[0] > 0)
    outside = outside & jnp.all(rest == 0, axis=0)
    moved = times(still, _exp(times(rest, ELEMENTWISE["log"](x.at[0].set(jnp.where(outside, 1, x[0]))))))
    return jnp.where(outside[None], still, moved)


def exponential_like(slope: Callable, start: Callable) -> Callable[[Coefficients], Coefficients]:
    """A function from the series of ``x`` to that of ``y``, with ``y' = slope(y) x'`` and ``y_0 = start(x_0)``."""

    def function(x):
        dx = derivative(x)
        following = lambda y, k: _over(coefficient(slope(y), dx, k - 1), k)  # noqa: E731
        return grown(start(x[0]), following, x.shape[0])

    return function


def _integral_like(slope: Callable, start: Callable) -> Callable[[Coefficients], Coefficients]:
    """A function from the series of ``x`` to that of ``y``, with ``y' = slope(x, x')`` and ``y_0 = start(x_0)``."""
    return lambda x: integral(start(x[0]), slope(x, derivative(x)))


def _pair_like(
    sign: float, sine: Callable, cosine: Callable
) -> Callable[[Coefficients], tuple[Coefficients, Coefficients]]:
    """A function from the series of ``x`` to those of ``s`` and ``c``, with ``s' = c x'`` and ``c' = sign s x'``."""

    def functions(x):
        dx = derivative(x)

        def following(pair, k):
            s, c = pair
            return _over(coefficient(c, dx, k - 1), k), sign * _over(coefficient(s, dx, k - 1), k)

        return grown((sine(x[0]), cosine(x[0])), following, x.shape[0])

    return functions


def _degrees(x):
    return jnp.arange(1, x.shape[0], dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _over(x, k):
    return x / jnp.asarray(k, x.dtype)


def _shifted(y):
    """The matrix with the entry ``y_(k-i)`` in row ``i`` and column ``k``, zero for ``k < i``."""
    n = y.shape[0]
    padded = jnp.concatenate([y, jnp.zeros_like(y)])
    # One vector of length 2n repeated: cut into rows of length 2n - 1 it begins one place further on in every row.
    rows = jnp.broadcast_to(padded, (n, *padded.shape)).reshape(2 * n * n, *y.shape[1:])
    return rows[: n * (2 * n - 1)].reshape(n, 2 * n - 1, *y.shape[1:])[:, :n]


def _plus(x, number):
    return x.at[0].add(number)


def _integer_power(x, exponent):
    one = constant(jnp.ones_like(x[0]), x.shape[0])
    result, square, remaining = None, x, abs(exponent)
    while remaining:
        if remaining % 2:
            result = square if result is None else times(result, square)
        remaining //= 2
        square = times(square, square) if remaining else square
    if result is None:
        return one
    return result if exponent > 0 else divide(one, result)


def _power_from(start, x, exponent):
    dx = derivative(x)

    def following(y, k):
        slope = _over(exponent * coefficient(y, dx, k - 1) - coefficient(derivative(y), x, k - 1), k)
        return over_base(slope, x[0], exponent, k)

    return grown(start, following, x.shape[0])


def over_base(slope: Array, x: Array, exponent: int | float | complex, k: int | Array) -> Array:
    """``slope / x``, coefficient ``k`` of a power that is no integer, and at ``x = 0`` zero below the exponent.

    There are no derivatives at zero from the order of the exponent on: these are NaN, and that of the last zero is.
    """
    end = math.ceil(exponent.real)
    if end <= 1:
        return slope / x
    zero = x == 0
    return jnp.where(zero & (k < end), 0, slope / jnp.where(zero & (k + 1 < end), 1, x))


def _reciprocal_root(x):
    return _power_from(lax.rsqrt(x[0]), x, -0.5)


def _gauss(x):
    """``2 / sqrt(pi) exp(-x^2)``, the slope of the error function."""
    return _exp(-times(x, x)) * (2 / math.sqrt(math.pi))


def _arctangent(y, x):
    slope = divide(times(x, derivative(y)) - times(y, derivative(x)), times(x, x) + times(y, y))
    return integral(jnp.arctan2(y[0], x[0]), slope)


def _larger(x, y):
    """The series whose value is larger; where both are equal their mean, as in JAX's derivative of a maximum."""
    return jnp.where(x[0] == y[0], (x + y) / 2, jnp.where(x[0] > y[0], x, y))


def _smaller(x, y):
    return -_larger(-x, -y)


_exp = exponential_like(lambda y: y, jnp.exp)
_circular = _pair_like(-1.0, jnp.sin, jnp.cos)
_hyperbolic = _pair_like(1.0, jnp.sinh, jnp.cosh)

# Functions of series, by the names of JAX's elementwise operations.
ELEMENTWISE: dict[str, Callable] = {
    "square": lambda x: times(x, x),
    "exp": _exp,
    "exp2": exponential_like(lambda y: math.log(2) * y, jnp.exp2),
    "expm1": exponential_like(lambda y: _plus(y, 1), jnp.expm1),
    "tanh": exponential_like(lambda y: _plus(-times(y, y), 1), jnp.tanh),
    "logistic": exponential_like(lambda y: y - times(y, y), jax.nn.sigmoid),
    "tan": exponential_like(lambda y: _plus(times(y, y), 1), jnp.tan),
    "erf_inv": exponential_like(lambda y: _exp(times(y, y)) * (math.sqrt(math.pi) / 2), lax.erf_inv),
    "sin": lambda x: _circular(x)[0],
    "cos": lambda x: _circular(x)[1],
    "sinh": lambda x: _hyperbolic(x)[0],
    "cosh": lambda x: _hyperbolic(x)[1],
    "sqrt": lambda x: _power_from(jnp.sqrt(x[0]), x, 0.5),
    "cbrt": lambda x: _power_from(jnp.cbrt(x[0]), x, 1 / 3),
    "rsqrt": _reciprocal_root,
    "log": _integral_like(lambda x, dx: divide(dx, x), jnp.log),
    "log1p": _integral_like(lambda x, dx: divide(dx, _plus(x, 1)), jnp.log1p),
    "atan": _integral_like(lambda x, dx: divide(dx, _plus(times(x, x), 1)), jnp.arctan),
    "atanh": _integral_like(lambda x, dx: divide(dx, _plus(-times(x, x), 1)), jnp.arctanh),
    "asin": _integral_like(lambda x, dx: times(dx, _reciprocal_root(_plus(-times(x, x), 1))), jnp.arcsin),
    "acos": _integral_like(lambda x, dx: -times(dx, _reciprocal_root(_plus(-times(x, x), 1))), jnp.arccos),
    "asinh": _integral_like(lambda x, dx: times(dx, _reciprocal_root(_plus(times(x, x), 1))), jnp.arcsinh),
    "acosh": _integral_like(lambda x, dx: times(dx, _reciprocal_root(_plus(times(x, x), -1))), jnp.arccosh),
    "erf": _integral_like(lambda x, dx: times(dx, _gauss(x)), lax.erf),
    "erfc": _integral_like(lambda x, dx: -times(dx, _gauss(x)), lax.erfc),
    "atan2": _arctangent,
    "max": _larger,
    "min": _smaller,
    "clamp": lambda low, x, high: _larger(low, _smaller(x, high)),
    "rem": lambda x, y: x - jnp.trunc(x[:1] / y[:1]) * y,
}
