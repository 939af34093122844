"""Derivatives of the solution of an ODE at one point.

The one idea: ``u^(k+j)`` is the j-th derivative of ``tau -> f(t0 + tau, u(t0 + tau), ...)``, in which no derivative of
``u`` past ``u^(k+j-1)`` occurs, so every pass over ``f`` makes one more of them exact. Taylor mode where JAX has the
rules, nested forward mode otherwise. Griewank & Walther (2008, ch. 13); Bettencourt, Johnson & Duvenaud (2019);
Kraemer & Hennig, "Stable implementation of probabilistic ODE solvers" (2020).

Axes: ``num+1`` derivatives ``u, ..., u^(num)`` (plain, not divided by factorials), ``k`` order of the ODE, ``d``
components; ``depth = num - k`` is how often ``f`` is differentiated along the solution.
"""

from collections.abc import Callable, Sequence
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.jet import jet, jet_rules
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import Array, Float


_MORE_DERIVATIVES = 2  # of the unknown ones in a residual
_NEWTON_STEPS = 20
MAX_NESTED = 8  # nested forward mode can double the work with every derivative

# Rules of jax.experimental.jet that are not used, found by comparison with nested forward mode.
UNSOUND_RULES = {
    "rem": "wrong value for operands of unlike sign",
    "min": "fails where one operand is a scalar",
    "clamp": "is written in terms of min",
    "erf_inv": "mixes float64 into float32",
    "atan2": "nan where the second operand is zero",
    "asinh": "log(x + sqrt(x^2 + 1)): cancels for x < 0, -inf in float32 at -1e4",
    "atanh": "log((1 + x)/(1 - x)): loses the digits of a small x",
    "expm1": "exp(x) - 1: loses the digits of a small x",
    "log1p": "log(1 + x): loses the digits of a small x",
    "erfc": "1 - erf(x): loses the digits of the tail",
}


def taylor_derivatives(
    f: Callable[[Float[Array, ""], Float[Array, "k d"]], Float[Array, " d"]],
    t0: Float[Array, ""],
    u0: Float[Array, "k d"],
    num: int,
) -> Float[Array, "{num}+1 d"]:
    """``u, u', ..., u^(num)`` at ``t0`` for the solution of ``u^(k) = f(t, (u, ..., u^(k-1)))``, given the first ``k``.

    A ``num`` above eight needs a Taylor rule for everything that ``f`` does: see ``missing_jet_rule``.
    """
    k, d = u0.shape
    depth = num - k
    if depth < 0:
        return u0[: num + 1]
    t0 = jnp.asarray(t0, u0.dtype)
    along = _along(f, t0, u0, depth, num, "vector field")

    # What is not known yet is zero. Every pass is then the same program, and compile time does not multiply with num.
    def one_more(derivatives, j):
        curve = [derivatives[i : i + k] for i in range(depth + 1)]
        return derivatives.at[k + j].set(along(curve)[j]), None

    known = jnp.zeros((num + 1, d), u0.dtype).at[:k].set(u0)
    return jax.lax.scan(one_more, known, jnp.arange(depth + 1))[0]


def consistent_derivatives(
    r: Callable[[Float[Array, ""], Float[Array, "k+1 d"]], Float[Array, " m"]],
    t0: Float[Array, ""],
    u0: Float[Array, "known d"],
    num: int,
    order: int,
) -> Float[Array, "{num}+1 d"]:
    """``u, u', ..., u^(num)`` at ``t0`` for a solution of ``r(t, (u, ..., u^(order))) = 0``, given the first ones.

    The equation and its time derivatives are solved for all unknown derivatives at once. Algebraic equations tell about
    a derivative only when they have been differentiated as often, so more are carried along (for an index up to three)
    than are returned. NaN if the equation cannot be solved with the ``u`` given.
    """
    known, d = u0.shape
    top = num + _MORE_DERIVATIVES
    levels = top - order
    factorials = jnp.asarray([factorial(j) for j in range(top + 1)], u0.dtype)[:, None]
    if levels < 0:
        return jnp.concatenate([u0, jnp.zeros((max(0, num + 1 - known), d), u0.dtype)])[: num + 1]
    t0 = jnp.asarray(t0, u0.dtype)

    along = _along(r, t0, jnp.zeros((order + 1, d), u0.dtype), levels, top, "residual")

    def residuals(unknown):
        # Taylor coefficients are unknowns of like size where derivatives are not.
        us = jnp.concatenate([u0, unknown.reshape(-1, d) * factorials[known:]])
        derivatives = along([us[i : i + order + 1] for i in range(levels + 1)])
        return (derivatives / factorials[: levels + 1]).ravel()

    def step(unknown):
        # In a unit of time in which the coefficients found so far are of the size of u; with equations of like size.
        exponents = jnp.repeat(jnp.arange(known, top + 1, dtype=u0.dtype), d)
        size = jnp.max(jnp.abs(u0)) + (jnp.max(jnp.abs(u0)) == 0)
        units = jnp.where(unknown == 0, jnp.inf, (size / jnp.abs(unknown)) ** (1 / exponents))
        unit = jnp.clip(jnp.min(units), jnp.finfo(u0.dtype).tiny ** (1 / (top + 1)), 1)
        jacobian = jax.jacfwd(residuals)(unknown) / unit**exponents
        rows = jnp.linalg.norm(jacobian, axis=1)
        rows = jnp.where(rows > 0, rows, 1)
        inverse = jnp.linalg.pinv(jacobian / rows[:, None]) / rows / unit ** exponents[:, None]
        return unknown - jax.lax.stop_gradient(inverse) @ residuals(unknown)

    start = jnp.zeros((top + 1 - known) * d, u0.dtype)
    found, _ = jax.lax.scan(lambda unknown, _: (step(unknown), None), start, None, length=_NEWTON_STEPS)
    # One more step, which has the derivative of the solution (implicit function theorem).
    found = step(jax.lax.stop_gradient(found))
    size = jax.lax.stop_gradient(jnp.abs(jax.jacfwd(residuals)(found)) @ jnp.abs(found))
    size = size + jnp.max(jnp.abs(u0)) + (jnp.max(jnp.abs(u0)) == 0)
    solved = jnp.all(jnp.abs(residuals(found)) <= jnp.sqrt(jnp.finfo(u0.dtype).eps) * size)
    return jnp.where(solved, jnp.concatenate([u0, found.reshape(-1, d) * factorials[known:]])[: num + 1], jnp.nan)


def missing_jet_rule(f: Callable, *args) -> str | None:
    """The first primitive in ``f(*args)`` without a sound rule in ``jax.experimental.jet``, or ``None``."""
    return _missing_jet_rule(jax.make_jaxpr(f)(*args).jaxpr)


# --- `along(curve)`: f and its derivatives in time, (depth+1, m), where its argument runs along `curve = [x, x', ...]`


def _along(f, t0, x, depth, num, name) -> Callable[..., Float[Array, "depth+1 m"]]:
    # Differentiate the jaxpr, not f: it is what is searched for missing rules, and f is traced only once.
    field = jax.make_jaxpr(f)(t0, x)
    missing = _missing_jet_rule(field.jaxpr)
    if missing is not None and num > MAX_NESTED:
        raise ValueError(
            f"{num} exact derivatives of the solution are needed at t0, but the {name} uses `{missing}`, which "
            f"jax.experimental.jet cannot differentiate; without it every derivative may double the cost, and at most "
            f"{MAX_NESTED} are computed. Use a smaller num_derivatives (at most {MAX_NESTED}), or the initialisation "
            f"`Diffuse`, which leaves high derivatives unknown, or write the {name} without `{missing}`."
        )
    by = _along_by_jvp(field, t0, x, depth) if missing is not None or depth == 0 else _along_by_jet(field)
    times = [t0, jnp.ones_like(t0), *[jnp.zeros_like(t0)] * depth][: depth + 1]
    return lambda curve: by(times, curve)


def _along_by_jet(field: ClosedJaxpr) -> Callable[..., Float[Array, "depth+1 d"]]:
    def along(times: Sequence[Float[Array, ""]], curve: Sequence[Float[Array, "k d"]]):
        # Scaled here, because jet's own factorials are exp(lgamma), which is inexact.
        x, *series = [c / float(factorial(i)) for i, c in enumerate(curve)]
        (value,), (values,) = jet(jaxpr_as_fun(field), (times[0], x), (times[1:], series), factorial_scaled=False)
        return jnp.stack([value, *(float(factorial(i)) * c for i, c in enumerate(values, start=1))])

    return along


def _along_by_jvp(
    field: ClosedJaxpr, t: Float[Array, ""], u: Float[Array, "k d"], depth: int
) -> Callable[..., Float[Array, "depth+1 d"]]:
    """For whatever JAX can differentiate. ``(x, ..., x^(j)) -> (g, ..., g^(j))`` is built up one j at a time:
    as time passes, its arguments move in direction ``(x', ..., x^(j+1))``.

    Of the 2^j partial derivatives of a j-fold jvp all those of the same order are equal, and are computed by the same
    operations: sharing them after every level keeps the program polynomial in j (but for loops and branches in f).
    """

    def next_level(values):
        def with_next(x, *dx):
            primals, tangents = jax.jvp(values, (x, *dx[:-1]), dx)
            return primals[0], *tangents

        return with_next

    values = _shared(lambda x: jaxpr_as_fun(field)(*x), (t, u))
    for j in range(1, depth + 1):
        values = _shared(next_level(values), *[(t, u)] * (j + 1))
    return lambda times, curve: jnp.stack(values(*zip(times, curve, strict=True)))


def _shared(fun: Callable[..., Sequence[Array]], *args) -> Callable[..., tuple[Array, ...]]:
    """The same function (its arguments shaped like ``args``), with repeated operations done once."""
    closed = jax.make_jaxpr(fun)(*args)

    def fun_shared(*args):
        done = {}  # (operation, operands by identity) -> results; also keeps them alive, so that identities stay unique

        def evaluate(jaxpr: Jaxpr, consts, args):
            env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
            for eqn in jaxpr.eqns:
                operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
                if eqn.primitive.name == "jit":
                    results = evaluate(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts, operands)
                else:
                    key = _operation(eqn, operands)
                    if key not in done:
                        bound = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
                        done[key] = bound if eqn.primitive.multiple_results else [bound]
                    results = done[key]
                env.update(zip(eqn.outvars, results, strict=True))
            return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

        return tuple(evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args)))

    return fun_shared


def _operation(eqn: JaxprEqn, operands: Sequence) -> object:
    """Equal for equations that compute the same thing."""
    names = [
        (str(v.aval), np.asarray(x).tobytes()) if isinstance(v, Literal) else id(x)
        for v, x in zip(eqn.invars, operands, strict=True)
    ]
    key = (eqn.primitive, *names, *sorted(eqn.params.items()))
    try:
        hash(key)
    except TypeError:  # an array among the parameters: never shared
        return object()
    return key


# --- which rules of jax.experimental.jet can be relied on


def _missing_jet_rule(jaxpr: Jaxpr) -> str | None:
    moving = set(jaxpr.invars)  # what depends on the inputs; jet evaluates the rest as it stands
    for eqn in jaxpr.eqns:
        if not any(v in moving for v in eqn.invars if not isinstance(v, Literal)):
            continue
        moving.update(eqn.outvars)
        name = eqn.primitive.name
        if name == "jit":
            name = _missing_jet_rule(eqn.params["jaxpr"].jaxpr)
        elif eqn.primitive in jet_rules and _is_sound(eqn):
            name = None
        if name is not None:
            return name
    return None


def _is_sound(eqn: JaxprEqn) -> bool:
    match eqn.primitive.name:
        case "pow":  # exp(y log x): nan for x <= 0, which is in order only where y is known not to be an integer
            base, exponent = (float(v.val) if isinstance(v, Literal) else None for v in eqn.invars)
            return (base is not None and base > 0) or (exponent is not None and not exponent.is_integer())
        case "convert_element_type":  # float to int is a step; jet truncates the derivatives instead of dropping them
            return _is_float(eqn.outvars[0]) or not _is_float(eqn.invars[0])
        case name:
            return name not in UNSOUND_RULES


def _is_float(v: Var | Literal) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)
