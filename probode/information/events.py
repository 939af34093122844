"""Events: what happens where a function of the solution crosses zero, or at known times."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..equations.calls import output_of, require_like
from ..util.checks import as_float, as_integer, require


class Event(eqx.Module):
    """What happens where ``g(t, u, args)`` crosses zero along the solution, or at known times.

    - ``g``: a continuous function that returns one real number; for an equation of order ``k`` it is called as
      ``g(t, u, du, ..., args)`` with ``u, ..., u^(k-1)``. Or an array of times, ``(times,)``, as for doses: steps end
      there. Those outside of the interval of the solve do not occur.
    - ``direction``: 1 if only crossings from negative to positive count, in the direction in which time runs in the
      solve, -1 for the opposite, 0 for both.
    - ``terminal``: after how many occurrences the solve ends; ``True`` for one, ``False`` for never. By default a
      function without ``reset`` ends the solve where it first crosses zero, and nothing else does.
    - ``reset``: a function of the arguments of ``g`` that returns a value like ``u0``, with which the solve goes on.
      Its derivatives are those of the equation behind the event. What is uncertain goes through it to first order, with
      the time of the event (by the saltation matrix: Aizerman & Gantmakher 1958; Kong, Payne, Zhu & Johnson 2024,
      "Saltation matrices: the essential tool for linearizing hybrid dynamical systems").

    A function that is zero at ``t0``, or where a reset ends, does not occur there, but once it has left zero. Create an
    event once and pass it to many solves: for a new function the program is compiled anew.

    Raises ``TypeError`` for ``g`` or ``reset`` that cannot be called, ``ValueError`` for another ``direction``,
    ``terminal`` that is no positive integer, and times that are not finite or no array ``(times,)``.

    >>> import jax.numpy as jnp, probode
    >>> ground = probode.Event(lambda t, u, args: u[0], direction=-1)
    >>> fall = lambda t, u, args: jnp.stack([u[1], -9.81])
    >>> solution = probode.solve_ivp(fall, (0.0, 10.0), jnp.array([1.0, 0.0]), events=ground)
    >>> print(f"{solution.t[0]:.4f}")
    0.4515
    """

    g: Any
    direction: int = eqx.field(static=True)
    terminal: int | None = eqx.field(static=True)
    reset: Any

    def __init__(self, g: Any, *, direction: Any = 0, terminal: Any = None, reset: Any = None):
        if not callable(g):
            try:
                g = as_float(g, "Event(g)")
            except TypeError:
                raise TypeError(
                    f"Event(g) must be callable as g(t, u, args), or an array of known times, got {g!r}."
                ) from None
            if g.ndim != 1 or g.size == 0:
                raise ValueError(
                    f"The known times of an Event must be an array of shape (times,), got shape {g.shape}."
                )
            g = jnp.asarray(require(g, abs(g) < np.inf, "The known times of an Event must be finite"))
        if reset is not None and not callable(reset):
            raise TypeError(f"Event(reset) must be callable as reset(t, u, args), got {reset!r}.")
        if isinstance(direction, bool) or direction not in (-1, 0, 1):
            raise ValueError(f"Event(direction) must be 1 (upwards), -1 (downwards) or 0 (both), got {direction!r}.")
        if terminal is None:
            terminal = callable(g) and reset is None
        if isinstance(terminal, bool):
            terminal = 1 if terminal else None
        self.g, self.direction, self.reset = g, int(direction), reset
        self.terminal = None if terminal is None else as_integer(terminal, "Event(terminal)", 1)

    @property
    def is_scheduled(self) -> bool:
        """Whether the event happens at known times."""
        return not callable(self.g)

    def check(self, t: Float[Array, ""], values: tuple[PyTree, ...], args: PyTree, name: str) -> None:
        """Raises ``TypeError`` or ``ValueError`` unless ``g`` and ``reset`` can be called and return what they should.

        ``values``: ``(u, ..., u^(k-1))``; nothing is computed. ``name``: of the event, for messages.
        """
        if not self.is_scheduled:
            out = output_of(self.g, f"The function of {name}", "g", t, values, args)
            leaves = jax.tree.leaves(out)
            if any(jnp.issubdtype(jnp.result_type(x), jnp.bool_) for x in leaves):
                raise TypeError(
                    f"The function of {name} returns True or False, which does not say how far the event is: return "
                    "a number that crosses zero there, as u - 1.0 in place of u > 1.0."
                )
            if len(leaves) != 1 or jnp.ndim(leaves[0]) > 0 or jax.tree.structure(out) != jax.tree.structure(0):
                shapes = jax.tree.map(jnp.shape, out)
                raise ValueError(
                    f"The function of {name} must return one number, got shapes {shapes}. For several conditions pass "
                    "several events: events=[Event(g1), Event(g2)]."
                )
            if not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.floating):
                raise TypeError(f"The function of {name} must return a real, floating-point number.")
        if self.reset is not None:
            out = output_of(self.reset, f"The reset of {name}", "reset", t, values, args)
            like = values[0] if len(values) == 1 else values
            require_like(out, like, f"The value of the reset of {name}", "u0")


def as_events(events: PyTree) -> tuple[Event, ...]:
    """All events of a PyTree, in the order of its leaves.

    Raises ``TypeError`` for leaves of another kind, ``ValueError`` if there is none.
    """
    leaves = jax.tree.leaves(events, is_leaf=lambda x: isinstance(x, Event))
    for leaf in leaves:
        if not isinstance(leaf, Event):
            remedy = " Wrap it: Event(g)." if isinstance(leaf, Callable) else ""  # type: ignore[arg-type]
            raise TypeError(f"events must be an Event or a PyTree of them, got {leaf!r}.{remedy}")
    if not leaves:
        raise ValueError("events holds no Event: leave it out, or pass None.")
    return tuple(leaves)
