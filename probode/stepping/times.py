"""Times of a solve: their round-off, the interval in which they lie, and those at which the equation jumps."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


class Interval(eqx.Module):
    """The times from ``t0`` to ``t1``, which may lie before ``t0``."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]

    @property
    def direction(self) -> Float[Array, ""]:
        """1 where time runs forwards from ``t0`` to ``t1``, -1 where it runs backwards."""
        return jnp.where(self.t1 >= self.t0, 1, -1).astype(self.t1.dtype)

    def signed(self, times: Float[Array, "*times"]) -> Float[Array, "*times"]:
        """The times with the sign that makes them grow from ``t0`` to ``t1``: for comparisons and sorting."""
        return times * self.direction

    def remaining(self, t: Float[Array, "*times"]) -> Float[Array, "*times"]:
        """The length of the way from ``t`` to ``t1``; negative beyond."""
        return (self.t1 - t) * self.direction

    def share(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """The part of the interval that lies before ``t``, between 0 and 1."""
        return jnp.clip((t - self.t0) / (self.t1 - self.t0), 0, 1)

    def nearest(self, hits: Float[Array, " times"], t: Float[Array, ""]) -> Float[Array, ""]:
        """The first of ``hits`` after ``t``, which a step must not cross; ``t1`` where there is none before it.

        Times closer to ``t`` or to ``t1`` than round-off count as these.
        """
        distance = self.signed(hits - t)
        between = (distance > round_off(t)) & (self.remaining(hits) > round_off(self.t1))
        return jnp.where(jnp.any(between), hits[jnp.argmin(jnp.where(between, distance, jnp.inf))], self.t1)


def round_off(t: Float[Array, ""]) -> Float[Array, ""]:
    """The length below which a step at ``t`` is noise: 100 units of round-off."""
    return 100 * jnp.finfo(t.dtype).eps * jnp.abs(t)


def is_jump(t: Float[Array, ""], jumps: Float[Array, " times"]) -> Bool[Array, ""]:
    """Whether ``t`` is one of the times, up to round-off."""
    return jnp.any(jnp.abs(lax.stop_gradient(jumps - t)) <= round_off(t))


def beside(t: Float[Array, ""], side: Float[Array, ""], jumps: Float[Array, " times"]) -> Float[Array, ""]:
    """``t``, or one or two units of round-off above (``side`` 1) or below it (-1) where the equation jumps at ``t``.

    It moves with ``t``: so a solution has the right derivative with respect to the time of a jump.
    """
    fixed, jumps = lax.stop_gradient(t), lax.stop_gradient(jumps)
    offsets = (jumps - fixed) * side
    # Of jumps that are the same time up to round-off the outermost one.
    beyond = jnp.max(jnp.where(jnp.abs(offsets) <= round_off(fixed), offsets, 0))
    info = jnp.finfo(t.dtype)
    ulp = jnp.maximum(info.eps * jnp.abs(fixed + side * beyond), info.tiny)
    return t + jnp.where(is_jump(fixed, jumps), side * (jnp.maximum(beyond, 0) + ulp), 0)
