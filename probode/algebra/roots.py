"""The first root of a function along a step: that of a polynomial, by Bernstein coefficients.

Between the ends of a step a solution is close to the polynomial that has its derivatives at both (Hermite's), which is
also the posterior mean of an integrated Wiener process given the states there. A function of it is interpolated at
Chebyshev's points, and the signs of the coefficients of this polynomial in the basis of Bernstein bound the number of
its roots (Descartes' rule; Rouillier & Zimmermann 2004, "Efficient isolation of polynomial's real roots").

Axes: ``points``, of which there are as many as coefficients; ``n`` derivatives at each end of the step, the zeroth
included.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from .linalg import product


# Parts of a step that are shorter are not divided again; and so many parts are looked at, at most.
_SHORTEST, _PARTS = 2.0**-26, 400
# How large the highest terms of a polynomial may be, compared with the function that it stands for. For one with a kink
# they are 0.02; where it oscillates faster than the points are dense all terms are alike.
_HIGHEST = 0.1


@functools.cache
def points(number: int) -> np.ndarray:
    """Chebyshev's points in ``[0, 1]``, both ends included, ``(number,)``."""
    return (1 - np.cos(np.pi * np.arange(number) / (number - 1))) / 2


@functools.cache
def hermite(n: int, at: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Hermite's polynomials for ``n`` derivatives at both ends of ``[0, 1]``, at some points: two ``(points, n)``.

    Column ``j`` of the first is the polynomial of degree ``2n - 1`` whose ``j``-th derivative is one at 0, and all
    others zero; of the second, that at 1.
    """
    s = np.asarray(at)

    def at_start(j, s):
        series = sum(math.comb(n - 1 + i, i) * s**i for i in range(n - j))
        return s**j / math.factorial(j) * (1 - s) ** n * series

    first = np.stack([at_start(j, s) for j in range(n)], axis=1)
    second = np.stack([(-1) ** j * at_start(j, 1 - s) for j in range(n)], axis=1)
    return first, second


def along_step(
    before: Float[Array, "n *shape"], after: Float[Array, "n *shape"], dt: Float[Array, ""], at: np.ndarray
) -> Float[Array, "points *shape"]:
    """The polynomial through the derivatives at both ends of a step of length ``dt``, at points in ``[0, 1]``."""
    n = before.shape[0]
    powers = jnp.stack([dt**j for j in range(n)])
    weights = jnp.concatenate([jnp.asarray(h, before.dtype) * powers for h in hermite(n, tuple(at))], axis=1)
    derivatives = jnp.concatenate([before, after])
    return jnp.reshape(product(weights, jnp.reshape(derivatives, (2 * n, -1))), (len(at), *before.shape[1:]))


@functools.cache
def _to_bernstein(number):
    """The matrix that makes Bernstein coefficients of the values at Chebyshev's points; both ends are values."""
    s, m = points(number), number - 1
    basis = np.stack([math.comb(m, i) * s**i * (1 - s) ** (m - i) for i in range(number)], axis=1)
    matrix = np.linalg.inv(basis)
    matrix[0], matrix[-1] = np.eye(number)[0], np.eye(number)[-1]
    return matrix


def coefficients(values: Float[Array, " points"]) -> Float[Array, " points"]:
    """The Bernstein coefficients on ``[0, 1]`` of the polynomial with these values at Chebyshev's points."""
    return product(jnp.asarray(_to_bernstein(values.shape[0]), values.dtype), values)


@functools.cache
def _highest_terms(number):
    """The matrix that makes the highest coefficients in Chebyshev's polynomials of the values at his points."""
    k, m = np.arange(number), number - 1
    halved = np.where((k == 0) | (k == m), 0.5, 1.0)
    terms = 2 / m * np.cos(np.pi * np.outer(k, m - k) / m) * halved
    return (terms * halved[:, None])[number - max(1, number // 2 - 2) :]


def is_resolved(values: Float[Array, " points"]) -> Bool[Array, ""]:
    """Whether a function is close to the polynomial with its values at Chebyshev's points: the highest terms are small.

    Otherwise it varies faster than the points are dense, and has roots that the polynomial has not.
    """
    highest = product(jnp.asarray(_highest_terms(values.shape[0]), values.dtype), values)
    return jnp.max(jnp.abs(highest)) <= _HIGHEST * jnp.max(jnp.abs(values))


def noise(b: Float[Array, " points"]) -> Float[Array, ""]:
    """The size below which Bernstein coefficients are round-off."""
    return 32 * jnp.finfo(b.dtype).eps * jnp.max(jnp.abs(b))


def with_side(b: Float[Array, " points"], side: Float[Array, ""]) -> Float[Array, " points"]:
    """The coefficients of a polynomial that starts on a given ``side`` of zero: 1, -1, or 0 if it starts at a root.

    So a root in the round-off of a value at the end of one step and the start of the next is found once. A polynomial
    that starts elsewhere is shifted to start at zero.
    """
    elsewhere = side * b[0] <= 0
    b = b - jnp.where(elsewhere, b[0], 0)
    first = side * jnp.maximum(jnp.abs(b[0]), 2 * noise(b))
    # Not by ``at[0].set``: XLA does not compile a loop with a scatter into one native function.
    return jnp.concatenate([first[None], b[1:]])


def last_sign(b: Float[Array, " points"]) -> Float[Array, ""]:
    """The sign of the last coefficient that is not round-off: that of the polynomial before it ends."""
    return _last(_signs(b, noise(b)))


def first_crossing(b: Float[Array, " points"], direction: Float[Array, ""]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Where a polynomial on ``[0, 1]`` first changes its sign, and whether it does.

    ``b``: its coefficients, the first with the sign at the start, or zero if the polynomial starts at a root, which
    does not count. ``direction``: 1 for a change from negative to positive, -1 for the opposite, 0 for both.
    """
    tiny = noise(b)

    def is_searching(state):
        start, _, _, found, number = state
        return (start < 1) & ~found & (number < _PARTS)

    def look(state):
        start, length, before, _, number = state
        signs = _signs(_part(b, start, start + length), tiny)
        # At a root that is the end of a part the sign is that of the part before.
        signs = jnp.concatenate([jnp.where(signs[:1] == 0, before, signs[:1]), signs[1:]])
        changes = _changes(signs)
        first, last = signs[jnp.argmax(signs != 0)], _last(signs)
        divide = (changes > 1) & (length > _SHORTEST)
        crosses = ~divide & (first * last < 0) & ((direction == 0) | (direction == last))
        after = start + length
        further = jnp.where(divide, length / 2, jnp.minimum(2 * length, 1 - after))
        here, sign = crosses | divide, jnp.where(divide, before, jnp.where(crosses, first, last))
        return jnp.where(here, start, after), jnp.where(crosses, length, further), sign, crosses, number + 1

    zero, one = jnp.zeros((), b.dtype), jnp.ones((), b.dtype)
    begun = zero, one, _signs(b, tiny)[0], jnp.zeros((), bool), jnp.zeros((), jnp.int32)
    start, length, sign, found, _ = lax.while_loop(is_searching, look, begun)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        before = _part(b, zero, middle)[-1] * sign > 0
        return jnp.where(before, middle, low), jnp.where(before, high, middle)

    halvings = -jnp.finfo(b.dtype).negep
    low, high = lax.fori_loop(0, int(halvings), halve, (start, start + length))
    return (low + high) / 2, found


def _last(signs):
    """The last sign that is not zero; zero if all are."""
    return signs[signs.shape[0] - 1 - jnp.argmax((signs != 0)[::-1])]


def _signs(b, tiny):
    return jnp.where(jnp.abs(b) > tiny, jnp.sign(b), 0)


def _changes(signs):
    """How often a row of signs changes, zeros left out."""

    def count(carry, sign):
        last, number = carry
        number = number + (sign * last < 0)
        return (jnp.where(sign == 0, last, sign), number), None

    start = signs[0], jnp.zeros((), jnp.int32)
    (_, number), _ = lax.scan(count, start, signs[1:])
    return number


def _part(b, start, end):
    """The coefficients on ``[start, end]`` of a polynomial with coefficients ``b`` on ``[0, 1]`` (de Casteljau)."""
    left = _up_to(b, end)
    return _up_to(left[::-1], 1 - start / jnp.where(end > 0, end, 1))[::-1]


def _up_to(b, s):
    def weigh(b, _):
        return (1 - s) * b + s * jnp.roll(b, -1), b[0]

    return lax.scan(weigh, b, None, length=b.shape[0])[1]
