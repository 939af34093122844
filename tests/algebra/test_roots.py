"""Roots of polynomials by Bernstein coefficients, and Hermite's polynomial along a step."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from probode.algebra.roots import along_step, coefficients, first_crossing, last_sign, points, with_side


@jax.jit
def _first(values, side, direction):
    b = with_side(coefficients(values), side)
    return *first_crossing(b, direction), last_sign(b)


def _value(s, roots, size):
    return size * np.prod([s - root for root in roots])


@st.composite
def polynomials(draw):
    """Roots, some of them close to each other, and the size of a polynomial with ten coefficients."""
    roots = draw(st.lists(st.floats(-0.5, 1.5), max_size=8))
    if roots and draw(st.booleans()):
        roots.append(roots[0] + draw(st.floats(1e-4, 1e-1)))
    size = draw(st.sampled_from([1.0, -1.0])) * 10.0 ** draw(st.integers(-12, 12))
    return sorted(roots), size, float(draw(st.integers(-1, 1)))


@given(polynomials())
@settings(max_examples=300)
def test_the_first_crossing_is_the_first_root_in_that_direction(polynomial):
    roots, size, direction = polynomial
    gaps = np.diff([-0.5, 0.0, *roots, 1.0])
    if np.min(np.abs(np.asarray([root * (1 - root) for root in roots] or [1.0]))) < 1e-3 or np.min(np.abs(gaps)) < 5e-5:
        return  # a root near an end, or two that are nearly one: their place is round-off of the values
    values = jnp.asarray([_value(s, roots, size) for s in points(10)])
    root, found, last = _first(values, jnp.sign(values[0]), direction)
    inside = [r for r in roots if 0 < r < 1]
    after = [np.sign(size) * (-1) ** sum(other > r for other in roots) for r in inside]
    expected = [r for r, sign in zip(inside, after, strict=True) if direction in (0, sign)]
    assert bool(found) == bool(expected)
    if expected:
        assert abs(float(root) - expected[0]) < 1e-7
    assert float(last) == np.sign(values[-1])


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_a_polynomial_is_found_from_its_derivatives_at_both_ends(n):
    rng, t, dt = np.random.default_rng(n), 0.7, -1.3
    p = np.polynomial.Polynomial(rng.normal(size=2 * n))
    ends = [jnp.asarray([p.deriv(j)(x) if j else p(x) for j in range(n)])[:, None] for x in (t, t + dt)]
    at = points(2 * n + 1)
    found = along_step(*ends, jnp.asarray(dt), at)[:, 0]
    np.testing.assert_allclose(found, p(t + at * dt), rtol=1e-11, atol=1e-11)


def test_a_polynomial_that_starts_at_a_root_crosses_at_the_next_one():
    values = jnp.asarray([_value(s, [0.0, 0.25, 0.5], 1.0) for s in points(8)])
    for direction, expected in ((0.0, 0.25), (1.0, 0.5), (-1.0, 0.25)):
        root, found, _ = _first(values, 0.0, direction)
        assert found
        np.testing.assert_allclose(root, expected, rtol=1e-12)


def test_a_root_in_the_round_off_of_a_start_is_found_there():
    """A step ends at 1e-17 before zero: the next one, which starts there, must not miss the crossing."""
    values = jnp.asarray(points(8)) - 0.0
    for side, found in ((-1.0, True), (0.0, False), (1.0, False)):
        assert bool(_first(values, side, 0.0)[1]) == found
    assert float(_first(values, -1.0, 0.0)[0]) < 1e-12


def test_zero_and_touching_are_no_crossings():
    assert not _first(jnp.zeros(8), 0.0, 0.0)[1]
    touching = jnp.asarray([(s - 0.3) ** 2 for s in points(8)])
    assert not _first(touching, 1.0, 0.0)[1]
