"""Compilation of small loops into native functions: options of XLA on CPU, which make solves three to ten times faster.

XLA runs a loop operation by operation, at some 20 to 50 ns for each, unless one iteration is small; then the whole loop
becomes one native function. Small means that the bytes read and written by all operations of body and condition, once,
stay below a threshold: 1024 by default, where a step of a solver needs 20,000 upwards. Loops with sorts, scatters or
calls into libraries (large matrix products, factorisations) are not compiled so whatever their size. Sums over larger
arrays, as in a few hundred lanes of ``jax.vmap``, are such calls too, and slow ones, unless a second option keeps them
in XLA.
"""

import os

import jaxlib
from jax._src import xla_bridge

from .checks import as_integer


OPTION = "xla_cpu_small_while_loop_byte_threshold"
SUMS = "--xla_cpu_experimental_ynn_fusion_type"
# XLA ends the process at options that it does not know: they are set by default only for versions that were tried.
TESTED = ("0.10.0", "0.10.1", "0.10.2")
VARIABLE = "PROBODE_SMALL_LOOPS"
_EXTRA = "--xla_backend_extra_options="


def compile_small_loops(max_bytes: int = 1_000_000) -> None:
    """Set the options with which XLA compiles small loops into native functions, in the whole process, on CPU.

    Solves are three to ten times faster with them. Importing ``probode`` sets them unless JAX has already started its
    backend, the environment variable ``PROBODE_SMALL_LOOPS`` is 0, or the version of jaxlib was not tried; call this
    for another threshold, or for an error where it is too late. A threshold that is already in ``XLA_FLAGS`` stays.

    - ``max_bytes``: the threshold: how many bytes all operations of one iteration may read and write.

    Sums then stay in XLA, instead of going to a library: with 1000 lanes of ``jax.vmap`` that is five times faster.
    ``python -m benchmarks.small_loops`` shows what the options do to results (round-off) and to other libraries' loops
    (nothing, or faster).

    Raises ``RuntimeError`` if JAX has started its backend without the option: it is read once, so import ``probode``
    or call this before the first array is made, or set ``XLA_FLAGS`` yourself; ``ValueError`` for a threshold that is
    not a positive integer.

    >>> import probode
    >>> probode.compile_small_loops()
    """
    max_bytes = as_integer(max_bytes, "compile_small_loops(max_bytes)", 1)
    if compiles_small_loops():
        return
    if _too_late():
        raise RuntimeError(
            "compile_small_loops() comes too late: JAX has started its backend, which reads XLA_FLAGS once. "
            "Import probode or call it before the first JAX array is made, or start Python with "
            f"XLA_FLAGS={_EXTRA}{OPTION}={max_bytes}."
        )
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_EXTRA}{OPTION}={max_bytes}"
    os.environ["XLA_FLAGS"] = (flags if SUMS in flags else f"{flags} {SUMS}=-reduce").strip()


def compiles_small_loops() -> bool:
    """Whether the option is set in ``XLA_FLAGS``, with any threshold."""
    return OPTION in os.environ.get("XLA_FLAGS", "")


def by_default() -> None:
    """Set the options when the package is imported, where they are known to XLA and not too late or unwanted."""
    wanted = os.environ.get(VARIABLE, "1") not in ("0", "false", "off", "no")
    if wanted and jaxlib.__version__ in TESTED and not _too_late():
        compile_small_loops()


def _too_late():
    # JAX has no public function for this. If this one is gone the options are set, and read or not: that does no harm.
    return getattr(xla_bridge, "backends_are_initialized", lambda: False)()
