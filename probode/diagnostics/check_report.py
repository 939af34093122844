"""What ``Solution.check`` returns: reasons to doubt a solution, in words, as data and as a picture."""

import dataclasses
import html
from typing import Any

import numpy as np
from jaxtyping import Float

from ..util import describe
from .axes import new_axes


@dataclasses.dataclass(frozen=True)
class Finding:
    """One reason to doubt a solution, or to compute it in another way.

    - ``kind``: a word for it: ``failed``, ``nonfinite``, ``unseen``, ``sensitive``, ``uncertain``, ``miscalibrated``,
      ``differs``, ``jump``, ``kink``, ``events``, ``tolerance``, ``round_off``, ``stiff``.
    - ``is_doubt``: whether the numbers may be wrong; otherwise they could be had for less.
    - ``t``: the time at which it shows most clearly; ``None`` if it is not about one.
    - ``message``: what was found. ``remedy``: what helps.

    >>> import jax.numpy as jnp, probode
    >>> switch = lambda t, u, args: jnp.where(t < 1, -u, u)
    >>> probode.solve_ivp(switch, (0.0, 2.0), 1.0, dense_output=True).check().findings[0].kind
    'jump'
    """

    kind: str
    is_doubt: bool
    t: float | None
    message: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What ``Solution.check`` has found. ``str`` of it is a summary, notebooks show a table.

    - ``findings``: reasons to doubt the solution, then reasons to compute it otherwise; empty if there are none.
    - ``facts``: pairs of a name and words: how the solve ended, standard deviations, where it worked hardest.
    - ``not_looked_at``: what could not be looked at, and why.
    - ``t``: the ends of the accepted steps, from the start on, ``(rows,)``.
    - ``std``: the largest standard deviation of a component there over what the tolerances allow, ``(rows,)``; of the
      filtering distributions, also for smoothers.
    - ``growth``: how large errors of the size that the tolerances allow in a step have become, ``(rows,)``, in the same
      unit; ``None`` without a Jacobian.
    - ``residual_t``, ``residual``: the error that the residual of the predicted mean would cause, in the same unit, at
      many times, ``(points,)``.
    - ``eigenvalues_t``, ``eigenvalues``: those of the Jacobian at some of the ends of steps, ``(some, p)``.

    Arrays are empty where nothing was looked at.

    >>> import probode
    >>> report = probode.solve_ivp(lambda t, u, args: -u, (0.0, 1.0), 1.0, dense_output=True).check()
    >>> report.is_trusted, report.findings
    (True, ())
    """

    findings: tuple[Finding, ...]
    facts: tuple[tuple[str, str], ...]
    not_looked_at: tuple[str, ...]
    t: Float[np.ndarray, " rows"]
    std: Float[np.ndarray, " rows"]
    growth: Float[np.ndarray, " rows"] | None
    residual_t: Float[np.ndarray, " points"]
    residual: Float[np.ndarray, " points"]
    eigenvalues_t: Float[np.ndarray, " some"]
    eigenvalues: np.ndarray

    @property
    def is_trusted(self) -> bool:
        """Whether the steps were looked at, and there is no reason to doubt the numbers."""
        return self.t.size > 0 and not any(finding.is_doubt for finding in self.findings)

    def _rows(self):
        rows = [(finding.kind, f"{finding.message} {finding.remedy}".strip()) for finding in self.findings]
        return [*rows, *self.facts, *(("not looked at", words) for words in self.not_looked_at)]

    def _verdict(self):
        doubts = sum(finding.is_doubt for finding in self.findings)
        if doubts:
            return f"{doubts} reason{'s' if doubts > 1 else ''} to doubt this solution"
        if not self.t.size:
            return "The steps of this solution were not looked at"
        return "No reason was found to doubt this solution" + (", but it could cost less" if self.findings else "")

    def __str__(self) -> str:
        return f"{self._verdict()}\n{describe.as_text(self._rows())}"

    def _repr_html_(self):
        return describe.as_html(html.escape(self._verdict()), self._rows())

    def plot(self, ax: Any = None) -> Any:
        """The axes ``ax`` (new ones by default) with standard deviations, residuals and grown errors over time.

        All are in units of what the tolerances allow; dotted lines are at the times of findings. Raises ``ImportError``
        without matplotlib.
        """
        ax = new_axes(ax)
        order = np.argsort(self.residual_t)
        for name, t, y, look in (
            ("residual of the prediction", self.residual_t[order], self.residual[order], {"linewidth": 0.5}),
            ("standard deviation", self.t, self.std, {}),
            ("error of the size of the tolerances, grown", self.t, self.growth, {"linestyle": "--"}),
        ):
            if y is not None and y.size:
                ax.semilogy(t, np.where(y > 0, y, np.nan), label=name, **look)
        for finding in self.findings:
            if finding.t is not None:
                ax.axvline(finding.t, color="0.6", linestyle=":", linewidth=0.8)
                ax.annotate(finding.kind, (finding.t, 1), xycoords=("data", "axes fraction"), rotation=90, va="top")
        ax.axhline(1, color="0.6", linewidth=0.8)
        ax.set_xlabel("time")
        ax.set_ylabel("in units of the tolerances")
        ax.legend(frameon=False)
        return ax
