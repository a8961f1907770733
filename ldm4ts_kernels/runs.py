"""A run: its configuration, and the directory that holds it.

config.json  the resolved TrainConfig        metrics.jsonl  one record a logged step
data.json    the scaler of the training part  checkpoints/   <stage>-<step>/
model/       the trained model                test_metrics.json
.lock        the process that trains in it
"""

import json
import logging
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ldm4ts_kernels.checkpoints import (
    Checkpoint,
    Position,
    delete_unfinished,
    find_checkpoints,
    write_text_whole,
)
from ldm4ts_kernels.data import DataConfig, OptionError, Scaler, row_of
from ldm4ts_kernels.exclusions import BUDGET, exclusions
from ldm4ts_kernels.optimizers import OPTIMIZERS, missing_8bit
from ldm4ts_kernels.run_lock import LOCK
from ldm4ts_kernels.vram import LEAN_LEVERS, LEVERS

logger = logging.getLogger("ldm4ts_kernels")

# What shapes the weights and the order of the data; all else may differ when a run is resumed.
FIXED_FOR_A_RUN = (
    "data",
    "preset",
    "model_fields",
    "batch_size",
    "seed",
    "autoencoder_steps",
    "optimizer",
    "weights",
    "channels_last",
)
# `paper` is sized for 2 CPU cores and a few minutes, `guide` for a GPU.
PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "guide": {
        "steps": 2000,
        "autoencoder_steps": 500,
        "learning_rate": 2e-4,
        "validate_every": 500,
        "checkpoint_every": 500,
        "eval_windows": 256,
        "eval_samples": 16,
        "sampling_steps": 25,
    },
}
CHOICES = {
    "preset": tuple(PRESET_DEFAULTS),
    "device": ("cpu", "cuda"),
    "precision": ("fp32", "bf16"),
    "attention_backend": ("default", "flash", "sage", "auto"),
    "optimizer": OPTIMIZERS,
    "weights": ("fp32", "bf16"),
}
AT_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "gradient_clip": 0,
    "accumulate": 1,
    "autoencoder_steps": 1,
    "log_every": 1,
    "validate_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "eval_windows": 1,
    "eval_samples": 1,
    "sampling_steps": 1,
}
POSITIVE = ("learning_rate", "autoencoder_learning_rate")


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run; the defaults are those of preset `paper` on a CPU.

    `plan` chooses by the machine. Raises OptionError, naming the option, for a value out of range.
    """

    data: DataConfig = field(default_factory=DataConfig)
    output: str = "runs/sp500"
    resume: bool = False
    # The model
    preset: str = "paper"
    model_fields: dict[str, Any] = field(default_factory=dict)  # of LDM4TSConfig, over the preset
    attention_backend: str = "flash"
    # What the backward pass recomputes: "none", "full", "selective", or "budget:x", which compiles.
    checkpointing: str = "none"
    compile: bool = False  # the U-Net and the decoder in a training step, by torch.compile
    # The optimisation
    device: str = "cpu"
    precision: str = "fp32"  # of the autocast; losses are fp32
    weights: str = "fp32"  # the forecaster's; "bf16" with optimizer "adamw8bit"
    channels_last: bool = False  # the U-Net's convolutions, in memory
    optimizer: str = "adamw"  # or "adamw8bit": states of a byte
    optimizer_in_backward: bool = False  # frees each gradient at once; without clipping
    accumulate: int = 1  # parts that a batch is split into; its result is the same
    cache_latents: bool = True  # encode each window once; the encoders then leave the GPU
    offload_activations: bool = False  # to the host's memory, until the backward pass
    shard_states: bool = False  # of several processes each holds a share of the forecaster's
    vram_gb: float | None = None  # of 2^30 bytes: what the process may take of the GPU
    cuda_graphs: bool = True  # on a GPU: a step, and a step of sampling, as one launch
    seed: int = 0
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 1e-2
    gradient_clip: float = 1.0  # largest norm of all gradients together; 0 for none
    ema_decay: float = 0.0  # a step, of the average that is scored and kept; 0: the weights are
    autoencoder_steps: int = 150
    autoencoder_learning_rate: float = 2e-3
    # The bookkeeping, in steps
    log_every: int = 1
    validate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    # The scores
    eval_windows: int = 64
    eval_samples: int = 8
    sampling_steps: int = 10

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise OptionError(f"{name}: expected one of {', '.join(allowed)}, got {got!r}")
        for name, least in AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise OptionError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise OptionError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.vram_gb is not None and not self.vram_gb > 0:
            raise OptionError(f"vram_gb: expected more than 0, got {self.vram_gb}")
        for name, wrong, expected in exclusions(self):
            if wrong:
                raise OptionError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def compiles(self) -> bool:
        """Whether torch.compile has a part in a step."""
        return self.compile or BUDGET.fullmatch(f"{self.checkpointing}") is not None


def plan(given: dict[str, Any]) -> TrainConfig:
    """Return a configuration of the given options, and for the others what suits the machine.

    `given` maps fields of TrainConfig to values, "data" to a dict of DataConfig's fields;
    "gradient_checkpointing" is checkpointing as a bool. device and precision may be "auto". With a
    GPU the preset is `guide`, in bf16 where the GPU has it and with gradient checkpointing;
    without, `paper`. With "vram_gb", levers that are not given are chosen to fit it, and the log
    says which and why. With "resume", options not given are those of the
    run in "output". Raises OptionError for an unknown option, a bad value or a missing GPU.
    """
    stored: dict[str, Any] = {}
    if given.get("resume") and "output" not in given:
        raise OptionError("resume: name the run's directory (--output)")
    if given.get("resume") and (Path(given["output"]) / "config.json").exists():
        stored = _read_json(Path(given["output"]) / "config.json")
    device = given.get("device", stored.get("device", "auto"))
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise OptionError("device: torch finds no CUDA GPU here; --device cpu trains without")
    if device == "auto":
        device = "cuda" if gpu else "cpu"
    on_gpu = device == "cuda"
    data, stored_data = given.get("data", {}), stored.get("data", {})
    if data.get("name", stored_data.get("name")) == stored_data.get("name"):
        data = {**stored_data, **data}
    preset = given.get("preset", stored.get("preset", "guide" if on_gpu else "paper"))
    machine = {
        "output": f"runs/{data.get('name', DataConfig.name)}",
        "preset": preset,
        "checkpointing": "full" if on_gpu else "none",
        "log_every": 10 if on_gpu else 1,  # reading a loss waits for the GPU
    }
    given, stored = _name_checkpointing(given), _name_checkpointing(stored)
    chosen = {**machine, **PRESET_DEFAULTS.get(preset, {}), **stored, **given}
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if chosen.get("precision", "auto") == "auto":
        chosen["precision"] = "bf16" if bf16 else "fp32"
    config = _config_from_json({**chosen, "device": device, "data": data})
    row_of(config.data)
    return _fit(config, given) if given.get("vram_gb") is not None else config


def _fit(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """Return the configuration with levers that fit its vram_gb, but for those that are given."""
    from ldm4ts_kernels.budget import choose_levers

    if config.device != "cuda":
        raise OptionError(f"vram_gb: needs a GPU (device cuda), got device {config.device}")
    levers = [
        lever
        for lever in (LEVERS if missing_8bit() else LEAN_LEVERS)
        if given.get("precision") in (None, "auto", lever.precision)
        and given.get("optimizer", lever.optimizer) == lever.optimizer
        and given.get("weights", lever.weights) == lever.weights
        and (lever.precision == "fp32" or config.precision == "bf16")
        and not (lever.optimizer_in_backward and given.get("gradient_clip"))
    ]
    if not levers:
        raise OptionError("vram_gb: no set of levers has the given precision, optimizer, weights")
    try:
        choice = choose_levers(
            config.vram_gb or 0, config.batch_size, levers, config.preset, config.model_fields
        )
    except (TypeError, ValueError) as error:
        raise OptionError(f"{error}") from error
    kept = {name for name in choice.options if name in given and name != "precision"}
    logger.info("%s", choice.why + (f" Kept as given: {', '.join(sorted(kept))}." if kept else ""))
    return replace(config, **{n: v for n, v in choice.options.items() if n not in kept})


@dataclass(frozen=True)
class Run:
    """The directory of a run, checked for training."""

    directory: Path
    checkpoint: Checkpoint | None  # where training goes on; None: at its beginning

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def begin(self, config: TrainConfig, scaler: Scaler) -> None:
        """Write what describes the run, and clear away what a killed process left unfinished."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for place in (self.directory, self.checkpoints):
            delete_unfinished(place)
        _forget_after(self.directory / "metrics.jsonl", self.checkpoint)
        write_text_whole(self.directory / "data.json", json.dumps(asdict(scaler), indent=1))
        self.write_config(config)

    def write_config(self, config: TrainConfig) -> None:
        """Write the configuration that the run has, and resumes with."""
        write_text_whole(self.directory / "config.json", json.dumps(asdict(config), indent=1))

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def _name_checkpointing(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options with a mode for the switch that stood in its place, and in old runs."""
    if "gradient_checkpointing" not in values:
        return values
    rest = {name: value for name, value in values.items() if name != "gradient_checkpointing"}
    return {"checkpointing": "full" if values["gradient_checkpointing"] else "none", **rest}


def _config_from_json(values: dict[str, Any]) -> TrainConfig:
    values = _name_checkpointing(values)
    data: Any = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.get("data", {}).items()
    }
    for known, given, where in ((TrainConfig, values, ""), (DataConfig, data, "data.")):
        unknown = set(given) - {entry.name for entry in fields(known)}
        if unknown:
            raise OptionError(f"unknown option {where}{min(unknown)}")
    return TrainConfig(**{**values, "data": DataConfig(**data)})


def read_config(directory: str | Path) -> TrainConfig:
    """Read the configuration of the run in directory; OptionError if there is none to read."""
    return _config_from_json(_read_json(Path(directory) / "config.json"))


def read_scaler(directory: str | Path) -> Scaler:
    """Read the scaler that the run in directory was trained with."""
    values = _read_json(Path(directory) / "data.json")
    return Scaler(tuple(values["mean"]), tuple(values["std"]))


def open_run(config: TrainConfig, scaler: Scaler) -> Run:
    """Check the directory config.output and return the run that it holds or will hold.

    Writes nothing. Raises OptionError if the directory holds a run and config.resume is off, if it
    is something else's, or if the run was trained on other data or with another value of
    FIXED_FOR_A_RUN.
    """
    directory = Path(config.output)
    if (directory / "config.json").exists():
        if not config.resume:
            raise OptionError(
                f"output: {directory} holds a run; resume it (--resume) or choose another --output"
            )
        _check_same(read_config(directory), config, directory)
        if read_scaler(directory) != scaler:
            raise OptionError(
                f"data: the table differs from the one that {directory} was trained on"
            )
    elif _is_foreign(directory):
        raise OptionError(f"output: {directory} exists and is no run; choose another --output")
    found = find_checkpoints(directory / "checkpoints")
    return Run(directory, found[-1] if found else None)


def _is_foreign(directory: Path) -> bool:
    """Say whether something stands at directory that a run killed at its start cannot have left."""
    if not directory.is_dir():
        return directory.exists()
    names = {path.name for path in directory.iterdir()} - {"checkpoints", "data.json", LOCK}
    return any(not name.startswith(".unfinished-") for name in names)


def _check_same(stored: TrainConfig, config: TrainConfig, directory: Path) -> None:
    for name in FIXED_FOR_A_RUN:
        before, now = getattr(stored, name), getattr(config, name)
        if name == "data":  # a file may have moved; its contents are compared by their scaler
            before, now = replace(before, path=None), replace(now, path=None)
        if json.dumps(before, default=asdict) != json.dumps(now, default=asdict):
            raise OptionError(
                f"{name}: {directory} was trained with {before!r}, not {now!r}; "
                "leave the option out, or choose another --output"
            )


def _forget_after(log: Path, checkpoint: Checkpoint | None) -> None:
    """Drop the records of steps that a resumed run will do again, and a half-written last line."""
    if not log.exists():
        return
    last = checkpoint.position if checkpoint else Position(0, 0)
    lines = log.read_text().splitlines(keepends=True)
    kept = []
    for line in lines:
        if line.endswith("\n"):
            record = json.loads(line)
            if Position.at(record["stage"], record["step"]) <= last:
                kept.append(line)
    write_text_whole(log, "".join(kept))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise OptionError(f"{path.parent} holds no run: {path.name} is missing")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: not readable: {error}") from error
