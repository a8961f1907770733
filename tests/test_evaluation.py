"""The model and the naive forecasts are scored over the same windows."""

import pytest
import torch
from tiny_model import ready, untrained

from ldm4ts_kernels import evaluation
from ldm4ts_kernels.data import Windows
from ldm4ts_kernels.evaluation import evaluate
from ldm4ts_kernels.metrics import mean_squared_error


def series(rows: int = 60) -> Windows:
    values = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)).cumsum(0)
    return Windows(values, history=24, horizons=(1, 4), targets=(2,))


def test_an_untrained_model_scores_as_the_last_value_does():
    model = untrained()
    model.freeze_autoencoder(torch.stack([series()[i]["history"] for i in range(3)]))
    scores = evaluate(model, series(), 5, samples=1, sampling_steps=2, seed=0).scores
    assert scores["ldm4ts"]["mse"] == pytest.approx(scores["last value"]["mse"], rel=1e-4)


def test_naive_scores_are_means_over_the_chosen_windows_whatever_the_batch():
    windows = series()
    chosen = [windows[index] for index in range(len(windows))]
    last = torch.stack([window["history"][-1:, 2:].expand(2, 1) for window in chosen])
    expected = mean_squared_error(last, torch.stack([window["future"] for window in chosen]))
    for samples in (1, 40):  # 40 draws leave one window a batch
        result = evaluate(ready(), windows, 1000, samples, sampling_steps=1, seed=0)
        assert result.windows == result.windows_in_all == len(windows)
        assert result.scores["last value"]["mse"] == pytest.approx(expected)


def test_a_point_forecasts_crps_is_its_absolute_error():
    scores = evaluate(ready(), series(), 4, samples=3, sampling_steps=1, seed=0).scores
    for name in ("last value", "seasonal naive"):
        assert scores[name]["crps"] == scores[name]["mae"]
    assert scores["ldm4ts"]["crps"] != scores["ldm4ts"]["mae"]


def test_the_same_seed_gives_the_same_scores_and_draws_nothing_else():
    state = torch.get_rng_state()
    first = evaluate(ready(), series(), 4, samples=2, sampling_steps=1, seed=0)
    torch.set_rng_state(state)
    model = ready()
    before = torch.get_rng_state()
    assert evaluate(model, series(), 4, samples=2, sampling_steps=1, seed=0) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_is_reported_by_windows():
    seen: list[tuple[int, int]] = []
    evaluate(ready(), series(), 5, 32, 1, seed=0, on_batch=lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_larger_latents_are_denoised_fewer_at_a_time(monkeypatch):
    monkeypatch.setattr(evaluation, "LATENT_PIXELS", 4 * 4)
    monkeypatch.setattr(evaluation, "DRAWS_AT_ONCE", 8)
    for side, batches in ((32, [(4, 5), (5, 5)]), (48, [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)])):
        seen: list[tuple[int, int]] = []
        model = ready(image_size=(side, side))
        evaluate(model, series(), 5, 2, 1, seed=0, on_batch=lambda *at, seen=seen: seen.append(at))
        assert seen == batches
