"""Windows cut in time order, a scaler that sees the training part only, and errors that point."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ldm4ts_kernels.data import ETT, DataConfig, Scaler, load_series, load_splits

CSV = DataConfig(name="csv", timestamp="time", targets=("b",), history=8, horizons=(1, 3), period=4)


def table(rows: int = 100, columns: tuple[str, ...] = ("a", "b")) -> pd.DataFrame:
    """Column k of row i holds 1000 k + i, so that a window's values tell where it was cut."""
    times = pd.date_range("2020-01-01", periods=rows, freq="h")
    values = {name: 1000.0 * k + np.arange(rows) for k, name in enumerate(columns)}
    return pd.DataFrame({"time": times, **values})


def write(directory: Path, frame: pd.DataFrame) -> str:
    path = directory / "series.csv"
    frame.to_csv(path, index=False)
    return str(path)


def with_path(path: str | None, **changes: object) -> DataConfig:
    return DataConfig(**{**CSV.__dict__, "path": path, **changes})


def error_of(config: DataConfig) -> str:
    with pytest.raises(ValueError) as caught:
        load_splits(config)
    return str(caught.value)


def test_a_window_holds_history_and_the_targets_at_the_horizons(tmp_path):
    splits = load_splits(with_path(write(tmp_path, table())))
    window = splits.train[5]
    history = splits.scaler.inverse(window["history"], (0, 1))
    future = splits.scaler.inverse(window["future"], (1,))
    assert window["history"].dtype == window["future"].dtype == torch.float32
    assert history.round().tolist() == [[5.0 + i, 1005.0 + i] for i in range(8)]
    assert future.round().tolist() == [[1013.0], [1015.0]]


def test_parts_are_chronological_and_only_histories_overlap(tmp_path):
    splits = load_splits(with_path(write(tmp_path, table())))

    def futures(windows):
        scaled = torch.cat([window["future"] for window in windows])
        return set(splits.scaler.inverse(scaled, (1,)).round().int().flatten().tolist())

    parts = [futures(part) for part in (splits.train, splits.validation, splits.test)]
    assert [(min(part) - 1000, max(part) - 1000) for part in parts] == [(8, 69), (70, 79), (80, 99)]


def test_the_scaler_is_fitted_on_training_rows_only(tmp_path):
    frame = table()
    frame.loc[70:, ["a", "b"]] += 1e9
    splits = load_splits(with_path(write(tmp_path, frame)))
    train = frame.loc[:69, ["a", "b"]].to_numpy()
    assert splits.scaler == Scaler(tuple(train.mean(axis=0)), tuple(train.std(axis=0)))


def test_a_constant_column_scales_to_zero(tmp_path):
    splits = load_splits(with_path(write(tmp_path, table().assign(a=7.0))))
    assert splits.train.values[:, 0].abs().max() == 0


def test_volumes_of_billions_scale_to_the_order_of_one(tmp_path):
    frame = table().assign(a=lambda f: 8e9 + 1e6 * f["a"])
    splits = load_splits(with_path(write(tmp_path, frame)))
    assert 1 < float(splits.train.values[:, 0].abs().max()) < 5


def test_a_window_outside_the_part_is_an_error(tmp_path):
    windows = load_splits(with_path(write(tmp_path, table()))).test
    with pytest.raises(IndexError, match=f"window {len(windows)} of {len(windows)}"):
        windows[len(windows)]


@pytest.mark.parametrize("name", ["sp500", "nasdaq"])
def test_market_data_are_twenty_years_of_ohlcv_with_the_close_as_target(name):
    pytest.importorskip("arch")
    series = load_series(DataConfig(name=name))
    assert series.values.shape == (5031, 5)
    assert series.columns == ("Open", "High", "Low", "Close", "Volume")
    assert series.target_names == ("Close",)
    assert series.timestamps[0].year == 1999


def test_etth1_has_the_window_counts_of_the_benchmark(tmp_path):
    frame = table(17_420, ETT).rename(columns={"time": "date"})
    splits = load_splits(DataConfig(name="etth1", path=write(tmp_path, frame)))
    counts = [len(part) for part in (splits.train, splits.validation, splits.test)]
    assert counts == [8640 - 96 - 96 + 1, 2880 - 96 + 1, 2880 - 96 + 1]
    assert splits.train[0]["future"].shape == (96, 7)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (3, "a", None, "line 5, column 'a': the value is missing (1 in this column)"),
        (3, "b", "n.v.", "line 5, column 'b': expected a finite number, got 'n.v.'"),
        (0, "b", "inf", "line 2, column 'b': expected a finite number, got 'inf'"),
        (6, "time", "soon", "line 8, column 'time': expected a timestamp, got 'soon'"),
        (6, "time", None, "line 8, column 'time': expected a timestamp"),
        (6, "time", "2020-01-01 05:00:00", "line 8, column 'time': 2020-01-01 05:00:00 repeats"),
        (6, "time", "2020-01-01 02:00:00", "line 8, column 'time': 2020-01-01 02:00:00 is earlier"),
    ],
)
def test_a_bad_value_is_named_by_file_line_and_column(tmp_path, row, column, value, message):
    frame = table().astype(str)
    frame.loc[row, column] = value
    path = write(tmp_path, frame)
    assert error_of(with_path(path)).startswith(f"{path}, {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dax"}, "data: expected one of sp500, nasdaq, etth1, etth2, csv, got 'dax'"),
        ({"name": "sp500"}, "data 'sp500' is built in, takes no path"),
        ({"path": None}, "data 'csv' needs the path of its CSV file"),
        ({"path": "no/such.csv"}, "path: expected a CSV file, got 'no/such.csv'"),
        ({"timestamp": None}, "timestamp: name the column"),
        ({"targets": None}, "targets: name the columns to forecast"),
        ({"targets": ("c",)}, "targets: no column 'c'"),
        ({"columns": ("a",)}, "targets: b not among columns a"),
        ({"columns": ("b", "b")}, "columns: expected each name once"),
        ({"history": 1}, "history: expected at least 2 rows, got 1"),
        ({"horizons": (3, 1)}, "horizons: expected increasing steps of at least 1, got (3, 1)"),
        ({"horizons": (0, 1)}, "horizons: expected increasing steps of at least 1, got (0, 1)"),
        ({"period": 9}, "period: expected 1 .. history=8 rows, got 9"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, changes, message):
    config = with_path(**{"path": write(tmp_path, table()), **changes})
    assert message in error_of(config)


def test_a_part_without_a_window_is_named(tmp_path):
    path = write(tmp_path, table(20))
    assert error_of(with_path(path)).startswith(
        f"{path}: too short: 20 rows leave 10 to the validation part; history=8"
    )


def test_a_benchmark_file_shorter_than_its_split_is_an_error(tmp_path):
    path = write(tmp_path, table(500, ETT).rename(columns={"time": "date"}))
    assert error_of(DataConfig("etth1", path)) == (
        f"{path}: the split needs 14400 rows, the file has 500"
    )


def test_blank_lines_count_as_lines_but_not_at_the_end(tmp_path):
    path = tmp_path / "series.csv"
    text = table().to_csv(index=False)
    path.write_text(text + "\n\n")
    assert len(load_series(with_path(str(path))).values) == 100
    lines = text.splitlines()
    path.write_text("\n".join([*lines[:4], "", *lines[4:]]))
    assert f"{path}, line 5, column 'time'" in error_of(with_path(str(path)))


@pytest.mark.parametrize("broken", ["", "time,a,b\n1,2,3,4\n", "time,a\n2020,1\n2020,1,2,3\n"])
def test_a_malformed_file_is_named(tmp_path, broken):
    path = tmp_path / "series.csv"
    path.write_text(broken)
    assert error_of(with_path(str(path))).startswith(str(path))
