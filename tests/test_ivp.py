"""``solve_ivp``: what may be said, and what is said twice; tolerances for each component."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .helpers import first_of


U0 = {"position": jnp.array([1.0, 0.5]), "charge": jnp.array(1.0)}


def field(t, u, args):
    return {"position": -u["position"], "charge": -3.0 * u["charge"] + u["position"][0]}


def decay(t, u, args):
    return -u


def test_the_defaults_are_those_of_the_documentation():
    parameters = inspect.signature(po.solve_ivp).parameters
    assert parameters["rtol"].default == 1e-3 and parameters["atol"].default == 1e-6


@pytest.mark.thorough
def test_spans_may_be_arrays():
    end = po.solve_ivp(decay, (0.0, 1.0), jnp.ones(2)).mean
    for span in (np.array([0.0, 1.0]), jnp.array([0, 1]), [0, 1]):
        np.testing.assert_array_equal(po.solve_ivp(decay, span, jnp.ones(2)).mean, end)
    traced = jax.jit(lambda span: po.solve_ivp(decay, span, jnp.ones(2)).mean)(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(traced, end, rtol=1e-12)


def test_the_words_of_scipy():
    solve = lambda **options: po.solve_ivp(decay, (0.0, 1.0), jnp.ones(2), throw=False, **options)  # noqa: E731
    free, short = solve(), solve(max_step=0.05)
    assert free.stats["num_steps"] < 20 <= short.stats["num_steps"]
    np.testing.assert_array_equal(solve(max_step=np.inf).mean, free.mean)
    np.testing.assert_array_equal(solve(first_step=1e-3).mean, solve(dt0=1e-3).mean)
    assert solve(first_step=1e-3).stats["num_steps"] > free.stats["num_steps"]
    stopped = solve(max_steps=2)
    assert stopped.result == po.Result.max_steps_reached and stopped.stats["max_steps"] == 2
    with pytest.raises(RuntimeError, match="max_steps"):
        po.solve_ivp(decay, (0.0, 1.0), jnp.ones(2), max_steps=2)


def test_parts_take_the_place_of_the_methods():
    parts = {
        "factorisation": po.BlockDiagonal(),
        "strategy": po.FixedIntervalSmoother(),
        "calibration": po.MLECalibration(),
        "error": po.StateError(),
        "controller": po.PIController(1e-5),
        "loop": po.ForwardLoop(100),
        "initialisation": po.Diffuse(1),
    }
    solution = po.solve_ivp(decay, (0.0, 1.0), jnp.ones(2), method="EK0", **parts)
    solver = po.Solver(po.IWP(4), po.TS0(po.ODE(decay)), **parts)
    np.testing.assert_array_equal(solution.mean, solver.solve(jnp.ones(2), 0.0, 1.0).mean)
    assert solution.is_dense


TWICE = [
    ({"controller": po.PIController(), "rtol": 1e-3}, "controller.*rtol"),
    ({"controller": po.PIController(), "atol": 1e-6}, "controller.*atol"),
    ({"controller": po.PIController(), "max_step": 0.1}, "controller.*max_step"),
    ({"loop": po.ForwardLoop(), "max_steps": 10}, "loop.*max_steps"),
    ({"strategy": po.Filter(), "t_eval": [0.5]}, "strategy.*t_eval"),
    ({"strategy": po.Filter(), "dense_output": True}, "strategy.*dense_output"),
    ({"dt0": 0.1, "first_step": 0.1}, "dt0.*first_step"),
]


@pytest.mark.parametrize(("options", "words"), TWICE, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_said_twice_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        po.solve_ivp(decay, (0.0, 1.0), jnp.ones(2), **options)


@pytest.mark.parametrize(("method", "own"), [("RK45", "'Taylor'"), ("LSODA", "'EK1'"), ("Radau", "'EK1'")])
def test_methods_of_scipy_get_a_hint(method, own):
    with pytest.raises(ValueError, match=f"method must be .*{own}.*{method}.*{own}"):
        po.solve_ivp(decay, (0.0, 1.0), jnp.ones(2), method=method)


def test_words_of_other_packages_get_a_hint():
    for word, own in {
        "saveat": "t_eval",
        "jac": "exact",
        "max_num_steps": "max_steps",
        "y0": "u0",
        "prior": "Solver",
    }.items():
        with pytest.raises(TypeError, match=rf"solve_ivp has no argument '{word}': .*{own}"):
            po.solve_ivp(decay, (0.0, 1.0), 1.0, **{word: 1.0})
    with pytest.raises(TypeError, match=r"solve_ivp\(vector_field, t_span, u0, ...\) needs u0"):
        po.solve_ivp(decay, (0.0, 1.0))
    with pytest.raises(TypeError, match="takes 3 positional arguments, got 4"):
        po.solve_ivp(decay, (0.0, 1.0), 1.0, "EK1")


@pytest.mark.thorough
def test_data_and_uncertain_starts_are_not_rescaled():
    """Leave-one-out, the calibration of dense output, would rescale what is known."""
    start = po.Normal(jnp.ones(2), 0.1 * jnp.ones(2))
    dense = po.solve_ivp(decay, (0.0, 1.0), start, dense_output=True, max_steps=64)
    np.testing.assert_allclose(dense.std[0], 0.1 * np.exp(-1.0), rtol=1e-3)
    data = po.Observations(jnp.array([0.5]), jnp.exp(-0.5) * jnp.ones((1, 2)), 0.1)
    assert po.solve_ivp(decay, (0.0, 1.0), jnp.ones(2), data=data, dense_output=True).data_log_likelihood < 10


@pytest.mark.parametrize("method", first_of("EK1", "EK0", "Taylor"))
def test_tolerances_of_components(method):
    solve = lambda rtol, atol: po.solve_ivp(field, (0.0, 1.0), U0, method=method, rtol=rtol, atol=atol)  # noqa: E731
    plain = solve(1e-4, 1e-6)
    trees = solve({"position": jnp.full(2, 1e-4), "charge": 1e-4}, {"position": 1e-6, "charge": 1e-6})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), trees.mean, plain.mean)
    assert trees.stats["num_steps"] == plain.stats["num_steps"]


@pytest.mark.thorough
def test_a_tolerance_that_one_component_does_not_need():
    """A fast component that may be wrong does not shorten the steps; the others do not notice."""
    fast = lambda t, u, args: jnp.stack([-u[0], 50 * jnp.cos(50 * t)])  # noqa: E731
    options = {"method": "EK0", "factorisation": po.BlockDiagonal(), "rtol": 0.0}  # one output scale for each component
    solve = lambda atol: po.solve_ivp(fast, (0.0, 1.0), jnp.array([1.0, 0.0]), atol=atol, **options)  # noqa: E731
    both, one = solve(1e-6), solve(jnp.array([1e-6, 1e3]))
    assert one.stats["num_steps"] < both.stats["num_steps"] / 3
    assert abs(both.mean[0, 1] - np.sin(50.0)) < 1e-5 and abs(one.mean[0, 0] - np.exp(-1.0)) < 1e-5


@pytest.mark.thorough
def test_tolerances_may_be_lists_as_in_scipy():
    solve = lambda atol: po.solve_ivp(decay, (0.0, 1.0), jnp.ones(2), atol=atol).mean  # noqa: E731
    np.testing.assert_array_equal(solve([1e-6, 1e-9]), solve(jnp.array([1e-6, 1e-9])))


@pytest.mark.thorough
def test_tolerances_can_be_differentiated_and_swept():
    def steps(atol):
        controller = po.IntegralController(0.0, {"position": atol, "charge": 1e-3})
        return po.Solver(po.IWP(3), po.TS1(po.ODE(field)), controller=controller).solve(U0, 0.0, 1.0).stats["num_steps"]

    numbers = jax.vmap(steps)(jnp.array([1e-3, 1e-6, 1e-9]))
    assert numbers[0] < numbers[1] < numbers[2]


def test_a_failed_solve_with_tolerances_of_components_says_why():
    with pytest.raises(RuntimeError, match=r"max_steps attempts .*looser than rtol=1e-06"):
        po.solve_ivp(field, (0.0, 1.0), U0, rtol={"position": 1e-3, "charge": 1e-6}, max_steps=2)


WRONG = [
    (jnp.ones(3), "structure of u.*broadcast"),
    ([1e-6, 1e-6], "structure of u"),
    ({"position": 1e-6}, "structure of u"),
    ({"position": jnp.ones(3), "charge": 1e-6}, "broadcast"),
    ({"position": 1e-6, "charge": -1.0}, "not negative"),
    ({"position": 0.0, "charge": 1e-6}, "both zero"),
    ({}, "got nothing"),
]


@pytest.mark.parametrize(("atol", "words"), WRONG, ids=[words for _, words in WRONG])
def test_tolerances_that_do_not_fit(atol, words):
    with pytest.raises(ValueError, match=words):
        po.solve_ivp(field, (0.0, 1.0), U0, rtol=0.0, atol=atol)
