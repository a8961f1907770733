"""A model on disk: config.json, model.safetensors and a folder a pretrained part; no pickle.

A pretrained autoencoder or text encoder is written by its own library into the folder of its
configuration field, so that a checkpoint needs neither the hub nor the path it came from.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from ldm4ts_kernels.model.forecaster import LDM4TSModel

FORMAT = "ldm4ts"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Configuration fields that name a pretrained part, and where its parameters live in the model.
PRETRAINED_PARTS = {"autoencoder": "autoencoder.kl.", "text_encoder": "conditioner.text.encoder."}


def write_checkpoint(
    model: "LDM4TSModel", directory: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model into the directory, which is made if it is missing.

    weights: by their names in the model, in the place of its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = dataclasses.asdict(model.config)
    if model.config.autoencoder is not None:
        config["autoencoder"] = "autoencoder"
        model.autoencoder.kl.save_pretrained(directory / "autoencoder")
    if model.conditioner.text is not None:
        config["text_encoder"] = "text_encoder"
        model.conditioner.text.encoder.save_pretrained(directory / "text_encoder")
        model.conditioner.text.tokenizer.save_pretrained(directory / "text_encoder")
    elsewhere = _pretrained_prefixes(config)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in {**model.state_dict(), **(weights or {})}.items()
        if not name.startswith(elsewhere)
    }
    save_file(tensors, directory / WEIGHTS_FILE)
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config}
    (directory / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_config(directory: Path) -> dict[str, Any]:
    """Return the configuration's fields; pretrained parts are named by their folders' paths."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no LDM4TS checkpoint in {directory}: {CONFIG_FILE} is missing")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = (record.get("format"), record.get("format_version")) if type(record) is dict else None
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{path} must have format {FORMAT!r}, version {FORMAT_VERSION}, got {found}"
        )
    config = record["config"]
    for field in PRETRAINED_PARTS:
        if config.get(field) is not None:
            config[field] = str(directory / config[field])
    return config


def load_weights(model: "LDM4TSModel", directory: Path) -> None:
    """Load model.safetensors into a model that was built from the directory's configuration."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no LDM4TS checkpoint in {directory}: {WEIGHTS_FILE} is missing")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    elsewhere = _pretrained_prefixes(dataclasses.asdict(model.config))
    loaded_already = {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith(elsewhere)
    }
    try:
        model.load_state_dict(tensors | loaded_already)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {directory / CONFIG_FILE}: {error}") from error


def _pretrained_prefixes(config: dict[str, Any]) -> tuple[str, ...]:
    return tuple(prefix for field, prefix in PRETRAINED_PARTS.items() if config[field] is not None)
