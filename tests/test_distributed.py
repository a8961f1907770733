"""Plugged models under DDP, FSDP2, and Accelerate's DDP and FSDP2, in two processes."""

import pytest

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("triton", reason="needs triton")

from tests.two_processes import TWO_GPUS, outputs

WAYS = ("by_ddp", "by_fsdp2", "by_accelerate", "by_accelerate_fsdp2")


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_a_plugged_model_trains_in_two_processes_as_in_one(kind, tmp_path):
    for code, out, error in outputs("tests.distributed_worker", tmp_path, kind, timeout=480):
        assert code == 0, error
        agreed = [line.split() for line in out.splitlines() if " by_" in line]
        assert {way for name, _, way in agreed if name.startswith("UNet")} == set(WAYS)
        assert len({name for name, *_ in agreed}) == 3
        backends = {backend for _, backend, _ in agreed}
        assert backends >= {"sdpa", "triton", "triton_int8"}
