"""Equations in other coordinates, as the logarithms of what is positive, and their posterior in the first ones."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..algebra.linalg import safe_sqrt
from ..algebra.marginals import Moments, Posterior
from ..algebra.normal import Normal
from ..equations.problems import ODE
from .solution import Solution


_NAMED = {"log": (jnp.log, jnp.exp), "logit": (jax.scipy.special.logit, jax.nn.sigmoid)}
# Of the rule of Gauss and Hermite: moments of a logarithm with a standard deviation of one are then right to 1e-9.
_NODES = 20


class Transformed(eqx.Module):
    """An ODE for ``v = to(u)``, as ``transformed`` returns it, and the way back.

    - ``ode``: the equation for ``v``, to be solved.
    - ``to``, ``back``: the coordinates and their inverse, functions of PyTrees.
    - ``is_elementwise``: whether each number of ``u`` depends on its own number of ``v`` alone.

    >>> import probode
    >>> decay = probode.transformed(probode.ODE(lambda t, u, args: -u), "log")
    >>> decay.start(1.0)
    Array(0., dtype=float64, weak_type=True)
    """

    ode: ODE
    to: Callable
    back: Callable
    is_elementwise: bool = eqx.field(static=True)

    def start(self, u0: PyTree) -> PyTree:
        """The initial value for ``ode``: ``v``, or the tuple ``(v, v', ...)`` of that of an equation of higher order.

        Raises ``TypeError`` for a ``Normal``.
        """
        if isinstance(u0, Normal):
            raise TypeError(
                "start(u0) takes a certain u0: a Normal over v is made as probode.Normal(start(mean), ...)."
            )
        if self.ode.order == 1:
            return self.to(u0)
        return tuple(_along(self.to, list(u0)))

    def moments(self, posterior: Solution | Posterior) -> Moments:
        """Means and standard deviations of ``u`` from the posterior of ``v``, at its times.

        ``posterior``: a ``Solution`` of ``ode``, or what its ``evaluate`` returns. Where ``is_elementwise`` they are
        integrals over each component (by 20 nodes: to 1e-9 for a standard deviation of one in a logarithm); otherwise
        those of the linearised ``back`` about the mean.
        """
        known = posterior.derivative(0)
        if self.is_elementwise:
            nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
            weights = weights / np.sum(weights)
            values = [self.back(jax.tree.map(lambda m, s, z=z: m + z * s, known.mean, known.std)) for z in nodes]
            mean = jax.tree.map(lambda *us: sum(w * u for w, u in zip(weights, us, strict=True)), *values)
            squares = lambda mean, *us: sum(w * (u - mean) ** 2 for w, u in zip(weights, us, strict=True))  # noqa: E731
            return Moments(mean, jax.tree.map(lambda mean, *us: safe_sqrt(squares(mean, *us)), mean, *values))
        covariance = posterior.covariance
        one = self._linearised
        for _ in range(covariance.ndim - 2):
            one = jax.vmap(one)
        return Moments(*one(known.mean, covariance))

    def _linearised(self, v, covariance):
        flat, unravel = ravel_pytree(v)
        u, as_u = ravel_pytree(self.back(v))
        slope = jax.jacfwd(lambda flat: ravel_pytree(self.back(unravel(flat)))[0])(flat)
        return as_u(u), as_u(safe_sqrt(jnp.einsum("ij,jk,ik->i", slope, covariance, slope)))

    def interval(self, posterior: Solution | Posterior, std: float = 2.0) -> tuple[PyTree, PyTree]:
        """Lower and upper ends of ``back(mean -+ std * standard deviation)``, which have the probabilities of a normal.

        They stay where ``u`` can be, as above zero. Raises ``ValueError`` unless ``is_elementwise``.
        """
        if not self.is_elementwise:
            raise ValueError("interval needs coordinates of every number alone: transformed(..., elementwise=True).")
        known = posterior.derivative(0)
        ends = [self.back(jax.tree.map(lambda m, s, z=z: m + z * s, known.mean, known.std)) for z in (-std, std)]
        return jax.tree.map(jnp.minimum, *ends), jax.tree.map(jnp.maximum, *ends)


def transformed(ode: Any, to: Any, back: Any = None, *, elementwise: Any = True) -> Transformed:
    """The ``Transformed`` equation for ``v = to(u)``: solve its ``ode`` from its ``start(u0)``.

    In the logarithm a solution stays positive, and its uncertainty does; in the logit it stays between zero and one.
    The tolerances of the solve are those of ``v``: ``atol`` of a logarithm is a relative tolerance of ``u``.

    - ``ode``: an ``ODE`` of any order.
    - ``to``: ``"log"``, ``"logit"``, or a function of an array; with ``elementwise=False`` of the whole ``u``, as to
      polar coordinates. ``back``: its inverse, for a function.
    - ``elementwise``: whether ``to`` and ``back`` are applied to each leaf of ``u``, number by number.

    Raises ``TypeError`` for another problem than an ``ODE`` and functions that cannot be called, ``ValueError`` for an
    unknown name, and a name with ``back``.

    >>> import jax.numpy as jnp, probode
    >>> decay = probode.transformed(probode.ODE(lambda t, u, args: -u), "log")
    >>> solver = probode.Solver(probode.IWP(3), probode.TS1(decay.ode))
    >>> solution = solver.solve(decay.start(1.0), 0.0, 20.0)
    >>> print(f"{decay.moments(solution).mean[-1] / jnp.exp(-20.0):.6f}")
    1.000000
    """
    if not isinstance(ode, ODE):
        raise TypeError(f"transformed(ode) must be a probode.ODE, got {ode!r}.")
    if isinstance(to, str):
        if to not in _NAMED or back is not None:
            raise ValueError(
                f"transformed(to) must be a function or one of {sorted(_NAMED)}, without back, got {to!r}."
            )
        to, back = _NAMED[to]
    for name, fn in (("to", to), ("back", back)):
        if not callable(fn):
            raise TypeError(f"transformed({name}) must be a function, got {fn!r}.")
    if elementwise:
        to, back = _Leafwise(to), _Leafwise(back)
    return Transformed(ODE(_Field(ode.vector_field, to, back, ode.order), order=ode.order), to, back, elementwise)


class _Leafwise(eqx.Module):
    """A function of arrays applied to each leaf."""

    fn: Callable

    def __call__(self, tree: PyTree) -> PyTree:
        return jax.tree.map(self.fn, tree)


class _Field(eqx.Module):
    """The vector field for ``v``, called as that of an ODE of the same order."""

    field: Callable
    to: Callable
    back: Callable
    order: int = eqx.field(static=True)

    def __call__(self, t: Float[Array, ""], *rest: PyTree) -> PyTree:
        *vs, args = rest
        us = _along(self.back, vs)
        return _along(self.to, [*us, self.field(t, *us, args)])[-1]


def _along(fn, curve):
    """``fn(x)`` and its time derivatives, as many as ``curve = [x, x', ...]`` has."""

    def value(s):
        def at(*xs):
            return sum((x * s**j / math.factorial(j) for j, x in enumerate(xs[1:], start=1)), xs[0])

        return fn(jax.tree.map(at, *curve))

    found = []
    for _ in curve:
        found.append(value(jnp.zeros((), jnp.result_type(*jax.tree.leaves(curve[0])))))
        value = jax.jacfwd(value)
    return found
