"""The elimination of a chain of equations, against dense linear algebra, and loops over the first rows of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probode.algebra.linalg import orthogonal
from probode.trajectories.chain import Chain, Ends, Links, eliminated, is_singular
from probode.trajectories.rows import map_rows, scan_rows
from tests.helpers import difference_quotient


Q, P, N, ROOM = 2, 1, 5, 9


def numbers(seed):
    """A chain of five intervals with random coefficients, and right-hand sides."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    links = Links(draw(ROOM, Q, Q), draw(ROOM, Q, Q), draw(ROOM, Q, P), jnp.array(N))
    ends = Ends(draw(Q + P, Q), draw(Q + P, Q), draw(Q + P, P))
    return links, ends, draw(ROOM, Q, 1), draw(Q + P, 1)


def dense(links, ends):
    """The matrix of all equations, for ``x_0, ..., x_N, p``."""
    a = np.zeros((N * Q + Q + P, (N + 1) * Q + P))
    for i in range(N):
        at = slice(i * Q, (i + 1) * Q)
        a[at, at], a[at, (i + 1) * Q : (i + 2) * Q], a[at, -P:] = links.left[i], links.right[i], links.border[i]
    a[N * Q :, :Q], a[N * Q :, N * Q : (N + 1) * Q], a[N * Q :, -P:] = ends.first, ends.last, ends.shared
    return a


@jax.jit
def both(links, ends, own, at_ends):
    return [
        (chain.solve(own, at_ends), chain.roots(), chain.conditioning)
        for chain in (eliminated(links, ends, differentiable=d) for d in (False, True))
    ]


@given(seed=st.integers(0, 10_000))
def test_solutions_and_covariances_are_those_of_dense_algebra(seed):
    links, ends, own, at_ends = numbers(seed)
    a = dense(links, ends)
    inverse = np.linalg.inv(a)
    x = inverse @ np.concatenate([np.reshape(own[:N], (-1, 1)), at_ends])
    covariance = inverse[:, : N * Q] @ inverse[:, : N * Q].T
    size = np.linalg.cond(a)
    for found, (pairs, border), _ in both(links, ends, own, at_ends):
        np.testing.assert_allclose(np.reshape(found.inner[: N + 1], (-1, 1)), x[:-P], atol=1e-13 * size)
        np.testing.assert_allclose(found.common, x[-P:], atol=1e-13 * size)
        scale = np.abs(covariance).max()
        for i in range(N):
            at = slice(i * Q, (i + 2) * Q)
            np.testing.assert_allclose(pairs[i].T @ pairs[i], covariance[at, at], atol=1e-12 * size * scale)
        places = np.ix_(*[[*range(Q), *range((N + 1) * Q, (N + 1) * Q + P)]] * 2)
        np.testing.assert_allclose(border.T @ border, covariance[places], atol=1e-12 * size * scale)


def test_growing_and_decaying_solutions_are_both_found():
    """``x' = diag(rate, -rate) x``: by substitution from one end round-off would grow by ``exp(420)``."""
    rate, number = 7.0, 60
    step = jnp.diag(jnp.exp(jnp.array([rate, -rate])))
    # Rows of length about one: the growing component is predicted backwards.
    left = jnp.broadcast_to(jnp.diag(jnp.array([-1.0, -step[1, 1]])), (number, 2, 2))
    right = jnp.broadcast_to(jnp.diag(jnp.array([1 / step[0, 0], 1.0])), (number, 2, 2))
    links = Links(left, right, jnp.zeros((number, 2, 0)), jnp.array(number))
    # The growing one is known at the end, the decaying one at the start.
    ends = Ends(jnp.array([[0.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.zeros((2, 0)))
    found = eliminated(links, ends).solve(jnp.zeros((number, 2, 1)), jnp.ones((2, 1))).inner[..., 0]
    i = np.arange(number + 1)
    np.testing.assert_allclose(found[2:, 0], np.exp(-rate * i[::-1])[2:], rtol=1e-12)
    np.testing.assert_allclose(found[:2, 0], 0.0, atol=1e-170)
    np.testing.assert_allclose(found[:, 1], np.exp(-rate * i), rtol=1e-12)


def test_conditions_that_follow_from_each_other_are_singular():
    links, ends, *_ = numbers(3)
    double = Ends(*(jnp.concatenate([x[:1], x[:1], x[2:]]) for x in (ends.first, ends.last, ends.shared)))
    assert not is_singular(eliminated(links, ends)) and is_singular(eliminated(links, double))


@pytest.mark.thorough
def test_derivatives_with_respect_to_all_coefficients():
    links, ends, own, at_ends = numbers(0)

    def value(t):
        moved = Links(links.left * (1 + t), links.right + t * links.left, links.border, links.number)
        at = Ends(ends.first, ends.last + t * ends.first, ends.shared)
        chain: Chain = eliminated(moved, at, differentiable=True)
        pairs, _ = chain.roots()
        covariances = jnp.einsum("nki,nkj->nij", pairs, pairs)[:N]
        return jnp.stack([jnp.sum(chain.solve(own, at_ends).inner ** 2), jnp.sum(jnp.sqrt(1 + covariances**2))])

    expected = difference_quotient(lambda h: value(0.1 + h), 1e-4)
    for derivative in (jax.jacfwd(value), jax.jacrev(value)):
        np.testing.assert_allclose(derivative(0.1), expected, rtol=1e-6)


def test_the_derivative_of_an_orthogonal_matrix():
    """What does not depend on the basis of the complement: the triangle, up to signs, and both projections."""
    a, b = (jnp.asarray(np.random.default_rng(i).normal(size=(5, 3))) for i in (1, 2))

    def value(t):
        q, r = orthogonal(a + t * b)
        return jnp.concatenate([jnp.ravel(x) for x in (r.T @ r, q[:, :3] @ q[:, :3].T, q[:, 3:] @ q[:, 3:].T)])

    expected = difference_quotient(lambda h: value(0.2 + h), 1e-3)
    np.testing.assert_allclose(jax.jacfwd(value)(0.2), expected, atol=1e-7)
    np.testing.assert_allclose(jax.jacrev(value)(0.2), expected, atol=1e-7)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("number", [0, 1, 16, 17, 40])
def test_a_loop_over_the_first_rows(number, differentiable, reverse):
    xs = jnp.linspace(0.5, 1.5, 40)
    step = lambda c, x: (c * x + 1, c)  # noqa: E731
    carry, ys = scan_rows(step, 0.3, xs, jnp.array(number), reverse=reverse, differentiable=differentiable)
    expected, outs = jax.lax.scan(step, 0.3, xs[:number], reverse=reverse)
    np.testing.assert_allclose(carry, expected, rtol=1e-15)
    np.testing.assert_allclose(ys, np.pad(outs, (0, 40 - number)), rtol=1e-15)


@pytest.mark.thorough
def test_loops_have_derivatives_in_both_modes_and_lanes():
    xs = jnp.linspace(0.5, 1.5, 40)

    def value(x, number):
        carry, ys = scan_rows(lambda c, x: (c * x + 1, c), x, xs, number, differentiable=True)
        return carry + jnp.sum(ys) + jnp.sum(map_rows(lambda a: a * x**2, xs, number, differentiable=True)[:3])

    for number in map(jnp.asarray, (3, 20)):
        expected = difference_quotient(lambda h, number=number: value(0.3 + h, number), 1e-4)
        np.testing.assert_allclose(jax.grad(value)(0.3, number), expected, rtol=1e-7)
        np.testing.assert_allclose(jax.jacfwd(value)(0.3, number), expected, rtol=1e-7)
    lanes = jax.vmap(jax.grad(value))(jnp.array([0.3, 0.4]), jnp.array([3, 20]))
    np.testing.assert_allclose(
        lanes, [jax.grad(value)(0.3, jnp.asarray(3)), jax.grad(value)(0.4, jnp.asarray(20))], rtol=1e-13
    )
