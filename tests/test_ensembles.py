"""Ensembles: every lane as if it were alone, whatever the blocks, the order, the devices and the other lanes."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode

from .helpers import first_of


def field(t, u, args):
    return {"x": -args["rate"] * u["x"] + jnp.sin(t), "y": u["x"] * u["y"] * 0.1}


SOLVER = probode.Solver(
    probode.IWP(3), probode.TS0(probode.ODE(field)), factorisation=probode.Isotropic(), loop=probode.BoundedLoop(256)
)
LANES = 7
U0 = {"x": jnp.linspace(1.0, 2.0, LANES), "y": jnp.linspace(-1.0, 1.0, 2 * LANES).reshape(2, LANES)}
RATES = {"rate": jnp.array([0.1, 20.0, 0.3, 3.0, 0.5, 7.0, 1.0])}
AXES = ({"x": 0, "y": 1}, None, None, 0)


def lane(i, tree=U0, axes=AXES[0]):
    return jax.tree.map(lambda x, axis: jnp.take(x, i, axis), tree, axes)


def ensemble(u0=U0, rates=RATES, t0=0.0, t1=2.0, in_axes=AXES, **options):
    return probode.solve_ensemble(SOLVER, u0, t0, t1, args=rates, in_axes=in_axes, **options)


@pytest.fixture(scope="module")
def alone():
    return [SOLVER.solve(lane(i), 0.0, 2.0, args={"rate": RATES["rate"][i]}) for i in range(LANES)]


@pytest.mark.parametrize(
    "options",
    [{"lanes_per_block": 3}, *first_of({}, {"lanes_per_block": 100}, {"cost": RATES["rate"], "lanes_per_block": 2})],
)
def test_lanes_are_what_they_are_alone(options, alone):
    together = ensemble(**options)
    assert together.mean["y"].shape == (LANES, 1, 2)
    for i, solution in enumerate(alone):
        assert together.stats["num_steps"][i] == solution.stats["num_steps"]
        for a, b in zip(jax.tree.leaves(together.marginals), jax.tree.leaves(solution.marginals), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("lanes_per_block", [1, 3])
def test_a_failing_lane_leaves_the_others_bitwise_alone(lanes_per_block):
    fine = ensemble(lanes_per_block=lanes_per_block)
    broken = ensemble({**U0, "x": U0["x"].at[3].set(jnp.nan)}, lanes_per_block=lanes_per_block)
    slow = ensemble(rates={"rate": RATES["rate"].at[3].set(1e6)}, lanes_per_block=lanes_per_block)
    assert (broken.result == probode.Result.initial_state_nonfinite)[3]
    assert (slow.result == probode.Result.max_steps_reached)[3]
    others = jnp.arange(LANES) != 3
    for solutions in (broken, slow):
        assert (solutions.result == probode.Result.successful).tolist() == others.tolist()
        for a, b in zip(jax.tree.leaves(fine.marginals), jax.tree.leaves(solutions.marginals), strict=True):
            np.testing.assert_array_equal(a[others], b[others])


@pytest.mark.parametrize("sign", [1.0, pytest.param(-1.0, marks=pytest.mark.thorough)])
@pytest.mark.thorough
def test_a_lane_whose_interval_is_empty_stays_at_its_start(sign):
    """Its derivatives with respect to ``u0`` are those of the identity; the others are what they are alone."""
    t1 = sign * jnp.array([0.0, 0.5, 1.0])
    solve = lambda u0, t1, **options: SOLVER.solve(u0, 0.0, t1, args={"rate": 0.5}, **options)  # noqa: E731
    options = {"args": {"rate": 0.5}, "in_axes": (None, None, 0, None)}
    lanes = probode.solve_ensemble(SOLVER, lane(0), 0.0, t1, **options)
    mapped, slope = jax.vmap(
        lambda t1: jax.jvp(lambda x: solve(lane(0) | {"x": x}, t1).mean["x"][0], (lane(0)["x"],), (1.0,))
    )(t1)
    assert lanes.mean["x"][0, 0] == mapped[0] == lane(0)["x"] and slope[0] == 1.0
    assert lanes.std["x"][0, 0] == 0 and (lanes.result == probode.Result.successful).all()
    for i in (1, 2):
        alone = solve(lane(0), t1[i])
        np.testing.assert_allclose([lanes.mean["x"][i, 0], mapped[i]], alone.mean["x"][0], rtol=1e-9)
        np.testing.assert_allclose(slope[i], np.exp(-0.5 * t1[i]), rtol=1e-2)


@pytest.mark.thorough
def test_an_empty_interval_has_the_derivative_of_its_end():
    # Beside a lane of some length: u' at the end with respect to t1, and minus that with respect to t0.
    args, ends = {"rate": 0.5}, jnp.array([0.0, 0.5])
    solve = lambda t0, t1: SOLVER.solve(lane(0), t0, t1, args=args).mean["x"][0]  # noqa: E731
    by_start, by_end = jax.jit(jax.vmap(jax.jacfwd(solve, argnums=(0, 1)), (None, 0)))(0.0, ends)
    assert by_end[0] == -by_start[0] == -0.5 * lane(0)["x"]
    np.testing.assert_allclose(by_end[1], -0.5 * solve(0.0, 0.5) + np.sin(0.5), rtol=1e-2)

    def together(t1):
        return probode.solve_ensemble(SOLVER, lane(0), 0.0, t1, args=args, in_axes=(None, None, 0, None)).mean["x"][
            :, 0
        ]

    np.testing.assert_allclose(jax.jvp(together, (ends,), (jnp.ones(2),))[1], by_end, rtol=1e-6)


def test_intervals_and_parameters_can_be_lanes():
    t1 = jnp.array([1.0, 2.0, -1.5])
    rates = {"rate": jnp.array([1.0, 2.0, 0.5])}
    u0 = lane(0)
    together = ensemble(u0, rates, t1=t1, in_axes=(None, None, 0, 0))
    np.testing.assert_array_equal(together.t[:, 0], t1)
    one = SOLVER.solve(u0, 0.0, -1.5, args={"rate": rates["rate"][2]})
    np.testing.assert_allclose(together.mean["y"][2], one.mean["y"], rtol=1e-12)


@pytest.mark.thorough
def test_saved_times_and_going_on():
    ts = jnp.linspace(0.0, 2.0, 5)
    saved = ensemble(save_at=ts)
    assert saved.mean["x"].shape == (LANES, 5)
    half = ensemble(t1=1.0)
    rest = ensemble(half.state, t0=1.0, in_axes=(0, None, None, 0))
    np.testing.assert_allclose(rest.mean["x"][:, -1], saved.mean["x"][:, -1], rtol=1e-2)


@pytest.mark.thorough
def test_gradients_are_those_of_the_lanes():
    def loss(rates):
        return jnp.sum(ensemble(rates={"rate": rates}).mean["x"][:, 0] ** 2)

    def alone(rate):
        return jnp.sum(SOLVER.solve(lane(2), 0.0, 2.0, args={"rate": rate}).mean["x"] ** 2)

    gradient = jax.jit(jax.grad(loss))(RATES["rate"])
    np.testing.assert_allclose(gradient[2], jax.jit(jax.grad(alone))(RATES["rate"][2]), rtol=1e-9)
    assert jnp.isfinite(gradient).all()


def test_new_values_do_not_compile_again():
    jax.clear_caches()
    count = 0

    def counted(t, u, args):
        nonlocal count
        count += 1
        return -args * u

    solver = probode.Solver(probode.IWP(2), probode.TS0(probode.ODE(counted)), factorisation=probode.Isotropic())
    for scale in (1.0, 2.0):
        probode.solve_ensemble(solver, jnp.ones((4, 2)) * scale, 0.0, scale, args=0.5 * scale)
        if scale == 1.0:
            first = count
    assert count == first


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"in_axes": (None, None, None, None)}, ValueError, "maps nothing"),
        ({"in_axes": (0, None)}, ValueError, "in_axes must be"),
        ({"in_axes": (0, None, None, 3)}, ValueError, "axis 3 of an array"),
        ({"in_axes": ({"x": 0, "y": 0}, None, None, None)}, ValueError, "same number of lanes"),
        ({"lanes_per_block": 0}, ValueError, "lanes_per_block must be"),
        ({"cost": jnp.ones(3)}, ValueError, "one number for each"),
        ({"t1": jnp.zeros(7), "in_axes": (AXES[0], None, 0, 0)}, ValueError, "nothing to solve"),
        ({"t1": jnp.array([1.0] * 6 + [np.inf]), "in_axes": (AXES[0], None, 0, 0)}, ValueError, "finite in every"),
        (
            {"t1": jnp.array([1.0] * 6 + [0.4]), "in_axes": (AXES[0], None, 0, 0), "save_at": [0.5]},
            ValueError,
            "interval of every lane",
        ),
        (
            {"t1": jnp.array([1.0] * 6 + [-1.0]), "in_axes": (AXES[0], None, 0, 0), "save_at": [0.5]},
            ValueError,
            "same direction",
        ),
    ],
)
def test_wrong_use(change, error, message):
    with pytest.raises(error, match=message):
        ensemble(**change)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import probode
from tests.test_ensembles import RATES, U0, ensemble

assert len(jax.devices()) == 8
alone = ensemble(save_at=jnp.array([0.5, 2.0]))
meshes = Mesh(np.array(jax.devices()), ("lanes",)), jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
for mesh in meshes:
    for options in {}, {"cost": RATES["rate"]}:
        shared = ensemble(save_at=jnp.array([0.5, 2.0]), mesh=mesh, **options)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
            # Shares of another size are another program, which may round otherwise.
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-16)

ode = probode.ODE(lambda t, u, args: u * (1 - u) + jnp.roll(u, 1))
solver = probode.Solver(probode.IWP(2), probode.TS0(ode), factorisation=probode.Isotropic())
unplaced = probode.solve_ensemble(solver, jnp.arange(1.0, 17.0).reshape(8, 2), 0.0, 1.0)
u0 = jnp.arange(1.0, 17.0).reshape(8, 2)
for mesh in meshes:
    placed = jax.device_put(u0, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))
    solutions = probode.solve_ensemble(solver, placed, 0.0, 1.0, mesh=mesh)
    np.testing.assert_allclose(solutions.mean, unplaced.mean, rtol=1e-13)

# A single state of high dimension, its components over the devices.
mesh = meshes[0]
u0 = jnp.linspace(0.5, 1.5, 4096)
components = NamedSharding(mesh, PartitionSpec("lanes"))
for factorisation in probode.Isotropic(), probode.BlockDiagonal():
    solver = probode.Solver(probode.IWP(3), probode.TS0(ode), factorisation=factorisation)
    solve = jax.jit(lambda u0: solver.solve(u0, 0.0, 1.0, throw=False))
    sharded, whole = solve(jax.device_put(u0, components)), solve(u0)
    np.testing.assert_allclose(sharded.mean, whole.mean, rtol=1e-10)
    np.testing.assert_allclose(sharded.std, whole.std, rtol=1e-8)
    print(type(factorisation).__name__, sharded.mean.sharding)
print("all equal")
"""


@pytest.mark.thorough
def test_eight_devices_give_what_one_gives():
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all equal")


def test_wrong_times_are_found_under_jit_too():
    solve = eqx.filter_jit(lambda t1: ensemble(t1=t1, in_axes=(AXES[0], None, 0, 0)).mean["x"])
    assert solve(jnp.linspace(1.0, 2.0, LANES)).shape == (LANES, 1)
    # (JAX raises the second one where the program has run beside Python.)
    with pytest.raises((RuntimeError, ValueError), match=r"t0 and t1 must be finite in every lane"):
        solve(jnp.linspace(1.0, 2.0, LANES).at[3].set(jnp.nan))


@pytest.mark.thorough
def test_uncertain_lanes_and_going_on_from_them():
    solver = probode.Solver(
        probode.IWP(3),
        probode.TS1(probode.ODE(lambda t, u, args: -u * args)),
        factorisation=probode.BlockDiagonal(),
        loop=probode.BoundedLoop(128),
    )
    means, stds, rates = jnp.array([[1.0], [2.0]]), jnp.array([[0.1], [0.3]]), jnp.array([1.0, 2.0])
    axes = (0, None, None, 0)
    half = probode.solve_ensemble(solver, probode.Normal(means, stds), 0.0, 0.5, args=rates, in_axes=axes)
    whole = probode.solve_ensemble(solver, half.state, 0.5, 1.0, args=rates, in_axes=axes)
    for i in range(2):
        one = solver.solve(probode.Normal(means[i], stds[i]), 0.0, 0.5, args=rates[i])
        two = solver.solve(one.state, 0.5, 1.0, args=rates[i])
        np.testing.assert_allclose(half.std[i], one.std, rtol=1e-12)
        np.testing.assert_allclose(whole.std[i], two.std, rtol=1e-12)
        np.testing.assert_allclose(whole.std[i, -1], stds[i] * np.exp(-rates[i]), rtol=1e-3)
