"""The chain of states that a solve has kept: smoothing, dense output, samples.

Every kept state knows its coordinates given those of the next one; one pass backwards turns them into the posterior
given everything, or into a joint sample. Between two kept states the prior tells the rest.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..algebra.conditioning import predict
from ..algebra.coordinates import Conditional, coordinates_of, look_back, realise, standard
from ..algebra.factorisations import Layout
from ..algebra.linalg import choose, product
from ..algebra.normal import Normal, batched, certain, pad, push, spread
from ..priors.prior import AbstractPrior, AbstractPriorFamily
from ..stepping.kept import Row
from ..stepping.times import direction_of
from ..util.xla import compiles_small_loops


# Rows in which nothing is kept are passed over in blocks of this many.
_BLOCK = 64
# So many times are evaluated together where loops are not native.
_GROUP = 4


class Trajectory(eqx.Module):
    """Kept states in the order of time, from ``t0`` to the last time reached.

    ``reached``: which rows are real. ``smoothed``: the states given all data, in the coordinates of ``rows``; ``None``
    for a filter. ``dense``: whether the rows are all steps, or the ends of those that hold the times asked for.
    """

    rows: Row
    reached: Bool[Array, " rows"]
    smoothed: Normal | None
    prior: AbstractPrior | AbstractPriorFamily
    layout: Layout
    dense: bool = eqx.field(static=True)

    def marginal(self, i: int | Array) -> Normal:
        """The posterior at the ``i``-th row, with a square factor."""
        return _posterior(_row(self.rows.distribution, i), _row(self.smoothed, i))

    def prior_of(self, i: int | Array) -> AbstractPrior:
        """The prior of the step that ends at the ``i``-th row."""
        return self.prior if self.rows.prior is None else _row(self.rows.prior, i)

    @property
    def last(self) -> Array:
        """The number of the last row that is real."""
        return jnp.sum(self.reached) - 1


def trajectory(
    rows: Row, reached: Bool[Array, " rows"], prior: AbstractPrior | AbstractPriorFamily, layout: Layout, *, dense: bool
) -> Trajectory:
    """The trajectory of the kept rows, smoothed if they remember their past."""
    smoothed = None
    if rows.past is not None:
        last = standard(_row(rows.distribution, -1))
        smoothed = backwards(lambda past, later: look_back(later, past), last, rows.past, reached)
    return Trajectory(rows, reached, smoothed, prior, layout, dense)


def rows_of_steps(rows: Row, reached: Bool[Array, " rows"], number: int) -> Array:
    """The numbers of the rows with which steps end, ``number`` of them, the last one repeated.

    Where a state has started anew behind a jump there are two rows: the second one.
    """
    if rows.anew is None:
        return jnp.arange(1, number + 1)
    replaced = jnp.append(rows.anew[1:], False)
    ends = (reached & ~replaced)[1:]
    return 1 + jnp.nonzero(ends, size=number, fill_value=jnp.sum(reached) - 2)[0]


def rescale(rows: Row, factor: Float[Array, "*batch"]) -> Row:
    """All covariances times ``factor^2``, means untouched."""
    column = factor[..., None, None]
    past = rows.past
    if past is not None:
        # Coordinates are measured in standard deviations.
        past = eqx.tree_at(lambda p: p.shift, past, past.shift / jnp.where(column > 0, column, 1))
    distribution = Normal(rows.distribution.mean, rows.distribution.factor * column)
    return Row(rows.t, distribution, rows.output_scale * factor, past, rows.influence, rows.prior, rows.anew)


def evaluate(path: Trajectory, ts: Float[Array, " times"]) -> tuple[Normal, Float[Array, "times *batch"]]:
    """The posterior at any times inside the steps that were kept, with square factors, and the output scales there."""
    if jax.default_backend() != "cpu":
        return jax.vmap(lambda t: _evaluate(path, t))(ts)
    # One by one in a native loop; otherwise in groups that stay in the cache.
    return lax.map(lambda t: _evaluate(path, t), ts, batch_size=None if compiles_small_loops() else _GROUP)


def _evaluate(path, t):
    i, at_left, at_right = _locate(path, t)
    ends = path.rows.t, path.rows.distribution, path.smoothed, path.rows.output_scale, path.rows.prior
    ends = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i, 2), ends)
    (t_left, x_left, known_left, scale_left, _), (t_right, x_right, known_right, scale_right, prior) = (
        _row(ends, end) for end in (0, 1)
    )
    left, right = _posterior(x_left, known_left), _posterior(x_right, known_right)
    prior = path.prior if prior is None else prior
    here, predicted, past = _between(path.layout, prior, scale_right, x_left, t - t_left, t_right - t)
    if path.smoothed is not None:
        here = realise(look_back(coordinates_of(right, predicted), past), here)
    # At an end: a step of no length, which still has a derivative.
    end, t_end, scale = choose(at_left, (left, t_left, scale_left), (right, t_right, scale_right))
    there = push(end, prior.transition(t - t_end, path.layout).matrix)
    return choose(at_left | at_right, there, here), scale


def sample_rows(path: Trajectory, key: PRNGKeyArray) -> Float[Array, "rows *batch dim cols"]:
    """One joint sample of the states in all rows."""
    mean, factor, past = path.rows.distribution.mean, path.rows.distribution.factor, path.rows.past

    def noise(key, root):
        return jax.random.normal(key, (*root.shape[:-1], mean.shape[-1]), mean.dtype)

    if path.smoothed is None:
        coordinates = noise(key, factor)
    else:
        # What is drawn for a row turns the row before it into a sample; the last row needs a draw of its own.
        xs = past, noise(key, past.own)
        last = noise(jax.random.fold_in(key, 1), factor[-1])
        coordinates = backwards(lambda x, w: draw(*x, w), last, xs, path.reached)
    return mean + jax.vmap(spread)(factor, coordinates)


def sample_at(path: Trajectory, key: PRNGKeyArray, ts: Float[Array, " times"]) -> Float[Array, "times *batch dim cols"]:
    """One joint sample of the states at any times inside the steps kept of a smoothed trajectory."""
    rows_key, key = jax.random.split(key)
    rows = sample_rows(path, rows_key)
    direction = direction_of(path.rows.t[0], path.rows.t[-1])
    order = jnp.argsort(ts * direction)

    def body(later, x):
        # From the last time to the first: each given the left end of its step and the next one, or the right end.
        t, key = x
        i, at_left, at_right = _locate(path, t)
        t_later, i_later, x_later = later
        same = i == i_later
        t_right = jnp.where(same, t_later, path.rows.t[i + 1])
        x_right = jnp.where(same, x_later, rows[i + 1])
        again = t == t_right
        prior, scale, left = path.prior_of(i + 1), path.rows.output_scale[i + 1], certain(rows[i])
        here, predicted, past = _between(path.layout, prior, scale, left, t - path.rows.t[i], t_right - t)
        noise = jax.random.normal(key, (*past.own.shape[:-1], here.mean.shape[-1]), here.mean.dtype)
        known = coordinates_of(certain(x_right), predicted)
        x = here.mean + spread(here.factor, draw(past, noise, known.mean))
        x = jnp.where(again, x_right, jnp.where(at_left, rows[i], jnp.where(at_right, rows[i + 1], x)))
        return (t, i, x), x

    start = (path.rows.t[-1], jnp.full_like(order[0], -1), rows[-1])
    _, xs = lax.scan(body, start, (ts[order], jax.random.split(key, ts.size)), reverse=True)
    return jnp.zeros_like(xs).at[order].set(xs)


def _locate(path, t):
    """The step that holds ``t``, and whether ``t`` is its left or its right end."""
    direction = direction_of(path.rows.t[0], path.rows.t[-1])
    i = jnp.searchsorted(path.rows.t * direction, t * direction, side="right") - 1
    i = jnp.clip(i, 0, jnp.maximum(path.last - 1, 0))
    return i, t == path.rows.t[i], t == path.rows.t[i + 1]


def _between(layout, prior, scale, left, before, after):
    """The state a time ``before`` later than ``left``, that a time ``after`` later still, and the first given the
    second. Meaningless, but finite, where one of the two is zero."""

    def step(x, dt, past):
        transition = prior.transition(jnp.where(dt == 0, 1, dt), layout)
        return predict(push(x, transition.matrix), transition.noise, scale * transition.magnitude, past)

    here, _ = step(left, before, None)
    predicted, past = step(here, after, Conditional.identity(here))
    return here, predicted, past


def _posterior(x, known):
    """A state given all data, with a square factor: ``known`` are its coordinates then, or ``None`` for a filter."""
    state = x if known is None else realise(known, x)
    return pad(state, state.mean.shape[-2])


@batched
def draw(past: Conditional, noise: Float[Array, "q cols"], later: Float[Array, "rows cols"]) -> Float[Array, "p cols"]:
    """A sample of an earlier state's coordinates, given a later one's, from standard normal noise."""
    return past.shift + product(past.cross.T, later) + product(past.own.T, noise)


def backwards(fn: Callable, last: PyTree, xs: PyTree, reached: Bool[Array, " rows"]) -> PyTree:
    """A scan from the last row reached to the first: ``carry[last] = last`` and ``carry[i - 1] = fn(xs[i], carry[i])``.

    Returns the carries, stacked.
    """
    rows = reached.shape[0]
    number = -(-rows // _BLOCK)
    block = rows if number == 1 else _BLOCK

    def one(later, x):
        x, real = x
        return jax.tree.map(lambda a, b: jnp.where(real, a, b), fn(x, later), later), later

    def whole(later, x):
        return lax.scan(one, later, x, reverse=True)

    def nothing(later, x):
        return later, jax.tree.map(lambda a: jnp.broadcast_to(a, (block, *a.shape)), later)

    def blocks(x):
        x = jnp.pad(x, [(0, number * block - rows)] + [(0, 0)] * (x.ndim - 1))
        return jnp.reshape(x, (number, block, *x.shape[1:]))

    blocks_of_xs = jax.tree.map(blocks, (xs, reached))
    _, outs = lax.scan(lambda c, x: lax.cond(jnp.any(x[1]), whole, nothing, c, x), last, blocks_of_xs, reverse=True)
    return jax.tree.map(lambda out: jnp.reshape(out, (number * block, *out.shape[2:]))[:rows], outs)


def column(flags: Bool[Array, " rows"], like: Array) -> Array:
    """Flags of rows, to choose among rows of any shape."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))


def _row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)
