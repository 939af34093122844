"""No QR and no triangular system of many matrices is LAPACK's: two such calls side by side may wait forever."""

import re

import jax
import jax.numpy as jnp
import pytest

import probode as po
from probode.algebra.linalg import eliminate, orthogonal, solve, substitute, triangularise, triangularise_tall

from ..helpers import first_of


def decay(t, u, args):
    return jnp.roll(u, 1) - 2 * u - u**3


def lanes(prior, constraint, d, **parts):
    """Solves of several initial values at once, by a program that is not compiled."""
    solver = po.Solver(prior, constraint, controller=po.IntegralController(1e-4, 1e-6), **parts)
    solve = lambda u0: solver.solve(u0, 0.0, 1.0, save_at=[0.5, 1.0], throw=False).std  # noqa: E731
    return jax.vmap(solve), jnp.ones((3, d))


def algebra():
    """The functions that call LAPACK for large matrices, and their derivatives, in lanes."""
    upper, dense = jnp.eye(91), jnp.ones((4, 91))

    def total(upper, dense):
        square = upper + dense.T @ dense
        results = [
            triangularise(upper, dense),
            *eliminate(jnp.pad(upper, ((0, 0), (0, 3))), jnp.pad(dense, ((0, 0), (0, 3)), constant_values=1.0)),
            triangularise_tall(square),
            substitute(upper, dense.T),
            solve(square, dense.T),
            *orthogonal(square[:, :7]),
        ]
        return sum(jnp.sum(result) for result in results)

    return jax.vmap(jax.value_and_grad(total, argnums=(0, 1))), jnp.stack([upper] * 3), jnp.stack([dense] * 3)


PROGRAMS = {
    "algebra": algebra,
    "boundary-values": lambda: (
        lambda c: (
            po.solve_bvp(
                po.ODE(lambda t, u, du, args: args * u, order=2),
                lambda a, b, args: (a[0] - 1.0, b[0]),
                (0.0, 1.0),
                jnp.ones_like,
                args=c,
                throw=False,
            ).std
        ),
        1.0,
    ),
    "lifted": lambda: lanes(po.IWP(4), po.TS1(po.ODE(decay).lifted(2)), 3, factorisation=po.Dense()),
    "blocks": lambda: lanes(
        po.IWP(2), po.TS1(po.ODE(decay)), 4, factorisation=po.Blocks(2), strategy=po.FixedIntervalSmoother()
    ),
    "large": lambda: lanes(po.IWP(4), po.TS1(po.ODE(decay)), 20, strategy=po.FixedIntervalSmoother()),
}


@pytest.mark.parametrize("program", first_of(*PROGRAMS))
def test_every_call_has_one_matrix(program):
    fn, *inputs = PROGRAMS[program]()
    text = jax.jit(fn).lower(*inputs).as_text()
    calls = re.findall(r"custom_call @lapack_(\w+)\(.*?num_batch_dims = \"(\d+)\"", text)
    assert all(int(axes) == 0 for _, axes in calls), calls
    assert calls or program not in ("algebra", "boundary-values", "large"), "LAPACK is called by another name"
