"""A forecast as the page shows it: numbers in lists, a CSV text, the three views as pictures."""

import base64
import io
from dataclasses import dataclass, replace

import numpy as np

from ldm4ts_kernels.data import load_series
from ldm4ts_kernels.forecasting import LEVELS, forecast
from ldm4ts_kernels.model.config import resolve_config
from ldm4ts_kernels.model.vision import encode_vision
from ldm4ts_kernels.runs import read_config, read_scaler
from ldm4ts_kernels.training import model_fields

VIEWS = ("Segmentation", "Gramian angular field", "Recurrence plot")


@dataclass(frozen=True)
class ShownForecast:
    """A forecast in plain lists: numbers in the table's units, pictures as data URLs."""

    title: str
    names: list[str]  # C
    horizons: list[int]  # T
    levels: list[float]  # Q
    history: list[list[float]]  # (L, C)
    quantiles: list[list[list[float]]]  # (Q, T, C)
    actual: list[list[float]] | None  # (T, C)
    columns: list[str]
    rows: list[list[object]]  # of the long table
    csv: str
    views: list[list[str]]  # name and PNG of each vision encoding


def show_forecast(
    directory: str,
    path: str | None,
    hold_out: int,
    samples: int,
    sampling_steps: int | None,
    checkpoint: str | None = None,
) -> ShownForecast:
    """Forecast as `ldm4ts forecast` does, and lay the result out for the page."""
    made = forecast(directory, path, hold_out, samples, sampling_steps, checkpoint=checkpoint)
    frame = made.to_frame()
    return ShownForecast(
        title=f"{made.source}: forecast from {made.last}, {made.samples} draws",
        names=list(made.names),
        horizons=list(made.horizons),
        levels=list(LEVELS),
        history=made.history.tolist(),
        quantiles=made.quantiles.tolist(),
        actual=None if made.actual is None else made.actual.tolist(),
        columns=list(map(str, frame.columns)),
        rows=frame.astype(object).to_numpy().tolist(),
        csv=frame.to_csv(index=False),
        views=_views(directory, path, hold_out),
    )


def _views(directory: str, path: str | None, hold_out: int) -> list[list[str]]:
    """Draw what the model sees: the images of the window that the forecast starts from."""
    config = read_config(directory)
    series = load_series(config.data if path is None else replace(config.data, path=path))
    sizes = resolve_config(config.preset, **model_fields(config, series))
    end = len(series.values) - hold_out
    window = read_scaler(directory).transform(series.values[end - series.history : end])
    images = encode_vision(window[None], sizes.image_size, sizes.period)[0]  # (3, S, S)
    return [[name, _png(image.numpy())] for name, image in zip(VIEWS, images, strict=True)]


def _png(image: np.ndarray) -> str:
    """Return an image (S, S) of values in [0, 1] as the data URL of a PNG, in viridis."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, image, vmin=0, vmax=1, cmap="viridis", format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
