"""Jacobians of an equation with respect to the state: exact, given by the user, or estimated.

They are computed from products with vectors (forward mode), and only as far as the factorisation uses them: the full
matrix or its diagonal. Known sparsity patterns: Curtis, Powell & Reid (1974), "On the estimation of sparse Jacobian
matrices". Estimates of a diagonal: Bekas, Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix", after
Hutchinson (1989).

Axes: ``m`` equations, ``k`` derivatives of ``u`` that they contain, ``d`` components.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..algebra.factorisations import Layout
from ..util.checks import as_integer


# Beyond this many components a diagonal is computed from groups of so many columns: the whole matrix would take memory
# quadratic in the number of components.
_GROUP = 64


class AbstractJacobian(eqx.Module):
    """A method to compute the Jacobian of an equation with respect to ``u`` and its derivatives.

    A subclass defines ``evaluate``.

    >>> import probode
    >>> field = lambda t, u, args: -t * u**2
    >>> probode.testing.check_jacobian(probode.BandedJacobian(0, 0), field, [1.0, 2.0])  # or a subclass of your own
    """

    @abstractmethod
    def evaluate(
        self, fn: Callable, t: Float[Array, ""], us: Float[Array, "k d"], layout: Layout, args: PyTree
    ) -> tuple[Float[Array, " m"], Float[Array, "k *jacobian"]]:
        """The value ``fn(t, us)``, ``(m,)``, and its Jacobian with respect to each row of ``us``, ``(k, m, d)``.

        ``fn``: the equation as a function of flat arrays. Where ``layout.factorisation.keeps_diagonal``, the Jacobian
        may be its diagonals alone, ``(k, d)``. ``args``: those of the equation, for methods that call the user.
        """


class ExactJacobian(AbstractJacobian):
    """The exact Jacobian by forward-mode differentiation, all columns in one batched pass; the default.

    It costs ``d`` products with vectors, also where the factorisation uses only the diagonal; then memory is linear in
    ``d``. For large problems pass the sparsity pattern (``BandedJacobian``, ``SparseJacobian``) or estimate the
    diagonal (``HutchinsonDiagonal``).

    >>> import probode
    >>> probode.ODE(lambda t, u, args: -u).jacobian
    ExactJacobian()
    """

    def evaluate(
        self, fn: Callable, t: Float[Array, ""], us: Float[Array, "k d"], layout: Layout, args: PyTree
    ) -> tuple[Float[Array, " m"], Float[Array, "k *jacobian"]]:
        if layout.factorisation.keeps_diagonal and us.shape[1] > _GROUP:
            value = fn(t, us)
            if value.shape == us.shape[1:]:
                return value, _diagonal_in_groups(fn, t, us)

        def twice(us):
            value = fn(t, us)
            return value, value

        jacobian, value = jax.jacfwd(twice, has_aux=True)(us)
        return value, jnp.swapaxes(jacobian, 0, 1)


class GivenJacobian(AbstractJacobian):
    """A Jacobian from a function of the user, called like the equation itself: ``jacobian(t, u, args)``.

    For equations whose Jacobian is cheaper to write than to differentiate. ``ODE(f, jacobian=fn)`` makes one.

    - ``jacobian``: returns an ``(m, d)`` array over the ravelled ``u``, or the PyTree that ``jax.jacobian`` of the
      equation with respect to ``u`` would return; a ``(d,)`` array is a diagonal. Where the equation contains ``k > 1``
      states, as ``f(t, u, du, args)`` does, it returns a tuple of ``k`` Jacobians, one for each state.

    Raises ``TypeError`` if it cannot be called, ``ValueError`` at the first use if the shapes do not fit. The values
    are not checked: a wrong Jacobian costs accuracy and stability.

    >>> import jax.numpy as jnp, probode
    >>> ode = probode.ODE(lambda t, u, args: -(u**2), jacobian=lambda t, u, args: jnp.diag(-2 * u))
    >>> type(ode.jacobian).__name__
    'GivenJacobian'
    """

    jacobian: Callable = eqx.field(converter=lambda value: _as_function(value))

    def evaluate(
        self, fn: Callable, t: Float[Array, ""], us: Float[Array, "k d"], layout: Layout, args: PyTree
    ) -> tuple[Float[Array, " m"], Float[Array, "k *jacobian"]]:
        value, (k, d) = fn(t, us), us.shape
        given = self.jacobian(t, *(layout.unravel(u) for u in us), args)
        given = (given,) if k == 1 else given
        if not isinstance(given, tuple) or len(given) != k:
            raise ValueError(f"The Jacobian of an equation with {k} states must be a tuple of {k} Jacobians.")
        example = jax.tree.leaves(layout.unravel(jnp.zeros(d, layout.dtype)))
        blocks = [_as_matrix(block, value.size, d, [leaf.size for leaf in example], layout) for block in given]
        if not (layout.factorisation.keeps_diagonal and all(block.ndim == 1 for block in blocks)):
            blocks = [jnp.diag(block) if block.ndim == 1 else block for block in blocks]
        return value, jnp.stack(blocks)


class BandedJacobian(AbstractJacobian):
    """The Jacobian of an equation whose ``i``-th entry depends on the components ``i - lower, ..., i + upper`` alone.

    Components are those of the ravelled ``u``. It is exact from ``lower + upper + 1`` products with vectors instead of
    ``d``, as for differential operators on a grid. Dependencies outside the band, also periodic ones, are missing from
    it without notice.

    - ``lower``, ``upper``: how many diagonals below and above the main one may differ from zero.

    Raises ``ValueError`` unless they are integers from zero on; at the first use unless there are ``d`` equations.

    >>> import jax.numpy as jnp, probode
    >>> def heat(t, u, args):
    ...     return jnp.diff(u, n=2, prepend=0.0, append=0.0)
    >>> ode = probode.ODE(heat, jacobian=probode.BandedJacobian(1, 1))
    """

    lower: int = eqx.field(static=True, converter=lambda n: as_integer(n, "BandedJacobian(lower)", 0))
    upper: int = eqx.field(static=True, converter=lambda n: as_integer(n, "BandedJacobian(upper)", 0))

    def evaluate(
        self, fn: Callable, t: Float[Array, ""], us: Float[Array, "k d"], layout: Layout, args: PyTree
    ) -> tuple[Float[Array, " m"], Float[Array, "k *jacobian"]]:
        d, width = us.shape[1], self.lower + self.upper + 1
        offsets = np.arange(-self.lower, self.upper + 1)
        rows, columns = (x.ravel() for x in np.broadcast_arrays(np.arange(d)[:, None], np.arange(d)[:, None] + offsets))
        inside = (columns >= 0) & (columns < d)
        pattern = _Pattern(rows[inside], columns[inside], np.arange(d) % width, width)
        return _by_pattern(fn, t, us, layout, pattern, self)


class SparseJacobian(AbstractJacobian):
    """The Jacobian of an equation with a known sparsity pattern, exact from few products with vectors.

    Columns without a common row share a product, so that their number is that of the groups, not ``d``. The groups are
    found greedily, on the host, when the object is made. Entries outside the pattern are missing without notice.

    - ``rows``, ``columns``: where the Jacobian, with respect to any of the states in the equation, may differ from
      zero; integer arrays of one length with indices from zero on, into the equations and the ravelled ``u``.
    - ``colours``: the group of each column. ``number``: how many groups there are. Both are computed.

    Raises ``ValueError`` unless the indices are such arrays; at the first use for a column beyond the last component,
    or unless there are ``d`` equations.

    >>> import jax.numpy as jnp, probode
    >>> sparse = probode.SparseJacobian([0, 1, 1, 2, 2], [0, 0, 1, 1, 2])  # (row, column) of what may differ from zero
    >>> ode = probode.ODE(lambda t, u, args: -u.at[1:].add(u[:-1]), jacobian=sparse)
    """

    rows: Int[Array, " entries"]
    columns: Int[Array, " entries"]
    colours: Int[Array, " d"]
    number: int = eqx.field(static=True)

    def __init__(self, rows: Any, columns: Any):
        rows, columns = np.asarray(rows), np.asarray(columns)
        integer = np.issubdtype(rows.dtype, np.integer) and np.issubdtype(columns.dtype, np.integer)
        if rows.ndim != 1 or rows.shape != columns.shape or rows.size == 0 or not integer:
            raise ValueError("SparseJacobian(rows, columns) must be two integer arrays of the same shape (entries,).")
        if min(rows.min(), columns.min()) < 0:
            raise ValueError("SparseJacobian(rows, columns) must hold indices from 0 on.")
        colours = _colours(rows, columns)
        self.rows, self.columns, self.colours = jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(colours)
        self.number = int(colours.max()) + 1

    def evaluate(
        self, fn: Callable, t: Float[Array, ""], us: Float[Array, "k d"], layout: Layout, args: PyTree
    ) -> tuple[Float[Array, " m"], Float[Array, "k *jacobian"]]:
        d = us.shape[1]
        if self.colours.size > d:
            raise ValueError(f"SparseJacobian(columns) goes up to {self.colours.size - 1}, but u has {d} components.")
        colours = jnp.pad(self.colours, (0, d - self.colours.size), constant_values=-1)
        return _by_pattern(fn, t, us, layout, _Pattern(self.rows, self.columns, colours, self.number), self)


class HutchinsonDiagonal(AbstractJacobian):
    """An unbiased estimate of the Jacobian's diagonal, from products with ``num_probes`` vectors of random signs.

    For ``BlockDiagonal()`` and ``Isotropic()`` where ``d`` is so large that ``d`` products are too many. The standard
    deviation of an entry is the norm of the other entries in its row over ``sqrt(num_probes)``; the posterior does not
    account for it. (Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix".)

    - ``key``: a random key. Every time ``t`` has its own signs, which ``key`` and ``t`` determine.
    - ``num_probes``: the number of products.

    Raises ``ValueError`` unless ``num_probes`` is a positive integer; at the first use under a factorisation that uses
    more than the diagonal, or unless there are ``d`` equations.

    >>> import probode
    >>> import jax
    >>> estimate = probode.HutchinsonDiagonal(jax.random.key(0), num_probes=4)
    >>> ode = probode.ODE(lambda t, u, args: -u, jacobian=estimate)
    """

    key: PRNGKeyArray
    num_probes: int = eqx.field(
        static=True, default=10, converter=lambda n: as_integer(n, "HutchinsonDiagonal(num_probes)", 1)
    )

    def evaluate(
        self, fn: Callable, t: Float[Array, ""], us: Float[Array, "k d"], layout: Layout, args: PyTree
    ) -> tuple[Float[Array, " m"], Float[Array, "k *jacobian"]]:
        if not layout.factorisation.keeps_diagonal:
            raise ValueError(
                f"HutchinsonDiagonal estimates diagonals, but {type(layout.factorisation).__name__}() keeps more of a "
                "Jacobian: use BlockDiagonal() or Isotropic(), or another Jacobian."
            )
        key = self.key
        for bits in jnp.ravel(lax.bitcast_convert_type(lax.stop_gradient(t), jnp.uint32)):
            key = jax.random.fold_in(key, bits)
        signs = jax.random.rademacher(key, (self.num_probes, us.shape[1]), us.dtype)
        products, value = _products(fn, t, us, signs)
        _require_square(value, us, self)
        return value, jnp.mean(products * signs[None], axis=1)


def as_jacobian(value: Any) -> AbstractJacobian:
    """An ``AbstractJacobian`` from what users pass as ``jacobian``, that or a function; ``TypeError`` otherwise."""
    if isinstance(value, AbstractJacobian):
        return value
    if isinstance(value, type) and issubclass(value, AbstractJacobian):
        raise TypeError(f"jacobian must be an instance, such as {value.__name__}(), got the class.")
    return GivenJacobian(value)


def _as_function(value: Any) -> Callable:
    if not callable(value):
        raise TypeError(f"A Jacobian must be callable as jacobian(t, u, args), got {value!r}.")
    return value


class _Pattern(NamedTuple):
    """A sparsity pattern, and a colour for every column such that columns of one colour have no row in common."""

    rows: Any
    columns: Any
    colours: Any
    number: int


def _by_pattern(fn, t, us, layout, pattern, jacobian):
    seeds = (jnp.asarray(pattern.colours)[None] == jnp.arange(pattern.number)[:, None]).astype(us.dtype)
    products, value = _products(fn, t, us, seeds)
    _require_square(value, us, jacobian)
    d = us.shape[1]
    if layout.factorisation.keeps_diagonal:
        present = jnp.zeros(d, bool).at[pattern.rows].max(pattern.rows == pattern.columns)
        diagonal = jnp.take_along_axis(products, jnp.asarray(pattern.colours)[None, None], axis=1)[:, 0]
        return value, jnp.where(present, diagonal, 0)
    entries = products[:, jnp.asarray(pattern.colours)[pattern.columns], pattern.rows]
    return value, jnp.zeros((us.shape[0], d, d), us.dtype).at[:, pattern.rows, pattern.columns].set(entries)


def _products(fn, t, us, vectors):
    """Products of the Jacobian for each of the ``k`` states with the vectors, ``(k, vectors, m)``, and the value."""
    eye = jnp.eye(us.shape[0], dtype=us.dtype)
    evaluate = lambda us: fn(t, us)  # noqa: E731
    push = lambda j, v: jax.jvp(evaluate, (us,), (eye[j][:, None] * v[None],))[1]  # noqa: E731
    products = jax.vmap(jax.vmap(push, in_axes=(None, 0)), in_axes=(0, None))(jnp.arange(us.shape[0]), vectors)
    return products, evaluate(us)


def _diagonal_in_groups(fn, t, us):
    k, d = us.shape

    def group(start):
        indices = start + jnp.arange(_GROUP)
        products, _ = _products(fn, t, us, jax.nn.one_hot(indices, d, dtype=us.dtype))
        return jnp.take_along_axis(products, jnp.minimum(indices, d - 1)[None, :, None], axis=2)[..., 0]

    groups = lax.map(group, jnp.arange(0, d, _GROUP))
    return jnp.moveaxis(groups, 0, 1).reshape(k, -1)[:, :d]


def _colours(rows, columns):
    """A colour for every column, greedily: the first that no column with a row in common has; -1 without entries."""
    by_row: dict[int, list[int]] = {}
    by_column: dict[int, list[int]] = {}
    for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
        by_row.setdefault(i, []).append(j)
        by_column.setdefault(j, []).append(i)
    colours = np.full(int(columns.max()) + 1, -1)
    for j, touched in by_column.items():
        taken = {colours[other] for i in touched for other in by_row[i]}
        colours[j] = next(colour for colour in range(len(taken) + 1) if colour not in taken)
    return colours


def _as_matrix(given, m, d, sizes, layout):
    """A Jacobian as an array ``(m, d)``, or its diagonal ``(d,)``, from any of the forms that users may return."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(given)]
    shapes = [leaf.shape for leaf in leaves]
    if shapes == [(m, d)] or (shapes == [(d,)] and m == d):
        return leaves[0].astype(layout.dtype)
    # The form of jax.jacobian: for every leaf of the output, one array for every leaf of the state.
    widths = sizes * (len(leaves) // len(sizes))
    fit = len(widths) == len(leaves) and all(x.size % n == 0 for x, n in zip(leaves, widths, strict=True))
    if not fit or sum(leaf.size for leaf in leaves) != m * d:
        raise ValueError(
            f"The Jacobian must be an ({m}, {d}) array over the ravelled state, a diagonal ({d},), or what "
            f"jax.jacobian returns; got arrays of shapes {shapes}."
        )
    blocks = [jnp.reshape(x, (-1, n)) for x, n in zip(leaves, widths, strict=True)]
    rows = [jnp.concatenate(blocks[i : i + len(sizes)], axis=1) for i in range(0, len(blocks), len(sizes))]
    return jnp.concatenate(rows).astype(layout.dtype)


def _require_square(value, us, jacobian):
    if value.shape != us.shape[1:]:
        raise ValueError(
            f"{type(jacobian).__name__} is for as many equations as components, but there are {value.size} equations "
            f"for {us.shape[1]} components. Use ExactJacobian() or a function."
        )
