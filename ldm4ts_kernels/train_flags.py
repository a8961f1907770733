"""The flags of `ldm4ts train`, one for every option of a run, and the options that they give."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm4ts_kernels.data import DATASETS, DataConfig, OptionError
from ldm4ts_kernels.run_file import parse_horizons, parse_names, read_run_file
from ldm4ts_kernels.runs import PRESET_DEFAULTS, TrainConfig


def _option(flags: str, text: str, panel: str, default_of: str = "") -> Any:
    if default_of:
        small, large = getattr(TrainConfig, default_of), PRESET_DEFAULTS["guide"].get(default_of)
        text += f" (default: {small}{f', guide {large}' if large else ''})."
    return typer.Option(*flags.split(), help=text, rich_help_panel=panel, show_default=False)


Name = Annotated[str | None, _option("--data", f"{', '.join(DATASETS)} (default: sp500).", "Data")]
DataPath = Annotated[str | None, _option("--data-path", "CSV file of etth1, etth2, csv.", "Data")]
Timestamp = Annotated[str | None, _option("--timestamp", "Column of the times.", "Data")]
Columns = Annotated[str | None, _option("--columns", "Input columns: `open,close`.", "Data")]
Targets = Annotated[str | None, _option("--target", "Columns to forecast: `close`.", "Data")]
History = Annotated[int | None, _option("--history", "Rows that the model sees.", "Data")]
Horizons = Annotated[str | None, _option("--horizons", "Rows ahead: `1,5,20`, `1-96`.", "Data")]
Period = Annotated[int | None, _option("--period", "Rows in a season.", "Data")]

Preset = Annotated[
    str | None,
    _option("--preset", "paper, guide (default: guide with a GPU, else paper).", "Model"),
]
ImageSize = Annotated[int | None, _option("--image-size", "Pixels, a multiple of 16.", "Model")]
Attention = Annotated[
    str | None, _option("--attention", "default, flash, sage, auto (default: flash).", "Model")
]
Checkpointing = Annotated[
    bool | None,
    _option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        "Recompute activations instead of keeping them (default: with a GPU).",
        "Model",
    ),
]
CheckpointingMode = Annotated[
    str | None,
    _option("--checkpointing", "none, full, selective, budget:0.5: the same, by mode.", "Model"),
]
Compile = Annotated[
    bool | None,
    _option("--compile/--no-compile", "Compile the step by torch.compile (default: off).", "Model"),
]

ModelFields = Annotated[
    list[str] | None,
    _option("--model-field", "Any other of LDM4TSConfig: `dropout=0.2`; repeatable.", "Model"),
]

RunFile = Annotated[
    Path | None, _option("--config", "YAML or JSON file of options; flags win over it.", "Run")
]
Output = Annotated[str | None, _option("--output -o", "Run directory (default: runs/DATA).", "Run")]
Resume = Annotated[
    bool, _option("--resume", "Go on with the run in --output, with its options.", "Run")
]
Device = Annotated[str | None, _option("--device", "auto, cpu, cuda (default: auto).", "Run")]
CudaGraphs = Annotated[
    bool | None,
    _option(
        "--cuda-graphs/--no-cuda-graphs", "Replay each step as one graph (default: on).", "Run"
    ),
]
Precision = Annotated[str | None, _option("--precision", "auto, fp32, bf16.", "Run")]
Seed = Annotated[int | None, _option("--seed", "Of weights, data order and noise", "Run", "seed")]
CheckpointEvery = Annotated[
    int | None, _option("--checkpoint-every", "In steps", "Run", "checkpoint_every")
]
KeepCheckpoints = Annotated[
    int | None, _option("--keep-checkpoints", "Newest ones", "Run", "keep_checkpoints")
]
LogEvery = Annotated[
    int | None, _option("--log-every", "In steps (default: GPU 10, CPU 1).", "Run")
]

Steps = Annotated[int | None, _option("--steps", "Of the forecaster", "Optimisation", "steps")]
AutoencoderSteps = Annotated[
    int | None,
    _option(
        "--autoencoder-steps", "Of the autoencoder, before", "Optimisation", "autoencoder_steps"
    ),
]
Vram = Annotated[
    str | None,
    _option("--vram", "`6GB`: take no more, and choose what fits it.", "Memory"),
]
BatchSize = Annotated[
    int | None, _option("--batch-size", "Windows in a step", "Optimisation", "batch_size")
]
LearningRate = Annotated[
    float | None,
    _option("--learning-rate", "At its peak, of the forecaster", "Optimisation", "learning_rate"),
]
Optimizer = Annotated[
    str | None, _option("--optimizer", "adamw, adamw8bit", "Optimisation", "optimizer")
]
Accumulate = Annotated[
    int | None, _option("--accumulate", "Parts of a batch", "Optimisation", "accumulate")
]
Weights = Annotated[
    str | None, _option("--weights", "fp32, bf16: of the forecaster", "Optimisation", "weights")
]
ChannelsLast = Annotated[
    bool | None,
    _option(
        "--channels-last/--no-channels-last",
        "The U-Net's convolutions, in memory (default: off).",
        "Optimisation",
    ),
]
OptimizerInBackward = Annotated[
    bool | None,
    _option(
        "--optimizer-in-backward/--no-optimizer-in-backward",
        "Use and free each gradient as it comes; needs --gradient-clip 0.",
        "Optimisation",
    ),
]
CacheLatents = Annotated[
    bool | None,
    _option(
        "--cache-latents/--no-cache-latents", "Encode each window once (default: on).", "Memory"
    ),
]
OffloadActivations = Annotated[
    bool | None,
    _option(
        "--offload-activations/--no-offload-activations",
        "Keep them in the host's memory until the backward pass.",
        "Optimisation",
    ),
]
ShardStates = Annotated[
    bool | None,
    _option(
        "--shard-states/--no-shard-states",
        "Of several processes each holds a share of weights, gradients and states (FSDP2).",
        "Memory",
    ),
]
AutoencoderLearningRate = Annotated[
    float | None,
    _option(
        "--autoencoder-learning-rate",
        "At its peak, of the autoencoder",
        "Optimisation",
        "autoencoder_learning_rate",
    ),
]
WarmupSteps = Annotated[
    int | None, _option("--warmup-steps", "To the peak", "Optimisation", "warmup_steps")
]
WeightDecay = Annotated[
    float | None, _option("--weight-decay", "Of AdamW", "Optimisation", "weight_decay")
]
EmaDecay = Annotated[
    float | None, _option("--ema-decay", "Of the weights' average", "Optimisation", "ema_decay")
]
GradientClip = Annotated[
    float | None, _option("--gradient-clip", "Largest norm", "Optimisation", "gradient_clip")
]

ValidateEvery = Annotated[
    int | None, _option("--validate-every", "In steps", "Scores", "validate_every")
]
EvalWindows = Annotated[
    int | None, _option("--eval-windows", "Scored, evenly spaced", "Scores", "eval_windows")
]
EvalSamples = Annotated[
    int | None, _option("--eval-samples", "Draws a window", "Scores", "eval_samples")
]
SamplingSteps = Annotated[
    int | None, _option("--sampling-steps", "Of DDIM, a draw", "Scores", "sampling_steps")
]


def read(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as `plan` takes them: the flags over the file's."""
    file, size = flags.pop("config_file"), flags.pop("image_size")
    flags["resume"] = flags["resume"] or None  # left out, it is the file's
    fields = dict(_parse_field(text) for text in flags.pop("model_field") or ())
    if size is not None:
        fields["image_size"] = [size, size]
    of_data = [entry.name for entry in dataclasses.fields(DataConfig)]
    data = {name: flags.pop(name) for name in of_data}
    data = {name: _parse_data(name, value) for name, value in data.items() if value is not None}
    if flags["vram_gb"] is not None:
        flags["vram_gb"] = _parse_gb(flags["vram_gb"])
    switch = flags.pop("gradient_checkpointing")
    if switch is not None and flags["checkpointing"] is None:
        flags["checkpointing"] = "full" if switch else "none"
    given = {} if file is None else read_run_file(file)
    given.update((name, value) for name, value in flags.items() if value is not None)
    for name, over in (("data", data), ("model_fields", fields)):
        if over:
            given[name] = {**given.get(name, {}), **over}
    return given


def _parse_gb(text: str) -> float:
    """Read `6`, `6GB` or `6 GiB`, each of 2^30 bytes."""
    try:
        return float(text.strip().upper().removesuffix("B").removesuffix("I").removesuffix("G"))
    except ValueError as error:
        raise OptionError(f"vram: expected gigabytes such as `6GB`, got {text!r}") from error


def _parse_data(name: str, value: Any) -> Any:
    if name in ("columns", "targets"):
        return parse_names(value)
    return parse_horizons(value) if name == "horizons" else value


def _parse_field(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as JSON: `dropout=0.2`, `unet_channels=[32, 64]`."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), json.loads(value)
    except ValueError as error:
        what = f"expected name=value with the value as JSON, got {text!r}"
        raise OptionError(f"model_field: {what}") from error
