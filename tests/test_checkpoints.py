"""A checkpoint is whole or absent, and restores every random generator and moment."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm4ts_kernels.checkpoints import (
    Checkpoint,
    CheckpointError,
    Position,
    directory_written_whole,
    find_checkpoints,
    optimizer_tensors,
    restore_training_state,
    save_checkpoint,
)


class Model(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def save_pretrained(self, directory: Path) -> None:
        (directory / "weights").write_text("weights")


def trained() -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def saved(directory: Path, step: int = 1, keep: int = 2) -> Checkpoint:
    model, optimizer = trained()
    states = optimizer_tensors(optimizer)
    return save_checkpoint(directory, Position.at("forecaster", step), model, states, keep)


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


def test_the_generators_of_python_numpy_and_torch_are_restored(tmp_path):
    checkpoint, optimizer = saved(tmp_path), trained()[1]
    expected = draws()
    assert draws() != expected
    restore_training_state(checkpoint, optimizer)
    assert draws() == expected


def test_the_moments_are_restored_and_the_learning_rate_is_not(tmp_path):
    checkpoint = saved(tmp_path)
    fresh = torch.optim.AdamW(Model().parameters(), lr=0.5)
    restore_training_state(checkpoint, fresh)
    expected = trained()[1].state_dict()["state"]
    restored = fresh.state_dict()["state"]
    assert restored.keys() == expected.keys()
    for index, values in expected.items():
        assert all(torch.equal(restored[index][name], values[name]) for name in values)
    assert fresh.param_groups[0]["lr"] == 0.5


def test_no_file_is_a_pickle(tmp_path):
    names = {path.name for path in saved(tmp_path).path.rglob("*") if path.is_file()}
    assert names == {"weights", "optimizer.safetensors", "random.safetensors", "state.json"}


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100):
        saved(tmp_path, step)
    assert [checkpoint.position.step for checkpoint in find_checkpoints(tmp_path)] == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forecaster-10", "forecaster-100"]


def test_the_forecaster_comes_after_the_autoencoder():
    assert Position.at("forecaster", 1) > Position.at("autoencoder", 900)


def test_a_write_that_fails_leaves_nothing_under_a_checkpoints_name(tmp_path, monkeypatch):
    saved(tmp_path, step=1)

    def full(self, directory):
        (directory / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Model, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; .*forecaster-1 is whole"):
        saved(tmp_path, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["forecaster-1"]


def test_a_directory_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "model"
    with directory_written_whole(target) as scratch:
        (scratch / "a").write_text("a")
        assert not target.exists()
    assert (target / "a").read_text() == "a"


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "random.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    checkpoint = saved(tmp_path)
    path = checkpoint.path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=f"{name}: not readable"):
        restore_training_state(checkpoint, trained()[1])


def test_a_foreign_format_is_named(tmp_path):
    checkpoint = saved(tmp_path)
    path = checkpoint.path / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "other"}))
    with pytest.raises(CheckpointError, match="expected format 'ldm4ts checkpoint 1', got 'other'"):
        restore_training_state(checkpoint, trained()[1])


def test_the_optimizer_of_another_model_is_named(tmp_path):
    checkpoint = saved(tmp_path)
    other = torch.optim.AdamW(nn.Linear(5, 7).parameters())
    with pytest.raises(CheckpointError, match="of another model: exp_avg of parameter 0"):
        restore_training_state(checkpoint, other)
