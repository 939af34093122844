"""Problems and finite differences that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import probode as po
from probode.algebra import conditioning
from probode.testing.laws import difference_quotient


FACTORISATIONS = (po.Dense(), po.BlockDiagonal(), po.Isotropic())
CONSTRAINTS = (po.TS0, po.TS1)


def logistic(t, u, args):
    return 0.5 * u * (1 - u)


def lotka_volterra(t, u, args):
    a, b, c, d = (0.5, 0.05, 0.5, 0.05) if args is None else args
    return jnp.stack([a * u[0] - b * u[0] * u[1], -c * u[1] + d * u[0] * u[1]])


def pendulum(t, u, du, args):
    return -jnp.sin(u) + 0.1 * jnp.cos(t)


def first_of(*cases):
    """The first of many cases in every run; the others, other configurations of it, in the sessions of nox."""
    return [cases[0], *left_to_nox(*cases[1:])]


def left_to_nox(*cases):
    """Cases that only the sessions of nox run."""
    cases = (case if type(case) is tuple else (case,) for case in cases)
    return [pytest.param(*case, marks=pytest.mark.thorough) for case in cases]


def name(part):
    return type(part).__name__ if not isinstance(part, type) else part.__name__


def relative(x, reference):
    """Largest deviation relative to the largest entry of the reference."""
    x, reference = np.asarray(x), np.asarray(reference)
    return np.max(np.abs(x - reference)) / np.max(np.abs(reference))


def equations(jaxpr):
    """All operations of a program, those of loops, branches and inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def central_differences(fn, x, step=1e-5):
    """Jacobian of a vector function of a vector by fourth-order central differences, columns along the last axis."""
    columns = []
    for i in range(x.size):
        e = np.zeros(x.size)
        e[i] = 1
        columns.append(difference_quotient(lambda h, e=e: fn(x + h * e), step * max(1.0, abs(float(x[i])))))
    return np.stack(columns, axis=-1)


def check_jacobians(fn, x, atol=1e-8):
    """Forward and reverse mode of a vector function against central differences."""
    expected = central_differences(jax.jit(fn), x, 1e-4)
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(fn))(x), expected, rtol=1e-6, atol=atol)


def covariance(factor):
    """``factor^T factor`` over any leading axes."""
    return jnp.swapaxes(factor, -1, -2) @ factor


def condition(x, noise, scale, equation, past=None):
    """Predict and condition in one go."""
    return conditioning.condition(conditioning.join(x, noise, scale, equation, past), x, equation, past)
