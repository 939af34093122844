"""A clear error where forward mode meets an equation that has a reverse-mode derivative only (``jax.custom_vjp``)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..algebra.factorisations import Layout
from ..equations.problems import AbstractProblem, flat_field, flat_residual


@contextmanager
def naming_what_has_none(problem: AbstractProblem, layout: Layout, args: PyTree) -> Iterator[None]:
    """A context in which JAX's error for forward mode through a ``custom_vjp`` is a ``TypeError`` that names a remedy.

    The equation is tried alone: if it can be differentiated in forward mode, something else was meant, and JAX's own
    error is raised.
    """
    try:
        yield
    except (TypeError, NotImplementedError, ValueError) as error:
        if not _is_meant(error):
            raise
        if not _equation_has_one(problem, layout, args):
            name = "vector field" if problem.is_explicit else "residual"
            raise TypeError(
                f"The {name} cannot be differentiated in forward mode, because it uses a function with a "
                "jax.custom_vjp, a derivative for reverse mode alone. TS1 and SLR1 "
                "need forward mode, jax.jvp, jax.jacfwd and an uncertain u0 as well, and TaylorMode() where an "
                "operation has no rule for Taylor series. Define the derivative by jax.custom_jvp instead; or pass the "
                "Jacobian, ODE(f, jacobian=lambda t, u, args: ...); or use TS0(ODE(f)), with "
                "initialisation=Diffuse(1) if it is TaylorMode() that fails."
            ) from error
        raise


def _is_meant(error):
    # ``custom_lin`` is the operation that JAX makes of the first derivative, and which has no second one.
    return "custom_vjp" in str(error) or "custom_lin" in str(error)


def _equation_has_one(problem, layout, args):
    zeros = jnp.zeros((problem.num_initial_values if problem.is_explicit else problem.order + 1, layout.size))

    def value(given):
        problem, us, args = given
        flat = flat_field if problem.is_explicit else flat_residual
        return flat(problem, layout, args)(jnp.zeros((), layout.dtype), us)

    return _has_derivative(value, (problem, zeros.astype(layout.dtype), args))


def _has_derivative(fn: Callable, x: Any) -> bool:
    """Whether a function can be differentiated in forward mode with respect to all numbers in ``x``."""

    def tangents(x):
        moving, still = eqx.partition(x, eqx.is_inexact_array)
        push = lambda v: eqx.filter_jvp(lambda moving: fn(eqx.combine(moving, still)), (moving,), (v,))[1]  # noqa: E731
        # JAX raises its error not yet for the derivative, but for whatever is done with it.
        return jax.vmap(push)(jax.tree.map(lambda v: v[None], moving))

    try:
        eqx.filter_eval_shape(tangents, x)
    except Exception as error:
        return not _is_meant(error)
    return True
