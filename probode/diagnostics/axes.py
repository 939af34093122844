"""Axes of matplotlib (the ``plot`` extra), which is imported when the first picture is drawn."""

from typing import Any


def new_axes(ax: Any) -> Any:
    """The axes ``ax``, or new ones for ``None``; raises ``ImportError`` without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'probode[plot]'.") from error
    return plt.figure(layout="constrained").add_subplot() if ax is None else ax
