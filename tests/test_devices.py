"""Solves on several devices: ``pmap``, ``shard_map``, and programs for an explicit mesh, with times that are known."""

import os
import subprocess
import sys
import textwrap

import pytest


# Devices of a host are made when JAX starts.
PROGRAM = textwrap.dedent("""
    import jax, jax.numpy as jnp, numpy as np, probode as po
    from jax.sharding import AxisType, PartitionSpec as P

    jax.config.update("jax_enable_x64", True)
    rates = jnp.array([0.5, 1.0])
    solver = po.Solver(po.IWP(2), po.TS0(po.ODE(lambda t, u, a: -a * u)), loop=po.ForwardLoop(256))
    begun = solver.solve(1.0, 0.0, 0.5, args=0.0).state

    def solve(a):
        return solver.solve(1.0, 0.0, 1.0, args=a).mean[0]

    def resume(a):
        return solver.solve(begun, 0.5, 1.0, args=a).mean[0]

    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    shards = jax.shard_map(jax.vmap(solve), mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False)
    with jax.set_mesh(jax.make_mesh((2,), ("i",))):
        explicit = jax.jit(lambda a: jnp.stack([solve(a), resume(a)]))(0.5)
    for got in (jax.pmap(solve)(rates), jax.jit(shards)(rates)):
        np.testing.assert_allclose(got, np.exp(-rates), rtol=1e-3)
    np.testing.assert_allclose(explicit, [np.exp(-0.5), np.exp(-0.25)], rtol=1e-3)
""")


@pytest.mark.thorough
def test_two_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
