"""Tokens: their numbers against numpy, their number, and the frozen text encoder."""

import math

import numpy as np
import pytest
import torch
from tiny_model import write_bert

from ldm4ts_kernels.model.conditioning import (
    Conditioner,
    TextConditioner,
    spectrum,
    top_lags,
    window_statistics,
)
from ldm4ts_kernels.model.config import LDM4TSConfig

LENGTH, VARIATES, WIDTH = 48, 3, 32


def windows(batch: int = 2) -> torch.Tensor:  # (B, L, V)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, LENGTH, VARIATES, generator=generator).cumsum(dim=1)


def sine(period: int) -> torch.Tensor:  # (1, L, 1)
    return torch.sin(2 * math.pi * torch.arange(LENGTH) / period).reshape(1, LENGTH, 1)


def test_spectrum_is_numpys_of_the_hann_windowed_series():
    series = windows()
    hann = np.hanning(LENGTH + 1)[:-1]  # periodic
    expected = np.fft.rfft(series.numpy() * hann[:, None], axis=1, norm="ortho")
    actual = spectrum(series).mT  # (B, 2 * frequencies, V)
    np.testing.assert_allclose(actual[:, :25], expected.real, atol=1e-5)
    np.testing.assert_allclose(actual[:, 25:], expected.imag, atol=1e-5)


def test_the_period_of_a_sine_is_among_its_top_lags():
    assert 12 in top_lags(sine(period=12))


def test_top_lags_are_numpys_largest_autocorrelations():
    series = windows()
    actual = top_lags(series)
    for b in range(len(series)):
        for v in range(VARIATES):
            centred = (series[b, :, v] - series[b, :, v].mean()).double().numpy()
            correlation = np.correlate(centred, centred, mode="full")[LENGTH:]  # lags 1, 2, ...
            expected = np.argsort(-correlation)[:5] + 1
            np.testing.assert_array_equal(actual[b, v], expected)


def test_statistics_of_a_line_are_its_ends_its_middle_and_its_rise():
    line = torch.linspace(-4, 0, LENGTH).reshape(1, LENGTH, 1)
    low, high, median, last, trend = window_statistics(line)[0, 0, :5].tolist()
    assert (low, high) == (-4, 0)
    assert median == pytest.approx(-2, abs=0.1)
    assert last == pytest.approx(2)
    assert trend == pytest.approx(4, rel=1e-5)


def test_constant_windows_give_finite_tokens():
    tokens = Conditioner(LENGTH, VARIATES, WIDTH)(torch.zeros(2, LENGTH, VARIATES))
    assert tokens.isfinite().all()


def test_each_variate_brings_two_tokens():
    assert Conditioner(LENGTH, VARIATES, WIDTH)(windows(4)).shape == (4, 2 * VARIATES, WIDTH)


def test_even_one_variate_gives_cross_attention_two_keys():
    assert Conditioner(LENGTH, 1, WIDTH)(windows()[..., :1]).shape[1] == 2


def test_tokens_depend_on_the_window_and_on_which_variate_it_is():
    conditioner = Conditioner(LENGTH, VARIATES, WIDTH)
    series = windows()
    tokens = conditioner(series)
    assert not torch.allclose(tokens[0], tokens[1])
    swapped = conditioner(series[..., [1, 0, 2]])
    assert not torch.allclose(swapped[:, 0], tokens[:, 1])


def test_statistics_are_exact_under_autocast():
    conditioner = Conditioner(LENGTH, VARIATES, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = conditioner(windows())
    torch.testing.assert_close(tokens.float(), conditioner(windows()), atol=0.1, rtol=0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return write_bert(tmp_path_factory.mktemp("bert"))


def text_conditioner(name: str) -> TextConditioner:
    return TextConditioner(
        name,
        LDM4TSConfig(
            history=LENGTH,
            variates=VARIATES,
            targets=(0, 2),
            horizons=(1, 8),
            cross_attention_dim=WIDTH,
            text_encoder=name,
            prompt="Power of a plant.",
        ),
    )


def test_a_text_encoder_adds_one_token(bert):
    conditioner = Conditioner(LENGTH, VARIATES, WIDTH, text_conditioner(bert))
    assert conditioner(windows()).shape == (2, 2 * VARIATES + 1, WIDTH)


def test_the_text_encoder_is_frozen_and_its_projection_is_not(bert):
    text = text_conditioner(bert).train()
    text.projection(text(window_statistics(windows()))).square().sum().backward()
    assert not text.encoder.training
    assert all(parameter.grad is None for parameter in text.encoder.parameters())
    assert text.projection.weight.grad.abs().max() > 0


def test_the_token_of_a_text_does_not_depend_on_its_neighbours_padding(bert):
    text = text_conditioner(bert).eval()
    statistics = window_statistics(windows())
    torch.testing.assert_close(text(statistics)[:1], text(statistics[:1]), atol=1e-5, rtol=1e-5)


def test_the_prompt_tells_the_data_the_task_and_the_statistics(bert):
    rising = torch.linspace(-4, 0, LENGTH).reshape(1, LENGTH, 1).expand(1, LENGTH, VARIATES)
    (prompt,) = text_conditioner(bert).write_prompts(window_statistics(rising))
    for part in (
        "Power of a plant.",
        "1 to 8 steps",
        "last 48",
        "-4.00",
        "upward",
        "1, 2, 3, 4, 5",
    ):
        assert part in prompt


def test_a_path_without_an_encoder_is_an_error_that_names_it(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"text_encoder '.*nothing'"):
        text_conditioner(str(tmp_path / "nothing"))
