"""Derivatives of the solution of a differential equation at one point.

``u^(k+j)`` is the j-th derivative of ``tau -> f(t0 + tau, u(t0 + tau), ...)``, in which no derivative of ``u`` past
``u^(k+j-1)`` occurs, so every evaluation of ``f`` and its derivatives gives one more of them. They are computed by
Taylor mode where all operations of ``f`` have rules (``rules``), by nested forward mode otherwise. Griewank & Walther
(2008), "Evaluating derivatives", ch. 13; Bettencourt, Johnson & Duvenaud (2019), "Taylor-mode automatic differentiation
for higher-order derivatives in JAX"; Kraemer & Hennig (2020), "Stable implementation of probabilistic ODE solvers".

Axes: ``num+1`` derivatives ``u, ..., u^(num)`` (plain, not divided by factorials), ``k`` order of the ODE, ``d``
components; ``depth = num - k`` is how often ``f`` is differentiated along the solution.
"""

from collections.abc import Callable, Sequence
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jaxtyping import Array, Float, PyTree

from . import recurrences
from .rules import MissingRule, Series, compose


# So many derivatives more than are returned are solved for: enough for algebraic equations of an index up to three.
_MORE_DERIVATIVES = 2
_NEWTON_STEPS = 20
# Series that are taken in every step are unrolled into at most about so many operations.
_UNROLLED = 6000
# At most so many derivatives by nested forward mode, which can double the work with every one.
MAX_NESTED = 8


def taylor_derivatives(
    f: Callable[[Float[Array, ""], Float[Array, "k d"]], Float[Array, " d"]],
    t0: Float[Array, ""],
    u0: Float[Array, "k d"],
    num: int,
) -> Float[Array, "{num}+1 d"]:
    """``u, u', ..., u^(num)`` at ``t0`` for the solution of ``u^(k) = f(t, (u, ..., u^(k-1)))``, given the first ``k``.

    Derivatives are plain, not divided by factorials. Raises ``ValueError`` for a ``num`` above eight if an operation of
    ``f`` has no rule for Taylor series (see ``rules``).
    """
    k, d = u0.shape
    depth = num - k
    if depth < 0:
        return u0[: num + 1]
    t0 = jnp.asarray(t0, u0.dtype)
    along = _along(jax.make_jaxpr(f)(t0, u0), t0, u0, depth, num, "vector field", MAX_NESTED)
    windows = np.arange(depth + 1)[:, None] + np.arange(k)

    # Derivatives that are not known yet are zero, so that every pass is the same program: unrolled, compile time would
    # grow with num.
    def one_more(derivatives, j):
        curve = derivatives[windows]
        return derivatives.at[k + j].set(along(curve)[j]), None

    known = jnp.zeros((num + 1, d), u0.dtype).at[:k].set(u0)
    return jax.lax.scan(one_more, known, jnp.arange(depth + 1))[0]


def unrolled_derivatives(
    f: Callable[[Float[Array, ""], Float[Array, "k d"]], Float[Array, " d"]],
    t0: Float[Array, ""],
    u0: Float[Array, "k d"],
    num: int,
) -> Float[Array, "{num}+1 d"]:
    """What ``taylor_derivatives`` returns, for functions that are called in every step.

    By recurrences without a loop, where the program does not get too large: ten times faster for small fields.
    """
    t0 = jnp.asarray(t0, u0.dtype)
    field = jax.make_jaxpr(f)(t0, u0)
    unrolled = _if_small(field, num, lambda: recurrences.solution(field, t0, u0, num))
    return taylor_derivatives(f, t0, u0, num) if unrolled is None else unrolled


def derivatives_along(
    fn: Callable[[Float[Array, ""], Float[Array, "k d"]], Float[Array, " m"]],
    t: Float[Array, ""],
    curve: Float[Array, "levels k d"],
) -> Float[Array, "levels m"]:
    """``fn(t, x)`` and its total time derivatives where ``x`` moves along ``curve = [x, x', ...]``.

    For functions that are called in every step, by recurrences as in ``unrolled_derivatives``. Raises ``ValueError`` as
    ``taylor_derivatives`` does.
    """
    depth, closed = curve.shape[0] - 1, jax.make_jaxpr(fn)(t, curve[0])
    unrolled = _if_small(closed, depth, lambda: recurrences.along(closed, t, curve))
    if unrolled is not None:
        return unrolled
    return _along(closed, t, curve[0], depth, depth, "vector field", MAX_NESTED)(curve)


def _if_small(closed, num, series):
    """``series()``, ``num`` coefficients of a program by recurrences; ``None`` if it gets too large or lacks a rule."""
    if recurrences.size(closed) * (num + 1) ** 2 > _UNROLLED:
        return None
    try:
        return series()
    except MissingRule:
        return None


def consistent_derivatives(
    r: Callable[[Float[Array, ""], Float[Array, "k+1 d"]], Float[Array, " m"]],
    t0: Float[Array, ""],
    u0: Float[Array, "known d"],
    num: int,
    order: int,
) -> Float[Array, "{num}+1 d"]:
    """``u, u', ..., u^(num)`` at ``t0`` for a solution of ``r(t, (u, ..., u^(order))) = 0``, given the first ones.

    The equation and its time derivatives are solved for all unknown derivatives at once, by Newton's method, with the
    smallest norm where they do not determine all of them. An algebraic equation determines a derivative only after as
    many differentiations, so more derivatives are solved for than are returned, enough for an index up to three. NaN if
    the equations have no solution with the given ``u0``. Raises ``ValueError`` as ``taylor_derivatives`` does, but
    already for a ``num`` above six.
    """
    known, d = u0.shape
    top = num + _MORE_DERIVATIVES
    levels = top - order
    factorials = jnp.asarray([factorial(j) for j in range(top + 1)], u0.dtype)[:, None]
    if levels < 0:
        return jnp.concatenate([u0, jnp.zeros((max(0, num + 1 - known), d), u0.dtype)])[: num + 1]
    t0 = jnp.asarray(t0, u0.dtype)

    point = jnp.zeros((order + 1, d), u0.dtype)
    most = MAX_NESTED - _MORE_DERIVATIVES
    along = _along(jax.make_jaxpr(r)(t0, point), t0, point, levels, num, "residual", most)
    windows = np.arange(levels + 1)[:, None] + np.arange(order + 1)

    def residuals(unknown):
        # The unknowns are Taylor coefficients, which are of similar size: derivatives differ by factorials, and the
        # Newton system would be ill-conditioned.
        us = jnp.concatenate([u0, unknown.reshape(-1, d) * factorials[known:]])
        derivatives = along(us[windows])
        return (derivatives / factorials[: levels + 1]).ravel()

    # Before anything is found: the unit in which the equation depends on u as much as on its highest derivative.
    given = jnp.concatenate([u0, jnp.zeros((order + 1, d), u0.dtype)])[: order + 1]
    *lower, highest = jnp.linalg.norm(jax.jacfwd(r, argnums=1)(t0, given), axis=(0, 2))
    first_units = [(highest / slope) ** (1 / (order - k)) for k, slope in enumerate(lower)]
    first_unit = jnp.min(jnp.stack([*first_units, jnp.ones_like(highest)]))
    first_unit = jax.lax.stop_gradient(jnp.where(first_unit > 0, first_unit, 1))

    def step(unknown):
        # In a unit of time in which the coefficients found so far are no larger than u, and with rows of length one:
        # otherwise the pseudo-inverse would drop equations and unknowns that are small in the user's units.
        exponents = jnp.repeat(jnp.arange(known, top + 1, dtype=u0.dtype), d)
        size = _largest(u0)
        units = jnp.where(unknown == 0, jnp.inf, (size / jnp.abs(unknown)) ** (1 / exponents))
        unit = jnp.where(jnp.any(unknown != 0), jnp.min(units), first_unit)
        unit = jnp.clip(unit, jnp.finfo(u0.dtype).tiny ** (1 / (top + 1)), 1)
        jacobian = jax.jacfwd(residuals)(unknown) / (unit**exponents)[None]
        rows = jnp.linalg.norm(jacobian, axis=1)
        rows = jnp.where(rows > 0, rows, 1)
        inverse = jnp.linalg.pinv(jacobian / rows[:, None]) / rows[None] / unit ** exponents[:, None]
        return unknown - jax.lax.stop_gradient(inverse) @ residuals(unknown)

    start = jnp.zeros((top + 1 - known) * d, u0.dtype)
    found, _ = jax.lax.scan(lambda unknown, _: (step(unknown), None), start, None, length=_NEWTON_STEPS)
    # One more step gives the result its derivative (implicit function theorem): the loop is not differentiated.
    found = step(jax.lax.stop_gradient(found))
    size = jax.lax.stop_gradient(jnp.abs(jax.jacfwd(residuals)(found)) @ jnp.abs(found))
    size = size + _largest(u0)
    solved = jnp.all(jnp.abs(residuals(found)) <= jnp.sqrt(jnp.finfo(u0.dtype).eps) * size)
    return jnp.where(solved, jnp.concatenate([u0, found.reshape(-1, d) * factorials[known:]])[: num + 1], jnp.nan)


def _largest(x):
    """The largest magnitude among numbers, one if all are zero."""
    size = jnp.max(jnp.abs(x))
    return size + (size == 0).astype(x.dtype)


# --- `along(curve)`: f and its derivatives in time, (depth+1, m), where its argument runs along `curve = [x, x', ...]`


def _along(
    field: ClosedJaxpr, t0: Float[Array, ""], x: Float[Array, "k d"], depth: int, num: int, name: str, most: int
) -> Callable[[Float[Array, "depth+1 k d"]], Float[Array, "depth+1 m"]]:
    try:
        return _along_by_series(field, t0, x, depth)
    except MissingRule as missing:
        if num > most:
            raise ValueError(
                f"{num} exact derivatives of the solution are needed, but the {name} uses `{missing}`, for which "
                f"there is no rule for Taylor series; without one every derivative may double the cost, and at most "
                f"{most} are computed. Use a smaller num_derivatives (at most {most}), and fewer levels if the "
                f"equation is lifted, or the initialisation `Diffuse`, which leaves high derivatives unknown, or write "
                f"the {name} without `{missing}`."
            ) from None
    return _along_by_jvp(field, t0, x, depth)


def _along_by_series(field: ClosedJaxpr, t: Float[Array, ""], x: Float[Array, "k d"], depth: int) -> Callable:
    factorials = np.array([factorial(j) for j in range(depth + 1)], dtype=float)
    time = jnp.zeros(depth + 1, t.dtype).at[0].set(t).at[1:2].set(1)

    def series(curve):
        coefficients = curve / jnp.asarray(factorials, x.dtype)[:, None, None]
        (values,) = compose(field, Series(time), Series(coefficients))
        return values.c * jnp.asarray(factorials, x.dtype)[:, None]

    jax.eval_shape(series, jax.ShapeDtypeStruct((depth + 1, *x.shape), x.dtype))
    return series


def _along_by_jvp(
    field: ClosedJaxpr, t: Float[Array, ""], u: Float[Array, "k d"], depth: int
) -> Callable[..., Float[Array, "depth+1 d"]]:
    """``along`` by nested forward mode, for functions with operations that have no rule for Taylor series.

    ``(x, ..., x^(j)) -> (g, ..., g^(j))`` is built up one j at a time: the time derivative of its arguments is
    ``(x', ..., x^(j+1))``.

    Of the 2^j partial derivatives of a j-fold jvp all those of the same order are equal, and are computed by the same
    operations: sharing them after every level keeps the program polynomial in j (but for loops and branches in f).
    """

    def next_level(values):
        def with_next(x, *dx):
            primals, tangents = jax.jvp(values, (x, *dx[:-1]), dx)
            return primals[0], *tangents

        return with_next

    times = [t, jnp.ones_like(t), *[jnp.zeros_like(t)] * depth][: depth + 1]
    values = _shared(lambda x: jaxpr_as_fun(field)(*x), (t, u))
    for j in range(1, depth + 1):
        values = _shared(next_level(values), *[(t, u)] * (j + 1))
    return lambda curve: jnp.stack(values(*zip(times, curve, strict=True)))


def _shared(fun: Callable[..., Sequence[Array]], *args: PyTree) -> Callable[..., tuple[Array, ...]]:
    """The same function, for arguments of the shapes of ``args``, with repeated operations computed only once."""
    closed = jax.make_jaxpr(fun)(*args)

    def fun_shared(*args):
        done = {}  # (operation, operands by identity) -> results; also keeps them alive, so that identities stay unique

        def evaluate(jaxpr, consts, args):
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
    """A key for an operation of a jaxpr and its operands, equal for two that compute the same values."""
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
