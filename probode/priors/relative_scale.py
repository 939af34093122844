"""An output scale in proportion to the sizes of the components."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..algebra.linalg import root_mean_square, safe_divide
from .output_scale import as_positive
from .prior import AbstractPrior, AbstractPriorFamily


class RelativeScale(AbstractPriorFamily):
    """A prior under which components move by as much as they are large: in every step the output scale of ``prior``
    times the sizes of the components where the step starts.

    With one output scale for all components a solver takes them for equally rough. Where they differ by orders of
    magnitude, as concentrations do, it blames the small ones for the errors of the large ones, and on stiff problems
    their derivatives, and all that is predicted from them, are lost: Robertson's problem to t = 1e11 takes ``IWP(4)``
    with ``TS1`` more than 200,000 steps at ``rtol=1e-3``, ``RelativeScale(IWP(4))`` some 250. The solution does not
    depend on the units of the components then.

    A size is ``|u| + tau |u'|``, ``tau`` being the time in which the components change by their own sizes ``|u|``, in
    the root mean square: what a component is, and what it is about to be. None counts as smaller than ``floor`` times
    the largest ``|u|``. ``prior``: any with an ``output_scale``. Not for ``Isotropic()`` and ``Subspace()``, which have
    one scale for all components. Raises ``ValueError`` for a floor that is not positive, ``TypeError`` for a prior
    without an output scale.

    >>> import probode
    >>> probode.RelativeScale(probode.IWP(4)).num_derivatives
    4
    """

    prior: AbstractPrior | AbstractPriorFamily
    floor: Float[Array, ""]

    def __init__(self, prior: Any, floor: Any = 1e-12):
        if not isinstance(prior, AbstractPrior | AbstractPriorFamily) or not hasattr(prior, "output_scale"):
            raise TypeError(f"RelativeScale(prior) must be a prior with an output_scale, like IWP(4), got {prior!r}.")
        self.prior, self.floor = prior, as_positive(floor, "RelativeScale(floor)")

    @property
    def num_derivatives(self) -> int:
        """That of the prior whose output scale it is."""
        return self.prior.num_derivatives

    @property
    def is_polynomial(self) -> bool:
        """As of the prior whose output scale it is."""
        return self.prior.is_polynomial

    def at(self, t, us, problem, layout, args):
        prior = self.prior
        if isinstance(prior, AbstractPriorFamily):
            prior = prior.at(t, us, problem, layout, args)
        size = jnp.abs(us[0])
        size = size + self.floor.astype(size.dtype) * jnp.max(size)
        rate = root_mean_square(safe_divide(us[1], size))
        size = size + safe_divide(jnp.abs(us[1]), rate)
        size = jnp.where(size > 0, size, 1)  # where all components are zero
        scale = layout.output_scale(prior.output_scale) * size
        scale = scale if scale.ndim == 2 else layout.unravel(scale)
        return eqx.tree_at(lambda p: p.output_scale, prior, scale)
