"""Plugged models under DDP, FSDP2, and Accelerate's DDP and FSDP2, in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("triton", reason="needs triton")

from tests.test_context_parallel import TWO_GPUS

ROOT = Path(__file__).parents[1]
WAYS = ("by_ddp", "by_fsdp2", "by_accelerate", "by_accelerate_fsdp2")


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_a_plugged_model_trains_in_two_processes_as_in_one(kind, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if kind == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed_worker"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, error = worker.communicate(timeout=480)
        assert worker.returncode == 0, error
        agreed = [line.split() for line in out.splitlines() if " by_" in line]
        assert {way for name, _, way in agreed if name.startswith("UNet")} == set(WAYS)
        assert len({name for name, *_ in agreed}) == 3
        backends = {backend for _, backend, _ in agreed}
        assert backends >= {"sdpa", "triton", "triton_int8"}
