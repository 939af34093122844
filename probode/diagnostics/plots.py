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


# How many times are drawn of a solution that has kept its steps.
_POINTS = 400
# How many components are drawn by default.
_COMPONENTS = 8


def plot(
    solution: Any,
    ax: Any = None,
    *,
    components: Sequence[int] | None = None,
    derivative: int = 0,
    std: float = 2.0,
    samples: int = 0,
    key: Any = None,
    ts: Any = None,
    labels: Sequence[str] | None = None,
) -> Any:
    """The axes with means over time, bands of standard deviations, and samples.

    - ``solution``: a ``Solution``, not a batch.
    - ``ax``: the axes to draw on, new ones by default.
    - ``components``: indices into the ravelled ``u``; the first eight by default.
    - ``derivative``: which derivative of ``u`` is drawn.
    - ``std``: half the width of the bands, in standard deviations.
    - ``samples``: the number of joint samples of ``u`` that are drawn, from smoothers.
    - ``key``: a random key of JAX for the samples; ``jax.random.key(0)`` by default.
    - ``ts``: the times to draw, for a solution that has kept its steps. By default 400 equidistant ones; other
      solutions are drawn at their saved times.
    - ``labels``: one for each component; by default its place in the PyTree.

    Raises ``ImportError`` without matplotlib; ``ValueError`` for components out of range, another number of labels than
    of components, samples of a derivative, or samples of a filter.
    """
    ax = _axes(ax)
    if ts is None and solution.is_dense:
        ts = _many_times(solution)
    posterior = solution if ts is None else solution.evaluate(ts)
    moments, t = posterior.derivative(derivative), np.asarray(posterior.t)
    mean, spread = _columns(moments.mean), _columns(moments.std)
    chosen = _chosen(components, mean.shape[1])
    names = _labels(moments.mean, chosen, labels)
    draws = None
    if samples:
        if derivative:
            raise ValueError("plot(samples=...) draws samples of u: leave derivative at 0.")
        key = jax.random.key(0) if key is None else key
        draws = _columns(solution.sample(key, (samples,), ts=ts), axes=2)
    # A line and a band of one time cannot be seen: a point with a bar.
    marker = "o" if t.size == 1 else None
    for i in chosen:
        (line,) = ax.plot(t, mean[:, i], marker=marker, label=names[i])
        colour, width = line.get_color(), std * spread[:, i]
        if t.size == 1:
            ax.errorbar(t, mean[:, i], yerr=width, color=colour, capsize=3)
        ax.fill_between(t, mean[:, i] - width, mean[:, i] + width, color=colour, alpha=0.25, linewidth=0)
        if draws is not None:
            ax.plot(t, draws[:, :, i].T, color=colour, linewidth=0.5, alpha=0.5)
    ax.set_xlabel("time")
    if mean.shape[1] > 1:
        ax.legend(frameon=False)
    return ax


def plot_phase(
    solution: Any, ax: Any = None, *, components: tuple[int, int] = (0, 1), std: float = 2.0, ellipses: int = 40
) -> Any:
    """The axes with two components of the mean drawn against each other, and ellipses of their covariance.

    ``components``: the two indices into the ravelled ``u``. ``std``: the size of the ellipses, in standard deviations.
    ``ellipses``: their largest number. Where the factorisation keeps components independent the axes of the ellipses
    are parallel to those of the picture. Raises ``ImportError`` without matplotlib, ``ValueError`` for components out
    of range.
    """
    from matplotlib.patches import Ellipse

    ax = _axes(ax)
    posterior = solution.evaluate(_many_times(solution)) if solution.is_dense else solution
    mean = _columns(posterior.mean)
    i, j = _chosen(components, mean.shape[1])
    names = _labels(posterior.mean, (i, j), None)
    (line,) = ax.plot(mean[:, i], mean[:, j])
    every = max(1, -(-mean.shape[0] // ellipses))
    layout = posterior.layout
    for row in range(0, mean.shape[0], every):
        factor = posterior.marginals.factor[row]
        values, vectors = np.linalg.eigh(_covariance(factor, layout, i, j))
        angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        width, height = 2 * std * np.sqrt(np.maximum(values[::-1], 0))
        ax.add_patch(
            Ellipse(mean[row, [i, j]], width, height, angle=angle, color=line.get_color(), alpha=0.25, linewidth=0)
        )
    ax.autoscale_view()
    ax.set_xlabel(names[i])
    ax.set_ylabel(names[j])
    return ax


def plot_steps(solution: Any, ax: Any = None) -> Any:
    """The axes with the length of each accepted step at its end. Raises ``ValueError`` if the steps were not kept."""
    ax = _axes(ax)
    t, _ = _steps(solution, "plot_steps")
    ax.semilogy(t[1:], abs(np.diff(t)), ".-", linewidth=1)
    ax.set_xlabel("time")
    ax.set_ylabel("step")
    return ax


def plot_scale(solution: Any, ax: Any = None) -> Any:
    """The axes with the calibrated output scale over time, one line per component under ``BlockDiagonal``."""
    ax = _axes(ax)
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
    ax = _axes(ax)
    t, ends = _steps(solution, "plot_local_error")
    path, layout = solution.trajectory, solution.layout

    def added(i):
        transition = path.prior_of(i).transition(path.rows.t[i] - path.rows.t[i - 1], layout)
        scale = path.rows.output_scale[i] * transition.magnitude
        return jnp.max(layout.std(jnp.reshape(scale, (*jnp.shape(scale), 1, 1)) * transition.noise)[0])

    ax.semilogy(t[1:], jax.vmap(added)(jnp.asarray(ends[1:])), ".-", linewidth=1)
    ax.set_xlabel("time")
    ax.set_ylabel("local error (standard deviation)")
    return ax


def plot_residual(solution: Any, problem: Any, ax: Any = None, *, args: PyTree = None) -> Any:
    """The axes with the residual of the equation at the posterior mean, the largest over its components, over time.

    Times between the ends of steps show how well the equation is solved where it was not evaluated. ``problem``: the
    ``ODE`` or ``Residual``. ``args``: those of the solve. Raises ``ValueError`` if the steps were not kept.
    """
    ax = _axes(ax)
    _steps(solution, "plot_residual")
    posterior = solution.evaluate(_many_times(solution))
    us = tuple(posterior.derivative(k).mean for k in range(problem.order + 1))
    values = jax.vmap(lambda t, us: problem.residual_of(t, us, args))(posterior.t, us)
    ax.semilogy(posterior.t, np.max(abs(_columns(values)), axis=1), linewidth=1)
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
    ax = _axes(ax)
    t, truth = np.asarray(solution.t), _columns(reference(np.asarray(solution.t)))
    error, spread = abs(_columns(solution.mean) - truth), _columns(solution.std)
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
    ax = _axes(ax)
    for name, (cost, error) in results.items():
        ax.loglog(np.asarray(error), np.asarray(cost), "o-", label=name, markersize=4)
    ax.invert_xaxis()
    ax.set_xlabel("error")
    ax.set_ylabel(work)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def _axes(ax):
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'probode[plot]'.") from error
    return plt.figure(layout="constrained").add_subplot() if ax is None else ax


def _columns(tree, axes=1):
    """All leaves, ravelled behind their first ``axes`` axes, side by side: ``(*axes, d)``."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(*leaf.shape[:axes], -1) for leaf in leaves], axis=axes)


def _labels(tree, chosen, labels):
    """Names of the chosen components: those given, or their paths in the PyTree and indices in its leaves."""
    if labels is not None:
        return dict(zip(chosen, labels, strict=True))
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        name = f"u[{name}]" if name.isdigit() else name or "u"
        inner = np.ndindex(np.shape(leaf)[1:])
        names += [name + (str(list(index)) if index else "") for index in inner]
    return {i: names[i] for i in chosen}


def _chosen(components, d):
    """Indices of the components to draw; raises ``ValueError`` if one is out of range."""
    chosen = list(range(min(d, _COMPONENTS)) if components is None else components)
    wrong = [i for i in chosen if not -d <= i < d]
    if wrong:
        raise ValueError(f"There is no component {wrong[0]}: u has {d}, numbered from 0 in the order of its leaves.")
    return [i % d for i in chosen]


def _covariance(factor, layout, i, j):
    """The ``(2, 2)`` covariance of two components of ``u``."""
    if layout.couples:
        columns = np.asarray(factor)[:, [i, j]]
        return columns.T @ columns
    return np.diag(np.asarray(layout.std(factor))[0, [i, j]] ** 2)


def _many_times(solution):
    """Equidistant times from the start of the solve to its end, independent of the times that were saved."""
    return np.linspace(float(solution.trajectory.rows.t[0]), float(solution.state.t), _POINTS)


def _steps(solution, name):
    """The times between which the steps lie, from the first one on, and the indices of their rows."""
    path = solution.trajectory
    if not solution.is_dense:
        raise ValueError(
            f"{name} needs the steps of the solve, which were not kept: solve with strategy=FixedIntervalSmoother(), "
            "or with save_at=SaveAt(dense=True)."
        )
    # At a jump of the equation there are two rows: the end of a step, and a restart, from which the next step starts.
    ends = np.flatnonzero(path.reached if path.rows.anew is None else path.reached & ~path.rows.anew)
    return np.asarray(path.rows.t)[ends], ends
