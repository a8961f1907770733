"""A window of a time series as an image: segmentation, Gramian angular field, recurrence plot.

LDM4TS (arXiv 2502.14887), equations 1 to 5; one view a channel. Everything is batched over windows
and variates and stays on the series' device, in float32 whatever autocast says.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_to_unit(
    series: Tensor,  # (B, L, V)
) -> Tensor:
    """Return (x - min) / (max - min) over the window, per variate; 0 where a variate is constant.

    Equation 1. Shape (B, L, V), values in [0, 1].
    """
    low, high = series.aminmax(dim=-2, keepdim=True)
    return (series - low) / (high - low).clamp_min(torch.finfo(series.dtype).tiny)


def segmentation(
    series: Tensor,  # (B, L, V)
    period: int,  # rows per season
) -> Tensor:
    """Return the mean over variates, folded into one season a row: (B, ceil(L / period), period).

    Equation 2. The first row is padded in front with the first value, so that the last row ends
    with the latest one.
    """
    mean = series.mean(dim=-1)  # (B, L)
    seasons = math.ceil(mean.shape[-1] / period)
    missing = seasons * period - mean.shape[-1]
    padded = torch.cat([mean[:, :1].expand(-1, missing), mean], dim=-1)
    return padded.reshape(-1, seasons, period)


def gramian_angular_field(
    series: Tensor,  # (B, L, V)
) -> Tensor:
    """Return the summation field, mean over v of cos(θ_iv + θ_jv), with θ = arccos(x): (B, L, L).

    x is the series scaled to [-1, 1] per variate. Equation 3; for one variate this is pyts'
    GramianAngularField(method="summation").
    """
    unit = scale_to_unit(series)  # (B, L, V)
    cosine = 2 * unit - 1
    sine = 2 * (unit * (1 - unit)).sqrt()  # 1 - cosine² would cancel near ± 1
    # cos(a + b) = cos a cos b - sin a sin b: the mean over variates is two matrix products.
    field = cosine @ cosine.mT - sine @ sine.mT
    return field / series.shape[-1]


def recurrence_plot(
    series: Tensor,  # (B, L, V)
) -> Tensor:
    """Return the Gaussian recurrence plot exp(-d_ij² / 2), d_ij = ‖x_i - x_j‖ over V: (B, L, L).

    Equation 4 (the paper's appendix has a threshold instead, equation 57). d is the distance of
    pyts' RecurrencePlot, whose trajectories take the place of the variates.
    """
    # By differences: the matrix-product form of the distance cancels for close points.
    distance = torch.cdist(series, series, compute_mode="donot_use_mm_for_euclid_dist")
    return (-distance.square() / 2).exp()


def encode_vision(
    series: Tensor,  # (B, L, V)
    image_size: tuple[int, int],
    period: int,
) -> Tensor:
    """Return the three views of every window as the channels of one image: (B, 3, height, width).

    Channels: segmentation, Gramian angular field (mapped to (g + 1) / 2) and recurrence plot, each
    of the series scaled per window and variate, each in [0, 1], resized bilinearly with
    antialiasing. float32. Equation 5. No gradient is taken through the series.
    """
    with torch.no_grad(), torch.autocast(series.device.type, enabled=False):
        unit = scale_to_unit(series.float())
        views = (
            segmentation(unit, period),
            (gramian_angular_field(unit) + 1) / 2,
            recurrence_plot(unit),
        )
        resized = [
            F.interpolate(view[:, None], size=image_size, mode="bilinear", antialias=True)
            for view in views
        ]
        return torch.cat(resized, dim=1)  # (B, 3, height, width)
