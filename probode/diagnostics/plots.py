"""Pictures of solutions, with matplotlib (the ``plot`` extra), which is imported when the first one is drawn.

Every function takes the axes to draw on, makes new ones by default, and returns them, so that labels, limits and files
can be set with matplotlib. All raise ``ImportError`` without matplotlib.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..util.components import columns, component_names
from .axes import new_axes
from .curves import curves, many_times


# How many components are drawn by default.
_COMPONENTS = 8
# Up to so many times a marker shows each of them: the line between them is a guess.
_MARKED = 60
# How many times as wide as its line a band is at least where it is magnified as a note suggests.
_VISIBLE = 5.0
_NOTE = "probode.note"


def plot(
    solution: Any,
    ax: Any = None,
    *,
    components: Sequence[int] | None = None,
    derivative: int = 0,
    std: float = 2.0,
    magnify: float = 1.0,
    samples: int = 0,
    key: Any = None,
    ts: Any = None,
    labels: Sequence[str] | None = None,
) -> Any:
    """The axes with means over time, bands of standard deviations, samples, and a note of what the bands are.

    A smoother that has kept its steps is drawn at any time. A filter knows the solution at the ends of its steps, and
    predictions between them, which jump there: if it has kept its steps, their ends are drawn, with markers where they
    are few, joined by the cubics that have their means and derivatives (standard deviations: by straight lines). Other
    solutions are drawn at their saved times, joined by straight lines. Events are marked by dotted lines, with bands of
    the standard deviations of their times.

    - ``solution``: a ``Solution``, not a batch.
    - ``ax``: the axes to draw on, new ones by default.
    - ``components``: indices into the ravelled ``u``; the first eight by default.
    - ``derivative``: which derivative of ``u`` is drawn.
    - ``std``: half the width of the bands, in standard deviations.
    - ``magnify``: a factor on the distance of bands and samples from the mean, where they are too thin to be seen. The
      note tells the factor; where all bands are thinner than the line it says so, and which factor would show them.
    - ``samples``: the number of joint samples of ``u`` that are drawn, from smoothers.
    - ``key``: a random key of JAX for the samples; ``jax.random.key(0)`` by default.
    - ``ts``: the times to draw, for a solution that has kept its steps: also a filter's predictions.
    - ``labels``: one for each component; by default its place in the PyTree.

    Raises ``ImportError`` without matplotlib; ``ValueError`` for components out of range, another number of labels than
    of components, a factor ``magnify`` that is not positive, samples of a derivative, or samples of a filter.
    """
    if not magnify > 0:
        raise ValueError(f"plot(magnify) is a positive factor on the width of the bands, got {magnify}.")
    ax = new_axes(ax)
    drawn = curves(solution, derivative, ts)
    chosen = _chosen(components, drawn.mean.shape[1])
    names = _labels(drawn.known.mean, chosen, labels)
    draws = None
    if samples:
        if derivative:
            raise ValueError("plot(samples=...) draws samples of u: leave derivative at 0.")
        key = jax.random.key(0) if key is None else key
        draws = columns(solution.sample(key, (samples,), ts=drawn.chosen), axes=2)
    # A line and a band of one time cannot be seen: a point with a bar.
    t, single = drawn.t, drawn.t.size == 1
    marker = "o" if single else "." if drawn.chosen is None and drawn.known.t.size <= _MARKED else None
    bands = []
    for i in chosen:
        mean, width = drawn.mean[:, i], std * magnify * drawn.std[:, i]
        (line,) = ax.plot(t, mean, marker=marker, markevery=drawn.each, label=names[i])
        if single:
            ax.errorbar(t, mean, yerr=width, color=line.get_color(), capsize=3)
        ax.fill_between(t, mean - width, mean + width, color=line.get_color(), alpha=0.25, linewidth=0)
        bands.append((line, width))
        if draws is not None:
            others = draws[:, :, i] if magnify == 1 else mean + magnify * (draws[:, :, i] - mean)
            ax.plot(t, others.T, color=line.get_color(), linewidth=0.5, alpha=0.5)
    _mark_events(ax, solution.events, std * magnify)
    ax.set_xlabel("time")
    if not ax.get_ylabel():
        ax.set_ylabel(_derivative(names[chosen[0]] if len(chosen) == 1 else "u", derivative))
    if drawn.mean.shape[1] > 1:
        ax.legend(frameon=False)
    _note(ax, lambda: _about_bands(ax, bands, std, magnify))
    if drawn.predicted:
        _note(ax, lambda: "a filter's predictions, which jump where steps end")
    return ax


def plot_phase(
    solution: Any, ax: Any = None, *, components: tuple[int, int] = (0, 1), std: float = 2.0, ellipses: int = 40
) -> Any:
    """The axes with a phase plot: one component of the mean against another, with ellipses of their covariance.

    ``components``: the two indices into the ravelled ``u``. ``std``: the size of the ellipses, in standard deviations.
    ``ellipses``: their largest number. Where the factorisation keeps components independent the axes of the ellipses
    are parallel to those of the picture. The times that are drawn are those of ``plot``. Raises ``ImportError`` without
    matplotlib, ``ValueError`` for components out of range.
    """
    from matplotlib.patches import Ellipse

    ax = new_axes(ax)
    drawn = curves(solution, 0, None)
    mean, known, at = drawn.mean, drawn.known, columns(drawn.known.mean)
    i, j = _chosen(components, mean.shape[1])
    names = _labels(known.mean, (i, j), None)
    (line,) = ax.plot(mean[:, i], mean[:, j])
    every = max(1, -(-at.shape[0] // ellipses))
    look = {"color": line.get_color(), "alpha": 0.25, "linewidth": 0}
    for row in range(0, at.shape[0], every):
        values, vectors = np.linalg.eigh(_covariance(known, row, i, j))
        angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        width, height = 2 * std * np.sqrt(np.maximum(values[::-1], 0))
        ax.add_patch(Ellipse((at[row, i], at[row, j]), width, height, angle=angle, **look))
    ax.autoscale_view()
    ax.set_xlabel(names[i])
    ax.set_ylabel(names[j])
    return ax


def plot_steps(solution: Any, ax: Any = None) -> Any:
    """The axes with the length of each accepted step at its end. Raises ``ValueError`` if the steps were not kept."""
    ax = new_axes(ax)
    t, _ = _steps(solution, "plot_steps")
    ax.semilogy(t[1:], abs(np.diff(t)), ".-", linewidth=1)
    ax.set_xlabel("time")
    ax.set_ylabel("step")
    return ax


def plot_scale(solution: Any, ax: Any = None) -> Any:
    """The axes with the calibrated output scale over time, one line per component under ``BlockDiagonal``."""
    ax = new_axes(ax)
    t, scale = np.asarray(solution.t), np.asarray(solution.output_scale)
    ax.semilogy(t, scale.reshape(t.size, -1), ".-", linewidth=1)
    ax.set_xlabel("time")
    ax.set_ylabel("output scale")
    return ax


def plot_local_error(solution: Any, ax: Any = None) -> Any:
    """The axes with the standard deviation of ``u`` under the prior's noise of each accepted step alone.

    It is the output scale times that of the prior's transition, the largest over the components. Raises ``ValueError``
    if the steps were not kept.
    """
    if solution.state is None:
        raise ValueError("plot_local_error is about the steps of an initial value problem: draw plot_steps.")
    ax = new_axes(ax)
    t, ends = _steps(solution, "plot_local_error")
    path = solution.trajectory
    layout = path.layout

    def added(i):
        transition = path.prior_of(i).transition(path.rows.t[i] - path.rows.t[i - 1], layout)
        scale = path.rows.output_scale[i] * transition.magnitude
        return jnp.max(layout.std(jnp.reshape(scale, (*jnp.shape(scale), 1, 1)) * transition.noise)[0])

    ax.semilogy(t[1:], jax.vmap(added)(jnp.asarray(ends[1:])), ".-", linewidth=1)
    ax.set_xlabel("time")
    ax.set_ylabel("local error (standard deviation)")
    return ax


def plot_residual(solution: Any, problem: Any, ax: Any = None, *, args: PyTree = None) -> Any:
    """The axes with the largest residual of the equation over its components, at the posterior mean, against time.

    Times between the ends of steps show how well the equation is solved where it was not evaluated. ``problem``: the
    ``ODE`` or ``Residual``. ``args``: those of the solve. Raises ``ValueError`` if the steps were not kept.
    """
    ax = new_axes(ax)
    _steps(solution, "plot_residual")
    posterior = solution.evaluate(many_times(solution))
    us = tuple(posterior.derivative(k).mean for k in range(problem.order + 1))
    values = jax.vmap(lambda t, us: problem.residual_of(t, us, args))(posterior.t, us)
    ax.semilogy(posterior.t, np.max(abs(columns(values)), axis=1), linewidth=1)
    ax.set_xlabel("time")
    ax.set_ylabel("residual at the mean")
    return ax


def plot_errors(
    solution: Any,
    reference: Callable[[np.ndarray], PyTree],
    ax: Any = None,
    *,
    labels: Sequence[str] | None = None,
) -> Any:
    """The axes with true errors (lines) and standard deviations (dashed) of the first eight components over time.

    ``reference``: as in ``calibration_report``. ``labels``: one for each component that is drawn.
    """
    ax = new_axes(ax)
    t, truth = np.asarray(solution.t), columns(reference(np.asarray(solution.t)))
    error, spread = abs(columns(solution.mean) - truth), columns(solution.std)
    chosen = _chosen(None, error.shape[1])
    names = _labels(solution.mean, chosen, labels)
    for i in chosen:
        (line,) = ax.semilogy(t, np.where(error[:, i] > 0, error[:, i], np.nan), label=f"error, {names[i]}")
        positive = np.where(spread[:, i] > 0, spread[:, i], np.nan)
        ax.semilogy(t, positive, "--", color=line.get_color(), label=f"standard deviation, {names[i]}")
    ax.set_xlabel("time")
    ax.legend(frameon=False)
    return ax


def plot_work_precision(results: Mapping[str, tuple[Any, Any]], ax: Any = None, *, work: str = "seconds") -> Any:
    """The axes with the work of several methods over their error, both logarithmic.

    ``results``: ``{name: (work, error)}``, arrays with an entry for each tolerance. ``work``: the label of its axis.
    """
    ax = new_axes(ax)
    for name, (cost, error) in results.items():
        ax.loglog(np.asarray(error), np.asarray(cost), "o-", label=name, markersize=4)
    ax.invert_xaxis()
    ax.set_xlabel("error")
    ax.set_ylabel(work)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def _mark_events(ax, events, std):
    """Dotted lines at the times of events, in bands of ``std`` standard deviations."""
    for i in range(0 if events is None else int(events.count)):
        t, width = float(events.t[i]), std * float(events.t_std[i])
        ax.axvline(t, color="0.6", linestyle=":", linewidth=0.8, zorder=0)
        if 0 < width < np.inf:
            ax.axvspan(t - width, t + width, color="0.6", alpha=0.2, linewidth=0, zorder=0)


def _labels(tree, chosen, labels):
    """Names of the chosen components: those given, or their paths in the PyTree and indices in its leaves."""
    if labels is not None:
        return dict(zip(chosen, labels, strict=True))
    found = component_names(tree)
    return {i: found[i] for i in chosen}


def _chosen(components, d):
    """Indices of the components to draw; raises ``ValueError`` if one is out of range."""
    chosen = list(range(min(d, _COMPONENTS)) if components is None else components)
    wrong = [i for i in chosen if not -d <= i < d]
    if wrong:
        raise ValueError(f"There is no component {wrong[0]}: u has {d}, numbered from 0 in the order of its leaves.")
    return [i % d for i in chosen]


def _covariance(known, row, i, j):
    """The covariance matrix of two components of ``u`` at one time of a posterior, ``(2, 2)``."""
    here = known.at(row)
    if here.layout.factorisation.own_algebra:
        return np.diag(columns(here.std, axes=0)[[i, j]] ** 2)
    return np.asarray(here.covariance)[np.ix_([i, j], [i, j])]


def _about_bands(ax, bands, std, magnify):
    """What the bands are, in words; and if they are thinner than their lines, what would make them visible.

    ``bands``: pairs of a line and half the widths of the band about it.
    """
    text = f"band: {std:g} std" + (f", magnified {magnify:g} times" if magnify != 1 else "")
    # Lines that have just been drawn change the limits when these are asked for, which writes the note.
    ax.get_ylim()
    points = 72 / ax.figure.dpi

    def share(line, width):
        """The width of a band, in widths of its line."""
        t, mean = line.get_data()
        low, high = (ax.transData.transform(np.column_stack([t, mean + x]))[:, 1] for x in (-width, width))
        return np.max(np.where(np.isfinite(high - low), high - low, 0), initial=0) * points / line.get_linewidth()

    widest = max([share(*band) for band in bands], default=0)
    if widest >= 1 or not widest > 0:
        return text
    power = int(np.ceil(np.log10(_VISIBLE * magnify / widest)))
    return f"{text}, thinner than the line (magnify=1e{power} shows it)"


def _derivative(name, k):
    """The label of the ``k``-th derivative of a quantity: its ``name`` with primes, from the fourth on ``name^(k)``."""
    return name + "'" * k if k < 4 else f"{name}^({k})"


def _note(ax, line):
    """Writes a line above the right corner of the axes, below those that are there already.

    ``line``: a function that returns it. It is called again when the limits of the axes change.
    """
    notes = [note for note in ax.texts if note.get_gid() == _NOTE]
    if not notes:
        at = {"transform": ax.transAxes, "ha": "right", "va": "bottom", "fontsize": "small", "color": "0.4"}
        notes = [ax.text(1.0, 1.01, "", gid=_NOTE, **at)]
        notes[0].lines = []
        ax.callbacks.connect("ylim_changed", lambda _: _write(notes[0]))
    notes[0].lines.append(line)
    _write(notes[0])


def _write(note):
    note.set_text("\n".join(dict.fromkeys(line() for line in note.lines)))


def _steps(solution, name):
    """The times between which the steps lie, from the first one on, and the indices of their rows."""
    path = solution.trajectory
    if not solution.is_dense:
        raise ValueError(
            f"{name} needs the steps of the solve, which were not kept: solve with strategy=FixedIntervalSmoother(), "
            "or with save_at=SaveAt(dense=True) (solve_ivp: dense_output=True)."
        )
    if solution.state is None:
        # The intervals of the mesh of a boundary value problem.
        number = int(solution.stats["num_nodes"])
        return np.asarray(solution.t)[:number], np.arange(number)
    # At a jump of the equation there are two rows: the end of a step, and a restart, from which the next step starts.
    ends = np.flatnonzero(path.reached if path.rows.restarted is None else path.reached & ~path.rows.restarted)
    return np.asarray(path.rows.t)[ends], ends
