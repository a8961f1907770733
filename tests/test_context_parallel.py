"""Two processes share a sequence, and must compute what one computes with all of it."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("triton", reason="needs triton")

from ldm4ts_kernels.context_parallel import shared_attention
from ldm4ts_kernels.plugged_layer import Policy
from tests.two_processes import TWO_GPUS, outputs

FAMILIES = ("FluxTransformer2DModel", "WanTransformer3DModel")  # that run as a whole


@pytest.mark.parametrize("task", ["attention", "torch", *FAMILIES])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_devices_compute_what_one_computes_by_ring_and_by_ulysses(kind, task, tmp_path):
    ran = outputs("tests.context_parallel_worker", tmp_path, kind, task, timeout=240)
    for _, out, error in ran:
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
