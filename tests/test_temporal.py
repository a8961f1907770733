"""The temporal path, the gate, the head, and the score that trains the head's scale."""

import math

import pytest
import torch

from ldm4ts_kernels.model.config import LDM4TSConfig
from ldm4ts_kernels.model.temporal import (
    ForecastHead,
    GatedFusion,
    TemporalEncoder,
    VisualHead,
    gaussian_crps,
)

CONFIG = LDM4TSConfig(
    history=24,
    variates=3,
    targets=(2, 0),
    horizons=(1, 4, 9),
    image_size=(32, 48),
    d_model=16,
    encoder_heads=2,
    d_ff=32,
    patch_length=8,
    patch_stride=4,
    fusion_width=24,
)


def windows(batch: int = 2) -> torch.Tensor:  # (B, L, C)
    return torch.randn(batch, 24, 2, generator=torch.Generator().manual_seed(0))


def test_each_target_is_encoded_from_its_own_history_alone():
    encoder = TemporalEncoder(CONFIG).eval()
    series = windows()
    encoded = encoder(series)
    assert encoded.shape == (2, 2, 24)
    series[..., 1] += 1.0
    changed = encoder(series)
    torch.testing.assert_close(changed[:, 0], encoded[:, 0])
    assert not torch.allclose(changed[:, 1], encoded[:, 1])


@pytest.mark.parametrize("length, stride", [(8, 4), (24, 8), (7, 5), (3, 1), (5, 9)])
def test_every_patching_sees_the_newest_row(length, stride):
    fields = {**vars(CONFIG), "patch_length": length, "patch_stride": stride}
    encoder = TemporalEncoder(LDM4TSConfig(**fields)).eval()
    series = windows().requires_grad_()
    encoder(series).square().sum().backward()
    assert series.grad[:, -1].abs().min() > 0


def test_visual_features_tell_targets_apart():
    features = VisualHead(CONFIG)(torch.rand(2, 3, 32, 48))
    assert features.shape == (2, 2, 24)
    assert not torch.allclose(features[:, 0], features[:, 1])


def test_the_gate_mixes_the_two_paths_convexly():
    temporal, visual = torch.randn(2, 5, 2, 24)
    fused = GatedFusion(24)(temporal, visual)
    assert (fused >= torch.minimum(temporal, visual) - 1e-6).all()
    assert (fused <= torch.maximum(temporal, visual) + 1e-6).all()
    torch.testing.assert_close(GatedFusion(24)(temporal, temporal), temporal)  # g + (1 - g) = 1


def test_an_untrained_head_gives_location_zero_and_a_positive_scale():
    location, scale = ForecastHead(24, horizons=3)(torch.randn(5, 2, 24))
    assert location.shape == scale.shape == (5, 3, 2)
    assert (location == 0).all() and (scale > 0).all()


def test_crps_is_the_integral_of_the_squared_difference_of_distributions():
    location, scale, value = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    x = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    distribution = torch.special.ndtr((x - location) / scale)
    expected = torch.trapezoid((distribution - (x >= value).double()).square(), x)
    torch.testing.assert_close(gaussian_crps(location, scale, value), expected, atol=1e-4, rtol=0)


def test_crps_is_least_at_the_true_scale():
    values = 1.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0])
    scores = gaussian_crps(torch.zeros(1), scales[:, None], values).mean(dim=1)
    assert scales[scores.argmin()] == 1.5


def test_crps_of_a_sharp_forecast_is_the_absolute_error():
    score = gaussian_crps(torch.tensor(1.0), torch.tensor(1e-6), torch.tensor(3.0))
    assert math.isclose(score, 2.0, rel_tol=1e-5)
