"""Checkpoints: all that a bit-for-bit resume needs, written atomically and without pickle.

A checkpoint is a directory `<stage>-<step>`: `model/` (the model's own save_pretrained),
`optimizer.safetensors`, `random.safetensors` (generators of torch) and `state.json` (position,
generators of Python and NumPy). It is written under a hidden name, forced to disk, then renamed:
whatever has a checkpoint's name is whole.
"""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm4ts_kernels.optimizers import make_states

FORMAT = "ldm4ts checkpoint 1"
AVERAGE = "average.safetensors"  # where the run averages its weights
STAGES = ("autoencoder", "forecaster")  # in the order of training


class Saveable(Protocol):
    """A model that writes itself into a directory."""

    def save_pretrained(self, directory: Path) -> None: ...


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: names the file and why."""


@dataclass(frozen=True, order=True)
class Position:
    """How far a run has come: `step` optimizer steps of its stage are done."""

    stage_index: int
    step: int

    @classmethod
    def at(cls, stage: str, step: int) -> "Position":
        return cls(STAGES.index(stage), step)

    @property
    def stage(self) -> str:
        return STAGES[self.stage_index]

    def __str__(self) -> str:
        return f"{self.stage}-{self.step}"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    position: Position

    @property
    def model_path(self) -> Path:
        return self.path / "model"


@contextmanager
def directory_written_whole(target: Path) -> Iterator[Path]:
    """Give a hidden directory to write into; it becomes `target` when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent))
    try:
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            _force_to_disk(path)
        scratch.chmod(0o755)
        os.replace(scratch, target)
        _force_to_disk(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old text or the new one."""
    scratch = path.with_name(f".unfinished-{path.name}")
    scratch.write_text(text)
    _force_to_disk(scratch)
    os.replace(scratch, path)


def save_checkpoint(
    directory: Path,
    position: Position,
    model: Saveable,
    states: Mapping[str, Tensor],
    keep: int,
    average: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Write a checkpoint at position into directory, then delete all but the newest `keep`.

    states: `optimizer_tensors` of the whole model. Raises CheckpointError where it cannot be
    written; those before it are then as they were.
    """
    target = directory / str(position)
    if not target.exists():  # one that exists holds the same state: positions are never revisited
        try:
            with directory_written_whole(target) as scratch:
                _write(scratch, position, model, states)
                if average:
                    dense = {name: tensor.contiguous() for name, tensor in average.items()}
                    save_file(dense, scratch / AVERAGE)
        except (OSError, SafetensorError) as error:  # a full disk, most of all
            whole = find_checkpoints(directory)
            left = f"{whole[-1].path} is whole" if whole else "there is none before it"
            raise CheckpointError(f"{target}: not written: {error}; {left}") from error
    for old in find_checkpoints(directory)[:-keep]:
        _delete_whole(old.path)
    return Checkpoint(target, position)


def _write(
    directory: Path, position: Position, model: Saveable, states: Mapping[str, Tensor]
) -> None:
    (directory / "model").mkdir()
    model.save_pretrained(directory / "model")
    whole = {name: tensor.contiguous() for name, tensor in states.items()}
    save_file(whole, directory / "optimizer.safetensors")
    generators, host_generators = _random_state()
    save_file(generators, directory / "random.safetensors")
    state = {
        "format": FORMAT,
        "stage": position.stage,
        "step": position.step,
        "random": host_generators,
    }
    (directory / "state.json").write_text(json.dumps(state))


def find_checkpoints(directory: Path) -> list[Checkpoint]:
    """List the checkpoints in directory, oldest first."""
    found = []
    for path in directory.glob("[!.]*-*"):
        stage, _, step = path.name.rpartition("-")
        if stage in STAGES and step.isdigit():
            found.append(Checkpoint(path, Position.at(stage, int(step))))
    return sorted(found, key=lambda checkpoint: checkpoint.position)


def delete_unfinished(directory: Path) -> None:
    """Delete what a killed process left half written or half deleted in directory."""
    for path in directory.glob(".unfinished-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def restore_training_state(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer,
    share: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> None:
    """Set the optimizer's moments and every random generator to those of the checkpoint.

    share: takes from the whole model's states those that the optimizer has. Learning rate and the
    like stay the optimizer's own. Raises CheckpointError for a missing, truncated or foreign file.
    """
    state = _read_json(checkpoint.path / "state.json")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint.path / 'state.json'}: expected format {FORMAT!r}, "
            f"got {state.get('format')!r}"
        )
    saved = share(_read_tensors(checkpoint.path / "optimizer.safetensors"))
    make_states(optimizer)
    present = optimizer_tensors(optimizer)
    for key in sorted(saved.keys() | present.keys()):
        found, expected = (tuple(t[key].shape) if key in t else None for t in (saved, present))
        if found != expected:
            index, _, name = key.partition(".")
            raise CheckpointError(
                f"{checkpoint.path}: of another model: {name} of parameter {index} has shape "
                f"{found}, expected {expected}"
            )
    for key, value in saved.items():
        present[key].copy_(value)
    _restore_random_state(_read_tensors(checkpoint.path / "random.safetensors"), state["random"])


def read_average(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """Return the average of the weights, None where the run had none; CheckpointError if cut."""
    path = checkpoint.path / AVERAGE
    return _read_tensors(path) if path.exists() else None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state under the keys `<parameter>.<name>`, sharing its memory.

    A quantised state is several tensors, under `<parameter>.<name>.<part>`.
    """
    tensors: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if hasattr(value, "__tensor_flatten__"):
                parts, _ = value.__tensor_flatten__()
                tensors |= {f"{index}.{name}.{part}": getattr(value, part) for part in parts}
            else:
                tensors[f"{index}.{name}"] = value.detach()
    return tensors


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            generators[f"cuda.{index}"] = state
        generators["cuda"] = torch.cuda.get_rng_state()  # of the GPU that trains
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy_state = [kind, np.asarray(keys).tolist(), *rest]
    return generators, {"python": random.getstate(), "numpy": numpy_state}


def _restore_random_state(generators: dict[str, Tensor], host: dict[str, Any]) -> None:
    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in generators:
                torch.cuda.set_rng_state(generators[f"cuda.{index}"], index)
        if "cuda" in generators:  # several processes draw alike, each on a GPU of its own
            torch.cuda.set_rng_state(generators["cuda"])
    version, keys, gauss = host["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numpy_keys, *rest = host["numpy"]
    np.random.set_state((kind, np.array(numpy_keys, dtype=np.uint32), *rest))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error


def _force_to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories, and orders renames itself
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_whole(path: Path) -> None:
    """Delete a checkpoint so that at no moment a part of it bears its name."""
    doomed = path.with_name(f".unfinished-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)
