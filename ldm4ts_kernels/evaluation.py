"""A trained model's scores beside the naive forecasts', over the same windows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels.data import Windows
from ldm4ts_kernels.metrics import (
    crps_from_samples,
    last_value_forecast,
    mean_absolute_error,
    mean_squared_error,
    seasonal_naive_forecast,
)
from ldm4ts_kernels.model import LDM4TSModel

# Images denoised together, of latents up to that size: bounds the memory, not what is found.
DRAWS_AT_ONCE, LATENT_PIXELS = 64, 28 * 28
FORECASTERS = ("ldm4ts", "last value", "seasonal naive")


@dataclass(frozen=True)
class Evaluation:
    """Scores over `windows` of a part's `windows_in_all`, evenly spaced, in scaled units.

    scores: {forecaster: {"mse", "mae", "crps"}}; a point forecast's CRPS is its MAE. mse and mae
    are those of the model's point forecast, one draw's location; crps is that of `samples` draws.
    """

    windows: int
    windows_in_all: int
    samples: int
    sampling_steps: int
    scores: dict[str, dict[str, float]]


def evaluate(
    model: LDM4TSModel,
    windows: Windows,
    count: int,
    samples: int,
    sampling_steps: int,
    seed: int,
    on_batch: Callable[[int, int], Any] | None = None,
) -> Evaluation:
    """Score `count` evenly spaced windows; `samples` = 1 leaves the draws, and CRPS = MAE, out.

    on_batch(done, count) is called after each batch of windows; what it raises ends the scoring.
    """
    count = min(count, len(windows))
    chosen = torch.linspace(0, len(windows) - 1, count).round().long().tolist()
    generator = torch.Generator().manual_seed(seed)
    totals = {name: dict.fromkeys(("mse", "mae", "crps"), 0.0) for name in FORECASTERS}
    _, height, width = model.latent_shape
    fewer = min(1.0, LATENT_PIXELS / (height * width))
    at_once = max(1, int(fewer * DRAWS_AT_ONCE) // samples)
    for start in range(0, count, at_once):
        batch = [windows[index] for index in chosen[start : start + at_once]]
        history = torch.stack([window["history"] for window in batch])  # (B, L, V)
        future = torch.stack([window["future"] for window in batch])  # (B, T, C)
        forecasts = _forecasts(model, history, samples, sampling_steps, generator)
        for name, (point, draws) in forecasts.items():
            total = totals[name]
            total["mse"] += mean_squared_error(point, future) * len(batch)
            total["mae"] += mean_absolute_error(point, future) * len(batch)
            total["crps"] += crps_from_samples(draws, future) * len(batch)
        if on_batch is not None:
            on_batch(start + len(batch), count)
    scores = {
        name: {score: value / count for score, value in total.items()}
        for name, total in totals.items()
    }
    return Evaluation(count, len(windows), samples, sampling_steps, scores)


def _forecasts(
    model: LDM4TSModel,
    history: Tensor,  # (B, L, V)
    samples: int,
    sampling_steps: int,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by forecaster its point forecast (B, T, C) and its draws (S, B, T, C)."""
    config = model.config
    locations, draws = model.draw(history, samples, sampling_steps, generator)
    point, draws = locations[0].cpu(), draws.cpu()  # (B, T, C), (S, B, T, C)
    last = last_value_forecast(history, config.horizons, config.targets)
    season = seasonal_naive_forecast(history, config.horizons, config.targets, config.period)
    points = (last, season)
    naive = {name: (p, p[None]) for name, p in zip(FORECASTERS[1:], points, strict=True)}
    return {FORECASTERS[0]: (point, draws), **naive}
