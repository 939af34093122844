"""The compiler's option: set by importing, kept out by a variable, refused in words when it comes too late."""

import os
import subprocess
import sys

import pytest

import probode
from probode.util.xla import OPTION, SUMS

from ..helpers import left_to_nox


EXTRA = "--xla_backend_extra_options"
IS_NATIVE = """
import jax, jax.numpy as jnp
def loop(x):
    return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))[1]
print("xla_cpu_small_call" in jax.jit(loop).lower(jnp.ones(1000)).compile().as_text())
"""


def run(code, **environment):
    """What a process of its own prints."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PROBODE_SMALL_LOOPS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("before", "environment", "native"),
    [
        ("", {}, "False"),
        ("import probode", {}, "True"),
        ("import probode", {"PROBODE_SMALL_LOOPS": "0"}, "False"),
        *left_to_nox(
            ("import probode; probode.compile_small_loops()", {"PROBODE_SMALL_LOOPS": "0"}, "True"),
            ("import probode", {"XLA_FLAGS": f"{EXTRA}=xla_cpu_disable_loop_unrolling=true"}, "True"),
            ("import probode", {"XLA_FLAGS": f"{EXTRA}={OPTION}=100"}, "False"),
            ("import jaxlib; jaxlib.__version__ = '9.9.9'; import probode", {}, "False"),
        ),
    ],
)
def test_what_importing_and_the_variable_do(before, environment, native):
    assert run(f"{before}\n{IS_NATIVE}", **environment) == [native]


MANY_LANES = """
import jax, jax.numpy as jnp
solver = probode.Solver(
    probode.IWP(3), probode.TS0(probode.ODE(lambda t, u, args: -u)), factorisation=probode.Isotropic(),
    loop=probode.ForwardLoop(),
)
solve = jax.vmap(lambda u0: solver.solve(u0, 0.0, 1.0, throw=False).mean)
program = jax.jit(solve).lower(jnp.ones((300, 2))).compile().as_text()
print("ynn_fusion" in program)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        ("", "False"),
        ("--xla_cpu_experimental_ynn_fusion_type=reduce", "True"),  # somebody's own wish is left as it is
    ],
)
def test_sums_over_many_lanes_stay_in_xla(flags, calls):
    assert run(f"import probode\n{MANY_LANES}", XLA_FLAGS=flags) == [calls]


def test_calling_too_late_says_so():
    code = """
import jax.numpy as jnp
jnp.ones(1)
import probode  # silently, it cannot know that anybody wants the option
try:
    probode.compile_small_loops()
except RuntimeError as error:
    print("first JAX array" in str(error))
"""
    assert run(code) == ["True"]


def test_twice_is_once():
    code = "import os, probode; probode.compile_small_loops(); print(os.environ['XLA_FLAGS'])"
    threshold, sums = run(code)
    assert threshold.count(OPTION) == 1 and sums == f"{SUMS}=-reduce"


@pytest.mark.parametrize("max_bytes", [0, -1, True])
def test_a_threshold_that_is_none(max_bytes):
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        probode.compile_small_loops(max_bytes)
