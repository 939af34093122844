"""A factorisation written outside the package: groups of components that know of each other."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import first_of, lotka_volterra, name, relative


class Grouped(po.AbstractFactorisation):
    """Blocks of ``size`` neighbouring components: between ``BlockDiagonal`` (1) and ``Dense`` (d)."""

    size: int = eqx.field(static=True)

    def batch_shape(self, d):
        return (d // self.size,)

    def pack(self, derivatives):
        m, d = derivatives.shape
        return derivatives.reshape(m, -1, self.size).swapaxes(0, 1).reshape(d // self.size, m * self.size, 1)

    def unpack(self, mean, d):
        return self.unpack_std(mean[..., 0], d)

    def unpack_std(self, std, d):
        return std.reshape(d // self.size, -1, self.size).swapaxes(0, 1).reshape(-1, d)

    def lift(self, matrix, scale, d):
        scales = jnp.broadcast_to(scale, (d,)).reshape(-1, self.size)
        return jnp.stack([jnp.kron(matrix, jnp.diag(s)) for s in scales])

    def project(self, jacobian):
        d, g = jacobian.shape[0], self.size
        return jnp.stack([jacobian[i : i + g, i : i + g] for i in range(0, d, g)])


def twice(t, u, args):
    """Two uncoupled pairs, one faster than the other."""
    return jnp.concatenate([lotka_volterra(t, u[:2], None), 2 * lotka_volterra(t, u[2:], None)])


U0 = jnp.array([20.0, 20.0, 10.0, 5.0])


def solve(factorisation, constraint=po.TS1, strategy=po.Filter(), **parts):
    ode = po.ODE(twice)
    return po.Solver(po.IWP(3), constraint(ode), factorisation=factorisation, strategy=strategy, **parts)


@pytest.mark.parametrize("strategy", first_of(po.FixedIntervalSmoother(), po.Filter()), ids=name)
@pytest.mark.parametrize(("size", "known"), first_of((2, po.Dense()), (1, po.BlockDiagonal()), (4, po.Dense())))
def test_groups_are_what_lies_between(size, known, strategy):
    grid = np.linspace(0.0, 1.0, 11)
    parts = {"strategy": strategy, "calibration": po.NoCalibration()}
    own, ours = (solve(f, **parts).solve_grid(U0, grid) for f in (Grouped(size), known))
    assert relative(own.mean, ours.mean) < 1e-12 and relative(own.std, ours.std) < 1e-10
    np.testing.assert_allclose(own.log_likelihood, ours.log_likelihood, rtol=1e-10)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("constraint", "strategy"),
    first_of((po.SLR1, po.FixedPointSmoother()), (po.TS1, po.FixedIntervalSmoother()), (po.TS0, po.Filter())),
    ids=name,
)
def test_it_works_with_everything_else(constraint, strategy):
    times = np.linspace(0.0, 2.0, 5)
    own = solve(Grouped(2), constraint, strategy, error=po.StateError())
    solution = own.solve(U0, 0.0, 2.0, save_at=times)
    assert solution.output_scale.shape == (5, 2)
    # SciPy's DOP853 at 1e-12
    assert relative(solution.mean[-1], [4.96242602, 22.09571111, 16.45463759, 13.33550982]) < 1e-2
