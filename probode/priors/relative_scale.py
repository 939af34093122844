"""A prior whose output scale is proportional to the sizes of the components."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..algebra.linalg import root_mean_square, safe_divide
from ..equations.problems import AbstractProblem
from .output_scale import as_positive
from .prior import AbstractPrior, AbstractPriorFamily


class RelativeScale(AbstractPriorFamily):
    """A prior with, in every step, the output scale of ``prior`` times the sizes of the components before the step.

    For components that differ by orders of magnitude, as concentrations do. With one output scale the prior gives all
    of them the same variance, the errors of the large components are attributed to the small ones as well, and on stiff
    problems the derivatives of the small ones, and all that is predicted from them, are lost: Robertson's problem to
    t = 1e11 takes ``IWP(4)`` with ``TS1`` more than 200,000 steps at ``rtol=1e-3``, ``RelativeScale(IWP(4))`` some 250.
    With relative scales the solution does not depend on the units of the components.

    The size of a component is ``|u| + tau |u'|``, where ``tau`` is the time in which the components change by their own
    ``|u|``, in the root mean square: so one that is small now but grows is not underestimated.

    - ``prior``: an ``AbstractPrior`` or ``AbstractPriorFamily`` with an ``output_scale``.
    - ``floor``: a positive number without units; ``floor`` times the largest ``|u|`` is added to every ``|u|``.

    Not for ``Isotropic()`` and ``Subspace()``, which have one scale for all components. Raises ``ValueError`` for a
    floor that is not finite and positive, ``TypeError`` for a prior without an output scale; in the first step
    ``ValueError`` under these factorisations.

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

    @property  # type: ignore[misc]  # an abstract variable may be a property
    def num_derivatives(self) -> int:  # type: ignore[override]
        """The number of derivatives of the prior that is scaled."""
        return self.prior.num_derivatives

    @property
    def is_polynomial(self) -> bool:  # type: ignore[override]
        """Whether the prior that is scaled has this property: see ``AbstractPrior``."""
        return self.prior.is_polynomial

    def at(
        self, t: Float[Array, ""], us: Float[Array, "n d"], problem: AbstractProblem, layout: Layout, args: PyTree
    ) -> AbstractPrior:
        prior: Any = self.prior  # with an output scale
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
