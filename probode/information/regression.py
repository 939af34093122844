"""Statistical linear regression: equations linearised over the spread of the prediction, not at its mean alone.

The expectation of the equation and of its derivative under a Gaussian, by a cubature rule: by Stein's lemma the second
is the slope of the best linear fit, and unlike the usual quotient of covariances it needs no inverse, so that a certain
state is no special case. What the fit leaves unexplained can enter as noise of the equation. (Statistical linear
regression: Lefebvre et al. 2002; Garcia-Fernandez et al. 2015. Cubature rules: Arasaratnam & Haykin 2009; Julier &
Uhlmann 2004.)
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..algebra.linearisation import Linearisation
from ..algebra.normal import Normal, deviation, square
from ..equations.problems import ODE, AbstractProblem
from ..util.checks import as_integer
from .constraints import AbstractConstraint, require_problem
from .iteration import Iteration


class AbstractCubature(eqx.Module):
    """Points and weights that integrate polynomials under a standard normal, exactly up to degree three.

    A subclass defines ``rule``.

    >>> import probode
    >>> probode.testing.check_cubature(probode.GaussHermite(4))  # or a subclass of your own
    """

    @abstractmethod
    def rule(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """The points and weights of a quadrature rule for expectations under a standard normal distribution.

        ``E[g(x)] ~ sum_i weights[i] g(points[i])``, with ``points`` of shape ``(points, dim)`` and positive ``weights``
        of shape ``(points,)`` that sum to one: arrays of NumPy.
        ``dim``: the number of directions of an average. For ``SLR0`` and ``SLR1`` these are ``order d`` for an ODE,
        ``(order + 1) d`` for a ``Residual``, more under ``Blocks`` of different sizes; for ``marginalise`` as many as
        there are uncertain numbers. Called where a solve is traced, not in each of its steps.
        """


class SphericalCubature(AbstractCubature):
    """The spherical cubature rule for Gaussian expectations: ``2 dim`` points on the axes, with equal weights.

    It is exact for polynomials up to degree three. (Arasaratnam & Haykin 2009, "Cubature Kalman filters".)

    >>> import probode
    >>> points, weights = probode.SphericalCubature().rule(3)
    >>> points.shape
    (6, 3)
    """

    def rule(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        return np.sqrt(dim) * np.concatenate([np.eye(dim), -np.eye(dim)]), np.full(2 * dim, 1 / (2 * dim))


class UnscentedTransform(AbstractCubature):
    """The unscented transform: the mean, and ``2 dim`` points on the axes at the distance ``sqrt(dim + kappa)``.

    It is exact for polynomials up to degree three; with ``kappa = 3 - dim`` fourth moments along the axes are right as
    well. Raises ``ValueError`` unless ``kappa`` is positive. (Julier & Uhlmann 2004, "Unscented filtering and nonlinear
    estimation".)

    >>> import probode
    >>> points, weights = probode.UnscentedTransform(kappa=1.0).rule(3)
    >>> points.shape
    (7, 3)
    """

    kappa: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        if not self.kappa > 0:
            raise ValueError(f"UnscentedTransform(kappa) must be positive, for positive weights, got {self.kappa!r}.")

    def rule(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        spread = dim + self.kappa
        points = np.sqrt(spread) * np.concatenate([np.zeros((1, dim)), np.eye(dim), -np.eye(dim)])
        return points, np.array([self.kappa / spread] + [1 / (2 * spread)] * (2 * dim))


class GaussHermite(AbstractCubature):
    """``points ** dim`` points, exact to degree ``2 points - 1`` in every direction: for small ``dim``. Raises
    ``ValueError`` unless ``points`` is a positive integer.

    >>> import probode
    >>> points, weights = probode.GaussHermite(3).rule(2)
    >>> points.shape, round(float(weights.sum()), 12)
    ((9, 2), 1.0)
    """

    points: int = eqx.field(static=True, default=3, converter=lambda n: as_integer(n, "GaussHermite(points)", 1))

    def rule(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        if self.points**dim > 100_000:
            raise ValueError(f"GaussHermite({self.points}) has {self.points}^{dim} points: use SphericalCubature().")
        nodes, weights = np.polynomial.hermite_e.hermegauss(self.points)
        weights = weights / np.sum(weights)
        points = np.array(list(itertools.product(nodes, repeat=dim)))
        return points, np.prod(np.array(list(itertools.product(weights, repeat=dim))), axis=1)


def require_cubature(value: Any) -> AbstractCubature:
    """The rule itself; raises ``TypeError`` for anything else."""
    if not isinstance(value, AbstractCubature):
        raise TypeError(f"cubature must be a rule like SphericalCubature(), got {value!r}.")
    return value


class SLR1(AbstractConstraint):
    """First-order statistical linear regression: the equation and its Jacobian averaged over the predicted state.

    Equal to ``TS1`` where the equation is affine, or the state certain. ``cubature``: the rule of the averages, over
    ``(order + 1) d`` directions (``order d`` for an ODE). ``noise``: whether what the fit leaves unexplained enters as
    noise of the equation, which no longer holds exactly then. The state is spread by what is uncertain so far;
    ``DynamicCalibration(relinearise=True)`` adds the noise of the step.
    ``evaluations`` and ``relinearise`` as for ``TS1``. Raises ``TypeError`` for anything but an ``ODE`` or a
    ``Residual``.

    >>> import jax.numpy as jnp, probode
    >>> ode = probode.ODE(lambda t, u, args: jnp.sin(u))
    >>> probode.SLR1(ode, cubature=probode.UnscentedTransform()).order
    1
    """

    problem: AbstractProblem
    cubature: AbstractCubature
    noise: bool = eqx.field(static=True)
    iteration: Iteration

    def __init__(
        self,
        problem: Any,
        *,
        cubature: Any = SphericalCubature(),
        noise: bool = False,
        evaluations: Any = 1,
        relinearise: bool = False,
    ):
        self.problem = require_problem("SLR1", problem, AbstractProblem, "an ODE or a Residual")
        self.cubature, self.noise = require_cubature(cubature), noise
        self.iteration = Iteration(evaluations, relinearise)

    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        return _average(self, self.problem.first_order, t, predicted, layout, args)


class SLR0(AbstractConstraint):
    """The equation ``u^(k) = E[f]`` with the field averaged over the prediction: regression of order zero, ``H = E_k``.

    ``cubature`` and ``noise`` as for ``SLR1``. Equal to ``TS0`` where the state is certain or the field affine (without
    ``noise``). Raises ``TypeError`` for anything but an ``ODE``.

    >>> import probode
    >>> probode.SLR0(probode.ODE(lambda t, u, args: -u)).order
    1
    """

    problem: ODE
    cubature: AbstractCubature
    noise: bool = eqx.field(static=True)
    iteration: Iteration
    first_order = False

    def __init__(self, problem: Any, *, cubature: Any = SphericalCubature(), noise: bool = False, evaluations: Any = 1):
        self.problem = require_problem("SLR0", problem, ODE, "an ODE")
        self.cubature, self.noise = require_cubature(cubature), noise
        self.iteration = Iteration(evaluations)

    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        return _average(self, self.problem.zeroth_order, t, predicted, layout, args)


def _average(
    constraint: SLR0 | SLR1, linearise: Callable, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree
) -> Linearisation:
    problem, us = constraint.problem, layout.unpack(predicted.mean)
    number = problem.num_linearised
    directions = _directions(predicted, number, layout)
    nodes, weights = (jnp.asarray(x, layout.dtype) for x in constraint.cubature.rule(directions.shape[0]))
    deltas = jnp.tensordot(nodes, directions, axes=1)
    points = us[None] + jnp.pad(deltas, ((0, 0), (0, us.shape[0] - number), (0, 0)))
    equations = jax.vmap(lambda us: linearise(t, us, layout, args))(points)
    # An ODE's own derivative enters it linearly, and stays at the prediction.
    mean = jax.tree.map(lambda x: jnp.tensordot(weights, x, axes=1), equations)
    if not constraint.noise:
        return mean
    mean.require_separate(f"{type(constraint).__name__}(noise=True)", layout)
    matrix, residual = mean.matrix, mean.residual
    moved = jax.vmap(layout.pack)(points - us[None])[..., : matrix.shape[-1], :]
    unexplained = equations.residual - residual[None] - matrix[None] @ moved
    if unexplained.shape[-1] > 1:
        raise ValueError(
            f"{type(layout.factorisation).__name__}() has one covariance for all components, but what the linear fit "
            "leaves unexplained differs between them: use noise=False, BlockDiagonal() or Dense()."
        )
    rows = jnp.sqrt(weights).reshape(-1, *[1] * (unexplained.ndim - 1)) * unexplained
    return Linearisation(matrix, residual, noise=jnp.moveaxis(rows[..., 0], 0, -2), whole=equations.whole)


def _directions(predicted: Normal, number: int, layout: Layout) -> Float[Array, "N number d"]:
    """The principal directions of the leading derivatives: independent standard normals along them move these as their
    distribution says."""
    dim = number * layout.identity().shape[-1]
    leading = square(Normal(predicted.mean[..., :dim, :], predicted.factor[..., :dim]))
    shape = leading.mean.shape
    units = jnp.eye(int(np.prod(shape)), dtype=layout.dtype).reshape(-1, *shape)
    return jax.vmap(lambda unit: layout.unpack(deviation(leading.factor, unit)))(units)
