"""What is solved: differential equations of any order on PyTree states, explicit or implicit.

Users write functions on their own PyTrees; the solvers see them on one stack of real vectors, ``us`` of shape
``(derivatives, d)``, as an equation ``z(t, us) = 0`` with ``m`` rows.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..algebra.conditioning import Linearisation
from ..algebra.factorisations import Layout
from ..util.checks import as_integer
from .jacobians import AbstractJacobian, ExactJacobian, as_jacobian


def _jacobian_field() -> Any:
    return eqx.field(default=ExactJacobian(), kw_only=True, converter=as_jacobian)


class AbstractProblem(eqx.Module):
    """An equation about ``u`` and its derivatives up to ``order``; a constraint linearises it.

    A subclass has the field ``order`` and defines ``check``, ``first_order`` and ``residual_of``.

    >>> import probode
    >>> isinstance(probode.ODE(lambda t, u, args: -u), probode.AbstractProblem)
    True
    """

    order: eqx.AbstractVar[int]

    @property
    def num_initial_values(self) -> int:
        """How many of ``u, u', ...`` the initial value holds."""
        return max(self.order, 1)

    @abstractmethod
    def check(self, t0: Float[Array, ""], values: tuple[PyTree, ...], args: PyTree):
        """Raises unless the equation can be evaluated at the initial value, without running it."""

    @abstractmethod
    def first_order(
        self, t: Float[Array, ""], us: Float[Array, "derivatives d"], layout: Layout, args: PyTree
    ) -> Linearisation:
        """The equation with its derivative at a point."""

    @abstractmethod
    def residual_of(self, t: Float[Array, ""], us: tuple[PyTree, ...], args: PyTree) -> PyTree:
        """What is zero where the equation holds, from ``us = (u, u', ..., u^(order))``."""

    def lifted(self, levels: Any) -> "Residual":
        """The equation and its first ``levels`` time derivatives, as one ``Residual`` of order ``order + levels``.

        All of it is exact along a solution, so it tells a state of high order more than the equation alone: the steps
        are more accurate, and a bit dearer. Raises ``ValueError`` for a negative number.
        """
        levels = as_integer(levels, "lifted(levels)", 0)
        return Residual(_Lifted(self, levels), order=self.order + levels)

    def split(self, u0: PyTree) -> tuple[PyTree, ...]:
        """The initial value as the tuple ``(u, u', ..., u^(k-1))``; checks structure, shapes and dtypes."""
        known = self.num_initial_values
        if known == 1:
            values = (u0,)
        elif isinstance(u0, tuple) and len(u0) == known:
            values = u0
        else:
            raise ValueError(
                f"An equation of order {known} needs u0 = (u, u', ...), a tuple of {known} states, "
                f"got {type(u0).__name__}{f' of length {len(u0)}' if isinstance(u0, tuple) else ''}."
            )
        values = jax.tree.map(_as_state, values)
        if sum(leaf.size for leaf in jax.tree.leaves(values[0])) == 0:
            raise ValueError("u0 has no numbers in it: there is nothing to solve for.")
        for i, value in enumerate(values[1:], start=1):
            _require_like(value, values[0], f"entry {i} of u0", "entry 0 of u0")
        return values


class ODE(AbstractProblem):
    """``u^(k) = f(t, u, u', ..., u^(k-1), args)`` with ``k = order``.

    ``vector_field`` is a function or an ``eqx.Module`` called as ``f(t, u, args)`` for ``order=1``, as
    ``f(t, u, du, args)`` for ``order=2``, and so on; it returns a PyTree like ``u``. For ``order >= 2`` the initial
    value is the tuple ``(u, u', ..., u^(k-1))``. ``jacobian``: how linearisations of first order find the derivative of
    the field, exactly by default, or a function ``jacobian(t, u, args)``: see ``GivenJacobian``. Raises ``TypeError``
    if one of them cannot be called, ``ValueError`` unless ``order`` is a positive integer.

    >>> import jax.numpy as jnp, probode
    >>> pendulum = probode.ODE(lambda t, u, du, args: -jnp.sin(u), order=2)
    >>> pendulum.order
    2
    """

    vector_field: Callable
    order: int = eqx.field(static=True, default=1, kw_only=True, converter=lambda k: as_integer(k, "ODE(order)", 1))
    jacobian: AbstractJacobian = _jacobian_field()

    def __check_init__(self):
        if not callable(self.vector_field):
            raise TypeError(f"ODE(vector_field) must be callable as f(t, u, args), got {self.vector_field!r}.")

    def check(self, t0, values, args):
        name = f"The vector field of an ODE of order {self.order}"
        _require_signature(self.vector_field, name, "f", t0, values, args)
        out = eqx.filter_eval_shape(self.vector_field, t0, *values, args)
        _require_like(out, values[0], "the vector field's output", "u0")

    def residual_of(self, t, us, args):
        f = self.vector_field(t, *us[: self.order], args)
        return jax.tree.map(jnp.subtract, us[self.order], f)

    def zeroth_order(
        self, t: Float[Array, ""], us: Float[Array, "derivatives d"], layout: Layout, args: PyTree
    ) -> Linearisation:
        """The equation with the vector field frozen at a point."""
        k = self.order
        residual = us[k] - flat_field(self, layout, args)(t, us[:k])
        return Linearisation.explicit(layout, [None] * k, residual, whole=False)

    def first_order(self, t, us, layout, args):
        k = self.order
        f, jacobian = self.jacobian.evaluate(flat_field(self, layout, args), t, us[:k], layout, args)
        return Linearisation.explicit(layout, list(jacobian), us[k] - f)


class Residual(AbstractProblem):
    """``r(t, u, u', ..., u^(k), args) = 0`` with ``k = order``: implicit and differential-algebraic equations,
    invariants, or whatever else is known to hold.

    ``residual`` is a function or an ``eqx.Module`` called as ``r(t, u, du, args)`` for ``order=1``, as
    ``r(t, u, args)`` for ``order=0``; it returns a PyTree of real arrays, as many equations as there are numbers in it.
    The initial value is ``u``, or the tuple ``(u, ..., u^(k-1))`` from ``order=2`` on, and should satisfy the equation
    together with some next derivative. Where the output has not as many numbers as ``u``, solve with ``Dense()``; under
    ``BlockDiagonal()`` the i-th equation is taken to be about the i-th component. The equation is used at the steps;
    between them a filter predicts by the prior alone. ``jacobian`` as for ``ODE``: with respect to
    ``(u, ..., u^(k))``. Raises ``TypeError`` if the residual cannot be called, ``ValueError`` for a negative ``order``.

    >>> import probode
    >>> circle = probode.Residual(lambda t, u, args: u @ u - 1, order=0)
    >>> circle.order
    0
    """

    residual: Callable
    order: int = eqx.field(
        static=True, default=1, kw_only=True, converter=lambda k: as_integer(k, "Residual(order)", 0)
    )
    jacobian: AbstractJacobian = _jacobian_field()

    def __check_init__(self):
        if not callable(self.residual):
            raise TypeError(f"Residual(residual) must be callable as r(t, u, du, args), got {self.residual!r}.")

    @property
    def num_initial_values(self):
        return self.residual.num_initial_values if isinstance(self.residual, _Lifted) else max(self.order, 1)

    def residual_of(self, t, us, args):
        return self.residual(t, *us[: self.order + 1], args)

    def check(self, t0, values, args):
        values = (values * (self.order + 1))[: self.order + 1]
        _require_signature(self.residual, f"A residual of order {self.order}", "r", t0, values, args)
        leaves = jax.tree.leaves(eqx.filter_eval_shape(self.residual, t0, *values, args))
        if not all(hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
            raise TypeError("The residual must return a PyTree of real, floating-point arrays.")
        if sum(x.size for x in leaves) == 0:
            raise ValueError("The residual returns no numbers: there is nothing to solve.")

    def first_order(self, t, us, layout, args):
        us = us[: self.order + 1]
        value, jacobian = self.jacobian.evaluate(flat_residual(self, layout, args), t, us, layout, args)
        return Linearisation.general(layout, list(jacobian), value)


class _Lifted(eqx.Module):
    """A problem's residual and its time derivatives along a curve through ``(u, u', ...)``."""

    problem: AbstractProblem
    levels: int = eqx.field(static=True)

    @property
    def num_initial_values(self):
        return self.problem.num_initial_values

    def __call__(self, t, *us_and_args):
        *us, args = us_and_args

        def differentiate(fn):
            def derivative(t, us):
                # As time passes every derivative moves in the direction of the next.
                velocity = (jnp.ones_like(t), tuple(us[1:]))
                return jax.jvp(fn, (t, tuple(us[:-1])), velocity)[1]

            return derivative

        fn, values = lambda t, us: self.problem.residual_of(t, us, args), []
        for level in range(self.levels + 1):
            values.append(fn(t, tuple(us[: self.problem.order + level + 1])))
            fn = differentiate(fn)
        return values


def flat_field(ode: ODE, layout: Layout, args: PyTree) -> Callable:
    """The vector field of an ODE as a function of flat arrays.

    Returns ``f(t, us)``, where ``us``, of shape ``(order, d)``, holds ``u, u', ...`` and the value has the shape
    ``(d,)``.

    >>> import jax.numpy as jnp, probode
    >>> ode = probode.ODE(lambda t, u, args: {"x": u["y"], "y": -u["x"]})
    >>> layout = probode.Solver(probode.IWP(2), probode.TS1(ode)).init({"x": 1.0, "y": 0.0}, 0.0).layout
    >>> probode.flat_field(ode, layout, None)(jnp.array(0.0), jnp.array([[1.0, 2.0]]))
    Array([ 2., -1.], dtype=float64)
    """

    def field(t: Float[Array, ""], us: Float[Array, "order d"]) -> Float[Array, " d"]:
        return layout.ravel(ode.vector_field(t, *(layout.unravel(u) for u in us), args))

    return field


def flat_residual(problem: AbstractProblem, layout: Layout, args: PyTree) -> Callable:
    """The residual as ``r(t, us)`` on a stack ``us`` of shape ``(order+1, d)``, returning ``(m,)``."""

    def residual(t: Float[Array, ""], us: Float[Array, "derivatives d"]) -> Float[Array, " m"]:
        return layout.ravel(problem.residual_of(t, tuple(layout.unravel(u) for u in us), args))

    return residual


def _require_signature(fn, name, letter, t0, values, args):
    names = ["t", "u", "du", "ddu"][: len(values) + 1] if len(values) <= 3 else ["t", "u", "..."]
    try:
        inspect.signature(fn).bind(t0, *values, args)
    except TypeError as error:
        raise TypeError(f"{name} is called as {letter}({', '.join(names)}, args), but: {error}.") from None
    except ValueError:  # a builtin without a signature
        pass


def _as_state(x) -> Array:
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"u0 must hold real arrays, got {x!r}.") from None
    if x.dtype in (jnp.float16, jnp.bfloat16):
        raise TypeError(f"u0 has dtype {x.dtype}, which is too short for a solve: use float32 or float64.")
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(x, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError("u0 is complex. Solve for the real and the imaginary part, e.g. as a tuple of two real arrays.")
    raise TypeError(f"u0 has dtype {x.dtype}; states must be floating point, e.g. u0 = jnp.asarray(u0, float).")


def _require_like(x: PyTree, like: PyTree, name: str, like_name: str):
    structure, expected = jax.tree.structure(x), jax.tree.structure(like)
    if structure != expected:
        raise ValueError(f"{name} must have the structure of {like_name}: expected {expected}, got {structure}.")
    for leaf, model in zip(jax.tree.leaves(x), jax.tree.leaves(like), strict=True):
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if shape != jnp.shape(model):
            raise ValueError(f"{name} must have the shape of {like_name}: expected {jnp.shape(model)}, got {shape}.")
        weak = getattr(leaf, "weak_type", isinstance(leaf, float)) and jnp.issubdtype(dtype, jnp.floating)
        if dtype != jnp.result_type(model) and not weak:
            raise ValueError(
                f"{name} must have the dtype of {like_name}: expected {jnp.result_type(model)}, got {dtype}. "
                "Cast constants and args to the dtype of the state."
            )
