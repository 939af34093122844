"""Problems: differential equations of any order on PyTree states, explicit or implicit.

Users write functions of their own PyTrees; the solvers evaluate them on one stack of real vectors, ``us`` of shape
``(derivatives, d)``, as an equation ``z(t, us) = 0`` with ``m`` rows.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..algebra.linearisation import Linearisation
from ..util.checks import as_integer
from .calls import output_of, require_like
from .jacobians import AbstractJacobian, ExactJacobian, as_jacobian
from .taylor.derivatives import derivatives_along, unrolled_derivatives


def _jacobian_field() -> Any:
    return eqx.field(default=ExactJacobian(), kw_only=True, converter=as_jacobian)


class AbstractProblem(eqx.Module):
    """An equation for ``u`` and its derivatives up to ``u^(order)``; a constraint linearises it.

    A subclass has the field ``order`` and defines ``check``, ``first_order`` and ``residual_of``. It may set, as class
    attributes or properties:

    - ``is_explicit``: whether the equation is solved for ``u^(k)``, ``k = num_initial_values``, so that initial values
      determine the solution; false by default. If true, the subclass also has ``vector_field``, called as
      ``vector_field(t, u, ..., u^(k-1), args)``: initial derivatives, events and resets are computed from it.
    - ``num_initial_values``: how many derivatives the initial value consists of; by default ``order``, at least one.
    - ``num_linearised``: how many derivatives may enter nonlinearly, over which ``SLR1`` averages; by default
      ``order + 1``.
    - ``num_rows``: for how many derivatives the equation is solved; by default one.

    >>> import probode
    >>> isinstance(probode.ODE(lambda t, u, args: -u), probode.AbstractProblem)
    True
    """

    order: eqx.AbstractVar[int]
    is_explicit = False

    @property
    def num_initial_values(self) -> int:
        """How many of the derivatives ``u, u', ...``, the zeroth included, the initial value consists of."""
        return max(self.order, 1)

    @property
    def num_linearised(self) -> int:
        """How many of the derivatives ``u, u', ...``, the zeroth included, may enter the equation nonlinearly."""
        return self.order + 1

    @abstractmethod
    def check(self, t0: Float[Array, ""], values: tuple[PyTree, ...], args: PyTree) -> None:
        """Raises ``TypeError`` or ``ValueError`` unless the equation can be evaluated at the initial value.

        ``values``: the initial value as ``split`` returns it. Shapes and dtypes are traced, and nothing is computed.
        """

    @abstractmethod
    def first_order(
        self, t: Float[Array, ""], us: Float[Array, "derivatives d"], layout: Layout, args: PyTree
    ) -> Linearisation:
        """The Taylor linearisation of first order at the time ``t`` and the derivatives ``us``."""

    @abstractmethod
    def residual_of(self, t: Float[Array, ""], us: tuple[PyTree, ...], args: PyTree) -> PyTree:
        """The residual, a PyTree that is zero where the equation holds, at ``us = (u, u', ..., u^(order))``."""

    @property
    def num_rows(self) -> int:
        """How many derivatives of ``u`` the equation is solved for, each with as many equations; one for all others."""
        return 1

    def lifted(self, levels: Any) -> "AbstractProblem":
        """The equation and its first ``levels`` time derivatives, which hold along a solution as well, as one equation.

        For an ``ODE`` a ``Lifted``, which gives the derivatives ``u^(order), ..., u^(order + levels)``; otherwise a
        ``Residual`` of order ``order + levels``. Conditioning on them makes the steps longer; the prior needs
        ``num_derivatives >= order + levels``. Raises ``ValueError`` unless ``levels`` is an integer from zero on.
        """
        levels = as_integer(levels, "lifted(levels)", 0)
        if isinstance(self, ODE):
            return Lifted(self, levels)  # type: ignore[call-arg]  # its order is a property
        return Residual(_Derivatives(self, levels), order=self.order + levels)

    def split(self, u0: PyTree) -> tuple[PyTree, ...]:
        """The initial value as the tuple ``(u, u', ..., u^(k-1))`` of ``k = num_initial_values`` PyTrees.

        Raises ``ValueError`` for another number of them or different structures, shapes and dtypes, ``TypeError`` for
        values that are not real floating-point arrays.
        """
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
            require_like(value, values[0], f"entry {i} of u0", "entry 0 of u0")
        return values


class ODE(AbstractProblem):
    """The explicit ordinary differential equation ``u^(k) = f(t, u, u', ..., u^(k-1), args)`` with ``k = order``.

    - ``vector_field``: a function or an ``eqx.Module``, called as ``f(t, u, args)`` for ``order=1``, as
      ``f(t, u, du, args)`` for ``order=2``, and so on. It returns a PyTree like ``u``. ``t`` is a scalar array.
    - ``order``: the order ``k``. From ``order=2`` on the initial value is the tuple ``(u, u', ..., u^(k-1))``.
    - ``jacobian``: how linearisations of first order compute the derivative of the field: an ``AbstractJacobian``,
      exact by default, or a function ``jacobian(t, u, args)``; see ``GivenJacobian``.

    Raises ``TypeError`` if ``vector_field`` or ``jacobian`` cannot be called, ``ValueError`` unless ``order`` is a
    positive integer.

    >>> import jax.numpy as jnp, probode
    >>> pendulum = probode.ODE(lambda t, u, du, args: -jnp.sin(u), order=2)
    >>> pendulum.order
    2
    """

    vector_field: Callable
    order: int = eqx.field(static=True, default=1, kw_only=True, converter=lambda k: as_integer(k, "ODE(order)", 1))
    jacobian: AbstractJacobian = _jacobian_field()
    is_explicit = True

    def __check_init__(self) -> None:
        if not callable(self.vector_field):
            raise TypeError(f"ODE(vector_field) must be callable as f(t, u, args), got {self.vector_field!r}.")

    @property
    def num_linearised(self) -> int:
        return self.order

    def check(self, t0: Float[Array, ""], values: tuple[PyTree, ...], args: PyTree) -> None:
        name = f"The vector field of an ODE of order {self.order}"
        out = output_of(self.vector_field, name, "f", t0, values, args)
        require_like(
            out, values[0], "the vector field's output", "u0", " The time is the first argument, u the second."
        )

    def residual_of(self, t: Float[Array, ""], us: tuple[PyTree, ...], args: PyTree) -> PyTree:
        f = self.vector_field(t, *us[: self.order], args)
        return jax.tree.map(jnp.subtract, us[self.order], f)

    def zeroth_order(
        self, t: Float[Array, ""], us: Float[Array, "derivatives d"], layout: Layout, args: PyTree
    ) -> Linearisation:
        """The equation ``u^(k) = c``, with ``c`` the vector field at a point: its linearisation of order zero."""
        k = self.order
        residual = us[k] - flat_field(self, layout, args)(t, us[:k])
        return Linearisation.explicit(layout, [None] * k, residual, whole=False)

    def first_order(
        self, t: Float[Array, ""], us: Float[Array, "derivatives d"], layout: Layout, args: PyTree
    ) -> Linearisation:
        k = self.order
        f, jacobian = self.jacobian.evaluate(flat_field(self, layout, args), t, us[:k], layout, args)
        return Linearisation.explicit(layout, list(jacobian), us[k] - f)


class Residual(AbstractProblem):
    """The implicit equation ``r(t, u, u', ..., u^(k), args) = 0`` with ``k = order``.

    For implicit and differential-algebraic equations, and for invariants such as an energy.

    - ``residual``: a function or an ``eqx.Module``, called as ``r(t, u, du, args)`` for ``order=1``, as
      ``r(t, u, args)`` for ``order=0``. It returns a PyTree of real arrays, whose numbers are the equations.
    - ``order``: the order ``k``. The initial value is ``u``, or the tuple ``(u, ..., u^(k-1))`` from ``order=2`` on. It
      should satisfy the equation for some value of the next derivative.
    - ``jacobian``: as for ``ODE``, with respect to each of ``u, ..., u^(k)``.

    If there are more or fewer equations than numbers in ``u``, solve with ``Dense()``. ``BlockDiagonal()`` takes the
    ``i``-th equation to be about the ``i``-th component. The equation holds at the steps; between them a filter
    predicts by the prior alone. Raises ``TypeError`` if ``residual`` or ``jacobian`` cannot be called, ``ValueError``
    unless ``order`` is an integer from zero on.

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

    def __check_init__(self) -> None:
        if not callable(self.residual):
            raise TypeError(f"Residual(residual) must be callable as r(t, u, du, args), got {self.residual!r}.")

    @property
    def num_initial_values(self) -> int:
        return self.residual.num_initial_values if isinstance(self.residual, _Derivatives) else max(self.order, 1)

    def residual_of(self, t: Float[Array, ""], us: tuple[PyTree, ...], args: PyTree) -> PyTree:
        return self.residual(t, *us[: self.order + 1], args)

    def check(self, t0: Float[Array, ""], values: tuple[PyTree, ...], args: PyTree) -> None:
        values = (values * (self.order + 1))[: self.order + 1]
        name = f"A residual of order {self.order}"
        leaves = jax.tree.leaves(output_of(self.residual, name, "r", t0, values, args))
        if not all(hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
            raise TypeError("The residual must return a PyTree of real, floating-point arrays.")
        if sum(x.size for x in leaves) == 0:
            raise ValueError("The residual returns no numbers: there is nothing to solve.")

    def first_order(
        self, t: Float[Array, ""], us: Float[Array, "derivatives d"], layout: Layout, args: PyTree
    ) -> Linearisation:
        us = us[: self.order + 1]
        value, jacobian = self.jacobian.evaluate(flat_residual(self, layout, args), t, us, layout, args)
        return Linearisation.general(layout, list(jacobian), value)


class Lifted(AbstractProblem):
    """The system of an ODE and its first ``levels`` derivatives in time, as ``ODE.lifted(levels)`` returns it.

    It gives the derivatives ``u^(k), ..., u^(k + levels)`` of a solution, for an ODE of order ``k``. In zeroth order
    (``TS0``) they are those of the solution through the predicted ``u, ..., u^(k-1)``, by its Taylor series: a method
    of Hermite and Obreshkov (Obreshkov 1940; Hairer, Norsett & Wanner 1993, "Solving ordinary differential equations
    I", III.10), where all derivatives of the prior are given, with a posterior. In first order (``TS1``) they depend on
    all lower derivatives of the state, as Obreshkov's methods for stiff problems have it. ``order`` is that of the
    highest derivative, ``k + levels``.

    >>> import probode
    >>> probode.ODE(lambda t, u, args: -u).lifted(3).order
    4
    """

    ode: ODE
    levels: int = eqx.field(static=True)
    is_explicit = True

    @property  # type: ignore[misc]  # an abstract variable may be a property
    def order(self) -> int:  # type: ignore[override]
        return self.ode.order + self.levels

    @property
    def num_initial_values(self) -> int:
        return self.ode.order

    @property
    def vector_field(self) -> Callable:
        """That of the ODE."""
        return self.ode.vector_field

    def check(self, t0: Float[Array, ""], values: tuple[PyTree, ...], args: PyTree) -> None:
        self.ode.check(t0, values, args)

    @property
    def num_linearised(self) -> int:
        return self.order

    @property
    def num_rows(self) -> int:
        return self.levels + 1

    def residual_of(self, t: Float[Array, ""], us: tuple[PyTree, ...], args: PyTree) -> PyTree:
        (_, unravel), flat = ravel_pytree(us[0]), jnp.stack([ravel_pytree(u)[0] for u in us])

        def field(t, us):
            return ravel_pytree(self.vector_field(t, *(unravel(u) for u in us), args))[0]

        given = flat[self.ode.order : self.order + 1] - derivatives_along(field, t, self._curve(flat))
        return [unravel(u) for u in given]

    def _curve(self, us):
        """The arguments of the field, and their time derivatives."""
        return us[np.arange(self.levels + 1)[:, None] + np.arange(self.ode.order)]

    def derivatives(
        self, t: Float[Array, ""], us: Float[Array, "k d"], layout: Layout, args: PyTree
    ) -> Float[Array, "given d"]:
        """``u^(k), ..., u^(k + levels)`` of the solution through ``u, ..., u^(k-1)`` at ``t``."""
        return unrolled_derivatives(flat_field(self, layout, args), t, us, self.order)[self.ode.order :]

    def zeroth_order(
        self, t: Float[Array, ""], us: Float[Array, "derivatives d"], layout: Layout, args: PyTree
    ) -> Linearisation:
        """The linearisation ``u^(k+j) = c_j``: right-hand sides are held constant.

        ``c_j`` is the derivative of order ``k + j`` of the solution through ``u, ..., u^(k-1)`` at ``t``.
        """
        k = self.ode.order
        return Linearisation.frozen(layout, k, us[k : self.order + 1] - self.derivatives(t, us[:k], layout, args))

    def first_order(
        self, t: Float[Array, ""], us: Float[Array, "derivatives d"], layout: Layout, args: PyTree
    ) -> Linearisation:
        """The linearisation of ``u^(k+j) - d^j f / dt^j = 0``, where the time derivatives are those along ``us``.

        Not along the solution through ``u, ..., u^(k-1)``: in first order these are the same, but in terms of ``u``
        alone ``H`` has powers of the Jacobian, in which a stiff field loses all that is not stiff.
        """
        k = self.ode.order

        def evaluate(t, us):
            return self.ode.jacobian.evaluate(flat_field(self, layout, args), t, us, layout, args)

        curve = self._curve(us)
        _, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, jax.eval_shape(evaluate, t, curve[0])))
        flat = derivatives_along(lambda t, us: ravel_pytree(evaluate(t, us))[0], t, curve)
        field, jacobians = jax.vmap(unravel)(flat)
        residual = us[k : self.order + 1] - field
        return Linearisation.lifted(layout, list(jnp.moveaxis(jacobians, 1, 0)), residual)


class _Derivatives(eqx.Module):
    """The residual of a problem and its first ``levels`` time derivatives along a solution, as a function."""

    problem: AbstractProblem
    levels: int = eqx.field(static=True)

    @property
    def num_initial_values(self) -> int:
        return self.problem.num_initial_values

    def __call__(self, t: Float[Array, ""], *us_and_args: PyTree) -> list[PyTree]:
        *us, args = us_and_args

        def differentiate(fn):
            def derivative(t, us):
                # The total derivative in time, in which the velocity of every derivative of u is the next one.
                velocity = (jnp.ones_like(t), tuple(us[1:]))
                return jax.jvp(fn, (t, tuple(us[:-1])), velocity)[1]

            return derivative

        fn, values = lambda t, us: self.problem.residual_of(t, us, args), []
        for level in range(self.levels + 1):
            values.append(fn(t, tuple(us[: self.problem.order + level + 1])))
            fn = differentiate(fn)
        return values


def flat_field(ode: AbstractProblem, layout: Layout, args: PyTree) -> Callable:
    """The vector field of an ODE as a function ``f(t, us)`` of flat arrays.

    Parts of a solver use it, since they have no PyTrees. ``us``: the derivatives ``u, u', ...``, ravelled, of shape
    ``(order, d)``; the value has the shape ``(d,)``. ``layout``: of the state; ``args``: passed on to the field.

    >>> import jax.numpy as jnp, probode
    >>> ode = probode.ODE(lambda t, u, args: {"x": u["y"], "y": -u["x"]})
    >>> layout = probode.Solver(probode.IWP(2), probode.TS1(ode)).init({"x": 1.0, "y": 0.0}, 0.0).layout
    >>> probode.flat_field(ode, layout, None)(jnp.array(0.0), jnp.array([[1.0, 2.0]]))
    Array([ 2., -1.], dtype=float64)
    """

    def field(t: Float[Array, ""], us: Float[Array, "order d"]) -> Float[Array, " d"]:
        return layout.ravel(ode.vector_field(t, *(layout.unravel(u) for u in us), args))  # type: ignore[attr-defined]

    return field


def flat_residual(problem: AbstractProblem, layout: Layout, args: PyTree) -> Callable:
    """The residual of a problem as a function ``r(t, us)`` of flat arrays, from ``(derivatives, d)`` to ``(m,)``.

    ``us``: the derivatives ``u, u', ...`` up to ``u^(order)`` or beyond.
    """

    def residual(t: Float[Array, ""], us: Float[Array, "derivatives d"]) -> Float[Array, " m"]:
        return layout.ravel(problem.residual_of(t, tuple(layout.unravel(u) for u in us[: problem.order + 1]), args))

    return residual


def _as_state(x: Any) -> Array:
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        field = " The vector field belongs to the solver: Solver(prior, TS1(ODE(f)))." if callable(x) else ""
        raise TypeError(f"u0 must hold real arrays, got {x!r}.{field}") from None
    if x.dtype in (jnp.float16, jnp.bfloat16):
        raise TypeError(f"u0 has dtype {x.dtype}, which is too short for a solve: use float32 or float64.")
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(x, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError("u0 is complex. Solve for the real and the imaginary part, e.g. as a tuple of two real arrays.")
    raise TypeError(f"u0 has dtype {x.dtype}; states must be floating point, e.g. u0 = jnp.asarray(u0, float).")
