"""A training run that takes seconds: a small CSV file, the tiny model, a few steps."""

from pathlib import Path

import numpy as np
import pandas as pd
from tiny_model import TINY

from ldm4ts_kernels.data import DataConfig
from ldm4ts_kernels.runs import TrainConfig

FROM_DATA = ("history", "variates", "targets", "period", "horizons")


def write_series(directory: Path, rows: int = 240) -> str:
    """Write a noisy season of 6 rows in three columns; c is the target. Return the path."""
    rng = np.random.default_rng(0)
    season = np.sin(np.arange(rows) * 2 * np.pi / 6)
    noise = 0.1 * rng.standard_normal((rows, 3)).cumsum(axis=0)
    frame = pd.DataFrame(100 + season[:, None] * [1, 2, 3] + noise, columns=["a", "b", "c"])
    frame.insert(0, "time", pd.date_range("2020-01-01", periods=rows, freq="h"))
    path = directory / "series.csv"
    frame.to_csv(path, index=False)
    return str(path)


def tiny_config(directory: Path, name: str = "run", **changes: object) -> TrainConfig:
    """Return a configuration whose run lands in directory / name; dropout draws random numbers."""
    data = DataConfig(
        "csv",
        write_series(directory),
        timestamp="time",
        targets=("c",),
        history=24,
        horizons=(1, 4),
        period=6,
    )
    fields = {key: value for key, value in TINY.items() if key not in FROM_DATA}
    options: dict[str, object] = {
        "data": data,
        "output": str(directory / name),
        "model_fields": {**fields, "dropout": 0.1},
        "batch_size": 4,
        "autoencoder_steps": 3,
        "steps": 4,
        "checkpoint_every": 2,
        "validate_every": 4,
        "eval_windows": 3,
        "eval_samples": 2,
        "sampling_steps": 2,
    }
    return TrainConfig(**{**options, **changes})  # type: ignore[arg-type]
