"""Layouts against the full covariance that each factorisation stands for, written out entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import probode as po
from probode.algebra.factorisations import Layout

from ..helpers import FACTORISATIONS, name


N, D = 3, 3  # derivatives counted from the zeroth, components
STATE = {"x": jnp.asarray([1.0, 2.0]), "y": jnp.asarray(3.0)}
factorisations = pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)


def layout_of(factorisation, state=STATE, num_derivatives=N - 1, dtype=jnp.float64):
    flat, unravel = ravel_pytree(state)
    return Layout(factorisation, num_derivatives, flat.size, unravel, jnp.dtype(dtype))


def written_out(layout, cov):
    """The covariance of ``(u_1, ..., u_d, u'_1, ..., u'_d, ...)`` from that of the batch elements.

    ``Dense`` keeps every entry, ``BlockDiagonal`` those between derivatives of one component, each component its own,
    ``Isotropic`` the same, shared.
    """
    cov, d = np.asarray(cov), layout.size
    if isinstance(layout.factorisation, po.Dense):
        return cov
    rows = cov.shape[-1]
    full = np.zeros((rows * d, rows * d))
    for i in range(rows):
        for j in range(rows):
            for c in range(d):
                block = cov[c] if isinstance(layout.factorisation, po.BlockDiagonal) else cov
                full[i * d + c, j * d + c] = block[i, j]
    return full


def gram(factor):
    factor = np.asarray(factor)
    return np.swapaxes(factor, -1, -2) @ factor


def mean_shape(factorisation, rows):
    shapes = {po.Dense: (rows * D, 1), po.BlockDiagonal: (D, rows, 1), po.Isotropic: (rows, D)}
    return shapes[type(factorisation)]


@factorisations
@pytest.mark.parametrize("rows", [1, 2, N])
def test_pack_and_unpack_are_inverse(factorisation, rows):
    layout = layout_of(factorisation)
    derivatives = np.arange(1.0, rows * D + 1).reshape(rows, D)
    mean = layout.pack(jnp.asarray(derivatives))
    assert mean.shape == mean_shape(factorisation, rows)
    assert mean.shape[: mean.ndim - 2] == layout.batch_shape
    np.testing.assert_array_equal(layout.unpack(mean), derivatives)
    np.testing.assert_array_equal(layout.pack(layout.unpack(mean)), mean)


@factorisations
def test_the_state_and_its_mean_have_one_order(factorisation):
    # A covariance of rank one along the state: component and derivative must match the mean's entry for entry.
    layout = layout_of(factorisation)
    derivatives = np.arange(1.0, N * D + 1).reshape(N, D)
    mean = layout.pack(jnp.asarray(derivatives))
    if isinstance(factorisation, po.Isotropic):
        np.testing.assert_array_equal(layout.std(mean[None, :, 1]), np.broadcast_to(derivatives[:, 1:2], (N, D)))
    else:
        np.testing.assert_array_equal(layout.std(jnp.swapaxes(mean, -1, -2)), derivatives)


@factorisations
def test_standard_deviations_are_those_of_the_full_covariance(factorisation):
    layout = layout_of(factorisation)
    dim = mean_shape(factorisation, N)[-2]
    factor = np.random.default_rng(1).standard_normal((*layout.batch_shape, 5, dim))
    std = layout.std(jnp.asarray(factor))
    assert std.shape == (N, D)
    expected = np.sqrt(np.diagonal(written_out(layout, gram(factor)))).reshape(N, D)
    np.testing.assert_allclose(std, expected, rtol=1e-14)


@factorisations
def test_standard_deviation_of_nothing_has_no_derivative(factorisation):
    layout = layout_of(factorisation)
    zero = jnp.zeros_like(layout.lift(jnp.eye(N), 1.0))
    np.testing.assert_array_equal(layout.std(zero), 0)
    np.testing.assert_array_equal(jax.grad(lambda factor: jnp.sum(layout.std(factor)))(zero), 0)


@factorisations
def test_standard_deviation_of_what_is_not_a_number_is_none(factorisation):
    layout = layout_of(factorisation)
    broken = jnp.full_like(layout.lift(jnp.eye(N), 1.0), jnp.nan)
    assert not np.any(np.isfinite(layout.std(broken)))


@factorisations
def test_standard_deviations_in_single_precision_do_not_underflow(factorisation):
    # Innovations of short steps are of size dt^(nu - 1/2); their squares are below the smallest single.
    layout = layout_of(factorisation, dtype=jnp.float32)
    tiny = layout.lift(jnp.asarray(3e-25 * np.eye(N), jnp.float32), 1.0)
    assert tiny.dtype == jnp.float32
    np.testing.assert_allclose(layout.std(tiny), 3e-25, rtol=1e-5)


SCALES = {
    "scalar": (2.0, np.full(D, 2.0)),
    "array scalar": (jnp.asarray(2.0), np.full(D, 2.0)),
    "like u": ({"x": jnp.asarray([0.5, 2.0]), "y": jnp.asarray(4.0)}, np.asarray([0.5, 2.0, 4.0])),
}


@factorisations
@pytest.mark.parametrize("kind", SCALES)
def test_lift_is_a_kronecker_product_with_the_scales(factorisation, kind):
    scale, per_component = SCALES[kind]
    layout = layout_of(factorisation)
    root = np.triu(np.random.default_rng(2).standard_normal((N, N)))
    if kind == "like u" and isinstance(factorisation, po.Isotropic):
        with pytest.raises(ValueError, match="one output scale for all components"):
            layout.lift(jnp.asarray(root), scale)
        return
    lifted = np.asarray(layout.lift(jnp.asarray(root), scale))
    assert lifted.shape == (*layout.batch_shape, *(mean_shape(factorisation, N)[-2],) * 2)
    np.testing.assert_array_equal(np.tril(lifted, -1), 0)
    expected = np.kron(root.T @ root, np.diag(per_component**2))
    np.testing.assert_allclose(written_out(layout, gram(lifted)), expected, rtol=0, atol=1e-13)


@factorisations
def test_project_keeps_what_the_structure_can_hold(factorisation):
    layout = layout_of(factorisation)
    jacobian = np.random.default_rng(3).standard_normal((D, D))
    projected = np.asarray(layout.project(jnp.asarray(jacobian)))
    # Frobenius-nearest in the structure: itself, its diagonal, its mean diagonal.
    diagonal = np.diagonal(jacobian)
    expected = {po.Dense: jacobian, po.BlockDiagonal: np.diag(diagonal), po.Isotropic: diagonal.mean() * np.eye(D)}
    np.testing.assert_allclose(written_out(layout, projected), expected[type(factorisation)], rtol=1e-15)


@factorisations
def test_a_projected_jacobian_acts_on_packed_derivatives(factorisation):
    # For a Jacobian that every structure holds, H x in the layout is J u, packed.
    layout = layout_of(factorisation)
    u = np.random.default_rng(4).standard_normal((1, D))
    projected = layout.project(jnp.asarray(-3.0 * np.eye(D)))
    np.testing.assert_allclose(layout.unpack(projected @ layout.pack(jnp.asarray(u))), -3 * u, rtol=1e-15)
    np.testing.assert_array_equal(written_out(layout, layout.identity()), np.eye(D))
    np.testing.assert_array_equal(layout.identity() @ layout.pack(jnp.asarray(u)), layout.pack(jnp.asarray(u)))


@factorisations
def test_broadcast_repeats_for_every_batch_element(factorisation):
    layout = layout_of(factorisation)
    matrix = jnp.arange(6.0).reshape(2, 3)
    out = layout.broadcast(matrix)
    assert out.shape == (*layout.batch_shape, 2, 3)
    assert bool(jnp.all(out == matrix))


STATES = {
    "scalar": jnp.asarray(1.5),
    "vector": jnp.asarray([1.0, 2.0]),
    "matrix": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]),
    "dictionary": STATE,
    "nested": (jnp.asarray([1.0]), [jnp.asarray(2.0), {"a": jnp.asarray([[3.0, 4.0]])}]),
}


@factorisations
@pytest.mark.parametrize("kind", STATES)
def test_states_of_any_structure(factorisation, kind):
    state = STATES[kind]
    layout = layout_of(factorisation, state)
    flat = layout.ravel(state)
    assert flat.shape == (layout.size,)
    back = layout.unravel(layout.unpack(layout.pack(flat[None]))[0])
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@factorisations
def test_the_dtype_is_that_of_the_layout(factorisation):
    layout = layout_of(factorisation, STATE, dtype=jnp.float32)
    assert layout.ravel(STATE).dtype == jnp.float32
    assert layout.identity().dtype == jnp.float32
    assert layout.lift(jnp.ones((N, N), jnp.float32), jnp.asarray(2.0, jnp.float64)).dtype == jnp.float32


def test_component_wise_scales_of_the_wrong_size_are_refused():
    # Would otherwise be broadcast over the components.
    for factorisation in (po.Dense(), po.BlockDiagonal()):
        with pytest.raises((ValueError, TypeError)):
            layout_of(factorisation).lift(jnp.eye(N), jnp.asarray([1.0, 2.0]))


@factorisations
def test_factorisations_are_equal_by_value_and_can_be_static(factorisation):
    # Two equal solvers must not compile twice.
    again = type(factorisation)()
    assert jax.tree.structure(factorisation) == jax.tree.structure(again)
    assert jax.tree.leaves(factorisation) == []
