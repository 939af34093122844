"""The derivative of an adaptive solve, segment by segment: which loops have one, lanes, memory, progress."""

import functools

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import first_of, relative


def decay(t, u, args):
    return -args * u


def solver(loop, strategy=po.Filter(), rtol=1e-4):
    return po.Solver(
        po.IWP(2),
        po.TS0(po.ODE(decay)),
        strategy=strategy,
        controller=po.IntegralController(rtol, rtol),
        loop=loop,
    )


class OwnLoop(po.AbstractLoop):
    """The loop of a user, which has no derivative of its own in reverse mode."""

    max_steps: int = eqx.field(static=True, default=64)

    def run(self, cond, body, init, *, buffers):
        return eqxi.while_loop(cond, body, init, max_steps=self.max_steps, buffers=buffers, kind="lax")


LOOPS = first_of(
    po.CheckpointedLoop(64, checkpoints=5),
    po.BoundedLoop(64),
    po.CheckpointedLoop(64, checkpoints=1),
    po.CheckpointedLoop(64, checkpoints=1000),
    OwnLoop(),
)


POINT, TIMES = np.array([1.0, 1.3]), np.array([0.3, 1.1])


@functools.cache
def on_a_grid():
    """Mean and standard deviation at two times, and their derivatives, of a smoother with the steps of all these loops.

    The grid does not depend on the loop, and a grid has no loop.
    """
    made = solver(po.BoundedLoop(64), po.FixedIntervalSmoother())
    ends = made.solve(POINT[0], 0.0, 2.0, args=POINT[1], save_at=po.SaveAt(t0=True, steps=True))
    grid = ends.t[: int(ends.stats["num_accepted_steps"]) + 1]
    assert 10 < grid.size < 40

    def frozen(x):
        posterior = made.solve_grid(x[0], grid, args=x[1]).evaluate(TIMES)
        return jnp.append(posterior.mean, posterior.std)

    return frozen(POINT), jax.jit(jax.jacfwd(frozen))(POINT)


@pytest.mark.thorough
@pytest.mark.parametrize("loop", LOOPS, ids=repr)
def test_derivatives_are_those_of_the_steps_however_they_are_divided(loop):
    values, derivatives = on_a_grid()

    def adaptive(x):
        solution = solver(loop, po.FixedPointSmoother()).solve(x[0], 0.0, 2.0, args=x[1], save_at=TIMES)
        both = jnp.append(solution.mean, solution.std)
        return both, both

    for jacobian in (jax.jacfwd, jax.jacrev):
        found, both = jax.jit(jacobian(adaptive, has_aux=True))(POINT)
        np.testing.assert_allclose(both, values, rtol=1e-9)
        assert relative(found, derivatives) < 1e-8


@pytest.mark.thorough
def test_lanes_that_fail_or_end_early():
    """They have the gradients that they have alone, with respect to what they share with others, too."""

    def end(rate, u0):
        made = po.Solver(po.IWP(2), po.TS0(po.ODE(lambda t, u, rate: -rate * jnp.log(u))), loop=po.BoundedLoop(24))
        solution = made.solve(u0, 0.0, 1.0, args=rate, throw=False)
        reached = solution.result == po.Result.successful
        return jnp.where(reached, solution.mean[-1], 0), solution.stats["num_accepted_steps"]

    def together(rate, u0s):
        ends, steps = jax.vmap(end, in_axes=(None, 0))(rate, u0s)
        return jnp.sum(ends), steps

    gradient = jax.jit(jax.grad(together, (0, 1), has_aux=True))
    # at 1 nothing happens, from 1e-9 there are not steps enough
    u0s = jnp.array([1.0, 3.0, 20.0, 1e-9])
    (shared, own), steps = gradient(1.0, u0s)
    assert len(set(np.asarray(steps).tolist())) == 4
    assert own[3] == 0
    alone = [gradient(1.0, u0s[jnp.full(4, i)])[0] for i in range(3)]
    np.testing.assert_allclose(own[:3], [of_u0[0] for _, of_u0 in alone], rtol=1e-9)
    np.testing.assert_allclose(shared, sum(of_rate for of_rate, _ in alone) / 4, rtol=1e-9)


@pytest.mark.thorough
def test_memory_grows_like_the_square_root_of_the_number_of_steps():
    def memory(steps):
        end = lambda u0: solver(po.CheckpointedLoop(steps)).solve(u0, 0.0, 2.0, args=1.3, throw=False).mean[-1]  # noqa: E731
        return jax.jit(jax.grad(end)).lower(1.0).compile().memory_analysis().temp_size_in_bytes

    assert memory(40_000) < 10 * memory(400)


@pytest.mark.thorough
def test_progress_is_told_once():
    told = []

    class Meter(po.AbstractProgress):
        marks: int = 10

        def report(self, fraction):
            told.append(float(fraction))

    def end(u0):
        made = solver(po.CheckpointedLoop(64, checkpoints=5))
        return made.solve(u0, 0.0, 2.0, args=1.3, progress=Meter(), throw=False).mean[-1]

    end(1.0)
    jax.effects_barrier()
    of_a_value = told.copy()
    told.clear()
    jax.grad(end)(1.0)
    jax.effects_barrier()
    assert told == of_a_value
    assert told[-1] == 1


@pytest.mark.thorough
def test_reverse_over_reverse():
    def end(rate):
        return solver(po.BoundedLoop(512), rtol=1e-6).solve(1.0, 0.0, 2.0, args=rate).mean[-1]

    rate = 0.7
    forwards = jax.jit(jax.jacfwd(jax.grad(end)))(rate)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(end)))(rate), forwards, rtol=1e-9)
    np.testing.assert_allclose(forwards, 4 * np.exp(-2 * rate), rtol=1e-3)
