"""Independent blocks of components: between one block for each component and one for all of them."""

import functools as ft
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..util.checks import as_integer
from .coupling import AbstractCoupledFactorisation, Coupling


class Blocks(AbstractCoupledFactorisation):
    """A block-diagonal covariance with a block for each group of components; groups are independent.

    Between ``BlockDiagonal``, which keeps a block for each component, and ``Dense``, which keeps one for all: for
    systems that are made of similar parts, such as the species of a reaction in each cell of a grid. The mean is
    conditioned on the equation with its whole Jacobian, across groups; correlations between groups are dropped after
    every step. It equals ``Dense`` where groups do not influence each other, and for a single group.

    - ``partition``: which components belong together. An integer: so many neighbours of the ravelled ``u``, the last
      group may be smaller. Or a PyTree of integers like ``u``, a label for each number; a leaf may also be a single
      label for all numbers of that leaf.

    With groups of ``s`` of ``d`` components a step costs ``O(d^3 + n^3 d s^2)`` for ``n`` derivatives, where ``Dense``
    takes ``O(n^3 d^3)``. With ``TS1`` and ``SLR1`` there is one output scale for all groups, with ``TS0``, which does
    not couple them, one for each. It works with an ``ODE`` of any order (lifted only with ``TS0``), without ``Stack``,
    ``Noisy``, ``stop_at`` and leave-one-out residuals. If data involve several groups, each group is updated by its own
    block of their Jacobian: the rows and columns for its own components.

    Raises ``TypeError`` for a partition that does not consist of integers, ``ValueError`` for a block size below 1 and,
    in a solve, for labels that do not fit ``u`` or parts that it does not work with.

    >>> import jax.numpy as jnp, probode
    >>> probode.Blocks(2).batch_shape(6)  # three groups
    (3,)
    >>> probode.Blocks({"cells": jnp.array([0, 0, 1, 1]), "inflow": 2})
    Blocks({'cells': [0, 0, 1, 1], 'inflow': 2})
    """

    labels: "_Labels | int" = eqx.field(static=True)

    def __init__(self, partition: Any):
        if isinstance(partition, int | np.integer) and not isinstance(partition, bool):
            self.labels = as_integer(partition, "Blocks(partition)", 1)
        else:
            self.labels = _as_labels(partition)

    def __repr__(self) -> str:
        return f"Blocks({self.labels!r})"

    def fit(self, u: PyTree) -> "Blocks":
        if not isinstance(self.labels, _Labels):
            return self
        return Blocks(np.asarray(self.labels.labels_for(u)))

    def groups(self, d: int) -> "_Groups":
        """The groups of ``d`` components, and the place of each component among them."""
        if isinstance(self.labels, int):
            return _groups_of(tuple(i // self.labels for i in range(d)))
        ((shape, values), *others) = self.labels.leaves
        if others or shape != (d,):
            raise ValueError(f"{self!r} does not fit {d} components.")
        return _groups_of(values)

    def batch_shape(self, d: int) -> tuple[int, ...]:
        return (self.groups(d).number,)

    def pack(self, derivatives: Float[Array, "m d"]) -> Float[Array, "*batch rows cols"]:
        groups = self.groups(derivatives.shape[1])
        blocks = jnp.reshape(groups.fill(derivatives), (derivatives.shape[0], groups.number, groups.size))
        return jnp.reshape(jnp.moveaxis(blocks, 1, 0), (groups.number, -1, 1))

    def unpack(self, mean: Float[Array, "*batch rows cols"], d: int) -> Float[Array, "m d"]:
        return self.unpack_std(mean[..., 0], d)

    def unpack_std(self, std: Float[Array, "*batch rows"], d: int) -> Float[Array, "m d"]:
        groups = self.groups(d)
        blocks = jnp.reshape(std, (groups.number, -1, groups.size))
        return jnp.reshape(jnp.moveaxis(blocks, 0, 1), (blocks.shape[1], -1))[:, np.asarray(groups.place_of)]

    def lift(self, matrix: Float[Array, "n n"], scale: Float[Array, "..."], d: int) -> Float[Array, "*batch dim dim"]:
        groups = self.groups(d)
        scales = groups.fill(jnp.broadcast_to(scale, (1, d)).astype(matrix.dtype))
        scales = jnp.reshape(scales, (groups.number, groups.size))
        return jax.vmap(lambda scale: jnp.kron(matrix, jnp.diag(scale)))(scales)

    def project(self, jacobian: Float[Array, "*m d"]) -> Float[Array, "*batch rows columns"]:
        m, d = jacobian.shape
        if m != d:
            raise ValueError(
                f"Blocks() gives every component an equation of its own, but there are {m} equations for {d} "
                "components. Use Dense()."
            )
        groups = self.groups(d)
        return jnp.moveaxis(jnp.diagonal(groups.between(jacobian), axis1=0, axis2=2), 2, 0)

    def couple(self, jacobians: Sequence[Float[Array, "d d"]]) -> Coupling:
        d, dtype = jacobians[0].shape[1], jacobians[0].dtype
        groups = self.groups(d)
        order = np.argsort(groups.place_of)
        derivatives = [*(-jacobian for jacobian in jacobians), jnp.eye(d, dtype=dtype)]
        blocks = [jnp.reshape(groups.fill(x[order]), (d, groups.number, groups.size)) for x in derivatives]
        matrix = jnp.moveaxis(jnp.concatenate(blocks, axis=-1), 1, 0)
        return Coupling(matrix, tuple(sorted(groups.place_of)), groups.size)


class _Labels(NamedTuple):
    """The labels of a partition as something that can be hashed: their structure, and each leaf's shape and values."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def __repr__(self) -> str:
        leaves = [np.reshape(values, shape).tolist() for shape, values in self.leaves]
        return repr(jax.tree.unflatten(self.structure, leaves))

    def labels_for(self, u: PyTree) -> tuple[int, ...]:
        """The labels of all numbers of ``u``, ravelled."""
        example, structure = jax.tree.flatten(u)
        shapes, leaves = jax.tree.map(jnp.shape, u), self.leaves
        if len(example) == 1 and all(shape == () for shape, _ in leaves) and len(leaves) > 1:
            # A list of labels, for an array.
            leaves, structure = (((len(leaves),), tuple(label for _, (label,) in leaves)),), self.structure
        try:
            if structure != self.structure:
                raise ValueError
            labels = [
                np.broadcast_to(np.reshape(values, shape), jnp.shape(leaf)).ravel()
                for (shape, values), leaf in zip(leaves, example, strict=True)
            ]
        except ValueError:
            raise ValueError(
                f"Blocks(partition) must be an integer, or integers with the structure of u and shapes that broadcast "
                f"to its shapes: expected {shapes}, got {self}."
            ) from None
        return tuple(np.concatenate(labels).tolist())


def _as_labels(partition):
    leaves, structure = jax.tree.flatten(partition)
    arrays = [np.asarray(leaf) for leaf in leaves]
    if not leaves or not all(np.issubdtype(x.dtype, np.integer) for x in arrays):
        raise TypeError(
            f"Blocks(partition) must be an integer or a PyTree of integers like u, got {partition!r}: Blocks(2), "
            "Blocks([0, 0, 1])."
        )
    return _Labels(structure, tuple((x.shape, tuple(x.ravel().tolist())) for x in arrays))


class _Groups(NamedTuple):
    """A division of the components of ``u`` into groups, and the order in which they are stored.

    There are ``number`` groups with room for ``size`` components each. ``place_of``: for every component its place
    among these ``number * size``, group by group.
    """

    number: int
    size: int
    place_of: tuple[int, ...]

    def fill(self, x: Float[Array, "m d"]) -> Float[Array, "m places"]:
        """The columns at their places, and zeros at places that no component has."""
        places = np.asarray(self.place_of)
        if len(places) == self.number * self.size:
            return x[:, np.argsort(places)]
        return jnp.zeros((x.shape[0], self.number * self.size), x.dtype).at[:, places].set(x)

    def between(self, matrix: Float[Array, "d d"]) -> Float[Array, "number size number size"]:
        """The blocks of a matrix, from one group to another."""
        places = self.fill(self.fill(matrix).T).T
        return jnp.reshape(places, (self.number, self.size, self.number, self.size))


@ft.cache
def _groups_of(labels: tuple[int, ...]) -> _Groups:
    names, group, count = np.unique(labels, return_inverse=True, return_counts=True)
    within = np.zeros(len(labels), int)
    for i in range(len(names)):
        within[group == i] = np.arange(count[i])
    size = int(count.max())
    return _Groups(len(names), size, tuple((group * size + within).tolist()))


# The layout of ``Modal``: directions ``2i`` and ``2i+1`` form a pair.
PAIRS = Blocks(2)
