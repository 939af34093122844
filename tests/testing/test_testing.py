"""The kit for subclassers: parts of the package pass, and broken ones are told which law they break."""

import dataclasses
import pathlib
import re
import sys

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import probode as po
from probode import testing
from probode.algebra.linearisation import Linearisation
from probode.algebra.normal import Normal
from probode.algebra.transition import Transition
from probode.testing.laws import equal

from ..extending.test_calibration import MaximumLikelihood
from ..extending.test_controller import Constant
from ..extending.test_factorisation import Grouped
from ..helpers import name


def field(t, u, args):
    return jnp.stack([-u[0] * u[1] + jnp.sin(t), u[0] - 0.5 * u[1]])


ODE, U0 = po.ODE(field), jnp.array([1.0, 0.4])


@pytest.mark.parametrize(
    ("check", "part"),
    [
        pytest.param(testing.check_prior, po.IWP(3), marks=pytest.mark.thorough),
        (testing.check_prior, po.IWP(1, output_scale=jnp.array([1.0, 2.0]))),
        pytest.param(testing.check_factorisation, Grouped(2), marks=pytest.mark.thorough),
        pytest.param(testing.check_factorisation, po.Isotropic(), marks=pytest.mark.thorough),
        pytest.param(testing.check_factorisation, po.Blocks([[0, 1], [2, 3]]), marks=pytest.mark.thorough),
        pytest.param(testing.check_factorisation, po.Modal(), marks=pytest.mark.thorough),
        pytest.param(testing.check_calibration, po.LeaveOneOutCalibration(), marks=pytest.mark.thorough),
        pytest.param(
            lambda part: testing.check_calibration(part, differentiable=False),
            po.MLECalibration(stop_gradient=True),
            marks=pytest.mark.thorough,
        ),
        pytest.param(lambda part: testing.check_constraint(part, U0), po.TS0(ODE), marks=pytest.mark.thorough),
        pytest.param(
            lambda part: testing.check_constraint(part, U0), po.TS0(ODE.lifted(2)), marks=pytest.mark.thorough
        ),
        pytest.param(lambda part: testing.check_problem(part, U0), ODE.lifted(2), marks=pytest.mark.thorough),
        pytest.param(
            lambda part: testing.check_constraint(part, U0, first_order=True),
            po.TS1(po.Residual(lambda t, u, du, args: du - field(t, u, args))),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            lambda part: testing.check_constraint(part, (U0, 2 * U0)),
            po.Stack(
                po.TS1(po.Residual(lambda t, u, du, _: u @ u + du @ du - 5 * U0 @ U0, order=1)),
                po.TS1(po.ODE(lambda t, u, du, _: -u, order=2)),
            ),
            marks=pytest.mark.thorough,
        ),
        pytest.param(testing.check_strategy, po.FixedIntervalSmoother(), marks=pytest.mark.thorough),
        pytest.param(testing.check_calibration, MaximumLikelihood(), marks=pytest.mark.thorough),
        pytest.param(testing.check_calibration, po.DynamicCalibration(memory=0.5), marks=pytest.mark.thorough),
        pytest.param(testing.check_error, po.ResidualError(), marks=pytest.mark.thorough),
        pytest.param(testing.check_error, po.StateError(), marks=pytest.mark.thorough),
        pytest.param(testing.check_error, po.LocalError(), marks=pytest.mark.thorough),
        pytest.param(lambda part: testing.check_constraint(part, U0), po.SLR0(ODE), marks=pytest.mark.thorough),
        pytest.param(
            lambda part: testing.check_constraint(part, U0), po.Noisy(po.TS0(ODE), 0.1), marks=pytest.mark.thorough
        ),
        pytest.param(testing.check_controller, po.PIController(), marks=pytest.mark.thorough),
        (testing.check_loop, po.BoundedLoop(50)),
        (testing.check_loop, po.CheckpointedLoop(50)),
        (testing.check_loop, po.ForwardLoop(3)),
        pytest.param(testing.check_initialisation, po.Diffuse(2, scale=10.0), marks=pytest.mark.thorough),
        (testing.check_cubature, po.SphericalCubature()),
        (testing.check_cubature, po.UnscentedTransform()),
        (testing.check_cubature, po.GaussHermite(3)),
        (lambda part: testing.check_jacobian(part, field, U0), po.ExactJacobian()),
        (lambda part: testing.check_jacobian(part, field, U0), po.BandedJacobian(1, 1)),
        (
            lambda part: testing.check_jacobian(part, lambda t, u, du, args: field(t, u, args) * du, (U0, U0)),
            po.ExactJacobian(),
        ),
    ],
    ids=name,
)
def test_parts_of_the_package_pass(check, part):
    check(part)


@pytest.mark.thorough
def test_a_solver_passes():
    solver = po.Solver(po.IWP(2), po.TS1(ODE), controller=po.IntegralController(1e-4, 1e-4), loop=po.BoundedLoop(64))
    testing.check_solver(solver, U0, 0.0, 1.0)


class WrongPower(po.AbstractPrior):
    num_derivatives: int = eqx.field(static=True, default=2)

    def transition(self, dt, layout):
        right = po.IWP(2).transition(dt, layout)
        return Transition(right.matrix, right.noise * jnp.sqrt(jnp.abs(dt)), right.magnitude)


class NoZeroStep(WrongPower):
    def transition(self, dt, layout):
        right = po.IWP(2).transition(dt, layout)
        return Transition(right.matrix * dt / dt, right.noise, right.magnitude)


class ForgetsDtype(WrongPower):
    def transition(self, dt, layout):
        wide = dataclasses.replace(layout, dtype=jnp.dtype(float))
        return po.IWP(2).transition(jnp.asarray(dt, float), wide)


class NoDerivatives(WrongPower):
    def transition(self, dt, layout):
        right = po.IWP(2).transition(dt, layout)
        decay = jnp.exp(-dt) * jnp.eye(3, dtype=layout.dtype)
        noise = layout.lift(jnp.sqrt((1 - jnp.exp(-2 * dt)) / 2) * jnp.eye(3, dtype=layout.dtype), 1.0)
        return Transition(layout.broadcast(decay), noise, jnp.ones_like(right.magnitude))


class SameNoiseBackwards(WrongPower):
    def transition(self, dt, layout):
        right, ahead = po.IWP(2).transition(dt, layout), po.IWP(2).transition(jnp.abs(dt), layout)
        return Transition(right.matrix, ahead.noise, ahead.magnitude)


class Retraces(WrongPower):
    rate: float = 1.5

    def transition(self, dt, layout):
        return po.IWP(2, output_scale=self.rate).transition(dt, layout)


class VanLoan(po.AbstractPrior):
    """The noise by a matrix exponential and a Cholesky factor, which is a lower triangle unless it is transposed."""

    rate: jax.Array = eqx.field(converter=jnp.asarray, default=-1.5)
    transposed: bool = eqx.field(static=True, default=True)
    num_derivatives: int = eqx.field(static=True, default=3)

    def transition(self, dt, layout):
        drift = jnp.eye(4, k=1, dtype=dt.dtype).at[-1, -1].set(self.rate.astype(dt.dtype))
        noise = jnp.zeros((4, 4), dt.dtype).at[-1, -1].set(1.0)
        block = jax.scipy.linalg.expm(dt * jnp.block([[-drift, noise], [jnp.zeros_like(noise), drift.T]]))
        matrix = block[4:, 4:].T
        root = jnp.linalg.cholesky(jnp.sign(dt) * matrix @ block[:4, 4:])
        root = root.T if self.transposed else root
        return Transition(layout.broadcast(matrix), layout.lift(root, 1.0), jnp.ones_like(dt))


class OtherDrift(WrongPower):
    """The noise of a damped process beside the matrix of another one."""

    def transition(self, dt, layout):
        own = po.linear_transition((-3.0,), dt, layout)
        return Transition(own.matrix, po.linear_transition((-1.5,), dt, layout).noise, own.magnitude)


class Cancels(WrongPower):
    """The right noise up to round-off of a closed formula."""

    def transition(self, dt, layout):
        own = po.IWP(2).transition(dt, layout)
        return Transition(own.matrix, own.noise * (1 + 1e-7 * jnp.cos(1e3 * dt)), own.magnitude)


class IsNaNInOneStep(WrongPower):
    """The noise by the root of a difference that round-off makes negative in one of the steps of the checks."""

    def transition(self, dt, layout):
        right = po.IWP(2).transition(dt, layout)
        return Transition(right.matrix, jnp.where(jnp.abs(dt - 2e-3) < 1e-9, jnp.nan, right.noise), right.magnitude)


class TurnedDrift(WrongPower):
    def transition(self, dt, layout):
        right = po.IWP(2).transition(dt, layout)
        return Transition(jnp.swapaxes(right.matrix, -1, -2), right.noise, right.magnitude)


class NoLift(WrongPower):
    def transition(self, dt, layout):
        root = po.IWP(2).transition(dt, layout).noise
        return Transition(jnp.eye(3), root[..., :3, :3], jnp.ones_like(dt))


class LosesOrder(Grouped):
    def unpack(self, mean, d):
        return mean[..., 0].reshape(-1, d)


class IgnoresScale(Grouped):
    def lift(self, matrix, scale, d):
        return super().lift(matrix, 1.0, d)


class IgnoresJacobian(Grouped):
    def project(self, jacobian):
        return 0 * super().project(jacobian)


class TurnsJacobian(Grouped):
    def project(self, jacobian):
        return super().project(jacobian.T)


class MeanOfScales(Grouped):
    def lift(self, matrix, scale, d):
        return super().lift(matrix, jnp.mean(jnp.broadcast_to(scale, (d,))), d)


class StdsTurnedRound(Grouped):
    def unpack(self, mean, d):
        return super().unpack_std(mean[..., 0], d)

    def unpack_std(self, std, d):
        return super().unpack_std(std, d)[:, ::-1]


class SaysItIsPolynomial(WrongPower):
    is_polynomial = True

    def transition(self, dt, layout):
        return po.linear_transition((-5.0,), dt, layout)


class ForShortSteps(WrongPower):
    def transition(self, dt, layout):
        right = po.IWP(2).transition(dt, layout)
        return Transition(right.matrix, jnp.where(jnp.abs(dt) > 2, jnp.nan, right.noise), right.magnitude)


class FrozenInTime(po.AbstractConstraint):
    problem: po.ODE = ODE

    def linearise(self, t, predicted, layout, args):
        return po.TS1(self.problem).linearise(0 * t, predicted, layout, args)


class FalsePromise(FrozenInTime):
    def linearise(self, t, predicted, layout, args):
        right = po.TS1(self.problem).linearise(t, predicted, layout, args)
        return Linearisation(2 * right.matrix, right.residual, range(1, 2))


class WrongJacobian(FrozenInTime):
    def linearise(self, t, predicted, layout, args):
        right = po.TS1(self.problem).linearise(t, predicted, layout, args)
        return Linearisation(right.matrix.at[..., :2].multiply(-1), right.residual, range(1, 2))


class Transposed(FrozenInTime):
    """The Jacobian the wrong way round, in a constraint that need not have the exact one."""

    def linearise(self, t, predicted, layout, args):
        field, us = po.flat_field(self.problem, layout, args), layout.unpack(predicted.mean)
        jacobian = jax.jacfwd(lambda u: field(t, u[None]))(us[0])
        return Linearisation.explicit(layout, [jacobian.T], us[1] - field(t, us[:1]))


class SaysItIsFrozen(FrozenInTime):
    first_order = False

    def linearise(self, t, predicted, layout, args):
        return po.TS1(self.problem).linearise(t, predicted, layout, args)


class TransposedAndFrozen(Transposed):
    first_order = False


class SaysItIsFirstOrder(FrozenInTime):
    def linearise(self, t, predicted, layout, args):
        return po.TS0(self.problem).linearise(t, predicted, layout, args)


class HalfAndWhole(FrozenInTime):
    def linearise(self, t, predicted, layout, args):
        field, us = po.flat_field(self.problem, layout, args), layout.unpack(predicted.mean)
        jacobian = jax.jacfwd(lambda u: field(t, u[None]))(us[0])
        return Linearisation.explicit(layout, [jacobian / 2], us[1] - field(t, us[:1]))


class SaysItIsPointwise(FrozenInTime):
    is_pointwise = True

    def linearise(self, t, predicted, layout, args):
        return po.SLR1(self.problem).linearise(t, predicted, layout, args)


class WrongSign(FrozenInTime):
    def linearise(self, t, predicted, layout, args):
        right = po.TS1(self.problem).linearise(t, predicted, layout, args)
        return Linearisation(right.matrix.at[..., :2].multiply(-1), right.residual, range(1, 2))


class Unpacked(FrozenInTime):
    def linearise(self, t, predicted, layout, args):
        right = po.TS1(self.problem).linearise(t, predicted, layout, args)
        return Linearisation(right.matrix, layout.unpack(right.residual), range(1, 2))


class Unravelled(FrozenInTime):
    def linearise(self, t, predicted, layout, args):
        us = layout.unpack(predicted.mean)
        return Linearisation.explicit(layout, [None], {"x": us[1, 0], "y": us[1, 1]})


class Forgets(po.AbstractStrategy):
    keeps_steps = True

    def remember(self, kept):
        return jax.tree.map(jnp.zeros_like, po.FixedIntervalSmoother().remember(kept))


class ReturnsTheState(po.AbstractStrategy):
    keeps_steps = True

    def remember(self, kept):
        return kept


class Negative(po.AbstractCalibration):
    def init(self, shape, dtype):
        return jnp.zeros(shape, dtype)

    def scale(self, innovation, statistics):
        return -innovation.scale

    def update(self, statistics, scale, whitened, informative):
        return statistics

    def finalise(self, statistics):
        return None


class CountsEverything(Negative):
    def scale(self, innovation, statistics):
        return innovation.unit

    def update(self, statistics, scale, whitened, informative):
        return statistics + jnp.mean(whitened**2, axis=(-2, -1))

    def finalise(self, statistics):
        return jnp.sqrt(statistics)


class OneForAll(Negative):
    def scale(self, innovation, statistics):
        return jnp.max(innovation.scale)


class Uncalibrated(Negative):
    def scale(self, innovation, statistics):
        return innovation.unit


class Variance(Negative):
    """That of the residuals, at every step; which is not told from a scale where ``u`` is of size one."""

    def scale(self, innovation, statistics):
        # As large for every scale of the prior, so that other laws hold.
        return innovation.scale**2 / innovation.unit


class SaysItIsLocal(MaximumLikelihood):
    is_local = True


class HidesItsMemory(Negative):
    """The larger of the scale of this step and that of the last one."""

    is_local = True

    def scale(self, innovation, statistics):
        return jnp.maximum(innovation.scale, 2 * statistics * innovation.unit)

    def update(self, statistics, scale, whitened, informative):
        return jnp.where(informative, scale, statistics)


class CountsWhatWeighsNothing(po.AbstractLeaveOneOut):
    is_local = True

    def init(self, shape, dtype):
        return jnp.ones(shape, dtype)

    def scale(self, innovation, statistics):
        return innovation.scale

    def update(self, statistics, scale, whitened, informative):
        return statistics

    def leave_one_out(self, statistics, squares, weights):
        return jnp.mean(squares, axis=0)

    def finalise(self, statistics):
        return jnp.sqrt(statistics)


class TotalVariance(MaximumLikelihood):
    def finalise(self, statistics):
        total, count = statistics
        return total / count


class SumOfSquares(po.AbstractErrorEstimate):
    norm: object = eqx.field(static=True, default=lambda x: jnp.sum(x**2))

    def estimate(self, attempt, dt, layout):
        return po.ResidualError().estimate(attempt, dt, layout)


class NeverSmaller(SumOfSquares):
    norm: object = eqx.field(static=True, default=lambda x: jnp.max(jnp.abs(x)))

    def estimate(self, attempt, dt, layout):
        return super().estimate(attempt, dt, layout) / dt**4


class InUnitsOfTheDerivative(po.AbstractErrorEstimate):
    """The residual's standard deviation, not multiplied by the step."""

    norm: object = eqx.field(static=True, default=po.rms_norm)

    def estimate(self, attempt, dt, layout):
        return po.ResidualError().estimate(attempt, dt, layout) / jnp.abs(dt)


class AsksForRemainders(po.AbstractErrorEstimate):
    """Does not ask whether there is one."""

    norm: object = eqx.field(static=True, default=po.rms_norm)
    needs_defects = True

    def estimate(self, attempt, dt, layout):
        return po.ResidualError().estimate(attempt, dt, layout) + 0 * jnp.sum(attempt.innovation.remainder)


class DividesByZero(Constant):
    def propose(self, dt, error_norm, order, state):
        return error_norm <= 1, jnp.minimum(dt * error_norm ** (-1 / order), 10 * dt) * (error_norm / error_norm), None


class Branches(po.AbstractController):
    tolerances: po.Tolerances = eqx.field(default_factory=po.Tolerances)
    limits: po.Limits = eqx.field(default_factory=po.Limits)

    def init(self, dtype):
        return None

    def propose(self, dt, error_norm, order, state):
        if error_norm <= 1:
            return True, dt * jnp.clip(error_norm ** (-1 / order), 1, 5), None
        return False, dt / 2, None


class Threshold(po.AbstractController):
    tolerances: po.Tolerances
    limits: po.Limits
    most: float = eqx.field(static=True)
    shorter: float = eqx.field(static=True)

    def __init__(self, most, shorter=0.5):
        self.most, self.shorter, self.tolerances, self.limits = most, shorter, po.Tolerances(), po.Limits()

    def init(self, dtype):
        return None

    def propose(self, dt, error_norm, order, state):
        good = error_norm <= self.most
        return good, jnp.where(good, dt, dt * self.shorter), None


class OneTooMany(po.AbstractLoop):
    max_steps: int = eqx.field(static=True, default=20)

    def run(self, cond, body, init, *, buffers):
        return po.ForwardLoop(self.max_steps + 1).run(cond, body, init, buffers=buffers)


class AtLeastOnce(OneTooMany):
    def run(self, cond, body, init, *, buffers):
        first = lambda carry: cond(carry) | (carry[0] == 0)  # noqa: E731
        return po.ForwardLoop(self.max_steps).run(first, body, init, buffers=buffers)


class LanesGoOn(OneTooMany):
    def run(self, cond, body, init, *, buffers):
        def running(state):
            return eqxi.unvmap_any(cond(state[0])) & (state[1] < self.max_steps)

        def go_on(state):
            return body(state[0]), state[1] + 1

        kept = lambda state: buffers(state[0])  # noqa: E731
        return eqxi.while_loop(running, go_on, (init, 0), kind="lax", buffers=kept)[0]


class KeepsNothing(OneTooMany):
    checkpoints = 0

    def run(self, cond, body, init, *, buffers):
        return po.ForwardLoop(self.max_steps).run(cond, body, init, buffers=buffers)


class Endless(OneTooMany):
    max_steps: int = eqx.field(static=True, default=4096)

    def run(self, cond, body, init, *, buffers):
        running = lambda state: cond(state) & (state[0] < 10**5)  # noqa: E731
        return eqxi.while_loop(running, body, init, kind="lax", buffers=buffers)


class WithoutBuffers(OneTooMany):
    def run(self, cond, body, init, *, buffers):
        return jax.lax.while_loop(cond, body, init)


class TooSure(po.AbstractInitialisation):
    def initialise(self, problem, t0, u0, layout, args):
        right = po.TaylorMode().initialise(problem, t0, u0, layout, args)
        unknown = jnp.diag(1e-9 * (jnp.arange(layout.num_derivatives + 1) >= 2))
        mean = layout.pack(layout.unpack(right.mean).at[2:].add(1.0))
        return Normal(mean, layout.lift(unknown.astype(layout.dtype), 1.0))


class LosesVelocity(po.AbstractInitialisation):
    def initialise(self, problem, t0, u0, layout, args):
        n = layout.num_derivatives + 1
        unknown = jnp.diag(10.0 * (jnp.arange(n) >= 1))
        mean = layout.pack(jnp.concatenate([u0[:1], jnp.zeros((n - 1, layout.size), layout.dtype)]))
        return Normal(mean, layout.lift(unknown.astype(layout.dtype), 1.0))


class TooManyRows(po.AbstractInitialisation):
    def initialise(self, problem, t0, u0, layout, args):
        right = po.Diffuse(1).initialise(problem, t0, u0, layout, args)
        return Normal(right.mean, jnp.concatenate([right.factor, 0 * right.factor], axis=-2))


class StartsAtZero(po.AbstractInitialisation):
    def initialise(self, problem, t0, u0, layout, args):
        return po.TaylorMode().initialise(problem, 0 * t0, u0, layout, args)


class Guesses(po.AbstractInitialisation):
    def initialise(self, problem, t0, u0, layout, args):
        right = po.TaylorMode().initialise(problem, t0, u0, layout, args)
        return Normal(right.mean + 0.1, right.factor)


class TooWide(po.AbstractCubature):
    def rule(self, dim):
        points, weights = po.SphericalCubature().rule(dim)
        return 1.1 * points, weights


class UpToThree(po.AbstractCubature):
    def rule(self, dim):
        return po.SphericalCubature().rule(min(dim, 3))


class OfValuesAlone(po.AbstractJacobian):
    def evaluate(self, fn, t, us, layout, args):
        value, jacobians = po.ExactJacobian().evaluate(fn, t, us, layout, args)
        return value, jacobians.at[1:].set(0)


class TurnsOver(po.AbstractJacobian):
    def evaluate(self, fn, t, us, layout, args):
        value, jacobian = po.ExactJacobian().evaluate(fn, t, us, layout, args)
        return value, jnp.swapaxes(jacobian, -1, -2)


@pytest.mark.parametrize(
    ("check", "part", "law"),
    [
        (testing.check_prior, WrongPower(), "Chapman-Kolmogorov"),
        (testing.check_prior, NoZeroStep(), "step of length zero"),
        (testing.check_prior, ForgetsDtype(), "dtype of the state.*Found: float64 instead of float32"),
        (testing.check_prior, NoDerivatives(), r"derivative of u\^\(i\) is u\^\(i\+1\)"),
        (testing.check_prior, SameNoiseBackwards(), "back in time"),
        (testing.check_prior, Retraces(), "do not retrace a transition as .*: .*a Python float in the field rate"),
        (
            testing.check_prior,
            VanLoan(),
            # Which of the two comes first depends on the rounding of the machine.
            "float64: (the square root of the noise is finite.*NaN.*Cholesky|a step is the same as one.*cancellation)"
            ".*probode.linear_transition",
        ),
        (
            testing.check_prior,
            VanLoan(transposed=False),
            "dt=0.3, float64: the square root of the noise is upper triangular.*lower triangular.*transpose it",
        ),
        (testing.check_prior, TurnedDrift(), r"dt=0, float64: the derivative of u\^\(i\).*drift.*tolerance 1e-12"),
        (testing.check_prior, OtherDrift(), "dt=0.3, float64.*covariance.*drift of the matrix.*tolerance 1e-09"),
        (testing.check_prior, NoLift(), r"layout.lift\(root, output_scale\).*shape \(3, 3\)"),
        (
            testing.check_prior,
            SaysItIsPolynomial(),
            "is_polynomial is true.*that of the Taylor polynomial",
        ),
        (testing.check_prior, ForShortSteps(), "dt=10, float64: the square root of the noise is finite"),
        (
            testing.check_factorisation,
            TurnsJacobian(2),
            "off the diagonal where it is.*absolute deviation",
        ),
        (testing.check_factorisation, MeanOfScales(2), "lift gives every component its own scale"),
        (testing.check_factorisation, StdsTurnedRound(2), "in the order of u"),
        (testing.check_factorisation, LosesOrder(2), "unpack is the inverse of pack"),
        (testing.check_factorisation, IgnoresScale(2), "times the scale squared"),
        (testing.check_factorisation, IgnoresJacobian(2), "multiple of the identity is kept"),
        (
            lambda part: testing.check_constraint(part, U0),
            FrozenInTime(),
            "residual is that of the equation",
        ),
        (lambda part: testing.check_constraint(part, U0), FalsePromise(), "gives derivatives"),
        (
            lambda part: testing.check_constraint(part, U0, first_order=True),
            WrongJacobian(),
            "derivative of the residual",
        ),
        (lambda part: testing.check_constraint(part, U0), Transposed(), "row i and column j. Found: its transpose"),
        (lambda part: testing.check_constraint(part, U0), TransposedAndFrozen(), "its transpose"),
        (lambda part: testing.check_constraint(part, U0), SaysItIsFrozen(), "first_order is False"),
        (lambda part: testing.check_constraint(part, U0), WrongSign(), "nearer to the derivative of the residual"),
        (lambda part: testing.check_constraint(part, U0), SaysItIsFirstOrder(), "set first_order = False. Found: none"),
        (lambda part: testing.check_constraint(part, U0), HalfAndWhole(), "whole has the derivative.*deviation of 5"),
        pytest.param(
            lambda part: testing.check_constraint(part, U0),
            SaysItIsPointwise(),
            "however uncertain the state is",
            marks=pytest.mark.thorough,
        ),
        (lambda part: testing.check_constraint(part, U0), Unpacked(), "the residual is packed"),
        (lambda part: testing.check_constraint(part, U0), Unravelled(), "not unravelled to a PyTree"),
        (testing.check_strategy, Forgets(), "what the whole solve tells"),
        (testing.check_strategy, ReturnsTheState(), "remember returns None, or the Conditional.*Found: Normal"),
        (testing.check_calibration, Negative(), "scales are positive"),
        (testing.check_calibration, CountsEverything(), "says nothing changes no statistics"),
        (testing.check_calibration, SaysItIsLocal(), "is_local is true.*1e6 times as large a scale 1 times"),
        (testing.check_calibration, HidesItsMemory(), "set remembers = True"),
        (testing.check_calibration, CountsWhatWeighsNothing(), "steps of weight zero do not count"),
        (testing.check_calibration, OneForAll(), "a scale for every element"),
        (testing.check_calibration, Uncalibrated(), "does not depend on the scale of the prior"),
        (testing.check_calibration, Variance(), r"standard deviation, not a variance.*c\^2 times"),
        (testing.check_calibration, TotalVariance(), r"standard deviation, not a variance.*c\^2 times"),
        (testing.check_error, InUnitsOfTheDerivative(), r"unit of time.*u / time\^1; multiply by \|dt\|\^1"),
        (testing.check_error, AsksForRemainders(), "TS0.*innovation.remainder is None: there is an error"),
        (testing.check_error, SumOfSquares(), "homogeneous"),
        (testing.check_error, NeverSmaller(), "much smaller error"),
        (testing.check_controller, Constant(), "larger ones are not"),
        (testing.check_controller, DividesByZero(), "positive and finite"),
        (testing.check_controller, Branches(), "works under jit.*jnp.where.*in place of `if`"),
        (
            testing.check_controller,
            Threshold(1.002),
            "larger ones are not. Found: 1.001",
        ),
        (
            testing.check_controller,
            Threshold(0.998),
            "up to one are accepted.*Found: 0.999",
        ),
        (testing.check_prior, Cancels(), "drift of the matrix. Found: perhaps the cancellation.*relative deviation"),
        (
            testing.check_prior,
            IsNaNInOneStep(),
            "dt=0.002.*drift of the matrix. Found: perhaps the cancellation.*NaN in .* of what it is compared with",
        ),
        (testing.check_controller, Threshold(1.0, shorter=1 - 1e-7), "rejected steps get shorter by enough"),
        (testing.check_loop, OneTooMany(), "max_steps"),
        (testing.check_loop, AtLeastOnce(), "not at all where it is false"),
        (testing.check_loop, LanesGoOn(), "under vmap every lane runs as long as its own condition holds"),
        (testing.check_loop, WithoutBuffers(), "hands its buffers on to a loop of equinox.*'pred'"),
        (testing.check_loop, KeepsNothing(), "checkpoints is None, or a positive integer. Found: 0"),
        (testing.check_loop, Endless(), "ends after max_steps iterations at the latest. Found: 100000"),
        (testing.check_initialisation, TooSure(), "order 1: derivatives are those.*up to twenty standard deviations"),
        (testing.check_initialisation, LosesVelocity(), "order 2: the initial value is kept"),
        (testing.check_initialisation, TooManyRows(), "as many rows as columns. Found: 16 > 8"),
        (testing.check_initialisation, StartsAtZero(), "those of the equation, at its time"),
        (testing.check_initialisation, Guesses(), "initial value is kept"),
        (testing.check_cubature, TooWide(), "covariance is the identity"),
        (testing.check_cubature, UpToThree(), r"points are \(points, dim\)"),
        (
            lambda part: testing.check_jacobian(part, lambda t, u, du, args: field(t, u, args) * du, (U0, U0)),
            OfValuesAlone(),
            "Jacobian is that of the equation",
        ),
        (lambda part: testing.check_jacobian(part, field, U0), TurnsOver(), "Jacobian is that of the equation"),
    ],
    ids=lambda x: name(x) if isinstance(x, eqx.Module) else "",
)
def test_broken_parts_are_told_the_law(check, part, law):
    with pytest.raises(testing.LawBroken, match=law):
        check(part)


@pytest.mark.parametrize(
    ("got", "want", "found"),
    [
        ([1.0, 2.0], [1.0, np.nan], "NaN in 1 of 2 entries of what it is compared with, float64"),
        ([1.0, 2.0], [np.inf, 2.0], "infinite in 1 of 2 entries of what it is compared with, float64"),
        ([np.nan, 2.0], [np.nan, 2.0], "NaN in 1 of 2 entries, float64"),
        ([1.0, 2.0], [1.0, 4.0], "a relative deviation of 5.0e-01, tolerance 1e-09, in float64"),
    ],
)
def test_what_is_found_where_numbers_are_not_equal(got, want, found):
    with pytest.raises(testing.LawBroken, match=f"^It holds. Found: in words, {found}.$"):
        equal(got, want, "It holds", what="in words")
    with pytest.raises(testing.LawBroken, match=f"^It holds. Found: {found}.$"):
        equal(got, want, "It holds")


class TwoValues(Constant):
    def propose(self, dt, error_norm, order, state):
        return error_norm <= 1, dt


class ATuple(po.AbstractPrior):
    num_derivatives: int = eqx.field(static=True, default=2)

    def transition(self, dt, layout):
        transition = po.IWP(2).transition(dt, layout)
        return transition.matrix, transition.noise


@pytest.mark.parametrize(
    ("part", "check", "words"),
    [
        ({"controller": TwoValues()}, testing.check_controller, r"TwoValues.propose must return three .*got 2 values"),
        ({"prior": ATuple()}, testing.check_prior, "ATuple.*transition must return a Transition, got tuple"),
    ],
)
def test_other_values_than_a_method_has_to_return(part, check, words):
    solver = po.Solver(**{"prior": po.IWP(2), "constraint": po.TS1(po.ODE(field))} | part)
    with pytest.raises(TypeError, match=words):
        solver.solve(U0, 0.0, 1.0)
    with pytest.raises(TypeError, match=words):
        check(*part.values())


def test_the_table_of_obligations_is_that_of_the_classes():
    page = (pathlib.Path(testing.__file__).parent / "README.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    table = {row[0].strip("`"): row for row in rows if row[0].startswith("`Abstract")}
    kinds = {key: value for key, value in vars(po).items() if key.startswith("Abstract")}
    assert set(table) == set(kinds)
    handed_on = {key for kind in kinds.values() for base in kind.__mro__[1:] for key in _flags(base) & _flags(kind)}
    for key, kind in kinds.items():
        _, defines, may_set, _ = table[key]
        known = {x for base in kind.__mro__[1:] if base.__name__ in kinds for x in _asked(base)}
        assert known == set() or "the same" in defines
        for method in _asked(kind) - known:
            assert re.search(rf"`{method}\b", defines), f"{key}: {method}"
        for flag in _flags(kind) - handed_on:
            assert re.search(rf"`{flag}`", may_set), f"{key}: {flag}"


def _asked(kind):
    """What a subclass has to define."""
    return set(kind.__abstractmethods__) | set(kind.__abstractvars__)


def _flags(kind):
    """What it may set: class attributes that are values."""
    kept = {key: value for key, value in vars(kind).items() if not key.startswith("_")}
    return {key for key, value in kept.items() if isinstance(value, bool | po.information.iteration.Iteration | None)}


def test_other_kinds_and_single_precision(monkeypatch):
    with pytest.raises(TypeError):
        testing.check_prior(po.Dense())
    with pytest.raises(TypeError, match="from the equation"):
        testing.check_prior(po.RosenbrockIOUP(2))
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="double precision"):
        testing.check_prior(po.IWP(2))
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(ImportError, match="pip install hypothesis"):
        testing.priors()


@given(problem=testing.problems(), grid=testing.grids(0.0, 1.0, (17,)))
def test_known_solutions(problem, grid):
    solver = po.Solver(po.IWP(3), po.TS1(problem.problem))
    solution = solver.solve_grid(problem.u0, grid * problem.t1, args=problem.args)
    np.testing.assert_allclose(solution.mean[0], problem.solution(0.0, problem.args), atol=1e-12)
    np.testing.assert_allclose(solution.mean[-1], problem.solution(problem.t1, problem.args), atol=0.1)


@given(normal=testing.normals(), prior=testing.priors(), solver=testing.solvers(ODE))
def test_other_strategies(normal, prior, solver):
    assert normal.factor.shape == (normal.mean.size,) * 2 and jnp.isfinite(normal.factor).all()
    assert isinstance(prior, po.AbstractPrior) and isinstance(solver, po.Solver)
