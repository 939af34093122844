"""The algebra on batches of matrix-normals against the textbook: full covariances, the Kalman update, 40 digits."""

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
from probode.algebra.innovation import innovate
from probode.algebra.linearisation import Linearisation
from probode.algebra.normal import Normal, push

from .. import oracles
from ..helpers import condition, first_of


class Case(NamedTuple):
    """``dim = n m``; ``block`` is the order of the equation."""

    batch: tuple[int, ...]
    n: int
    m: int
    cols: int
    block: int
    rows: int

    @property
    def dim(self):
        return self.n * self.m


DENSE = Case((), n=3, m=2, cols=1, block=1, rows=6)
DENSE_SECOND_ORDER = Case((), n=4, m=2, cols=1, block=2, rows=5)
ISOTROPIC = Case((), n=4, m=1, cols=3, block=1, rows=4)
BLOCKS = Case((3,), n=4, m=1, cols=1, block=2, rows=4)
SMALL = Case((), n=2, m=2, cols=1, block=1, rows=4)
SECOND_ORDER = Case((), n=4, m=1, cols=2, block=2, rows=4)
SCANNED = Case((), n=4, m=3, cols=1, block=1, rows=12)
MATRICES = Case((2,), n=3, m=2, cols=2, block=2, rows=3)  # more general than any factorisation
CASES = (DENSE, DENSE_SECOND_ORDER, ISOTROPIC, BLOCKS, SCANNED, MATRICES)
LAPACK = Case((), n=2, m=93, cols=1, block=1, rows=186)  # more columns than the elimination takes


class Inputs(NamedTuple):
    """Of one batch element, or stacked: a state, the noise of a step, an equation."""

    mean: np.ndarray
    factor: np.ndarray
    noise: np.ndarray
    scale: np.ndarray
    coupling: np.ndarray  # H without its identity block
    residual: np.ndarray


def shapes(case):
    k = case.block * case.m
    return Inputs(
        mean=(*case.batch, case.dim, case.cols),
        factor=(*case.batch, case.rows, case.dim),
        noise=(*case.batch, case.dim, case.dim),
        scale=case.batch,
        coupling=(*case.batch, case.m, k),
        residual=(*case.batch, case.m, case.cols),
    )


def structured(case, raw, log_diagonal, log_scale):
    """Inputs from arrays of any numbers: a triangle with a positive diagonal, a positive scale."""
    eye = np.eye(case.dim)
    noise = np.triu(raw.noise, 1) + np.exp(log_diagonal)[..., None] * eye
    return raw._replace(noise=noise, scale=np.exp(log_scale))


def random_inputs(case, seed):
    rng = np.random.default_rng(seed)
    raw = Inputs(*(rng.uniform(-1, 1, shape) for shape in shapes(case)))
    raw = raw._replace(noise=raw.noise / np.sqrt(case.dim), coupling=raw.coupling / np.sqrt(case.m))
    return structured(case, raw, rng.uniform(-1, 1, (*case.batch, case.dim)), rng.uniform(-1, 1, case.batch))


@st.composite
def inputs(draw, case):
    numbers = st.floats(-1, 1, allow_subnormal=False)
    raw = Inputs(*(draw(hnp.arrays(np.float64, shape, elements=numbers)) for shape in shapes(case)))
    # The scale is a mean of squares, and those of residuals this small are below the smallest number.
    raw = raw._replace(residual=np.where(abs(raw.residual) < 1e-150, 0, raw.residual))
    log_diagonal = draw(hnp.arrays(np.float64, (*case.batch, case.dim), elements=st.floats(-2, 2)))
    log_scale = draw(hnp.arrays(np.float64, case.batch, elements=st.floats(-3, 3)))
    return structured(case, raw, log_diagonal, log_scale)


def linearisation(case, x):
    eye = jnp.broadcast_to(jnp.eye(case.m), (*case.batch, case.m, case.m))
    return Linearisation(jnp.concatenate([x.coupling, eye], axis=-1), x.residual, range(case.block, case.block + 1))


def unstacked(case, x):
    """The elements of a batch, one by one."""
    for index in np.ndindex(case.batch):
        yield index, Inputs(*(field[index] for field in x))


@ft.cache
def compiled(case):
    def run(x):
        update = condition(Normal(x.mean, x.factor), x.noise, x.scale, linearisation(case, x))
        posterior, whitened = update.state, update.influence.whitened
        innovation = innovate(linearisation(case, x), x.noise, jnp.ones(case.batch))
        predicted, _ = predict(Normal(x.mean, x.factor), x.noise, x.scale)
        return posterior, whitened, innovation, predicted

    return jax.jit(run)


def evaluate(case, x):
    return jax.tree.map(np.asarray, compiled(case)(Inputs(*map(jnp.asarray, x))))


# The textbook. Written for any number type that NumPy multiplies: floats, complex steps, mpmath's numbers.


def observation(case, x):
    rest = case.dim - x.coupling.shape[1] - case.m
    return np.concatenate([x.coupling, np.eye(case.m), np.zeros((case.m, rest))], axis=1)


def kalman(case, x):
    """Posterior mean, covariance, and the squared length of the whitened residual, per column."""
    h = observation(case, x)
    covariance = x.factor.T @ x.factor + x.scale**2 * (x.noise.T @ x.noise)
    mahalanobis = np.sum(x.residual * oracles.solve(h @ covariance @ h.T, x.residual), axis=0)
    return *oracles.condition(x.mean, covariance, h, x.residual), mahalanobis


def local(case, x):
    """``H Q H^T``, and the mean of ``z^T (H Q H^T)^-1 z`` over all residuals."""
    h = observation(case, x)
    s = h @ (x.noise.T @ x.noise) @ h.T
    return s, np.sum(x.residual * oracles.solve(s, x.residual)) / x.residual.size


def check(case, x, tolerance):
    """Everything that an attempted step computes, to ``tolerance`` of what it is computed from."""
    posterior, whitened, innovation, predicted = evaluate(case, x)
    assert posterior.factor.shape == (*case.batch, max(case.rows, case.dim - case.m), case.dim)
    for index, one in unstacked(case, x):
        with mpmath.workdps(40):
            exact = Inputs(*map(oracles.precise, one))
            mean, covariance, mahalanobis = kalman(case, exact)
            s, scale_squared = local(case, exact)
            prior = exact.factor.T @ exact.factor + exact.scale**2 * (exact.noise.T @ exact.noise)
            mean, covariance, mahalanobis, s, prior = (
                np.asarray(a, float) for a in (mean, covariance, mahalanobis, s, prior)
            )
            scale = float(mpmath.sqrt(scale_squared))
        std = np.sqrt(np.diagonal(prior))
        spread = np.outer(std, std)

        def close(value, reference, size, tolerance=tolerance):
            assert value.shape == reference.shape
            assert np.max(np.abs(value - reference) / size) < tolerance

        close(predicted.factor[index].T @ predicted.factor[index], prior, spread)
        close(predicted.mean[index], one.mean, 1)
        close(posterior.factor[index].T @ posterior.factor[index], covariance, spread)
        shift = np.max(np.abs(mean - one.mean))
        close(posterior.mean[index], mean, 1 + shift)
        close(np.sum(whitened[index] ** 2, axis=0), mahalanobis, 1 + np.max(mahalanobis))

        factor = innovation.factor[index]
        close(factor.T @ factor, s, np.sqrt(np.outer(np.diagonal(s), np.diagonal(s))))
        close(np.sqrt(np.mean(innovation.whitened[index] ** 2)), np.asarray(scale), 1e-150 + scale)
        close(innovation.scale[index], np.asarray(scale), 1e-150 + scale)

        # The equation holds afterwards, for sure.
        h = observation(case, one)
        close(one.residual + h @ (posterior.mean[index] - one.mean), 0 * one.residual, 1 + shift)
        close(posterior.factor[index] @ h.T, np.zeros((posterior.factor.shape[-2], case.m)), np.max(std))


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_kalman_update(case):
    for seed in range(2):
        check(case, random_inputs(case, seed), 1e-13)


@hypothesis.given(st.data())
@pytest.mark.parametrize("case", [DENSE, BLOCKS])
def test_a_step_is_the_kalman_update_for_any_numbers(case, data):
    check(case, data.draw(inputs(case)), 1e-11)


@pytest.mark.parametrize("case", [DENSE, BLOCKS])
def test_from_an_exact_state_and_with_an_exact_residual(case):
    x = random_inputs(case, 3)
    check(case, x._replace(factor=0 * x.factor), 1e-13)
    check(case, x._replace(factor=0 * x.factor, residual=0 * x.residual), 1e-13)


@pytest.mark.parametrize("case", CASES)
def test_whitening_is_by_the_cholesky_factor(case):
    # `substitute` and the triangle agree on which root of S whitens: sums of squares could not tell.
    x = random_inputs(case, 4)
    _, whitened, _, _ = evaluate(case, x)
    for index, one in unstacked(case, x):
        h = observation(case, one)
        root = np.linalg.cholesky(h @ (one.factor.T @ one.factor + one.scale**2 * one.noise.T @ one.noise) @ h.T)
        np.testing.assert_allclose(whitened[index], np.linalg.solve(root, one.residual), rtol=0, atol=1e-12)


def test_more_components_than_the_elimination_takes():
    x = random_inputs(LAPACK, 5)
    posterior, whitened, innovation, _ = evaluate(LAPACK, x)
    mean, covariance, mahalanobis = kalman(LAPACK, x)
    _, scale_squared = local(LAPACK, x)
    np.testing.assert_allclose(posterior.mean, mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(posterior.factor.T @ posterior.factor, covariance, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.sum(whitened**2, axis=0), mahalanobis, rtol=1e-9)
    np.testing.assert_allclose(innovation.scale**2, scale_squared, rtol=1e-9)


@pytest.mark.parametrize("case", [DENSE, ISOTROPIC, BLOCKS, SCANNED, LAPACK])
def test_no_residual_no_noise_no_uncertainty(case):
    # A constant vector field under dynamic calibration, from an exact initial value: 0/0 unless it is thought of.
    x = random_inputs(case, 6)
    x = x._replace(factor=0 * x.factor, scale=0 * x.scale, residual=0 * x.residual)
    posterior, whitened, innovation, predicted = evaluate(case, x)
    np.testing.assert_array_equal(posterior.mean, x.mean)
    for zero in (posterior.factor, predicted.factor, whitened, innovation.whitened, innovation.scale):
        np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("case", [DENSE, BLOCKS])
def test_what_is_not_finite_is_not_swallowed(case):
    # A field that returns NaN must be seen by the error estimate: a scale of zero would accept the step.
    x = random_inputs(case, 12)
    for bad in (np.nan, np.inf):
        posterior, whitened, innovation, _ = evaluate(case, x._replace(residual=np.full_like(x.residual, bad)))
        for out in (posterior.mean, whitened, innovation.whitened, innovation.scale):
            assert not np.any(np.isfinite(np.min(out, axis=0) if out.ndim > 1 else out)), bad
    _, _, innovation, _ = evaluate(case, x._replace(coupling=np.full_like(x.coupling, np.nan)))
    assert not np.any(np.isfinite(innovation.scale))
    assert not np.all(np.isfinite(innovation.factor))
    posterior, _, _, predicted = evaluate(case, x._replace(factor=np.full_like(x.factor, np.nan)))
    assert not np.all(np.isfinite(posterior.factor)) and not np.all(np.isfinite(predicted.factor))


@pytest.mark.parametrize("case", [DENSE, BLOCKS])
def test_the_scale_of_everything_moves_no_mean(case):
    x = random_inputs(case, 7)
    posterior, whitened, _, _ = evaluate(case, x)
    scaled = x._replace(factor=8 * x.factor, scale=8 * x.scale)
    posterior_8, whitened_8, _, _ = evaluate(case, scaled)
    # A power of two: not even a bit changes.
    np.testing.assert_array_equal(posterior_8.mean, posterior.mean)
    np.testing.assert_array_equal(posterior_8.factor, 8 * posterior.factor)
    np.testing.assert_array_equal(8 * whitened_8, whitened)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(("p", "dim"), [(3, 3), (3, 6), (6, 6)])
def test_push_maps_by_the_matrix_or_its_kronecker_product(batch, p, dim):
    rng = np.random.default_rng(8)
    a, mean, factor = (rng.standard_normal((*batch, *shape)) for shape in ((p, p), (dim, 2), (4, dim)))
    out = push(Normal(jnp.asarray(mean), jnp.asarray(factor)), jnp.asarray(a))
    for index in np.ndindex(batch):
        full = np.kron(a[index], np.eye(dim // p))
        np.testing.assert_allclose(out.mean[index], full @ mean[index], rtol=0, atol=1e-13)
        np.testing.assert_allclose(
            out.factor[index].T @ out.factor[index], full @ factor[index].T @ factor[index] @ full.T, rtol=0, atol=1e-12
        )


# Derivatives: both modes against complex steps through the textbook, exact to round-off.


def flat(x):
    return np.concatenate([np.ravel(field) for field in x])


def unflatten(case, vector, like):
    sizes = np.cumsum([np.size(field) for field in like])[:-1]
    parts = np.split(vector, sizes) if isinstance(vector, np.ndarray) else jnp.split(vector, sizes)
    return Inputs(*(part.reshape(np.shape(field)) for part, field in zip(parts, like, strict=True)))


def textbook(case, x):
    mean, covariance, mahalanobis = kalman(case, x)
    s, scale_squared = local(case, x)
    return np.concatenate([np.ravel(a) for a in (mean, covariance, mahalanobis, s, scale_squared)])


@ft.cache
def jacobians(case):
    like = Inputs(*(np.empty(shape) for shape in shapes(case)))

    def outputs(vector):
        x = unflatten(case, vector, like)
        update = condition(Normal(x.mean, x.factor), x.noise, x.scale, linearisation(case, x))
        posterior, whitened = update.state, update.influence.whitened
        innovation = innovate(linearisation(case, x), x.noise, jnp.ones(case.batch))
        covariance, s = posterior.factor.T @ posterior.factor, innovation.factor.T @ innovation.factor
        parts = (posterior.mean, covariance, jnp.sum(whitened**2, axis=0), s, innovation.scale**2)
        return jnp.concatenate([jnp.ravel(a) for a in parts])

    return jax.jit(lambda x: (outputs(x), jax.jacfwd(outputs)(x), jax.jacrev(outputs)(x)))


def complex_steps(case, x):
    like, vector = x, flat(x)
    columns = []
    for i in range(vector.size):
        step = vector.astype(complex)
        step[i] += 1e-30j
        columns.append(textbook(case, unflatten(case, step, like)).imag / 1e-30)
    return np.stack(columns, axis=-1)


@pytest.mark.thorough
@pytest.mark.parametrize("state", ["uncertain", "exact", "low rank", "no residual"])
@pytest.mark.parametrize("case", first_of(SMALL, SECOND_ORDER))
def test_derivatives_with_respect_to_everything(case, state):
    x = random_inputs(case, 9)
    if state == "exact":
        x = x._replace(factor=0 * x.factor)
    if state == "low rank":
        x = x._replace(factor=x.factor * (np.arange(case.rows) < 1)[:, None])
    if state == "no residual":
        x = x._replace(factor=0 * x.factor, residual=0 * x.residual)
    values, forward, reverse = jacobians(case)(jnp.asarray(flat(x)))
    exact = complex_steps(case, x)
    # The triangle below the diagonal of the noise is not read: both sides must leave it alone or count it the same.
    lower = flat(Inputs(*(np.tril(np.ones_like(f), -1) if f is x.noise else np.zeros_like(f) for f in x))) == 1
    np.testing.assert_allclose(values, textbook(case, x), rtol=0, atol=1e-12)
    np.testing.assert_allclose(forward[:, ~lower], exact[:, ~lower], rtol=0, atol=1e-11)
    np.testing.assert_allclose(reverse[:, ~lower], exact[:, ~lower], rtol=0, atol=1e-11)
    # What could hide behind an absolute tolerance: the derivative is not zero where it should not be.
    assert np.max(np.abs(exact)) > 0.1


def test_derivatives_are_finite_where_nothing_is_left():
    x = random_inputs(SMALL, 10)
    x = x._replace(factor=0 * x.factor, scale=0 * x.scale, residual=0 * x.residual)
    _, forward, reverse = jacobians(SMALL)(jnp.asarray(flat(x)))
    assert bool(jnp.all(jnp.isfinite(forward))) and bool(jnp.all(jnp.isfinite(reverse)))


@pytest.mark.thorough
def test_derivative_of_the_local_scale_vanishes_with_the_residual():
    x = random_inputs(ISOTROPIC, 11)

    def scale(residual):
        equation = linearisation(ISOTROPIC, Inputs(*map(jnp.asarray, x._replace(residual=residual))))
        return innovate(equation, jnp.asarray(x.noise), jnp.ones(())).scale

    np.testing.assert_array_equal(jax.grad(scale)(jnp.zeros_like(x.residual)), 0)


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-25])
def test_single_precision_innovations_of_short_steps(size):
    # sqrt(H Q H^T) is of size dt^(nu - 1/2): its square underflows in single precision, the whitened one overflows.
    noise = jnp.asarray(size * np.triu(np.ones((2, 2))), jnp.float32)
    equation = Linearisation(jnp.asarray([[0.0, 1.0]], jnp.float32), jnp.asarray([[1e-3]], jnp.float32), range(1, 2))
    innovation = innovate(equation, noise, jnp.ones(()))
    assert innovation.scale.dtype == jnp.float32
    np.testing.assert_allclose(innovation.factor[0, 0], np.sqrt(2) * size, rtol=1e-5)
    np.testing.assert_allclose(innovation.scale, 1e-3 / (np.sqrt(2) * size), rtol=1e-5)
