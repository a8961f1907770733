"""A trained run's forecast of what follows a table: draws, their quantiles, a long frame."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ldm4ts_kernels.checkpoints import find_checkpoints
from ldm4ts_kernels.data import OptionError, load_series
from ldm4ts_kernels.graphs import CudaGraphs
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.runs import CHOICES, read_config, read_scaler

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Forecast:
    """Quantiles of the targets at the horizons, in the table's own units."""

    source: str  # of the table
    model_path: Path
    last: pd.Timestamp  # of the last row that the model saw
    names: tuple[str, ...]  # C
    horizons: tuple[int, ...]  # T
    history: np.ndarray  # (L, C)
    quantiles: np.ndarray  # (Q, T, C), at LEVELS
    actual: np.ndarray | None  # (T, C), where rows were held out
    samples: int

    def to_frame(self) -> pd.DataFrame:
        """Return a row a target and horizon: target, ahead, q05 .. q95 and, if known, actual."""
        columns = {
            f"q{level * 100:02.0f}": q for level, q in zip(LEVELS, self.quantiles, strict=True)
        }
        if self.actual is not None:
            columns["actual"] = self.actual
        index = pd.MultiIndex.from_product([self.names, self.horizons], names=["target", "ahead"])
        table = {name: values.T.flatten() for name, values in columns.items()}  # (C * T,)
        return pd.DataFrame(table, index=index).reset_index()


def forecast(
    directory: str | Path,
    path: str | None = None,
    hold_out: int = 0,
    samples: int = 100,
    sampling_steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    attention_backend: str = "flash",
    checkpoint: str | None = None,
) -> Forecast:
    """Forecast the rows after a table's end, or after its end less `hold_out` rows.

    directory is a run's; its model/ is used, or its newest checkpoint while it has none, or the
    checkpoint of that name, such as "forecaster-200". path is a newer file with the same columns as
    the run's data. sampling_steps: DDIM's, None for the model's own. Raises OptionError for a
    directory without a trained model or without that checkpoint and for a bad option, DataError for
    data that do not fit.
    """
    _check_options(samples, sampling_steps, device, attention_backend)
    config = read_config(directory)
    model_path = _model_path(Path(directory), checkpoint)
    data = config.data if path is None else replace(config.data, path=path)
    series = load_series(data)
    end = len(series.values) - hold_out
    if hold_out < 0 or end < series.history:
        most = len(series.values) - series.history
        raise OptionError(f"hold_out: expected 0 .. {most} rows, got {hold_out}")
    model = _load_model(Path(directory), model_path, device, attention_backend)
    scaler = read_scaler(directory)
    window = scaler.transform(series.values[end - series.history : end])  # (L, V)
    generator = torch.Generator().manual_seed(seed)
    draws = model.sample(window, samples, sampling_steps, generator)[:, 0]  # (S, T, C)
    values = scaler.inverse(draws, series.targets).numpy()
    targets = list(series.targets)
    known = end - 1 + np.array(series.horizons)
    return Forecast(
        source=series.source,
        model_path=model_path,
        last=series.timestamps[end - 1],
        names=series.target_names,
        horizons=series.horizons,
        history=series.values[end - series.history : end, targets],
        quantiles=np.quantile(values, LEVELS, axis=0),
        actual=series.values[known][:, targets] if known[-1] < len(series.values) else None,
        samples=samples,
    )


def _check_options(samples: int, sampling_steps: int | None, device: str, attention: str) -> None:
    if samples < 2:
        raise OptionError(f"samples: expected at least 2 draws for quantiles, got {samples}")
    if sampling_steps is not None and sampling_steps < 1:
        raise OptionError(f"sampling_steps: expected at least 1, got {sampling_steps}")
    given = {"device": (device, "auto"), "attention_backend": (attention, "")}
    for name, (value, also) in given.items():
        if value not in (*CHOICES[name], also):
            raise OptionError(f"{name}: expected one of {', '.join(CHOICES[name])}, got {value!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device: torch finds no CUDA GPU here; --device cpu forecasts without")


def find_forecasters(directory: str | Path) -> list[str]:
    """Return the names of the run's checkpoints that can forecast, newest first."""
    found = find_checkpoints(Path(directory) / "checkpoints")
    return [item.path.name for item in reversed(found) if item.position.stage == "forecaster"]


def _model_path(directory: Path, checkpoint: str | None) -> Path:
    found = {item.path.name: item for item in find_checkpoints(directory / "checkpoints")}
    if checkpoint is not None:
        if checkpoint not in found:
            known = ", ".join(found) or "none"
            raise OptionError(f"checkpoint: {directory} has {known}, got {checkpoint!r}")
        return found[checkpoint].model_path
    if (directory / "model").is_dir():
        return directory / "model"
    if not found:
        raise OptionError(f"{directory} has no model and no checkpoint yet")
    return list(found.values())[-1].model_path


def _load_model(
    directory: Path, model_path: Path, device: str, attention_backend: str
) -> LDM4TSModel:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LDM4TSModel.from_pretrained(
        model_path, device, attention_backend, enable_gradient_checkpointing=False
    )
    if model.needs_autoencoder_training:
        raise OptionError(f"{directory} has trained its autoencoder only; resume it first")
    if model.device.type == "cuda":
        model.graph_sampling(CudaGraphs(model.device))
    return model
