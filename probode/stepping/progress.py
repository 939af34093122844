"""Progress of long solves: what share of the interval is done, reported to the host from inside the compiled loop.

Nothing is remembered on either side: a report goes out whenever a step passes the next of so many marks.
"""

import sys
from abc import abstractmethod
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..util.checks import as_integer


# Open bars of tqdm, by the meter that they belong to.
_bars: dict[Any, Any] = {}


class AbstractProgress(eqx.Module):
    """A meter for ``Solver.solve(progress=...)``: it is told how far a solve has come.

    A subclass has the field ``marks``, the largest number of reports, and defines ``report(fraction)``. This is called
    on the host, from inside the compiled loop, whenever a step passes the next of as many equidistant marks; the last
    mark is the end of the solve, also of one that fails. Under ``vmap`` the slowest lane is reported; under
    differentiation a report may be repeated.

    >>> import probode
    >>> class Loud(probode.AbstractProgress):
    ...     marks: int = 2
    ...     def report(self, fraction: float) -> None:
    ...         print("half" if fraction < 1 else "done")
    >>> Loud().report(0.5)
    half
    """

    marks: eqx.AbstractVar[int]

    @abstractmethod
    def report(self, fraction: float) -> None:
        """Nothing; called with the share of the interval that is done, a number between 0 and 1."""


class TextProgress(AbstractProgress):
    """A bar of characters on the standard error stream. Raises ``ValueError`` unless ``marks`` is a positive integer.

    >>> import probode
    >>> probode.TextProgress(marks=20).report(1.0)
    """

    marks: int = eqx.field(static=True, default=40, converter=lambda x: as_integer(x, "TextProgress(marks)", 1))

    def report(self, fraction: float) -> None:
        done = int(fraction * self.marks)
        bar = "#" * done + "." * (self.marks - done)
        print(f"\r[{bar}] {100 * fraction:3.0f} %", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)


class TqdmProgress(AbstractProgress):
    """A bar of tqdm, which also suits notebooks. Raises ``ImportError`` without it, ``ValueError`` unless ``marks`` is
    a positive integer.

    >>> import probode
    >>> probode.TqdmProgress(marks=10).marks
    10
    """

    marks: int = eqx.field(static=True, default=100, converter=lambda x: as_integer(x, "TqdmProgress(marks)", 1))

    def __check_init__(self) -> None:
        try:
            import tqdm.auto  # noqa: F401
        except ImportError as error:
            raise ImportError("TqdmProgress needs tqdm: pip install tqdm, or use TextProgress().") from error

    def report(self, fraction: float) -> None:
        from tqdm.auto import tqdm

        bar = _bars.get(self)
        if bar is None:
            bar = _bars[self] = tqdm(total=100, unit="%")
        bar.update(max(0.0, round(100 * fraction) - bar.n))
        if fraction >= 1:
            _bars.pop(self).close()


def tell(progress: AbstractProgress, before: Float[Array, ""], after: Float[Array, ""]) -> None:
    """Report the share done ``after`` a step if it has passed a mark; of all lanes of a ``vmap`` the smallest."""
    before, after = (-eqxi.unvmap_max(-lax.stop_gradient(x)) for x in (before, after))
    passed = jnp.floor(after * progress.marks) > jnp.floor(before * progress.marks)
    lax.cond(passed, lambda x: jax.debug.callback(lambda x: progress.report(float(x)), x), lambda x: None, after)
