"""Conformance checks of single parts, one function for every abstract class."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ..algebra.factorisations import AbstractFactorisation, BlockDiagonal, Dense, Isotropic, layout_of
from ..algebra.innovation import innovate
from ..algebra.normal import Normal, batched, push
from ..equations.jacobians import AbstractJacobian
from ..equations.problems import ODE, AbstractProblem
from ..estimation.calibration import AbstractCalibration, NoCalibration
from ..estimation.initialisation import AbstractInitialisation, TaylorMode
from ..estimation.strategies import AbstractStrategy, Filter, FixedIntervalSmoother
from ..information.constraints import TS0, TS1, AbstractConstraint
from ..information.regression import AbstractCubature
from ..priors.iwp import IWP
from ..priors.prior import AbstractPrior, AbstractPriorFamily, AbstractSplitPrior
from ..solver import Solver
from ..stepping.attempt import Attempt
from ..stepping.controllers import AbstractController
from ..stepping.error_estimates import AbstractErrorEstimate
from ..stepping.loops import AbstractLoop
from ..stepping.progress import AbstractProgress
from ..stepping.step import Step
from .laws import equal, finite, has_dtype, hold, in_single, require_double, require_kind, survives


_GRID = np.linspace(0.0, 1.0, 9)
# NumPy: an array of JAX would start its backend when the package is imported.
_U0 = np.array([1.0, 0.6])


def _field(t, u, args):
    """A vector field that is nonlinear and depends on time, with components independent of each other."""
    return -u * (1 + 0.5 * jnp.sin(3 * t)) + 0.1 * u**2


def example_attempt(dt: Any = 0.1, *, scale: float = 1.0) -> Attempt:
    """The first attempt of a solve of two components with ``TS1``, ``IWP(2)`` and ``Dense``: input for error estimates.

    ``dt``: the signed length of the step; the state has its dtype. ``scale``: a factor on ``u``, to check units.
    """
    dt = jnp.asarray(dt)
    layout = layout_of(_U0.astype(dt.dtype), 2, Dense())
    constraint = TS1(ODE(lambda t, u, args: scale * _field(t, u / scale, args)))
    u0 = jnp.asarray(scale * _U0, dt.dtype)
    distribution = TaylorMode().initialise(constraint.problem, jnp.zeros_like(dt), u0[None], layout, None)
    return Step(IWP(2), constraint, NoCalibration(), layout).attempt(distribution, dt, dt)


def check_prior(prior: AbstractPrior | AbstractPriorFamily, *, u0: Any = None) -> None:
    """Raises ``LawBroken`` unless a prior is a Gauss-Markov process over a function and its derivatives.

    - Two transitions in a row are the one over both steps (Chapman-Kolmogorov), forwards and, if the noise of steps
      back in time is finite, backwards; the matrix of a step back undoes that of a step; a step of length zero is the
      identity.
    - The derivative of ``u^(i)`` is ``u^(i+1)``.
    - The square root of the noise is upper triangular, with noise in every derivative; the parts of an
      ``AbstractSplitPrior`` make up its covariance.
    - Transitions have the dtype of the state, and work under the transformations of JAX.

    These laws are checked in every factorisation that takes the prior's parameters. ``u0``: a PyTree with the shapes of
    ``u`` that the prior is for; two components by default. Raises ``TypeError`` for another kind of part, and for an
    ``AbstractPriorFamily``, whose parameters come from an equation.
    """
    require_double()
    if isinstance(prior, AbstractPriorFamily):
        raise TypeError(f"{type(prior).__name__} takes its parameters from the equation: check the solver instead.")
    require_kind(prior, AbstractPrior)
    example, refused, done = _U0 if u0 is None else u0, [], 0
    for factorisation in (Dense(), BlockDiagonal(), Isotropic()):
        layout = layout_of(example, prior.num_derivatives, factorisation)
        try:
            prior.transition(jnp.asarray(0.1), layout)
        except ValueError as error:
            refused.append(error)
            continue
        done += 1
        _check_transitions(prior, layout)
        if isinstance(prior, AbstractSplitPrior):
            _check_split(prior, layout)
    hold(done, "A prior has transitions in some factorisation", str(refused[:1]))
    single = layout_of(in_single(example), prior.num_derivatives, Dense())
    transition = in_single(prior).transition(jnp.asarray(0.1, jnp.float32), single)
    has_dtype(transition, jnp.float32, "A transition has the dtype of the state")
    dense = layout_of(example, prior.num_derivatives, Dense())

    def everything(prior, dt):
        a, q = _moments(prior.transition(dt, dense), dense)
        return jnp.concatenate([a.ravel(), q.ravel()])

    survives(everything, prior, jnp.asarray(0.3), "a transition, as a function of the step,")


def _check_split(prior, layout):
    """Checks the law of an ``AbstractSplitPrior``: its two parts make up the noise of a step."""
    for order, dt in ((1, 0.3), (min(2, prior.num_derivatives), -0.7)):
        split, transition = prior.split(jnp.asarray(dt), order, layout), prior.transition(jnp.asarray(dt), layout)
        size = layout.identity().shape[-1]
        rows = transition.matrix.shape[-1] // (prior.num_derivatives + 1) * order
        law = f"{type(prior).__name__}: derivatives depend on themselves and on higher ones alone"
        hold(transition.matrix[..., rows:, :rows] == 0, law)

        @batched
        def covariance(root, rest, gain=split.gain, size=size):
            gain = jnp.kron(gain, jnp.eye(size, dtype=gain.dtype))
            factor = jnp.block([[root @ gain.T, root], [rest, jnp.zeros((rest.shape[0], root.shape[0]), rest.dtype)]])
            return factor.T @ factor

        expected = batched(lambda noise: noise.T @ noise)(transition.noise)
        law = f"{type(prior).__name__}: the split noise has the covariance of the transition's"
        equal(covariance(split.root, split.rest), expected, law, 1e-10)
        log_det = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(split.root, axis1=-2, axis2=-1))), axis=-1)
        equal(split.log_det, log_det, f"{type(prior).__name__}: split.log_det is that of split.root", 1e-10)
        z = jnp.ones((*layout.batch_shape, split.root.shape[-1], 1), layout.dtype)
        back = batched(lambda root, white: root.T @ white)(split.root, split.whiten(z))
        equal(back, z, f"{type(prior).__name__}: split.whiten inverts split.root", 1e-6)


def _moments(transition, layout):
    """Transition matrix and covariance of the noise, over all rows of the first batch element."""
    matrix, noise = transition.matrix, transition.noise * transition.magnitude
    while matrix.ndim > 2:
        matrix, noise = matrix[0], noise[0]
    size = noise.shape[-1] // matrix.shape[-1]
    return jnp.kron(matrix, jnp.eye(size)), noise.T @ noise


def _check_transitions(prior, layout):
    name = f"{type(prior).__name__} under {type(layout.factorisation).__name__}()"
    at = jax.jit(lambda dt: _moments(prior.transition(dt, layout), layout))
    n = prior.num_derivatives + 1
    dim = at(0.1)[0].shape[0]
    hold(dim == n * (layout.size if layout.couples else 1), f"{name}: a transition has a row for every derivative")
    equal(at(0.0)[0], np.eye(dim), f"{name}: a step of length zero stays where it is", atol=1e-14)
    # With u^(i) in units of h^(-i) all entries are of size one. Otherwise they are powers of the step, and a tolerance
    # relative to the largest one would not check the small ones.
    for one, two in ((0.1, 0.2), (0.02, 1.0), (1e-3, 1e-3), (-0.1, -0.2)):
        units = np.repeat(abs(one + two) ** np.arange(n), dim // n)
        (a1, q1), (a2, q2), (a, q) = at(one), at(two), at(one + two)
        if one < 0 and not np.all(np.isfinite(q)):
            continue  # For solves forwards alone: backwards they end as nonfinite, and nobody is misled.
        direction = "" if one > 0 else " back in time"
        law = f"{name}: a step{direction} is the same as two halves of it (Chapman-Kolmogorov)"
        equal(units[:, None] * (a2 @ a1) / units, units[:, None] * a / units, f"{law}, its matrix", 1e-10)
        parts = a2 @ q1 @ a2.T + q2
        equal(units[:, None] * parts * units, units[:, None] * q * units, f"{law}, its covariance", 1e-9)
    equal(at(-0.3)[0] @ at(0.3)[0], np.eye(dim), f"{name}: a step back undoes a step", 1e-9)
    rate = jax.jacfwd(lambda dt: at(dt)[0])(0.0)
    d = dim // n
    law = f"{name}: the derivative of u^(i) is u^(i+1)"
    equal(rate[: dim - d], np.eye(dim)[d:], law, 1e-12)
    noise = prior.transition(jnp.asarray(0.3), layout).noise
    equal(jnp.triu(noise), noise, f"{name}: the square root of the noise is upper triangular", atol=0.0)
    pivots = np.abs(np.diagonal(noise, axis1=-2, axis2=-1))
    hold(pivots > 0, f"{name}: noise reaches every derivative")


def check_factorisation(factorisation: AbstractFactorisation, *, d: int = 4) -> None:
    """Raises ``LawBroken`` unless a factorisation of ``d`` components stores states and covariances consistently.

    - ``unpack`` is the inverse of ``pack``, with ``batch_shape`` as leading axes; ``project`` is linear and keeps
      multiples of the identity; ``lift`` gives all components the same covariance.
    - A linear map over the derivatives acts on all components alike.
    - Where components do not depend on each other, a smoother returns what it returns under ``Dense``.
    - Single precision is kept, and solves work under the transformations of JAX.

    Raises ``TypeError`` for another kind of part. A factorisation that does not smooth, as those with an algebra of
    their own, raises its own error here.
    """
    require_double()
    require_kind(factorisation, AbstractFactorisation)
    name, rng = type(factorisation).__name__, np.random.default_rng(0)
    n = 3
    layout, dense = (layout_of(jnp.zeros(d), n - 1, f) for f in (factorisation, Dense()))
    stack = jnp.asarray(rng.normal(size=(n, d)))
    equal(layout.unpack(layout.pack(stack)), stack, f"{name}: unpack is the inverse of pack", 1e-15)
    batch = layout.batch_shape
    hold(layout.pack(stack).shape[: len(batch)] == batch, f"{name}: the leading axes of a mean are batch_shape")
    matrix, root = rng.normal(size=(n, n)), np.triu(rng.normal(size=(n, n)))
    factor = layout.lift(jnp.asarray(root), 2.0)
    hold(factor.shape[: len(batch)] == batch, f"{name}: the leading axes of a factor are batch_shape")
    moved = push(Normal(layout.pack(stack), factor), layout.broadcast(jnp.asarray(matrix)))
    law = f"{name}: every component is moved by the matrix over the derivatives"
    equal(layout.unpack(moved.mean), matrix @ stack, law, 1e-12)
    law = f"{name}: lift gives every component the covariance root^T root, times the scale squared"
    equal(layout.std(factor), dense.std(dense.lift(jnp.asarray(root), 2.0)), law, 1e-12)
    whole = push(Normal(dense.pack(stack), dense.lift(jnp.asarray(root), 2.0)), jnp.asarray(matrix))
    equal(layout.std(moved.factor), dense.std(whole.factor), law)
    slope = layout.project(0.7 * jnp.eye(d))
    equal(slope, 0.7 * layout.identity(), f"{name}: a Jacobian that is a multiple of the identity is kept", 1e-13)
    jacobian = jnp.asarray(rng.normal(size=(d, d)))
    law = f"{name}: project is linear"
    equal(layout.project(2 * jacobian - jnp.eye(d)), 2 * layout.project(jacobian) - layout.identity(), law, 1e-12)
    u0 = jnp.linspace(0.5, 1.5, d)
    parts = {"calibration": NoCalibration(), "strategy": FixedIntervalSmoother()}
    solve = lambda f, u0=u0: Solver(  # noqa: E731
        IWP(2), TS1(ODE(lambda t, u, args: -0.7 * u)), factorisation=f, **parts
    ).solve_grid(u0, _GRID)
    own, full = solve(factorisation), solve(Dense())
    law = f"{name}: where components do not depend on each other it gives what Dense() gives"
    equal(own.mean, full.mean, f"{law}, in the mean", 1e-10)
    equal(own.std, full.std, f"{law}, in the standard deviation", 1e-8)
    has_dtype(solve(factorisation, u0.astype(jnp.float32)).marginals, jnp.float32, f"{name} keeps single precision")
    survives(lambda f, x: solve(f, u0 * x).mean[-1], factorisation, jnp.asarray(1.3), "a solve under it")


def check_constraint(
    constraint: AbstractConstraint,
    u0: Any,
    *,
    t: float = 0.3,
    args: Any = None,
    factorisation: Any = Dense(),
    first_order: bool = False,
) -> None:
    """Raises ``LawBroken`` unless a constraint linearises its equation consistently.

    - Where the state is certain, the residual is that of ``problem`` at the time and state passed; there may be further
      rows, as of a ``Stack``. In zeroth order, where an equation gives several derivatives, this is asked for a state
      whose derivatives are those of a solution.
    - Matrix and residual have matching shapes. If ``gives`` is set, the last columns of the matrix are the identity, or
      lower triangular with ones on the diagonal where it gives several derivatives in terms of each other.
    - With ``first_order`` and under ``Dense``, the matrix is the derivative of the residual.
    - Solutions on a grid converge with order one at least.
    - Single precision is kept, and linearisations work under the transformations of JAX.

    Arguments:

    - ``u0``: an initial value for its equation, a PyTree; a tuple ``(u, u', ...)`` for an equation of higher order.
    - ``t``: the time at which it is linearised.
    - ``args``: parameters of the equation.
    - ``factorisation``: in which it is checked.
    - ``first_order``: whether the matrix has to be the derivative of the residual.

    Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(constraint, AbstractConstraint)
    name, problem = type(constraint).__name__, constraint.problem
    nu = constraint.order + 1
    prior = IWP(nu)
    u0 = u0 if problem.num_initial_values > 1 else (u0,)
    layout = layout_of(jax.tree.map(lambda x: jnp.asarray(x, float), u0[0]), nu, factorisation)
    rng = np.random.default_rng(0)
    known = jnp.stack([layout.ravel(u) for u in u0])
    stack = jnp.concatenate([known, 0.3 * jnp.asarray(rng.normal(size=(nu + 1 - known.shape[0], layout.size)))])

    def linearise(constraint, t, stack, layout=layout):
        certain = layout.lift(jnp.zeros((nu + 1, nu + 1), layout.dtype), 1.0)
        return constraint.linearise(t, Normal(layout.pack(stack), certain), layout, args)

    for time in (t, t + 0.4):
        equation = linearise(constraint, jnp.asarray(time), stack)
        finite(equation, f"{name}: the linearisation is finite where nothing is uncertain yet")
        if equation.is_frozen:
            # In zeroth order the derivatives are those of a solution: the others have to be so, too.
            given = layout.unpack(-equation.residual)[:-1]
            stack = stack.at[jnp.asarray(equation.gives[:-1], int)].add(given)
            equation = linearise(constraint, jnp.asarray(time), stack)
        us = tuple(layout.unravel(u) for u in stack)
        expected, _ = ravel_pytree(problem.residual_of(jnp.asarray(time), us, args))
        told = jnp.ravel(equation.residual)
        nearest = told[jnp.argmin(jnp.abs(told - expected[:, None]), axis=1)]
        law = f"{name}: where nothing is uncertain the residual is that of the equation at its time"
        equal(nearest, expected, law, 1e-9, 1e-12)
    m, p = equation.matrix.shape[-2:]
    hold(equation.residual.shape[-2] == m, f"{name}: matrix and residual have the same number of rows")
    hold(p <= layout.pack(stack).shape[-2], f"{name}: the matrix has no more columns than the state")
    if equation.gives is not None:
        law = f"{name}: where the equation gives derivatives the matrix ends with them, as a unit lower triangle"
        hold(p * len(equation.gives) == equation.gives.stop * m, law, f"{p} columns for gives={equation.gives}")
        own = equation.matrix[..., -m:]
        own = jnp.triu(own) if equation.is_coupled else own
        equal(own, jnp.broadcast_to(jnp.eye(m), own.shape), law, 1e-15)
    if first_order and layout.couples:
        residual = lambda x: linearise(constraint, jnp.asarray(t + 0.4), x.reshape(stack.shape)).residual[:, 0]  # noqa: E731
        derivative = jax.jacfwd(residual)(stack.ravel())[:, :p]
        equal(equation.matrix, derivative, f"{name}: the matrix is the derivative of the residual", 1e-8)
    narrow = layout_of(in_single(u0[0]), nu, factorisation)
    single = linearise(in_single(constraint), jnp.asarray(t, jnp.float32), stack.astype(jnp.float32), narrow)
    has_dtype(single, jnp.float32, f"{name}: a linearisation has the dtype of the state")
    survives(
        lambda c, x: jnp.ravel(linearise(c, x, stack).residual), constraint, jnp.asarray(t), "a linearisation, in time,"
    )
    span = 0.5

    def error(steps):
        solver = Solver(prior, constraint, factorisation=factorisation, calibration=NoCalibration())
        start = u0 if len(u0) > 1 else u0[0]
        mean = solver.solve_grid(start, np.linspace(0.0, span, steps + 1), args=args).mean
        return np.asarray(layout.ravel(jax.tree.map(lambda x: x[-1], mean)))

    coarse, middle, fine = (error(steps) for steps in (8, 16, 32))
    rate = np.log2(np.max(np.abs(coarse - middle)) / max(np.max(np.abs(middle - fine)), 1e-14))
    size = np.max(np.abs(coarse - middle))
    law = f"{name}: solutions converge as steps get shorter, with order one at least"
    hold(size < 1e-10 or rate > 0.9, law, f"order {rate:.1f}")


def check_problem(problem: AbstractProblem, u0: Any, *, args: Any = None) -> None:
    """Raises ``LawBroken`` unless a problem can be evaluated at ``u0``, and ``TS1`` of it obeys ``check_constraint``.

    Among these laws: ``first_order`` returns the residual at the time passed, and its derivative. ``u0``: an initial
    value, a PyTree; a tuple ``(u, u', ...)`` for an equation of higher order. ``args``: parameters of the equation.
    Raises ``TypeError`` for another kind of part, and what ``problem.check`` raises.
    """
    require_double()
    require_kind(problem, AbstractProblem)
    values = problem.split(u0)
    known = problem.num_initial_values
    hold(len(values) == known, f"{type(problem).__name__}: as many initial values as it says", f"{len(values)}")
    problem.check(jnp.asarray(0.3), values, args)
    check_constraint(TS1(problem), u0, args=args, first_order=True)


def check_strategy(strategy: AbstractStrategy) -> None:
    """Raises ``LawBroken`` unless a strategy returns the smoothing, or the filtering, distributions.

    Those of ``FixedIntervalSmoother`` if ``remember`` returns anything, else those of ``Filter``: on a grid, and at
    times between adaptive steps. Steps do not depend on the strategy, and solves with it work under the transformations
    of JAX. Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(strategy, AbstractStrategy)
    name = type(strategy).__name__
    hold(isinstance(strategy.keeps_steps, bool), f"{name}: keeps_steps is True or False")
    kept = Normal(jnp.zeros((3, 1)), jnp.eye(3))
    smooths = strategy.remember(kept) is not None
    solver = lambda s: Solver(IWP(2), TS1(ODE(_field)), strategy=s)  # noqa: E731
    reference = solver(FixedIntervalSmoother() if smooths else Filter())
    for call, law in (
        (lambda s: s.solve_grid(_U0, _GRID), "on a grid"),
        (lambda s: s.solve(_U0, 0.0, 1.0, save_at=np.array([0.03, 0.5, 1.0])), "between adaptive steps"),
    ):
        own, expected = call(solver(strategy)), call(reference)
        kind = "what the whole solve tells" if smooths else "what the past tells"
        equal(own.mean, expected.mean, f"{name}: the mean {law} is {kind}", 1e-9)
        equal(own.std, expected.std, f"{name}: the standard deviation {law} is {kind}", 1e-6)
        hold(own.stats["num_steps"] == expected.stats["num_steps"], f"{name}: the steps do not depend on the strategy")
    survives(lambda s, x: solver(s).solve_grid(_U0 * x, _GRID).mean[3], strategy, jnp.asarray(1.1), "a solve with it")


def check_calibration(calibration: AbstractCalibration, *, scale_free: bool = True) -> None:
    """Raises ``LawBroken`` unless a calibration returns valid output scales.

    - Scales are positive, and final factors not negative, with the shape of the batch.
    - Statistics have the same structure after each step, and do not change in a step whose residual is round-off,
      unless ``remembers`` is true.
    - If ``scale_free``, mean and calibrated standard deviation do not depend on the prior's own output scale.
    - Single precision is kept, and calibrated solves work under the transformations of JAX.

    ``scale_free``: false for calibrations that keep the prior's scale, as ``NoCalibration``. Raises ``TypeError`` for
    another kind of part.
    """
    require_double()
    require_kind(calibration, AbstractCalibration)
    name, rng = type(calibration).__name__, np.random.default_rng(0)
    for factorisation in (Dense(), BlockDiagonal(), Isotropic()):
        layout = layout_of(_U0, 2, factorisation)
        shape = layout.batch_shape
        statistics = calibration.init(shape, layout.dtype)
        transition = IWP(2).transition(jnp.asarray(0.1), layout)
        predicted = Normal(layout.pack(jnp.asarray(rng.normal(size=(3, 2)))), jnp.zeros_like(transition.noise))
        equation = TS0(ODE(_field)).linearise(jnp.asarray(0.1), predicted, layout, None)
        unit = jnp.broadcast_to(transition.magnitude, shape)
        innovation = innovate(equation, transition.noise, unit)
        scale = calibration.scale(innovation, statistics)
        hold(jnp.shape(scale) == shape, f"{name}: a scale for every element of the batch", f"{jnp.shape(scale)}")
        hold(scale > 0, f"{name}: scales are positive")
        seen = scale / unit, innovation.whitened
        after = calibration.update(statistics, *seen, jnp.asarray(True))
        blind = calibration.update(statistics, *seen, jnp.asarray(False))
        law = f"{name}: a step that says nothing changes no statistics"
        if not calibration.remembers:
            for a, b in zip(jax.tree.leaves(blind), jax.tree.leaves(statistics), strict=True):
                equal(a, b, law, 0.0)
        same = jax.tree.structure(after) == jax.tree.structure(statistics)
        hold(same, f"{name}: statistics keep their structure from step to step")
        hold(calibration.scale(innovation, after) > 0, f"{name}: scales are positive")
        factor = calibration.finalise(after)
        hold(factor is None or jnp.shape(factor) == shape, f"{name}: the final factor is None, or one for each element")
        hold(factor is None or factor >= 0, f"{name}: the final factor is not negative")

    def solve(scale, calibration=calibration, dtype=float):
        prior = IWP(2, output_scale=scale)
        solver = Solver(prior, TS1(ODE(_field)), calibration=calibration)
        return solver.solve_grid(_U0.astype(dtype), _GRID)

    one, other = solve(1.0), solve(7.0)
    if scale_free:
        law = f"{name}: the calibrated uncertainty does not depend on the scale of the prior"
        equal(other.std, one.std, law, 1e-7)
        equal(other.mean, one.mean, f"{name}: neither does the mean", 1e-9)
    hold(one.output_scale > 0, f"{name}: the output scale of a solution is positive")
    has_dtype(solve(1.0, dtype=jnp.float32).marginals, jnp.float32, f"{name} keeps single precision")
    law = "a calibrated standard deviation"
    survives(
        lambda c, x: 1e3 * Solver(IWP(2), TS1(ODE(_field)), calibration=c).solve_grid(_U0 * x, _GRID).std[4],
        calibration,
        jnp.asarray(1.1),
        law,
        differentiable=not getattr(calibration, "stop_gradient", False),
    )


def check_error(error: AbstractErrorEstimate) -> None:
    """Raises ``LawBroken`` unless an error estimate returns errors of ``u`` that vanish with the step.

    - Errors have the shape ``(d,)`` and the units of ``u``, are not negative, and decrease faster than ``dt^1.5``; time
      may run backwards.
    - The norm is homogeneous, zero at zero alone, and at most 1/2 for errors of half the tolerance.
    - Single precision is kept, and estimates work under the transformations of JAX.

    Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(error, AbstractErrorEstimate)
    name = type(error).__name__
    x = jnp.array([0.3, -2.0, 1.0])
    equal(error.norm(3 * x), 3 * error.norm(x), f"{name}: the norm is homogeneous", 1e-12)
    hold(error.norm(x) > 0 and error.norm(0 * x) == 0, f"{name}: the norm is zero at zero alone")
    hold(error.norm(jnp.full(3, 0.5)) <= 0.5 + 1e-12, f"{name}: errors of half the tolerance are good enough")

    def estimate(error, dt, scale=1.0, dtype=float):
        layout, dt = layout_of(_U0.astype(dtype), 2, Dense()), jnp.asarray(dt, dtype)
        return error.estimate(example_attempt(dt, scale=scale), dt, layout)

    coarse, fine = estimate(error, 0.2), estimate(error, 0.02)
    hold(jnp.shape(coarse) == (2,), f"{name}: an error for every component of u", f"shape {jnp.shape(coarse)}")
    hold(coarse >= 0, f"{name}: errors are not negative")
    rate = float(jnp.log10(error.norm(coarse) / error.norm(fine)))
    hold(rate > 1.5, f"{name}: a step ten times shorter has a much smaller error", f"order {rate:.1f}")
    equal(estimate(error, 0.2, 5.0), 5 * coarse, f"{name}: errors have the units of u", 1e-8)
    hold(estimate(error, -0.02) > 0, f"{name}: time may run backwards")
    has_dtype(estimate(error, 0.1, dtype=jnp.float32), jnp.float32, f"{name} keeps single precision")
    survives(estimate, error, jnp.asarray(0.1), "an error estimate")


def check_controller(controller: AbstractController) -> None:
    """Raises ``LawBroken`` unless a controller accepts and proposes steps as the solvers need it.

    - Errors up to one are accepted, larger ones rejected; a rejection is followed by a shorter step.
    - Proposals are positive and finite, proportional to the step, and not longer for a larger error.
    - Its state has the same structure, shapes and dtypes after each attempt.
    - A simple solve reaches its end; single precision is kept; proposals work under the transformations of JAX.

    Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(controller, AbstractController)
    name = type(controller).__name__
    start = controller.init(jnp.dtype(float))
    propose = lambda norm, state=start, dt=0.1: controller.propose(  # noqa: E731
        jnp.asarray(dt), jnp.asarray(norm, float), 4, state
    )
    state = start
    for norm in (0.5, 0.9, 3.0, 0.2, 0.0, np.inf, 0.7):
        accept, dt, after = propose(norm, state)
        hold(
            jnp.isfinite(dt) & (dt > 0), f"{name}: a proposal is positive and finite", f"{dt} after an error of {norm}"
        )
        hold(bool(accept) == (norm <= 1), f"{name}: errors up to one are accepted, larger ones are not", f"{norm}")
        hold(norm <= 1 or dt < 0.1, f"{name}: after a rejection the step gets shorter", f"{dt} after 0.1")
        hold(
            jax.tree.structure(after) == jax.tree.structure(start)
            and all(
                jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
                for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(start), strict=True)
            ),
            f"{name}: the state keeps structure, shapes and dtypes",
        )
        state = after
    lengths = [float(propose(norm)[1]) for norm in (1e-6, 1e-2, 0.5, 1.0, 2.0, 1e3)]
    hold(lengths == sorted(lengths, reverse=True), f"{name}: a larger error is not followed by a longer step")
    equal(propose(0.5, dt=0.2)[1], 2 * propose(0.5)[1], f"{name}: proposals are in units of the step", 1e-12)
    single = controller.propose(jnp.float32(0.1), jnp.float32(0.5), 4, controller.init(jnp.dtype("float32")))
    has_dtype(single[1], jnp.float32, f"{name} keeps single precision")
    solver = Solver(IWP(2), TS1(ODE(_field)), controller=controller)
    survives(
        lambda c, x: jnp.atleast_1d(c.propose(x, jnp.asarray(0.5), 4, c.init(x.dtype))[1]),
        controller,
        jnp.asarray(0.1),
        "a proposal",
    )
    solution = solver.solve(_U0, 0.0, 1.0, throw=False)
    hold(solution.t[-1] == 1.0, f"{name}: a simple solve arrives", f"it stopped at {solution.t[-1]}")


def check_loop(loop: AbstractLoop) -> None:
    """Raises ``LawBroken`` unless a loop repeats its body while the condition holds, at most ``max_steps`` times.

    The final carry, and what was written to buffers, have to be those of the iterations. The limit is tested for
    ``max_steps`` up to 1000. Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(loop, AbstractLoop)
    name = type(loop).__name__
    size = min(loop.max_steps, 8)

    def run(loop, x, until=5):
        def body(carry):
            i, x, buffer = carry
            return i + 1, jnp.sin(x), buffer.at[i % size].set(x)

        init = jnp.zeros((), int), x, jnp.zeros(size)
        return loop.run(lambda carry: carry[0] < until, body, init, buffers=lambda carry: carry[2])

    steps = min(5, loop.max_steps)
    number, value, buffer = jax.jit(run)(loop, jnp.asarray(0.7))
    expected = [0.7]
    for _ in range(steps):
        expected.append(np.sin(expected[-1]))
    hold(number == steps, f"{name}: the body runs as long as the condition holds", f"{number} times, not {steps}")
    equal(value, expected[-1], f"{name}: what the body returns is passed on", 1e-12)
    equal(buffer[: min(steps, size)], expected[: min(steps, size)], f"{name}: buffers keep what is written", 1e-12)
    if loop.max_steps <= 1000:
        number = jax.jit(lambda loop: run(loop, jnp.asarray(0.7), 10**6)[0])(loop)
        law = f"{name}: it ends after max_steps iterations at the latest"
        hold(number == loop.max_steps, law, f"{number}")


def check_progress(progress: AbstractProgress) -> None:
    """Raises ``LawBroken`` unless a progress meter has a positive number of ``marks`` and leaves solves unchanged.

    ``report`` is called with the fractions 0, 1/2 and 1. Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(progress, AbstractProgress)
    name = type(progress).__name__
    hold(isinstance(progress.marks, int) and progress.marks > 0, f"{name}: marks is a positive integer")
    for fraction in (0.0, 0.5, 1.0):
        progress.report(fraction)
    solver = Solver(IWP(2), TS1(ODE(_field)))
    told, alone = (solver.solve(_U0, 0.0, 1.0, progress=meter).mean for meter in (progress, None))
    equal(told, alone, f"{name}: a solve is the same with it as without", 1e-12)
    jax.effects_barrier()


def check_initialisation(initialisation: AbstractInitialisation) -> None:
    """Raises ``LawBroken`` unless an initialisation keeps the initial value and is not certain of what is wrong.

    - The state is finite; its mean has the initial value, without variance.
    - Derivatives without variance are those of the solution, at the time passed.
    - Single precision is kept, and initial states work under the transformations of JAX.

    Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(initialisation, AbstractInitialisation)
    name, problem = type(initialisation).__name__, ODE(_field)

    def start(initialisation, x, factorisation=Dense(), dtype=float):
        u0 = jnp.asarray(_U0 * x, dtype)
        layout = layout_of(u0, 3, factorisation)
        return initialisation.initialise(problem, jnp.asarray(0.2, dtype), u0[None], layout, None), layout

    for factorisation in (Dense(), BlockDiagonal(), Isotropic()):
        state, layout = start(initialisation, 1.0, factorisation)
        finite(state, f"{name}: the state is finite")
        stack = layout.unpack(state.mean)
        equal(stack[0], _U0, f"{name}: the initial value is kept", 1e-14)
        exact = layout.unpack(
            TaylorMode().initialise(problem, jnp.asarray(0.2), jnp.asarray(_U0)[None], layout, None).mean
        )
        std = layout.std(state.factor) if state.factor.shape[-2] else jnp.zeros_like(stack)
        hold(std[0] == 0, f"{name}: the initial value is certain")
        certain = np.asarray(std) == 0
        law = f"{name}: derivatives that are said to be certain are those of the equation, at its time"
        equal(np.where(certain, stack, 0), np.where(certain, exact, 0), law, 1e-10)
    single, _ = start(initialisation, 1.0, dtype=jnp.float32)
    has_dtype(single, jnp.float32, f"{name} keeps single precision")
    survives(lambda i, x: jnp.ravel(start(i, x)[0].mean), initialisation, jnp.asarray(1.2), "the start")


def check_cubature(cubature: AbstractCubature) -> None:
    """Raises ``LawBroken`` unless a cubature rule has the moments of a standard normal up to degree three.

    Weights are positive. Rules for one, two and three dimensions are tested. Raises ``TypeError`` for another kind of
    part.
    """
    require_double()
    require_kind(cubature, AbstractCubature)
    name = type(cubature).__name__
    for dim in (1, 2, 3):
        points, weights = (np.asarray(x) for x in cubature.rule(dim))
        hold(points.shape == (weights.size, dim), f"{name}: points are (points, dim)", f"{points.shape}")
        hold(weights > 0, f"{name}: weights are positive")
        equal(np.sum(weights), 1.0, f"{name}: weights sum to one", 1e-12)
        equal(weights @ points, np.zeros(dim), f"{name}: the mean is zero", atol=1e-12)
        second = (points.T * weights) @ points
        equal(second, np.eye(dim), f"{name}: the covariance is the identity", 1e-12)
        third = np.einsum("p,pi,pj,pk->ijk", weights, points, points, points)
        equal(third, np.zeros((dim,) * 3), f"{name}: third moments are zero", atol=1e-10)


def check_jacobian(jacobian: AbstractJacobian, field: Callable, u0: Any, *, exact: bool = True) -> None:
    """Raises ``LawBroken`` unless ``evaluate`` returns the value of a field and its Jacobian, or what is kept of it.

    - ``field``: called as ``field(t, u, args)`` with ``args=None``, a field for which ``jacobian`` is meant.
    - ``u0``: an array, at which it is evaluated.
    - ``exact``: whether the values of the Jacobian are compared, too; false for estimates.

    The Jacobian is checked under all factorisations, and for single precision. Raises ``TypeError`` for another kind of
    part.
    """
    require_double()
    require_kind(jacobian, AbstractJacobian)
    name, u0 = type(jacobian).__name__, jnp.asarray(u0, float)
    fn = lambda t, us: field(t, us[0], None)  # noqa: E731
    for factorisation in (Dense(), BlockDiagonal(), Isotropic()):
        layout = layout_of(u0, 2, factorisation)
        for t in (0.3, 0.9):
            value, own = jacobian.evaluate(fn, jnp.asarray(t), u0[None], layout, None)
            equal(value, field(t, u0, None), f"{name}: the value is that of the equation at its time", 1e-12)
            whole = jax.jacfwd(lambda u, t=t: field(t, u, None))(u0)
            expected = layout.project(whole)
            kept = layout.project(own[0])
            hold(kept.shape == expected.shape, f"{name}: a Jacobian for each derivative", f"{own.shape}")
            if exact:
                equal(kept, expected, f"{name}: the Jacobian is that of the equation at its time", 1e-9, 1e-12)
    single = layout_of(u0.astype(jnp.float32), 2, Dense())
    out = in_single(jacobian).evaluate(fn, jnp.float32(0.3), u0.astype(jnp.float32)[None], single, None)
    has_dtype(out, jnp.float32, f"{name} keeps single precision")
