"""Settings shared by all tests: double precision (single in its own session), fast compilation, hypothesis profiles."""

import os


# How many threads LAPACK takes is read when JAX is imported. Beside another worker they wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gc

import hypothesis
import jax
import pytest


if os.environ.get("PROBODE_TEST_OPTIMISED", "0") != "1":
    # Programs here are compiled once and run briefly: without optimisations, and by an older emitter of XLA that takes
    # a quarter less time. The nohook session tests what users run, fully optimised.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

jax.config.update("jax_enable_x64", os.environ.get("PROBODE_TEST_FLOAT32", "0") != "1")

# Tracing makes objects by the million, and few of them are garbage.
gc.set_threshold(200_000, 20, 100)

hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Thousands of compiled programs in one process exhaust its memory maps, and the compiler crashes."""
    yield
    jax.clear_caches()
