"""A differential equation on a mesh as a system of equations for the states at its nodes.

At every node the equation and its first time derivatives hold, so that of the state ``(u, u', ..., u^(nu))`` only
``u, ..., u^(k-1)`` are free. Between two nodes the prior, an integrated Wiener process, predicts these from the state
before and all higher derivatives at both ends: the conditional mean is the two-point Hermite rule, by which they have
to agree, and its variance is the uncertainty of the interval. With the conditions at the ends there are as many
equations as unknowns, so that no output scale changes the mean. (Obreshkov 1940; the noise of a step given its highest
derivatives is that of ``algebra/derivatives.py``.)

Axes: ``nodes``, room for them, of which those up to ``number`` are in use; ``n = nu + 1`` derivatives of ``d``
components, ``dim = n d``; ``q = k d`` of them free at a node, ``m = (n - k) d`` given; ``P`` parameters; ``c``
conditions at the ends; ``N`` directions in which their values are uncertain.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..algebra.factorisations import Layout
from ..algebra.linalg import orthogonal, product, substitute
from ..equations.problems import Lifted, flat_residual
from ..priors.iwp import IWP
from ..priors.powers import powers
from .chain import Chain, Ends, Links, eliminated
from .rows import map_rows


class Mesh(eqx.Module):
    """The times of the nodes ``0 .. number``; the last is repeated behind them."""

    t: Float[Array, " nodes"]
    number: Int[Array, ""]

    @property
    def lengths(self) -> Float[Array, " intervals"]:
        """The signed lengths of the intervals; behind the last node that of the last interval."""
        dt = jnp.diff(self.t)
        return jnp.where(jnp.arange(dt.size) < self.number, dt, dt[self.number - 1])

    @property
    def is_node(self) -> Bool[Array, " nodes"]:
        """Which rows are nodes, and do not repeat the last one."""
        return jnp.arange(self.t.size) <= self.number


class Course(eqx.Module):
    """Values of all unknowns, or a change of them: the derivatives of ``u`` at every node, and the parameters."""

    states: Float[Array, "nodes n d"]
    parameters: Float[Array, " P"]


class Residuals(eqx.Module):
    """By how much the equations do not hold: at the nodes, in the intervals, and at the ends."""

    nodes: Float[Array, "nodes m"]
    intervals: Float[Array, "intervals q"]
    ends: Float[Array, " c"]


class Equations(eqx.Module):
    """The equations of a boundary value problem.

    - ``lifted``: the ODE and its first time derivatives.
    - ``boundary``: the ``Conditions`` at the ends.
    - ``with_parameters``: the arguments of the vector field, from the flat parameters.
    - ``layout``: how a state is stored.
    - ``sizes``: how large the components of ``u`` are: their noise is in proportion.
    """

    lifted: Lifted
    boundary: Any
    with_parameters: Callable
    layout: Layout
    sizes: Float[Array, " d"]

    @property
    def k(self) -> int:
        """The order of the ODE."""
        return self.lifted.ode.order

    @property
    def n(self) -> int:
        """How many derivatives a state has, the zeroth included."""
        return self.layout.num_derivatives + 1

    def residuals(self, mesh: Mesh, course: Course, *, differentiable: bool = False) -> Residuals:
        """The residuals of a course on a mesh."""
        x, p = course.states, course.parameters
        node = flat_residual(self.lifted, self.layout, self.with_parameters(p))
        at_nodes = map_rows(lambda x: node(*x), (mesh.t, x), mesh.number + 1, differentiable=differentiable)
        rule = self._rule()

        def interval(x):
            left, right, dt = x
            before, after = rule(dt)
            return before @ jnp.ravel(left) + after @ jnp.ravel(right)

        neighbours = x[:-1], x[1:], mesh.lengths
        intervals = map_rows(interval, neighbours, mesh.number, differentiable=differentiable)
        return Residuals(at_nodes, intervals, self._ends(x[0, : self.k], x[mesh.number, : self.k], p)[0])

    def linearised(self, mesh: Mesh, course: Course, *, differentiable: bool = False) -> "System":
        """The equations linearised about a course."""
        x, p, k = course.states, course.parameters, self.k
        q, dim = k * self.layout.size, self.n * self.layout.size
        after = jnp.concatenate([mesh.lengths, mesh.lengths[-1:]])
        shorter = jnp.minimum(jnp.abs(jnp.concatenate([after[:1], mesh.lengths])), jnp.abs(after))

        def node(x):
            t, us, h = x
            matrix = self.lifted.first_order(t, us, self.layout, self.with_parameters(p)).matrix
            of_p = jax.jacfwd(lambda p: flat_residual(self.lifted, self.layout, self.with_parameters(p))(t, us))(p)
            # In units in which all derivatives of a smooth solution are alike the basis is well conditioned, also where
            # the field is stiff.
            unit = jnp.repeat(1 / jnp.stack(powers(h, self.n)), self.layout.size)
            matrix = matrix * unit[None]
            size = jnp.linalg.norm(matrix, axis=1)
            basis, triangle = orthogonal((matrix / size[:, None]).T)
            lift = substitute(triangle, jnp.diag(1 / size))
            lift = unit[:, None] * (basis[:, : dim - q] @ lift)
            return unit[:, None] * basis[:, dim - q :], lift, -lift @ of_p

        nodes = mesh.t, x, shorter
        basis, lift, along = map_rows(node, nodes, mesh.number + 1, differentiable=differentiable)
        first, last, shared = jax.jacfwd(lambda *at: self._ends(*at)[0], argnums=(0, 1, 2))(
            x[0, :k], x[mesh.number, :k], p
        )
        first, last = (jnp.reshape(x, (x.shape[0], q)) for x in (first, last))
        final = lambda x: lax.dynamic_index_in_dim(x, mesh.number, keepdims=False)[:q]  # noqa: E731
        rule = self._rule()

        def link(x):
            dt, (basis_left, basis_right), (along_left, along_right) = x
            before, after = rule(dt)
            own = before @ basis_left, after @ basis_right, before @ along_left + after @ along_right
            return before, after, own

        both = lambda x: (x[:-1], x[1:])  # noqa: E731
        intervals = mesh.lengths, both(basis), both(along)
        before, after, own = map_rows(link, intervals, mesh.number, differentiable=differentiable)
        left, right, border = own
        links = Links(left, right, border, mesh.number)
        ends = Ends(first @ basis[0, :q], last @ final(basis), shared + first @ along[0, :q] + last @ final(along))
        chain = eliminated(links, ends, differentiable=differentiable)
        return System(basis, lift, along, before, after, first, last, chain, self.layout.size)

    def _ends(self, first, last, p):
        return self.boundary(tuple(first), tuple(last), p)

    def _rule(self):
        """``rule(dt) -> (before, after)``: derivatives of an interval's residual by the states at its ends.

        Both are ``(q, dim)``. The residual is multiplied by the inverse square root of its covariance under the prior
        with the output scales ``sizes``, but for the factor ``|dt|^-(nu + 1/2)``: so unit noise fits every length.
        """
        k, layout, one = self.k, self.layout, jnp.ones((), self.layout.dtype)
        prior = IWP(self.n - 1)
        split = prior.split(one, k, layout)
        weights = jnp.concatenate([jnp.eye(k, dtype=one.dtype), -split.gain], axis=1)
        root = split.rest * jnp.tile(self.sizes, k)[None]
        eye = jnp.eye(layout.size, dtype=one.dtype)
        before = substitute(root, jnp.kron(-product(weights, prior.transition(one, layout).matrix), eye))
        after = substitute(root, jnp.kron(weights, eye))

        def rule(dt):
            # In units of the length of an interval all rules are the same.
            units = jnp.repeat(jnp.stack(powers(dt, self.n)), layout.size)[None]
            return before * units, after * units

        return rule


class System(eqx.Module):
    """The equations of a boundary value problem, linearised about a course.

    - ``basis``: the directions in which the state of a node may move while the equation goes on holding there.
    - ``lift``: minus the shortest move that removes a residual at the node; ``along``: the one that a parameter needs.
    - ``before``, ``after``: the derivatives of the residual of an interval with respect to the states at its ends;
      ``first``, ``last``: of the conditions with respect to ``u, ..., u^(k-1)`` at the ends.
    - ``chain``: the equations of what remains, the coordinates in the bases and the parameters, eliminated.
    - ``size``: the number of components of ``u``.
    """

    basis: Float[Array, "nodes dim q"]
    lift: Float[Array, "nodes dim m"]
    along: Float[Array, "nodes dim P"]
    before: Float[Array, "intervals q dim"]
    after: Float[Array, "intervals q dim"]
    first: Float[Array, "c q"]
    last: Float[Array, "c q"]
    chain: Chain
    size: int = eqx.field(static=True)

    def step(self, residuals: Residuals) -> Course:
        """Newton's step, the change of the course after which the linearised equations hold."""
        q, number = self.basis.shape[-1], self.chain.number
        part = self._map(lambda x: -(x[0] @ x[1]), (self.lift, residuals.nodes), number + 1)
        rows = residuals.intervals, self.before, part[:-1], self.after, part[1:]
        intervals = self._map(lambda x: -(x[0] + x[1] @ x[2] + x[3] @ x[4]), rows, number)
        ends = residuals.ends + self.first @ part[0, :q] + self.last @ part[number, :q]
        found = self.chain.solve(intervals[..., None], -ends[:, None])
        return self._course(found.inner[..., 0], found.common[:, 0], part)

    def moves(self, ends: Float[Array, "N c"]) -> Course:
        """The changes of the course, with a leading axis ``N``, if the conditions at the ends change by rows."""
        nothing = jnp.zeros((*self.before.shape[:2], ends.shape[0]), ends.dtype)
        found = self.chain.solve(nothing, -ends.T)
        return jax.vmap(lambda inner, common: self._course(inner, common, jnp.zeros_like(self.basis[..., 0])), (2, 1))(
            found.inner, found.common
        )

    def deviations(self, noise: Float[Array, "intervals q"]) -> Course:
        """The changes of the course, if the equations of the intervals hold up to the given noise."""
        found = self.chain.solve(noise[..., None], jnp.zeros((self.first.shape[0], 1), noise.dtype))
        return self._course(found.inner[..., 0], found.common[:, 0], jnp.zeros_like(self.basis[..., 0]))

    def roots(
        self,
    ) -> tuple[Float[Array, "intervals rows dim"], Float[Array, "intervals rows dim"], Float[Array, "b P"]]:
        """Right square roots of the covariances of states and parameters, with unit noise in every interval.

        Of the states at both ends of every interval: the two have the same rows, so that they also hold the correlation
        of the two states; and of the parameters.
        """
        roots, border = self.chain.roots()
        q = self.basis.shape[-1]

        def pair(x):
            root, left, right = x
            return root[:, :q] @ left.T, root[:, q:] @ right.T

        left, right = self._map(pair, (roots, self.basis[:-1], self.basis[1:]), self.chain.number)
        return left, right, border[:, q:]

    def _course(self, inner, common, part):
        move = lambda x: x[0] + x[1] @ x[2] + x[3] @ common  # noqa: E731
        x = self._map(move, (part, self.basis, inner, self.along), self.chain.number + 1)
        return Course(jnp.reshape(x, (x.shape[0], -1, self.size)), common)

    def _map(self, fn, xs, number):
        return map_rows(fn, xs, number, differentiable=self.chain.differentiable)
