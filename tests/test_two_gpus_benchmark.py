"""The benchmark of two GPUs: its steps, in miniature on a CPU, its rows and their table."""

import sys

import pytest
import torch
from tiny_run import tiny_config

from benchmarks import two_gpus
from benchmarks.training_tables import two_gpus as table
from ldm4ts_kernels.data import load_splits

ENVIRONMENT = {"gpu": "G", "versions": "torch", "command": "python -m benchmarks.two_gpus"}


def test_a_way_is_measured_and_becomes_a_row_and_a_line(tmp_path):
    config = tiny_config(tmp_path)
    case = two_gpus.Case("one", 4, config)
    found = case.measure(load_splits(config.data), steps=3, untimed=1)
    assert len(found["losses"]) == 3
    assert found["losses"] == case.measure(load_splits(config.data), 3, 1)["losses"]
    alone = {"batch": 4, **found}
    twice_as_fast = {**alone, "ms": found["ms"] / 2, "losses": [1.01 * x for x in found["losses"]]}
    rows = [
        two_gpus.row("one", alone, alone),
        two_gpus.row("DDP", twice_as_fast, alone),
        two_gpus.row("FSDP2", {"batch": 4, "refusal": "RuntimeError: no"}, alone),
    ]
    assert (rows[1]["scaling"], rows[1]["loss_difference"]) == ("2.000", "1.00e-02")
    assert len({tuple(row) for row in rows}) == 1
    text = [{name: f"{value}" for name, value in {**row, **ENVIRONMENT}.items()} for row in rows]
    one, ddp, fsdp = table(text)[2:5]
    assert one.startswith("| 4 | one GPU | ") and "1.00 |" in one and "eager" in one
    assert ddp.startswith("| 4 | two GPUs, whole | ") and "| 2.00 |" in ddp
    assert fsdp.startswith("| 4 | two GPUs, shared | RuntimeError: no | –")


def test_what_fails_in_its_processes_is_a_refusal_with_the_reason(monkeypatch):
    monkeypatch.setattr(two_gpus.subprocess, "Popen", _failing(two_gpus.subprocess.Popen))
    found = list(two_gpus.started("DDP", 30))
    assert found == [{"batch": batch, "refusal": "ValueError: no data"} for batch in (8, 32)]


def test_without_two_gpus_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["two_gpus.py"])
    with pytest.raises(SystemExit, match="needs two NVIDIA GPUs, found 1"):
        two_gpus.main()


def _failing(popen):
    def start(command, **options):
        return popen([sys.executable, "-c", "raise ValueError('no data')"], **options)

    return start
