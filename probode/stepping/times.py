"""Times of a solve: their round-off, the direction in which they run, and those at which the equation jumps."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def direction_of(t0: Float[Array, ""], t1: Float[Array, ""]) -> Float[Array, ""]:
    """1 where time runs forwards from ``t0`` to ``t1``, -1 where it runs backwards."""
    return jnp.where(t1 >= t0, 1, -1).astype(t1.dtype)


def round_off(t: Float[Array, ""]) -> Float[Array, ""]:
    """The length below which a step at ``t`` is noise: 100 units of round-off."""
    return 100 * jnp.finfo(t.dtype).eps * jnp.abs(t)


def nearest(
    hits: Float[Array, " times"], t: Float[Array, ""], t1: Float[Array, ""], direction: Float[Array, ""]
) -> Float[Array, ""]:
    """The first of the times after ``t``, in the direction of the solve, that a step must not cross; or ``t1``."""
    distance = (hits - t) * direction
    usable = (distance > round_off(t)) & ((t1 - hits) * direction > round_off(t1))
    return jnp.where(jnp.any(usable), hits[jnp.argmin(jnp.where(usable, distance, jnp.inf))], t1)


def is_jump(t: Float[Array, ""], jumps: Float[Array, " times"]) -> Bool[Array, ""]:
    """Whether ``t`` is one of the times, up to round-off."""
    return jnp.any(jnp.abs(lax.stop_gradient(jumps - t)) <= round_off(t))


def beside(t: Float[Array, ""], side: Float[Array, ""], jumps: Float[Array, " times"]) -> Float[Array, ""]:
    """``t``, or one or two units of round-off above (``side`` 1) or below it (-1) where the equation jumps at ``t``.

    It moves with ``t``: so a solution has the right derivative with respect to the time of a jump.
    """
    fixed, jumps = lax.stop_gradient(t), lax.stop_gradient(jumps)
    ahead = (jumps - fixed) * side
    # Of jumps that are the same time up to round-off the outermost one.
    beyond = jnp.max(jnp.where(jnp.abs(ahead) <= round_off(fixed), ahead, 0))
    info = jnp.finfo(t.dtype)
    ulp = jnp.maximum(info.eps * jnp.abs(fixed + side * beyond), info.tiny)
    return t + jnp.where(is_jump(fixed, jumps), side * (jnp.maximum(beyond, 0) + ulp), 0)
