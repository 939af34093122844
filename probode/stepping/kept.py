"""The record of one kept state, ``Row``, and of all states that a solve has kept, ``Kept``."""

import equinox as eqx
from jaxtyping import Array, Bool, Float

from ..algebra.conditioning import Influence
from ..algebra.coordinates import Conditional
from ..algebra.factorisations import Layout
from ..algebra.normal import Normal
from ..algebra.turning import TurnedConditional
from ..priors.prior import AbstractPrior
from .events import Events, Happening
from .state import State


class Kept(eqx.Module):
    """The rows of a solve, which of them are real, and whether they are all of its steps.

    ``dense``: whether the rows are the ends of all steps; otherwise those of the steps that hold saved times, the start
    and the end. ``most``: how many steps there may be, each with an entry in the answer where every step is asked for.
    ``events``, ``happenings``: if there are events, and the states at those that have happened.
    """

    rows: "Row"
    reached: Bool[Array, " rows"]
    dense: bool = eqx.field(static=True)
    most: int = eqx.field(static=True)
    events: Events | None = None
    happenings: Happening | None = None


class Row(eqx.Module):
    """The record of one kept state: or, stacked, of many.

    ``t``: the time of the state; ``distribution``: given the data up to ``t``; ``output_scale``: of the step that ends
    there; ``past``: the previous kept state's coordinates given those of this one, ``None`` for a filter;
    ``influence``: of the equation in that step, where it is needed; ``prior``: that of the step, if every step has its
    own; ``restarted``: whether the row is that before it, at the same time, restarted behind a jump, ``None`` where
    nothing jumps; ``layout``: of the distribution, where it may change from step to step (``adapts``).
    """

    t: Float[Array, "..."]
    distribution: Normal
    output_scale: Float[Array, "..."]
    past: Conditional | TurnedConditional | None
    influence: Influence | None
    prior: AbstractPrior | None
    restarted: Bool[Array, "..."] | None = None
    layout: Layout | None = None

    @staticmethod
    def of(state: State, past: Conditional | TurnedConditional | None, influence: Influence | None = None) -> "Row":
        """The record of a state."""
        layout = state.layout if state.layout.factorisation.adapts else None
        return Row(state.t, state.distribution, state.output_scale, past, influence, state.prior, layout=layout)
