"""Propagation of Taylor series through a traced program (Taylor-mode differentiation): a rule for every operation.

A value that depends on time is a ``Series``, any other an array. ``MissingRule`` names an operation without a rule.
"""

import cmath
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Inexact

from .series import (
    ELEMENTWISE,
    constant,
    convolve,
    derivative,
    divide,
    exponential,
    exponential_like,
    grown,
    integral,
    power,
    power_of_moving,
    power_of_unknown,
)


class MissingRule(Exception):
    """Raised for an operation without a rule for Taylor series; its message is the name of the operation."""


class Series(eqx.Module):
    """A value that depends on time, as its first ``n`` Taylor coefficients; see the module ``series``."""

    c: Inexact[Array, "n *shape"]


def compose(closed: ClosedJaxpr, *args: Series) -> list[Series]:
    """The series of a traced function's results, from those of its arguments; raises ``MissingRule``."""
    return [promoted(out, len(args[0].c)) for out in _evaluate(closed.jaxpr, closed.consts, args)]


def _evaluate(jaxpr: Jaxpr, consts: Sequence, args: Sequence) -> list:
    """The results of a jaxpr: series where they depend on time, arrays elsewhere.

    Operations that no result needs are left out; they might have no rule.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(v):
        return jnp.asarray(v.val, v.aval.dtype) if isinstance(v, Literal) else env[v]  # type: ignore[attr-defined]

    for eqn in needed(jaxpr):
        operands = [read(v) for v in eqn.invars]
        env.update(zip(eqn.outvars, apply(eqn, operands), strict=True))
    return [read(v) for v in jaxpr.outvars]


def needed(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The operations on which the results of a jaxpr depend, in order."""
    needed, eqns = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            eqns.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
    return reversed(eqns)


def apply(eqn: JaxprEqn, operands: list) -> list:
    """The results of an operation of a jaxpr: series if they depend on time, arrays otherwise."""
    name = eqn.primitive.name
    if not any(isinstance(x, Series) for x in operands):
        return bind(eqn, operands)
    if is_constant(eqn):
        return bind(eqn, [_at_start(x) for x in operands])
    if is_linear(eqn):
        return _linear(eqn, *operands)
    if name in ELEMENTWISE:
        # (All values of such programs are arrays.)
        return [Series(ELEMENTWISE[name](*_alike(operands, eqn.outvars[0].aval.shape)))]  # type: ignore[attr-defined]
    if name not in _RULES:
        raise MissingRule(name)
    return _RULES[name](eqn, *operands)


def is_constant(eqn: JaxprEqn) -> bool:
    """Whether the results of an operation do not move with its operands, but for jumps."""
    return eqn.primitive.name in _STEPS or not any(_is_float(v.aval) for v in eqn.outvars)


def is_linear(eqn: JaxprEqn) -> bool:
    """Whether an operation is linear in its floating-point operands together."""
    return eqn.primitive.name in _LINEAR


def bind(eqn: JaxprEqn, operands: Sequence) -> list:
    """The results of an operation of a jaxpr."""
    out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _is_float(aval):
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _at_start(x):
    return x.c[0] if isinstance(x, Series) else x


def _length(operands):
    return next(len(x.c) for x in operands if isinstance(x, Series))


def promoted(x: Any, n: int) -> Any:
    """A floating-point constant as a series; series, integers and flags as they are."""
    moves = isinstance(x, Series) or not jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return x if moves else Series(constant(x, n))


def _alike(operands, shape):
    """The coefficients of all operands, constants among them, broadcast to one shape."""
    n = _length(operands)
    coefficients = [promoted(x, n).c for x in operands]
    return [jnp.broadcast_to(c.reshape(*c.shape, *[1] * (1 + len(shape) - c.ndim)), (n, *shape)) for c in coefficients]


# --- linear and bilinear operations


def _linear(eqn, *operands):
    """A linear operation, applied to each coefficient; integers and flags among the operands have none."""
    return _each(eqn, *[promoted(x, _length(operands)) for x in operands])


def _each(eqn, *operands):
    axes = [0 if isinstance(x, Series) else None for x in operands]
    coefficients = [x.c if isinstance(x, Series) else x for x in operands]
    return [Series(c) for c in jax.vmap(lambda *xs: bind(eqn, xs), in_axes=axes)(*coefficients)]


def _bilinear(eqn, x, y):
    if not (isinstance(x, Series) and isinstance(y, Series)):
        return _each(eqn, x, y)
    return [Series(convolve(lambda a, b: bind(eqn, [a, b])[0], x.c, y.c))]


# --- rules that depend on the parameters or the literals of the operation


def _divided(eqn, x, y):
    if isinstance(y, Series):
        return [Series(divide(*_alike([x, y], eqn.outvars[0].aval.shape)))]
    return _each(eqn, x, y)


def _powered(eqn, x, y):
    base, exponent = (number_of(v) if isinstance(v, Literal) else None for v in eqn.invars)
    if exponent is not None:
        return [Series(power(x.c, exponent))]
    if base is not None and (base.imag or base.real > 0):
        log = cmath.log(base) if base.imag else math.log(base.real)
        return [Series(exponential_like(lambda z: log * z, lambda start: jnp.power(x, start))(y.c))]
    out = eqn.outvars[0].aval
    still = lambda x: jnp.broadcast_to(x, out.shape).astype(out.dtype)  # noqa: E731
    moving = lambda x: _alike([x], out.shape)[0]  # noqa: E731
    if not isinstance(y, Series):
        return [Series(power_of_unknown(moving(x), still(y)))]
    if not isinstance(x, Series):
        return [Series(exponential(still(x), moving(y)))]
    return [Series(power_of_moving(moving(x), moving(y)))]


def number_of(literal: Literal) -> float | complex:
    """The number that a literal of a jaxpr is, of Python's own type: a float where it is real."""
    number = complex(literal.val)
    return number if number.imag else number.real


def _extreme(eqn, x):
    """The maximum or minimum over axes; the mean of all entries that attain it, as in JAX's derivative."""
    axes, (top,) = eqn.params["axes"], bind(eqn, [x.c[0]])
    share = (x.c[0] == jnp.expand_dims(top, axes)).astype(x.c.dtype)
    share = share / jnp.sum(share, axis=axes, keepdims=True)
    return [Series(jnp.sum(share[None] * x.c, axis=tuple(a + 1 for a in axes)))]


def _inlined(eqn, *operands):
    jaxpr = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params)
    consts, jaxpr = (jaxpr.consts, jaxpr.jaxpr) if isinstance(jaxpr, ClosedJaxpr) else ((), jaxpr)
    return _evaluate(jaxpr, consts, operands)


def _absolute(eqn, x):
    if jnp.iscomplexobj(x.c):
        raise MissingRule("abs")
    return [Series(jnp.sign(x.c[:1]) * x.c)]


def _by_own_derivative(eqn, *operands):
    """A function with a custom derivative: ``y' = jvp(x, x')`` as a series of one coefficient less, integrated."""
    if not all(_is_float(v.aval) for v in eqn.outvars):
        raise MissingRule(eqn.primitive.name)
    moving = [i for i, x in enumerate(operands) if isinstance(x, Series)]
    starts = bind(eqn, [_at_start(x) for x in operands])
    if _length(operands) == 1:
        return [Series(y[None]) for y in starts]

    def of_moving(*xs):
        given = dict(zip(moving, xs, strict=True))
        return bind(eqn, [given.get(i, x) for i, x in enumerate(operands)])

    at = [operands[i].c[0] for i in moving]
    tangent = jax.make_jaxpr(lambda xs, dxs: jax.jvp(of_moving, xs, dxs)[1])(at, at)
    xs = [Series(operands[i].c[:-1]) for i in moving]
    dxs = [Series(derivative(operands[i].c)[:-1]) for i in moving]
    slopes = [jnp.concatenate([dy.c, jnp.zeros_like(dy.c[:1])]) for dy in compose(tangent, *xs, *dxs)]
    return [Series(integral(y, dy)) for y, dy in zip(starts, slopes, strict=True)]


def _branches(eqn, index, *operands):
    n = _length(operands)

    def branch(closed):
        return lambda *xs: [promoted(y, n) for y in _evaluate(closed.jaxpr, closed.consts, xs)]

    return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *operands)


def _scanned(eqn, *operands):
    body, n = eqn.params["jaxpr"], _length(operands)
    consts, split = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
    inside = lambda x: Series(jnp.moveaxis(x.c, 0, 1)) if isinstance(x, Series) else x  # noqa: E731

    def step(carry, xs):
        outs = _evaluate(body.jaxpr, body.consts, [*operands[:consts], *carry, *xs])
        outs = [promoted(y, n) for y in outs]
        return outs[: len(carry)], outs[len(carry) :]

    start = [promoted(x, n) for x in operands[consts:split]]
    xs = [inside(x) for x in operands[split:]]
    end, ys = lax.scan(step, start, xs, eqn.params["length"], eqn.params["reverse"], eqn.params["unroll"])
    return [*end, *map(inside, ys)]


def _repeated(eqn, *operands):
    condition, body, n = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"], _length(operands)
    split = eqn.params["cond_nconsts"]
    end = split + eqn.params["body_nconsts"]

    def go_on(carry):
        now = [_at_start(x) for x in [*operands[:split], *carry]]
        return _evaluate(condition.jaxpr, condition.consts, now)[0]

    def once_more(carry):
        outs = _evaluate(body.jaxpr, body.consts, [*operands[split:end], *carry])
        return [promoted(y, n) for y in outs]

    return lax.while_loop(go_on, once_more, [promoted(x, n) for x in operands[end:]])


def _solved(eqn, *operands):
    """The solution of ``A x = b``: ``A_0 x_k = b_k - sum_(i<k) A_(k-i) x_i``, by the solver for ``A_0``."""
    lengths, product, n = eqn.params["const_lengths"], eqn.params["jaxprs"].matvec, _length(operands)
    matrix, b = operands[: sum(lengths)], [promoted(x, n).c for x in operands[sum(lengths) :]]

    def solve(b):
        return bind(eqn, [*map(_at_start, matrix), *b])

    def following(x, k):
        seen = _evaluate(product.jaxpr, product.consts, [*matrix[: lengths.matvec], *map(Series, x)])
        return solve([c[k] - promoted(y, n).c[k] for c, y in zip(b, seen, strict=True)])

    return [Series(x) for x in grown(solve([c[0] for c in b]), following, n)]


def _of_constant_matrix(eqn, matrix, b):
    if isinstance(matrix, Series):
        raise MissingRule(eqn.primitive.name)
    return _each(eqn, matrix, b)


# Piecewise constant operations: their derivative is zero wherever they have one.
_STEPS = {"sign", "floor", "ceil", "round", "stop_gradient"}
_LINEAR = set(
    "add sub neg add_any reduce_sum cumsum reduce_window_sum select_n real imag complex conj fft "
    "reshape transpose broadcast_in_dim squeeze expand_dims rev pad concatenate split stack unstack tile "
    "slice dynamic_slice dynamic_update_slice gather scatter scatter-add scatter-sub "
    "convert_element_type reduce_precision copy copy_p device_put sharding_constraint layout_constraint name".split()
)
_RULES: dict[str, Callable] = {
    **dict.fromkeys(("mul", "dot_general", "conv_general_dilated"), _bilinear),
    **dict.fromkeys(("reduce_max", "reduce_min"), _extreme),
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_vjp_call"), _inlined),
    "div": _divided,
    "abs": _absolute,
    "integer_pow": lambda eqn, x: [Series(power(x.c, eqn.params["y"]))],
    "pow": _powered,
    "triangular_solve": _of_constant_matrix,
    "custom_linear_solve": _solved,
    "custom_jvp_call": _by_own_derivative,
    "cond": _branches,
    "scan": _scanned,
    "while": _repeated,
}
