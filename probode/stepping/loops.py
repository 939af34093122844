"""Loops: how the attempts of an adaptive solve are repeated, and how many states a derivative of it may keep.

All are ``equinox.internal.while_loop``, of the kinds ``bounded``, ``checkpointed`` and ``lax``.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..util.checks import as_integer


def _steps(part):
    return lambda value: as_integer(value, f"{part}(max_steps)", 1)


def _checkpoints(value):
    return None if value is None else as_integer(value, "CheckpointedLoop(checkpoints)", 1)


class AbstractLoop(eqx.Module):
    """A kind of ``while`` for the attempts of a solve, and what is kept of them if the solve is differentiated.

    The loop itself is not differentiated: for a derivative the accepted steps are taken once more, from states that
    were kept. Kinds differ in what they keep for that, and in whether there is a reverse mode. A solve that is not
    differentiated takes about the same time with all of them.

    A subclass has the field ``max_steps``, the largest number of attempts, rejected ones included, and defines ``run``.
    It may set, as class attributes or fields:

    - ``reverse``: whether there is a derivative in reverse mode; true by default.
    - ``checkpoints``: how many states are kept for a derivative; by default a number near the square root of
      ``max_steps``.
    - ``notes_steps``: whether the length of every step, and the scale of the residual inside it, are kept as well; true
      by default. If false, the steps are looked for once more.

    >>> import probode
    >>> probode.testing.check_loop(probode.ForwardLoop(100))  # or a subclass of your own
    """

    max_steps: eqx.AbstractVar[int]

    reverse = True
    checkpoints = None
    notes_steps = True

    @abstractmethod
    def run(self, cond: Callable, body: Callable, init: Any, *, buffers: Callable) -> Any:
        """The carry after at most ``max_steps`` iterations of ``carry = body(carry)``, while ``cond(carry)`` is true.

        Called in the compiled program of a solve. ``init``: the first carry, a PyTree of arrays; ``body`` keeps its
        structure, shapes and dtypes. ``buffers(carry)``: those of its arrays to which the body only writes, by
        ``.at[i].set(x, pred=...)``. Arrays of JAX have no ``pred``: pass all of this on to
        ``equinox.internal.while_loop``, in which they have.
        """


class BoundedLoop(AbstractLoop):
    """The loop for solves that are differentiated in either mode, to any order; the default.

    A derivative keeps about ``sqrt(max_steps)`` states, and the lengths of ``max_steps`` steps, with which its memory
    grows.

    Raises ``ValueError`` unless ``max_steps`` is a positive integer.

    >>> import probode
    >>> probode.BoundedLoop(max_steps=100)
    BoundedLoop(max_steps=100)
    """

    max_steps: int = eqx.field(static=True, default=4096, converter=_steps("BoundedLoop"))

    def run(self, cond: Callable, body: Callable, init: Any, *, buffers: Callable) -> Any:
        return eqxi.while_loop(cond, body, init, max_steps=self.max_steps, buffers=buffers, kind="bounded")


class CheckpointedLoop(AbstractLoop):
    """The loop for long solves that are differentiated, in either mode: it takes less memory, and more time.

    A derivative keeps ``checkpoints`` states (about ``sqrt(max_steps)`` by default) and as many as there are steps
    between two of them. It keeps nothing for every single step, and looks for the steps twice instead.

    Raises ``ValueError`` for numbers that are not positive integers.

    >>> import probode
    >>> probode.CheckpointedLoop(max_steps=10_000, checkpoints=50)
    CheckpointedLoop(max_steps=10000, checkpoints=50)
    """

    max_steps: int = eqx.field(static=True, default=4096, converter=_steps("CheckpointedLoop"))
    notes_steps = False
    checkpoints: int | None = eqx.field(static=True, default=None, converter=_checkpoints)  # type: ignore[assignment]

    def run(self, cond: Callable, body: Callable, init: Any, *, buffers: Callable) -> Any:
        return eqxi.while_loop(
            cond,
            body,
            init,
            max_steps=self.max_steps,
            buffers=buffers,
            kind="checkpointed",
            checkpoints=self.checkpoints,
        )


class ForwardLoop(AbstractLoop):
    """The loop for solves that are not differentiated, or in forward mode only: a plain ``jax.lax.while_loop``.

    A derivative in forward mode keeps what it keeps under ``BoundedLoop``.

    Raises ``ValueError`` unless ``max_steps`` is a positive integer. Differentiation of a solve in reverse mode raises
    ``RuntimeError``.

    >>> import probode
    >>> probode.ForwardLoop(max_steps=100_000).max_steps
    100000
    """

    max_steps: int = eqx.field(static=True, default=4096, converter=_steps("ForwardLoop"))

    reverse = False

    def run(self, cond: Callable, body: Callable, init: Any, *, buffers: Callable) -> Any:
        return eqxi.while_loop(cond, body, init, max_steps=self.max_steps, buffers=buffers, kind="lax")


def repeat(loop: AbstractLoop, cond: Callable, body: Callable, init: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
    """``body(carry, rows)`` while ``cond(carry)``, where ``rows`` are only written to: the last of both."""
    # Every array that a loop carries is an operation of its own to XLA on CPUs, and where ten of them are ready at once
    # it wakes another thread, which takes longer than a step: up to half of the time, where loops are not native.
    pack, unpack = _scalars_together(init)

    def packed(carry):
        new, rows = body(unpack(carry[0]), carry[1])
        return pack(new), rows

    carry = pack(init), rows
    carry, rows = loop.run(
        lambda carry: cond(unpack(carry[0])), packed, carry, buffers=lambda carry: jax.tree.leaves(carry[1])
    )
    return unpack(carry), rows


def _scalars_together(like):
    """A function that puts the numbers of a tree like this one into one array for every dtype, and its inverse.

    Arrays without any numbers are left out.
    """
    leaves, tree = jax.tree.flatten(like)
    places: dict[Any, list[int]] = {}
    alone: list[int] = []
    empty = {i: leaf for i, leaf in enumerate(leaves) if eqx.is_array(leaf) and leaf.size == 0}
    for i, leaf in enumerate(leaves):
        number = eqx.is_array(leaf) and leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.number)
        if i not in empty:
            (places.setdefault(leaf.dtype, []) if number else alone).append(i)

    def pack(carry):
        leaves = jax.tree.leaves(carry)
        return [jnp.stack([leaves[i] for i in group]) for group in places.values()], [leaves[i] for i in alone]

    def unpack(packed):
        leaves = empty | dict(zip(alone, packed[1], strict=True))
        for group, numbers in zip(places.values(), packed[0], strict=True):
            leaves |= {i: numbers[k] for k, i in enumerate(group)}
        return jax.tree.unflatten(tree, [leaves[i] for i in sorted(leaves)])

    return pack, unpack
