"""Conformance checks of priors."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..algebra.factorisations import BlockDiagonal, Dense, Isotropic, layout_of
from ..algebra.normal import batched
from ..algebra.transition import Transition
from ..priors.prior import AbstractPrior, AbstractPriorFamily, AbstractSplitPrior
from ..util.checks import as_returned
from .examples import U0
from .laws import equal, finite, has_dtype, hold, in_single, require_double, require_kind, survives


_CANCELS = (
    "perhaps the cancellation of a closed formula in floating point (probode.linear_transition(drift, dt, layout) has "
    "none)"
)


def check_prior(prior: AbstractPrior | AbstractPriorFamily, *, u0: Any = None) -> None:
    """Raises ``LawBroken`` unless a prior is a Gauss-Markov process over a function and its derivatives.

    - Two transitions in a row are the one over both steps (Chapman-Kolmogorov), forwards and, if the noise of steps
      back in time is finite, backwards; the matrix of a step back undoes that of a step; a step of length zero is the
      identity.
    - The derivative of ``u^(i)`` is ``u^(i+1)``.
    - If ``is_polynomial``, the matrix is that of the Taylor polynomial.
    - The square root of the noise is finite, also in steps of 1e-12 and, if the matrix is, of 10. It is upper
      triangular, with noise in every derivative; the parts of an ``AbstractSplitPrior`` make up its covariance.
    - Transitions have the dtype of the state, and work under the transformations of JAX.

    These laws are checked in every factorisation that takes the prior's parameters. ``u0``: a PyTree with the shapes of
    ``u`` that the prior is for; two components by default. Raises ``TypeError`` for another kind of part, and for an
    ``AbstractPriorFamily``, whose parameters come from an equation.
    """
    require_double()
    if isinstance(prior, AbstractPriorFamily):
        raise TypeError(f"{type(prior).__name__} takes its parameters from the equation: check the solver instead.")
    require_kind(prior, AbstractPrior)
    example, refused, done = U0 if u0 is None else u0, [], 0
    for factorisation in (Dense(), BlockDiagonal(), Isotropic()):
        layout = layout_of(example, prior.num_derivatives, factorisation)
        try:
            jax.eval_shape(lambda dt, layout=layout: prior.transition(dt, layout), jnp.asarray(0.1))
        except ValueError as error:
            refused.append(error)
            continue
        done += 1
        _check_transitions(prior, layout)
        if isinstance(prior, AbstractSplitPrior):
            _check_split(prior, layout)
    hold(done, "A prior has transitions in some factorisation", str(refused[:1]))
    single = layout_of(in_single(example), prior.num_derivatives, Dense())
    of_single = jax.jit(lambda dt: in_single(prior).transition(dt, single))
    for dt in (0.1, 1e-8):
        transition = of_single(jnp.asarray(dt, jnp.float32))
        name = _at(type(prior).__name__, dt, single)
        has_dtype(transition, jnp.float32, f"{name}: a transition has the dtype of the state")
        _check_noise(name, transition)
    dense = layout_of(example, prior.num_derivatives, Dense())

    def everything(prior, dt):
        a, q = _moments(prior.transition(dt, dense))
        return jnp.concatenate([a.ravel(), q.ravel()])

    survives(everything, prior, jnp.asarray(0.3), "a transition as a function of the step")


def _check_split(prior, layout):
    """Checks the law of an ``AbstractSplitPrior``: its two parts make up the noise of a step."""
    for order, dt in ((1, 0.3), (min(2, prior.num_derivatives), -0.7)):
        split, transition = prior.split(jnp.asarray(dt), order, layout), prior.transition(jnp.asarray(dt), layout)
        size = layout.identity().shape[-1]
        rows = transition.matrix.shape[-1] // (prior.num_derivatives + 1) * order
        law = f"{type(prior).__name__}: derivatives depend on themselves and on higher ones alone"
        hold(transition.matrix[..., rows:, :rows] == 0, law)

        @batched
        def covariance(root, rest, gain=split.gain, size=size):
            gain = jnp.kron(gain, jnp.eye(size, dtype=gain.dtype))
            factor = jnp.block([[root @ gain.T, root], [rest, jnp.zeros((rest.shape[0], root.shape[0]), rest.dtype)]])
            return factor.T @ factor

        expected = batched(lambda noise: noise.T @ noise)(transition.noise)
        law = f"{type(prior).__name__}: the split noise has the covariance of the transition's"
        equal(covariance(split.root, split.rest), expected, law, 1e-10)
        log_det = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(split.root, axis1=-2, axis2=-1))), axis=-1)
        equal(split.log_det, log_det, f"{type(prior).__name__}: split.log_det is that of split.root", 1e-10)
        z = jnp.ones((*layout.batch_shape, split.root.shape[-1], 1), layout.dtype)
        back = batched(lambda root, white: root.T @ white)(split.root, split.whiten(z))
        equal(back, z, f"{type(prior).__name__}: split.whiten inverts split.root", 1e-6)


def _moments(transition):
    """Transition matrix and covariance of the noise, over all rows of the first batch element."""
    matrix, noise = transition.matrix, transition.noise * transition.magnitude
    while matrix.ndim > 2:
        matrix, noise = matrix[0], noise[0]
    size = noise.shape[-1] // matrix.shape[-1]
    return jnp.kron(matrix, jnp.eye(size)), noise.T @ noise


def _check_transitions(prior, layout):
    name = f"{type(prior).__name__} under {type(layout.factorisation).__name__}()"
    transition = jax.jit(lambda dt: prior.transition(dt, layout))
    n = prior.num_derivatives + 1
    _check_shapes(name, transition(0.3), layout, n)
    for dt in (0.3, 1e-12):
        _check_noise(_at(name, dt, layout), transition(dt))
    long = transition(10.0)
    if np.all(np.isfinite(long.matrix)):  # of a process that grows it need not be
        _check_noise(_at(name, 10.0, layout), long)

    at = jax.jit(lambda dt: _moments(prior.transition(dt, layout)))
    dim = at(0.1)[0].shape[0]
    if prior.is_polynomial:
        powers = [[0.3 ** (j - i) / math.factorial(j - i) if j >= i else 0.0 for j in range(n)] for i in range(n)]
        law = f"{_at(name, 0.3, layout)}: where is_polynomial is true the matrix is that of the Taylor polynomial"
        equal(at(0.3)[0], np.kron(powers, np.eye(dim // n)), law, 1e-12)
    law = f"{_at(name, 0, layout)}: a step of length zero stays where it is"
    equal(at(0.0)[0], np.eye(dim), law, atol=1e-14)
    _, rate = jax.jit(lambda dt: jax.jvp(lambda dt: at(dt)[0], (dt,), (1.0,)))(0.0)
    d = dim // n
    law = f"{_at(name, 0, layout)}: the derivative of u^(i) is u^(i+1) in the drift, which is d(matrix)/d(dt)"
    equal(rate[: dim - d], np.eye(dim)[d:], law, 1e-12)
    # With u^(i) in units of h^(-i) all entries are of size one. Otherwise they are powers of the step, and a tolerance
    # relative to the largest one would not check the small ones.
    for one, two in ((0.1, 0.2), (0.02, 1.0), (1e-3, 1e-3), (1e-12, 2e-12), (-0.1, -0.2)):
        units = np.repeat(abs(one + two) ** np.arange(n), dim // n)
        (a1, q1), (a2, q2), (a, q) = at(one), at(two), at(one + two)
        if one < 0 and not np.all(np.isfinite(q)):
            continue  # For solves forwards alone: backwards they end as nonfinite, and nobody is misled.
        direction = "" if one > 0 else " back in time"
        law = f"{_at(name, one + two, layout)}: a step{direction} is the same as one of {one:g} and one of {two:g}"
        law = f"{law} (Chapman-Kolmogorov)"
        equal(units[:, None] * (a2 @ a1) / units, units[:, None] * a / units, f"{law}, its matrix", 1e-10)
        parts, q = (units[:, None] * q * units for q in (a2 @ q1 @ a2.T + q2, q))
        law = f"{law}, its covariance, which has to be that of the drift of the matrix"
        # A wrong formula is further off than round-off can be. NaN may be the root of a negative difference.
        small = not np.max(np.abs(parts - q)) >= 1e-5 * np.max(np.abs(q))
        equal(parts, q, law, 1e-9, what=_CANCELS if small else "")
    law = f"{_at(name, -0.3, layout)}: a step back undoes a step"
    equal(at(-0.3)[0] @ at(0.3)[0], np.eye(dim), law, 1e-9)


def _at(name, dt, layout):
    """The beginning of a law about one step."""
    return f"{name}, dt={dt:g}, {layout.dtype}"


def _check_shapes(name, transition, layout, n):
    """Checks that a transition is one, and that its arrays have the shapes that the layout asks for."""
    as_returned(transition, Transition, f"{name}: transition")
    expected = layout.lift(jnp.eye(n, dtype=layout.dtype), 1.0).shape
    law = f"{name}: the noise has the shape {expected}, as layout.lift(root, output_scale) of an ({n}, {n}) root has it"
    hold(jnp.shape(transition.noise) == expected, law, f"shape {jnp.shape(transition.noise)}")
    rows = {n, expected[-1]}
    law = f"{name}: a transition has a row for every derivative, as layout.broadcast(matrix) of an ({n}, {n}) matrix"
    shape = jnp.shape(transition.matrix)
    fits = len(shape) == len(expected) and shape[:-2] == expected[:-2] and {shape[-2]} == {shape[-1]} <= rows
    hold(fits, law, f"shape {shape}")
    hold(jnp.shape(transition.magnitude) == (), f"{name}: the magnitude is a scalar", f"{transition.magnitude!r}")


def _check_noise(law, transition):
    """Checks the square root of the noise of one step; ``law``: of which."""
    finite(transition.matrix, f"{law}: the matrix of a transition is finite")
    noise = np.asarray(transition.noise)
    number = np.sum(~np.isfinite(noise))
    why = (
        f"NaN or infinite in {number} of {noise.size} entries. The Cholesky factor of a covariance that is singular in "
        "floating point, as that of a short step is, is NaN. probode.linear_transition(drift, dt, layout) has a square "
        "root of the noise for every step"
    )
    hold(number == 0, f"{law}: the square root of the noise is finite", why)
    lower = " lower triangular, as jnp.linalg.cholesky returns it: transpose it, for a covariance root^T root"
    found = "it is" + (lower if np.array_equal(noise, np.tril(noise)) else " not triangular")
    hold(np.array_equal(noise, np.triu(noise)), f"{law}: the square root of the noise is upper triangular", found)
    pivots = np.abs(np.diagonal(noise, axis1=-2, axis2=-1))
    hold((pivots > 0) & np.asarray(transition.magnitude > 0), f"{law}: noise reaches every derivative", f"{pivots}")
