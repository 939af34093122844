"""Representations of objects for terminals and notebooks: short, with shapes instead of arrays."""

import dataclasses
import html
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


# How long a line of text is at most.
_LINE = 110


def brief(x: Any) -> str:
    """One line for an object: a module with the fields that are not defaults, a number, an array's dtype and shape."""
    if isinstance(x, eqx.Module):
        fields = {f.name: getattr(x, f.name, None) for f in dataclasses.fields(x) if not _is_default(x, f)}
        return f"{type(x).__name__}({', '.join(f'{name}={brief(value)}' for name, value in fields.items())})"
    if eqx.is_array(x) or isinstance(x, (np.ndarray, np.generic)):
        if jnp.ndim(x) == 0 and not isinstance(x, Tracer) and jnp.issubdtype(x.dtype, jnp.number):
            return f"{np.asarray(x).item():.6g}"
        return eqx.tree_pformat(x)
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{key!r}: {brief(v)}" for key, v in x.items()) + "}"
    if isinstance(x, (tuple, list)):
        inner = ", ".join(brief(v) for v in x) + ("," if isinstance(x, tuple) and len(x) == 1 else "")
        return f"({inner})" if isinstance(x, tuple) else f"[{inner}]"
    if callable(x):
        return getattr(x, "__name__", type(x).__name__)
    return repr(x)


def shape_of_u(layout: Any) -> str:
    """One line with the structure of ``u``, its dtypes and shapes."""
    return " ".join(eqx.tree_pformat(layout.example, struct_as_array=True).split())


def parts(solver: Any) -> list[tuple[str, str]]:
    """The names of a solver's parts, each with one line."""
    return [(f.name, brief(getattr(solver, f.name))) for f in dataclasses.fields(solver)]


def facts(solution: Any, ending: Callable) -> list[tuple[str, str]]:
    """A summary of a solution, or of a batch of them: pairs of a name and words. ``ending``: for its result."""
    layout, stats = solution.layout, solution.stats
    rows = []
    if not is_known(solution):
        return [("u", shape_of_u(layout)), ("times", eqx.tree_pformat(solution.t))]
    rows.append(("result", ending(solution.result)))
    if solution.state is None:
        return rows + _of_mesh(solution)
    t = np.asarray(solution.t)
    reached = np.asarray(solution.state.current.t)
    # Not all rows are times saved: those of steps that were not needed repeat the last time, those of times that were
    # not reached are NaN.
    ordered = np.sort(t, axis=-1)
    saved = np.isfinite(ordered[..., 0]) + np.sum(np.diff(ordered, axis=-1) > 0, axis=-1)
    rows.append(("time", f"solved to {_range(reached)}; times saved: {_range(saved)}, from {_range(t[..., 0])}"))
    accepted, rejected, most = (_range(stats[f"{k}_steps"]) for k in ("num_accepted", "num_rejected", "max"))
    rows.append(("steps", f"{accepted} accepted, {rejected} rejected, at most {most}"))
    kind = "smoothed" if solution.is_smoothed else "filtered"
    where = "at any time of the interval" if solution.is_dense else "at the times saved"
    rows.append(("posterior", f"{kind}, {where}"))
    derivatives = f"with {layout.num_derivatives} derivatives, {type(layout.factorisation).__name__}()"
    rows.append(("u", f"{shape_of_u(layout)} {derivatives}"))
    rows.append(("output scale", _range(solution.output_scale)))
    if not layout.factorisation.own_algebra:
        rows.append(("log likelihood", _range(solution.log_likelihood)))
    if solution.data_log_likelihood is not None:
        rows.append(("log likelihood of the data", _range(solution.data_log_likelihood)))
    rows.append(("standard deviation of u", f"at most {_largest(solution.std):.3g}"))
    if solution.events is not None:
        times = solution.events.t[np.isfinite(solution.events.t)]
        when = f", t = {_range(times)}" if times.size else ""
        rows.append(("events", f"{_range(solution.events.count)}{when}"))
    return rows


def _of_mesh(solution):
    """The summary of a boundary value problem."""
    stats, t = solution.stats, np.asarray(solution.t)
    rows = [("time", f"from {_range(t[..., 0])} to {_range(t[..., -1])}")]
    nodes, iterations, meshes = (_range(stats[f"num_{name}"]) for name in ("nodes", "iterations", "meshes"))
    rows.append(("mesh", f"{nodes} nodes, after {iterations} Newton steps on {meshes} meshes"))
    rows.append(("u", f"{shape_of_u(solution.layout)} with {solution.layout.num_derivatives} derivatives"))
    rows.append(("standard deviation of u", f"at most {_largest(solution.std):.3g}"))
    if solution.parameters is not None:
        std = np.linalg.norm(np.asarray(solution.parameters.factor), axis=-2)
        rows.append(("parameters", f"{brief(solution.parameters.mean)}, standard deviations {_range(std)}"))
    if solution.period is not None:
        mean, std = (_range(x) for x in (solution.period.mean, solution.period.std))
        rows.append(("period", f"{mean}, standard deviation {std}"))
    return rows


def is_known(tree: Any) -> bool:
    """Whether no leaf of a tree is a tracer, so that all its numbers are known."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def as_text(rows: Sequence[tuple[str, str]]) -> str:
    """Pairs of a name and words as text, in two columns."""
    width = max(len(name) for name, _ in rows) + 2

    def lines(words):
        return textwrap.wrap(words, max(40, _LINE - width), break_long_words=False, break_on_hyphens=False) or [""]

    both = ((f"{name:<{width}}", lines(words)) for name, words in rows)
    return "\n".join(name + f"\n{'':<{width}}".join(words) for name, words in both)


def as_html(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Pairs of a name and words as an HTML table, for notebooks."""
    cell = "<td style='text-align:left'>{}</td>"
    body = "".join(f"<tr>{cell.format(html.escape(a))}{cell.format(html.escape(b))}</tr>" for a, b in rows)
    return f"<table><thead><tr><th colspan='2' style='text-align:left'>{title}</th></tr></thead>{body}</table>"


def _is_default(part, field):
    value = getattr(part, field.name, None)
    if value is None or not field.repr:
        return True
    return not eqx.is_array(value) and type(value) is type(field.default) and bool(value == field.default)


def _range(x):
    x = np.asarray(x)
    known = x[np.isfinite(x)]
    if known.size == 0:
        return "unknown"
    low, high = known.min(), known.max()
    return f"{low:.6g}" if low == high else f"{low:.6g} .. {high:.6g}"


def _largest(tree):
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]
    everything = np.concatenate(leaves)
    known = everything[np.isfinite(everything)]
    return known.max() if known.size else np.nan
