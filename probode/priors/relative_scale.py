"""A prior whose output scale is proportional to the sizes of the components."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..algebra.factorisations import Layout
from ..algebra.linalg import safe_divide
from ..equations.problems import AbstractProblem
from .output_scale import as_positive
from .prior import AbstractPrior, AbstractPriorFamily


class RelativeScale(AbstractPriorFamily):
    """A prior with, in every step, the output scale of ``prior`` times the sizes that the components have in it.

    For components that differ by orders of magnitude, as concentrations do. With one output scale the prior gives all
    of them the same variance, the errors of the large components are attributed to the small ones as well, and on stiff
    problems the derivatives of the small ones, and all that is predicted from them, are lost: Robertson's problem to
    t = 1e11 takes ``IWP(4)`` with ``TS1`` more than 200,000 steps at ``rtol=1e-3``, ``RelativeScale(IWP(4))`` some 270.
    With relative scales the solution does not depend on the units of the components.

    The size of a component is that before the step and its change in it, ``|u| + |dt u'|``, but no more than its
    derivatives say that it will be: ``|u'|^2 / |u''|``, or ``(|u'|^3 / |u'''|)^(1/2)`` if that is less. So a fast
    component that starts from zero is neither thought to be zero, which would attribute its residual to the others, nor
    as large as its first derivative has it.

    - ``prior``: an ``AbstractPrior`` or ``AbstractPriorFamily`` with an ``output_scale`` and at least two derivatives.
    - ``floor``: a positive number without units; ``floor`` times the largest ``|u|`` is added to every ``|u|``.

    Not for ``Isotropic()`` and ``Subspace()``, which have one scale for all components. Raises ``ValueError`` for a
    floor that is not finite and positive and a prior with one derivative, ``TypeError`` for a prior without an output
    scale; in the first step ``ValueError`` under these factorisations.

    >>> import probode
    >>> probode.RelativeScale(probode.IWP(4)).num_derivatives
    4
    """

    prior: AbstractPrior | AbstractPriorFamily
    floor: Float[Array, ""]

    def __init__(self, prior: Any, floor: Any = 1e-12):
        if not isinstance(prior, AbstractPrior | AbstractPriorFamily) or not hasattr(prior, "output_scale"):
            raise TypeError(f"RelativeScale(prior) must be a prior with an output_scale, like IWP(4), got {prior!r}.")
        if prior.num_derivatives < 2:
            raise ValueError(
                "RelativeScale(prior) needs a prior with u'' at least, which tells how large components will be that "
                f"start from zero, got num_derivatives={prior.num_derivatives}."
            )
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
        self,
        t: Float[Array, ""],
        us: Float[Array, "n d"],
        problem: AbstractProblem,
        layout: Layout,
        args: PyTree,
        dt: Float[Array, ""] | None = None,
    ) -> AbstractPrior:
        prior: Any = self.prior  # with an output scale
        if isinstance(prior, AbstractPriorFamily):
            prior = prior.at(t, us, problem, layout, args, dt)
        size = jnp.abs(us[0])
        size = size + self.floor.astype(size.dtype) * jnp.max(size) + _change(us, dt)
        size = jnp.where(size > 0, size, 1)  # where all components are zero
        scale = layout.output_scale(prior.output_scale) * size
        scale = scale if scale.ndim == 2 else layout.unravel(scale)
        return eqx.tree_at(lambda p: p.output_scale, prior, scale)


def _change(us, dt):
    """By how much the components change in a step of length ``dt``, ``(d,)``, from their derivatives.

    At most as much as an exponential with the same first and second derivative, or with the same first and third, which
    where it passes through zero is also the size of a sine.
    """
    first, *further = jnp.abs(us[1:4])
    infinite = jnp.full_like(first, jnp.inf)
    changes = [infinite if dt is None else jnp.abs(dt) * first]
    moves = first > 0
    for k, u in enumerate(further, 1):
        # The derivative of a root is infinite at zero, and 0 times it would be NaN in a component that is at rest.
        root = jnp.where(moves, jnp.where(moves, safe_divide(first, u), 1) ** (1 / k), 0)
        changes.append(jnp.where(u > 0, first * root, infinite))
    change = jnp.min(jnp.stack(changes), axis=0)
    return jnp.where(jnp.isfinite(change), change, 0)
