"""Conformance checks of how states are stored, started, remembered and calibrated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ..algebra.coordinates import Conditional
from ..algebra.factorisations import AbstractFactorisation, BlockDiagonal, Dense, Isotropic, layout_of
from ..algebra.innovation import innovate
from ..algebra.linalg import product
from ..algebra.normal import Normal, batched, push
from ..equations.problems import ODE
from ..estimation.calibration import AbstractCalibration, AbstractLeaveOneOut, NoCalibration
from ..estimation.initialisation import AbstractInitialisation, TaylorMode
from ..estimation.strategies import AbstractStrategy, Filter, FixedIntervalSmoother
from ..information.constraints import TS0, TS1
from ..priors.iwp import IWP
from ..solver import Solver
from .examples import GRID, U0, field, field_in
from .laws import equal, finite, has_dtype, hold, require_double, require_kind, survives


def check_factorisation(factorisation: AbstractFactorisation, *, d: int = 4) -> None:
    """Raises ``LawBroken`` unless a factorisation of ``d`` components stores states and covariances consistently.

    - ``unpack`` is the inverse of ``pack``, with ``batch_shape`` as leading axes; ``project`` is linear, keeps
      multiples of the identity, and keeps entries off the diagonal or drops them; ``lift`` gives all components the
      same covariance, or scales of their own if it takes them.
    - A linear map over the derivatives acts on all components alike.
    - Where components do not depend on each other, a smoother returns what it returns under ``Dense``. One that couples
      equations does so in a first step from a certain state, whatever the components depend on; one that adapts its
      directions after the step does so in the mean.
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
    scales = jnp.asarray(rng.uniform(0.5, 2.0, size=d))
    try:
        factor = layout.lift(jnp.asarray(root), scales)
    except ValueError:  # as of one that shares a covariance
        pass
    else:
        law = f"{name}: lift gives every component its own scale, and unpack_std returns them in the order of u"
        equal(layout.std(factor), dense.std(dense.lift(jnp.asarray(root), scales)), law, 1e-12)
    whole = push(Normal(dense.pack(stack), dense.lift(jnp.asarray(root), 2.0)), jnp.asarray(matrix))
    equal(layout.std(moved.factor), dense.std(whole.factor), law)
    slope = layout.project(0.7 * jnp.eye(d))
    equal(slope, 0.7 * layout.identity(), f"{name}: a Jacobian that is a multiple of the identity is kept", 1e-13)
    jacobian = jnp.asarray(rng.normal(size=(d, d)))
    law = f"{name}: project is linear"
    equal(layout.project(2 * jacobian - jnp.eye(d)), 2 * layout.project(jacobian) - layout.identity(), law, 1e-12)
    slope = layout.project(jacobian)
    along = [layout.unpack(batched(product)(slope, layout.pack(unit[None])))[0] for unit in jnp.eye(d)]
    kept, off = np.stack(along, axis=1), ~np.eye(d, dtype=bool)
    law = f"{name}: project keeps an entry of the Jacobian off the diagonal where it is, or drops it"
    equal(np.where(off & (kept != 0), kept - jacobian, 0), np.zeros((d, d)), law, atol=1e-13)
    u0 = jnp.linspace(0.5, 1.5, d)
    parts = {"calibration": NoCalibration(), "strategy": FixedIntervalSmoother()}
    solve = lambda f, u0=u0: Solver(  # noqa: E731
        IWP(1), TS1(ODE(lambda t, u, args: -0.7 * u)), factorisation=f, **parts
    ).solve_grid(u0, GRID)
    own, full = solve(factorisation), solve(Dense())
    law = f"{name}: where components do not depend on each other it gives what Dense() gives"
    equal(own.mean, full.mean, f"{law}, in the mean", 1e-10)
    equal(own.std, full.std, f"{law}, in the standard deviation", 1e-8)
    if factorisation.couples_equations:
        _check_coupling(factorisation, layout, stack, jacobian)
    has_dtype(solve(factorisation, u0.astype(jnp.float32)).marginals, jnp.float32, f"{name} keeps single precision")
    survives(lambda f, x: solve(f, u0 * x).mean[-1], factorisation, jnp.asarray(1.3), "a solve under it")


def _check_coupling(factorisation, layout, stack, jacobian):
    name = type(factorisation).__name__
    coupling = layout.factorisation.couple([jacobian])
    law = f"{name}: couple returns the derivative of u' - f with respect to u and u' of all blocks"
    expected = layout.pack((stack[1] - jacobian @ stack[0])[None])
    equal(coupling.times(layout.pack(stack[:2])), expected, law, 1e-12)
    ode = ODE(lambda t, u, args: jnp.asarray(jacobian, u.dtype) @ u + jnp.cos(t))
    solvers = [Solver(IWP(2), TS1(ode), factorisation=f) for f in (factorisation, Dense())]
    own, full = (solver.step(solver.init(stack[0], 0.0), 0.3) for solver in solvers)
    law = f"{name}: the first step from a certain state is that of Dense()"
    for k in range(3):
        equal(own.derivative(k).mean, full.derivative(k).mean, f"{law}, in the mean", 1e-10)
        if not factorisation.adapts:  # After a turn the state is that of the next step, without some correlations.
            equal(own.derivative(k).std, full.derivative(k).std, f"{law}, in the standard deviation", 1e-8)


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
    for shape in ((), (2,)):
        kept = Normal(jnp.zeros((*shape, 3, 1)), jnp.broadcast_to(jnp.eye(3), (*shape, 3, 3)))
        past = strategy.remember(kept)
        law = f"{name}: remember returns None, or the Conditional of the state given itself, Conditional.identity(kept)"
        hold(past is None or isinstance(past, Conditional), law, f"{type(past).__name__}, {past!r}")
        for part in () if past is None else ("shift", "cross", "noise"):
            own, expected = (jnp.shape(getattr(x, part)) for x in (past, Conditional.identity(kept)))
            hold(own == expected, law, f"{part} of shape {own} instead of {expected}")
    single = strategy.remember(Normal(jnp.zeros((3, 1), jnp.float32), jnp.eye(3, dtype=jnp.float32)))
    has_dtype(single, jnp.float32, f"{name} keeps single precision")
    smooths = past is not None
    # The smallest states, with one block for each component: what a strategy remembers has the shape of a batch.
    solver = lambda s: Solver(IWP(1), TS1(ODE(field)), factorisation=BlockDiagonal(), strategy=s)  # noqa: E731
    reference = solver(FixedIntervalSmoother() if smooths else Filter())
    for call, law in (
        (lambda s: s.solve_grid(U0, GRID), "on a grid"),
        (lambda s: s.solve(U0, 0.0, 1.0, save_at=np.array([0.03, 0.5, 1.0])), "between adaptive steps"),
    ):
        own, expected = call(solver(strategy)), call(reference)
        kind = "what the whole solve tells" if smooths else "what the past tells"
        equal(own.mean, expected.mean, f"{name}: the mean {law} is {kind}", 1e-9)
        equal(own.std, expected.std, f"{name}: the standard deviation {law} is {kind}", 1e-6)
        hold(own.stats["num_steps"] == expected.stats["num_steps"], f"{name}: the steps do not depend on the strategy")
    survives(lambda s, x: solver(s).solve_grid(U0 * x, GRID).mean[3], strategy, jnp.asarray(1.1), "a solve with it")


def check_calibration(
    calibration: AbstractCalibration, *, scale_free: bool = True, differentiable: bool = True
) -> None:
    """Raises ``LawBroken`` unless a calibration returns valid output scales.

    - Scales are positive, and final factors not negative, with the shape of the batch.
    - If ``scale_free``, output scales have the units of ``u``: they are standard deviations, not variances.
    - Statistics have the same structure after each step. Unless ``remembers`` is true, scales do not depend on them,
      and they do not change in a step whose residual is round-off.
    - If ``is_local``, scales grow with the residual of their step.
    - An ``AbstractLeaveOneOut`` counts only steps of weight one.
    - If ``scale_free``, mean and calibrated standard deviation do not depend on the prior's own output scale.
    - Single precision is kept, and calibrated solves work under the transformations of JAX.

    ``scale_free``: false for calibrations that keep the prior's scale, as ``NoCalibration``. ``differentiable``: false
    for those whose scales are constants in derivatives, as ``MLECalibration(stop_gradient=True)``. Raises ``TypeError``
    for another kind of part.
    """
    require_double()
    require_kind(calibration, AbstractCalibration)
    name, rng = type(calibration).__name__, np.random.default_rng(0)
    for factorisation in (Dense(), BlockDiagonal(), Isotropic()):
        layout = layout_of(U0, 2, factorisation)
        shape = layout.batch_shape
        statistics = calibration.init(shape, layout.dtype)
        transition = IWP(2).transition(jnp.asarray(0.1), layout)
        predicted = Normal(layout.pack(jnp.asarray(rng.normal(size=(3, 2)))), jnp.zeros_like(transition.noise))
        equation = TS0(ODE(field)).linearise(jnp.asarray(0.1), predicted, layout, None)
        unit = jnp.broadcast_to(transition.magnitude, shape)
        innovation = innovate(equation, transition.noise, unit)
        scale = calibration.scale(innovation, statistics)
        hold(jnp.shape(scale) == shape, f"{name}: a scale for every element of the batch", f"{jnp.shape(scale)}")
        hold(scale > 0, f"{name}: scales are positive")
        seen = scale / unit, innovation.whitened
        if calibration.is_local:
            far = dataclasses.replace(equation, residual=1e6 * equation.residual)
            grown = calibration.scale(innovate(far, transition.noise, unit), statistics)
            law = f"{name}: where is_local is true the scale of a step follows its residual"
            found = f"for one 1e6 times as large a scale {np.min(np.asarray(grown / scale)):.2g} times as large"
            hold(grown >= 1e3 * scale, law, found)
        after = calibration.update(statistics, *seen, jnp.asarray(True))
        blind = calibration.update(statistics, *seen, jnp.asarray(False))
        law = f"{name}: a step that says nothing changes no statistics"
        if not calibration.remembers:
            for a, b in zip(jax.tree.leaves(blind), jax.tree.leaves(statistics), strict=True):
                equal(a, b, law, 0.0)
        same = jax.tree.structure(after) == jax.tree.structure(statistics)
        hold(same, f"{name}: statistics keep their structure from step to step")
        hold(calibration.scale(innovation, after) > 0, f"{name}: scales are positive")
        if not calibration.remembers:
            law = f"{name}: where remembers is false scales do not depend on the statistics; set remembers = True"
            equal(calibration.scale(innovation, after), scale, law, 1e-12)
        if isinstance(calibration, AbstractLeaveOneOut):
            squares = jnp.asarray(rng.uniform(0.01, 0.1, size=(3, *shape)))
            more, ones = jnp.concatenate([squares, 100 + squares]), jnp.ones_like(squares)
            weights = jnp.concatenate([ones, 0 * ones])
            law = f"{name}: steps of weight zero do not count"
            given = calibration.finalise(calibration.leave_one_out(after, squares, ones))
            equal(calibration.finalise(calibration.leave_one_out(after, more, weights)), given, law, 1e-12)
        factor = calibration.finalise(after)
        hold(factor is None or jnp.shape(factor) == shape, f"{name}: the final factor is None, or one for each element")
        hold(factor is None or factor >= 0, f"{name}: the final factor is not negative")

    def solve(scale, units=1.0, dtype=float):
        solver = Solver(IWP(2, output_scale=scale), TS1(ODE(field_in)), calibration=calibration)
        return solver.solve_grid((units * U0).astype(dtype), GRID, args=jnp.asarray(units, dtype))

    one, other = solve(1.0), solve(7.0)
    if scale_free:
        # The start has not been calibrated. Where nothing has been, the next law tells.
        larger = np.asarray(solve(1.0, units=8.0).output_scale[1:] / one.output_scale[1:])
        law = f"{name}: for c u instead of u the output scale is c times as large: a standard deviation, not a variance"
        finite(larger, law)
        what = f"for c=8 one that is c^{np.mean(np.log(larger)) / np.log(8):.2g} times as large"
        if not np.all(larger == 1):
            equal(larger, np.full_like(larger, 8.0), law, 1e-6, what=what)
        law = f"{name}: the calibrated uncertainty does not depend on the scale of the prior"
        equal(other.std, one.std, law, 1e-7)
        equal(other.mean, one.mean, f"{name}: neither does the mean", 1e-9)
    hold(one.output_scale > 0, f"{name}: the output scale of a solution is positive")
    has_dtype(solve(1.0, dtype=jnp.float32).marginals, jnp.float32, f"{name} keeps single precision")
    law = "a calibrated standard deviation"
    survives(
        lambda c, x: 1e3 * Solver(IWP(1), TS1(ODE(field)), calibration=c).solve_grid(U0 * x, GRID).std[4],
        calibration,
        jnp.asarray(1.1),
        law,
        differentiable=differentiable,
    )


def check_initialisation(initialisation: AbstractInitialisation) -> None:
    """Raises ``LawBroken`` unless an initialisation keeps the initial value and is not certain of what is wrong.

    - The state is finite; its mean has the initial value without variance. Its factor has at most as many rows as
      columns. Of an equation of order two ``u'`` belongs to the initial value; one that is for the first order alone
      raises ``ValueError``.
    - Derivatives without variance are those of the solution, at the time passed; others are off by at most twenty
      standard deviations.
    - Single precision is kept, and initial states work under the transformations of JAX.

    Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(initialisation, AbstractInitialisation)
    name = type(initialisation).__name__
    first, second = ODE(field), ODE(lambda t, u, du, args: field(t, u, args) - 0.3 * du, order=2)

    def start(initialisation, x, factorisation=Dense(), dtype=float, problem=first):
        us = jnp.asarray(x, dtype) * jnp.asarray([U0, U0[::-1]], dtype)[: problem.order]
        layout = layout_of(us[0], 3, factorisation)
        return initialisation.initialise(problem, jnp.asarray(0.2, dtype), us, layout, None), layout

    for problem, factorisation in ((first, Dense()), (first, BlockDiagonal()), (first, Isotropic()), (second, Dense())):
        try:
            state, layout = start(initialisation, 1.0, factorisation, problem=problem)
        except ValueError:
            if problem is first:
                raise
            continue  # It says that it is not for such equations.
        finite(state, f"{name}: the state is finite")
        rows, dim = state.factor.shape[-2:]
        hold(rows <= dim, f"{name}: the factor has at most as many rows as columns", f"{rows} > {dim}")
        stack, known = layout.unpack(state.mean), problem.order
        words = f"{name}, for an equation of order {known}"
        exact = layout.unpack(start(TaylorMode(), 1.0, factorisation, problem=problem)[0].mean)
        equal(stack[:known], exact[:known], f"{words}: the initial value is kept", 1e-14)
        stds = np.asarray(layout.std(state.factor) if rows else jnp.zeros_like(stack))
        hold(stds[:known] == 0, f"{words}: the initial value is certain")
        certain = stds == 0
        law = f"{words}: derivatives that are said to be certain are those of the equation, at its time"
        equal(np.where(certain, stack, 0), np.where(certain, exact, 0), law, 1e-10)
        off = np.max(np.abs(np.asarray(stack - exact)) / np.where(certain, np.inf, stds))
        law = f"{words}: derivatives are those of the equation, up to twenty standard deviations"
        hold(off <= 20, law, f"{off:.2g} standard deviations")
    single, _ = start(initialisation, 1.0, dtype=jnp.float32)
    has_dtype(single, jnp.float32, f"{name} keeps single precision")
    survives(lambda i, x: jnp.ravel(start(i, x)[0].mean), initialisation, jnp.asarray(1.2), "the start")
