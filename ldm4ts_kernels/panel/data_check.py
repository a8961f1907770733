"""What the training tab says of the chosen data: a preview, the windows, or the loader's error."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ldm4ts_kernels.data import DATASETS, DataConfig, DataError, OptionError, load_splits

PREVIEW_ROWS = 5


@dataclass(frozen=True)
class DataCheck:
    """What the loader says; an error `name: ...` belongs to that field, any other to the table."""

    summary: str = ""
    error: str = ""


def check_data(config: DataConfig) -> DataCheck:
    """Load the data as training will; say what it holds, or the loader's error and its field."""
    if DATASETS[config.name].needs_path and config.path is None:
        return DataCheck(error="Upload a CSV file.")
    try:
        splits = load_splits(config)
    except (OptionError, DataError) as error:
        return DataCheck(error=_without_folder(f"{error}", config.path))
    series = splits.series
    parts = (splits.train, splits.validation, splits.test)
    train, validation, test = (f"{len(part):,}" for part in parts)
    return DataCheck(
        f"{len(series.values):,} rows, {series.timestamps[0]:%Y-%m-%d} to "
        f"{series.timestamps[-1]:%Y-%m-%d}, {len(series.columns)} columns; forecasts "
        f"{', '.join(series.target_names)} from {series.history} rows. "
        f"Windows: {train} training, {validation} validation, {test} test."
    )


def _without_folder(message: str, path: str | None) -> str:
    """Name an uploaded file as the user does."""
    return message if path is None else message.replace(path, Path(path).name)


def preview(path: str) -> pd.DataFrame | None:
    """Return the first rows of a CSV file as text; None where it is no table."""
    try:
        return pd.read_csv(path, dtype=str, nrows=PREVIEW_ROWS, encoding="utf-8-sig")
    except (OSError, ValueError):  # pandas' parser errors are ValueErrors, as are Unicode's
        return None
