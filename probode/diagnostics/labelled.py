"""Solutions as datasets of xarray (the ``xarray`` extra), with named dimensions, for ArviZ and plotting libraries."""

from typing import Any

import numpy as np

from ..stepping.result import in_words
from ..util.checks import as_integer
from ..util.components import columns, component_names


def to_dataset(solution: Any, draws: Any = 0, key: Any = None) -> Any:
    """The ``xarray.Dataset`` of ``Solution.to_xarray``, which describes it; arguments and errors are the same."""
    try:
        import xarray
    except ImportError as error:
        raise ImportError("to_xarray needs xarray: pip install 'probode[xarray]'.") from error

    draws = as_integer(draws, "to_xarray(draws)", 0)
    t = np.asarray(solution.t)
    lanes = tuple(f"lane_{i}" for i in range(t.ndim - 1)) if t.ndim > 2 else ("lane",) * (t.ndim - 1)
    real = slice(0, _real(solution, t)) if t.ndim == 1 else slice(None)
    axes = t.ndim
    mean, std = columns(solution.mean, axes), columns(solution.std, axes)
    variables: dict[str, Any] = {
        name: ((*lanes, "time", "component"), x[..., real, :]) for name, x in (("mean", mean), ("std", std))
    }
    coordinates: dict[str, Any] = {"component": component_names(solution.mean, axes)}
    coordinates["time" if t.ndim == 1 else "t"] = ((*lanes, "time"), t[..., real])
    if draws:
        if key is None:
            raise ValueError("to_xarray(draws=...) needs a random key: key=jax.random.key(0).")
        samples = columns(solution.sample(key, (draws,)), axes + 1)
        variables["u"] = (("draw", "time", "component"), samples[:, real])
        coordinates["draw"] = np.arange(draws)
    if solution.parameters is not None and t.ndim == 1:
        spread = np.linalg.norm(np.asarray(solution.parameters.factor), axis=-2)
        variables["parameter_mean"] = ("parameter", columns(solution.parameters.mean, 0))
        variables["parameter_std"] = ("parameter", spread)
        coordinates["parameter"] = component_names(solution.parameters.mean, 0, "parameter")
    counts = {name: np.asarray(x).tolist() for name, x in solution.stats.items()}
    return xarray.Dataset(variables, coordinates, attrs={"result": in_words(solution.result), **counts})


def _real(solution, t):
    """How many of the saved times are no repetitions of the last one, with which the steps are filled up."""
    if solution.state is None or t.size < int(solution.stats["max_steps"]):
        return t.size
    return t.size - int(np.argmax(np.append(t[::-1] != t[-1], True))) + 1
