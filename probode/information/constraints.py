"""Information operators: the equation ``z(t, x) = 0`` about the state, linearised at a prediction.

TS0 and TS1 are the zeroth- and first-order Taylor linearisations of ``z = u^(k) - f(t, u, ..., u^(k-1))``; with a
filter they make the methods known as EK0 and EK1 (Schober et al. 2019; Tronarp et al. 2019).
"""

from abc import abstractmethod
from types import UnionType
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..algebra.linearisation import Linearisation
from ..algebra.normal import Normal, batched
from ..equations.problems import ODE, AbstractProblem, Lifted, Residual
from ..util.checks import as_scalar, require
from .iteration import Iteration


class AbstractConstraint(eqx.Module):
    """An equation that the solution satisfies at every time, and how it is linearised.

    A subclass has the field ``problem`` and defines ``linearise``; the others have defaults.

    - ``problem``: the equation that the solve starts from.
    - ``iteration``: how often a step evaluates it, and whether it takes a Jacobian every time; once by default.
    - ``first_order``: whether the linearisation knows how the equation depends on ``u``.
    - ``is_pointwise``: whether its residual is that of ``problem`` at the mean, so that it can be had without a
      Jacobian.
    - ``order``: that of the highest derivative of ``u``, a property; that of ``problem`` by default.

    >>> import probode
    >>> spring = probode.ODE(lambda t, u, du, args: -u, order=2)
    >>> probode.TS1(spring).order
    2
    """

    problem: eqx.AbstractVar[AbstractProblem]
    iteration = Iteration()
    first_order = True
    is_pointwise = False

    @property
    def order(self) -> int:
        """The order of the highest derivative of ``u`` in the equation."""
        return self.problem.order

    @property
    def evaluations(self) -> int:
        """How often a step evaluates the equation."""
        return self.iteration.evaluations

    @abstractmethod
    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        """The equation about ``predicted`` at time ``t``.

        ``predicted.factor`` is a square root of the predicted covariance without the noise of the step, not triangular.
        """


class TS0(AbstractConstraint):
    """``z`` with the vector field frozen at the prediction: ``H = E_k``. No Jacobian; for problems that are not stiff.

    ``evaluations=2`` evaluates the vector field once more in every accepted step, at the corrected mean, and corrects
    again: the mode P(EC)^2 of multistep methods (Hairer, Norsett, Wanner 1993, III.1), an iterated filter update. It
    makes stable steps two to ten times as long from order five on. 1 is EK0.

    Of a ``Lifted`` equation (``ode.lifted(levels)``) all derivatives that it gives are those of the solution through
    the predicted ``u, ..., u^(k-1)``, and every evaluation is one of their Taylor series. If they are all that the
    prior has (``levels = num_derivatives - order``) this is a one-step method, stable at any order: its gains are the
    weights of the two-point Hermite rule, and ``evaluations=2`` or 3 make its order ``num_derivatives + evaluations``.
    Then every attempt evaluates the equation as often, and under ``DynamicCalibration`` the covariance of ``u`` is that
    of what these evaluations have left wrong so far. With fewer levels, or from an uncertain state, it is that of the
    prior's noise alone: on seven problems about right with two evaluations, too small by a factor of up to 600 with
    one. ``Stack`` and ``Noisy`` refuse it.

    Raises ``TypeError`` for anything but an ``ODE`` or a ``Lifted`` one, ``ValueError`` for a number of evaluations
    below 1.

    >>> import probode
    >>> ode = probode.ODE(lambda t, u, args: -u)
    >>> probode.TS0(ode, evaluations=2).order
    1
    """

    problem: ODE | Lifted
    iteration: Iteration
    first_order = False

    def __init__(self, problem: Any, *, evaluations: Any = 1):
        self.problem = require_problem("TS0", problem, ODE | Lifted, "an ODE")
        self.iteration = Iteration(evaluations)

    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        return self.problem.zeroth_order(t, layout.unpack(predicted.mean), layout, args)


class TS1(AbstractConstraint):
    """``z`` with its exact Jacobian at the prediction, ``H = E_k - sum_j J_j E_j`` for an ODE. For stiff problems too.

    The Jacobian is taken in full under ``Dense``, its diagonal under ``BlockDiagonal``, its mean diagonal under
    ``Isotropic``. ``evaluations`` as for ``TS0``; the Jacobian stays that of the prediction, or with
    ``relinearise=True`` is taken anew every time: the iterated extended Kalman filter, whose limit is the most probable
    state given the past and the equation (Bell & Cathey 1993); ``Solution.stats["last_move"]`` says whether the
    iterations have converged.

    Of a ``Lifted`` equation (``ode.lifted(levels)``) the derivatives that it gives are time derivatives of the field
    along the state's own derivatives, and ``H`` holds the Jacobian and its time derivatives. For stiff problems: steps
    are two to three times as long with two levels and ``IWP(5)``, at the price of about the same elimination. An error
    in the direction of a real eigenvalue is damped however negative this is: in the limit by a factor of 0.66, 0.44,
    0.29, 0.18, 0.08 in a step (``IWP(5)``, 0 to 4 levels). Take ``evaluations=2``: derivatives of the field are far
    from linear, and what one linearisation leaves in them is extrapolated by the next step.

    Raises ``TypeError`` for anything but an equation, ``ValueError`` for a number of evaluations below 1.

    >>> import probode
    >>> ode = probode.ODE(lambda t, u, args: -u)
    >>> probode.TS1(ode).evaluations
    1
    """

    problem: AbstractProblem
    iteration: Iteration
    is_pointwise = True

    def __init__(self, problem: Any, *, evaluations: Any = 1, relinearise: bool = False):
        self.problem = require_problem("TS1", problem, AbstractProblem, "an ODE or a Residual")
        self.iteration = Iteration(evaluations, relinearise)

    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        return self.problem.first_order(t, layout.unpack(predicted.mean), layout, args)


class Noisy(AbstractConstraint):
    """The constraint ``z(t, x) = e`` with the residual ``z`` of another one and independent Gaussian noise ``e``.

    ``std``: the standard deviation of ``e``, in units of the residual. For equations that are themselves uncertain, and
    to damp what is ill-conditioned. Evaluated as often, and linearised as often, as the constraint itself. Raises
    ``TypeError`` for anything but a constraint, ``ValueError`` unless ``std`` is finite and positive.

    >>> import probode
    >>> ode = probode.ODE(lambda t, u, args: -u)
    >>> probode.Noisy(probode.TS1(ode), 1e-3).order
    1
    """

    constraint: AbstractConstraint
    std: Float[Array, ""]

    def __init__(self, constraint: Any, std: Any):
        if not isinstance(constraint, AbstractConstraint):
            raise TypeError(f"Noisy({constraint!r}): the first argument is a constraint, like TS1(probode.ODE(f)).")
        _refuse_frozen_derivatives("Noisy", constraint)
        std = as_scalar(std, "Noisy(std)")
        self.constraint = constraint
        self.std = jnp.asarray(
            require(std, (std > 0) & (std < jnp.inf), "Noisy(std) must be finite and positive", std=std)
        )

    @property  # type: ignore[misc]  # an abstract variable may be a property
    def problem(self) -> AbstractProblem:  # type: ignore[override]
        return self.constraint.problem

    @property
    def order(self) -> int:
        return self.constraint.order

    @property
    def iteration(self) -> Iteration:  # type: ignore[override]
        return self.constraint.iteration

    @property
    def first_order(self) -> bool:  # type: ignore[override]
        return self.constraint.first_order

    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        equation = self.constraint.linearise(t, predicted, layout, args)
        equation.require_separate("Noisy", layout)
        own = layout.broadcast(self.std.astype(layout.dtype) * jnp.eye(equation.residual.shape[-2], dtype=layout.dtype))
        noise = own if equation.noise is None else jnp.concatenate([equation.noise, own], axis=-2)
        return Linearisation(equation.matrix, equation.residual, noise=noise, whole=equation.whole)

    @property
    def is_pointwise(self) -> bool:  # type: ignore[override]
        return self.constraint.is_pointwise


class Stack(AbstractConstraint):
    """Several equations at once, each with its own linearisation: ``Stack(TS1(ode), TS1(Residual(energy, order=0)))``.

    They must not follow from one another: for ``d`` components and a prior with ``nu`` derivatives there is room for
    ``(nu + 1) d`` independent equations. The solve starts from the first member's ODE if there is one, otherwise from
    all residuals together. ``evaluations`` and ``relinearise`` as for ``TS1``, of all members together: unless they are
    given, as often as the member that asks for most, with new Jacobians if one asks for them. Raises
    ``TypeError`` for a member that is not a constraint, ``ValueError`` without any.

    >>> import jax.numpy as jnp, probode
    >>> ode = probode.ODE(lambda t, u, args: jnp.stack([u[1], -u[0]]))
    >>> energy = probode.Residual(lambda t, u, args: u @ u - 1, order=0)
    >>> probode.Stack(probode.TS1(ode), probode.TS1(energy)).order
    1
    """

    constraints: tuple[AbstractConstraint, ...]
    iteration: Iteration

    def __init__(self, *constraints: Any, evaluations: Any = None, relinearise: bool | None = None):
        if not constraints:
            raise ValueError("Stack() needs at least one constraint.")
        for constraint in constraints:
            if not isinstance(constraint, AbstractConstraint):
                raise TypeError(f"Stack({constraint!r}): members are constraints, like TS1(probode.Residual(r)).")
            _refuse_frozen_derivatives("Stack", constraint)
        own = [constraint.iteration for constraint in constraints]
        evaluations = max(one.evaluations for one in own) if evaluations is None else evaluations
        relinearise = any(one.relinearise for one in own) if relinearise is None else relinearise
        self.constraints, self.iteration = constraints, Iteration(evaluations, relinearise)

    @property  # type: ignore[misc]  # an abstract variable may be a property
    def problem(self) -> AbstractProblem:  # type: ignore[override]
        problems = [constraint.problem for constraint in self.constraints]
        explicit = [problem for problem in problems if problem.is_explicit]
        return explicit[0] if explicit else Residual(_Together(tuple(problems)), order=self.order)

    @property
    def first_order(self) -> bool:  # type: ignore[override]
        return any(constraint.first_order for constraint in self.constraints)

    @property
    def order(self) -> int:
        return max(constraint.order for constraint in self.constraints)

    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        equations = [constraint.linearise(t, predicted, layout, args) for constraint in self.constraints]
        for equation in equations:
            equation.require_separate("Stack", layout)
        width = max(equation.matrix.shape[-1] for equation in equations)

        def widen(matrix):
            return jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, width - matrix.shape[-1])])

        matrix = jnp.concatenate([widen(equation.matrix) for equation in equations], axis=-2)
        residual = jnp.concatenate([equation.residual for equation in equations], axis=-2)
        whole = all(equation.whole for equation in equations)
        if all(equation.noise is None for equation in equations):
            return Linearisation(matrix, residual, whole=whole)
        noises = [_noise_of(equation) for equation in equations]
        return Linearisation(matrix, residual, noise=batched(jax.scipy.linalg.block_diag)(*noises), whole=whole)


def require_problem(name: str, value: Any, kind: type | UnionType, words: str) -> Any:
    """``value`` itself, if the constraint ``name`` can linearise it: an equation of this ``kind``.

    Otherwise raises ``TypeError`` with a hint, in which ``words`` say what it linearises.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, AbstractProblem):
        raise TypeError(f"{name} linearises {words}, not a {type(value).__name__}: use TS1 or SLR1.")
    raise TypeError(f"{name} linearises {words}: write {name}(probode.ODE(f)), not {name}({value!r}).")


def _refuse_frozen_derivatives(name, constraint):
    """Raises ``ValueError`` where the error of a frozen field would be missing in the covariance."""
    if isinstance(constraint.problem, Lifted) and not constraint.first_order:
        raise ValueError(
            f"{name} has no estimate of what {type(constraint).__name__} of a lifted equation leaves out, and would "
            "report too little uncertainty. Use TS1 of it, or the constraint alone."
        )


class _Together(eqx.Module):
    """The residuals of several problems as one."""

    problems: tuple[AbstractProblem, ...]

    def __call__(self, t: Float[Array, ""], *us_and_args: PyTree) -> list[PyTree]:
        *us, args = us_and_args
        return [problem.residual_of(t, tuple(us), args) for problem in self.problems]


def _noise_of(equation):
    if equation.noise is not None:
        return equation.noise
    *batch, m, _ = equation.matrix.shape
    return jnp.zeros((*batch, 0, m), equation.matrix.dtype)
