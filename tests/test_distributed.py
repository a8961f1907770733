"""Two processes: plugged models under DDP and FSDP2, and LDM4TS with its states shared out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("triton", reason="needs triton")

from safetensors.torch import load_file
from tiny_run import tiny_config

from ldm4ts_kernels.training import TrainingInterrupted, train
from tests.two_processes import TWO_GPUS, outputs

WAYS = ("by_ddp", "by_fsdp2", "by_accelerate", "by_accelerate_fsdp2")
DEVICES = pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])


@DEVICES
def test_a_plugged_model_trains_in_two_processes_as_in_one(kind, tmp_path):
    for code, out, error in outputs("tests.distributed_worker", tmp_path, kind, timeout=480):
        assert code == 0, error
        agreed = [line.split() for line in out.splitlines() if " by_" in line]
        assert {way for name, _, way in agreed if name.startswith("UNet")} == set(WAYS)
        assert len({name for name, *_ in agreed}) == 3
        backends = {backend for _, backend, _ in agreed}
        assert backends >= {"sdpa", "triton", "triton_int8"}


@DEVICES
def test_a_run_goes_on_with_shared_states_as_with_whole_ones(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fields = {**tiny_config(tmp_path).model_fields, "dropout": 0.0}
    options = {
        "device": kind,
        "model_fields": fields,
        "steps": 12,
        "ema_decay": 0.9,
        "log_every": 1,
    }
    # In parts, so that its noise is drawn for a whole batch as it is for two processes.
    alone = tiny_config(tmp_path, "alone", accumulate=2, **options)
    expected = train(alone).test.scores["ldm4ts"]
    shared = replace(alone, output=str(tmp_path / "shared"), resume=True)

    for output in _train_shared(tmp_path / "first", kind, shared, alone, "full", stop=4):
        assert "goes on at forecaster-4" in output
    with pytest.raises(TrainingInterrupted, match="goes on at forecaster-8"):
        train(shared, lambda report: (report.stage, report.step) == ("forecaster", 8))
    for output in _train_shared(tmp_path / "then", kind, shared, alone, "selective", stop=0):
        assert float(output.split("crps")[1]) == pytest.approx(expected["crps"], rel=1e-3)

    ours, theirs = _losses(shared.output), _losses(alone.output)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    for name in ("model", "checkpoints/forecaster-12/model"):
        paths = [Path(run.output) / name / "model.safetensors" for run in (shared, alone)]
        weights = [load_file(path) for path in paths]
        assert weights[0].keys() == weights[1].keys()
        found, wanted = (
            torch.cat([value.float().flatten() for value in each.values()]) for each in weights
        )
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


def _train_shared(folder, kind, shared, run, checkpointing, stop):
    """Yield what each of the two processes says."""
    folder.mkdir()
    arguments = (run.output, shared.output, checkpointing, str(stop))
    for code, out, error in outputs("tests.sharding_worker", folder, kind, *arguments, timeout=200):
        assert code == 0, error
        assert "holds 0.5" in out or "holds 0.4" in out
        yield out


def _losses(directory: str) -> list[dict[str, float]]:
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"] for line in lines]
