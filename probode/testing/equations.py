"""Conformance checks of what evaluates and linearises equations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ..algebra.factorisations import BlockDiagonal, Dense, Isotropic, layout_of
from ..algebra.normal import Normal
from ..equations.jacobians import AbstractJacobian
from ..equations.problems import AbstractProblem
from ..estimation.calibration import NoCalibration
from ..information.constraints import TS1, AbstractConstraint
from ..information.regression import AbstractCubature
from ..priors.iwp import IWP
from ..solver import Solver
from .laws import equal, finite, has_dtype, hold, in_single, require_double, require_kind, survives, works


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
    - Under ``Dense``, the matrix is nearer to the derivative of the residual than its transpose is, and than a matrix
      without entries for what the equation does not give. If it is said to be ``whole``, it is the derivative to 5 %.
      A constraint whose flag ``first_order`` is false has no such entries, any other has some. With the argument
      ``first_order`` the matrix is the derivative.
    - The residual of a constraint that ``is_pointwise`` does not depend on the covariance of the state.
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
    problem = constraint.problem
    name = f"{type(constraint).__name__}({type(problem).__name__})"
    nu = constraint.order + 1
    prior = IWP(nu)
    u0 = u0 if problem.num_initial_values > 1 else (u0,)
    layout = layout_of(jax.tree.map(lambda x: jnp.asarray(x, float), u0[0]), nu, factorisation)
    rng = np.random.default_rng(0)
    known = jnp.stack([layout.ravel(u) for u in u0])
    stack = jnp.concatenate([known, 0.3 * jnp.asarray(rng.normal(size=(nu + 1 - known.shape[0], layout.size)))])

    def linearise(constraint, t, stack, layout=layout, std=0.0):
        factor = layout.lift(std * jnp.eye(nu + 1, dtype=layout.dtype), 1.0)
        return constraint.linearise(t, Normal(layout.pack(stack), factor), layout, args)

    _check_shapes(name, lambda: linearise(constraint, jnp.asarray(t), stack), layout)
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
    if equation.gives is not None:
        law = f"{name}: where the equation gives derivatives the matrix ends with them, as a unit lower triangle"
        hold(p * len(equation.gives) == equation.gives.stop * m, law, f"{p} columns for gives={equation.gives}")
        own = equation.matrix[..., -m:]
        own = jnp.triu(own) if equation.is_coupled else own
        equal(own, jnp.broadcast_to(jnp.eye(m), own.shape), law, 1e-15)
    if layout.couples:
        later = jnp.asarray(t + 0.4)
        residual = lambda x: linearise(constraint, later, x.reshape(stack.shape)).residual[:, 0]  # noqa: E731
        derivative = jax.jacfwd(residual)(stack.ravel())[:, :p]
        # A little uncertain, since some fit their matrix to the field nearby.
        uncertain = linearise(constraint, later, stack, std=1e-4)
        _check_jacobian_of(constraint, name, uncertain, derivative, layout.size)
        if constraint.is_pointwise:
            law = f"{name}: where is_pointwise is true the residual is that at the mean, however uncertain the state is"
            # Correlated: means of products of independent numbers are the products of the means.
            root = jnp.asarray(0.5 * rng.normal(size=(stack.size, stack.size)))
            wide = constraint.linearise(later, Normal(layout.pack(stack), root), layout, args)
            equal(wide.residual, uncertain.residual, law, 1e-9, 1e-12)
        if first_order:
            law = f"{name}, t={t + 0.4:g}: the matrix is the derivative of the residual"
            equal(equation.matrix, derivative, law, 1e-8)
    narrow = layout_of(in_single(u0[0]), nu, factorisation)
    single = linearise(in_single(constraint), jnp.asarray(t, jnp.float32), stack.astype(jnp.float32), narrow)
    has_dtype(single, jnp.float32, f"{name}: a linearisation has the dtype of the state")
    survives(
        lambda c, x: jnp.ravel(linearise(c, x, stack).residual),
        constraint,
        jnp.asarray(t),
        "a linearisation as a function of time",
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


def _check_shapes(name, linearise, layout):
    """Checks that a linearisation can be made, and has arrays of fitting shapes."""
    words = (
        "the residual is packed, (*batch, m, cols) beside a matrix (*batch, m, p). Linearisation.explicit and "
        "Linearisation.general pack a flat residual, of shape (d,) or (m,), which is not unravelled to a PyTree"
    )
    law = f"{name}: linearise returns a Linearisation; {words}"

    def shapes():
        equation = linearise()
        return jnp.shape(equation.matrix), jnp.shape(equation.residual)

    matrix, residual = works(shapes, law)
    unit = layout.pack(jnp.zeros((1, layout.size), layout.dtype)).shape
    batch, cols, columns = unit[:-2], unit[-1], layout.lift(jnp.eye(layout.num_derivatives + 1), 1.0).shape[-1]
    fits = len(matrix) == len(unit) and matrix[:-2] == batch and residual == (*batch, matrix[-2], cols)
    hold(fits, law, f"a matrix of shape {matrix} and a residual of shape {residual}")
    hold(matrix[-1] <= columns, f"{name}: the matrix has no more columns than the state", f"{matrix[-1]} > {columns}")


def _check_jacobian_of(constraint, name, equation, derivative, d):
    """Checks the matrix of an equation, under ``Dense``, for what it does not give: is it near to the derivative?"""
    m, p = equation.matrix.shape
    known = p if equation.gives is None else p - m
    own, true = np.asarray(equation.matrix)[:, :known], np.asarray(derivative)[:, :known]
    off, size = float(np.linalg.norm(own - true)), float(np.linalg.norm(true))
    if m % d == 0 and known % d == 0:
        blocks = true.reshape(m // d, d, known // d, d)
        flipped = np.linalg.norm(own - np.swapaxes(blocks, 1, 3).reshape(true.shape))
        law = f"{name}: the matrix is the derivative of the residual, d z_i / d u_j in row i and column j"
        # Up to what uncertainty changes in a fit.
        hold(flipped > 1e-2 * size or off < 2e-2 * size, law, "its transpose")
    if not constraint.first_order:
        law = f"{name}: where first_order is False the matrix does not depend on u; leave first_order as it is"
        hold(own[:, : constraint.order * d] == 0, law, "entries for u, or for derivatives below the highest")
    law = f"{name}: the matrix is nearer to the derivative of the residual than one that has no entries for u"
    found = f"a relative deviation of {off / max(size, 1e-300):.1e}, in {true.dtype}"
    hold(off <= (1 + 1e-3) * size, law, found)
    if constraint.first_order and size > 0:
        law = f"{name}: where first_order is true the matrix has entries for u; set first_order = False"
        hold(np.linalg.norm(own) > 1e-3 * size, law, "none")
        law = f"{name}: a Linearisation that is whole has the derivative of the residual, to 5 %; pass whole=False"
        hold(not equation.whole or off <= 0.05 * size, law, found)


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


def check_cubature(cubature: AbstractCubature) -> None:
    """Raises ``LawBroken`` unless a cubature rule has the moments of a standard normal up to degree three.

    Weights are positive. Rules for one, two, three and five dimensions are tested. Raises ``TypeError`` for another
    kind of part.
    """
    require_double()
    require_kind(cubature, AbstractCubature)
    name = type(cubature).__name__
    for dim in (1, 2, 3, 5):
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

    - ``field``: called as ``field(t, u, args)`` with ``args=None``, a field for which ``jacobian`` is meant; for an
      equation of order ``k`` as ``field(t, u, u', ..., args)``.
    - ``u0``: an array, at which it is evaluated; of order ``k`` a tuple ``(u, u', ...)`` of ``k`` arrays.
    - ``exact``: whether the values of the Jacobian are compared, too; false for estimates.

    The Jacobian is checked under all factorisations, and for single precision. Raises ``TypeError`` for another kind of
    part.
    """
    require_double()
    require_kind(jacobian, AbstractJacobian)
    name, us = type(jacobian).__name__, jnp.stack([jnp.asarray(u, float) for u in _as_tuple(u0)])
    fn = lambda t, us: field(t, *us, None)  # noqa: E731
    for factorisation in (Dense(), BlockDiagonal(), Isotropic()):
        layout = layout_of(us[0], 2, factorisation)
        for t in (0.3, 0.9):
            value, own = jacobian.evaluate(fn, jnp.asarray(t), us, layout, None)
            equal(value, fn(t, us), f"{name}: the value is that of the equation at its time", 1e-12)
            whole = jnp.moveaxis(jax.jacfwd(lambda us, t=t: fn(t, us))(us), 1, 0)
            expected = jax.vmap(layout.project)(whole)
            law = f"{name}: a Jacobian for each of u, u', ... of which the field is a function"
            hold(len(own) == len(us), law, f"{len(own)}, not {len(us)}")
            kept = jnp.stack([layout.project(jacobian) for jacobian in own])
            hold(kept.shape == expected.shape, law, f"{jnp.shape(own)}")
            if exact:
                equal(kept, expected, f"{name}: the Jacobian is that of the equation at its time", 1e-9, 1e-12)
    single = layout_of(us[0].astype(jnp.float32), 2, Dense())
    out = in_single(jacobian).evaluate(fn, jnp.float32(0.3), us.astype(jnp.float32), single, None)
    has_dtype(out, jnp.float32, f"{name} keeps single precision")


def _as_tuple(u0):
    return u0 if isinstance(u0, tuple) else (u0,)
