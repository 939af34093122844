"""Ways to find a Jacobian: exact ones agree with the matrix itself, estimates have the moments that they promise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.algebra.factorisations import layout_of

from ..helpers import FACTORISATIONS, name, relative


D = 70  # more than one group of components


def reaction_diffusion(t, u, args):
    """Tridiagonal, and neither symmetric nor constant."""
    left, right = jnp.pad(u, (1, 0))[:-1], jnp.pad(u, (0, 1))[1:]
    return args * (left - 2 * u + right) + jnp.sin(t + u) * right


def by_hand(t, u, args):
    right = jnp.pad(u, (0, 1))[1:]
    off = args + jnp.sin(t + u)
    return (
        jnp.diag(jnp.cos(t + u) * right - 2 * args) + jnp.diag(off[:-1], 1) + jnp.diag(args * jnp.ones(u.size - 1), -1)
    )


ROWS, COLUMNS = (np.concatenate(x) for x in zip(*[np.nonzero(np.eye(D, k=k)) for k in (0, 1, -1)], strict=True))
EXACT = {
    "given": by_hand,
    "banded": po.BandedJacobian(1, 1),
    "wider": po.BandedJacobian(2, 3),
    "sparse": po.SparseJacobian(ROWS, COLUMNS),
}
U = jnp.asarray(np.random.default_rng(0).normal(size=(2, D)))


def linearised(jacobian, factorisation, t=0.3):
    ode = po.ODE(reaction_diffusion, jacobian=jacobian)
    return eqx.filter_jit(ode.first_order)(jnp.asarray(t), U, layout_of(U[0], 1, factorisation), 5.0)


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_exact_ones_agree_with_the_matrix(factorisation):
    layout = layout_of(U[0], 1, factorisation)
    matrix = np.asarray(by_hand(0.3, U[0], 5.0))
    expected = {po.Dense: matrix, po.BlockDiagonal: np.diag(matrix)[:, None, None]}
    expected = expected.get(type(factorisation), np.mean(np.diag(matrix))[None, None])
    for jacobian in (po.ExactJacobian(), *EXACT.values()):
        equation = linearised(jacobian, factorisation)
        size = layout.identity().shape[-1]
        np.testing.assert_allclose(-equation.matrix[..., :size], expected, rtol=1e-13, atol=1e-13)
        residual = U[1] - reaction_diffusion(0.3, U[0], 5.0)
        np.testing.assert_allclose(layout.unpack(equation.residual)[0], residual, rtol=1e-13)


@pytest.mark.thorough
def test_columns_without_a_common_row_share_a_product():
    assert EXACT["sparse"].number == 3
    # the five-point stencil on a torus, whose bandwidth is its size
    n = 6
    index = np.arange(n * n).reshape(n, n)
    neighbours = [np.roll(index, shift, axis) for axis in (0, 1) for shift in (1, -1)]
    rows = np.tile(index.ravel(), 5)
    columns = np.concatenate([index.ravel(), *(x.ravel() for x in neighbours)])
    sparse = po.SparseJacobian(rows, columns)
    assert 5 <= sparse.number <= 10

    def laplacian(t, u, args):
        u = u.reshape(n, n)
        return (sum(jnp.roll(u, s, a) for a in (0, 1) for s in (1, -1)) - 4 * u).ravel() * jnp.exp(u).ravel()

    u = jnp.asarray(np.random.default_rng(1).normal(size=(2, n * n)))
    layout = layout_of(u[0], 1, po.Dense())
    for jacobian in (sparse, po.ExactJacobian()):
        matrix = po.ODE(laplacian, jacobian=jacobian).first_order(jnp.asarray(0.0), u, layout, None).matrix
        np.testing.assert_allclose(
            -matrix[:, : n * n], jax.jacobian(lambda u: laplacian(0.0, u, None))(u[0]), rtol=1e-13
        )


def test_given_for_trees_for_two_states_and_for_diagonals():
    u0 = ({"a": jnp.ones(2), "b": jnp.array([[3.0]])}, {"a": jnp.array([0.1, -0.2]), "b": jnp.array([[0.5]])})

    def field(t, u, du, args):
        return {"a": -u["a"] * u["b"][0] + du["a"] ** 2, "b": u["b"] * jnp.sum(du["a"]) - du["b"]}

    def jacobians(t, u, du, args):
        return tuple(jax.jacobian(field, argnums=i)(t, u, du, args) for i in (1, 2))

    us = jnp.asarray(np.random.default_rng(4).normal(size=(3, 3)))
    layout = layout_of(u0[0], 2, po.Dense())
    own, exact = (
        po.ODE(field, order=2, jacobian=jacobian).first_order(jnp.asarray(0.0), us, layout, None)
        for jacobian in (jacobians, po.ExactJacobian())
    )
    np.testing.assert_allclose(own.matrix, exact.matrix, rtol=1e-13)
    np.testing.assert_allclose(own.residual, exact.residual, rtol=1e-13)


@pytest.mark.parametrize("factorisation", FACTORISATIONS, ids=name)
def test_given_as_a_diagonal(factorisation):
    logistic = po.ODE(lambda t, u, args: u * (1 - u), jacobian=lambda t, u, args: 1 - 2 * u)
    layout = layout_of(U[0], 1, factorisation)
    own, exact = (
        ode.first_order(jnp.asarray(0.0), U, layout, None) for ode in (logistic, po.ODE(logistic.vector_field))
    )
    np.testing.assert_allclose(own.matrix, exact.matrix, rtol=1e-13)


def test_given_for_a_residual_with_fewer_equations():
    energy = po.Residual(lambda t, u, args: u @ u - 1.0, order=0, jacobian=lambda t, u, args: 2 * u)
    us = jnp.array([[0.6, 0.9]])
    layout = layout_of(us[0], 1, po.Dense())
    equation = energy.first_order(jnp.asarray(0.0), us, layout, None)
    np.testing.assert_allclose(equation.matrix, [[1.2, 1.8]])


def test_an_estimate_has_the_moments_that_it_promises():
    u, d = U[:, :6], 6
    rng = np.random.default_rng(2)
    matrix = jnp.asarray(rng.normal(size=(d, d)))
    layout = layout_of(u[0], 1, po.BlockDiagonal())

    def estimate(key, t=0.0, matrix=matrix):
        ode = po.ODE(lambda t, u, args: matrix @ u, jacobian=po.HutchinsonDiagonal(key, 4))
        return -ode.first_order(jnp.asarray(t), u, layout, None).matrix[:, 0, 0]

    number = 20_000
    draws = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), number)))
    variance = (np.sum(np.asarray(matrix) ** 2, axis=1) - np.diag(matrix) ** 2) / 4
    assert np.all(np.abs(draws.mean(axis=0) - np.diag(matrix)) < 5 * np.sqrt(variance / number))
    # sums of signs: kurtosis at most three
    assert np.all(np.abs(draws.var(axis=0) / variance - 1) < 5 * np.sqrt(2 / number))
    # the same time has the same probes, another time has others; a diagonal is found exactly
    key = jax.random.key(1)
    np.testing.assert_array_equal(estimate(key), estimate(key))
    assert np.max(np.abs(estimate(key, 0.0) - estimate(key, 1e-12))) > 1e-3
    np.testing.assert_allclose(estimate(key, matrix=jnp.diag(u[0])), u[0], rtol=1e-14)


@pytest.mark.thorough
def test_estimates_solve():
    parts = {"factorisation": po.Isotropic(), "controller": po.IntegralController(1e-5, 1e-7)}
    u0 = jnp.asarray(np.sin(np.linspace(0, np.pi, D + 2)[1:-1]))
    solutions = []
    for jacobian in (po.ExactJacobian(), po.HutchinsonDiagonal(jax.random.PRNGKey(3), 3)):
        solver = po.Solver(po.IWP(3), po.TS1(po.ODE(reaction_diffusion, jacobian=jacobian)), **parts)
        solutions.append(solver.solve(u0, 0.0, 0.5, args=5.0).mean[-1])
    assert relative(solutions[1], solutions[0]) < 1e-3


def test_a_pattern_makes_large_diagonals_cheap_and_is_differentiable():
    d = 20_000  # the matrix would have 3 GB
    ode = po.ODE(reaction_diffusion, jacobian=po.BandedJacobian(1, 1))
    layout = layout_of(jnp.zeros(d), 1, po.BlockDiagonal())
    us = jnp.stack([jnp.sin(jnp.linspace(0, 3, d)), jnp.ones(d)])

    @jax.jit
    def size(rate):
        equation = ode.first_order(jnp.asarray(0.3), us, layout, rate)
        return jnp.mean(equation.matrix**2) + jnp.mean(equation.residual**2)

    h = 1e-4
    np.testing.assert_allclose(jax.grad(size)(2.0), (size(2.0 + h) - size(2.0 - h)) / (2 * h), rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: po.ODE(reaction_diffusion, jacobian=3.0), TypeError, "callable"),
        (lambda: po.ODE(reaction_diffusion, jacobian=po.ExactJacobian), TypeError, "instance"),
        (lambda: po.BandedJacobian(-1, 0), ValueError, "lower"),
        (lambda: po.SparseJacobian([0.5], [1]), ValueError, "integer"),
        (lambda: po.SparseJacobian([0], [-1]), ValueError, "from 0"),
        (lambda: po.HutchinsonDiagonal(jax.random.key(0), 0), ValueError, "num_probes"),
        (lambda: linearised(po.HutchinsonDiagonal(jax.random.key(0)), po.Dense()), ValueError, "BlockDiagonal"),
        (lambda: linearised(po.SparseJacobian([0], [D]), po.Dense()), ValueError, "components"),
        (lambda: linearised(lambda t, u, args: jnp.ones((3, D)), po.Dense()), ValueError, r"\(70, 70\)"),
        (lambda: linearised(lambda t, u, args: (u, u), po.Dense()), ValueError, r"\(70, 70\)"),
    ],
)
def test_wrong_use(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_equations_that_are_not_square():
    energy = po.Residual(lambda t, u, args: u @ u - 1.0, order=0, jacobian=po.BandedJacobian(1, 1))
    with pytest.raises(ValueError, match="as many equations as components"):
        energy.first_order(jnp.asarray(0.0), U[:1], layout_of(U[0], 1, po.Dense()), None)
