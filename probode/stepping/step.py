"""One step of a solver: predict, linearise, compare with the noise of the step; then, if it is good enough, condition.

The equations are those of the square-root Kalman filter on the state ``x = (u, u', ..., u^(nu))`` with the noise-free
observation ``z(t, x) = 0`` (Tronarp et al. 2019; Kraemer & Hennig 2020).
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ..algebra.conditioning import (
    Influence,
    Update,
    condition,
    innovate,
    join,
    seen_from,
)
from ..algebra.coordinates import Conditional, in_coordinates, realise
from ..algebra.factorisations import Layout
from ..algebra.linalg import detach
from ..algebra.marginals import Moments, moments, widen
from ..algebra.normal import Normal, pad, pad_rows, push
from ..estimation.calibration import AbstractCalibration, Evidence
from ..information.constraints import AbstractConstraint
from ..information.observations import Observations
from ..priors.prior import AbstractPrior
from ..util.checks import as_integer
from ..util.describe import brief, shape_of_u
from .attempt import Attempt
from .error_estimates import rms_norm
from .residuals import informative, not_silent, residual_at, with_floor, without_round_off
from .spread import Ahead, push_moves, spread_after, spread_ahead


class State(eqx.Module):
    """The state of a solver between two steps, as ``Solver.init`` and ``Solver.step`` return it.

    It holds the time ``t``, the Gaussian ``distribution`` over ``(u, ..., u^(nu))``, and what the parts remember.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(3), probode.TS1(probode.ODE(lambda t, u, args: -u)))
    >>> state = solver.step(solver.init(1.0, 0.0), 0.1)
    >>> bool(jnp.abs(state.mean - jnp.exp(-0.1)) < 1e-6)
    True

    ``prior``: that of the step that ended here, if every step has its own. ``last_move``: see ``iterates``.
    ``data_evidence``: the log density of the data so far, where there are any. ``spread``: how the mean moves along the
    rows of the factor of an uncertain initial value, if that is where the solve came from: it adds to the covariance.
    """

    t: Float[Array, ""]
    distribution: Normal
    output_scale: Float[Array, "*batch"]
    statistics: Any
    evidence: Evidence
    layout: Layout
    prior: AbstractPrior | None
    last_move: Float[Array, ""] | None
    data_evidence: Float[Array, ""] | None
    spread: Float[Array, "N *batch dim cols"] | None = None

    def __repr__(self):
        return f"State(t={brief(self.t)}, u={shape_of_u(self.layout)}, layout={self.layout!r})"

    @property
    def mean(self) -> PyTree:
        """Mean of ``u``."""
        return self.derivative(0).mean

    @property
    def std(self) -> PyTree:
        """Standard deviation of ``u``."""
        return self.derivative(0).std

    def derivative(self, k: Any) -> Moments:
        """Mean and standard deviation of ``u^(k)``."""
        k = as_integer(k, "derivative(k)", 0, self.layout.num_derivatives)
        whole = self.distribution if self.spread is None else widen(self.distribution, self.spread)
        return moments(self.layout, whole, k)


class Step(eqx.Module):
    """The parts of a solver that make a step."""

    prior: AbstractPrior
    constraint: AbstractConstraint
    calibration: AbstractCalibration
    data: Observations | None = None


def start(parts: Step, t: Float[Array, ""], distribution: Normal, layout: Layout, args: PyTree) -> State:
    """The state of a solver before its first step."""
    shape, dtype = layout.batch_shape, layout.dtype
    if layout.factorisation.own_algebra:
        distribution = layout.factorisation.start(distribution)
    else:
        equation = _shape_of_equation(parts, t, distribution, layout, args)
        # As many rows as a step leaves.
        rows = distribution.mean.shape[-2] - (0 if equation.gives is None else equation.residual.shape[-2])
        distribution = pad(distribution, rows)
    ones, statistics = jnp.ones(shape, dtype), parts.calibration.init(shape, dtype)
    state = State(t, distribution, ones, statistics, Evidence.none(shape, dtype), layout, None, None, None)
    if parts.data is None:
        return adopt(parts, state, args)
    layout.require_shared_algebra("Conditioning on data")
    distribution, _, evidence = _learn(parts.data, t, state.distribution, None, jnp.zeros((), dtype), layout, args)
    state = eqx.tree_at(
        lambda s: (s.distribution, s.data_evidence), state, (distribution, evidence), is_leaf=lambda x: x is None
    )
    return adopt(parts, state, args)


def _learn(data, t, x, past, evidence, layout, args):
    """A state, an earlier one in its coordinates, and the log density of all data, with those of this time, if any."""

    def learn(x, past, evidence):
        coordinates, log_density = data.learn(i, x, layout, args)
        past = None if past is None else in_coordinates(past, coordinates)
        return realise(coordinates, x), past, evidence + log_density

    i, seen = data.find(t)
    return lax.cond(seen, learn, lambda *same: same, x, past, evidence)


def adopt(parts: Step, state: State, args: PyTree) -> State:
    """A state that other parts may have made, as these ones go on from it."""
    prior = own_prior(parts, state.t, state.distribution, state.layout, args)
    last_move = None
    if iterates(parts.constraint):
        last_move = jnp.zeros((), state.layout.dtype) if state.last_move is None else state.last_move
    evidence = None
    if parts.data is not None:
        evidence = jnp.zeros((), state.layout.dtype) if state.data_evidence is None else state.data_evidence
    return eqx.tree_at(
        lambda s: (s.prior, s.last_move, s.data_evidence),
        state,
        (prior, last_move, evidence),
        is_leaf=lambda x: x is None,
    )


def iterates(constraint: AbstractConstraint) -> bool:
    """Whether a step iterates its linearisation, so that a user wants to know whether it converged.

    The state then has the largest ``last_move`` of all steps: how far the last iteration moved the innovation, in its
    own standard deviations (root mean square).
    """
    return constraint.relinearise and constraint.evaluations > 1


def _shape_of_equation(parts, t, distribution, layout, args):
    return eqx.filter_eval_shape(parts.constraint.linearise, t, distribution, layout, args)


def own_prior(
    parts: Step, t: Float[Array, ""], distribution: Normal, layout: Layout, args: PyTree
) -> AbstractPrior | None:
    """The prior of the next step from a state, for priors that differ from step to step; ``None`` for all others."""
    if not parts.prior.differs_by_step:
        return None
    return parts.prior.at(t, layout.unpack(distribution.mean), parts.constraint.problem, layout, args)


def no_influence(parts: Step, state: State, args: PyTree) -> Influence:
    """Of no equation at all."""
    equation = _shape_of_equation(parts, state.t, state.distribution, state.layout, args)
    m, (*batch, dim, cols), dtype = equation.residual.shape[-2], state.distribution.mean.shape, state.layout.dtype
    zeros = jnp.zeros((*batch, m, dim), dtype)
    return Influence(jnp.zeros((*batch, m, cols), dtype), zeros, zeros, jnp.zeros(batch, dtype))


def nothing_of_the_past(parts: Step, past: Conditional | None, state: State, args: PyTree) -> Conditional | None:
    """Zeros of the shape in which a step returns ``past``, the coordinates of the state that it leaves."""
    if past is None:
        return None

    def step(x, past):
        equation = parts.constraint.linearise(state.t, x, state.layout, args)
        *batch, dim, _ = x.mean.shape
        noise, scale = jnp.zeros((*batch, dim, dim), x.mean.dtype), jnp.zeros(batch, x.mean.dtype)
        return condition(join(x, noise, scale, equation, past), x, equation, past).past

    shapes = eqx.filter_eval_shape(step, state.distribution, past)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def attempt(
    parts: Step,
    distribution: Normal,
    t: Float[Array, ""],
    dt: Float[Array, ""],
    layout: Layout,
    args: PyTree,
    since: Float[Array, ""] | None = None,
) -> Attempt:
    """Predict over ``dt`` to the time ``t`` and hold the prediction against the equation.

    ``since``: the time at which the step starts, where it matters on which side of it.
    """
    prior = own_prior(parts, t - dt if since is None else since, distribution, layout, args)
    transition = (parts.prior if prior is None else prior).transition(dt, layout)
    predicted = push(distribution, transition.matrix)
    if layout.factorisation.own_algebra:
        return layout.factorisation.attempt(parts, predicted, t, transition, layout, args)
    equation = without_round_off(parts.constraint.linearise(t, predicted, layout, args), predicted.mean)
    unit = jnp.broadcast_to(transition.magnitude, layout.batch_shape)
    innovation = with_floor(innovate(equation, transition.noise, unit), equation, predicted.mean)
    return Attempt(transition, predicted.mean, equation, innovation, prior)


def accept(
    parts: Step,
    state: State,
    t: Float[Array, ""],
    attempted: Attempt,
    past: Conditional | None,
    args: PyTree,
    seen_at: Float[Array, ""] | None = None,
    anew: Bool[Array, "*batch"] | None = None,
) -> tuple[State, Update]:
    """Condition the prediction on the equation: the state at ``t``, and what has led to it.

    ``seen_at``: the time of the equation, where it matters on which side of ``t``. ``anew``: whether the state has
    started anew behind a jump, and no residual has been seen since. The scale of the step before is forgotten then.
    """
    at, spread = t if seen_at is None else seen_at, None
    if state.spread is not None:
        # Where the mean is at rest its neighbours need not be, and the noise is what explains their residuals.
        ahead = ahead_of(parts, state, at, attempted, args)
        attempted = eqx.tree_at(lambda a: a.innovation, attempted, not_silent(attempted.innovation, ahead.scale))
        anew = None if anew is None else anew & (ahead.scale == 0)
    remembered = state.evidence.number > 0 if anew is None else (state.evidence.number > 0) & ~anew
    last = jnp.where(remembered, state.output_scale * attempted.innovation.unit, 0)
    scale = parts.calibration.scale(dataclasses.replace(attempted.innovation, last=last))
    if attempted.update is None:
        update, equation, before = _conditioned(parts, state, at, attempted, scale, past, args)
    else:
        update, equation = attempted.update, attempted.equation
    if anew is not None:
        update = _unless_silent(update, anew & attempted.innovation.silent, state, attempted, past)
    whitened, counts = update.influence.whitened, informative(equation, attempted.mean)
    statistics = parts.calibration.update(state.statistics, whitened, counts)
    evidence = state.evidence.update(whitened, update.pivots)
    update = eqx.tree_at(lambda u: u.influence.weight, update, update.influence.weight * counts)
    last_move = data_evidence = None
    if state.spread is not None:
        spread = spread_after(*detach((ahead, update, equation)))
    if iterates(parts.constraint):
        last_move = jnp.maximum(state.last_move, rms_norm(update.influence.whitened - before))
    if parts.data is not None:
        *told, data_evidence = _learn(parts.data, t, update.state, update.past, state.data_evidence, state.layout, args)
        update = eqx.tree_at(lambda u: (u.state, u.past), update, told, is_leaf=lambda x: x is None)
    return State(
        t,
        update.state,
        scale / attempted.innovation.unit,
        statistics,
        evidence,
        state.layout,
        attempted.prior,
        last_move,
        data_evidence,
        spread,
    ), update


def ahead_of(parts: Step, state: State, t: Float[Array, ""], attempted: Attempt, args: PyTree) -> Ahead:
    """The spread of a state where an attempt takes it: without derivatives, since only steps are chosen by it.

    (And without error control it is what a state says of itself; what a solve reports are its own derivatives.)
    """
    a = attempted
    inputs = t, state.distribution, state.spread, a.transition.matrix, a.equation, a.innovation, state.layout, args
    return spread_ahead(*detach((parts.constraint, *inputs)))


def _unless_silent(update, silent, state, attempted, past):
    """The update, or the prediction where derivatives are still those of the start, and there was no residual.

    They move with ``u`` just as the equation wants it. So the innovation of a step without noise has no variance, and
    round-off in its place would tell about ``u``, falsely.
    """
    predicted = push(state.distribution, attempted.transition.matrix)
    if past is not None:
        past = Conditional(past.shift, past.cross, pad_rows(past.own, update.past.own.shape[-2]))
    influence = jax.tree.map(jnp.zeros_like, update.influence)
    nothing = Update(Normal(attempted.mean, predicted.factor), past, influence, jnp.zeros_like(update.pivots))
    axes = jnp.ndim(silent)
    return jax.tree.map(
        lambda a, b: jnp.where(jnp.reshape(silent, silent.shape + (1,) * (a.ndim - axes)), a, b), nothing, update
    )


def _conditioned(parts, state, t, attempted, scale, past, args):
    """The update, the equation that it is about, and the whitened residual before the last iteration, if any."""
    transition, equation = attempted.transition, attempted.equation
    predicted = Normal(attempted.mean, push(state.distribution, transition.matrix).factor)
    if parts.calibration.relinearise:
        noise = transition.noise * scale[..., None, None]
        whole = Normal(predicted.mean, jnp.concatenate([predicted.factor, noise], axis=-2))
        equation = without_round_off(parts.constraint.linearise(t, whole, state.layout, args), predicted.mean)
    joint = join(predicted, transition.noise, scale, equation, past)
    update = condition(joint, predicted, equation, past)

    def again(_, carry):
        joint, update, equation, _ = carry
        before = update.influence.whitened
        equation = _evaluated_at(parts.constraint, t, update.state, predicted, equation, state.layout, args)
        if parts.constraint.relinearise:
            joint = join(predicted, transition.noise, scale, equation, past)
        return joint, condition(joint, predicted, equation, past), equation, before

    carry = joint, update, equation, jnp.zeros_like(update.influence.whitened)
    times = parts.constraint.evaluations - 1
    # Once more belongs to the step's straight line, which melts together; many copies would compile exponentially long.
    if times == 1:
        carry = again(0, carry)
    elif times:
        carry = lax.fori_loop(0, times, again, carry)
    _, update, equation, before = carry
    return update, equation, before


def _evaluated_at(constraint, t, point, predicted, equation, layout, args):
    # The residual of the prediction as the equation about another point tells it.
    point = Normal(point.mean, predicted.factor)
    if constraint.relinearise:
        new = constraint.linearise(t, point, layout, args)
    else:
        new = eqx.tree_at(lambda e: e.residual, equation, residual_at(constraint, t, point, layout, args))
    residual = seen_from(predicted.mean, point.mean, new)
    return without_round_off(eqx.tree_at(lambda e: e.residual, new, residual), predicted.mean)


def round_off(t: Float[Array, ""]) -> Float[Array, ""]:
    """The length below which a step at ``t`` is noise: 100 units of round-off."""
    return 100 * jnp.finfo(t.dtype).eps * jnp.abs(t)


def unconditional(
    parts: Step, state: State, t: Float[Array, ""], args: PyTree, past: Conditional | None = None
) -> tuple[State, Conditional | None, Influence]:
    """One step to the time ``t`` without error control; shorter than round-off it only predicts.

    Also the past in the new state's coordinates, and the influence of the equation.
    """
    dt = t - state.t
    shortest = round_off(jnp.maximum(jnp.abs(t), jnp.abs(state.t)))
    short = jnp.abs(dt) <= shortest
    # A zero step must not reach the derivative of sqrt|dt|: the step that is thrown away has some length.
    attempted = attempt(
        parts, state.distribution, t, jnp.where(short, shortest + jnp.finfo(t.dtype).eps, dt), state.layout, args
    )
    stepped, update = accept(parts, state, t, attempted, past, args)
    prior = parts.prior if attempted.prior is None else attempted.prior
    matrix = prior.transition(dt, state.layout).matrix
    drifted = push(state.distribution, matrix)
    spread = None if state.spread is None else detach(push_moves(state.spread, matrix))
    waited = eqx.tree_at(
        lambda s: (s.t, s.distribution, s.prior, s.spread),
        state,
        (t, drifted, attempted.prior, spread),
        is_leaf=lambda x: x is None,
    )
    no_influence = jax.tree.map(jnp.zeros_like, update.influence)
    if past is not None:
        past = Conditional(past.shift, past.cross, pad_rows(past.own, update.past.own.shape[-2]))
    return jax.tree.map(
        lambda a, b: jnp.where(short, a, b), (waited, past, no_influence), (stepped, update.past, update.influence)
    )
