"""`ldm4ts train | forecast`: parse, call, print. What a run does is decided below this file."""

import logging
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ldm4ts_kernels import __version__
from ldm4ts_kernels import train_flags as flags
from ldm4ts_kernels.evaluation import Evaluation
from ldm4ts_kernels.forecasting import LEVELS, Forecast, forecast
from ldm4ts_kernels.plots import save_fan_chart
from ldm4ts_kernels.progress import TrainingProgress
from ldm4ts_kernels.runs import plan
from ldm4ts_kernels.training import train

HORIZONS_SHOWN = 12  # in the forecast's table; the CSV file has all

out = Console()
notes = Console(stderr=True)
app = typer.Typer(
    name="ldm4ts",
    help="Train and use LDM4TS forecasters: time series as images, denoised in latent space.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Notes(logging.Handler):
    """Prints the package's log above the progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"ldm4ts-kernels {__version__} (torch {torch.__version__})", highlight=False)
        raise typer.Exit


@app.callback()
def _globally(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and exit."
        ),
    ] = False,
    _debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    logger = logging.getLogger("ldm4ts_kernels")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())


@app.command("train")
def train_command(
    name: flags.Name = None,
    path: flags.DataPath = None,
    timestamp: flags.Timestamp = None,
    columns: flags.Columns = None,
    targets: flags.Targets = None,
    history: flags.History = None,
    horizons: flags.Horizons = None,
    period: flags.Period = None,
    preset: flags.Preset = None,
    image_size: flags.ImageSize = None,
    attention_backend: flags.Attention = None,
    gradient_checkpointing: flags.Checkpointing = None,
    checkpointing: flags.CheckpointingMode = None,
    compile: flags.Compile = None,
    model_field: flags.ModelFields = None,
    config_file: flags.RunFile = None,
    output: flags.Output = None,
    resume: flags.Resume = False,
    device: flags.Device = None,
    precision: flags.Precision = None,
    cuda_graphs: flags.CudaGraphs = None,
    seed: flags.Seed = None,
    checkpoint_every: flags.CheckpointEvery = None,
    keep_checkpoints: flags.KeepCheckpoints = None,
    log_every: flags.LogEvery = None,
    steps: flags.Steps = None,
    autoencoder_steps: flags.AutoencoderSteps = None,
    vram_gb: flags.Vram = None,
    batch_size: flags.BatchSize = None,
    learning_rate: flags.LearningRate = None,
    autoencoder_learning_rate: flags.AutoencoderLearningRate = None,
    warmup_steps: flags.WarmupSteps = None,
    weight_decay: flags.WeightDecay = None,
    gradient_clip: flags.GradientClip = None,
    ema_decay: flags.EmaDecay = None,
    optimizer: flags.Optimizer = None,
    accumulate: flags.Accumulate = None,
    weights: flags.Weights = None,
    channels_last: flags.ChannelsLast = None,
    optimizer_in_backward: flags.OptimizerInBackward = None,
    offload_activations: flags.OffloadActivations = None,
    shard_states: flags.ShardStates = None,
    cache_latents: flags.CacheLatents = None,
    validate_every: flags.ValidateEvery = None,
    eval_windows: flags.EvalWindows = None,
    eval_samples: flags.EvalSamples = None,
    sampling_steps: flags.SamplingSteps = None,
) -> None:
    """Train on a series and score the forecasts beside the naive ones.

    Without a GPU, `ldm4ts train --data sp500` takes about two minutes on two cores.
    """
    config = plan(flags.read(dict(locals())))
    note(f"{config.data.name}: preset {config.preset}, {config.device}, {config.precision}, "
          f"{config.autoencoder_steps} + {config.steps} steps of {config.batch_size} windows "
          f"-> {config.output}")  # fmt: skip
    if config.resume and not (Path(config.output) / "config.json").exists():
        note(f"{config.output} holds no run to go on with: this one begins there")
    with TrainingProgress(notes) as show:
        result = train(config, show)
    _print_scores(result.test)
    out.print(f"{result.seconds:.0f} s. Forecast: ldm4ts forecast {result.directory}", markup=False)


@app.command("forecast")
def forecast_command(
    run: Annotated[Path, typer.Argument(help="Directory of a training run.")],
    path: Annotated[
        str | None, typer.Option("--data-path", help="A newer file with the same columns.")
    ] = None,
    hold_out: Annotated[
        int, typer.Option("--hold-out", help="Leave out the last rows, and show them as actual.")
    ] = 0,
    samples: Annotated[int, typer.Option("--samples", help="Draws.")] = 100,
    sampling_steps: Annotated[
        int | None, typer.Option("--sampling-steps", help="Of DDIM; the model's own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda.")] = "auto",
    attention: Annotated[str, typer.Option("--attention", help="As for train.")] = "flash",
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", help="Such as forecaster-200 (default: the finished model)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Picture; a .csv goes beside it (default: RUN/forecast.png)."
        ),
    ] = None,
) -> None:
    """Forecast what follows a series: a table, a picture with quantile fans and a CSV file."""
    picture = output or run / "forecast.png"
    if output is not None:  # a run has its directory, and where none is the error names it
        picture.parent.mkdir(parents=True, exist_ok=True)
    result = forecast(
        run, path, hold_out, samples, sampling_steps, seed, device, attention, checkpoint
    )
    frame = result.to_frame()
    title = f"{result.source}: forecast from {result.last}, {result.samples} draws"
    save_fan_chart(
        picture,
        result.history,
        result.horizons,
        result.quantiles,
        LEVELS,
        result.names,
        title,
        result.actual,
    )
    frame.to_csv(picture.with_suffix(".csv"), index=False)
    _print_forecast(result, frame)
    out.print(f"{picture}, {picture.with_suffix('.csv')}", markup=False, highlight=False)


def note(line: str) -> None:
    notes.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_scores(test: Evaluation) -> None:
    table = Table("test", "MSE", "MAE", "CRPS")
    for name, scores in test.scores.items():
        table.add_row(name, *(f"{scores[score]:.4f}" for score in ("mse", "mae", "crps")))
    out.print(table)
    out.print(
        f"{test.windows} of {test.windows_in_all} test windows, evenly spaced; {test.samples} draws"
        f" of {test.sampling_steps} DDIM steps. Units: deviations of the training part. The CRPS of"
        " a point forecast is its MAE.",
        highlight=False,
    )


def _print_forecast(result: Forecast, frame: Any) -> None:
    count = len(result.horizons)
    stride = -(-count // HORIZONS_SHOWN)
    shown = frame[frame["ahead"].isin(result.horizons[stride - 1 :: stride])]
    table = Table()
    for name in frame.columns:
        table.add_column(str(name), overflow="fold")  # a number is never cut short
    for row in shown.itertuples(index=False):
        table.add_row(*(f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in row))
    out.print(table)
    if stride > 1:
        rows = len(shown) // len(result.names)
        out.print(f"{rows} of {count} horizons shown; the CSV file has all", highlight=False)
