"""Time series as training windows: a checked table, a chronological split, a train-only scaler.

B batch, L history rows, T horizons, C targets, V variates, N rows. `load_splits(DataConfig(...))`
is the door: it reads a row of `DATASETS`, checks the table value by value, scales it with the mean
and deviation of the training part, and cuts windows {"history": (L, V), "future": (T, C)}.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

OHLCV = ("Open", "High", "Low", "Close", "Volume")
ETT = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
ETT_MONTH = 30 * 24  # rows: the benchmark's months are 30 days of hours


class OptionError(ValueError):
    """An option that does not fit: names it, what was expected and what came."""


class DataError(ValueError):
    """A table that cannot be used: names its source, and the line and column where there is one."""


@dataclass(frozen=True)
class DatasetRow:
    """One row of DATASETS: where a table comes from and how it is forecast unless told otherwise.

    split holds the rows of the training, validation and test part: integers are row counts (what
    follows them is not used, as in the benchmark), fractions are shares of the whole table.
    """

    load: Callable[[str], tuple[pd.DataFrame, str]]
    needs_path: bool
    timestamp: str | None
    columns: tuple[str, ...] | None
    targets: tuple[str, ...] | None
    history: int
    horizons: tuple[int, ...]
    period: int
    split: tuple[float, float, float]


@dataclass(frozen=True)
class DataConfig:
    """Which table to read and how to cut it; None means the value of the row in DATASETS."""

    name: str = "sp500"
    path: str | None = None
    timestamp: str | None = None
    columns: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = None
    history: int | None = None
    horizons: tuple[int, ...] | None = None
    period: int | None = None


@dataclass(frozen=True)
class Series:
    """A checked table with finite values and strictly increasing timestamps."""

    source: str  # file path, or the module that ships the table: names it in errors
    timestamps: pd.DatetimeIndex  # (N,)
    values: np.ndarray  # (N, V) float64
    columns: tuple[str, ...]  # V names
    targets: tuple[int, ...]  # C indices into columns
    history: int
    horizons: tuple[int, ...]
    period: int
    split: tuple[float, float, float]

    @property
    def target_names(self) -> tuple[str, ...]:
        return tuple(self.columns[index] for index in self.targets)


@dataclass(frozen=True)
class Scaler:
    """x -> (x - mean) / std per variate; JSON holds it as two lists of V numbers."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, values: np.ndarray) -> "Scaler":
        """Take mean and deviation of the columns of values (N, V); a constant one gets std 1."""
        std = values.std(axis=0)
        std[std == 0] = 1.0
        return cls(tuple(values.mean(axis=0).tolist()), tuple(std.tolist()))

    def transform(self, values: np.ndarray) -> Tensor:
        """Scale values (N, V) in float64 and return them as float32."""
        return torch.from_numpy((values - np.array(self.mean)) / np.array(self.std)).float()

    def inverse(self, scaled: Tensor, variates: tuple[int, ...]) -> Tensor:
        """Return scaled (..., C), whose columns are the given variates, in the table's units."""
        mean = torch.tensor([self.mean[v] for v in variates], dtype=torch.float64)
        std = torch.tensor([self.std[v] for v in variates], dtype=torch.float64)
        return scaled.double().cpu() * std + mean


class Windows(Dataset[dict[str, Tensor]]):
    """Every window of a scaled table values (N, V): {"history": (L, V), "future": (T, C)} float32.

    Window i's history is rows i .. i + L - 1; its future holds the targets `horizons` rows after
    the last history row.
    """

    def __init__(
        self, values: Tensor, history: int, horizons: tuple[int, ...], targets: tuple[int, ...]
    ) -> None:
        self.values = values
        self.history = history
        self.targets = list(targets)
        self.ahead = torch.tensor(horizons) + history - 1

    def __len__(self) -> int:
        return max(0, len(self.values) - int(self.ahead[-1]))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        history = self.values[index : index + self.history]  # (L, V)
        future = self.values[index + self.ahead][:, self.targets]  # (T, C)
        return {"history": history, "future": future}


@dataclass(frozen=True)
class Splits:
    """The three chronological parts of a series, in units of the training part's deviation."""

    series: Series
    scaler: Scaler
    train: Windows
    validation: Windows
    test: Windows


def _read_csv(path: str) -> tuple[pd.DataFrame, str]:
    """Read a CSV file as text, one row a line, so that errors can name the line."""
    if not Path(path).is_file():
        raise OptionError(f"path: expected a CSV file, got {path!r}, which is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, dtype=str, skip_blank_lines=False, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV table: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):
        raise DataError(f"{path}, line 2: more fields than the header has names")
    filled = np.flatnonzero(table.notna().any(axis=1).to_numpy())
    # Blank lines at the end of a file are its end, not missing values.
    return table.iloc[: filled[-1] + 1 if len(filled) else 0], path


def _load_arch(name: str) -> Callable[[str], tuple[pd.DataFrame, str]]:
    def load(_path: str) -> tuple[pd.DataFrame, str]:
        from importlib import import_module

        try:
            module = import_module(f"arch.data.{name}")
        except ImportError as error:
            raise DataError(
                f"data {name!r} ships with the package `arch`, which does not import ({error}); "
                "pip install arch"
            ) from error
        return module.load().reset_index(), f"arch.data.{name}"

    return load


def _market(name: str) -> DatasetRow:
    """Daily OHLCV of 1999-2018; a trading week is 5 rows, a month about 20."""
    return DatasetRow(
        load=_load_arch(name),
        needs_path=False,
        timestamp="Date",
        columns=OHLCV,
        targets=("Close",),
        history=60,
        horizons=(1, 5, 20),
        period=5,
        split=(0.7, 0.1, 0.2),
    )


_ETT_ROW = DatasetRow(
    load=_read_csv,
    needs_path=True,
    timestamp="date",
    columns=ETT,
    targets=ETT,
    history=96,
    horizons=tuple(range(1, 97)),
    period=24,
    split=(12 * ETT_MONTH, 4 * ETT_MONTH, 4 * ETT_MONTH),
)
_CSV_ROW = DatasetRow(
    load=_read_csv,
    needs_path=True,
    timestamp=None,
    columns=None,
    targets=None,
    history=96,
    horizons=(15, 60, 240),
    period=24,
    split=(0.7, 0.1, 0.2),
)
DATASETS: dict[str, DatasetRow] = {
    "sp500": _market("sp500"),
    "nasdaq": _market("nasdaq"),
    "etth1": _ETT_ROW,
    "etth2": _ETT_ROW,
    "csv": _CSV_ROW,
}


def row_of(config: DataConfig) -> DatasetRow:
    """Return the row that config names; OptionError for an unknown one, or for its path."""
    row = DATASETS.get(config.name)
    if row is None:
        raise OptionError(f"data: expected one of {', '.join(DATASETS)}, got {config.name!r}")
    if row.needs_path != (config.path is not None):
        needs = "needs the path of its CSV file" if row.needs_path else "is built in, takes no path"
        raise OptionError(f"data {config.name!r} {needs}, got path={config.path!r}")
    return row


def load_series(config: DataConfig) -> Series:
    """Read the table that config names and check every value of it.

    Raises OptionError for an unknown data set or column; DataError, naming source, line and column,
    for a missing, non-numeric or infinite value, and for a missing, unreadable, repeated or
    unsorted timestamp. Lines count as in an editor: the header is line 1.
    """
    row = row_of(config)
    table, source = row.load(config.path or "")
    timestamp, columns, targets = _chosen_columns(config, row, table, source)
    history, horizons, period = _chosen_window(config, row)
    return Series(
        source=source,
        timestamps=_parse_timestamps(table[timestamp], source),
        values=np.stack([_parse_numbers(table[name], source) for name in columns], axis=1),
        columns=columns,
        targets=tuple(columns.index(name) for name in targets),
        history=history,
        horizons=horizons,
        period=period,
        split=row.split,
    )


def load_splits(config: DataConfig) -> Splits:
    """Cut the table that config names into training, validation and test windows.

    The parts follow each other in time; the history of the first window of a part may reach into
    the part before, its future never does. The scaler sees the training rows only. Raises
    as `load_series` does, and DataError if a part is too short for one window.
    """
    series = load_series(config)
    train_end, validation_end, test_end = _split_ends(series)
    scaler = Scaler.fit(series.values[:train_end])
    scaled = scaler.transform(series.values)  # (N, V)
    parts = {
        "training": (0, train_end),
        "validation": (train_end - series.history, validation_end),
        "test": (validation_end - series.history, test_end),
    }
    windows = []
    for part, (start, end) in parts.items():
        rows = scaled[max(0, start) : end]
        cut = Windows(rows, series.history, series.horizons, series.targets)
        if len(cut) == 0:
            raise DataError(
                f"{series.source}: too short: {len(series.values)} rows leave {len(rows)} to the "
                f"{part} part; history={series.history} and the longest horizon "
                f"{series.horizons[-1]} need {series.history + series.horizons[-1]}"
            )
        windows.append(cut)
    return Splits(series, scaler, *windows)


def _split_ends(series: Series) -> tuple[int, int, int]:
    first, second, third = series.split
    rows = len(series.values)
    if isinstance(first, float):
        return round(rows * first), round(rows * (first + second)), rows
    ends = int(first), int(first + second), int(first + second + third)
    if rows < ends[2]:
        raise DataError(f"{series.source}: the split needs {ends[2]} rows, the file has {rows}")
    return ends


def _chosen_columns(
    config: DataConfig, row: DatasetRow, table: pd.DataFrame, source: str
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    names = [str(name) for name in table.columns]
    listed = f"{source} has the columns {', '.join(names)}"
    timestamp = config.timestamp or row.timestamp
    if timestamp is None:
        raise OptionError(f"timestamp: name the column that holds it; {listed}")
    columns = config.columns or row.columns or tuple(n for n in names if n != timestamp)
    targets = config.targets or row.targets
    if targets is None:
        raise OptionError(f"targets: name the columns to forecast; {listed}")
    for argument, chosen in (
        ("timestamp", (timestamp,)),
        ("columns", columns),
        ("targets", targets),
    ):
        for name in chosen:
            if name not in names:
                raise OptionError(f"{argument}: no column {name!r}; {listed}")
        if len(set(chosen)) != len(chosen):
            raise OptionError(f"{argument}: expected each name once, got {', '.join(chosen)}")
    outside = [name for name in targets if name not in columns]
    if outside:
        raise OptionError(f"targets: {', '.join(outside)} not among columns {', '.join(columns)}")
    return timestamp, columns, targets


def _chosen_window(config: DataConfig, row: DatasetRow) -> tuple[int, tuple[int, ...], int]:
    history = row.history if config.history is None else config.history
    horizons = row.horizons if config.horizons is None else config.horizons
    period = row.period if config.period is None else config.period
    if history < 2:
        raise OptionError(f"history: expected at least 2 rows, got {history}")
    rising = all(a < b for a, b in pairwise(horizons))
    if not horizons or horizons[0] < 1 or not rising:
        raise OptionError(f"horizons: expected increasing steps of at least 1, got {horizons}")
    if not 1 <= period <= history:
        raise OptionError(f"period: expected 1 .. history={history} rows, got {period}")
    return history, horizons, period


def _line(position: Any) -> int:
    """Line of the file that holds table row `position`: the header is line 1."""
    return int(position) + 2


def _parse_numbers(column: pd.Series, source: str) -> np.ndarray:
    missing = np.flatnonzero(column.isna())
    if len(missing):
        raise DataError(
            f"{source}, line {_line(missing[0])}, column {column.name!r}: the value is missing "
            f"({len(missing)} in this column)"
        )
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise DataError(
            f"{source}, line {_line(bad[0])}, column {column.name!r}: expected a finite number, "
            f"got {column.iloc[bad[0]]!r}"
        )
    return numbers


def _parse_timestamps(column: pd.Series, source: str) -> pd.DatetimeIndex:
    with warnings.catch_warnings():
        # pandas warns when it cannot guess one format; what it cannot parse is an error below.
        warnings.simplefilter("ignore", UserWarning)
        stamps = pd.DatetimeIndex(pd.to_datetime(column, errors="coerce"))
    bad = np.flatnonzero(stamps.isna())
    if len(bad):
        raise DataError(
            f"{source}, line {_line(bad[0])}, column {column.name!r}: expected a timestamp, "
            f"got {column.iloc[bad[0]]!r}"
        )
    steps = np.diff(stamps.to_numpy())
    wrong = np.flatnonzero(steps <= np.timedelta64(0))
    if len(wrong):
        later = wrong[0] + 1
        what = "repeats" if stamps[later] == stamps[later - 1] else "is earlier than"
        raise DataError(
            f"{source}, line {_line(later)}, column {column.name!r}: {stamps[later]} {what} the "
            f"line before; sort the file by time and keep one row for each timestamp"
        )
    return stamps
