"""Taylor series of a traced program one coefficient at a time, by recurrences that are unrolled into the program.

A series is a function of the degree that remembers what it has returned: ``x(k)`` is the coefficient ``x^(k) / k!``,
computed from lower ones when it is asked for. So the series of a solution may refer to itself, and no coefficient is
computed twice: ``n`` of them take ``n^2 / 2`` multiplications for each one of the program, where ``derivatives`` needs
``n^3``, but a program of as many operations. (McIlroy 1999, "Power series, power serious"; Griewank & Walther 2008,
"Evaluating derivatives", ch. 13.)
"""

import functools as ft
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Float, Inexact

from . import rules, series


Coefficient = Inexact[Array, "..."]


class Lazy:
    """A series whose coefficients are computed when they are asked for, each of them once."""

    def __init__(self, coefficient: Callable[[int], Coefficient]):
        self._coefficient = coefficient
        self._known: list[Coefficient] = []

    def __call__(self, k: int) -> Coefficient:
        while len(self._known) <= k:
            self._known.append(self._coefficient(len(self._known)))
        return self._known[k]


def compose(closed: ClosedJaxpr, *args: Lazy) -> list[Lazy]:
    """The series of a traced function's results, from those of its arguments."""
    return [_promoted(out) for out in _evaluate(closed.jaxpr, closed.consts, args)]


def solution(field: ClosedJaxpr, t0: Float[Array, ""], u0: Float[Array, "k d"], num: int) -> Float[Array, "{num}+1 d"]:
    """``u, u', ..., u^(num)`` at ``t0`` for the solution of ``u^(k) = f(t, (u, ..., u^(k-1)))``, given the first ``k``.

    ``field``: the jaxpr of ``f``. Derivatives are plain, not divided by factorials.
    """
    k = u0.shape[0]

    def derivative(i):
        return u0[i] if i < k else math.factorial(i - k) * f(i - k)

    def of_arguments(i):
        return jnp.stack([u(i + j) for j in range(k)]) / math.factorial(i)

    u = Lazy(derivative)
    (f,) = compose(field, _time(t0), Lazy(of_arguments))
    return jnp.stack([u(i) for i in range(num + 1)])


def along(closed: ClosedJaxpr, t: Float[Array, ""], curve: Float[Array, "levels *x"]) -> Float[Array, "levels *out"]:
    """A traced function of time and ``x``, and its time derivatives, where ``x`` moves along ``curve = [x, x', ...]``.

    Derivatives are plain, not divided by factorials.
    """
    (out,) = compose(closed, _time(t), Lazy(lambda i: curve[i] / math.factorial(i)))
    return jnp.stack([math.factorial(i) * out(i) for i in range(curve.shape[0])])


def _time(t):
    return Lazy(lambda i: t if i == 0 else jnp.ones_like(t) if i == 1 else jnp.zeros_like(t))


def size(closed: ClosedJaxpr) -> int:
    """The number of operations of a traced program, without those inside of loops and branches."""
    inner = [eqn.params["jaxpr"] for eqn in closed.jaxpr.eqns if eqn.primitive.name in _INLINED]
    return len(closed.jaxpr.eqns) + sum(size(jaxpr) for jaxpr in inner)


def _evaluate(jaxpr: Jaxpr, consts: Sequence, args: Sequence) -> list:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(v):
        return jnp.asarray(v.val, v.aval.dtype) if isinstance(v, Literal) else env[v]  # type: ignore[attr-defined]

    for eqn in rules.needed(jaxpr):
        env.update(zip(eqn.outvars, _apply(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn: JaxprEqn, operands: list) -> list:
    name = eqn.primitive.name
    if not any(isinstance(x, Lazy) for x in operands):
        return rules.bind(eqn, operands)
    if rules.is_constant(eqn):
        return rules.bind(eqn, [x(0) if isinstance(x, Lazy) else x for x in operands])
    if rules.is_linear(eqn) or (name in _BILINEAR and not all(isinstance(x, Lazy) for x in operands)):

        @ft.cache
        def of_degree(k):
            return rules.bind(eqn, [_at(x, k, name not in _BILINEAR) for x in operands])

        return [Lazy(ft.partial(lambda i, k: of_degree(k)[i], i)) for i in range(len(eqn.outvars))]
    if name in _BILINEAR:
        return [_product(lambda a, b: rules.bind(eqn, [a, b])[0], *operands)]
    if name in _INLINED:
        inner = eqn.params["jaxpr"]
        return _evaluate(inner.jaxpr, inner.consts, operands)
    if name == "pow":
        return [_powered(eqn, *operands)]
    if name in _RECURRENCES:
        shape = eqn.outvars[0].aval.shape  # type: ignore[attr-defined]  # all values of such programs are arrays
        return [_RECURRENCES[name](eqn, *(_broadcast(_promoted(x), shape) for x in operands))]
    return _by_rule(eqn, operands)


def _by_rule(eqn, operands):
    """Any other operation: the rule for whole series, once more for every coefficient."""
    lazy = [x for x in operands if isinstance(x, Lazy)]

    @ft.cache
    def outputs(k):
        given = iter([rules.Series(jnp.stack([x(i) for i in range(k + 1)])) for x in lazy])
        whole = [next(given) if isinstance(x, Lazy) else x for x in operands]
        return [rules.promoted(out, k + 1) for out in rules.apply(eqn, whole)]

    def output(i):
        if not isinstance(outputs(0)[i], rules.Series):
            return outputs(0)[i]
        return Lazy(lambda k: outputs(k)[i].c[k])

    return [output(i) for i in range(len(eqn.outvars))]


def _at(x, k, linear):
    """The coefficient of degree ``k`` of an operand; a constant has one of degree zero alone, unless it multiplies."""
    if isinstance(x, Lazy):
        return x(k)
    return x if k == 0 or not linear or not jnp.issubdtype(jnp.result_type(x), jnp.inexact) else jnp.zeros_like(x)


def _promoted(x):
    moves = isinstance(x, Lazy) or not jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return x if moves else Lazy(lambda k: x if k == 0 else jnp.zeros_like(x))


def _broadcast(x, shape):
    return Lazy(lambda k: jnp.broadcast_to(x(k), shape))


# --- The algebra of series: Griewank & Walther (2008), table 13.1 and 13.2


def _product(product, x, y):
    return Lazy(lambda k: _sum(product(x(i), y(k - i)) for i in range(k + 1)))


def _sum(terms):
    return ft.reduce(jnp.add, terms)


def _times(x, y):
    return _product(jnp.multiply, x, y)


def _square(x):
    def coefficient(k):
        pairs = [2 * x(i) * x(k - i) for i in range((k + 1) // 2)]
        return _sum([*pairs, x(k // 2) ** 2] if k % 2 == 0 else pairs)

    return Lazy(coefficient)


def _divide(x, y):
    def coefficient(k):
        return (x(k) - _sum(q(i) * y(k - i) for i in range(k))) / y(0) if k else x(0) / y(0)

    q = Lazy(coefficient)
    return q


def _integral(start, slope, x):
    """``y`` with ``y' = slope x'`` and the value ``start``; ``slope`` may be made of ``y``: a function of it."""

    def coefficient(k):
        if k == 0:
            return start(x(0))
        return _sum(j * x(j) * dy(k - j) for j in range(1, k + 1)) / k

    y = Lazy(coefficient)
    dy = slope(y)
    return y


def _power(x, exponent):
    """``x^exponent``, from ``x y' = exponent y x'``."""

    def coefficient(k):
        if k == 0:
            return x(0) ** exponent
        slope = _sum((exponent * j - (k - j)) * x(j) * y(k - j) for j in range(1, k + 1))
        return series.over_base(slope, k * x(0), exponent, k)

    y = Lazy(coefficient)
    return y


def _integer_power(x, exponent):
    result, square, remaining = None, x, abs(exponent)
    while remaining:
        if remaining % 2:
            result = square if result is None else _times(result, square)
        remaining //= 2
        square = _square(square) if remaining else square
    one = Lazy(lambda k: jnp.ones_like(x(0)) if k == 0 else jnp.zeros_like(x(0)))
    result = one if result is None else result
    return result if exponent >= 0 else _divide(one, result)


def _plus(x, number):
    return Lazy(lambda k: x(0) + number if k == 0 else x(k))


def _negative(x):
    return Lazy(lambda k: -x(k))


def _circular(x):
    def sine(k):
        return jnp.sin(x(0)) if k == 0 else _sum(j * x(j) * c(k - j) for j in range(1, k + 1)) / k

    def cosine(k):
        return jnp.cos(x(0)) if k == 0 else -_sum(j * x(j) * s(k - j) for j in range(1, k + 1)) / k

    s, c = Lazy(sine), Lazy(cosine)
    return s, c


def _powered(eqn, x, y):
    exponent, (out,) = eqn.invars[1], eqn.outvars
    if isinstance(y, Lazy):
        return _by_rule(eqn, [x, y])[0]
    x = _broadcast(x, out.aval.shape)
    if not isinstance(exponent, Literal):
        return _power_of_unknown(x, jnp.broadcast_to(y, out.aval.shape).astype(out.aval.dtype))
    number = rules.number_of(exponent)
    return _integer_power(x, int(number.real)) if series.is_integer(number) else _power(x, number)


def _power_of_unknown(x, exponent):
    """``series.power_of_unknown``, from the outermost term of its sum inwards."""
    binomial = Lazy(lambda m: binomial(m - 1) * (exponent - (m - 1)) / m if m else jnp.ones_like(exponent))

    @ft.cache
    def from_term(m):
        def coefficient(k):
            if k == 0:
                return series.weighted_power(binomial(m), x(0), exponent, m)
            return _sum(x(k - i) * from_term(m + 1)(i) for i in range(k))

        return Lazy(coefficient)

    return from_term(0)


_INLINED = ("jit", "pjit", "closed_call")
_BILINEAR = ("mul", "dot_general", "conv_general_dilated")
_RECURRENCES: dict[str, Callable] = {
    "square": lambda eqn, x: _square(x),
    "div": lambda eqn, x, y: _divide(x, y),
    "integer_pow": lambda eqn, x: _integer_power(x, eqn.params["y"]),
    "sqrt": lambda eqn, x: _power(x, 0.5),
    "rsqrt": lambda eqn, x: _power(x, -0.5),
    "exp": lambda eqn, x: _integral(jnp.exp, lambda y: y, x),
    "log": lambda eqn, x: _integral(jnp.log, lambda y: _integer_power(x, -1), x),
    "tanh": lambda eqn, x: _integral(jnp.tanh, lambda y: _plus(_negative(_square(y)), 1), x),
    "logistic": lambda eqn, x: _integral(
        lambda z: 1 / (1 + jnp.exp(-z)), lambda y: _times(y, _plus(_negative(y), 1)), x
    ),
    "sin": lambda eqn, x: _circular(x)[0],
    "cos": lambda eqn, x: _circular(x)[1],
}
