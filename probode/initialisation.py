"""The state at ``t0``: derivatives of the solution, and how sure we are of them.

``TaylorMode`` differentiates the equation itself (jets), so that the initial state is exact.
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .factorisations import Layout
from .gaussians import Normal
from .jets import taylor_derivatives
from .problems import ODE, flat_field


class InitialState(eqx.Module):
    """A Gaussian over ``(u, u', ..., u^(nu))``, plain derivatives; differentiable, accepted wherever ``u0`` is.

    ``mean``: a tuple of ``nu + 1`` PyTrees like ``u``. ``factor``: the right square root of the covariance in the
    layout of the solver's factorisation, ``(*batch, dim, dim)``.
    """

    mean: tuple[PyTree, ...]
    factor: Float[Array, "*batch dim dim"]


class AbstractInitialisation(eqx.Module):
    """How the state at ``t0`` is found from the initial value."""

    @abstractmethod
    def initialise(
        self, ode: ODE, t0: Float[Array, ""], u0: Float[Array, "order d"], layout: Layout, args: PyTree
    ) -> Normal:
        """The state at ``t0`` in the layout, from the stack ``u0`` of known derivatives ``(u, ..., u^(k-1))``.

        The factor may have any number of rows up to ``dim``; none says that the state is certain.
        """


class TaylorMode(AbstractInitialisation):
    """Exact derivatives of the solution at ``t0`` by Taylor-mode differentiation; the covariance is zero.

    Kraemer & Hennig (2020), "Stable implementation of probabilistic ODE solvers". Fields with operations that have no
    jet rule are differentiated by nested forward mode, up to order 8; beyond that a ``ValueError`` says which.
    """

    def initialise(self, ode, t0, u0, layout, args):
        derivatives = taylor_derivatives(flat_field(ode, layout, args), t0, u0, layout.num_derivatives)
        mean = layout.pack(derivatives)
        return Normal(mean, jnp.zeros((*layout.batch_shape, 0, mean.shape[-2]), layout.dtype))
