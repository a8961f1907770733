"""Scores against their definitions, and the naive forecasts row by row."""

import pytest
import torch

from ldm4ts_kernels import metrics


def test_squared_and_absolute_errors_are_means_over_all_elements():
    forecast, actual = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0], [5.0]]])
    assert metrics.mean_squared_error(forecast, actual) == 4.5
    assert metrics.mean_absolute_error(forecast, actual) == 1.5


def test_crps_equals_its_definition_over_all_pairs():
    torch.manual_seed(0)
    samples, actual = torch.randn(7, 3, 4, 2), torch.randn(3, 4, 2)
    pairs = (samples[:, None] - samples[None]).abs().sum(dim=(0, 1)) / (7 * 6)
    expected = ((samples - actual).abs().mean(0) - pairs / 2).mean()
    assert metrics.crps_from_samples(samples, actual) == pytest.approx(float(expected), rel=1e-5)


def test_crps_of_few_normal_draws_is_unbiased():
    """The closed form of a standard normal at y = 0 is (sqrt(2) - 1) / sqrt(pi)."""
    torch.manual_seed(0)
    samples = torch.randn(3, 200_000, 1, 1)
    crps = metrics.crps_from_samples(samples, torch.zeros(200_000, 1, 1))
    assert crps == pytest.approx((2**0.5 - 1) / torch.pi**0.5, abs=4e-3)


def test_crps_of_one_draw_is_the_absolute_error():
    samples, actual = torch.tensor([[[[2.0]]]]), torch.tensor([[[5.0]]])
    assert metrics.crps_from_samples(samples, actual) == 3.0


def test_crps_of_no_draw_is_an_error():
    with pytest.raises(ValueError, match="samples: expected at least one draw"):
        metrics.crps_from_samples(torch.empty(0, 1, 1, 1), torch.zeros(1, 1, 1))


def test_last_value_forecast_repeats_the_last_row_of_the_targets():
    history = torch.arange(12.0).view(1, 4, 3)
    forecast = metrics.last_value_forecast(history, horizons=(1, 7), targets=(2, 0))
    assert forecast.tolist() == [[[11.0, 9.0], [11.0, 9.0]]]


def test_seasonal_naive_forecast_is_exact_on_a_periodic_series():
    period, history, horizons = 5, 12, (1, 4, 5, 6, 13)
    series = (torch.arange(40) % period).float().view(1, -1, 1)
    forecast = metrics.seasonal_naive_forecast(series[:, :history], horizons, (0,), period)
    assert forecast.flatten().tolist() == [float(series[0, history + h - 1, 0]) for h in horizons]


def test_a_season_longer_than_the_history_is_an_error():
    with pytest.raises(ValueError, match=r"period: expected 1 \.\. 4"):
        metrics.seasonal_naive_forecast(torch.zeros(1, 4, 1), (1,), (0,), period=5)
