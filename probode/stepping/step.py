"""One step of a solver: predict, linearise, compare with the noise of the step; then, if it is good enough, condition.

The equations are those of the square-root Kalman filter on the state ``x = (u, u', ..., u^(nu))`` with the noise-free
observation ``z(t, x) = 0`` (Tronarp, Kersting, Sarkka, Hennig 2019, "Probabilistic solutions to ordinary differential
equations as nonlinear Bayesian filtering"; Kraemer & Hennig 2020, "Stable implementation of probabilistic ODE
solvers").
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ..algebra.conditioning import Influence, Update, condition, join
from ..algebra.coordinates import Conditional, from_coordinates, in_coordinates, pad_noise
from ..algebra.derivatives import error_rows, innovate_derivatives
from ..algebra.factorisations import Layout
from ..algebra.innovation import innovate
from ..algebra.linalg import choose, detach, detach_first
from ..algebra.linearisation import residual_about
from ..algebra.normal import Normal, batched, pad, push
from ..algebra.turning import TurnedConditional, turn_state
from ..estimation.calibration import AbstractCalibration, Evidence
from ..information.constraints import AbstractConstraint
from ..information.observations import Observations
from ..priors.prior import AbstractPrior, AbstractPriorFamily, AbstractSplitPrior
from .attempt import Attempt
from .corrections import condition_corrected, correct
from .error_estimates import rms_norm
from .residuals import informative, residual_at, with_floor, with_scale_for, with_scale_inside, without_round_off
from .spread import PredictedSpread, inherited_after, predicted_spread, push_moves, push_rows, spread_after
from .state import State
from .times import round_off


# See ``Step.caution``. At 0.9 there are fewer rejections still, and slightly fewer attempts, but on rigid bodies and
# FitzHugh-Nagumo's equation more standard deviations that are too small (``benchmarks.calibration --lifted``).
_CAUTION = 0.95


class Stepped(eqx.Module):
    """What a step leaves: the state after it, an earlier one given that, and how the equation has moved the state.

    ``zero_so_far``: whether all residuals since the last restart at a jump are zero; ``None`` in a solve without jumps.
    """

    state: State
    past: Conditional | TurnedConditional | None
    influence: Influence
    zero_so_far: Bool[Array, "*batch"] | None = None


class Step(eqx.Module):
    """The parts of a solver that make a step, bound to a problem: its layout, its ``args``, and data to learn from.

    ``gains_fixed``: whether the first derivative of a step is that of the mean alone, with the gain that the step has.
    It is the one along which the spread of an uncertain start is pushed forward. The gain depends on output scales, and
    by these on residuals: where they are near round-off, as in the first steps behind a start, that dependence is as
    steep as it is short. Its derivative grows by a factor with every longer step, and says nothing about a spread.
    """

    prior: AbstractPrior | AbstractPriorFamily
    constraint: AbstractConstraint
    calibration: AbstractCalibration
    layout: Layout
    args: PyTree = None
    data: Observations | None = None
    gains_fixed: bool = eqx.field(static=True, default=False)

    def start(self, t: Float[Array, ""], distribution: Normal) -> State:
        """The state of a solver before its first step."""
        layout, shape, dtype = self.layout, self.layout.batch_shape, self.layout.dtype
        if layout.factorisation.adapts:
            equation = self.constraint.linearise(t, distribution, layout, self.args)
            layout, distribution, *_ = self._adapted(equation, distribution, None)
            self = self.within(layout)
        prior, known = self.own_prior(t, distribution), False
        error = distribution.mean[..., :0, :]
        if layout.factorisation.own_algebra:
            distribution = layout.factorisation.start(distribution)  # type: ignore[attr-defined]
        else:
            equation = self._shape_of_equation(t, distribution)
            known = distribution.factor.shape[-2] == 0 and self._splits(equation, prior)
            rows = self._rows_left(distribution, equation)
            if known and self.calibration.is_local and self.data is None:
                error = jnp.zeros_like(distribution.mean)
                rows += jax.eval_shape(batched(error_rows), error[..., :rows, :]).shape[-2]
            distribution = pad(distribution, rows)
        evidence = jnp.zeros((), dtype)
        if self.data is not None:
            layout.require_shared_algebra("Conditioning on data")
            layout.require_lasting("Conditioning on data")
            distribution, _, evidence = self._condition_on_data(t, distribution, None, evidence)
        return State(
            t,
            distribution,
            output_scale=jnp.ones(shape, dtype),
            statistics=self.calibration.init(shape, dtype),
            evidence=Evidence.zero(shape, dtype),
            layout=layout,
            prior=prior,
            last_move=jnp.zeros((), dtype),
            data_evidence=evidence,
            calibration=type(self.calibration),
            derivatives_known=known,
            global_error=error,
            spread=jnp.zeros((0, *distribution.mean.shape), dtype),
            inherited=jnp.zeros((*distribution.mean.shape[:-2], 0, distribution.mean.shape[-2]), dtype),
        )

    def within(self, layout: Layout) -> "Step":
        """The step bound to another layout."""
        return dataclasses.replace(self, layout=layout)

    def with_fixed_gains(self) -> "Step":
        """The step whose first derivative is that of the mean alone (``gains_fixed``)."""
        return dataclasses.replace(self, gains_fixed=True)

    def _given(self, x):
        """A part of the gain of a step: without its first derivative where gains are fixed."""
        return detach_first(x) if self.gains_fixed else x

    def _given_factor(self, x):
        return Normal(x.mean, self._given(x.factor))

    def _equation(self, t, x):
        equation = self.constraint.linearise(t, x, self.layout, self.args)
        return dataclasses.replace(self._given(equation), residual=equation.residual)

    def resume(self, state: State) -> State:
        """A state from ``start`` or another solve, prepared for the steps of these parts."""
        prior = self.own_prior(state.t, state.distribution)
        state = dataclasses.replace(state, prior=prior)
        if not state.derivatives_known:
            return state
        equation = self._shape_of_equation(state.t, state.distribution)
        known = self._splits(equation, prior)
        # The error is among the rows of the factor: data may be learnt from the state, and then it has no place alone.
        error = state.global_error if known and self.data is None else state.global_error[..., :0, :]
        distribution = pad(state.distribution, self._rows_left(state.distribution, equation))
        return dataclasses.replace(state, distribution=distribution, derivatives_known=known, global_error=error)

    def _rows_left(self, x, equation):
        """How many rows the factor of a state has after a step: the loop needs as many before it."""
        return x.mean.shape[-2] - equation.num_replaced

    def own_prior(
        self, t: Float[Array, ""], distribution: Normal, dt: Float[Array, ""] | None = None
    ) -> AbstractPrior | None:
        """The prior of the next step from a state where priors differ from step to step; ``None`` elsewhere.

        ``dt``: the length of that step, where it is known.
        """
        if not isinstance(self.prior, AbstractPriorFamily):
            return None
        us = self.layout.unpack(distribution.mean)
        return self.prior.at(t, us, self.constraint.problem, self.layout, self.args, dt)

    def member(self, prior: AbstractPrior | None) -> Any:
        """The prior of a step: what ``own_prior`` has made of a family, or the one of all steps."""
        return self.prior if prior is None else prior

    def attempt(
        self,
        before: Normal,
        t: Float[Array, ""],
        dt: Float[Array, ""],
        since: Float[Array, ""] | None = None,
        *,
        known: bool = False,
    ) -> Attempt:
        """The ``Attempt`` of a step over ``dt`` to ``t``: the prediction, and the equation held against it.

        ``before``: the state where the step starts. ``since``: the time there, where it matters on which side of it.
        ``known``: whether nothing in that state is uncertain but ``u, ..., u^(k-1)``.
        """
        before = self._given_factor(before)
        prior = self._given(self.own_prior(t - dt if since is None else since, before, dt))
        stepping = self.member(prior)
        transition = stepping.transition(dt, self.layout)
        predicted = push(before, transition.matrix)
        if self.layout.factorisation.own_algebra:
            return self.layout.factorisation.attempt(self, predicted, t, transition)  # type: ignore[attr-defined]
        equation = self._linearise(t, predicted)
        unit = jnp.broadcast_to(transition.magnitude, self.layout.batch_shape)
        split = self._split(stepping, dt, equation) if known else None
        if split is None:
            innovation = with_floor(innovate(equation, transition.noise, unit), equation, predicted.mean)
        else:
            # The covariance at the end of the step is not made of this scale: it needs no floor.
            innovation = innovate_derivatives(split, equation.residual, unit)
        innovation, correction = self._given(innovation), None
        if equation.is_frozen:
            at_end = predicted, transition, equation, innovation, split
            correction = correct(self._evaluate(t), self.constraint.evaluations, dt, *at_end)
        return Attempt(transition, predicted.mean, equation, innovation, prior, correction)

    def accept(
        self,
        before: State,
        attempted: Attempt,
        t: Float[Array, ""],
        past: Conditional | None,
        seen_at: Float[Array, ""] | None = None,
        zero_so_far: Bool[Array, "*batch"] | None = None,
    ) -> Stepped:
        """What a step leaves at ``t`` (``Stepped``): the prediction of an attempt, conditioned on the equation.

        ``past``: an earlier state given the one ``before``, for smoothers. ``seen_at``: the time of the equation, where
        it matters on which side of ``t``. ``zero_so_far``: whether all residuals since the last restart at a
        jump were zero.
        """
        at, spread = t if seen_at is None else seen_at, before.spread
        before = dataclasses.replace(before, distribution=self._given_factor(before.distribution))
        if before.is_spread:
            # Where the mean is at rest its neighbours need not be, and the noise is what explains their residuals.
            predicted = self.predicted_spread(before, at, attempted)
            attempted = dataclasses.replace(
                attempted, innovation=with_scale_inside(attempted.innovation, predicted.scale)
            )
            zero_so_far = None if zero_so_far is None else zero_so_far & (predicted.scale == 0)
        inherited = before.inherited
        if before.inherits:
            attempted, inherited = _with_inherited(attempted, inherited)
        innovation, error = attempted.innovation, before.global_error
        scale = self._given(self.calibration.scale(innovation, before.statistics))
        if attempted.split is not None:
            # Computed again: carried over from the attempt it would be stored for every component.
            matrix = self.member(attempted.prior).transition(at - before.t, self.layout).matrix
            given = matrix, before, at - before.t, attempted, scale, past
            update, equation, error = condition_corrected(
                self._evaluate(at), *given, is_local=self.calibration.is_local
            )
            move = jnp.zeros_like(before.last_move)
        elif attempted.update is None:
            update, equation, move = self._condition(before, at, attempted, scale, past)
        else:
            update, equation, move = attempted.update, attempted.equation, jnp.zeros_like(before.last_move)
        zero_so_far = None if zero_so_far is None else zero_so_far & innovation.is_zero
        if zero_so_far is not None:
            update = _unless_zero(update, zero_so_far, before, attempted, past)
        influence, output_scale = update.influence, scale / innovation.unit
        counts = informative(equation, attempted.mean)
        statistics = self.calibration.update(before.statistics, output_scale, influence.whitened, counts)
        if before.is_spread:
            spread = spread_after(*detach((predicted, update, equation)))
        if before.inherits:
            inherited = inherited_after(inherited, update.influence)
        distribution, past, data_evidence = self._given_factor(update.state), update.past, before.data_evidence
        if past is not None:
            past = Conditional(past.shift, *self._given((past.cross, past.noise)))
        if self.data is not None:
            distribution, past, data_evidence = self._condition_on_data(t, distribution, past, data_evidence)
            if before.inherits:
                # What data say of u is not said of these rows: with them as they were, noise would hide it again.
                _, seen = self.data.find(t)
                inherited = jnp.where(seen, 0, inherited)
        state = State(
            t,
            distribution,
            output_scale,
            statistics,
            before.evidence.update(update),
            self.layout,
            attempted.prior,
            jnp.maximum(before.last_move, move),
            data_evidence,
            before.calibration,
            before.derivatives_known,
            error,
            spread,
            inherited,
        )
        kept: Conditional | TurnedConditional | None = past
        if self.layout.factorisation.adapts:
            layout, after, turn, turned = self._adapted(equation, distribution, t - before.t)
            state = dataclasses.replace(state, layout=layout, distribution=after)
            if past is not None:
                kept = TurnedConditional(past, distribution, after, turn, turned.astype(t.dtype))
        weight = influence.weight * counts.astype(influence.weight.dtype)
        return Stepped(state, kept, dataclasses.replace(influence, weight=weight), zero_so_far)

    def fixed(self, before: State, t: Float[Array, ""], past: Conditional | None = None) -> Stepped:
        """One step to the time ``t`` without error control; shorter than round-off it only predicts."""
        self = self.within(before.layout)
        dt = t - before.t
        shortest = round_off(jnp.maximum(jnp.abs(t), jnp.abs(before.t)))
        short = jnp.abs(dt) <= shortest
        # A zero step must not reach the derivative of sqrt|dt|: the step that is thrown away has some length.
        some = jnp.where(short, shortest + jnp.finfo(t.dtype).eps, dt)
        attempted = self.attempt(before.distribution, t, some, known=before.derivatives_known)
        stepped = self.accept(before, attempted, t, past)
        matrix = self.member(attempted.prior).transition(dt, self.layout).matrix
        waited = dataclasses.replace(
            before,
            t=t,
            distribution=push(before.distribution, matrix),
            prior=attempted.prior,
            spread=detach(push_moves(before.spread, matrix)) if before.is_spread else before.spread,
            inherited=push_rows(before.inherited, matrix) if before.inherits else before.inherited,
        )
        if past is not None:
            assert stepped.past is not None
            past = pad_noise(past, stepped.past.noise.shape[-2])
        kept: Conditional | TurnedConditional | None = past
        if past is not None and self.layout.factorisation.adapts:
            kept = TurnedConditional.without(past, waited.distribution, self.layout.size)
        no_influence = jax.tree.map(jnp.zeros_like, stepped.influence)
        return choose(short, Stepped(waited, kept, no_influence), stepped)

    def predicted_spread(self, before: State, t: Float[Array, ""], attempted: Attempt) -> PredictedSpread:
        """The spread of an uncertain start at the prediction of an attempt, without derivatives.

        Steps are chosen by it, and ``State.std`` has it; ``Solution.std`` has the derivative of the whole solve.
        """
        inputs = t, before.distribution, before.spread, attempted, self.layout, self.args
        return predicted_spread(*detach((self.constraint, *inputs)))

    def nothing(
        self, before: State, past: Conditional | None, *, influence: bool
    ) -> tuple[Conditional | TurnedConditional | None, Influence | None]:
        """Zeros of the shapes in which a step returns ``past``, if any, and the ``influence`` of the equation."""
        if past is None and not influence:
            return None, None
        self = self.within(before.layout)

        def step(before, past):
            attempted = self.attempt(before.distribution, before.t, before.t, known=before.derivatives_known)
            stepped = self.accept(before, attempted, before.t, past)
            return stepped.past, stepped.influence if influence else None

        shapes = eqx.filter_eval_shape(step, before, past)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _adapted(self, equation, x, dt):
        """The layout for the next steps, the state in it, and the turn that has led to it, if there was one."""
        own: Any = self.layout.factorisation  # one that adapts
        factorisation, turn, turns = own.adapt(equation.coupling, dt)
        square = pad(x, x.mean.shape[-2])
        turned = lax.cond(turns, turn_state, lambda x, _: x, square, turn)
        return dataclasses.replace(self.layout, factorisation=factorisation), turned, turn, turns

    def _shape_of_equation(self, t, x):
        return eqx.filter_eval_shape(self.constraint.linearise, t, x, self.layout, self.args)

    def _linearise(self, t, x):
        return without_round_off(self._equation(t, x), x.mean)

    def _condition_on_data(self, t, x, past, evidence):
        """A state, an earlier one in its coordinates, and the log density of all data, with those at ``t``, if any."""

        data = self.data
        assert data is not None

        def learn(x, past, evidence):
            coordinates, log_density = data.condition(i, x, self.layout, self.args)
            past = None if past is None else in_coordinates(past, coordinates)
            return self._with_given(t, from_coordinates(coordinates, x)), past, evidence + log_density

        i, seen = data.find(t)
        return lax.cond(seen, learn, lambda *same: same, x, past, evidence)

    def _with_given(self, t, x):
        """A state that data have moved, with the derivatives that a frozen equation gives at its new ``u``.

        These are not uncertain to the filter, so that data do not move them, and they would belong to the old ``u``.
        """
        # No frozen equation is of first order: nothing is traced for these.
        if self.constraint.first_order:
            return x
        equation = self.constraint.linearise(t, x, self.layout, self.args)
        if not equation.is_frozen:
            return x
        p, m = equation.matrix.shape[-1], equation.matrix.shape[-2]
        return Normal(x.mean.at[..., p - m : p, :].add(-equation.residual), x.factor)

    def order_of_error(self, attempted: Attempt) -> int:
        """The power of the length of a step with which its estimated error falls."""
        nu = self.layout.num_derivatives
        if attempted.split is None:
            return nu + 1
        return min(nu + self.constraint.evaluations, 2 * nu)

    def caution(self, attempted: Attempt) -> float:
        """A factor on the length that a controller proposes for the next step.

        The error of steps that observe all derivatives grows with a high power of their length, and they are long: the
        error of the next one is harder to predict. Without the factor a fifth of the attempts is rejected.
        """
        return 1.0 if attempted.split is None else _CAUTION

    def _split(self, prior, dt, equation):
        """The noise of a step as that of the derivatives that an equation gives, and the rest; ``None`` elsewhere."""
        return prior.split(dt, equation.gives.start, self.layout) if self._splits(equation, prior) else None

    def _splits(self, equation, prior):
        """Whether an equation gives all highest derivatives, and the prior knows what their noise says of the others.

        ``prior``: that of the step, if every step has its own.
        """
        gives_all = equation.is_frozen and equation.gives.stop == self.layout.num_derivatives + 1
        return gives_all and isinstance(self.member(prior), AbstractSplitPrior)

    def _evaluate(self, t):
        """The residual of the equation at ``t``, as a function of the point."""
        return lambda x: self.constraint.linearise(t, x, self.layout, self.args).residual

    def _condition(self, before, t, attempted, scale, past):
        """The posterior after a step (``Update``), the equation that it is given, and the size of the last iteration.

        That is by how much the last of several linearisations has moved the innovation; zero if there is only one.
        """
        transition, equation, iteration = attempted.transition, attempted.equation, self.constraint.iteration
        predicted = Normal(attempted.mean, push(before.distribution, transition.matrix).factor)
        if self.calibration.relinearise:
            noise = transition.noise * scale[..., None, None]
            equation = self._linearise(t, Normal(predicted.mean, jnp.concatenate([predicted.factor, noise], axis=-2)))
        joint = join(predicted, transition.noise, scale, equation, past)
        update = condition(joint, predicted, equation, past)

        def again(carry):
            joint, update, equation, _ = carry
            whitened = update.influence.whitened
            equation = self._evaluate_at(update.state, t, predicted, equation)
            if iteration.relinearise:
                joint = join(predicted, transition.noise, scale, equation, past)
            return joint, condition(joint, predicted, equation, past), equation, whitened

        carry = joint, update, equation, jnp.zeros_like(update.influence.whitened)
        _, update, equation, whitened = iteration.repeat(again, carry)
        converging = iteration.is_gauss_newton
        move = rms_norm(update.influence.whitened - whitened) if converging else jnp.zeros_like(before.last_move)
        return update, equation, move

    def _evaluate_at(self, point, t, predicted, equation):
        """The equation with its residual, or as a whole, taken at another point, as the prediction sees it."""
        point = Normal(point.mean, predicted.factor)
        if self.constraint.iteration.relinearise:
            new = self._equation(t, point)
        else:
            residual = residual_at(self.constraint, t, point, self.layout, self.args)
            new = dataclasses.replace(equation, residual=residual)
        residual = residual_about(predicted.mean, point.mean, new)
        return without_round_off(dataclasses.replace(new, residual=residual), predicted.mean)


def _with_inherited(attempted, inherited):
    """The attempt, with a scale that explains what a restart took over; and that, after the transition."""
    transition, equation = attempted.transition, attempted.equation
    inherited = push_rows(inherited, transition.matrix)
    innovation = with_scale_for(attempted.innovation, equation, transition.noise, inherited)
    return dataclasses.replace(attempted, innovation=innovation), inherited


def _unless_zero(update, zero_so_far, before, attempted, past):
    """The update, or the prediction where derivatives are still those of the start, and there was no residual.

    They move with ``u`` just as the equation wants it. So the innovation of a step without noise has no variance, and
    round-off in its place would tell about ``u``, falsely.
    """
    predicted = push(before.distribution, attempted.transition.matrix)
    if past is not None:
        past = pad_noise(past, update.past.noise.shape[-2])
    influence = jax.tree.map(jnp.zeros_like, update.influence)
    none = jnp.zeros_like(update.rank)
    nothing = Update(Normal(attempted.mean, predicted.factor), past, influence, none, none, none)
    axes = jnp.ndim(zero_so_far)
    return jax.tree.map(
        lambda a, b: jnp.where(jnp.reshape(zero_so_far, zero_so_far.shape + (1,) * (a.ndim - axes)), a, b),
        nothing,
        update,
    )
