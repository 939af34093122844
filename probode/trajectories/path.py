"""The posterior process of a boundary value problem: at any time of the interval, and joint samples."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ..algebra.factorisations import Dense, Layout, layout_of
from ..algebra.linalg import product, root_mean_square, substitute, triangularise
from ..algebra.normal import Normal, certain
from ..posterior.trajectory import AbstractPath, between
from ..priors.iwp import IWP
from ..priors.powers import powers
from ..stepping.times import Interval
from .collocation import Course, Equations, Mesh, System
from .meshes import inside, largest_nearby
from .rows import map_rows


# How near to an end of an interval, in its length, the prior is conditioned on both ends.
_NEAREST = 1e-6


class Bridge(eqx.Module):
    """The prior at a point of an interval, given the states at both ends: ``before x_0 + after x_1`` plus noise.

    In units of the length of the interval. ``root``: right square root of the covariance of the noise.
    """

    before: Float[Array, "n n"]
    after: Float[Array, "n n"]
    root: Float[Array, "n n"]


def bridge(share: Float[Array, ""], n: int) -> Bridge:
    """The ``Bridge`` at a ``share`` of an interval, under an integrated Wiener process with ``n`` derivatives."""
    dtype = share.dtype
    layout, prior = layout_of(jnp.zeros((), dtype), n - 1, Dense()), IWP(n - 1)
    # At the ends themselves the noise is singular; there the state is the one that is known.
    share, one = jnp.clip(share, _NEAREST, 1 - _NEAREST), jnp.ones((), dtype)
    here, predicted, past = between(layout, prior, one, certain(jnp.zeros((n, 1), dtype)), share, 1 - share)
    gain = product(here.factor.T, product(past.cross.T, substitute(predicted.factor, jnp.eye(n, dtype=dtype))))
    to_here, whole = (prior.transition(dt, layout).matrix for dt in (share, one))
    return Bridge(to_here - product(gain, whole), gain, triangularise(None, product(past.noise, here.factor)))


class MeshPath(AbstractPath):
    """The distributions of the states at the nodes of a mesh, of which any two neighbours determine what lies between.

    - ``mesh``, ``course``: the nodes, and the means of their states and of the parameters.
    - ``system``: the linearised equations, whose solutions for random right-hand sides are samples.
    - ``left``, ``right``: right square roots of the covariance of the states at both ends of each interval, with the
      same rows.
    - ``parameters``: that of the parameters.
    - ``calibration``: the factors on the standard deviations of all components at every node.
    - ``sizes``: of the components, to which the noise is in proportion.
    - ``layout``: how states are stored.
    """

    mesh: Mesh
    course: Course
    system: System
    left: Float[Array, "intervals rows dim"]
    right: Float[Array, "intervals rows dim"]
    parameters: Float[Array, "b P"]
    calibration: Float[Array, "nodes d"]
    sizes: Float[Array, " d"]
    layout: Layout

    @property
    def is_dense(self) -> bool:
        return True

    @property
    def is_smoothed(self) -> bool:
        return True

    @property
    def interval(self) -> Interval:
        return Interval(self.mesh.t[0], self.mesh.t[-1])

    def marginals(self) -> Normal:
        """The distributions at the nodes."""
        rows = jnp.concatenate([self.left, self.right[-1:]])
        last = (jnp.arange(rows.shape[0]) >= self.mesh.number)[:, None, None]
        rows = jnp.where(last, self.right[self.mesh.number - 1], rows)
        square = lambda x: triangularise(None, x[0] * self._per_entry(x[1])[None])  # noqa: E731
        number, differentiable = self.mesh.number + 1, self.system.chain.differentiable
        factor = map_rows(square, (rows, self.calibration), number, differentiable=differentiable)
        factor = jnp.where(last, factor[self.mesh.number], factor)
        return Normal(jax.vmap(self.layout.pack)(self.course.states), factor)

    def output_scale(self) -> Float[Array, " nodes"]:
        """The output scale in the interval that ends at each node, the root mean square over components."""
        size = root_mean_square(self.calibration * self.sizes[None], axis=(1,))
        lengths = jnp.abs(self.mesh.lengths)
        return size * jnp.concatenate([lengths[:1], lengths]) ** (0.5 - self._n)

    def evaluate(self, ts: Float[Array, " times"]) -> tuple[Normal, Float[Array, "times *batch"], Layout | None]:
        scales = self.output_scale()

        def one(t):
            i, share, dt = self._locate(t)
            bridged = bridge(share, self._n)
            unit = jnp.stack(powers(dt, self._n))
            mean = self._mean(i, share, dt)
            before, after = ((x * unit[None] / unit[:, None]) for x in (bridged.before, bridged.after))
            rows = self._apply(before, self.left[i]) + self._apply(after, self.right[i])
            rows = jnp.where(share <= 0, self.left[i], jnp.where(share >= 1, self.right[i], rows))
            noise = jnp.kron(bridged.root / unit[None], jnp.diag(self.sizes))
            noise = jnp.where((share <= 0) | (share >= 1), 0, noise)
            factor = jnp.concatenate([rows, noise]) * self._calibration_at(i, share)[None]
            return Normal(self.layout.pack(mean), triangularise(None, factor)), scales[i + 1]

        states, scale = lax.map(one, ts)
        return states, scale, None

    def sample(
        self, key: PRNGKeyArray, ts: Float[Array, " times"]
    ) -> tuple[Float[Array, "times *batch dim cols"], Layout]:
        own, key = jax.random.split(key)
        intervals, q = self.system.before.shape[:2]
        noise = jax.random.normal(own, (intervals, q), ts.dtype)
        # Deviations of the nodes, in units of the calibration: they solve the equations for random residuals.
        nodes = self.system.deviations(noise).states
        order = jnp.argsort(self.interval.signed(ts))

        def body(later, x):
            # From the last time to the first: given the left end of its interval and the sample at the next time in it,
            # or its right end, a state is independent of everything else.
            t, key = x
            t_next, i_next, x_next = later
            i, share, dt = self._locate(t)
            same = i == i_next
            end, x_end = jnp.where(same, t_next, self.mesh.t[i] + dt), jnp.where(same, x_next, nodes[i + 1])
            way = end - self.mesh.t[i]
            part = jnp.where(way == 0, 1, (t - self.mesh.t[i]) / jnp.where(way == 0, 1, way))
            bridged, unit = bridge(part, self._n), jnp.stack(powers(jnp.where(way == 0, 1, way), self._n))
            mean = inside(nodes[i], x_end, jnp.where(way == 0, 1, way), part)
            weights = jax.random.normal(key, (self._n, self.layout.size), t.dtype)
            noise = (bridged.root.T @ weights) / unit[:, None] * self.sizes[None]
            noise = noise * jnp.abs(way / dt) ** (self._n - 0.5)
            here = jnp.where(part <= 0, nodes[i], jnp.where(part >= 1, x_end, mean + noise))
            scaled = self._calibration_at(i, share).reshape(self._n, -1) * here
            return (t, i, here), self._mean(i, share, dt) + scaled

        start = self.mesh.t[-1], jnp.full_like(self.mesh.number, -1), nodes[0]
        _, xs = lax.scan(body, start, (ts[order], jax.random.split(key, ts.size)), reverse=True)
        return jax.vmap(self.layout.pack)(jnp.zeros_like(xs).at[order].set(xs)), self.layout

    @property
    def _n(self):
        return self.layout.num_derivatives + 1

    def _locate(self, t):
        signed = self.interval.signed
        i = jnp.searchsorted(signed(self.mesh.t), signed(t), side="right").astype(self.mesh.number.dtype) - 1
        i = jnp.clip(i, 0, self.mesh.number - 1)
        dt = self.mesh.lengths[i]
        return i, (t - self.mesh.t[i]) / dt, dt

    def _mean(self, i, share, dt):
        x = self.course.states
        return inside(x[i], x[i + 1], dt, share)

    def _calibration_at(self, i, share):
        share = jnp.clip(share, 0, 1)
        return self._per_entry((1 - share) * self.calibration[i] + share * self.calibration[i + 1])

    def _per_entry(self, per_component):
        return jnp.tile(per_component, self._n)

    def _apply(self, weights, rows):
        blocks = jnp.reshape(rows, (rows.shape[0], self._n, -1))
        return jnp.reshape(jnp.einsum("ij,rjd->rid", weights, blocks), rows.shape)


def mesh_path(
    equations: Equations, mesh: Mesh, course: Course, errors: Float[Array, "nodes d"], *, differentiable: bool = False
) -> MeshPath:
    """The posterior process about a course, with standard deviations of ``u`` at the nodes that are its errors."""
    system = equations.linearised(mesh, course, differentiable=differentiable)
    left, right, parameters = system.roots()
    at_last = jnp.arange(left.shape[0]) >= mesh.number
    left = jnp.where(at_last[:, None, None], right[mesh.number - 1], left)
    rows = jnp.concatenate([left, right[mesh.number - 1][None]])
    d = course.states.shape[2]
    square = jnp.sum(rows[..., :d] ** 2, axis=1)
    # Where a value is given it has no deviation, and those of its derivatives are calibrated as nearby.
    known = square > 1e-16 * jnp.max(square, axis=0)[None]
    is_given = jnp.pad(~known, ((0, 0), (0, rows.shape[2] - d)))
    left = jnp.where(is_given[:-1, None], 0, left)
    right = jnp.where(is_given[1:, None], 0, right)
    # Round-off is an error, too.
    errors = errors + 4 * jnp.finfo(errors.dtype).eps * jnp.abs(course.states[:, 0])
    factor = jnp.where(known, errors, 0) / jnp.sqrt(jnp.where(known, square, 1))
    for _ in range(2):
        nearby = largest_nearby(factor)
        factor = jnp.where(known, factor, nearby)
        known = known | (nearby > 0)
    return MeshPath(mesh, course, system, left, right, parameters, factor, equations.sizes, equations.layout)
