"""Calibration of the uncertainty: true errors in units of the standard deviations that a solver reports.

The measures are the normalised estimation error squared (NEES, here ``chi^2 / d``: on average one if the covariance is
right, above one if it is too small), coverage, and the non-credibility and inclination indices of Li & Zhao (2006,
"Measuring estimator's credibility: noncredibility index").
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..algebra.factorisations import Layout
from ..algebra.linalg import substitute, triangularise
from ..algebra.marginals import over_times
from ..algebra.normal import Normal, batched
from ..posterior.solution import SaveAt, Solution
from ..posterior.trajectory import rows_of_steps
from ..solver import Solver
from ..stepping.controllers import Tolerances
from ..stepping.result import Result
from ..util.checks import as_float, as_scalar
from ..util.tracing import compiled


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """Measures of the calibration of one or several solves, as ``calibration_report`` returns them.

    Fields are arrays with one entry per solve, ``(solves,)``; ``str`` of a report is a table. ``chi^2 / d`` is the
    error of ``u`` squared over its covariance, divided by the number of components.

    - ``rtol``: the relative tolerance of the solve; NaN for a solution that was passed in.
    - ``steps``: the number of accepted steps.
    - ``error``: the root mean square error of ``u`` at the last time, over the root mean square of the reference there.
    - ``terminal``: ``chi^2 / d`` at the last time.
    - ``trajectory``: the geometric mean of ``chi^2 / d`` under the filtering distributions; NaN for a smoothed solution
      that has no filtering distributions at its times.
    - ``smoothed``: the same under the smoothed distributions; NaN for a filter.
    - ``anees``: the arithmetic mean of ``chi^2 / d`` (average NEES).
    - ``coverage``: the share of components and times at which the error is within one, two and three standard
      deviations, ``(solves, 3)``; 0.683, 0.954, 0.997 for a Gaussian.
    - ``non_credibility``, ``inclination``: the mean magnitude and the mean of ``10 log10(chi^2 / d)``, in decibels;
      a positive inclination means that standard deviations are too small.
    - ``successful``: whether the solve reached its end. If not, all measures are NaN.

    All but ``error`` and ``terminal`` leave out the first tenth of the interval. All but ``error``, ``trajectory`` and
    ``smoothed`` are under the posterior of the solution: smoothed if its strategy is a smoother.

    >>> import jax.numpy as jnp, probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
    >>> report = probode.calibration_report(solution, lambda t: jnp.exp(-t), show=False)
    >>> report.coverage.shape
    (1, 3)
    """

    rtol: np.ndarray
    steps: np.ndarray
    error: np.ndarray
    terminal: np.ndarray
    trajectory: np.ndarray
    smoothed: np.ndarray
    anees: np.ndarray
    coverage: np.ndarray
    non_credibility: np.ndarray
    inclination: np.ndarray
    successful: np.ndarray

    def __str__(self) -> str:
        head = f"{'rtol':>8} {'steps':>6} {'error':>8} {'terminal':>9} {'trajectory':>10} {'smoothed':>9} {'anees':>9}"
        lines = [f"{head} {'1 std':>6} {'2 std':>6} {'3 std':>6} {'nci':>6} {'incl':>6}"]
        for i, rtol in enumerate(self.rtol):
            sizes = (self.terminal, self.trajectory, self.smoothed, self.anees)
            chi = " ".join(f"{x[i]:{w}.1e}" for x, w in zip(sizes, (9, 10, 9, 9), strict=True))
            shares = " ".join(f"{x:6.3f}" for x in self.coverage[i])
            indices = f"{self.non_credibility[i]:6.1f} {self.inclination[i]:6.1f}"
            row = f"{rtol:8.0e} {self.steps[i]:6d} {self.error[i]:8.1e} {chi} {shares} {indices}"
            lines.append(row if self.successful[i] else f"{row}  (did not reach the end)")
        return "\n".join(lines)


def calibration_report(
    subject: Any,
    reference: Callable[[np.ndarray], PyTree],
    *,
    u0: PyTree = None,
    t0: Any = None,
    t1: Any = None,
    args: PyTree = None,
    tolerances: Sequence[float] = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9),
    atol_over_rtol: float = 1e-2,
    show: bool = True,
) -> CalibrationReport:
    """A ``CalibrationReport`` that compares reported standard deviations with true errors.

    - ``subject``: a ``Solution``; or a ``Solver``, which is then run at several tolerances.
    - ``reference``: a function of an array of times ``(time,)`` that returns the solution there, a PyTree like ``u``
      with a leading time axis, with an error far below the tolerances.
    - ``u0``, ``t0``, ``t1``, ``args``: of the problem, for a ``Solver``; as in ``Solver.solve``.
    - ``tolerances``: the relative tolerances at which a ``Solver`` is run.
    - ``atol_over_rtol``: the absolute tolerance over the relative one.
    - ``show``: whether the table is printed.

    Raises ``ValueError`` for a ``Solver`` without ``u0``, ``t0`` and ``t1``, and under ``Subspace``; ``TypeError`` for
    another subject.

    >>> import jax.numpy as jnp, probode
    >>> solution = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0)
    >>> bool(probode.calibration_report(solution, lambda t: jnp.exp(-t), show=False).successful.all())
    True
    """
    if isinstance(subject, Solution):
        entries = [_measure(subject, reference, np.nan)]
    elif isinstance(subject, Solver):
        if u0 is None or t0 is None or t1 is None:
            raise ValueError("calibration_report(solver, ...) needs u0, t0 and t1, as solver.solve does.")
        entries = []
        for rtol in as_float(tolerances, "tolerances"):
            allowed = Tolerances(rtol, rtol * as_scalar(atol_over_rtol, "atol_over_rtol"))
            solver = eqx.tree_at(lambda s: s.controller.tolerances, subject, allowed)
            solution = solver.solve(u0, t0, t1, args=args, save_at=SaveAt(t0=True, steps=True), throw=False)
            entries.append(_measure(solution, reference, float(rtol)))
    else:
        raise TypeError(f"calibration_report needs a Solver or a Solution, got {type(subject).__name__}.")
    report = CalibrationReport(*(np.array(column) for column in zip(*entries, strict=True)))
    if show:
        print(report)
    return report


def _measure(solution, reference, rtol):
    """The entries of a report for one solution, in the order of its fields."""
    if solution.state is None:
        raise ValueError("calibration_report is about initial value problems, not about boundary value problems.")
    path, layout = solution.trajectory, solution.layout
    layout.require_shared_algebra("calibration_report")
    steps = int(solution.stats["num_accepted_steps"])
    if solution.result != Result.successful:
        return (rtol, steps, *[np.nan] * 5, np.full(3, np.nan), np.nan, np.nan, False)
    # Each time once, without the repetitions of the last one with which the arrays are filled up. Compiled functions
    # get the arrays with them: their shapes would otherwise differ from solve to solve.
    t = np.asarray(solution.t)
    real = np.concatenate([[True], t[1:] != t[:-1]])
    truth = np.asarray(jax.vmap(layout.ravel)(reference(t[real])))
    padded = truth[np.cumsum(real) - 1]
    chi, scaled = (x[real] for x in _errors(solution.marginals, padded, layout))
    t = t[real]
    later = abs(t - t[0]) > 0.1 * abs(t[-1] - t[0]) if t.size > 1 else np.ones(1, bool)

    known, smoothed = chi[later], np.nan
    if path is not None and path.smoothed is not None:
        smoothed, known = _geometric_mean(known), np.array([np.nan])
        ends = np.append(0, rows_of_steps(path.rows, path.reached, real.size - 1))
        if path.dense and np.array_equal(np.asarray(path.rows.t)[ends], solution.t):
            filtered = jax.tree.map(lambda x: x[ends], path.rows.distribution)
            known = _errors(filtered, padded, layout)[0][real][later]
    end = np.asarray(layout.ravel(jax.tree.map(lambda x: x[real][-1], solution.mean))) - truth[-1]
    decibels = 10 * np.log10(np.maximum(chi[later], 1e-300))
    return (
        rtol,
        steps,
        np.sqrt(np.mean(end**2) / np.mean(np.asarray(truth[-1]) ** 2)),
        chi[-1],
        _geometric_mean(known),
        smoothed,
        np.mean(chi[later]),
        np.array([np.mean(scaled[later] <= k) for k in (1, 2, 3)]),
        np.mean(abs(decibels)),
        np.mean(decibels),
        True,
    )


def _geometric_mean(x):
    return np.exp(np.mean(np.log(np.maximum(x, 1e-300))))


@compiled
def _whitened(marginals, truth, layout):
    def one(layout, mean, factor, u):
        error = layout.unpack(mean)[0] - u
        return _whiten(Normal(mean, factor), layout.pack(error[None])), jnp.abs(error), layout.std(factor)[0]

    return over_times(one, layout, marginals.mean, 3)(layout, marginals.mean, marginals.factor, truth)


@batched
def _whiten(state, error):
    """The error of ``u`` in coordinates in which its covariance is the identity; infinite where it has no variance."""
    m = error.shape[0]
    root = triangularise(None, state.factor[:, :m])
    whitened = substitute(root, error)
    return jnp.where((jnp.diagonal(root)[:, None] == 0) & (error != 0), jnp.inf, whitened)


def _errors(marginals: Normal, truth: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """``chi^2 / d`` at every time, ``(time,)``, and the errors in standard deviations, ``(time, d)``."""
    whitened, error, std = (np.asarray(x) for x in _whitened(marginals, truth, layout))
    chi = np.mean(np.reshape(whitened, (whitened.shape[0], -1)) ** 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(error == 0, 0, error / std)
    return chi, scaled
