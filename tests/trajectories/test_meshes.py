"""Between two nodes: Hermite's polynomial is the mean of the prior given both, and its noise that of the prior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probode.trajectories.meshes import inside
from probode.trajectories.path import bridge
from tests.oracles import iwp


@given(share=st.floats(0, 1), dt=st.sampled_from([0.3, -2.0, 1e-3]), seed=st.integers(0, 100))
def test_polynomials_of_the_degree_of_hermites_are_exact(share, dt, seed):
    n, t0 = 4, 0.2
    polynomial = np.polynomial.Polynomial(np.random.default_rng(seed).normal(size=2 * n))

    def state(t):
        return jnp.asarray([[polynomial.deriv(i)(t) if i else polynomial(t)] for i in range(n)])

    got = inside(state(t0), state(t0 + dt), jnp.asarray(dt), jnp.asarray(share))
    sizes = np.asarray([[abs(dt) ** -i] for i in range(n)])
    np.testing.assert_allclose(got, state(t0 + share * dt), atol=2e-11 * sizes.max() * 10, rtol=1e-9)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_the_bridge_is_the_prior_given_both_ends(share):
    """Against the joint Gaussian of the two later states given the first, by plain NumPy."""
    n = 3
    (a, here), (b, step), (whole, _) = (map(np.asarray, iwp(n - 1, dt)) for dt in (share, 1 - share, 1.0))
    end = b @ here @ b.T + step
    gain = here @ b.T @ np.linalg.inv(end)
    got = jax.jit(bridge, static_argnums=1)(jnp.asarray(share), n)
    np.testing.assert_allclose(got.after, gain, atol=1e-10)
    np.testing.assert_allclose(got.before, a - gain @ whole, atol=1e-10)
    np.testing.assert_allclose(got.root.T @ got.root, here - gain @ b @ here, atol=1e-13)
    states = np.random.default_rng(0).normal(size=(2, n, 1))
    mean = inside(*jnp.asarray(states), jnp.ones(()), jnp.asarray(share))
    np.testing.assert_allclose(mean, got.before @ states[0] + got.after @ states[1], atol=1e-10)
