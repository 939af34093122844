"""The local error estimate against its formula on full covariances, its invariances, the norms."""

import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.algebra.factorisations import Layout
from probode.algebra.innovation import innovate
from probode.algebra.linearisation import Linearisation
from probode.stepping.error_estimates import max_norm, rms_norm

from .. import oracles
from ..helpers import FACTORISATIONS, name


NU, D = 3, 2
factorisations = pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)


def layout_of(factorisation, d=D, nu=NU, dtype=jnp.float64):
    return Layout(factorisation, nu, d, lambda u: u, jnp.dtype(dtype))


def jacobians(k):
    return np.random.default_rng(k).standard_normal((k, D, D))


def residual():
    return np.asarray([[0.3, -0.02]])


def estimate(factorisation, k, dt, z, scale=1.0, error=po.ResidualError()):
    """Per component, from the package: ``H = E_k - sum_j J_j E_j``."""
    layout = layout_of(factorisation)
    transition = po.IWP(NU, output_scale=scale).transition(jnp.asarray(dt), layout)
    unit = jnp.broadcast_to(transition.magnitude, layout.batch_shape)
    blocks = [-layout.project(jnp.asarray(j)) for j in jacobians(k)] + [layout.identity()]
    equation = Linearisation(jnp.concatenate(blocks, axis=-1), layout.pack(jnp.asarray(z)), range(k, k + 1))
    innovation = innovate(equation, transition.noise, unit)
    attempt = po.Attempt(transition, jnp.zeros_like(innovation.whitened), equation, innovation, None)
    return error.estimate(attempt, jnp.asarray(dt), layout)


def kept(factorisation, jacobian):
    """The part of a Jacobian that the covariance structure can hold."""
    diagonal = np.diagonal(jacobian)
    if isinstance(factorisation, po.Dense):
        return jacobian
    return np.diag(diagonal) if isinstance(factorisation, po.BlockDiagonal) else diagonal.mean() * np.eye(D)


def formula(factorisation, k, dt, z, scale=1.0):
    """Schober et al. (2019), eq. (41) and (44), on the full covariance."""
    _, q = oracles.iwp(NU, dt)
    full = np.kron(q, np.diag(np.broadcast_to(scale, (D,)) ** 2))
    h = np.zeros((D, (NU + 1) * D))
    for j, jacobian in enumerate(jacobians(k)):
        h[:, j * D : (j + 1) * D] = -kept(factorisation, jacobian)
    h[:, k * D : (k + 1) * D] = np.eye(D)
    s = h @ full @ h.T
    z = z[0]
    # One scale for all components, or one for each.
    if isinstance(factorisation, po.BlockDiagonal):
        local = np.abs(z) / np.sqrt(np.diagonal(s))
    else:
        local = np.sqrt(z @ np.linalg.solve(s, z) / D)
    return abs(dt) ** k / math.factorial(k) * local * np.sqrt(np.diagonal(s))


@factorisations
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dt", [0.3, -0.3, 1e-4])
def test_estimate_is_the_formula(factorisation, k, dt):
    out = estimate(factorisation, k, dt, residual())
    assert out.shape == (D,)
    np.testing.assert_allclose(out, formula(factorisation, k, dt, residual()), rtol=1e-11)


@factorisations
def test_the_prior_scale_cancels_and_the_residual_does_not(factorisation):
    one = estimate(factorisation, 1, 0.3, residual())
    np.testing.assert_allclose(estimate(factorisation, 1, 0.3, residual(), scale=1e6), one, rtol=1e-13)
    np.testing.assert_allclose(estimate(factorisation, 1, 0.3, -4 * residual()), 4 * one, rtol=1e-13)


@pytest.mark.parametrize("factorisation", FACTORISATIONS[:2], ids=name)
def test_scales_of_components_enter(factorisation):
    scale = jnp.asarray([1.0, 100.0])
    out = estimate(factorisation, 1, 0.3, residual(), scale)
    np.testing.assert_allclose(out, formula(factorisation, 1, 0.3, residual(), np.asarray(scale)), rtol=1e-11)


def test_components_on_their_own_have_the_residual_times_the_step():
    # One component: the scale cancels altogether.
    z = residual()
    np.testing.assert_allclose(estimate(po.BlockDiagonal(), 1, -0.3, z), 0.3 * np.abs(z[0]), rtol=1e-14)
    np.testing.assert_allclose(estimate(po.BlockDiagonal(), 2, 0.3, z), 0.3**2 / 2 * np.abs(z[0]), rtol=1e-14)


@factorisations
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_field_that_is_not_finite_has_no_small_error(factorisation, bad):
    # Otherwise the step is accepted (the predicted mean, the only other thing to look at, is finite).
    z = np.full((1, D), bad)
    assert not np.isfinite(rms_norm(estimate(factorisation, 1, 0.3, z)))


@factorisations
def test_no_residual_no_error_no_derivative(factorisation):
    zero = np.zeros((1, D))
    np.testing.assert_array_equal(estimate(factorisation, 1, 0.3, zero), 0)
    gradient = jax.grad(lambda z: jnp.sum(estimate(factorisation, 1, 0.3, z)))(jnp.asarray(zero))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("nu", [1, 3, 5, 8])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-13), (jnp.float32, 1e-5)], ids=["double", "single"])
def test_short_steps_do_not_lose_the_error(nu, dtype, rtol):
    # With one component the estimate is |dt z|: an underflow on the way would accept anything.
    layout = layout_of(po.Isotropic(), 1, nu, dtype)
    z = jnp.asarray([[1e-3]], dtype)
    equation = Linearisation(jnp.asarray([[0.0, 1.0]], dtype), z, range(1, 2))
    for step in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        dt = jnp.asarray(step, dtype)
        transition = po.IWP(nu).transition(dt, layout)
        innovation = innovate(equation, transition.noise, transition.magnitude)
        attempt = po.Attempt(transition, jnp.zeros((2, 1), dtype), equation, innovation, None)
        error = po.ResidualError().estimate(attempt, dt, layout)
        np.testing.assert_allclose(error, [step * 1e-3], rtol=rtol, err_msg=f"dt = {step}")


@hypothesis.given(hnp.arrays(np.float64, (5,), elements=st.floats(-1e6, 1e6, allow_subnormal=False)))
def test_norms(x):
    np.testing.assert_allclose(rms_norm(jnp.asarray(x)), np.linalg.norm(x) / np.sqrt(5), rtol=1e-14, atol=1e-150)
    np.testing.assert_allclose(max_norm(jnp.asarray(x)), np.max(np.abs(x)), rtol=0)


def test_norms_have_derivatives_at_zero_and_pass_on_what_is_not_finite():
    np.testing.assert_array_equal(jax.grad(rms_norm)(jnp.zeros(3)), 0)
    for norm in (rms_norm, max_norm):
        assert np.isnan(norm(jnp.asarray([1.0, np.nan])))
        assert np.isinf(norm(jnp.asarray([1.0, -np.inf])))


def test_the_norm_is_a_setting():
    assert po.ResidualError().norm is rms_norm
    assert po.ResidualError(norm=max_norm).norm is max_norm
    assert po.ResidualError() == po.ResidualError()
