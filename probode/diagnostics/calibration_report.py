"""Is the uncertainty right? Errors against a reference, measured in the standard deviations that a solver reports.

Measures: normalised estimation error squared (NEES, here ``chi^2 / d``: one if the covariance is right, above one if it
is overconfident), coverage, and the non-credibility and inclination indices of Li & Zhao (2006).
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
from ..algebra.linalg import compiled, substitute, triangularise
from ..algebra.normal import Normal, batched
from ..posterior.solution import SaveAt, Solution
from ..posterior.trajectory import rows_of_steps
from ..solver import Solver
from ..stepping.controllers import Tolerances
from ..stepping.result import Result
from ..util.checks import as_float, as_scalar


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """One entry per solve, as arrays of shape ``(solves,)``; ``str`` of it is a table.

    ``rtol``: NaN for a given solution. ``steps``: accepted. ``error``: root mean square at the last time over that of
    the reference. ``terminal``: ``chi^2 / d`` at the last time. ``trajectory``: its geometric mean over the times after
    the first tenth of the interval, of what the solver knew at each time (the filter's marginals); ``smoothed``: of the
    smoothed marginals, NaN where there are none. The following look at the posterior, smoothed if the strategy is:
    ``anees``: the arithmetic mean of ``chi^2 / d``; ``coverage``: ``(solves, 3)``, the share of components and times
    within one, two and three standard deviations (0.683, 0.954, 0.997 for a Gaussian); ``non_credibility`` and
    ``inclination``: mean size and mean of ``10 log10(chi^2 / d)``, in decibels; a positive inclination is
    overconfident. ``successful``: whether the solve reached its end; if not, its entries are NaN.

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

    def __str__(self):
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
    """Compare the uncertainty of a solution, or of a solver over a sweep of tolerances, with the true error.

    ``reference(times)`` returns the solution at an array of times, a PyTree like ``u`` with a leading time axis, good
    to far better than the tolerances. For a ``Solver`` pass ``u0``, ``t0``, ``t1`` (and ``args``) as to ``solve``; it
    is run for every ``rtol`` of ``tolerances`` with ``atol = atol_over_rtol * rtol``. Prints a table unless
    ``show=False``. Raises ``ValueError`` if a solver comes without ``u0, t0, t1``, ``TypeError`` for another subject.

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
    """The entries of one row of the report."""
    path, layout = solution.trajectory, solution.layout
    layout.require_shared_algebra("calibration_report")
    steps = int(solution.stats["num_accepted_steps"])
    if solution.result != Result.successful:
        return (rtol, steps, *[np.nan] * 5, np.full(3, np.nan), np.nan, np.nan, False)
    # Every time once, without the padding; the shapes of what is compiled stay those of the padded rows.
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
    end = np.ravel(jax.vmap(layout.unpack)(solution.marginals.mean)[real][-1, 0]) - truth[-1]
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
    def one(state, u):
        error = layout.unpack(state.mean)[0] - u
        return _whiten(state, layout.pack(error[None])), jnp.abs(error), layout.std(state.factor)[0]

    return jax.vmap(one)(marginals, truth)


@batched
def _whiten(state, error):
    m = error.shape[0]
    root = triangularise(None, state.factor[:, :m])
    whitened = substitute(root, error)
    return jnp.where((jnp.diagonal(root)[:, None] == 0) & (error != 0), jnp.inf, whitened)


def _errors(marginals: Normal, truth, layout: Layout):
    """``chi^2 / d`` at every time, and the errors of all components in standard deviations."""
    whitened, error, std = (np.asarray(x) for x in _whitened(marginals, truth, layout))
    chi = np.mean(np.reshape(whitened, (whitened.shape[0], -1)) ** 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(error == 0, 0, error / std)
    return chi, scaled
