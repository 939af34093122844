"""Solves that keep their steps in pieces: the same answer, in memory for the steps that are taken."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode import adaptive_solve

from ..helpers import first_of, lotka_volterra, name


U0 = jnp.array([20.0, 20.0])
PARTS = [
    {"strategy": po.FixedIntervalSmoother(), "calibration": po.LeaveOneOutCalibration()},
    {"strategy": po.FixedIntervalSmoother(), "calibration": po.MLECalibration()},
    {"strategy": po.Filter(), "factorisation": po.BlockDiagonal()},
    {"strategy": po.FixedIntervalSmoother(), "loop": po.ForwardLoop(300)},
]


def numbers(solution):
    return [x for x in jax.tree.leaves(solution) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]


@pytest.mark.thorough
@pytest.mark.parametrize("parts", first_of(*PARTS), ids=lambda parts: "-".join(map(name, parts.values())))
def test_pieces_give_the_answer_of_one_loop(parts, monkeypatch):
    """Under ``jit`` there is one loop with room for ``max_steps``; outside of it pieces, here of 7 steps."""
    monkeypatch.setattr(adaptive_solve, "_ROWS", 8)
    parts = {"loop": po.BoundedLoop(200)} | parts
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)), controller=po.IntegralController(1e-6), **parts)
    save_at, ts = po.SaveAt(t0=True, t1=True, dense=True), np.linspace(0.0, 3.0, 20)

    def ask(solution):
        return solution.t, solution.mean, solution.std, solution.evaluate(ts).std, solution.log_likelihood

    whole = jax.jit(lambda u0: (ask(s := solver.solve(u0, 0.0, 3.0, save_at=save_at)), s.stats))(U0)
    pieces = solver.solve(U0, 0.0, 3.0, save_at=save_at)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), pieces.stats, whole[1]))
    assert 14 < pieces.stats["num_accepted_steps"] < pieces.trajectory.rows.t.size < 200
    for own, expected in zip(ask(pieces), whole[0], strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-9)


@pytest.mark.thorough
def test_every_step_has_an_entry_and_the_others_repeat_the_last():
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)), loop=po.BoundedLoop(200))
    whole = jax.jit(lambda u0: (s := solver.solve(u0, 0.0, 3.0, save_at=po.SaveAt(steps=True))).t + 0 * s.mean[:, 0])(
        U0
    )
    pieces = solver.solve(U0, 0.0, 3.0, save_at=po.SaveAt(steps=True))
    assert pieces.t.shape == (200,)
    np.testing.assert_allclose(pieces.t, whole, rtol=1e-12)
    assert (pieces.t[int(pieces.stats["num_accepted_steps"]) - 1 :] == 3.0).all()


def test_a_long_solve_that_fails_says_where(monkeypatch):
    monkeypatch.setattr(adaptive_solve, "_ROWS", 8)
    parts = {"strategy": po.FixedIntervalSmoother(), "loop": po.BoundedLoop(30)}
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(lotka_volterra)), **parts)
    stopped = solver.solve(U0, 0.0, 50.0, throw=False)
    assert stopped.result == po.Result.max_steps_reached and stopped.stats["num_steps"] == 30
    assert 0 < stopped.state.t < 50.0
    np.testing.assert_array_equal(stopped.evaluate(stopped.state.t).mean, stopped.mean[-1])
    nowhere = solver.solve(jnp.array([jnp.inf, 1.0]), 0.0, 1.0, throw=False)
    assert nowhere.result == po.Result.initial_state_nonfinite and nowhere.stats["num_steps"] == 0


@pytest.mark.thorough
def test_a_field_that_closes_over_traced_values():
    def end(rate):
        ode = po.ODE(lambda t, u, args: -rate * u)
        parts = {"strategy": po.FixedIntervalSmoother(), "loop": po.BoundedLoop(64)}
        return po.Solver(po.IWP(3), po.TS1(ode), **parts).solve(1.0, 0.0, 1.0).mean[0]

    np.testing.assert_allclose(jax.vmap(end)(jnp.array([0.5])), np.exp(-0.5), rtol=1e-3)


def test_memory_follows_the_steps():
    """Fifty components in a few steps: three arrays of 250 x 250 for each."""
    d = 50
    field = lambda t, u, args: -u * jnp.arange(1, d + 1) / d + jnp.sin(t)  # noqa: E731
    parts = {"factorisation": po.Dense(), "strategy": po.FixedIntervalSmoother()}
    solver = po.Solver(po.IWP(4), po.TS0(po.ODE(field)), **parts)
    solution = solver.solve(jnp.ones(d), 0.0, 0.1)
    assert sum(x.nbytes for x in jax.tree.leaves(solution)) < 50e6
    with pytest.raises(ValueError, match=r"takes .* GB.*max_steps"):
        jax.eval_shape(
            lambda u0: (
                po.Solver(po.IWP(4), po.TS0(po.ODE(field)), **parts, loop=po.BoundedLoop(10**6)).solve(u0, 0.0, 0.1).t
            ),
            jnp.ones(d),
        )


def test_many_times_share_the_rows_of_few_steps():
    solver = po.Solver(po.IWP(2), po.TS1(po.ODE(lambda t, u, args: -u)), loop=po.ForwardLoop(50))
    ts = np.linspace(0.0, 1.0, 2000)
    text = str(jax.make_jaxpr(lambda u0: solver.solve(u0, 0.0, 1.0, save_at=ts).mean)(1.0))
    (size,) = set(re.findall(r"f64\[50,(\d+)\]", text))
    assert f"f64[2000,{size}]" not in text and "f64[2000,2," not in text
