"""What ECharts draws for the panel: the loss curve and the quantile fan, as option dicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm4ts_kernels.panel.shown_forecast import ShownForecast

GREY = "#8a8f98"  # read on white and on black
BLUE, ORANGE, TEAL = "#3b82f6", "#f59e0b", "#14b8a6"
AXIS = {
    "axisLabel": {"color": GREY},
    "nameTextStyle": {"color": GREY},
    "splitLine": {"lineStyle": {"color": GREY, "opacity": 0.25}},
    "axisLine": {"onZero": False, "lineStyle": {"color": GREY}},
}
Curve = list[tuple[int, float]]


def loss_chart(autoencoder: Curve, forecaster: Curve) -> dict[str, Any]:
    """Draw the losses of both stages over their steps, on a logarithmic axis."""
    stages = (("autoencoder", autoencoder, TEAL), ("forecaster", forecaster, BLUE))
    return {
        **_frame("step"),
        "yAxis": {"type": "log", **AXIS},
        "series": [_line(name, curve, color) for name, curve, color in stages if curve],
    }


def fan_chart(forecast: ShownForecast, target: int) -> dict[str, Any]:
    """Draw a target's history, its quantiles as nested bands around the median, and what came.

    The x axis counts rows from the last known one, which is 0; the bands open from its value. A
    band is the difference of two quantiles, stacked on the lower one.
    """
    history = np.array(forecast.history)[:, target]  # (L,)
    quantiles = np.array(forecast.quantiles)[:, :, target]  # (Q, T)
    last = np.full((len(quantiles), 1), history[-1])
    opened = np.concatenate([last, quantiles], axis=1)
    ahead = [0, *forecast.horizons]
    middle = len(opened) // 2
    series = []
    for low in range(middle):
        share = forecast.levels[-1 - low] - forecast.levels[low]
        series += _band(f"{share:.0%}", ahead, opened[low], opened[-1 - low])
    past = zip(range(1 - len(history), 1), history.tolist(), strict=True)
    series.append(_line("history", list(past), GREY))
    series.append(_line("median", list(zip(ahead, opened[middle].tolist(), strict=True)), BLUE))
    if forecast.actual is not None:
        actual = [row[target] for row in forecast.actual]
        series.append(_line("actual", list(zip(forecast.horizons, actual, strict=True)), ORANGE))
    option = _frame("rows after the last known one")
    names = [name for name in dict.fromkeys(entry["name"] for entry in series) if name]
    option["legend"]["data"] = names
    return {**option, "series": series}


def _frame(x_name: str) -> dict[str, Any]:
    return {
        "animation": False,
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 8, "right": 16, "top": 40, "bottom": 24, "containLabel": True},
        "legend": {
            "top": 0,
            "type": "scroll",
            "icon": "roundRect",
            "itemWidth": 14,
            "itemHeight": 8,
            "textStyle": {"color": GREY},
        },
        "tooltip": {"trigger": "axis", "confine": True},
        "xAxis": {
            "type": "value",
            "name": x_name,
            "nameLocation": "middle",
            "nameGap": 24,
            "min": "dataMin",
            "max": "dataMax",
            **AXIS,
        },
        "yAxis": {"type": "value", "scale": True, **AXIS},
    }


def _line(name: str, points: Sequence[tuple[int, float]], color: str) -> dict[str, Any]:
    return {
        "type": "line",
        "name": name,
        "data": [[x, _rounded(y)] for x, y in points],
        "showSymbol": False,
        "lineStyle": {"color": color, "width": 2},
        "itemStyle": {"color": color},
    }


def _band(name: str, ahead: list[int], low: np.ndarray, high: np.ndarray) -> list[dict[str, Any]]:
    """Fill between two quantiles: a bare line at the lower one, and the rest stacked on it."""
    bare = {"type": "line", "showSymbol": False, "lineStyle": {"opacity": 0}, "silent": True}
    floor = {
        **bare,
        "name": "",
        "stack": name,
        "data": _pairs(ahead, low),
        "tooltip": {"show": False},
    }
    rest = {
        **bare,
        "name": name,
        "stack": name,
        "data": _pairs(ahead, high - low),
        "areaStyle": {"color": BLUE, "opacity": 0.22},
        "itemStyle": {"color": BLUE, "opacity": 0.4},
        "tooltip": {"show": False},  # its number is a width
    }
    return [floor, rest]


def _pairs(ahead: list[int], values: np.ndarray) -> list[list[float]]:
    return [[x, _rounded(y)] for x, y in zip(ahead, values, strict=True)]


def _rounded(value: float) -> float:
    """Keep the digits that a reader takes in."""
    return float(f"{value:.6g}")
