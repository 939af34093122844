"""How good a course on a mesh is, and a better mesh.

The error of a course is the step that Newton's method makes on the mesh with twice as many intervals: so it knows how
errors of all intervals add up along the solution, with their signs.
"""

import functools
import math
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..algebra.linalg import product, root_mean_square
from ..equations.problems import flat_residual
from ..priors.powers import exact_solve, powers
from .collocation import Course, Equations, Mesh
from .newton import Scales
from .rows import map_rows


# Where the equation is looked at inside an interval: the inner points of Lobatto's rule with five.
_INSIDE = (0.5 - np.sqrt(3 / 28), 0.5, 0.5 + np.sqrt(3 / 28))
# With which power of their length the errors of intervals are taken to grow.
_ORDER = 8
# By how much the number of intervals may grow, and by how much if the solution is far from being resolved.
_MOST, _UNRESOLVED, _FAR = 2.0, 1.5, 1e3
# The smallest density of nodes, as a part of the mean.
_LEAST = 1e-3
# How much longer than its neighbour an interval may be.
_RATIO = 3.0


def inside(
    left: Float[Array, "n d"], right: Float[Array, "n d"], dt: Float[Array, ""], share: Float[Array, ""]
) -> Float[Array, "n d"]:
    """The state at a ``share`` of an interval of length ``dt``, by Hermite's polynomial through the states at its ends.

    It is the mean of an integrated Wiener process given these.
    """
    n = left.shape[0]
    near, far = (jnp.asarray(x, left.dtype) for x in _hermite(n))
    # From the nearer end: powers of a share of at most one half do not cancel each other.
    is_left = share <= 0.5
    here, there = jnp.where(is_left, left, right), jnp.where(is_left, right, left)
    step = jnp.where(is_left, dt, -dt)
    unit = jnp.stack(powers(step, n))[:, None]
    monomials = jnp.stack(powers(jnp.where(is_left, share, 1 - share), 2 * n))
    return (product(near @ monomials, unit * here) + product(far @ monomials, unit * there)) / unit


@functools.cache
def _hermite(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All derivatives of Hermite's polynomials for ``n`` derivatives at both ends of ``[0, 1]``, by powers.

    Two arrays ``(n, n, 2n)``: for the derivatives at 0, and for those at 1. The last axis is that of the powers, the
    first one that of the derivative. In exact arithmetic, as the coefficients are large and cancel each other.
    """
    size = 2 * n
    falling = lambda p, i: Fraction(math.factorial(p), math.factorial(p - i)) if p >= i else Fraction(0)  # noqa: E731
    conditions = [[falling(p, i) if p == i else Fraction(0) for p in range(size)] for i in range(n)]
    conditions += [[falling(p, i) for p in range(size)] for i in range(n)]
    columns = exact_solve(conditions, [[Fraction(int(a == b)) for b in range(size)] for a in range(size)])
    tables = np.zeros((n, size, size))
    for i in range(n):
        for data in range(size):
            for p in range(i, size):
                tables[i, data, p - i] = float(falling(p, i) * columns[p][data])
    return tables[:, :n], tables[:, n:]


def halved(mesh: Mesh) -> Mesh:
    """The mesh with a node in the middle of every interval, and room for it."""
    return Mesh(_woven(mesh.t, (mesh.t[:-1] + mesh.t[1:]) / 2), 2 * mesh.number)


def on_halved(mesh: Mesh, course: Course, *, differentiable: bool = False) -> tuple[Mesh, Course]:
    """The halved mesh, and the course on it."""
    x, number = course.states, mesh.number
    half = jnp.full((), 0.5, x.dtype)
    middle = lambda x: inside(x[0], x[1], x[2], half)  # noqa: E731
    inner = map_rows(middle, (x[:-1], x[1:], mesh.lengths), number, differentiable=differentiable)
    behind = (jnp.arange(inner.shape[0]) >= number)[:, None, None]
    inner = jnp.where(behind, x[number], inner)
    return halved(mesh), Course(_woven(x, inner), course.parameters)


def _woven(a, b):
    """The rows ``a_0, b_0, a_1, b_1, ..., a_n``."""
    return jnp.concatenate([jnp.reshape(jnp.stack([a[:-1], b], 1), (-1, *a.shape[1:])), a[-1:]])


class Assessment(eqx.Module):
    """The error of a course on the halved mesh: of ``u``, the largest nearby, and of the parameters.

    ``ratio``: the largest over its tolerance.
    """

    errors: Float[Array, "points d"]
    parameters: Float[Array, " P"]
    ratio: Float[Array, ""]


def assess(
    equations: Equations, mesh: Mesh, course: Course, scales: Scales, *, differentiable: bool = False
) -> Assessment:
    """How far the course is from the one on the halved mesh."""
    finer, on_finer = on_halved(mesh, course, differentiable=differentiable)
    linear = equations.linearised(finer, on_finer, differentiable=differentiable)
    step = linear.step(equations.residuals(finer, on_finer, differentiable=differentiable))
    # An error that changes its sign is not small because it is zero there.
    errors = largest_nearby(largest_nearby(jnp.abs(step.states[:, 0])))
    tolerance = scales.tolerance(on_finer.states[:, 0])
    ratio = jnp.max(jnp.where(finer.is_node[:, None], errors / tolerance, 0))
    return Assessment(errors, jnp.abs(step.parameters), ratio)


def largest_nearby(x: Float[Array, "rows *rest"]) -> Float[Array, "rows *rest"]:
    """The largest of each row and its neighbours."""
    return jnp.maximum(x, jnp.maximum(jnp.concatenate([x[1:], x[-1:]]), jnp.concatenate([x[:1], x[:-1]])))


def better(
    equations: Equations, mesh: Mesh, course: Course, scales: Scales, ratio: Array, last: Array
) -> tuple[Mesh, Course]:
    """A mesh with more nodes, dense where the residual inside the intervals is large, and the course on it.

    ``ratio``: of the error and the tolerance; ``last``: that of the mesh before. They determine the number of
    intervals; over each of these the density of nodes (``_density``) has the same integral.
    """
    growth = jnp.where(ratio < _FAR, (4 * ratio) ** (1 / _ORDER), _UNRESOLVED)
    growth = jnp.clip(jnp.where(ratio > last / 4, _MOST, growth), 1, _MOST)
    number = jnp.ceil(mesh.number.astype(ratio.dtype) * growth).astype(mesh.number.dtype)
    density = _density(equations, mesh, course, scales)
    return _moved(mesh, course, density, jnp.clip(number, 5, mesh.t.size - 1))


def _density(equations, mesh, course, scales):
    """How many nodes there should be in a unit of time, up to a factor, for every interval; zero behind the last.

    It is ``(|dt|^k r)^(1/8) / |dt|``, where ``r`` is the root mean square of the residual at inner points, in
    tolerances; but no less than a small part of the mean density, nor than a third of that of a neighbour.
    """
    x, k, lengths = course.states, equations.k, jnp.abs(mesh.lengths)
    field = flat_residual(equations.lifted.ode, equations.layout, equations.with_parameters(course.parameters))

    def error(x):
        left, right, t, dt = x
        shares = jnp.asarray(_INSIDE, t.dtype)
        states = jax.vmap(lambda share: inside(left, right, dt, share))(shares)
        residuals = jax.vmap(lambda share, us: field(t + share * dt, us))(shares, states)
        return jnp.abs(dt) ** k * root_mean_square(residuals / scales.tolerance(states[1, 0])[None])

    errors = map_rows(error, (x[:-1], x[1:], mesh.t[:-1], mesh.lengths), mesh.number)
    real = jnp.arange(lengths.size) < mesh.number
    amount = jnp.where(real & jnp.isfinite(errors), errors, 0) ** (1 / _ORDER)
    span = jnp.sum(jnp.where(real, lengths, 0))
    least = jnp.maximum(_LEAST * jnp.sum(amount), jnp.finfo(x.dtype).tiny ** 0.25) / span
    density = jnp.where(real, jnp.maximum(amount / lengths, least), 0)
    for _ in range(2):
        density = jnp.where(real, jnp.maximum(density, largest_nearby(density) / _RATIO), 0)
    return density


def _moved(mesh, course, density, number):
    """The mesh of so many intervals with the same integral of a density, and the course on it."""
    x, amount = course.states, density * jnp.abs(mesh.lengths)
    filled = jnp.concatenate([jnp.zeros(1, x.dtype), jnp.cumsum(amount)])
    nodes = jnp.arange(mesh.t.size)
    wanted = filled[mesh.number] * jnp.minimum(nodes.astype(x.dtype) / number.astype(x.dtype), 1)
    i = jnp.searchsorted(filled, wanted, side="right").astype(number.dtype) - 1
    i = jnp.clip(i, 0, mesh.number - 1)
    share = jnp.clip((wanted - filled[i]) / amount[i], 0, 1)
    is_last, last = nodes >= number, mesh.number
    t = jnp.where(is_last, mesh.t[last], mesh.t[i] + share * mesh.lengths[i])
    at = x[i], x[i + 1], mesh.lengths[i], share
    states = map_rows(lambda x: inside(x[0], x[1], x[2], x[3]), at, number + 1)
    states = jnp.where(is_last[:, None, None], x[last], states).at[0].set(x[0])
    return Mesh(t, number), Course(states, course.parameters)
