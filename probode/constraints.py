"""Information operators: the equation ``z(t, x) = 0`` about the state, linearised at a prediction.

TS0 and TS1 are the zeroth- and first-order Taylor linearisations of ``z = u^(k) - f(t, u, ..., u^(k-1))``; with a
filter they make the methods known as EK0 and EK1 (Schober et al. 2019; Tronarp et al. 2019).
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .checks import as_integer
from .factorisations import Layout
from .gaussians import Linearisation, Normal
from .problems import ODE, flat_field


def _evaluations(value):
    return as_integer(value, "evaluations", 1)


class AbstractConstraint(eqx.Module):
    """An equation that the solution satisfies at every time, and how it is linearised.

    ``evaluations``: how often it is evaluated in an accepted step, at the prediction and then at what the update before
    has made of it.
    """

    ode: eqx.AbstractVar[ODE]
    evaluations = 1

    @abstractmethod
    def linearise(self, t: Float[Array, ""], predicted: Normal, layout: Layout, args: PyTree) -> Linearisation:
        """The equation about ``predicted`` at time ``t``.

        ``predicted.factor`` is a square root of the predicted covariance without the noise of the step, not triangular.
        """


class TS0(AbstractConstraint):
    """``z`` with the vector field frozen at the prediction: ``H = E_k``. No Jacobian; for problems that are not stiff.

    ``evaluations=2`` evaluates the vector field once more in every accepted step, at the corrected mean, and corrects
    again: the mode P(EC)^2 of multistep methods (Hairer, Norsett, Wanner 1993, III.1), an iterated filter update. It
    makes stable steps two to ten times as long from order five on. 1 is EK0. Raises ``TypeError`` for anything but an
    ``ODE``, ``ValueError`` for a number of evaluations below 1.
    """

    ode: ODE
    evaluations: int = eqx.field(static=True, default=1, converter=_evaluations)

    def __check_init__(self):
        _require_ode(self)

    def linearise(self, t, predicted, layout, args):
        k = self.ode.order
        us = layout.unpack(predicted.mean)[: k + 1]
        field = flat_field(self.ode, layout, args)
        blocks = [jnp.zeros_like(layout.identity())] * k + [layout.identity()]
        return Linearisation(jnp.concatenate(blocks, axis=-1), layout.pack((us[k] - field(t, us[:k]))[None]), block=k)


class TS1(AbstractConstraint):
    """``z`` with its exact Jacobian at the prediction: ``H = E_k - sum_j J_j E_j``. Stable on stiff problems.

    The Jacobian is taken in full under ``Dense``, its diagonal under ``BlockDiagonal``, its mean diagonal under
    ``Isotropic``. ``evaluations`` as for ``TS0``; the Jacobian stays that of the prediction. Raises ``TypeError`` for
    anything but an ``ODE``, ``ValueError`` for a number of evaluations below 1.
    """

    ode: ODE
    evaluations: int = eqx.field(static=True, default=1, converter=_evaluations)

    def __check_init__(self):
        _require_ode(self)

    def linearise(self, t, predicted, layout, args):
        k = self.ode.order
        us = layout.unpack(predicted.mean)[: k + 1]
        field = flat_field(self.ode, layout, args)

        def field_twice(x):
            f = field(t, x)
            return f, f

        # (d, k, d) and the value from one batched forward pass.
        jacobian, f = jax.jacfwd(field_twice, has_aux=True)(us[:k])
        blocks = [-layout.project(jacobian[:, j, :]) for j in range(k)] + [layout.identity()]
        return Linearisation(jnp.concatenate(blocks, axis=-1), layout.pack((us[k] - f)[None]), block=k)


def _require_ode(constraint):
    name = type(constraint).__name__
    if not isinstance(constraint.ode, ODE):
        raise TypeError(f"{name} linearises an ODE: write {name}(probode.ODE(f)), not {name}({constraint.ode!r}).")
