"""What a new user types and sees: words of other packages, names of results, and ``solve`` under transformations."""

import copy
import dataclasses
import functools as ft
import inspect
import pickle
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po
from probode.util import words

from .helpers import logistic


def solver(**parts):
    return po.Solver(po.IWP(2), po.TS0(po.ODE(logistic)), loop=po.ForwardLoop(200), **parts)


@ft.cache
def solution():
    return solver().solve(0.1, 0.0, 1.0)


def test_words_of_other_packages_are_not_our_own():
    called = (po.Solver.__init__, po.Solver.solve, po.Solver.solve_grid)
    ours = [set(inspect.signature(fn).parameters) for fn in called]
    # What only some of these take is a hint for the others.
    assert not words._KEYWORDS.keys() & set.intersection(*ours)
    assert not words._ATTRIBUTES.keys() & set(dir(solution()))


def test_hints_name_what_there_is():
    names = set(dir(po)) | set(dir(po.Solution)) | {f.name for f in dataclasses.fields(po.Solution)} | {"Solver"}
    for hint in {*words._KEYWORDS.values(), *words._ATTRIBUTES.values()}:
        for name in re.findall(r"\b([A-Z]\w+)\(|(?<![\w)])\.(\w+)", hint):
            assert set(name) - {""} <= names, hint
    fields = set(inspect.signature(po.Solver).parameters) | set(inspect.signature(po.Solver.solve).parameters)
    fields |= set(inspect.signature(po.IntegralController).parameters) | {"max_steps", "dense", "method", "order"}
    for hint in words._KEYWORDS.values():
        assert set(re.findall(r"(\w+)=", hint)) <= fields | {"jacobian", "norm", "u0"}, hint
    assert words.hint_for_keyword("saveat") == words.hint_for_keyword("t_eval") and "save_at" in words._TIMES
    assert words.hint_for_keyword("save_at") is None and words.hint_for_attribute("mean") is None


def test_signatures_and_names_are_those_of_the_methods():
    assert list(inspect.signature(po.Solver.solve).parameters)[:4] == ["self", "u0", "t0", "t1"]
    assert "save_at" in inspect.signature(solver().solve).parameters
    assert po.Solver.solve.__qualname__ == "Solver.solve" and po.Solver.solve.__doc__.startswith("The ``Solution``")


def test_unknown_attributes_are_python_s_own_affair():
    one = solution()
    assert not hasattr(one, "y") and not hasattr(one, "foo") and hasattr(one, "mean")
    assert getattr(one, "ys", None) is None
    for other in (copy.copy(one), copy.deepcopy(one.result), eqx.tree_at(lambda s: s.t, one, one.t + 1)):
        assert other is not one
    assert copy.copy(one).mean == one.mean
    moved = jax.jit(lambda s: s)(one)
    assert moved.mean == one.mean and jax.tree.structure(moved) == jax.tree.structure(one)

    class Broken(Exception):
        pass

    def moments(self, k):
        raise AttributeError("from within")

    # An error inside of a property stays what it is.
    original, po.Solution.derivative = po.Solution.derivative, moments
    try:
        with pytest.raises(AttributeError, match="from within"):
            _ = one.mean
    finally:
        po.Solution.derivative = original


def test_results_are_printed_with_their_names():
    good = solution().result
    assert str(good) == repr(good) == f"{good}" == "probode.Result<successful>" and po.Result[good] == "successful"
    failed = solver().solve(0.1, 0.0, 1e6, throw=False)
    assert repr(failed.result) == "probode.Result<max_steps_reached>"
    assert repr(failed).endswith("filtered, max_steps_reached)") and repr(solution()).endswith("filtered)")
    assert "max_steps_reached: The solve stopped because" in failed.summary()
    assert pickle.loads(pickle.dumps(failed.result)) == failed.result and failed.result != po.Result.successful
    lanes = jax.vmap(lambda t1: solver().solve(0.1, 0.0, t1, throw=False))(jnp.array([1.0, 1e6]))
    assert repr(lanes.result) == "probode.Result<['successful' 'max_steps_reached']>"
    np.testing.assert_array_equal(lanes.result == po.Result.successful, [True, False])
    assert "2 solves, of which 1 successful" in lanes.summary()
    shapes = eqx.filter_eval_shape(lambda u0: solver().solve(u0, 0.0, 1.0), jnp.asarray(0.1))
    assert "Solution(t=" in repr(shapes)
    seen = []
    jax.jit(lambda result: seen.append(repr(result)) or result == po.Result.successful)(good)
    assert seen == ["probode.Result<traced>"]


def test_solve_is_compiled_as_it_is():
    u0, expected = jnp.asarray(0.1), float(solution().mean[0])
    tight = solver(controller=po.IntegralController(1e-5, 1e-7))
    for compiled in (jax.jit, eqx.filter_jit):
        solve = compiled(solver().solve)
        assert abs(float(solve(u0, 0.0, 1.0).mean[0]) - expected) < 1e-6
        # Solvers with other numbers are other functions.
        more = compiled(tight.solve)(u0, 0.0, 1.0)
        assert more.stats["num_steps"] > 1.5 * solution().stats["num_steps"]
    assert hash(solver()) == hash(solver()) == hash(tight) and solver() == solver() and not bool(solver() == tight)
    again = jax.jit(solver().solve, static_argnames="throw")(u0, 0.0, 1e6, throw=False)
    assert again.result == po.Result.max_steps_reached
    kept = jax.jit(solver().solve)(u0, 0.0, 1.0, save_at=po.SaveAt(ts=jnp.array([0.5, 1.0])))
    np.testing.assert_allclose(kept.mean[-1], expected, rtol=1e-6)


def test_solve_is_mapped_as_it_is():
    u0s = jnp.array([0.1, 0.2, 0.3])
    lanes = jax.vmap(solver().solve, in_axes=(0, None, None))(u0s, 0.0, 1.0)
    one_by_one = [float(solver().solve(u0, 0.0, 1.0).mean[0]) for u0 in u0s]
    np.testing.assert_allclose(lanes.mean[:, 0], one_by_one, rtol=1e-5)
