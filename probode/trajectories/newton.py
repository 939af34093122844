"""Newton's method for a course on a mesh, damped so that it also converges from far away.

A step is shortened until the next one, with the same derivatives, is smaller than this one. That test does not depend
on how the equations are scaled (Deuflhard 2004, "Newton methods for nonlinear problems", 3.1; Ascher, Mattheij &
Russell 1995, "Numerical solution of boundary value problems for ordinary differential equations", 8.1).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..algebra.linalg import choose, is_finite
from .chain import is_singular
from .collocation import Course, Equations, Mesh


# The shortest part of a step that is tried, and how many steps there may be.
_SHORTEST, _MOST = 1e-5, 40
# Bounds on the smallest pivot divided by the largest (`Chain.conditioning`); where the conditions determine a solution
# it is above 1e-6. Below this one the equations, which are inexact, may be singular: so a failed run is reported.
_NEARLY = 1e-8
# Below this one a condition follows from the others: the search for a mesh stops.
_SINGULAR = 1e-12
# A Newton step this small, in tolerances, is the last; so is a whole one after which the next would be this small.
_SMALL = 1e-4


class Scales(eqx.Module):
    """The tolerances in which the size of a Newton step is measured: those of ``u``, at its largest on the mesh.

    Parameters have the mean tolerances of the components of ``u``, at their own values.
    """

    rtol: Float[Array, "*d"]
    atol: Float[Array, "*d"]

    def tolerance(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The error that is allowed of values whose last axis is that of the components."""
        atol, rtol = (jnp.broadcast_to(x, u.shape) for x in (self.atol, self.rtol))
        return atol + rtol * jnp.abs(u)

    def norm(self, step: Course, course: Course, mesh: Mesh) -> Float[Array, ""]:
        """The root mean square of a step in these units."""
        real = mesh.is_node[:, None]
        u = jnp.where(real, course.states[:, 0], 0)
        largest = jnp.broadcast_to(jnp.max(jnp.abs(u), axis=0)[None], u.shape)
        moved = jnp.where(real, step.states[:, 0], 0) / self.tolerance(largest)
        total, number = jnp.sum(moved**2), (mesh.number + 1) * u.shape[1]
        if step.parameters.size:
            # Parameters have no tolerances of their own: they are given the means of those of u.
            rtol, atol = jnp.mean(self.rtol), jnp.mean(self.atol)
            total = total + jnp.sum((step.parameters / (atol + rtol * jnp.abs(course.parameters))) ** 2)
            number = number + step.parameters.size
        return jnp.sqrt(total / number.astype(total.dtype))


class Converged(NamedTuple):
    """Where Newton's method has ended, after how many steps, and whether it converged.

    Otherwise whether its last equations were singular, or nearly so, and whether they were numbers.
    """

    course: Course
    success: Bool[Array, ""]
    singular: Bool[Array, ""]
    nearly_singular: Bool[Array, ""]
    finite: Bool[Array, ""]
    iterations: Int[Array, ""]


class _Running(NamedTuple):
    course: Course
    damping: Float[Array, ""]
    iterations: Int[Array, ""]
    done: Bool[Array, ""]
    failed: Bool[Array, ""]
    singular: Bool[Array, ""]
    nearly_singular: Bool[Array, ""]
    finite: Bool[Array, ""]


def newton(equations: Equations, mesh: Mesh, guess: Course, scales: Scales) -> Converged:
    """The course on which the equations hold, from a guess."""

    def body(now):
        system = equations.linearised(mesh, now.course)
        residuals = equations.residuals(mesh, now.course)
        finite = is_finite((residuals, system.basis, system.lift))
        step = system.step(residuals)
        size = scales.norm(step, now.course, mesh)

        def best(damping, rest):
            # The length up to which the linearisation is good enough, by how far it was off at this one.
            return size * damping**2 / (2 * jnp.maximum(rest, jnp.finfo(size.dtype).tiny))

        def attempt(x):
            damping, tried, _, _, rest, _ = x
            shorter = best(damping, rest)
            shorter = jnp.where(jnp.isfinite(shorter), jnp.clip(shorter, damping / 10, damping / 2), damping / 4)
            damping = jnp.where(tried, shorter, damping)
            trial = jax.tree.map(lambda x, dx: x + damping * dx, now.course, step)
            following = system.step(equations.residuals(mesh, trial))
            rest = jax.tree.map(lambda a, b: a - (1 - damping) * b, following, step)
            norms = (scales.norm(x, now.course, mesh) for x in (following, rest))
            return damping, jnp.array(True), trial, *norms, following

        def is_too_long(x):
            damping, tried, _, following, _, _ = x
            good = (following <= (1 - damping / 4) * size) | ((size <= _SMALL) & jnp.isfinite(following))
            return ~tried | (~good & (damping > _SHORTEST) & jnp.isfinite(size))

        infinite = jnp.full_like(size, jnp.inf)
        init = now.damping, jnp.array(False), now.course, infinite, infinite, step
        damping, _, trial, following, rest, next_ = lax.while_loop(is_too_long, attempt, init)
        longer = best(damping, rest)
        small = (size <= _SMALL) | ((damping == 1) & (following <= _SMALL))
        # The next step has been computed already.
        trial = choose(damping == 1, jax.tree.map(jnp.add, trial, next_), trial)
        failed = ~jnp.isfinite(following) | ((damping <= _SHORTEST) & ~small)
        return _Running(
            choose(failed, now.course, trial),
            jnp.clip(longer, 0.1 * damping, 1),
            now.iterations + 1,
            small & ~failed,
            failed,
            is_singular(system.chain, _SINGULAR) & finite,
            is_singular(system.chain, _NEARLY),
            finite,
        )

    one, no = jnp.ones((), mesh.t.dtype), jnp.array(False)
    init = _Running(guess, one, jnp.zeros((), jnp.int32), no, no, no, no, ~no)
    end = lax.while_loop(lambda now: ~(now.done | now.failed) & (now.iterations < _MOST), body, init)
    return Converged(end.course, end.done, end.singular, end.nearly_singular, end.finite, end.iterations)
