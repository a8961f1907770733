"""Two processes share a sequence, and must compute what one computes with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("triton", reason="needs triton")

from ldm4ts_kernels.context_parallel import shared_attention
from ldm4ts_kernels.plugged_layer import Policy

ROOT = Path(__file__).parents[1]
FAMILIES = ("FluxTransformer2DModel", "WanTransformer3DModel")  # that run as a whole
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


@pytest.mark.parametrize("task", ["attention", "torch", *FAMILIES])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_devices_compute_what_one_computes_by_ring_and_by_ulysses(kind, task, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if kind == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.context_parallel_worker"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), kind, task],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, error = worker.communicate(timeout=240)
        assert out == "agrees\n", error


@pytest.mark.parametrize("policy", [Policy("int8"), Policy("exact", "sdpa")])
def test_a_policy_that_cannot_share_a_sequence_says_so(policy):
    query = torch.randn(1, 4, 2, 16)
    with pytest.raises(NotImplementedError, match="cannot share a sequence among devices"):
        shared_attention(policy, query, query, query, parallel_config=object())


def test_a_diffusers_whose_ring_is_not_to_be_trusted_is_refused(monkeypatch):
    monkeypatch.setattr("diffusers.__version__", "0.41.0")
    query = torch.randn(1, 4, 2, 16)
    with pytest.raises(NotImplementedError, match=r"needs diffusers 0.42 or later.*0.41.0"):
        shared_attention(Policy(), query, query, query, parallel_config=object())
