"""Priors with a linear drift: integrated Ornstein-Uhlenbeck processes, and all others with ``u^(nu + 1)`` linear.

With the linear part of an equation in the drift of the prior, a solver is exact on that part in a step of any length
(Bosch, Hennig & Tronarp, 2023, "Probabilistic exponential integrators"). ``L_i``: the factor of the ``i``-th
derivative; see discretisation for the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Real

from ..algebra.factorisations import Layout
from ..algebra.transition import Transition
from ..equations.problems import ODE, AbstractProblem
from ..util.checks import as_integer
from .discretisation import companion_transition
from .drifts import as_finite, blocks_of, matrices_of, stack_blocks
from .output_scale import as_output_scale
from .prior import AbstractPrior, AbstractPriorFamily


class IOUP(AbstractPrior):
    """The ``num_derivatives`` times integrated Ornstein-Uhlenbeck process: ``du^(nu) = rate u^(nu) dt + dW``.

    For stiff or oscillating equations with a known linear part: with that as ``rate``, ``TS1`` is exact on it in a step
    of any length (Bosch, Hennig & Tronarp, 2023, "Probabilistic exponential integrators").

    - ``num_derivatives``: ``nu``, how many derivatives of ``u`` the state holds.
    - ``rate``: in units of ``1 / time``. A number; one number for each component, as a PyTree like ``u``; a ``(d, d)``
      matrix over the ravelled ``u``; or a linear function from a PyTree like ``u`` to one like ``u``, of which the
      derivative at zero is taken (an ``eqx.Module`` keeps its arrays differentiable). ``Dense()`` takes all of them,
      ``BlockDiagonal()`` one number or one for each component, ``Isotropic()`` one number.
    - ``output_scale``: the factor of ``dW``, see ``IWP``.

    Raises ``ValueError`` unless ``num_derivatives`` is a positive integer, the rate is finite and the output scale as
    for ``IWP``, ``TypeError`` for values that are not real numbers; in the first step ``ValueError`` for a rate or a
    scale that does not fit ``u`` or the factorisation.

    >>> import jax.numpy as jnp, probode
    >>> probode.IOUP(2, jnp.array([[-1.0, 1.0], [0.0, -100.0]]))
    IOUP(num_derivatives=2, rate=f64[2,2], output_scale=f64[])
    """

    num_derivatives: int = eqx.field(static=True)
    rate: PyTree[Float[Array, "..."]] | Callable
    output_scale: PyTree[Float[Array, "..."]]

    def __init__(self, num_derivatives: Any, rate: PyTree | Callable, *, output_scale: PyTree = 1.0):
        self.num_derivatives = as_integer(num_derivatives, "IOUP(num_derivatives)", 1)
        self.rate = rate if callable(rate) else as_finite(rate, "IOUP(rate)")
        self.output_scale = as_output_scale(output_scale, "IOUP(output_scale)")

    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        if callable(self.rate):
            row = matrices_of(self.rate, 1, "IOUP(rate)", layout)
        else:
            row = stack_blocks([blocks_of(self.rate, "IOUP(rate)", layout)], layout.size)
        return companion_transition(row, dt, self.output_scale, layout)


class RosenbrockIOUP(AbstractPriorFamily):
    """The family of ``IOUP`` priors whose rate in each step is the Jacobian of the vector field where the step starts.

    With ``TS1`` it is the probabilistic exponential integrator of Rosenbrock type (Bosch, Hennig & Tronarp, 2023,
    "Probabilistic exponential integrators"): steps may be as long as the nonlinear part allows. The Jacobian is used as
    far as ``TS1`` uses it: in full under ``Dense()``, its diagonal under ``BlockDiagonal()``, the mean of its diagonal
    under ``Isotropic()``.

    - ``num_derivatives``: ``nu``, how many derivatives of ``u`` the state holds.
    - ``output_scale``: see ``IWP``.

    Raises ``ValueError`` unless ``num_derivatives`` is a positive integer and the output scale as for ``IWP``; in the
    first step ``TypeError`` for anything but an ``ODE`` of order one.

    >>> import probode
    >>> probode.RosenbrockIOUP(3).num_derivatives
    3
    """

    num_derivatives: int = eqx.field(static=True)
    output_scale: PyTree[Float[Array, "..."]]

    def __init__(self, num_derivatives: Any, *, output_scale: PyTree = 1.0):
        self.num_derivatives = as_integer(num_derivatives, "RosenbrockIOUP(num_derivatives)", 1)
        self.output_scale = as_output_scale(output_scale, "RosenbrockIOUP(output_scale)")

    def at(
        self,
        t: Float[Array, ""],
        us: Float[Array, "n d"],
        problem: AbstractProblem,
        layout: Layout,
        args: PyTree,
        dt: Float[Array, ""] | None = None,
    ) -> AbstractPrior:
        if not isinstance(problem, ODE) or problem.order != 1:
            raise TypeError(
                "RosenbrockIOUP takes its rate from an ODE of order one: for other equations use IOUP or IWP."
            )
        layout.require_own_equations(type(self).__name__)
        # The equation u' - f = 0 has the derivative -J with respect to u.
        rate = -problem.first_order(t, us, layout, args).matrix[..., : layout.identity().shape[-1]]
        if layout.batch_shape:
            rate = layout.unravel(jnp.reshape(rate, -1))
        elif rate.shape != (layout.size, layout.size):
            rate = rate[0, 0]
        # `IOUP(nu, rate)` would check a traced rate at run time, and raise where a solver has to reject the step.
        plain = IOUP(self.num_derivatives, 0.0)
        return eqx.tree_at(lambda prior: (prior.rate, prior.output_scale), plain, (rate, self.output_scale))


class LinearSDE(AbstractPrior):
    """A linear equation with white noise: ``du^(nu) = (L_0 u + L_1 u' + ... + L_nu u^(nu)) dt + output_scale dW``.

    For solutions that satisfy such an equation of order ``nu + 1``, exactly or nearly: with ``TS1`` a solution that
    satisfies it without noise is exact in a step of any length. ``IWP`` has ``L = 0``, ``IOUP`` only ``L_nu``; a damped
    oscillator with ``nu = 1`` has ``L_0 = -omega^2`` and ``L_1 = -2 gamma``. (Sarkka & Solin, 2019, "Applied stochastic
    differential equations".)

    - ``num_derivatives``: ``nu``, how many derivatives of ``u`` the state holds.
    - ``drift``: a tuple of the ``nu + 1`` factors ``L_i``, in units of ``1 / time^(nu + 1 - i)``, each as the rate of
      ``IOUP``: a number; one number for each component, as a PyTree like ``u``; or a ``(d, d)`` matrix over the
      ravelled ``u``. Or a linear function, called as ``drift(u, u', ..., u^(nu))`` with PyTrees like ``u`` and
      returning one like ``u``, of which the derivative at zero is taken. ``Dense()`` takes all of them,
      ``BlockDiagonal()`` numbers or one for each component, ``Isotropic()`` numbers.
    - ``output_scale``: the factor of ``dW``, see ``IWP``.

    Raises ``ValueError`` unless ``num_derivatives`` is a positive integer, the drift is finite and has ``nu + 1`` parts
    and the output scale is as for ``IWP``, ``TypeError`` for values that are not real numbers; in the first step
    ``ValueError`` for parts that do not fit ``u`` or the factorisation.

    >>> import probode
    >>> oscillator = probode.LinearSDE(1, (-4.0, -0.1))  # u'' = -4 u - 0.1 u' + noise
    >>> oscillator.num_derivatives
    1
    """

    num_derivatives: int = eqx.field(static=True)
    drift: tuple[PyTree[Float[Array, "..."]], ...] | Callable
    output_scale: PyTree[Float[Array, "..."]]

    def __init__(self, num_derivatives: Any, drift: PyTree | Callable, *, output_scale: PyTree = 1.0):
        self.num_derivatives = as_integer(num_derivatives, "LinearSDE(num_derivatives)", 1)
        if not callable(drift):
            n = self.num_derivatives + 1
            if not isinstance(drift, tuple | list) or len(drift) != n:
                got = f"{len(drift)} of them" if isinstance(drift, tuple | list) else repr(drift)
                raise ValueError(
                    f"LinearSDE(drift) must be a linear function or a tuple of {n} parts, the factors of "
                    f"u, ..., u^({n - 1}), got {got}."
                )
            drift = tuple(as_finite(part, f"LinearSDE(drift[{i}])") for i, part in enumerate(drift))
        self.drift = drift
        self.output_scale = as_output_scale(output_scale, "LinearSDE(output_scale)")

    def transition(self, dt: Real[Array, ""], layout: Layout) -> Transition:
        if callable(self.drift):
            row = matrices_of(self.drift, self.num_derivatives + 1, "LinearSDE(drift)", layout)
        else:
            row = _row_of(self.drift, "LinearSDE", layout)
        return companion_transition(row, dt, self.output_scale, layout)


def linear_transition(drift: Any, dt: Real[Array, ""], layout: Layout, *, output_scale: PyTree = 1.0) -> Transition:
    """The exact transition of ``du^(nu) = (L_0 u + L_1 u' + ... + L_nu u^(nu)) dt + output_scale dW``.

    For the method ``transition`` of priors of your own, whose drift and dispersion are functions of their parameters.
    The square root of the noise is accurate for a step of any length, backwards too; the Cholesky factor of a
    covariance by a matrix exponential is NaN if the step is short, where that covariance is singular in floating point.

    - ``drift``: the factors ``L_0, ..., L_nu``, or the last ones of them, those before which are zero, in units of
      ``1 / time^(nu + 1 - i)``. Each is a number; one number for each component, as a PyTree like
      ``u``; or a ``(d, d)`` matrix over the ravelled ``u``. ``Dense()`` takes all of them, ``BlockDiagonal()`` numbers
      or one for each component, ``Isotropic()`` numbers.
    - ``dt``: the length of the step, a scalar; negative for a step back in time.
    - ``layout``: how the state is stored, as ``transition`` receives it.
    - ``output_scale``: the dispersion, the factor of ``dW``. A number; one for each component, as a PyTree like ``u``;
      or a right square root of the covariance of correlated noise, ``(d, d)``.

    The ``Transition`` has the ``matrix`` ``(*batch, p, p)`` and the ``noise`` ``(*batch, dim, dim)`` of the layout. All
    arrays are differentiable and may be traced; values are not checked. Raises ``ValueError`` for factors or a scale
    that do not fit ``u`` or the factorisation, and for another number of factors than one to ``nu + 1``; ``TypeError``
    for factors that are not in a tuple or list.

    >>> import jax.numpy as jnp, probode
    >>> state = probode.Solver(probode.IWP(1), probode.TS0(probode.ODE(lambda t, u, args: -u))).init(1.0, 0.0)
    >>> stiffness, damping = jnp.array(-4.0), jnp.array(0.0)  # u'' = -4 u + noise
    >>> probode.linear_transition((stiffness, damping), jnp.array(jnp.pi / 4), state.layout).matrix.round(6)
    Array([[ 0. ,  0.5],
           [-2. ,  0. ]], dtype=float64)
    """
    n = layout.num_derivatives + 1
    if not isinstance(drift, Sequence):
        raise TypeError(f"linear_transition(drift) is a tuple of factors, as (rate,), got {drift!r}.")
    if not 1 <= len(drift) <= n:
        raise ValueError(f"linear_transition(drift) has one to {n} factors, of u, ..., u^({n - 1}), got {len(drift)}.")
    drift = jax.tree.map(jnp.asarray, tuple(drift))
    return companion_transition(_row_of(drift, "linear_transition", layout), dt, output_scale, layout)


def _row_of(drift, name, layout):
    """The factors of a drift as blocks of the last row of a companion matrix."""
    parts = [blocks_of(part, f"{name}(drift[{i}])", layout) for i, part in enumerate(drift)]
    return stack_blocks(parts, layout.size)
