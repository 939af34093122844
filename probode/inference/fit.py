"""Fits of parameters: the most probable ones given data, from several starts, with tempering, and their uncertainty.

The search is by BFGS with a line search (Nocedal & Wright 2006, "Numerical optimization", 6.1; SciPy, which JAX needs,
too). The uncertainty is that of the normal approximation about the optimum (Laplace).
"""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..algebra.normal import Normal
from ..information.observations import Observations
from ..posterior.solution import Solution
from ..posterior.uncertain_start import root_of_normal
from ..solver import Solver
from ..util import describe
from ..util.checks import as_float, as_integer, as_scalar, require
from ..util.components import component_names
from .likelihoods import fenrir_log_likelihood
from .tempering import DiffusionTempering


# How many iterations every stage of a tempered fit but the last has.
_IN_STAGE = 8
# Log densities that differ by less than this belong to the same optimum.
_SAME = 0.1
# The step of the differences of gradients, as a share of a parameter: gradients are those of an adaptive solve, whose
# steps change with the parameters.
_DIFFERENCE = 1e-3


class Fit(eqx.Module):
    """The parameters that a fit has found, as ``fit`` returns it.

    - ``parameters``: the most probable ones, a PyTree like the first guess.
    - ``std``: their standard deviations, a PyTree like ``parameters``, and ``covariance``: ``(p, p)`` of the ravelled
      parameters; of the normal approximation, NaN where the optimum is not a maximum, as where data say nothing.
    - ``log_density``: the log likelihood of the data, plus the log prior if there is one, at ``parameters``.
    - ``solution``: the ``Solution`` there at the times of the data.
    - ``starts``, ``ends``: where every search began and ended, PyTrees with a leading axis ``(starts,)``.
    - ``log_densities``: at the ends, ``(starts,)``; minus infinity where solves fail.
    - ``converged``: whether a search has stopped by itself, ``(starts,)``.
    - ``iterations``: how many it took in its last stage, ``(starts,)``.

    ``summary()``: a table. ``distribution``: parameters and covariance as a ``Normal``, for ``marginalise``.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: args)))
    >>> data = probode.Observations([1.0, 2.0], jnp.array([0.5, 1.0]), 0.1)
    >>> found = probode.fit(solver, 0.0, 0.0, 2.0, data, 1.0)
    >>> print(f"{found.parameters:.3f} +- {found.std:.3f}")
    0.500 +- 0.045
    """

    parameters: PyTree[Float[Array, "..."]]
    std: PyTree[Float[Array, "..."]]
    covariance: Float[Array, "p p"]
    log_density: Float[Array, ""]
    solution: Solution
    starts: PyTree[Float[Array, "starts ..."]]
    ends: PyTree[Float[Array, "starts ..."]]
    log_densities: Float[Array, " starts"]
    converged: Bool[Array, " starts"]
    iterations: Int[Array, " starts"]

    @property
    def distribution(self) -> Normal:
        """The normal approximation: the ``Normal`` of the parameters, with a right square root of their covariance."""
        return Normal(self.parameters, jnp.linalg.cholesky(self.covariance).T)

    def _rows(self):
        values, names = ravel_pytree(self.parameters)[0], component_names(self.parameters, 0, "parameter")
        rows = [
            (name, f"{value:.6g} +- {std:.2g}")
            for name, value, std in zip(names, np.asarray(values), np.sqrt(np.diag(self.covariance)), strict=True)
        ]
        same = int(np.sum(self.log_densities > self.log_density - _SAME))
        rows.append(("log density", f"{float(self.log_density):.6g}"))
        done = int(np.sum(self.converged))
        rows.append(("starts", f"{self.converged.size}, {done} converged, {same} of them to this optimum"))
        return rows

    def summary(self) -> str:
        """Parameters with standard deviations, the log density, and how many starts have found it, as text."""
        return describe.as_text(self._rows())

    def __repr__(self) -> str:
        return f"Fit(parameters={describe.brief(self.parameters)}, log_density={describe.brief(self.log_density)})"

    def _repr_html_(self):
        return describe.as_html("Fit", self._rows())


def fit(
    solver: Solver,
    u0: PyTree,
    t0: Any,
    t1: Any,
    data: Observations,
    guess: PyTree,
    *,
    args: Any = None,
    starts: Any = 1,
    key: Any = None,
    positive: bool = False,
    likelihood: Callable = fenrir_log_likelihood,
    tempering: DiffusionTempering | None = None,
    max_iterations: Any = 100,
    tolerance: Any = 1e-6,
) -> Fit:
    """The ``Fit`` of parameters to data: the most probable ones, with their uncertainty.

    - ``solver``, ``t0``, ``t1``, ``data``: as in ``fenrir_log_likelihood``.
    - ``u0``: the initial value, or a function of the parameters that returns it.
    - ``guess``: the first guess of the parameters, a PyTree of floating-point numbers or arrays. Or a ``Normal`` over
      them: their prior, whose log density is added; the first start is its mean, others are drawn from it.
    - ``args``: a function of the parameters that returns the ``args`` of the equation; the parameters by default.
    - ``starts``: the number of starts, for a ``Normal``; or starts of your own, a PyTree like the parameters with a
      leading axis. The best end counts.
    - ``key``: a random key of JAX for the starts; ``jax.random.key(0)`` by default.
    - ``positive``: whether all parameters are positive; then the search is in their logarithms, and starts that are
      drawn are made positive.
    - ``likelihood``: ``fenrir_log_likelihood``, ``dalton_log_likelihood``, ``filtering_log_likelihood``, or a function
      with the same arguments.
    - ``tempering``: a ``DiffusionTempering``, for starts that are far from the optimum: every start goes through all
      stages. The last one has the solver's own output scale and no calibration.
    - ``max_iterations``: of BFGS for every start; ``tolerance``: it stops if no parameter (or logarithm) moves by
      more than this, relative to its size.

    The uncertainty takes ``2 p`` gradients for ``p`` parameters, whose differences are the curvature.

    Raises ``TypeError`` or ``ValueError`` for wrong input: several starts without a ``Normal``, a guess that is not
    positive where it should be, starts unlike the guess; ``RuntimeError`` if the solve fails at the ends of all
    searches, which ``Solver.solve`` explains.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -args["rate"] * u)))
    >>> data = probode.Observations([0.5, 1.0, 2.0], jnp.exp(-1.3 * jnp.array([0.5, 1.0, 2.0])), 0.01)
    >>> found = probode.fit(solver, 1.0, 0.0, 2.0, data, {"rate": 1.0}, positive=True)
    >>> print(f"{found.parameters['rate']:.2f}")
    1.30
    """
    target = _Target(u0, t0, t1, data, args, positive, likelihood, guess)
    begins = target.starts(starts, key)
    most, tolerance = as_integer(max_iterations, "max_iterations", 1), as_scalar(tolerance, "tolerance")
    stages = [solver] if tempering is None else list(tempering.solvers(solver))
    search, ends = _Search(target.objective), []
    for x in np.asarray(begins):
        for stage in stages[:-1]:
            x = search(x, stage, min(_IN_STAGE, most), float(tolerance))[0]
        ends.append(search(x, stages[-1], most, float(tolerance)))
    x, values, converged, count = (np.stack(column) for column in zip(*ends, strict=True))
    if not np.any(np.isfinite(values)):
        raise RuntimeError(
            "No solve was successful at the end of any search: solve once with these parameters, Solver.solve says why "
            "it fails (often max_steps)."
        )
    best = x[i := int(np.argmin(np.where(np.isfinite(values), values, np.inf)))]
    covariance = target.covariance(best, lambda x: search.slope(x, stages[-1]))
    parameters = target.parameters(best)
    start, own = target.start_of(parameters), target.args_of(parameters)
    return Fit(
        parameters,
        target.unravel(jnp.sqrt(jnp.diagonal(covariance))),
        covariance,
        -jnp.asarray(values[i]),
        stages[-1].solve(start, t0, t1, args=own, save_at=data.ts, throw=False),
        jax.vmap(target.parameters)(begins),
        jax.vmap(target.parameters)(jnp.asarray(x)),
        -jnp.asarray(values),
        jnp.asarray(converged),
        jnp.asarray(count),
    )


class _Target:
    """The negative log density of flat parameters, ``(p,)``, or of their logarithms, and what belongs to it."""

    def __init__(
        self,
        u0: Any,
        t0: Any,
        t1: Any,
        data: Observations,
        args: Any,
        positive: bool,
        likelihood: Callable,
        guess: PyTree,
    ) -> None:
        if args is not None and not callable(args):
            raise TypeError(f"fit(args) must be a function of the parameters, got {args!r}; constants go into it.")
        self.u0, self.t0, self.t1, self.data, self.args = u0, t0, t1, data, args
        self.is_positive, self.likelihood = bool(positive), likelihood
        self.prior: Any = None
        mean = guess
        if isinstance(guess, Normal):
            mean = guess.mean
        mean = jax.tree.map(lambda x: jnp.asarray(as_float(x, "fit(guess)")), mean)
        self.guess, self.unravel = ravel_pytree(mean)
        if self.guess.size == 0:
            raise ValueError("fit(guess) has no numbers in it: there is nothing to fit.")
        if isinstance(guess, Normal):
            self.prior = root_of_normal(guess, self.guess, "the prior of the parameters")
        if self.is_positive:
            self.guess = require(self.guess, self.guess > 0, "fit(positive=True) needs a guess that is positive")

    def parameters(self, x):
        return self.unravel(jnp.exp(x) if self.is_positive else x)

    def start_of(self, parameters):
        return self.u0(parameters) if callable(self.u0) else self.u0

    def args_of(self, parameters):
        return parameters if self.args is None else self.args(parameters)

    def objective(self, x: Float[Array, " p"], solver: Solver) -> Float[Array, ""]:
        parameters = self.parameters(x)
        start, args = self.start_of(parameters), self.args_of(parameters)
        value = self.likelihood(solver, start, self.t0, self.t1, self.data, args=args)
        if self.prior is not None:
            # A square root that a user passes need not be triangular.
            away = jnp.linalg.solve(self.prior.T, ravel_pytree(parameters)[0] - self.guess)
            value = value - jnp.sum(away**2) / 2
        return -value

    def starts(self, starts, key):
        """Where the searches begin, ``(starts, p)``."""
        if isinstance(starts, int | np.integer) and not isinstance(starts, bool):
            number = as_integer(starts, "fit(starts)", 1)
            if number > 1 and self.prior is None:
                raise ValueError(
                    "fit(starts) draws starts from a Normal: pass the guess as Normal(mean, standard deviations), or "
                    "starts of your own, a PyTree like the guess with a leading axis."
                )
            begins = self.guess[None]
            if number > 1:
                key = jax.random.key(0) if key is None else key
                draws = jax.random.normal(key, (number - 1, self.guess.size), self.guess.dtype)
                begins = jnp.concatenate([begins, self.guess + draws @ self.prior])
            begins = jnp.abs(begins) if self.is_positive else begins
        else:
            example = self.unravel(self.guess)
            leaves = jax.tree.map(lambda x: jnp.asarray(as_float(x, "fit(starts)")), starts)
            same = jax.tree.structure(leaves) == jax.tree.structure(example) and all(
                x.ndim == like.ndim + 1 and x.shape[1:] == like.shape
                for x, like in zip(jax.tree.leaves(leaves), jax.tree.leaves(example), strict=True)
            )
            if not same:
                raise ValueError("fit(starts) must be a number, or a PyTree like the guess with a leading axis.")
            begins = jax.vmap(lambda tree: ravel_pytree(tree)[0])(leaves)
        if self.is_positive:
            begins = require(begins, begins > 0, "fit(positive=True) needs starts that are positive")
            return jnp.log(begins)
        return begins

    def covariance(self, x, slope):
        """The covariance of the parameters in the normal approximation at ``x``: the inverse of the curvature there.

        The curvature is computed from differences of ``slope``, a function that returns the gradient.
        """
        size = _DIFFERENCE * (np.ones_like(x) if self.is_positive else np.where(x == 0, 1, abs(x)))
        steps = np.diag(size)
        curvature = np.stack([(slope(x + h) - slope(x - h)) / (2 * h[i]) for i, h in enumerate(steps)])
        curvature = (curvature + curvature.T) / 2
        if not np.all(np.isfinite(curvature)) or np.min(np.linalg.eigvalsh(curvature)) <= 0:
            return jnp.full((x.size, x.size), jnp.nan, x.dtype)
        covariance = np.linalg.inv(curvature)
        # Of a parameter from that of its logarithm, to first order.
        scale = np.exp(x) if self.is_positive else np.ones(x.size)
        return jnp.asarray(covariance * scale * scale[:, None], x.dtype)


class _Search:
    """Searches by BFGS for the least value of a function of flat parameters and a solver, compiled once for all.

    On the host: a program with the line search in it would hold the gradient several times, and compile for minutes.
    """

    def __init__(self, objective: Callable) -> None:
        self.value_and_slope = eqx.filter_jit(jax.value_and_grad(objective))

    def slope(self, x: Any, solver: Solver) -> np.ndarray:
        return np.asarray(self.value_and_slope(jnp.asarray(x), solver)[1])

    def __call__(
        self, start: np.ndarray, solver: Solver, iterations: int, tolerance: float
    ) -> tuple[np.ndarray, float, bool, int]:
        """Where a search ends, the value there, whether it has stopped by itself, and how many iterations it took."""

        from scipy.optimize import minimize  # beside JAX, which needs SciPy, but not in a program that fits nothing

        def value_and_slope(x):
            value, slope = self.value_and_slope(jnp.asarray(x, start.dtype), solver)
            return float(value), np.asarray(slope, float)

        options = {"maxiter": iterations, "xrtol": tolerance, "gtol": 0.0}
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the line search, about values that are not finite
            found = minimize(value_and_slope, np.asarray(start, float), method="BFGS", jac=True, options=options)
        x = found.x if np.isfinite(found.fun) else np.asarray(start, float)
        return x.astype(start.dtype), float(found.fun), bool(found.nit < iterations), int(found.nit)
