"""LDM4TS over long frames (`unique_id`, `ds`, `y`): fit, predict, cross_validation, plot.

The series of a frame are the variates of one multivariate model, so they share their timestamps.
Training is `training.train` on a table with a column a series; nothing is pickled anywhere.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldm4ts_kernels.data import DataError, OptionError, Scaler
from ldm4ts_kernels.evaluation import Evaluation
from ldm4ts_kernels.forecasting import LEVELS
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.plots import save_fan_chart
from ldm4ts_kernels.runs import plan, read_scaler
from ldm4ts_kernels.training import OnStep, train

COLUMNS = ["unique_id", "ds", "y"]
NAME = "LDM4TS"  # of the forecast's columns
FILE = "estimator.json"


class LDM4TS:
    """Forecasts `h` rows of every series of a frame from its last `history` rows.

    Args:
        h: rows ahead, the longest horizon; all from 1 on are forecast.
        history: rows that the model sees.
        period: rows in a season, for the segmentation view.
        freq: of the timestamps, as pandas writes it; inferred where None.
        directory: where the training run is kept; a new temporary one where None.
        options: fields of `runs.TrainConfig`, such as steps, preset, device, vram_gb.

    `scores` holds the test scores of the last fit beside the naive forecasts'.
    """

    def __init__(
        self,
        h: int,
        history: int = 96,
        period: int = 24,
        freq: str | None = None,
        directory: str | Path | None = None,
        **options: Any,
    ) -> None:
        if h < 1:
            raise OptionError(f"h: expected at least 1 row, got {h}")
        for name in ("data", "output", "resume"):
            if name in options:
                raise OptionError(f"{name}: is chosen by fit, leave it out")
        self.h, self.history, self.period, self.freq = h, history, period, freq
        self.directory = None if directory is None else Path(directory)
        self.options = options
        self.scores: Evaluation | None = None
        self.model: LDM4TSModel | None = None
        self.scaler: Scaler
        self.table: pd.DataFrame  # (N, V): a column a series, of the last fit

    def fit(self, df: pd.DataFrame, on_step: OnStep | None = None) -> "LDM4TS":
        """Train on a long frame and return self: `train` with 70 % of the rows, in order of time.

        The next 10 % validate and the last 20 % give `scores`. Raises DataError for a frame with
        other columns, missing values or series that do not share their timestamps, and as `train`.
        """
        self._fit(widen(df), on_step)
        return self

    def _fit(self, table: pd.DataFrame, on_step: OnStep | None = None) -> None:
        self.freq = self.freq or _infer(pd.DatetimeIndex(table.index))
        place = Path(tempfile.mkdtemp(prefix="ldm4ts-", dir=self.directory))
        file = place / "series.csv"
        table.to_csv(file, index_label="ds")
        names = [str(name) for name in table.columns]
        data = {
            "name": "csv",
            "path": str(file),
            "timestamp": "ds",
            "columns": names,
            "targets": names,
            "history": self.history,
            "horizons": tuple(range(1, self.h + 1)),
            "period": self.period,
        }
        run = place / "run"
        config = plan({**self.options, "data": data, "output": str(run)})
        self.scores = train(config, on_step).test
        self.scaler = read_scaler(run)
        self.model = LDM4TSModel.from_pretrained(
            run / "model", config.device, config.attention_backend, False
        )
        self.table = table

    def predict(
        self,
        df: pd.DataFrame | None = None,
        h: int | None = None,
        num_samples: int = 100,
        quantiles: Sequence[float] = LEVELS,
        sampling_steps: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return a row a series and timestamp: unique_id, ds, LDM4TS (mean), LDM4TS_ql0.05 ...

        df holds the same series, later perhaps; None forecasts what follows the fitted frame. h is
        at most the one that was fitted. Raises OptionError for an option, DataError for a frame.
        """
        table = self._history() if df is None else self._same_series(widen(df))
        steps = self._steps(h)
        levels = _checked_levels(quantiles)
        draws = self._draw(table, num_samples, sampling_steps, seed)[:, :steps]  # (S, T, V)
        ahead = pd.date_range(table.index[-1], periods=steps + 1, freq=self.freq)[1:]
        return _lengthen(draws, table, ahead, levels)

    def cross_validation(
        self,
        df: pd.DataFrame,
        n_windows: int = 1,
        step_size: int | None = None,
        num_samples: int = 100,
        quantiles: Sequence[float] = LEVELS,
        sampling_steps: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Fit on the rows before the first cutoff, forecast after each; return `predict`'s rows
        with `cutoff`, the last timestamp that was seen, and `y`, what came.

        The last of n_windows windows ends with the frame; they start step_size rows apart (h where
        None). The model is fitted once: what it forecasts, it has never seen.
        """
        table = widen(df)
        step = self.h if step_size is None else step_size
        if n_windows < 1 or step < 1:
            raise OptionError(f"n_windows, step_size: expected at least 1, got {n_windows}, {step}")
        first = len(table) - self.h - (n_windows - 1) * step
        if first <= self.history:
            raise DataError(f"the frame has {len(table)} rows, too few before the first cutoff")
        levels = _checked_levels(quantiles)
        self._fit(table.iloc[:first])
        parts = []
        for end in range(first, len(table) - self.h + 1, step):
            seen, after = table.iloc[:end], table.iloc[end : end + self.h]
            draws = self._draw(seen, num_samples, sampling_steps, seed)
            part = _lengthen(draws, seen, pd.DatetimeIndex(after.index), levels)
            part.insert(2, "cutoff", seen.index[-1])
            part.insert(3, "y", after.to_numpy().T.flatten())
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def plot(
        self,
        path: str | Path,
        df: pd.DataFrame | None = None,
        num_samples: int = 100,
        sampling_steps: int | None = None,
        seed: int = 0,
    ) -> Path:
        """Draw the quantile fan of `predict` over its history, a panel a series, and save it."""
        table = self._history() if df is None else self._same_series(widen(df))
        draws = self._draw(table, num_samples, sampling_steps, seed)
        save_fan_chart(
            path,
            table.to_numpy()[-self.history :],
            range(1, self.h + 1),
            np.quantile(draws, LEVELS, axis=0),
            LEVELS,
            [str(name) for name in table.columns],
            f"{num_samples} draws after {table.index[-1]}",
        )
        return Path(path)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model, its scaler, and the last history rows; safetensors, JSON and CSV."""
        model, place = self._fitted(), Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(place / "model")
        known = {
            "h": self.h,
            "history": self.history,
            "period": self.period,
            "freq": self.freq,
            "mean": self.scaler.mean,
            "std": self.scaler.std,
        }
        self._history().to_csv(place / "history.csv", index_label="ds")
        (place / FILE).write_text(json.dumps(known, indent=1))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str = "auto", attention_backend: str = "flash"
    ) -> "LDM4TS":
        """Return what `save_pretrained` wrote; OptionError where directory holds no such thing."""
        place = Path(directory)
        if not (place / FILE).exists():
            raise OptionError(f"directory: {place} holds no LDM4TS, {FILE} is missing")
        known = json.loads((place / FILE).read_text())
        loaded = cls(known["h"], known["history"], known["period"], known["freq"])
        loaded.scaler = Scaler(tuple(known["mean"]), tuple(known["std"]))
        loaded.table = pd.read_csv(place / "history.csv", index_col="ds", parse_dates=["ds"])
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded.model = LDM4TSModel.from_pretrained(
            place / "model", device, attention_backend, False
        )
        return loaded

    def _fitted(self) -> LDM4TSModel:
        if self.model is None:
            raise OptionError("LDM4TS is not fitted yet: call fit, or from_pretrained")
        return self.model

    def _history(self) -> pd.DataFrame:
        self._fitted()
        return self.table.iloc[-self.history :]

    def _steps(self, h: int | None) -> int:
        if h is not None and not 1 <= h <= self.h:
            raise OptionError(f"h: expected 1 .. {self.h}, the fitted one, got {h}")
        return h or self.h

    def _same_series(self, table: pd.DataFrame) -> pd.DataFrame:
        self._fitted()
        known, given = list(map(str, self.table.columns)), list(map(str, table.columns))
        if known != given:
            raise DataError(f"df: expected the series {', '.join(known)}, got {', '.join(given)}")
        if len(table) < self.history:
            raise DataError(f"df: expected at least {self.history} rows, got {len(table)}")
        return table

    def _draw(
        self, table: pd.DataFrame, samples: int, sampling_steps: int | None, seed: int
    ) -> np.ndarray:  # (S, T, V)
        if samples < 2:
            raise OptionError(f"num_samples: expected at least 2 for quantiles, got {samples}")
        model = self._fitted()
        window: Tensor = self.scaler.transform(table.to_numpy()[-self.history :])  # (L, V)
        generator = torch.Generator().manual_seed(seed)
        draws = model.sample(window, samples, sampling_steps, generator)[:, 0]
        return self.scaler.inverse(draws, tuple(range(table.shape[1]))).numpy()


def widen(df: pd.DataFrame) -> pd.DataFrame:
    """Return a table with a row a timestamp and a column a series, checked and sorted by time."""
    if sorted(map(str, df.columns)) != sorted(COLUMNS):
        raise DataError(f"df: expected the columns {', '.join(COLUMNS)}, got {list(df.columns)}")
    if df.duplicated(["unique_id", "ds"]).any():
        row = df[df.duplicated(["unique_id", "ds"])].iloc[0]
        raise DataError(f"df: {row['unique_id']!r} has {row['ds']} more than once")
    table = df.pivot(index="ds", columns="unique_id", values="y").sort_index().astype(float)
    bad = np.argwhere(~np.isfinite(table.to_numpy()))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"df: {table.columns[column]!r} has no finite value at {table.index[row]}; the series "
            "are the variates of one model and share their timestamps"
        )
    table.index = pd.to_datetime(table.index)
    table.columns = [str(name) for name in table.columns]
    return table


def _infer(index: pd.DatetimeIndex) -> str:
    found = pd.infer_freq(index) if len(index) > 2 else None
    if found is None:
        raise OptionError("freq: the timestamps have no even spacing; name it, such as freq='B'")
    return found


def _checked_levels(quantiles: Sequence[float]) -> list[float]:
    levels = list(quantiles)
    if not all(0 < level < 1 for level in levels):
        raise OptionError(f"quantiles: expected numbers between 0 and 1, got {levels}")
    return levels


def _lengthen(
    draws: np.ndarray,  # (S, T, V)
    table: pd.DataFrame,
    ahead: pd.DatetimeIndex,  # T
    levels: list[float],
) -> pd.DataFrame:
    """Return draws as a long frame: a row a series and timestamp, mean and quantiles."""
    ids = np.repeat([str(name) for name in table.columns], len(ahead))
    frame = pd.DataFrame({"unique_id": ids, "ds": np.tile(ahead, table.shape[1])})
    frame[NAME] = draws.mean(axis=0).T.flatten()
    for level, values in zip(levels, np.quantile(draws, levels, axis=0), strict=True):
        frame[f"{NAME}_ql{level:g}"] = values.T.flatten()
    return frame
