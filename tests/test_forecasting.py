"""A run's forecast is in the table's units and starts where the table ends."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_config

from ldm4ts_kernels.data import OptionError, load_series
from ldm4ts_kernels.forecasting import LEVELS, find_forecasters, forecast
from ldm4ts_kernels.panel.run_state import read_run
from ldm4ts_kernels.training import TrainingInterrupted, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("run"))
    train(config)
    return config


def test_quantiles_are_ordered_and_near_the_last_value(run):
    result = forecast(run.output, samples=20, sampling_steps=2)
    series = load_series(run.data)
    assert result.quantiles.shape == (len(LEVELS), 2, 1)
    assert (np.diff(result.quantiles, axis=0) >= 0).all()
    assert result.last == series.timestamps[-1]
    assert np.array_equal(result.history, series.values[-24:, 2:])
    assert np.abs(result.quantiles[2] - series.values[-1, 2]).max() < 10 * series.values[:, 2].std()
    assert result.actual is None


def test_rows_held_out_are_the_actual_values(run):
    result = forecast(run.output, hold_out=4, samples=4, sampling_steps=1)
    values = load_series(run.data).values
    assert result.actual is not None
    assert result.actual[:, 0].tolist() == [values[-4, 2], values[-1, 2]]
    assert np.array_equal(result.history, values[-28:-4, 2:])


def test_the_frame_has_a_row_a_target_and_horizon(run):
    frame = forecast(run.output, hold_out=4, samples=4, sampling_steps=1).to_frame()
    columns = ["target", "ahead", "q05", "q25", "q50", "q75", "q95", "actual"]
    assert list(frame.columns) == columns
    assert frame[["target", "ahead"]].values.tolist() == [["c", 1], ["c", 4]]


def test_a_seed_repeats_the_draws(run):
    first, same, other = (
        forecast(run.output, samples=5, sampling_steps=1, seed=seed).quantiles for seed in (1, 1, 2)
    )
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_a_newer_file_is_forecast_with_the_scaler_of_the_run(run, tmp_path):
    lines = Path(str(run.data.path)).read_text().splitlines()
    newer = tmp_path / "newer.csv"
    newer.write_text("\n".join([lines[0], *lines[50:]]))
    options = {"samples": 4, "sampling_steps": 1}
    whole, tail = forecast(run.output, **options), forecast(run.output, str(newer), **options)
    assert np.array_equal(whole.quantiles, tail.quantiles)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold_out": -1}, "hold_out: expected 0 .. 216 rows, got -1"),
        ({"hold_out": 217}, "hold_out: expected 0 .. 216 rows, got 217"),
        ({"samples": 1}, "samples: expected at least 2 draws"),
    ],
)
def test_a_wrong_option_is_named(run, options, message):
    with pytest.raises(OptionError, match=message):
        forecast(run.output, **options)


def test_an_unfinished_run_forecasts_from_its_newest_checkpoint(run, tmp_path):
    config = replace(run, output=str(tmp_path / "cut"))
    with pytest.raises(TrainingInterrupted):
        train(config, lambda report: report.stage == "autoencoder")
    with pytest.raises(OptionError, match="autoencoder only"):
        forecast(config.output)
    with pytest.raises(TrainingInterrupted):
        train(replace(config, resume=True), lambda report: report.stage == "forecaster")
    result = forecast(config.output, samples=2, sampling_steps=1)
    assert result.model_path == tmp_path / "cut" / "checkpoints" / "forecaster-1" / "model"


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(OptionError, match="holds no run"):
        forecast(tmp_path)


def test_a_checkpoint_forecasts_when_it_is_named(tmp_path):
    config = tiny_config(tmp_path, steps=4)
    seen = []

    def stop_at_two(report):
        seen.append(report)
        return report.stage == "forecaster" and report.step == 2

    with pytest.raises(TrainingInterrupted):
        train(replace(config, log_every=1), stop_at_two)
    names = find_forecasters(config.output)
    assert names[-1] == "forecaster-2"
    made = forecast(config.output, samples=4, sampling_steps=1, checkpoint="forecaster-2")
    assert made.model_path.parent.name == "forecaster-2"
    with pytest.raises(OptionError, match=r"checkpoint: .*forecaster-2.*got 'forecaster-9'"):
        forecast(config.output, checkpoint="forecaster-9")


def test_a_run_says_which_backend_served_each_layer(run):
    shown = read_run(Path(run.output))
    assert shown is not None
    servers = {name.partition(": ")[0]: server for name, server in shown.layers.items()}
    assert servers == {"autoencoder": "sdpa", "forecaster": "sdpa"}
    last = [record for record in shown.records if record.get("attention")][-1]
    layers = [name for name in shown.layers if name.startswith("forecaster")]
    assert last["attention"] == f"sdpa ×{len(layers)}"
