"""Output scales that are matrices: noise of the covariance ``F^T F``, for every prior that has noise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.algebra.factorisations import layout_of

from ..helpers import covariance, lotka_volterra, name


D, DT = 2, 0.4
RNG = np.random.default_rng(0)
F = RNG.standard_normal((D, D))
M = RNG.standard_normal((D, D)) + 2 * np.eye(D)
RATE = np.array([[-3.0, 1.0], [-2.0, -0.5]])
RATES = jnp.asarray([-1.0, -8.0])

# In the variables v = M u a drift L becomes M L M^-1, and a root F of the noise F M^T.
CHANGED = {
    "IWP": lambda change, scale: po.IWP(2, output_scale=scale),
    "IOUP": lambda change, scale: po.IOUP(2, change(RATE), output_scale=scale),
    "IOUP of a number": lambda change, scale: po.IOUP(2, -2.0, output_scale=scale),
    "Matern": lambda change, scale: po.Matern(2, 0.7, output_scale=scale),
    "LinearSDE": lambda change, scale: po.LinearSDE(1, (change(RATE), -0.5), output_scale=scale),
}
# With these, components differ but are not coupled.
UNCOUPLED = {
    "IWP": lambda scale: po.IWP(2, output_scale=scale),
    "IOUP": lambda scale: po.IOUP(2, RATES, output_scale=scale),
    "Matern": lambda scale: po.Matern(2, -RATES, output_scale=scale),
    "LinearSDE": lambda scale: po.LinearSDE(1, (RATES, -0.5), output_scale=scale),
}


def layout(prior, like=np.zeros(D), factorisation=po.Dense()):
    return layout_of(jax.tree.map(jnp.asarray, like), prior.num_derivatives, factorisation)


def moments(prior, **where):
    """``A`` and ``Q`` as they are in full."""
    moved = prior.transition(jnp.asarray(DT), layout(prior, **where))
    matrix, root = moved.matrix, moved.magnitude * moved.noise
    return jnp.kron(matrix, jnp.eye(root.shape[-1] // matrix.shape[-1])), root


@pytest.mark.parametrize("prior", CHANGED)
def test_a_change_of_variables(prior):
    make = CHANGED[prior]

    @jax.jit
    def both(scale, scale_v):
        return moments(make(lambda x: x, scale)), moments(make(lambda x: M @ x @ np.linalg.inv(M), scale_v))

    (a, root), (a_v, root_v) = both(F, F @ M.T)
    np.testing.assert_array_equal(np.tril(root, -1), 0)
    change = np.kron(np.eye(len(root) // D), M)
    np.testing.assert_allclose(a_v @ change, change @ a, rtol=0, atol=1e-13 * np.max(np.abs(a)))
    np.testing.assert_allclose(covariance(root_v), change @ covariance(root) @ change.T, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("prior", [po.IWP, po.RosenbrockIOUP], ids=name)
def test_a_change_of_variables_in_a_solve(prior):
    def f(t, u, scale_of_f):
        return scale_of_f @ lotka_volterra(t, jnp.linalg.solve(scale_of_f, u), None)

    @jax.jit
    def solve(change, scale):
        solver = po.Solver(prior(2, output_scale=scale), po.TS1(po.ODE(f)), calibration=po.NoCalibration())
        return solver.solve_grid(change @ np.array([20.0, 20.0]), np.linspace(0, 0.5, 6), args=change).marginals

    plain, changed = solve(np.eye(D), F), solve(M, F @ M.T)
    change = np.kron(np.eye(3), M)
    np.testing.assert_allclose(changed.mean, change @ plain.mean, rtol=1e-11)
    expected = change @ covariance(plain.factor[1:]) @ change.T
    std = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
    scales = std[:, :, None] * std[:, None, :] + 1e-30  # u' is certain
    np.testing.assert_allclose(covariance(changed.factor[1:]) / scales, expected / scales, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prior", UNCOUPLED)
def test_only_the_covariance_counts(prior):
    orthogonal = np.array([[0.6, 0.8], [0.8, -0.6]])

    @jax.jit
    def root(scale):
        return moments(UNCOUPLED[prior](scale))[1]

    expected = root(F)
    np.testing.assert_array_equal(np.tril(expected, -1), 0)
    for same in (orthogonal @ F, np.linalg.cholesky(F.T @ F).T):
        np.testing.assert_allclose(root(same), expected, rtol=1e-12, atol=1e-15)
    per_component = np.array([2.0, 0.5])
    np.testing.assert_allclose(root(np.diag(per_component)), root(per_component), rtol=1e-12, atol=1e-15)


def test_components_with_their_own_rates_share_their_noise():
    # x' = (u', r u') + (0, w): what a unit of w leaves after s is (g, g') = ((exp(r s) - 1) / r, exp(r s)).
    a, b = RATES[:, None], RATES[None, :]

    def grown(r):
        return np.expm1(r * DT) / r

    expected = np.empty((2, D, 2, D))
    expected[1, :, 1] = grown(a + b)
    expected[0, :, 1] = (grown(a + b) - grown(b)) / a
    expected[1, :, 0] = expected[0, :, 1].T
    expected[0, :, 0] = (grown(a + b) - grown(a) - grown(b) + DT) / (a * b)
    expected *= (F.T @ F)[:, None, :]
    _, root = jax.jit(lambda: moments(po.IOUP(1, RATES, output_scale=F)))()
    np.testing.assert_allclose(covariance(root), expected.reshape(2 * D, -1), rtol=1e-13)


def test_stationary_distributions():
    # (d/dt + l)^2 u = w: the response to a unit of w is s exp(-l s), its derivative (1 - l s) exp(-l s).
    def stationary(decay):
        prior = po.Matern(1, np.sqrt(3) / decay, output_scale=F)
        return covariance(prior.stationary(layout(prior)).factor).reshape(2, D, 2, D)

    for decay in (np.array([1.5, 90.0]), 1.5):
        a, b = np.broadcast_to(decay, D)[:, None], np.broadcast_to(decay, D)[None, :]
        expected = np.empty((2, D, 2, D))
        expected[0, :, 0] = 2 / (a + b) ** 3
        expected[1, :, 1] = 2 * a * b / (a + b) ** 3
        expected[0, :, 1] = (a - b) / (a + b) ** 3
        expected[1, :, 0] = expected[0, :, 1].T
        expected *= (F.T @ F)[:, None, :]
        np.testing.assert_allclose(jax.jit(stationary)(decay), expected, rtol=1e-12, atol=1e-14)


def test_shapes_like_u_are_components_and_others_are_matrices():
    scale = np.array([[1.0, 2.0], [2.0, 4.0]])  # of rank one as a matrix
    matrix = np.random.default_rng(1).standard_normal((4, 4))
    as_components, ravelled, as_matrix, of_trees = jax.jit(
        lambda: [
            moments(po.IWP(1, output_scale=x), like=like)[1]
            for x, like in [
                (scale, np.zeros((2, 2))),
                (scale.ravel(), np.zeros(4)),
                (matrix, np.zeros((2, 2))),
                (matrix, {"a": np.zeros(3), "b": 0.0}),
            ]
        ]
    )()
    np.testing.assert_array_equal(as_components, ravelled)
    np.testing.assert_array_equal(as_matrix, of_trees)
    q = covariance(jax.jit(lambda: moments(po.IWP(1), like=0.0)[1])())
    np.testing.assert_allclose(covariance(as_matrix), np.kron(q, matrix.T @ matrix), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("factorisation", [po.Dense(), po.BlockDiagonal()], ids=name)
def test_trees_of_components(factorisation):
    def roots(like, of):
        priors = po.IOUP(1, of([-1.0, -8.0, 0.5]), output_scale=of([2.0, 0.5, 3.0])), po.Matern(1, of([1.0, 2.0, 7.0]))
        where = layout(priors[0], like, factorisation)
        return [
            *(prior.transition(jnp.asarray(DT), where).noise for prior in priors),
            priors[1].stationary(where).factor,
        ]

    flat = jax.jit(lambda: roots(np.zeros(3), jnp.asarray))()
    trees = jax.jit(lambda: roots({"a": np.zeros(2), "b": 0.0}, lambda x: {"a": jnp.asarray(x[:2]), "b": x[2]}))()
    for a, b in zip(flat, trees, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("factorisation", [po.Dense(), po.BlockDiagonal(), po.Isotropic()], ids=name)
def test_of_one_component_a_matrix_is_a_number(factorisation):
    where = {"like": np.zeros(1), "factorisation": factorisation}
    number, matrix = jax.jit(
        lambda: [moments(po.IWP(1, output_scale=x), **where)[1] for x in (3.0, np.array([[3.0]]))]
    )()
    np.testing.assert_array_equal(matrix, number)


SINGULAR = np.array([[1.0, -1.0], [-1.0, 1.0]])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: po.IWP(2, output_scale=SINGULAR), r"IWP\(output_scale\).*full rank, got rank=1"),
        (lambda: po.Matern(2, 1.0, output_scale=0.0), r"Matern\(output_scale\).*positive"),
        (lambda: po.IOUP(2, 1.0, output_scale=np.zeros((2, 2))), r"IOUP\(output_scale\).*full rank, got rank=0"),
        (lambda: po.LinearSDE(1, (0, 0), output_scale=F * np.inf), r"LinearSDE\(output_scale\) must be finite"),
        (lambda: po.IWP(2, output_scale=-np.abs(F[:, :1])), r"IWP\(output_scale\) must be finite and positive"),
        (lambda: po.Matern(2, length_scale=F), r"Matern\(length_scale\) must be finite and positive"),
        (lambda: moments(po.IWP(2, output_scale=np.eye(3) - 2)), r"structure and shapes of u, or be a \(2, 2\) matrix"),
        (
            lambda: moments(po.IWP(2, output_scale=F), factorisation=po.BlockDiagonal()),
            r"output_scale is a matrix.*BlockDiagonal\(\).*Use Dense\(\), or pass a number or one number for each",
        ),
        (
            lambda: moments(po.IOUP(2, 1.0, output_scale=F), factorisation=po.Isotropic()),
            r"output_scale is a matrix.*Isotropic\(\).*Use Dense\(\), or pass a number\.",
        ),
    ],
)
def test_wrong_use(use, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        use()


def test_units_do_not_count_for_the_rank():
    po.IWP(2, output_scale=F * np.array([1e-20, 1e20]))


def test_what_is_traced_is_checked_when_it_runs():
    with pytest.raises((RuntimeError, ValueError), match="finite"):
        jax.block_until_ready(
            eqx.filter_jit(lambda x: po.IWP(2, output_scale=x).output_scale)(jnp.full((2, 2), np.nan))
        )
