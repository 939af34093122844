"""One part of each kind, written outside the package, through the kit."""

from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import name
from .test_calibration import MaximumLikelihood
from .test_constraint import CubatureFilter
from .test_controller import Halving
from .test_factorisation import Grouped
from .test_prior import OrnsteinUhlenbeck
from .test_strategy import Interval


U0 = jnp.array([1.0, 0.4])


def field(t, u, args):
    return jnp.stack([-u[0] * u[1] + jnp.sin(t), u[0] - 0.5 * u[1]])


class MassMatrix(po.AbstractProblem):
    """``M u' = f(t, u, args)``."""

    matrix: jax.Array
    vector_field: Callable = eqx.field(static=True)
    order: int = eqx.field(static=True, default=1)

    def check(self, t0, values, args):
        jax.eval_shape(self.vector_field, t0, *values, args)

    def residual_of(self, t, us, args):
        return self.matrix.astype(us[0].dtype) @ us[1] - self.vector_field(t, us[0], args)

    def first_order(self, t, us, layout, args):
        def residual(us):
            return layout.ravel(self.residual_of(t, tuple(layout.unravel(u) for u in us), args))

        jacobians = jnp.moveaxis(jax.jacfwd(residual)(us[:2]), 1, 0)
        return po.Linearisation.general(layout, list(jacobians), residual(us[:2]))


class ReverseMode(po.AbstractJacobian):
    """All rows by reverse mode."""

    def evaluate(self, fn, t, us, layout, args):
        return fn(t, us), jnp.moveaxis(jax.jacrev(lambda us: fn(t, us))(us), 1, 0)


class Corners(po.AbstractCubature):
    """The corners of a cube: exact to degree three."""

    def rule(self, dim):
        points = np.stack(np.meshgrid(*[[-1.0, 1.0]] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
        return points, np.full(2**dim, 2.0**-dim)


class Cautious(po.AbstractErrorEstimate):
    """Twice the residual's estimate, in the largest norm."""

    norm: Callable = eqx.field(static=True, default=po.max_norm)

    def estimate(self, attempt, dt, layout):
        return 2 * po.ResidualError().estimate(attempt, dt, layout)


class Plain(po.AbstractLoop):
    """A while loop of XLA."""

    max_steps: int = eqx.field(static=True, default=256)

    def run(self, cond, body, init, *, buffers):
        return eqxi.while_loop(cond, body, init, max_steps=self.max_steps, buffers=buffers, kind="lax")


class Velocity(po.AbstractInitialisation):
    """One more derivative than the initial value has, from the equation; the others unknown."""

    scale: jax.Array = eqx.field(converter=jnp.asarray, default=10.0)

    def initialise(self, problem, t0, u0, layout, args):
        n, d = layout.num_derivatives + 1, layout.size
        known = jnp.concatenate([u0, po.flat_field(problem, layout, args)(t0, u0)[None]])
        mean = layout.pack(jnp.concatenate([known, jnp.zeros((n - len(known), d), layout.dtype)]))
        unknown = jnp.diag((jnp.arange(n) >= len(known)).astype(layout.dtype))
        return po.Normal(mean, layout.lift(self.scale.astype(layout.dtype) * unknown, 1.0))


HEARD = []


class Recorder(po.AbstractProgress):
    """Writes down what it is told."""

    marks: int = eqx.field(static=True, default=4)

    def report(self, fraction):
        HEARD.append(float(fraction))


MASS, ODE = jnp.array([[2.0, 0.5], [0.0, 1.0]]), po.ODE(field)
# A check, and a part: of every kind that a user may subclass.
KINDS = [
    (po.testing.check_prior, OrnsteinUhlenbeck(2, -1.5)),
    (lambda part: po.testing.check_problem(part, U0), MassMatrix(MASS, field)),
    (lambda part: po.testing.check_jacobian(part, field, U0), ReverseMode()),
    (lambda part: po.testing.check_constraint(part, U0), CubatureFilter(ODE)),
    (po.testing.check_cubature, Corners()),
    (po.testing.check_factorisation, Grouped(2)),
    (po.testing.check_strategy, Interval()),
    (po.testing.check_calibration, MaximumLikelihood()),
    (po.testing.check_error, Cautious()),
    (po.testing.check_controller, Halving()),
    (po.testing.check_loop, Plain()),
    (po.testing.check_initialisation, Velocity()),
    (po.testing.check_progress, Recorder()),
]
IN_EVERY_RUN = (ReverseMode, Corners, Halving, Recorder)


@pytest.mark.parametrize(
    ("check", "part"),
    [pytest.param(*case, marks=() if isinstance(case[1], IN_EVERY_RUN) else pytest.mark.thorough) for case in KINDS],
    ids=name,
)
def test_it_obeys_the_laws_of_its_kind(check, part):
    check(part)


def test_there_is_one_of_each_kind():
    kinds = {cls for _, part in KINDS for cls in type(part).__mro__ if cls.__name__.startswith("Abstract")}
    asked = {value for key, value in vars(po).items() if key.startswith("Abstract")}
    special = {po.AbstractPriorFamily, po.AbstractSplitPrior, po.AbstractLeaveOneOut, po.AbstractOwnAlgebra}
    coupled = {po.AbstractCoupledFactorisation, po.AbstractAdaptiveFactorisation}
    assert kinds == asked - special - coupled


@pytest.mark.thorough
def test_a_mass_matrix_is_what_its_inverse_makes_of_the_field():
    explicit = po.ODE(lambda t, u, args: jnp.linalg.solve(MASS, field(t, u, args)))
    parts = {"controller": po.IntegralController(1e-8, 1e-8), "loop": po.ForwardLoop(512)}
    own, given = (
        po.Solver(po.IWP(4), po.TS1(problem), **parts).solve(U0, 0.0, 2.0)
        for problem in (MassMatrix(MASS, field), explicit)
    )
    np.testing.assert_allclose(own.mean, given.mean, rtol=1e-7)


def test_it_hears_of_every_quarter():
    HEARD.clear()
    po.Solver(po.IWP(2), po.TS1(ODE)).solve(U0, 0.0, 1.0, progress=Recorder())
    jax.effects_barrier()
    assert HEARD == sorted(HEARD) and HEARD[-1] == 1 and len(HEARD) <= 4
