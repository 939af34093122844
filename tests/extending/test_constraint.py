"""A constraint written outside the package: a cubature filter that takes no derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import lotka_volterra, relative


class CubatureFilter(po.AbstractConstraint):
    """The field regressed on ``2 d`` points of the predicted ``u`` (Arasaratnam & Haykin 2009), with ``Dense``."""

    problem: po.ODE

    def linearise(self, t, predicted, layout, args):
        field, d = po.flat_field(self.problem, layout, args), layout.size
        u, du = layout.unpack(predicted.mean)[:2]
        root = jnp.linalg.qr(predicted.factor[:, :d], mode="r")
        offsets = jnp.sqrt(d) * jnp.concatenate([root, -root])
        values = jax.vmap(lambda offset: field(t, (u + offset)[None]))(offsets)
        # Where nothing is uncertain, or not yet, there is nothing to regress on.
        slope = jnp.linalg.lstsq(offsets, values - values.mean(axis=0), rcond=1e-10)[0].T
        return po.Linearisation.explicit(layout, [slope], du - values.mean(axis=0))


U0, TIMES = jnp.array([20.0, 20.0]), np.linspace(0.0, 5.0, 6)


@pytest.mark.thorough
def test_it_agrees_with_the_exact_jacobian():
    def solve(constraint):
        controller, calibration = po.IntegralController(1e-5, 1e-6), po.DynamicCalibration(relinearise=True)
        parts = {"controller": controller, "calibration": calibration, "strategy": po.FixedPointSmoother()}
        return po.Solver(po.IWP(3), constraint, **parts).solve(U0, 0.0, 5.0, save_at=TIMES)

    own, ours = solve(CubatureFilter(po.ODE(lotka_volterra))), solve(po.SLR1(po.ODE(lotka_volterra)))
    assert relative(own.mean, ours.mean) < 1e-5
    # Without a spread in the first step there is no slope, so that the steps are not the same ones.
    np.testing.assert_allclose(own.std[1:], ours.std[1:], rtol=0.5)


@pytest.mark.thorough
def test_in_a_stack():
    prey_is_positive = po.Residual(lambda t, u, args: u[:1] * 0.0, order=0)
    stack = po.Stack(CubatureFilter(po.ODE(lotka_volterra)), po.Noisy(po.TS1(prey_is_positive), 1.0))
    solver = po.Solver(po.IWP(3), stack, calibration=po.DynamicCalibration(relinearise=True))
    alone = po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra))).solve(U0, 0.0, 1.0)
    assert relative(solver.solve(U0, 0.0, 1.0).mean, alone.mean) < 1e-3
