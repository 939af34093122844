"""The past in the coordinates of the present: each law of the algebra against dense joint Gaussians.

An earlier state's coordinates ``w`` and a later state ``x`` have a joint distribution; every operation must do to it
what the textbook does. Problems are drawn in units in which all numbers are about one, and handed over in others.
"""

import functools as ft
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from probode.algebra.conditioning import predict
from probode.algebra.coordinates import Conditional, coordinates_of, from_coordinates, marginalise, standard
from probode.algebra.linearisation import Linearisation
from probode.algebra.normal import Normal, push

from .. import oracles
from ..helpers import central_differences, condition, first_of, left_to_nox, relative


class Case(NamedTuple):
    """A state of ``n`` derivatives of ``m`` components; ``p`` coordinates of an earlier one."""

    batch: tuple[int, ...]
    n: int
    m: int
    cols: int
    block: int
    rows: int
    p: int

    @property
    def dim(self):
        return self.n * self.m


DENSE = Case((), n=3, m=2, cols=1, block=1, rows=4, p=4)
SQUARE = Case((), n=3, m=2, cols=1, block=1, rows=6, p=6)  # from an InitialState: more rows than a step leaves
CERTAIN = Case((), n=3, m=2, cols=1, block=1, rows=0, p=3)
SECOND_ORDER = Case((), n=4, m=1, cols=3, block=2, rows=3, p=4)
FEW_ROWS = Case((2,), n=4, m=1, cols=1, block=1, rows=2, p=1)
MATRICES = Case((2,), n=3, m=2, cols=2, block=2, rows=5, p=2)  # more general than any factorisation
SCANNED = Case((), n=5, m=2, cols=1, block=1, rows=8, p=10)
ODD = Case((), n=3, m=3, cols=1, block=1, rows=6, p=2)
CASES = (DENSE, SQUARE, CERTAIN, SECOND_ORDER, FEW_ROWS, MATRICES, SCANNED, ODD)
SMALL = Case((), n=2, m=2, cols=1, block=1, rows=3, p=2)
SMALL_SECOND_ORDER = Case((), n=3, m=1, cols=2, block=2, rows=3, p=3)


class Problem(NamedTuple):
    """A state with its past, the noise of a step and an equation; of one batch element, or stacked."""

    mean: np.ndarray
    factor: np.ndarray
    shift: np.ndarray
    cross: np.ndarray
    own: np.ndarray
    noise: np.ndarray
    scale: np.ndarray
    coupling: np.ndarray  # H without its identity block
    residual: np.ndarray


def shapes(case):
    b, dim, m = case.batch, case.dim, case.m
    return Problem(
        mean=(*b, dim, case.cols),
        factor=(*b, case.rows, dim),
        shift=(*b, case.p, case.cols),
        cross=(*b, case.rows, case.p),
        own=(*b, case.p, case.p),
        noise=(*b, dim, dim),
        scale=b,
        coupling=(*b, m, case.block * m),
        residual=(*b, m, case.cols),
    )


def diagonal(entries):
    return entries[..., None] * np.eye(entries.shape[-1])


def structured(case, raw, log_diagonal, log_scale):
    """A problem from arrays of any numbers: noise with a positive diagonal, so that all can be learnt."""
    noise = np.triu(raw.noise, 1) + diagonal(np.exp(log_diagonal))
    return raw._replace(noise=noise, own=np.triu(raw.own), scale=np.exp(log_scale))


def random_problem(case, seed, values=None):
    """Of random numbers, or of a few values alone: ties, and zeros where they hurt."""
    rng = np.random.default_rng(seed)
    raw = Problem(
        *(rng.uniform(-1, 1, shape) if values is None else rng.choice(values, shape) for shape in shapes(case))
    )
    return structured(case, raw, rng.uniform(-2, 2, (*case.batch, case.dim)), rng.uniform(-3, 3, case.batch))


VARIANTS = ("any", "zero factor", "rows of zeros", "one direction", "no past left", "zero residual")


def vary(case, x, variant):
    if variant == "zero factor":
        return x._replace(factor=0 * x.factor)
    if variant == "rows of zeros":
        keep = (np.arange(case.rows) % 2 == 1)[:, None]
        return x._replace(factor=x.factor * keep, cross=x.cross * keep)
    if variant == "one direction":
        ones = np.ones((*case.batch, case.rows, 1))
        return x._replace(factor=ones * np.mean(x.factor, axis=-2, keepdims=True) if case.rows else x.factor)
    if variant == "no past left":
        return x._replace(own=0 * x.own)
    if variant == "zero residual":
        return x._replace(residual=0 * x.residual)
    return x


@st.composite
def problems(draw, case):
    seed, values = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([None, (-1.0, 0.0, 1.0), (0.0, 0.0, 1.0)]))
    return vary(case, random_problem(case, seed, values), draw(st.sampled_from(VARIANTS)))


@st.composite
def units(draw, case, largest=26):
    """A power of two for every entry of the state: changing units costs no digits."""
    powers = draw(hnp.arrays(np.int64, (case.dim,), elements=st.integers(-largest, largest)))
    return 2.0**powers


def in_units(case, x, unit):
    """The same problem when the state is measured in other units."""
    k = case.block * case.m
    block = unit[k : k + case.m, None]
    return x._replace(
        mean=x.mean * unit[:, None],
        factor=x.factor * unit,
        noise=x.noise * unit,
        coupling=x.coupling * block / unit[:k],
        residual=x.residual * block,
    )


def state_of(x):
    return Normal(jnp.asarray(x.mean), jnp.asarray(x.factor))


def past_of(x):
    return Conditional(jnp.asarray(x.shift), jnp.asarray(x.cross), jnp.asarray(x.own))


def equation_of(case, x):
    eye = jnp.broadcast_to(jnp.eye(case.m, dtype=x.coupling.dtype), (*case.batch, case.m, case.m))
    matrix = jnp.concatenate([jnp.asarray(x.coupling), eye], axis=-1)
    return Linearisation(matrix, jnp.asarray(x.residual), range(case.block, case.block + 1))


predicting = jax.jit(lambda x: predict(state_of(x), x.noise, x.scale, past_of(x)))
conditioning = jax.jit(
    lambda case, x: condition(state_of(x), x.noise, x.scale, equation_of(case, x), past_of(x)), static_argnums=0
)
looking_back, realising, finding = (jax.jit(f) for f in (marginalise, from_coordinates, coordinates_of))


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def on_device(x):
    return Problem(*map(jnp.asarray, x))


def each(case, *trees):
    """The elements of a batch, one by one."""
    for index in np.ndindex(case.batch):
        yield tuple(jax.tree.map(lambda a, i=index: np.asarray(a)[i], tree) for tree in trees)


# The textbook, for any number type that NumPy multiplies: floats, complex steps, mpmath's numbers.


def joint(mean, factor, shift, cross, own):
    """Mean and covariance of a state and, behind it, an earlier one's coordinates."""
    beside = factor.T @ cross
    covariance = np.block([[factor.T @ factor, beside], [beside.T, cross.T @ cross + own.T @ own]])
    return np.concatenate([mean, shift]), covariance


def together(state, past):
    return joint(state.mean, state.factor, past.shift, past.cross, past.noise)


def plain(x):
    """The joint distribution of a problem once the noise is added."""
    mean, covariance = joint(*x[:5])
    dim = len(x.mean)
    covariance[:dim, :dim] = covariance[:dim, :dim] + x.scale**2 * (x.noise.T @ x.noise)
    return mean, covariance


def observation(case, x):
    """``H`` on the state and the coordinates behind it."""
    rest = case.dim + case.p - x.coupling.shape[1] - case.m
    return np.concatenate([x.coupling, np.eye(case.m), np.zeros((case.m, rest))], axis=1)


def conditioned(case, x):
    """The joint distribution given the equation."""
    return oracles.condition(*plain(x), observation(case, x), x.residual)


def innovation_variance(case, x):
    """The determinant of ``S``, by the pivots of its elimination."""
    h, (_, covariance) = observation(case, x), plain(x)
    s = h @ covariance @ h.T
    determinant = s[0, 0]
    while len(s) > 1:
        s = s[1:, 1:] - np.outer(s[1:, 0], s[0, 1:]) / s[0, 0]
        determinant = determinant * s[0, 0]
    return (determinant,)


def forty_digits(fn, x):
    with mpmath.workdps(40):
        out = fn(Problem(*map(oracles.precise, x)))
    return tuple(np.asarray(a, float) for a in out)


def spread(covariance):
    """What a covariance's entries are small against; where there is no variance they vanish exactly."""
    std = np.sqrt(np.diagonal(covariance))
    return np.outer(std, std)


def close(value, reference, size, tolerance):
    assert value.shape == reference.shape
    size = np.broadcast_to(size, value.shape)
    error = np.abs(value - reference)
    np.testing.assert_array_equal(error[size == 0], 0)
    assert np.max(error / np.where(size == 0, 1, size), initial=0) < tolerance


def factors(case, unit):
    """Units of the state and the coordinates behind it."""
    return np.concatenate([unit, np.ones(case.p)])


def check_prediction(case, x, unit, tolerance):
    state, past = predicting(on_device(in_units(case, x, unit)))
    assert state.factor.shape == (*case.batch, case.dim, case.dim)
    assert past.cross.shape == (*case.batch, case.dim, case.p) and past.noise.shape == (*case.batch, case.p, case.p)
    for one, later, before in each(case, x, state, past):
        mean, covariance = together(later, before)
        u = factors(case, unit)
        expected_mean, expected = plain(one)
        np.testing.assert_array_equal(mean / u[:, None], expected_mean)
        close(covariance / np.outer(u, u), expected, spread(expected), tolerance)
        assert np.all(np.tril(later.factor, -1) == 0) and np.all(np.tril(before.noise, -1) == 0)


def check_conditioning(case, x, unit, tolerance):
    changed = conditioning(case, on_device(in_units(case, x, unit)))
    rows = max(case.rows, case.dim - case.m)
    assert changed.state.factor.shape == (*case.batch, rows, case.dim)
    assert changed.past.cross.shape == (*case.batch, rows, case.p)
    logarithms = changed.log_det, changed.rank
    for one, later, before, (log_det, rank) in each(case, x, changed.state, changed.past, logarithms):
        mean, covariance = together(later, before)
        u = factors(case, unit)
        expected_mean, expected = forty_digits(ft.partial(conditioned, case), one)
        before_mean, prior = plain(one)
        std = np.sqrt(np.diagonal(prior))[:, None]
        moved = np.max(np.abs(expected_mean - before_mean) / np.where(std > 0, std, 1))
        close(mean / u[:, None], expected_mean, (1 + moved) * (std + np.abs(before_mean)), tolerance)
        close(covariance / np.outer(u, u), expected, spread(prior), tolerance)
        block = unit[case.block * case.m :][: case.m]
        (variance,) = forty_digits(ft.partial(innovation_variance, case), one)
        assert rank == case.m
        close(np.exp(2 * (log_det - np.sum(np.log(block)))), variance, variance, tolerance)


@hypothesis.given(st.data())
@pytest.mark.parametrize("case", CASES)
def test_predicting_keeps_the_joint_distribution(case, data):
    x = data.draw(problems(case))
    if data.draw(st.booleans()):
        x = x._replace(scale=0 * x.scale)
    check_prediction(case, x, data.draw(units(case)), 1e-14)


@hypothesis.given(st.data())
@pytest.mark.parametrize("case", CASES)
def test_conditioning_conditions_the_joint_distribution(case, data):
    check_conditioning(case, data.draw(problems(case)), data.draw(units(case)), 1e-12)


def well_conditioned(rng, rows, dim):
    """Orthogonal rows (or columns) of lengths between one half and two."""
    q, _ = np.linalg.qr(rng.standard_normal((max(rows, dim), min(rows, dim))))
    return (q if rows >= dim else q.T) * rng.uniform(0.5, 2, (rows, 1))


@hypothesis.given(st.integers(0, 2**32 - 1), st.data())
@pytest.mark.parametrize("case", [DENSE, SQUARE, SECOND_ORDER, SCANNED])
def test_conditioning_without_noise(case, seed, data):
    # All that can be learnt is what the state itself leaves open, in fewer directions than it has entries.
    rng = np.random.default_rng(seed)
    x = random_problem(case, seed)
    x = x._replace(factor=well_conditioned(rng, case.rows, case.dim), coupling=x.coupling / np.sqrt(case.m))
    x = x._replace(noise=0 * x.noise) if rng.random() < 0.5 else x._replace(scale=0 * x.scale)
    hypothesis.assume(np.linalg.cond(x.factor @ observation(case, x)[:, : case.dim].T) < 30)
    check_conditioning(case, x, data.draw(units(case)), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_nothing_to_learn(case):
    # A constant vector field from an exact value: neither uncertainty nor noise, and no residual.
    x = random_problem(case, 1)
    x = x._replace(factor=0 * x.factor, scale=0 * x.scale, residual=0 * x.residual)
    changed = conditioning(case, on_device(x))
    np.testing.assert_array_equal(changed.state.mean, x.mean)
    np.testing.assert_array_equal(changed.state.factor, 0)
    np.testing.assert_array_equal(changed.influence.gain, 0)
    np.testing.assert_array_equal(changed.past.shift, x.shift)
    for one, past in each(case, x, changed.past):
        expected = one.cross.T @ one.cross + one.own.T @ one.own
        close(past.cross.T @ past.cross + past.noise.T @ past.noise, expected, spread(expected), 1e-14)


def test_one_lane_has_nothing_to_learn():
    x = random_problem(MATRICES, 2)
    x.factor[0], x.scale[0], x.residual[0] = 0, 0, 0
    changed = conditioning(MATRICES, on_device(x))
    np.testing.assert_array_equal(changed.state.mean[0], x.mean[0])
    expected_mean, expected = forty_digits(ft.partial(conditioned, MATRICES), Problem(*(f[1] for f in x)))
    mean, covariance = together(*(jax.tree.map(lambda a: np.asarray(a[1]), y) for y in (changed.state, changed.past)))
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_influence_tells_how_the_state_has_moved(case):
    x = random_problem(case, 3)
    x = x._replace(scale=np.exp(0 * x.scale))
    changed = conditioning(case, on_device(x))
    for one, state, influence in each(case, x, changed.state, changed.influence):
        _, prior = plain(one)
        prior, h = prior[: case.dim, : case.dim], observation(case, one)[:, : case.dim]
        s = h @ prior @ h.T
        np.testing.assert_allclose(state.mean, one.mean - influence.gain.T @ influence.whitened, rtol=0, atol=1e-10)
        drop = prior - state.factor.T @ state.factor
        close(influence.gain.T @ influence.gain, drop, spread(prior), 1e-12)
        np.testing.assert_allclose(
            influence.matrix.T @ influence.matrix, h.T @ np.linalg.solve(s, h), rtol=1e-9, atol=1e-9
        )
        # The same root of S whitens all of them.
        np.testing.assert_allclose(influence.matrix @ prior, influence.gain, rtol=0, atol=1e-11 * np.max(np.abs(prior)))
        assert influence.weight == 1


# --- Looking back ---


def random_normal(rng, batch, rows, dim, cols, dtype=float):
    mean, factor = rng.standard_normal((*batch, dim, cols)), rng.standard_normal((*batch, rows, dim))
    return Normal(jnp.asarray(mean, dtype), jnp.asarray(factor, dtype))


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3, 11]), st.data())
@pytest.mark.parametrize("case", [DENSE, CERTAIN, FEW_ROWS, MATRICES, SCANNED])
def test_looking_back_is_marginalisation(case, seed, later_rows, data):
    rng = np.random.default_rng(seed)
    x = data.draw(problems(case))
    unit = data.draw(units(case))
    earlier = random_normal(rng, case.batch, case.p, case.dim, case.cols)
    earlier = Normal(earlier.mean * unit[:, None], earlier.factor * unit)
    later = random_normal(rng, case.batch, later_rows, case.rows, case.cols)
    back = looking_back(later, past_of(x))
    out = realising(back, earlier)
    assert back.factor.shape == (*case.batch, case.p, case.p)
    for one, w, v, x0, result in each(case, x, back, later, earlier, out):
        mean = one.shift + one.cross.T @ v.mean
        covariance = one.cross.T @ (v.factor.T @ v.factor) @ one.cross + one.own.T @ one.own
        size = np.abs(one.shift) + np.abs(one.cross.T) @ np.abs(v.mean)
        close(w.mean, mean, size, 1e-14)
        terms = np.sum(np.abs(v.factor) @ np.abs(one.cross), axis=0) + np.sum(np.abs(one.own), axis=0)
        close(w.factor.T @ w.factor, covariance, np.outer(terms, terms), 1e-14)
        a = x0.factor.T
        close(result.mean, x0.mean + a @ mean, np.abs(x0.mean) + np.abs(a) @ size, 1e-14)
        expected = a @ covariance @ a.T
        close(
            result.factor.T @ result.factor,
            expected,
            np.outer(*2 * [np.abs(a) @ terms]),
            1e-14,
        )


@pytest.mark.parametrize("case", [DENSE, SQUARE, SECOND_ORDER, MATRICES])
def test_coordinates_of_a_state_and_the_state_of_its_coordinates(case):
    x = random_problem(case, 4)
    start, own = standard(state_of(x)), Conditional.identity(state_of(x))
    assert start.factor.shape == own.cross.shape == (*case.batch, case.rows, case.rows)
    same = realising(start, state_of(x))
    np.testing.assert_array_equal(same.mean, x.mean)
    np.testing.assert_array_equal(same.factor, x.factor)
    back = looking_back(start, own)
    np.testing.assert_array_equal(back.mean, start.mean)
    np.testing.assert_array_equal(back.factor, start.factor)


class Chain(NamedTuple):
    """Three steps from an earlier state: between two of them everything moves by a matrix."""

    earlier: Normal
    steps: list[tuple[np.ndarray, Problem]]


def chain(case, seed, earlier_rows):
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((*case.batch, case.dim, case.cols))
    steps = []
    for i in range(3):
        matrix = np.eye(case.dim) + np.triu(rng.uniform(-1, 1, (*case.batch, case.dim, case.dim)), 1)
        step = random_problem(case, [seed, i])
        step = step._replace(noise=step.noise / np.sqrt(case.dim), coupling=step.coupling / np.sqrt(case.m))
        steps.append((matrix, step))
    factor = rng.standard_normal((*case.batch, earlier_rows, case.dim))
    return Chain(Normal(jnp.asarray(mean), jnp.asarray(factor)), steps)


@ft.partial(jax.jit, static_argnums=0)
def advance(case, x, past, matrix, step):
    return condition(push(x, matrix), step.noise, step.scale, equation_of(case, step), past)


@jax.jit
def predicting_from(x, matrix, step):
    """The prediction of ``matrix x`` with noise, and ``x`` in its coordinates."""
    return predict(push(x, matrix), step.noise, step.scale, Conditional.identity(x))


def run(case, chain, past_of_each=False):
    """The last state, and the first one in its coordinates; or every state's predecessor in its own."""
    x, past, pasts = chain.earlier, Conditional.identity(chain.earlier), []
    for matrix, step in chain.steps:
        changed = advance(
            case, x, Conditional.identity(x) if past_of_each else past, jnp.asarray(matrix), on_device(step)
        )
        x, past = changed.state, changed.past
        pasts.append((x, past))
    return pasts if past_of_each else (x, past)


def dense_chain(case, mean, factor, steps):
    """Mean and covariance of the last state and, behind it, the first: given all equations, and given none."""
    dim = case.dim
    mean, prior = np.concatenate([mean, mean]), np.block([[factor.T @ factor] * 2] * 2)
    covariance = prior
    for matrix, step in steps:
        a = np.block([[matrix, np.zeros((dim, dim))], [np.zeros((dim, dim)), np.eye(dim)]])
        mean, covariance, prior = a @ mean, a @ covariance @ a.T, a @ prior @ a.T
        for c in (covariance, prior):
            c[:dim, :dim] = c[:dim, :dim] + step.scale**2 * (step.noise.T @ step.noise)
        h = observation(case._replace(p=dim), step)
        mean, covariance = oracles.condition(mean, covariance, h, step.residual)
    return mean, covariance, prior


def forty_digits_chain(case, chain):
    stacked = chain.earlier.mean, chain.earlier.factor, chain.steps
    for index in np.ndindex(case.batch):
        one = jax.tree.map(lambda a, i=index: oracles.precise(a[i]), stacked)
        with mpmath.workdps(40):
            out = dense_chain(case, *one)
        yield tuple(np.asarray(a, float) for a in out)


CHAINS = [(DENSE, 4), (MATRICES, 3)]
CHAINS += left_to_nox((SECOND_ORDER, 4), (DENSE, 6), (DENSE, 1), (SQUARE, 8), (SCANNED, 8))


@pytest.mark.parametrize(("case", "earlier_rows"), CHAINS)
def test_three_steps_and_back(case, earlier_rows):
    dim = case.dim
    for seed, size in enumerate((1, 1, 0)):
        problem = chain(case, seed, earlier_rows)
        # The last of them starts from a state that is certain.
        problem = problem._replace(earlier=Normal(problem.earlier.mean, size * problem.earlier.factor))
        x, past = run(case, problem)
        smoothed = realising(looking_back(standard(x), past), problem.earlier)
        elements = each(case, problem.earlier, x, past, smoothed)
        for dense, (first, last, past_of_one, back) in zip(forty_digits_chain(case, problem), elements, strict=True):
            expected_mean, expected, prior = dense
            mean, covariance = together(last, past_of_one)
            zeros = np.zeros((dim, dim))
            a = np.block([[np.eye(dim), np.zeros((dim, earlier_rows))], [zeros, first.factor.T]])
            mean, covariance = a @ mean, a @ covariance @ a.T
            mean[dim:] += first.mean
            size, length = spread(prior), np.max(np.abs(expected_mean)) + 1
            close(covariance, expected, size, 1e-12)
            close(mean, expected_mean, length, 1e-12)
            # One marginal of the joint distribution.
            close(back.factor.T @ back.factor, expected[dim:, dim:], size[dim:, dim:], 1e-12)
            close(back.mean, expected_mean[dim:], length, 1e-12)


@pytest.mark.parametrize(("case", "earlier_rows"), CHAINS)
def test_pasts_of_single_steps_compose_to_that_of_all(case, earlier_rows):
    problem = chain(case, 5, earlier_rows)
    x, past = run(case, problem)
    states, pasts = zip(*run(case, problem, past_of_each=True), strict=True)
    # What is remembered of the past does not touch the present.
    np.testing.assert_allclose(states[-1].factor, x.factor, rtol=0, atol=1e-13)
    np.testing.assert_allclose(states[-1].mean, x.mean, rtol=1e-13)
    for whole, *parts in each(case, past, *pasts):
        shift, cross, own = parts[0].shift, parts[0].cross, parts[0].noise.T @ parts[0].noise
        for later in parts[1:]:
            shift = shift + cross.T @ later.shift
            own = own + cross.T @ (later.noise.T @ later.noise) @ cross
            cross = later.cross @ cross
        np.testing.assert_allclose(whole.shift, shift, rtol=0, atol=1e-12 * (1 + np.max(np.abs(shift), initial=0)))
        np.testing.assert_allclose(whole.cross, cross, rtol=0, atol=1e-13)
        np.testing.assert_allclose(whole.noise.T @ whole.noise, own, rtol=0, atol=1e-13)
    # The same, one marginal after the other.
    later = random_normal(np.random.default_rng(6), case.batch, 3, x.factor.shape[-2], case.cols)
    at_once, one_by_one = looking_back(later, past), later
    for part in reversed(pasts):
        one_by_one = looking_back(one_by_one, part)
    size = 1 + np.max(np.abs(at_once.mean), initial=0)
    np.testing.assert_allclose(one_by_one.mean, at_once.mean, rtol=0, atol=1e-12 * size)
    for a, b in each(case, one_by_one.factor, at_once.factor):
        np.testing.assert_allclose(a.T @ a, b.T @ b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [DENSE, SQUARE, SECOND_ORDER, MATRICES])
def test_looking_back_is_rauch_tung_striebel(case):
    rng = np.random.default_rng(7)
    problem = chain(case, 8, case.rows)
    matrix, step = problem.steps[0]
    predicted, past = predicting_from(problem.earlier, jnp.asarray(matrix), on_device(step))
    later = random_normal(rng, case.batch, case.dim, case.dim, case.cols)
    smoothed = realising(looking_back(finding(later, predicted), past), problem.earlier)
    elements = each(case, problem.earlier, predicted, later, smoothed, matrix, step)
    for x0, x, given, result, a, one in elements:
        p0 = x0.factor.T @ x0.factor
        p = a @ p0 @ a.T + one.scale**2 * one.noise.T @ one.noise
        known = given.mean, given.factor.T @ given.factor
        mean, covariance = oracles.rts_smoother((x0.mean, p0), a @ p0, (x.mean, p), known)
        np.testing.assert_allclose(result.mean, mean, rtol=0, atol=1e-11 * (1 + np.max(np.abs(mean))))
        size = 1 + np.max(np.abs(covariance))
        np.testing.assert_allclose(result.factor.T @ result.factor, covariance, rtol=0, atol=1e-11 * size)


# --- Coordinates ---


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 4, 9]), st.data())
@pytest.mark.parametrize("case", [DENSE, SECOND_ORDER, MATRICES, SCANNED])
def test_coordinates_and_states_are_inverse_to_one_another(case, seed, rows, data):
    rng = np.random.default_rng(seed)
    unit = data.draw(units(case))
    batch, dim = case.batch, case.dim
    mean = rng.standard_normal((*batch, dim, case.cols))
    triangle = np.triu(rng.uniform(-1, 1, (*batch, dim, dim)), 1) / dim + diagonal(rng.uniform(0.5, 2, (*batch, dim)))
    x = Normal(jnp.asarray(mean * unit[:, None]), jnp.asarray(triangle * unit))
    w = random_normal(rng, batch, rows, dim, case.cols)
    again = finding(realising(w, x), x)
    np.testing.assert_allclose(again.factor, w.factor, rtol=0, atol=1e-13)
    np.testing.assert_allclose(again.mean, w.mean, rtol=0, atol=1e-13)
    # The other way round, from any triangle: to the last digits of the terms of each entry.
    hard = np.triu(rng.choice([-1.0, 0.0, 1.0], (*batch, dim, dim)), 1) + diagonal(rng.uniform(0.05, 1, (*batch, dim)))
    x = Normal(x.mean, jnp.asarray(hard * unit))
    state = random_normal(rng, batch, rows, dim, case.cols)
    state = Normal(state.mean * unit[:, None], state.factor * unit)
    coordinates = finding(state, x)
    for one, v, result, s in each(case, x, coordinates, realising(coordinates, x), state):
        terms = np.abs(one.factor.T) @ np.abs(v.mean)
        close(result.mean, s.mean, terms + np.abs(one.mean) + np.abs(s.mean), 1e-14)
        close(result.factor, s.factor, np.abs(v.factor) @ np.abs(one.factor) + np.abs(s.factor), 1e-14)


@pytest.mark.parametrize("lost", [(0,), (2,), (5,), (0, 1, 2), (0, 1, 2, 3, 4, 5)])
def test_what_is_certain_has_no_coordinates(lost):
    rng = np.random.default_rng(9)
    triangle, lost = np.triu(rng.uniform(0.5, 1, (6, 6))), np.array(lost)
    triangle[lost] = 0
    x = Normal(jnp.asarray(rng.standard_normal((6, 2))), jnp.asarray(triangle))
    state = realising(random_normal(rng, (), 3, 6, 2), x)
    coordinates = finding(state, x)
    np.testing.assert_array_equal(coordinates.mean[lost], 0)
    np.testing.assert_array_equal(coordinates.factor[:, lost], 0)
    again = realising(coordinates, x)
    np.testing.assert_allclose(again.mean, state.mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(again.factor, state.factor, rtol=0, atol=1e-13)


# --- Orthogonality ---


@pytest.mark.parametrize(("case", "earlier_rows"), CHAINS)
def test_a_step_is_an_orthogonal_map(case, earlier_rows):
    # cross^T cross + own^T own + what the equation has said = I: the columns of an orthogonal matrix.
    problem = chain(case, 10, earlier_rows)
    x, (matrix, step) = problem.earlier, problem.steps[0]
    changed = advance(case, x, Conditional.identity(x), jnp.asarray(matrix), on_device(step))
    predicted, before = predicting_from(x, jnp.asarray(matrix), on_device(step))
    for first, state, earlier, past, a, one in each(case, x, predicted, before, changed.past, matrix, step):
        h = observation(case, one)[:, : case.dim]
        cross = h @ a @ first.factor.T
        said = cross.T @ np.linalg.solve(h @ state.factor.T @ state.factor @ h.T, cross)
        eye = np.eye(earlier_rows)
        np.testing.assert_allclose(
            earlier.cross.T @ earlier.cross + earlier.noise.T @ earlier.noise, eye, rtol=0, atol=1e-14
        )
        np.testing.assert_allclose(
            past.cross.T @ past.cross + past.noise.T @ past.noise + said, eye, rtol=0, atol=1e-12
        )


@hypothesis.given(st.integers(0, 2**32 - 1), st.data())
@pytest.mark.parametrize(("case", "earlier_rows"), [(DENSE, 6), (SECOND_ORDER, 2), (MATRICES, 3)])
def test_no_column_is_longer_than_one_whatever_the_sizes(case, earlier_rows, seed, data):
    rng = np.random.default_rng(seed)
    problem = chain(case, seed, earlier_rows)
    x = problem.earlier
    past = Conditional.identity(x)
    for matrix, step in problem.steps:
        step = in_units(case, step, data.draw(units(case, largest=100)))
        step = step._replace(scale=step.scale * 10.0 ** rng.uniform(-30, 30) * rng.choice([0.0, 1.0], p=[0.2, 0.8]))
        if rng.random() < 0.2:
            x = Normal(x.mean, 0 * x.factor)
        changed = advance(case, x, past, jnp.asarray(matrix), on_device(step))
        x, past = changed.state, changed.past
        assert all(np.all(np.isfinite(leaf)) for leaf in (x.factor, past.cross, past.noise))
        for (one,) in each(case, past):
            assert np.max(np.sum(one.cross**2, axis=0) + np.sum(one.noise**2, axis=0)) < 1 + 1e-14


# --- Single precision ---


def widened(*trees):
    return jax.tree.map(lambda a: np.asarray(a, float), trees)


@hypothesis.given(st.data())
@pytest.mark.parametrize("case", [DENSE, MATRICES, *left_to_nox(SECOND_ORDER, SCANNED)])
def test_single_precision(case, data):
    x = data.draw(problems(case))
    x = x._replace(noise=x.noise / np.sqrt(case.dim) + np.eye(case.dim), scale=np.clip(x.scale, 0.5, 2))
    x = Problem(*(np.asarray(field, np.float32) for field in x))
    unit = np.asarray(data.draw(units(case, largest=12)), np.float32)
    measured = on_device(in_units(case, x, unit))
    assert all(field.dtype == jnp.float32 for field in measured)
    predicted, changed = predicting(measured), conditioning(case, measured)
    u = factors(case, np.asarray(unit, float))
    for one, *parts in each(case, x, *predicted, changed.state, changed.past):
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(parts))
        (exact,), parts = widened(one), widened(*parts)
        _, prior = plain(exact)
        _, covariance = together(*parts[:2])
        close(covariance / np.outer(u, u), prior, spread(prior), 1e-5)
        expected_mean, expected = conditioned(case, exact)
        mean, covariance = together(*parts[2:])
        close(covariance / np.outer(u, u), expected, spread(prior), 1e-5)
        close(mean / u[:, None], expected_mean, np.max(np.abs(expected_mean)) + 1, 1e-5)


def test_single_precision_of_states_whose_squares_underflow():
    # Short steps of a high order: columns of 1e-24 beside the coordinates of the past, which are about one.
    x = random_problem(DENSE, 11)
    x = x._replace(noise=x.noise / np.sqrt(DENSE.dim) + np.eye(DENSE.dim), scale=np.ones(()))
    x = Problem(*(np.asarray(field, np.float32) for field in x))
    unit = np.asarray(2.0 ** np.array([-80, -80, -80, -40, 0, 0]), np.float32)
    changed = conditioning(DENSE, on_device(in_units(DENSE, x, unit)))
    (exact, *parts), u = widened(x, changed.state, changed.past), factors(DENSE, np.asarray(unit, float))
    mean, covariance = together(*parts)
    expected_mean, expected = conditioned(DENSE, exact)
    close(covariance / np.outer(u, u), expected, spread(plain(exact)[1]), 1e-5)
    np.testing.assert_allclose(mean / u[:, None], expected_mean, rtol=0, atol=1e-5 * np.max(np.abs(expected_mean)))


# --- Derivatives ---


class Everything(NamedTuple):
    """What derivatives are taken with respect to."""

    problem: Problem
    earlier_mean: np.ndarray
    earlier_factor: np.ndarray
    later_mean: np.ndarray
    later_factor: np.ndarray


def random_everything(case, seed):
    rng = np.random.default_rng(seed)
    x = random_problem(case, seed)
    x = x._replace(scale=np.ones(case.batch), noise=x.noise / np.sqrt(case.dim) + np.eye(case.dim))
    sizes = [(case.dim, case.cols), (case.p, case.dim), (case.dim, case.cols), (case.dim, case.dim)]
    return Everything(x, *(rng.uniform(-1, 1, size) for size in sizes))


def flat(x):
    return np.concatenate([np.ravel(leaf) for leaf in (*x.problem, *x[1:])])


def unflatten(vector, like):
    fields = (*like.problem, *like[1:])
    ends = np.cumsum([np.size(field) for field in fields])
    parts = [vector[end - np.size(f) : end].reshape(np.shape(f)) for end, f in zip(ends, fields, strict=True)]
    return Everything(Problem(*parts[: len(like.problem)]), *parts[len(like.problem) :])


def raveled(fn, case, like):
    def outputs(vector):
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(fn(case, unflatten(vector, like)))])

    return outputs


def joint_on_device(state, past):
    beside = state.factor.T @ past.cross
    return (
        state.mean,
        past.shift,
        state.factor.T @ state.factor,
        beside,
        past.cross.T @ past.cross + past.noise.T @ past.noise,
    )


def invariants(case, x):
    """The joint distribution with the noise, and given the equation; the smoothed marginal, from a later state."""
    p = x.problem
    past = Conditional(p.shift, p.cross, p.own)
    changed = condition(Normal(p.mean, p.factor), p.noise, p.scale, equation_of(case, p), past)
    predicted, past = predict(Normal(p.mean, p.factor), p.noise, p.scale, past)
    later = coordinates_of(Normal(x.later_mean, x.later_factor), predicted)
    smoothed = from_coordinates(marginalise(later, past), Normal(x.earlier_mean, x.earlier_factor))
    ends = smoothed.mean, smoothed.factor.T @ smoothed.factor
    return joint_on_device(predicted, past), joint_on_device(changed.state, changed.past), ends


def textbook(case, x):
    """The same, from full covariances."""
    dim = case.dim

    def parts(mean, covariance):
        return mean[:dim], mean[dim:], covariance[:dim, :dim], covariance[:dim, dim:], covariance[dim:, dim:]

    predicted = parts(*plain(x.problem))
    mean, mean_of_w, covariance, cross, of_w = predicted
    later, a = (x.later_mean, x.later_factor.T @ x.later_factor), x.earlier_factor.T
    w, of_w = oracles.rts_smoother((mean_of_w, of_w), cross, (mean, covariance), later)
    return predicted, parts(*conditioned(case, x.problem)), (x.earlier_mean + a @ w, a @ of_w @ a.T)


@ft.cache
def jacobians(case):
    outputs = raveled(invariants, case, random_everything(case, 0))
    return jax.jit(lambda x: (outputs(x), jax.jacfwd(outputs)(x), jax.jacrev(outputs)(x)))


def complex_steps(case, x):
    vector, columns = flat(x), []
    for i in range(vector.size):
        step = vector.astype(complex)
        step[i] += 1e-30j
        out = textbook(case, unflatten(step, x))
        columns.append(np.concatenate([np.ravel(leaf).imag for leaf in jax.tree.leaves(out)]) / 1e-30)
    return np.stack(columns, axis=-1)


def is_read(case, x):
    """Below their diagonals, the noise and what is the past's own are taken to be zero."""
    everything = jax.tree.map(np.ones_like, x)
    triangles = {name: np.triu(getattr(everything.problem, name)) for name in ("noise", "own")}
    return flat(everything._replace(problem=everything.problem._replace(**triangles))) == 1


def special(case, x, state):
    p = x.problem
    if state == "certain":
        p = p._replace(factor=0 * p.factor)
    if state == "one direction":
        p = p._replace(factor=p.factor * (np.arange(case.rows) < 1)[:, None])
    if state == "no residual":
        p = p._replace(factor=0 * p.factor, residual=0 * p.residual)
    if state == "just kept":
        p = p._replace(shift=0 * p.shift, cross=np.eye(case.rows, case.p), own=0 * p.own)
    if state == "no past":
        p = p._replace(cross=0 * p.cross, own=0 * p.own)
    return x._replace(problem=p)


STATES = ("uncertain", "certain", "one direction", "no residual", "just kept", "no past")


@pytest.mark.thorough
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", first_of(SMALL_SECOND_ORDER, SMALL))
def test_derivatives_with_respect_to_everything(case, state):
    x = special(case, random_everything(case, 12), state)
    values, forward, reverse = jacobians(case)(jnp.asarray(flat(x)))
    reference = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(textbook(case, x))])
    np.testing.assert_allclose(values, reference, rtol=0, atol=1e-12 * (1 + np.max(np.abs(reference))))
    read, exact = is_read(case, x), complex_steps(case, x)
    tolerance = 1e-12 * (1 + np.max(np.abs(exact)))
    np.testing.assert_allclose(forward[:, read], exact[:, read], rtol=0, atol=tolerance)
    np.testing.assert_allclose(reverse[:, read], exact[:, read], rtol=0, atol=tolerance)
    # What an absolute tolerance could hide: every block of the answer moves with something.
    assert np.max(np.abs(exact)) > 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("nothing", ["noise", "noise and residual", "anything"])
@pytest.mark.parametrize("case", [SMALL, SMALL_SECOND_ORDER])
def test_derivatives_are_finite_where_nothing_is_left(case, nothing):
    x = random_everything(case, 13)
    p = x.problem
    p = p._replace(factor=0 * p.factor, cross=np.eye(case.rows, case.p), own=0 * p.own, scale=0 * p.scale)
    if nothing != "noise":
        p = p._replace(residual=0 * p.residual)
    if nothing == "anything":
        p = p._replace(noise=0 * p.noise)
        x = jax.tree.map(np.zeros_like, x)
    values, forward, reverse = jacobians(case)(jnp.asarray(flat(x._replace(problem=p))))
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in (values, forward, reverse))
    np.testing.assert_allclose(forward, reverse, rtol=0, atol=1e-12 * (1 + np.max(np.abs(forward))))


def blocks(case, x):
    """The blocks themselves, of which the invariants are made."""
    p = x.problem
    past = Conditional(p.shift, p.cross, p.own)
    changed = condition(Normal(p.mean, p.factor), p.noise, p.scale, equation_of(case, p), past)
    later = coordinates_of(Normal(x.later_mean, x.later_factor), Normal(p.mean, p.noise))
    back = marginalise(standard(Normal(p.mean, p.factor)), past)
    return changed.past, changed.state.factor, changed.influence.gain, later, back


@pytest.mark.thorough
def test_derivatives_of_the_blocks_against_finite_differences():
    x = random_everything(SMALL, 14)
    outputs = jax.jit(raveled(blocks, SMALL, x))
    expected = central_differences(outputs, flat(x), 1e-3)
    read = is_read(SMALL, x)
    for mode in (jax.jacfwd, jax.jacrev):
        assert relative(jax.jit(mode(outputs))(flat(x))[:, read], expected[:, read]) < 1e-8
