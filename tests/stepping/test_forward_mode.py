"""Functions with a derivative for reverse mode alone: errors say which part has it, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po


@jax.custom_vjp
def minus(x):
    return -x


minus.defvjp(lambda x: (minus(x), None), lambda _, g: (-g,))


def field(t, u, args):
    return minus(u)


def solver(constraint, **parts):
    return po.Solver(po.IWP(4), constraint, **({"loop": po.BoundedLoop(256)} | parts))


def test_the_equation_is_named():
    first = solver(po.TS1(po.ODE(field)))
    words = r"The vector field cannot be differentiated in forward mode.*custom_jvp.*TS0\(ODE\(f\)\)"
    state = solver(po.TS0(po.ODE(field))).init(1.0, 0.0)
    for call in (
        lambda: first.solve(1.0, 0.0, 1.0),
        lambda: jax.jit(jax.vmap(lambda u: first.solve(u, 0.0, 1.0).mean))(jnp.ones(2)),
        lambda: first.solve_grid(1.0, np.linspace(0.0, 1.0, 3)),
        lambda: first.step(state, 0.1),
        lambda: solver(po.TS1(po.ODE(field).lifted(1))).solve(1.0, 0.0, 1.0),
        lambda: solver(po.TS0(po.ODE(field)), loop=po.CheckpointedLoop(64)).solve(po.Normal(1.0, 0.1), 0.0, 1.0),
        lambda: po.solve_ensemble(first, jnp.ones(2), 0.0, 1.0),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    residual = solver(po.TS1(po.Residual(lambda t, u, du, args: du - minus(u))))
    with pytest.raises(TypeError, match="The residual cannot be differentiated in forward mode"):
        residual.solve(1.0, 0.0, 1.0)


@pytest.mark.thorough
def test_the_remedies_work():
    """Taylor mode takes such functions as they are; a derivative in reverse mode is theirs."""
    given = po.TS1(po.ODE(field, jacobian=lambda t, u, args: jnp.array([[-1.0]])))
    for constraint in (po.TS0(po.ODE(field)), given):
        end = lambda u, c=constraint: solver(c).solve_grid(u, np.linspace(0.0, 1.0, 9)).mean[-1]  # noqa: E731
        np.testing.assert_allclose(jax.jit(jax.value_and_grad(end))(1.0), np.exp(-1.0), rtol=1e-3)
    nested = solver(
        po.TS0(po.ODE(lambda t, u, args: jnp.sort(minus(u)))), initialisation=po.Diffuse(1), loop=po.ForwardLoop()
    )
    assert np.all(np.isfinite(nested.solve(jnp.ones(2), 0.0, 1.0).mean))
