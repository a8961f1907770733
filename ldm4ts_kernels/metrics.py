"""Scores of a forecast, and the two naive forecasts that it has to beat.

S draws, B windows, L history, T horizons, C targets, V variates. Every score is a mean over all
its elements, in the units of its input.
"""

import torch
from torch import Tensor


def mean_squared_error(
    forecast: Tensor,  # (B, T, C)
    actual: Tensor,  # (B, T, C)
) -> float:
    """Mean of (forecast - actual)^2."""
    return float((forecast.double() - actual.double()).square().mean())


def mean_absolute_error(
    forecast: Tensor,  # (B, T, C)
    actual: Tensor,  # (B, T, C)
) -> float:
    """Mean of |forecast - actual|."""
    return float((forecast.double() - actual.double()).abs().mean())


def crps_from_samples(
    samples: Tensor,  # (S, B, T, C)
    actual: Tensor,  # (B, T, C)
) -> float:
    """Mean of E|X - y| - E|X - X'| / 2, the continuous ranked probability score of S draws.

    The second mean runs over pairs of different draws, which makes the estimate unbiased ("fair")
    for any S >= 2. A single draw has no pair: the score is then the mean absolute error. Lower is
    better, 0 is perfect; the fair estimate can fall below 0 by chance. Raises ValueError for no
    draws. Gneiting & Raftery 2007, eq. 21; the fair estimator is Ferro's
    (2014).
    """
    count = len(samples)
    if count == 0:
        raise ValueError("samples: expected at least one draw, got none")
    distance = mean_absolute_error(samples, actual.expand_as(samples))
    if count == 1:
        return distance
    # Sorted, x_(i) is the larger of i pairs and the smaller of count - 1 - i.
    ranked = samples.double().sort(dim=0).values
    weight = 2 * torch.arange(count, device=samples.device, dtype=torch.float64) - (count - 1)
    pairs = torch.tensordot(weight, ranked, dims=1)  # (B, T, C): sum over pairs of |x - x'|
    return distance - float(pairs.mean()) / (count * (count - 1))


def last_value_forecast(
    history: Tensor,  # (B, L, V)
    horizons: tuple[int, ...],
    targets: tuple[int, ...],
) -> Tensor:  # (B, T, C)
    """Repeat the last known value at every horizon: the best forecast of a random walk."""
    return history[:, -1:, list(targets)].expand(-1, len(horizons), -1)


def seasonal_naive_forecast(
    history: Tensor,  # (B, L, V)
    horizons: tuple[int, ...],
    targets: tuple[int, ...],
    period: int,
) -> Tensor:  # (B, T, C)
    """Repeat the last known season: horizon h gets the row L - period + (h - 1) mod period.

    Raises ValueError if the history is shorter than one season.
    """
    length = history.shape[1]
    if not 1 <= period <= length:
        raise ValueError(f"period: expected 1 .. {length}, the rows of history, got {period}")
    rows = [length - period + (horizon - 1) % period for horizon in horizons]
    return history[:, rows][:, :, list(targets)]
