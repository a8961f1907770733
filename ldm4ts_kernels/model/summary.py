"""What a forecast says of its draws: mean, spread and quantiles."""

import torch
from torch import Tensor

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


def summarise_draws(
    locations: Tensor,  # (S, B, T, C)
    draws: Tensor,  # (S, B, T, C)
) -> dict[str, Tensor]:
    """Return the locations' mean, and the draws' std, q05, q50 and q95: (B, T, C) each."""
    statistics = {"mean": locations.mean(dim=0), "std": draws.std(dim=0, correction=0)}
    ordered = draws.sort(dim=0).values
    for name, level in QUANTILES.items():
        statistics[name] = _interpolate(ordered, level)
    return statistics


def _interpolate(
    ordered: Tensor,  # (S, ...), ascending
    level: float,
) -> Tensor:
    """Return the quantile between the two nearest draws; torch.quantile ends at 16 M values."""
    position = level * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)
