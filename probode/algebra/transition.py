"""The distribution of a state after a time step, given the one before it."""

import equinox as eqx
from jaxtyping import Array, Float


class Transition(eqx.Module):
    """The Gaussian distribution of the state after a time step given the state before it, as a prior returns it.

    ``x(t + dt) | x(t) ~ N(A x(t), magnitude^2 noise^T noise)`` in the layout of the factorisation:

    - ``matrix``: ``A``, ``(*batch, p, p)``. If it is smaller than the state it stands for ``kron(A, I)``, the same for
      all components.
    - ``noise``: upper triangular right square root of the covariance of the process noise, ``(*batch, dim, dim)``, with
      the prior's own output scale; a calibrated scale multiplies it.
    - ``magnitude``: a scalar factor on ``noise``, for a power of ``dt`` with which the entries of ``noise`` would
      under- or overflow. The solvers compute with the product of calibrated scale and ``magnitude``, which may be
      representable where the scale is not. Use one for steps of ordinary length.

    >>> import jax.numpy as jnp, probode
    >>> state = probode.Solver(probode.IWP(2), probode.TS0(probode.ODE(lambda t, u, args: -u))).init(1.0, 0.0)
    >>> probode.IWP(2).transition(jnp.array(0.5), state.layout).matrix  # a Taylor polynomial
    Array([[1.   , 0.5  , 0.125],
           [0.   , 1.   , 0.5  ],
           [0.   , 0.   , 1.   ]], dtype=float64)
    """

    matrix: Float[Array, "*batch p p"]
    noise: Float[Array, "*batch dim dim"]
    magnitude: Float[Array, ""]
