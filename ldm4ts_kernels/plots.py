"""A forecast as a picture: quantile fans over the history, one panel a target."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

FAN = "tab:blue"
HISTORY = "0.25"
ACTUAL = "tab:orange"
PANELS_ACROSS = 2


def save_fan_chart(
    path: str | Path,
    history: np.ndarray,  # (L, C)
    horizons: Sequence[int],  # T
    quantiles: np.ndarray,  # (Q, T, C), from the lowest level up
    levels: Sequence[float],  # Q, symmetric about the median in the middle
    names: Sequence[str],  # C
    title: str,
    actual: np.ndarray | None = None,  # (T, C)
) -> None:
    """Draw the quantiles at the horizons as nested bands around the median, and save the picture.

    The x axis counts rows from the last known one, which is 0; the bands open from its value.
    The suffix of path chooses the format (.png, .pdf, .svg). Raises ValueError for another one and
    for shapes that do not fit each other.
    """
    from matplotlib.figure import Figure

    shape = (len(levels), len(horizons), len(names))
    if quantiles.shape != shape or history.shape[1:] != shape[2:] or len(levels) % 2 == 0:
        raise ValueError(
            f"quantiles: expected {shape} for an odd number of levels, the horizons and the names, "
            f"got {quantiles.shape} with history {history.shape}"
        )
    across = min(PANELS_ACROSS, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(1 + 6 * across, 0.8 + 2.8 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for index, (panel, name) in enumerate(zip(panels, names, strict=False)):
        past = np.arange(1 - len(history), 1)
        panel.plot(past, history[:, index], color=HISTORY, linewidth=1, label="history")
        _draw_fan(panel, history[-1, index], horizons, quantiles[:, :, index], levels)
        if actual is not None:
            style = "o-" if len(horizons) <= 12 else "-"
            panel.plot(
                horizons, actual[:, index], style, color=ACTUAL, linewidth=1, ms=4, label="actual"
            )
        panel.set_title(name, fontsize=10)
        panel.grid(alpha=0.2)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=8, loc="best")
    figure.suptitle(title, fontsize=11)
    figure.supxlabel("rows after the last known one", fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_fan(
    panel: object,
    last: float,
    horizons: Sequence[int],
    quantiles: np.ndarray,  # (Q, T)
    levels: Sequence[float],
) -> None:
    ahead = [0, *horizons]
    opened = np.concatenate([np.full((len(levels), 1), last), quantiles], axis=1)  # (Q, 1 + T)
    middle = len(levels) // 2
    for low in range(middle):
        share = levels[-1 - low] - levels[low]
        panel.fill_between(  # type: ignore[attr-defined]
            ahead,
            opened[low],
            opened[-1 - low],
            color=FAN,
            alpha=0.2 + 0.15 * low,  # darker inwards, so that the legend tells the bands apart
            linewidth=0,
            label=f"{share:.0%} of draws",
        )
    style = "o-" if len(horizons) <= 12 else "-"
    panel.plot(  # type: ignore[attr-defined]
        ahead, opened[middle], style, color=FAN, linewidth=1.2, ms=4, label="median"
    )
