"""The numbers of a PyTree side by side, as the components of ``u``, and their names."""

import jax
import numpy as np
from jaxtyping import PyTree


def columns(tree: PyTree, axes: int = 1) -> np.ndarray:
    """All leaves, ravelled behind their first ``axes`` axes, side by side: ``(*axes, d)``."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(*leaf.shape[:axes], -1) for leaf in leaves], axis=axes)


def component_names(tree: PyTree, axes: int = 1, root: str = "u") -> list[str]:
    """The paths of all numbers in a PyTree, in the order of ``columns``: ``prey``, ``u[0]``, ``position[1, 2]``.

    ``axes``: how many first axes of the leaves are not those of components. ``root``: the name of what has no path.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        first, dot, rest = jax.tree_util.keystr(path, simple=True, separator=".").partition(".")
        name = (f"{root}[{first}]" if first.isdigit() else first or root) + dot + rest
        inner = np.ndindex(np.shape(leaf)[axes:])
        found += [name + (str(list(index)) if index else "") for index in inner]
    return found
