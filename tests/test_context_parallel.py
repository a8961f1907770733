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
WORKER = """
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from ldm4ts_kernels.dispatcher import _member
from ldm4ts_kernels.plugged_layer import Policy

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
attend = _AttentionBackendRegistry._backends[_member(Policy())]
torch.manual_seed(0)
whole = [torch.randn(2, 8, 2, 16) for _ in range(4)]  # query, key, value, dout: (B, N, H, D)
query, key, value = (tensor.clone().requires_grad_() for tensor in whole[:3])
expected = torch.nn.functional.scaled_dot_product_attention(
    *(tensor.transpose(1, 2) for tensor in (query, key, value))
).transpose(1, 2)
expected.backward(whole[3])
for degrees in ({"ring_degree": 2, "ulysses_degree": 1}, {"ring_degree": 1, "ulysses_degree": 2}):
    config = SimpleNamespace(
        **degrees, convert_to_fp32=True, ring_anything=False, ulysses_anything=False,
        _ring_mesh=mesh, _ulysses_mesh=mesh, _ring_local_rank=rank, _ulysses_local_rank=rank,
        _world_size=2,
    )
    part = [tensor.chunk(2, dim=1)[rank].clone().requires_grad_() for tensor in whole[:3]]
    out = attend(*part, _parallel_config=SimpleNamespace(context_parallel_config=config))
    out.backward(whole[3].chunk(2, dim=1)[rank])
    torch.testing.assert_close(out, expected.chunk(2, dim=1)[rank], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(part, (query, key, value), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad.chunk(2, dim=1)[rank], rtol=1e-4, atol=1e-5
        )
    print("agrees")
dist.destroy_process_group()
"""


def test_ring_and_ulysses_compute_what_one_device_computes(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, error = worker.communicate(timeout=120)
        assert out.split() == ["agrees", "agrees"], error


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
