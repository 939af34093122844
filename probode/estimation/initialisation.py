"""Initialisation: the distribution of the state at ``t0``, that is, of ``u`` and its derivatives.

``TaylorMode`` differentiates the equation, so that the initial state is exact; ``Diffuse`` does so for the first
derivatives only, and gives the others a large variance.
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..algebra.conditioning import condition, join
from ..algebra.factorisations import Layout
from ..algebra.linearisation import residual_about
from ..algebra.normal import Normal, certain
from ..equations.problems import AbstractProblem, flat_field, flat_residual
from ..equations.taylor.derivatives import consistent_derivatives, taylor_derivatives
from ..util.checks import as_integer, as_scalar, require


_GAUSS_NEWTON_STEPS = 10


class InitialState(eqx.Module):
    """A Gaussian distribution of the state ``(u, u', ..., u^(nu))`` at ``t0``; the solvers accept it as ``u0``.

    For initial derivatives that are known, or have a known covariance. ``Solver.initialise`` returns one; it can be
    changed and differentiated.

    - ``mean``: a tuple of ``nu + 1`` PyTrees like ``u``: plain derivatives, not divided by factorials.
    - ``factor``: the right square root of the covariance in the layout of the solver's factorisation,
      ``(*batch, dim, dim)``.

    Nothing is checked here; a solve raises ``ValueError`` if these do not fit its prior and factorisation.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -u)))
    >>> start = solver.initialise(1.0, 0.0)
    >>> wider = probode.InitialState(start.mean, start.factor + 0.1 * jnp.eye(3))
    """

    mean: tuple[PyTree, ...]
    factor: Float[Array, "*batch dim dim"]


class AbstractInitialisation(eqx.Module):
    """The Gaussian distribution of ``(u, u', ..., u^(nu))`` at ``t0``, as a function of the initial value.

    A subclass defines ``initialise``.

    >>> import probode
    >>> probode.Diffuse(1, scale=10.0).num_derivatives_known
    1
    """

    @abstractmethod
    def initialise(
        self, problem: AbstractProblem, t0: Float[Array, ""], u0: Float[Array, "known d"], layout: Layout, args: PyTree
    ) -> Normal:
        """The distribution of the state at ``t0``, in the layout, from the derivatives ``u0 = (u, ..., u^(k-1))``.

        Its factor may have any number of rows up to ``dim``, and has none if the state is certain.
        """


class TaylorMode(AbstractInitialisation):
    """Exact derivatives of the solution at ``t0`` by Taylor-mode differentiation; the covariance is zero. The default.

    Kraemer & Hennig (2020), "Stable implementation of probabilistic ODE solvers". The size of the program does not
    depend on the order, for a small system. Fields with operations that have no rule for Taylor series (sorting,
    Cholesky, ``lgamma``) are differentiated by nested forward mode, up to order 8; beyond that it raises ``ValueError``
    with the name of the operation.

    Where the field is finite at ``t0`` but not all of its derivatives are (a drag proportional to the squared speed, at
    rest; ``sqrt(t)`` at zero), the first that does not exist and all higher ones are zero: the first steps, which find
    a large residual, are short. Not so for ``ODE.lifted``, which conditions on these derivatives.

    For a ``Residual`` the derivatives solve the equation and its time derivatives, by Newton's method and with the
    smallest norm where they do not determine all of them (consistent initialisation: Pantelides 1988, "The consistent
    initialization of differential-algebraic systems"). With an initial value for which these have no solution, the
    solve ends with the result ``initial_state_nonfinite``.

    >>> import probode
    >>> solver = probode.Solver(probode.IWP(3), probode.TS1(probode.ODE(lambda t, u, args: -u)))
    >>> [float(u) for u in solver.initialise(1.0, 0.0).mean]
    [1.0, -1.0, 1.0, -1.0]
    """

    def initialise(
        self, problem: AbstractProblem, t0: Float[Array, ""], u0: Float[Array, "known d"], layout: Layout, args: PyTree
    ) -> Normal:
        derivatives = _derivatives(problem, t0, u0, layout, args, layout.num_derivatives)
        if problem.is_explicit and problem.num_rows == 1:
            # Not by the series: in their products a coefficient that is NaN spoils all others.
            known = jnp.append(u0, flat_field(problem, layout, args)(t0, u0)[None], axis=0)
            derivatives = _where_they_exist(derivatives, known)
        return certain(layout.pack(derivatives))


class Diffuse(AbstractInitialisation):
    """The distribution of the state at ``t0`` with exact first derivatives and a large variance of the others.

    For vector fields that cannot be differentiated often, or not at all (``num_derivatives_known`` 1 or 0): the steps
    of the solve determine the other derivatives.

    - ``num_derivatives_known``: how many derivatives beyond those in ``u0`` are computed exactly, as in ``TaylorMode``.
    - ``scale``: the standard deviation of the others, which have mean zero, in units of ``u`` over powers of time. It
      should not be smaller than they are.
    - ``conditioned``: whether the state is also conditioned on the equation at ``t0``, by Gauss-Newton steps. With a
      ``Residual`` (``ODE.lifted``, a differential-algebraic equation) all that it determines becomes exact.

    Raises ``ValueError`` unless ``num_derivatives_known`` is an integer from zero on and ``scale`` is finite and
    positive, ``TypeError`` for a scale that is not a real number; in a solve ``ValueError`` for more derivatives than
    the prior has.

    >>> import probode
    >>> solver = probode.Solver(probode.IWP(3), probode.TS1(probode.ODE(lambda t, u, args: -u)),
    ...                         initialisation=probode.Diffuse(1, scale=10.0))
    >>> start = solver.initialise(1.0, 0.0)
    >>> [float(u) for u in start.mean]
    [1.0, -1.0, 0.0, 0.0]
    """

    num_derivatives_known: int = eqx.field(
        static=True, default=1, converter=lambda n: as_integer(n, "Diffuse(num_derivatives_known)", 0)
    )
    scale: Float[Array, ""] = eqx.field(default=1.0, converter=lambda x: _as_scale(x))
    conditioned: bool = eqx.field(static=True, default=False, kw_only=True)

    def initialise(
        self, problem: AbstractProblem, t0: Float[Array, ""], u0: Float[Array, "known d"], layout: Layout, args: PyTree
    ) -> Normal:
        n, num = layout.num_derivatives + 1, u0.shape[0] - 1 + self.num_derivatives_known
        if num >= n:
            raise ValueError(
                f"Diffuse(num_derivatives_known={self.num_derivatives_known}) asks for derivatives up to order {num}, "
                f"but the prior has num_derivatives={n - 1}."
            )
        known = _derivatives(problem, t0, u0, layout, args, num)
        mean = layout.pack(jnp.concatenate([known, jnp.zeros((n - 1 - num, layout.size), layout.dtype)]))
        unknown = jnp.diag(jnp.where(jnp.arange(n) > num, self.scale.astype(layout.dtype), 0))
        diffuse = Normal(mean, layout.lift(unknown, 1.0))
        return _given_equation(problem, t0, diffuse, layout, args) if self.conditioned else diffuse


def _given_equation(problem, t0, diffuse, layout, args):
    """The state conditioned on the equation at ``t0``, linearised at its posterior mode by Gauss-Newton iteration."""
    # `join` needs a triangular noise: the covariance, which is diagonal, takes its place, beside a state without any.
    known, one = Normal(diffuse.mean, jnp.zeros_like(diffuse.factor)), jnp.ones(layout.batch_shape, layout.dtype)

    def given(point):
        equation = problem.first_order(t0, layout.unpack(point), layout, args)
        equation = eqx.tree_at(lambda e: e.residual, equation, residual_about(diffuse.mean, point, equation))
        return condition(join(known, diffuse.factor, one, equation), known, equation).state

    point, _ = lax.scan(lambda point, _: (given(point).mean, None), diffuse.mean, None, length=_GAUSS_NEWTON_STEPS)
    return given(point)


def _derivatives(problem, t0, u0, layout, args, num):
    if num < u0.shape[0]:
        return u0
    if problem.is_explicit:
        return taylor_derivatives(flat_field(problem, layout, args), t0, u0, num)
    return consistent_derivatives(flat_residual(problem, layout, args), t0, u0, num, problem.order)


def _where_they_exist(derivatives, known):
    """The derivatives below the first one that is not finite; from there on those of ``known``, then zeros.

    ``known``: ``u, ..., u^(k)`` for an equation of order ``k``.
    """
    finite = jnp.cumprod(jnp.all(jnp.isfinite(derivatives), axis=1).astype(int)).astype(bool)
    return jnp.where(finite[:, None], derivatives, jnp.pad(known, ((0, len(derivatives) - len(known)), (0, 0))))


def _as_scale(x):
    x = as_scalar(x, "Diffuse(scale)")
    return jnp.asarray(require(x, (x > 0) & (x < np.inf), "Diffuse(scale) must be finite and positive", scale=x))
