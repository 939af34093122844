"""The Markov chain of states that a solve has kept: smoothing, dense output, joint samples.

Each row holds a state given the data up to its time, and the distribution of the previous row's coordinates given its
own. One pass backwards over the rows marginalises these conditionals, which gives the smoothed posterior, or draws from
them, which gives a joint sample. The state between two rows is that of the prior, given both of them; in a filter given
the earlier one alone.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..algebra.conditioning import predict
from ..algebra.coordinates import Conditional, coordinates_of, draw, from_coordinates, marginalise, standard
from ..algebra.factorisations import Layout
from ..algebra.linalg import choose
from ..algebra.normal import Normal, certain, deviation, pad, push
from ..algebra.turning import TurnedConditional, in_layout
from ..priors.prior import AbstractPrior, AbstractPriorFamily
from ..stepping.kept import Row
from ..stepping.times import Interval
from ..util.tracing import computed_again
from ..util.xla import compiles_small_loops


# A backward scan skips blocks of this many rows if the solve has reached none of them: otherwise every solve would take
# the time of ``max_steps`` rows.
_BLOCK = 64
# How many times are evaluated together where XLA does not compile small loops into native functions.
_GROUP = 4


class AbstractPath(eqx.Module):
    """The posterior process over an interval of time: what ``Solution.evaluate`` and ``Solution.sample`` need."""

    @property
    @abstractmethod
    def is_dense(self) -> bool:
        """Whether it is known at all times of the interval, and not only at those that were saved."""

    @property
    @abstractmethod
    def is_smoothed(self) -> bool:
        """Whether the distribution at each time is given the whole solve."""

    @property
    @abstractmethod
    def interval(self) -> Interval:
        """From the first time to the last that was reached."""

    @abstractmethod
    def evaluate(self, ts: Float[Array, " times"]) -> tuple[Normal, Float[Array, "times *batch"], Layout | None]:
        """The posterior at any times of the interval, with square factors, and the output scales there.

        Also the layouts of these states, if they differ from time to time.
        """

    @abstractmethod
    def sample(
        self, key: PRNGKeyArray, ts: Float[Array, " times"]
    ) -> tuple[Float[Array, "times *batch dim cols"], Layout]:
        """One joint sample of the states at any times, in the order of ``ts``, and how they are stored."""


class Trajectory(AbstractPath):
    """The posterior process at the times that a solve has kept, from ``t0`` to the last one reached, as a Markov chain.

    - ``rows``: the kept states, with a leading axis ``rows``.
    - ``reached``: which rows the solve has reached; the others repeat the last of these.
    - ``smoothed``: the distributions of the rows' coordinates given the whole solve; ``None`` for a filter.
    - ``prior``: the prior between rows, or the family of which ``rows.prior`` has the members.
    - ``layout``: how states are stored.
    - ``dense``: whether the rows are the ends of all steps; otherwise only of the steps that hold saved times.
    """

    rows: Row
    reached: Bool[Array, " rows"]
    smoothed: Normal | None
    prior: AbstractPrior | AbstractPriorFamily
    layout: Layout
    dense: bool = eqx.field(static=True)

    def marginal(self, i: int | Array) -> Normal:
        """The posterior at the ``i``-th row, smoothed if the strategy is a smoother, with a square factor."""
        return _posterior(_row(self.rows.distribution, i), _row(self.smoothed, i))

    def prior_of(self, i: int | Array) -> AbstractPrior:
        """The prior of the step that ends at the ``i``-th row."""
        # A family has a member in every row.
        return self.prior if self.rows.prior is None else _row(self.rows.prior, i)  # type: ignore[return-value]

    def layout_of(self, i: int | Array) -> Layout:
        """How the state of the ``i``-th row is stored."""
        return self.layout if self.rows.layout is None else _row(self.rows.layout, i)

    @property
    def is_dense(self) -> bool:
        return self.dense

    @property
    def is_smoothed(self) -> bool:
        return self.smoothed is not None

    @property
    def interval(self) -> Interval:
        return Interval(self.rows.t[0], self.rows.t[-1])

    def evaluate(self, ts: Float[Array, " times"]) -> tuple[Normal, Float[Array, "times *batch"], Layout | None]:
        if jax.default_backend() != "cpu":
            return jax.vmap(lambda t: _evaluate(self, t))(ts)
        # A native loop is fastest one by one. Otherwise the operations of each iteration cost more than their
        # arithmetic, and all times at once would not stay in the cache.
        group = None if compiles_small_loops() else _GROUP
        return lax.map(lambda t: _evaluate(self, t), ts, batch_size=group)

    def sample(
        self, key: PRNGKeyArray, ts: Float[Array, " times"]
    ) -> tuple[Float[Array, "times *batch dim cols"], Layout]:
        return _sample_at(self, key, ts)

    @property
    def last(self) -> Array:
        """The index of the last row that the solve has reached; the rows behind it are copies."""
        return jnp.sum(self.reached) - 1


def trajectory(
    rows: Row, reached: Bool[Array, " rows"], prior: AbstractPrior | AbstractPriorFamily, layout: Layout, *, dense: bool
) -> Trajectory:
    """The trajectory of the kept rows, smoothed if they have the conditionals of a smoother (``Row.past``)."""
    smoothed = None
    if rows.past is not None:
        last = standard(_row(rows.distribution, -1))
        smoothed = backwards(_marginalise, last, rows.past, reached)
    return Trajectory(rows, reached, smoothed, prior, layout, dense)


def _marginalise(past, later):
    if isinstance(past, TurnedConditional):
        later, past = past.distribution_before(later), past.past
    return marginalise(later, past)


def _draw(past, noise, later):
    if isinstance(past, TurnedConditional):
        later, past = past.coordinates_before(later), past.past
    return draw(past, noise, later)


def rows_of_steps(rows: Row, reached: Bool[Array, " rows"], number: int) -> Array:
    """The indices of the rows at the ends of steps, ``(number,)``; those after the last step repeat it.

    At a jump of the equation there are two rows, the state before and the one restarted behind it: the second counts.
    """
    if rows.restarted is None:
        return jnp.minimum(np.arange(1, number + 1), reached.size - 1)
    replaced = jnp.append(rows.restarted[1:], False)
    ends = (reached & ~replaced)[1:]
    return 1 + jnp.nonzero(ends, size=number, fill_value=jnp.sum(reached) - 2)[0]


def rescale(rows: Row, factor: Float[Array, "*batch"]) -> Row:
    """The kept states with the same means, and covariances multiplied by ``factor^2``."""
    column = factor[None, ..., None, None]
    past = None if rows.past is None else rows.past.rescaled(column)
    distribution = Normal(rows.distribution.mean, rows.distribution.factor * column)
    return dataclasses.replace(
        rows, distribution=distribution, output_scale=rows.output_scale * factor[None], past=past
    )


def _evaluate(path, t):
    i, at_left, at_right = _locate(path, t)
    rows = path.rows
    kept = rows.t, rows.distribution, path.smoothed, rows.output_scale, rows.layout, rows.prior
    kept = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i, 2), kept)
    t_left, x_left, known_left, scale_left, layout_left, _ = _row(kept, 0)
    t_right, x_right, known_right, scale_right, layout_right, prior = _row(kept, 1)
    left, right = _posterior(x_left, known_left), _posterior(x_right, known_right)
    prior = path.prior if prior is None else prior
    here, predicted, past = between(path.layout, prior, scale_right, x_left, t - t_left, t_right - t)
    if path.smoothed is not None:
        # The step was taken in the layout of its left end.
        later = right if layout_left is None else in_layout(right, layout_right, layout_left)
        here = from_coordinates(marginalise(coordinates_of(later, predicted), past), here)
    # At the ends of the step ``here`` must not be used. The transition over a length of zero is the identity, and its
    # derivative makes that of the result with respect to ``t`` right.
    ends = (left, t_left, scale_left, layout_left), (right, t_right, scale_right, layout_right)
    end, t_end, scale, layout_end = choose(at_left, *ends)
    there = push(end, prior.transition(t - t_end, path.layout).matrix)
    state, layout = choose(at_left | at_right, (there, layout_end), (here, layout_left))
    return state, scale, layout


def sample_rows(path: Trajectory, key: PRNGKeyArray) -> Float[Array, "rows *batch dim cols"]:
    """One joint sample of the states in all rows; of a filter, independent samples of its marginals."""
    mean, factor, past = path.rows.distribution.mean, path.rows.distribution.factor, path.rows.past

    def noise(key, root):
        return jax.random.normal(key, (*root.shape[:-1], mean.shape[-1]), mean.dtype)

    if path.smoothed is None:
        coordinates = noise(key, factor)
    else:
        # Each row holds the conditional of the row before it; the last one is drawn from its marginal.
        assert past is not None
        xs = past, noise(key, past.noise)
        last = noise(jax.random.fold_in(key, 1), factor[-1])
        coordinates = backwards(lambda x, w: _draw(x[0], x[1], w), last, xs, path.reached)
    return mean + jax.vmap(deviation)(factor, coordinates)


def _sample_at(path, key, ts):
    """One joint sample of the states at any times inside the kept steps of a smoother, in the order of ``ts``.

    Also how they are stored, with an axis of times if that differs from step to step.
    """
    rows_key, key = jax.random.split(key)
    rows = sample_rows(path, rows_key)
    order = jnp.argsort(path.interval.signed(ts))

    def body(later, x):
        # From the last time to the first. Given the left end of its step and the sample at the next time of this step
        # (or its right end) a state is independent of everything else.
        t, key = x
        i, at_left, at_right = _locate(path, t)
        t_later, i_later, x_later = later
        same = i == i_later
        t_right = jnp.where(same, t_later, path.rows.t[i + 1])
        end = rows[i + 1]
        if path.rows.layout is not None:
            end = in_layout(certain(end), path.layout_of(i + 1), path.layout_of(i)).mean
        x_right = jnp.where(same, x_later, end)
        again = t == t_right
        prior, scale, left = path.prior_of(i + 1), path.rows.output_scale[i + 1], certain(rows[i])
        here, predicted, past = between(path.layout, prior, scale, left, t - path.rows.t[i], t_right - t)
        noise = jax.random.normal(key, (*past.noise.shape[:-1], here.mean.shape[-1]), here.mean.dtype)
        known = coordinates_of(certain(x_right), predicted)
        x = here.mean + deviation(here.factor, draw(past, noise, known.mean))
        x = jnp.where(again, x_right, jnp.where(at_left, rows[i], jnp.where(at_right, end, x)))
        return (t, i, x), (x, None if path.rows.layout is None else path.layout_of(i))

    start = (path.rows.t[-1], jnp.full_like(order[0], -1), rows[-1])
    _, (xs, layouts) = lax.scan(body, start, (ts[order], jax.random.split(key, ts.size)), reverse=True)
    xs, layouts = jax.tree.map(lambda x: jnp.zeros_like(x).at[order].set(x), (xs, layouts))
    return xs, path.layout if layouts is None else layouts


def _locate(path, t):
    """The index of the row that begins the step which holds ``t``, and whether ``t`` is its left, its right end."""
    signed = path.interval.signed
    i = jnp.searchsorted(signed(path.rows.t), signed(t), side="right") - 1
    i = jnp.clip(i.astype(path.last.dtype), 0, jnp.maximum(path.last - 1, 0))
    return i, t == path.rows.t[i], t == path.rows.t[i + 1]


def between(
    layout: Layout, prior: AbstractPrior, scale: Array, left: Normal, before: Array, after: Array
) -> tuple[Normal, Normal, Conditional]:
    """The prediction from ``left`` over a time ``before``, the one over a further ``after``, and the conditional of
    the first given the second.

    A length of one replaces a length of zero, whose noise is singular: the result is finite, but must not be used.
    """

    def step(x, dt, past):
        transition = prior.transition(jnp.where(dt == 0, 1, dt), layout)
        return predict(push(x, transition.matrix), transition.noise, scale * transition.magnitude, past)

    here, _ = step(left, before, None)
    predicted, past = step(here, after, Conditional.identity(here))
    return here, predicted, past


def _posterior(x, known):
    """The posterior of a row's state, with a square factor.

    ``x``: given the data up to its time. ``known``: its coordinates given the whole solve; ``None`` for a filter.
    """
    state = x if known is None else from_coordinates(known, x)
    return pad(state, state.mean.shape[-2])


def backwards(fn: Callable, last: PyTree, xs: PyTree, reached: Bool[Array, " rows"]) -> PyTree:
    """The results of a recursion from the last row that was reached to the first, stacked along an axis ``rows``.

    ``carry[i] = last`` from the last row reached on; before it ``carry[i - 1] = fn(xs[i], carry[i])``.
    """
    rows = reached.shape[0]
    number = -(-rows // _BLOCK)
    block = rows if number == 1 else _BLOCK

    # For a derivative every row is computed again: what it needs in between would be kept for all rows that may be.
    @computed_again
    def one(later, x):
        x, real = x
        return choose(real, fn(x, later), later), later

    @computed_again
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
    """The flags with further axes of length one, so that they broadcast against ``like``."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))


def _row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)
