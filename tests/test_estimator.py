"""LDM4TS over long frames: what fit, predict, cross_validation, plot and saving promise."""

import numpy as np
import pandas as pd
import pytest
from tiny_model import TINY
from tiny_run import FROM_DATA

import ldm4ts_kernels
from ldm4ts_kernels.data import DataError, OptionError
from ldm4ts_kernels.estimator import LDM4TS, widen

FIELDS = {key: value for key, value in TINY.items() if key not in FROM_DATA}
OPTIONS = {
    "history": 24, "period": 6, "device": "cpu", "preset": "paper", "model_fields": FIELDS,
    "steps": 3, "autoencoder_steps": 2, "batch_size": 4, "eval_windows": 2, "eval_samples": 2,
    "sampling_steps": 1,
}  # fmt: skip
FAST = {"num_samples": 4, "sampling_steps": 1}


def long_frame(rows: int = 200, ids: tuple[str, ...] = ("a", "b")) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    days = pd.date_range("2024-01-01", periods=rows, freq="D")
    parts = [
        pd.DataFrame({"unique_id": name, "ds": days, "y": 10 + rng.standard_normal(rows).cumsum()})
        for name in ids
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> LDM4TS:
    return LDM4TS(h=3, directory=tmp_path_factory.mktemp("fit"), **OPTIONS).fit(long_frame())


def test_the_public_name_is_loaded_when_asked_for():
    assert ldm4ts_kernels.LDM4TS is LDM4TS
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = ldm4ts_kernels.nothing_of_this_name


def test_a_forecast_is_a_long_frame_after_the_last_row(fitted):
    found = fitted.predict(quantiles=(0.1, 0.5, 0.9), **FAST)
    quantiles = ["LDM4TS_ql0.1", "LDM4TS_ql0.5", "LDM4TS_ql0.9"]
    assert list(found.columns) == ["unique_id", "ds", "LDM4TS", *quantiles]
    assert list(found["unique_id"]) == ["a"] * 3 + ["b"] * 3
    days = pd.date_range("2024-07-19", periods=3, freq="D")
    assert list(found["ds"]) == [*days, *days]
    assert (found[quantiles].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert np.isfinite(found["LDM4TS"]).all()


def test_a_shorter_horizon_is_the_beginning_of_a_longer_one(fitted):
    whole, part = fitted.predict(**FAST), fitted.predict(h=2, **FAST)
    pd.testing.assert_frame_equal(whole.groupby("unique_id").head(2).reset_index(drop=True), part)


def test_the_same_seed_gives_the_same_draws(fitted):
    pd.testing.assert_frame_equal(fitted.predict(seed=1, **FAST), fitted.predict(seed=1, **FAST))
    assert not fitted.predict(seed=1, **FAST).equals(fitted.predict(seed=2, **FAST))


def test_another_frame_of_the_same_series_is_forecast_from_its_own_end(fitted):
    earlier = long_frame(100)
    assert fitted.predict(earlier, **FAST)["ds"].min() == pd.Timestamp("2024-04-10")
    with pytest.raises(DataError, match="expected the series a, b, got a, c"):
        fitted.predict(long_frame(100, ("a", "c")), **FAST)
    with pytest.raises(DataError, match="at least 24 rows, got 9"):
        fitted.predict(long_frame(9), **FAST)


def test_saving_and_loading_changes_no_forecast_and_pickles_nothing(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "saved")
    loaded = LDM4TS.from_pretrained(tmp_path / "saved", device="cpu")
    pd.testing.assert_frame_equal(loaded.predict(**FAST), fitted.predict(**FAST))
    suffixes = {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".csv", ".safetensors"}


def test_the_scores_stand_beside_the_naive_ones(fitted):
    assert set(fitted.scores.scores) == {"ldm4ts", "last value", "seasonal naive"}


def test_cross_validation_forecasts_what_the_model_has_not_seen(tmp_path):
    model = LDM4TS(h=2, directory=tmp_path, **OPTIONS)
    frame = long_frame()
    found = model.cross_validation(frame, n_windows=3, step_size=2, **FAST)
    assert len(model.table) == 200 - 2 - 2 * 2
    cutoffs = pd.to_datetime(["2024-07-12", "2024-07-14", "2024-07-16"])
    assert list(found["cutoff"].unique()) == list(cutoffs)
    assert (found["ds"] > found["cutoff"]).all()
    known = frame.set_index(["unique_id", "ds"])["y"]
    for row in found.itertuples():
        assert row.y == known[row.unique_id, row.ds]


def test_a_plot_is_a_picture(fitted, tmp_path):
    path = fitted.plot(tmp_path / "fan.png", **FAST)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda df: df.rename(columns={"y": "value"}), "expected the columns unique_id, ds, y"),
        (lambda df: pd.concat([df, df.iloc[:1]]), "'a' has 2024-01-01 00:00:00 more than once"),
        (lambda df: df.drop(index=3), "'a' has no finite value at 2024-01-04"),
        (lambda df: df.assign(y=np.inf), "'a' has no finite value at 2024-01-01"),
    ],
)
def test_a_frame_that_does_not_do_is_named(change, message):
    with pytest.raises(DataError, match=message):
        widen(change(long_frame(20)))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: LDM4TS(h=0), "h: expected at least 1 row, got 0"),
        (lambda: LDM4TS(h=1, output="x"), "output: is chosen by fit"),
        (lambda: LDM4TS(h=1).predict(), "not fitted yet"),
        (lambda: LDM4TS.from_pretrained("nowhere"), "nowhere holds no LDM4TS"),
    ],
)
def test_an_option_that_does_not_do_is_named(act, message):
    with pytest.raises(OptionError, match=message):
        act()


def test_bad_requests_of_a_fitted_model_are_named(fitted):
    for arguments, message in (
        ({"h": 4}, "h: expected 1 .. 3"),
        ({"num_samples": 1}, "num_samples: expected at least 2"),
        ({"quantiles": (0.5, 1.0)}, "quantiles: expected numbers between 0 and 1"),
    ):
        with pytest.raises(OptionError, match=message):
            fitted.predict(**arguments)


def test_uneven_timestamps_need_a_frequency(tmp_path):
    frame = long_frame(60, ("a",)).drop(index=[7, 9, 30])
    with pytest.raises(OptionError, match="freq: the timestamps have no even spacing"):
        LDM4TS(h=2, directory=tmp_path, **OPTIONS).fit(frame)
