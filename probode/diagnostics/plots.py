"""Pictures of solutions, with matplotlib (the ``plot`` extra), which is imported when the first one is drawn.

Every function takes the axes to draw on, or makes new ones, and returns them: what else is wanted is matplotlib's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


# Times between the first and the last at which a solution that has kept its steps is drawn.
_POINTS = 400
# So many components are drawn unless others are asked for.
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
    """Means over time with bands of ``std`` standard deviations, and ``samples`` trajectories (smoothers only).

    A solution that has kept its steps is drawn at many times, or at ``ts``; others at the times saved. ``components``:
    numbers in the ravelled ``u``, the first eight by default. ``labels``: one for each; by default the place in the
    PyTree. Samples need the derivative 0; ``key`` defaults to ``jax.random.key(0)``. Returns the axes. Raises
    ``ImportError`` without matplotlib, ``ValueError`` for components that there are not, or samples of a derivative.
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
    # One time: a point with a bar.
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
    """Two components against each other, with ellipses of ``std`` standard deviations at up to so many times.

    Where the factorisation keeps components independent the ellipses are upright. Raises as ``plot``.
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
    """The lengths of the accepted steps over time, of a solution that has kept them. Raises ``ValueError`` if not."""
    ax = _axes(ax)
    t, _ = _steps(solution, "plot_steps")
    ax.semilogy(t[1:], abs(np.diff(t)), ".-", linewidth=1)
    ax.set_xlabel("time")
    ax.set_ylabel("step")
    return ax


def plot_scale(solution: Any, ax: Any = None) -> Any:
    """The calibrated output scale over time, one line for each where components have their own."""
    ax = _axes(ax)
    t, scale = np.asarray(solution.t), np.asarray(solution.output_scale)
    ax.semilogy(t, scale.reshape(t.size, -1), ".-", linewidth=1)
    ax.set_xlabel("time")
    ax.set_ylabel("output scale")
    return ax


def plot_local_error(solution: Any, ax: Any = None) -> Any:
    """What each accepted step adds to the standard deviation of ``u``: output scale times the noise of the prior.

    The largest of all components, of a solution that has kept its steps. Raises ``ValueError`` if not.
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
    """The size of the equation's residual at the posterior mean, between the steps as well: how well it is solved.

    ``problem``: the ``ODE`` or ``Residual``. Needs a solution that has kept its steps; raises ``ValueError`` if not.
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
    """True errors (lines) and standard deviations (dashed) of all components; ``reference(times)`` as for reports."""
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
    """Error against work for several methods: ``{name: (work, error)}`` with one entry per tolerance."""
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
    """All leaves side by side: ``(*axes, d)``."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(*leaf.shape[:axes], -1) for leaf in leaves], axis=axes)


def _labels(tree, chosen, labels):
    """Names of the chosen components: those given, or where they are, by a path through the PyTree and an index."""
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
    chosen = list(range(min(d, _COMPONENTS)) if components is None else components)
    wrong = [i for i in chosen if not -d <= i < d]
    if wrong:
        raise ValueError(f"There is no component {wrong[0]}: u has {d}, numbered from 0 in the order of its leaves.")
    return [i % d for i in chosen]


def _covariance(factor, layout, i, j):
    """Of two components of ``u``."""
    if layout.couples:
        columns = np.asarray(factor)[:, [i, j]]
        return columns.T @ columns
    return np.diag(np.asarray(layout.std(factor))[0, [i, j]] ** 2)


def _many_times(solution):
    """From where the solve began to where it ended, whatever was saved."""
    return np.linspace(float(solution.trajectory.rows.t[0]), float(solution.state.t), _POINTS)


def _steps(solution, name):
    """The times of all steps, and the numbers of the rows that are their ends."""
    path = solution.trajectory
    if not solution.is_dense:
        raise ValueError(
            f"{name} needs the steps of the solve, which were not kept: solve with strategy=FixedIntervalSmoother(), "
            "or with save_at=SaveAt(dense=True)."
        )
    # Where a state has started anew behind a jump there are two rows: the step ends with the first one.
    ends = np.flatnonzero(path.reached if path.rows.anew is None else path.reached & ~path.rows.anew)
    return np.asarray(path.rows.t)[ends], ends
