"""Solutions as datasets of xarray: names, values, draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import lotka_volterra


xarray = pytest.importorskip("xarray")


def field(t, u, args):
    flat = lotka_volterra(t, jnp.stack([u["prey"], u["predators"][0]]), args)
    return {"prey": flat[0], "predators": flat[1:]}


SOLVER = po.Solver(po.IWP(2), po.TS1(po.ODE(field)), strategy=po.FixedIntervalSmoother(), loop=po.BoundedLoop(256))
U0 = {"prey": 20.0, "predators": jnp.array([20.0])}


@pytest.fixture(scope="module")
def solution():
    return SOLVER.solve(U0, 0.0, 5.0, save_at=np.linspace(0.0, 5.0, 6))


def test_values_have_names(solution):
    data = solution.to_xarray()
    assert dict(data.sizes) == {"time": 6, "component": 2}
    assert list(data.component.values) == ["predators[0]", "prey"] and data.attrs["result"] == "successful"
    np.testing.assert_array_equal(data["mean"].sel(component="prey"), solution.mean["prey"])
    np.testing.assert_array_equal(data["std"].sel(component="predators[0]"), solution.std["predators"][:, 0])
    np.testing.assert_allclose(data["mean"].sel(time=3.0), data["mean"].values[3])


def test_draws_are_joint_samples(solution):
    key = jax.random.key(0)
    data = solution.to_xarray(draws=3, key=key)
    assert data.u.dims == ("draw", "time", "component")
    np.testing.assert_array_equal(data.u.sel(component="prey"), solution.sample(key, (3,))["prey"])


@pytest.mark.thorough
def test_steps_that_were_not_taken_are_left_out():
    solution = SOLVER.solve(U0, 0.0, 5.0, save_at=po.SaveAt(t0=True, steps=True))
    taken = int(solution.stats["num_accepted_steps"])
    assert solution.to_xarray().sizes["time"] == taken + 1


@pytest.mark.thorough
def test_lanes_have_a_dimension():
    def solve(prey):
        return SOLVER.solve(U0 | {"prey": prey}, 0.0, 5.0, save_at=[1.0, 5.0])

    lanes = jax.vmap(solve)(jnp.array([10.0, 20.0, 30.0]))
    data = lanes.to_xarray()
    assert data["mean"].dims == ("lane", "time", "component") and data["t"].dims == ("lane", "time")
    np.testing.assert_array_equal(data["mean"].sel(component="prey"), lanes.mean["prey"])


def test_wrong_use(solution):
    with pytest.raises(ValueError, match="key"):
        solution.to_xarray(draws=2)
    with pytest.raises(ValueError, match="draws"):
        solution.to_xarray(draws=-1)
