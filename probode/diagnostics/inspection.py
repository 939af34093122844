"""What the kept steps of a solve say about its error: residuals inside of steps, and how errors grow.

All is computed in one compiled pass over the steps, from their means alone where possible: it costs a few evaluations
of the vector field in every step, all of them at once, and no elimination of a covariance.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from ..algebra.linalg import product, solve
from ..algebra.normal import certain, push
from ..equations.problems import ODE, flat_field
from ..posterior.trajectory import Trajectory
from ..stepping.controllers import Tolerances
from ..util.tracing import compiled


# The error of a step, as a share of what the tolerances allow, is at least and at most this.
_LEAST, _MOST = 0.05, 0.3


class Inspection(eqx.Module):
    """Measures of the kept states and of the steps between them, each with a time axis.

    - ``u``, ``std``: means and standard deviations of all components at the ends of steps, ``(rows, d)``.
    - ``rate``: means of the derivative that the equation gives there, ``(rows, d)``.
    - ``weight``: the error that the tolerances allow there, ``(rows, d)``.
    - ``defect``: the error that the residual of the prediction at a time would cause if it lasted for the whole step,
      over the one that is allowed, ``(points,)``.
    - ``seen``: the same at the ends of steps, where the solver has evaluated the equation, ``(steps,)``.
    - ``whitened``: the residuals there over the standard deviations that the prediction gives them, ``(steps, d)``;
      ``None`` where every step is calibrated by its own residual, which it then explains.
    - ``jacobian``: of the equation as a system of first order, at the ends of steps, ``(rows, p, p)``; ``None`` where
      it is too large.
    - ``growth``: standard deviations of the errors that the steps have made so far, as the linearised equation has them
      grow, ``(rows, d)``; ``None`` without a Jacobian.
    """

    u: Float[Array, "rows d"]
    std: Float[Array, "rows d"]
    rate: Float[Array, "rows d"]
    weight: Float[Array, "rows d"]
    defect: Float[Array, " points"]
    seen: Float[Array, " steps"]
    whitened: Float[Array, "steps d"] | None
    jacobian: Float[Array, "rows p p"] | None
    growth: Float[Array, "rows d"] | None


@compiled
def inspect(
    path: Trajectory,
    ode: ODE | None,
    tolerances: Tolerances,
    args: PyTree,
    most: int,
    points: tuple[Int[Array | np.ndarray, " points"], Float[Array | np.ndarray, " points"]],
    jacobians: bool,
    is_frozen: bool,
    is_local: bool,
) -> Inspection:
    """The ``Inspection`` of the first ``most`` kept states of a solve.

    - ``path``: the kept states; those behind the last step repeat it.
    - ``ode``: the equation, ``None`` if it is of another kind: then residuals are zero; ``args``: its parameters.
    - ``tolerances``: those of the solve, with a number for every component where they differ.
    - ``points``: where the equation is evaluated: the number of a step, and the time since its start.
    - ``jacobians``: whether Jacobians are computed, and the growth of errors with them.
    - ``is_frozen``: whether the solver's own covariances do not know the Jacobian.
    - ``is_local``: whether every step is calibrated by its own residual.
    """
    k = 1 if ode is None else ode.order
    t, distribution, output_scale = path.rows.t[:most], path.rows.distribution, path.rows.output_scale

    def state(i):
        layout = path.layout_of(i)
        us = layout.unpack(distribution.mean[i])
        matrix = _system(ode, t[i], us[:k], layout, args) if jacobians else None
        return us[0], layout.std(distribution.factor[i])[0], us[k], matrix

    u, std, rate, matrices = jax.vmap(state)(jnp.arange(most))
    weight = tolerances.weight(jnp.abs(u))
    dt = t[1:] - t[:-1]
    if ode is None:
        return Inspection(u, std, rate, weight, jnp.zeros_like(points[1]), jnp.zeros_like(dt), None, None, None)

    def predicted(i, since):
        # A transition over a length of zero is singular.
        transition = path.prior_of(i + 1).transition(jnp.where(since == 0, 1, since), path.layout_of(i))
        return path.layout_of(i).unpack(push(certain(distribution.mean[i]), transition.matrix).mean), transition

    def residual(i, since):
        us, transition = predicted(i, since)
        return us[k] - flat_field(ode, path.layout_of(i), args)(t[i] + since, us[:k]), transition

    def error(i, since):
        left, _ = residual(i, since)
        change = left * dt[i] ** k if inverse is None else dt[i] * (inverse[i, : left.size, -left.size :] @ left)
        allowed = jnp.maximum(jnp.maximum(weight[i], weight[i + 1]), jnp.finfo(dt.dtype).tiny)
        return jnp.where(since == 0, 0, jnp.max(jnp.abs(change) / allowed))

    def whiten(i):
        layout, (left, transition) = path.layout_of(i), residual(i, dt[i])
        scale = output_scale[i + 1] * transition.magnitude
        noise = layout.std(jnp.reshape(scale, (*jnp.shape(scale), 1, 1)) * transition.noise)
        before = jax.tree.map(lambda x: x[i], distribution)
        variances = noise**2 + layout.std(push(before, transition.matrix).factor) ** 2
        variance = variances[k]
        if matrices is not None:
            variance = variance + jnp.square(matrices[i][-left.size :]) @ variances[:k].ravel()
        return jnp.where((dt[i] == 0) | (variance == 0), 0, left / jnp.sqrt(jnp.where(variance == 0, 1, variance)))

    ends = jnp.arange(most - 1)
    inverse = growth = None
    if matrices is not None:
        allowed = jnp.maximum(weight[1:], weight[:-1])
        made = _MOST * allowed
        if is_frozen:
            # Where the equation is frozen in each step, covariances grow by what the step adds, and by nothing else.
            made = jnp.clip(jnp.sqrt(jnp.maximum(std[1:] ** 2 - std[:-1] ** 2, 0)), _LEAST * allowed, made)
        inner = lambda i: _system(ode, t[i] + dt[i] / 3, predicted(i, dt[i] / 3)[0][:k], path.layout_of(i), args)  # noqa: E731
        growth, inverse = _growth(matrices, jax.vmap(inner)(ends), dt, std[0], made)
    defect, seen = jax.vmap(error)(*points), jax.vmap(error)(ends, dt)
    whitened = None if is_local else jax.vmap(whiten)(ends)
    return Inspection(u, std, rate, weight, defect, seen, whitened, matrices, growth)


def _system(ode, t, us, layout, args):
    """The Jacobian of the system for ``(u, ..., u^(k-1))`` at a time and a state ``(k, d)``, as a matrix."""
    jacobian = jax.jacfwd(flat_field(ode, layout, args), argnums=1)(t, us)
    d, k, _ = jacobian.shape
    shift = jnp.eye(k * d, k=d, dtype=jacobian.dtype)
    return shift.at[(k - 1) * d :].set(jnp.reshape(jacobian, (d, k * d)))


def _growth(at_ends, at_third, dt, first, made):
    """The standard deviations of errors that grow with the equation: ``first`` at the start, ``made`` in every step.

    An error goes through a step by Radau's method with two stages, at a third and at the end of the step, which damps
    what decays fast (Hairer & Wanner 1996, "Solving ordinary differential equations II", IV.5). Also the matrices of an
    implicit step of Euler's method, ``(steps, p, p)``: what is stiff takes a prediction back at once.
    """
    d = first.size
    identity, diagonal = jnp.eye(at_ends.shape[1], dtype=dt.dtype), jnp.arange(d)

    def matrices(here, one, two, dt):
        here, one, two = dt * here, dt * one, dt * two
        inner = solve(identity - 5 / 12 * one, one)
        through = solve(identity - two / 4 + product(inner, two) / 16, identity + 3 / 4 * inner)
        return through, solve(identity - here, identity)

    def advance(covariance, x):
        through, made = x
        covariance = product(product(through, covariance), through.T).at[diagonal, diagonal].add(made**2)
        return covariance, jnp.diagonal(covariance)[:d]

    through, inverse = jax.vmap(matrices)(at_ends[:-1], at_third, at_ends[1:], dt)
    start = jnp.zeros_like(identity).at[diagonal, diagonal].set(first**2)
    _, variances = lax.scan(advance, start, (through, made))
    return jnp.sqrt(jnp.concatenate([first[None] ** 2, variances])), inverse
