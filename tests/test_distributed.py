"""Plugged models under DDP, FSDP2 and Accelerate's DDP, in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

ROOT = Path(__file__).parents[1]
WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from ldm4ts_kernels import accelerate_attention, save_attention_outputs
from tests.families import FAMILIES, assert_same, build, run

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
accelerator = Accelerator(cpu=True, kwargs_handlers=[ddp])
assert accelerator.num_processes == 2
for family in FAMILIES:
    if family.name not in ("UNet2DConditionModel", "FluxTransformer2DModel", "ViTModel"):
        continue
    expected = run(family, build(family))
    for wrap in (
        lambda model: DistributedDataParallel(model, find_unused_parameters=True),
        lambda model: fully_shard(model, mesh=mesh),
        accelerator.prepare,
    ):
        model = build(family)
        attention = accelerate_attention(model)
        if hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing(save_attention_outputs)
        out, *grads = run(family, wrap(model))
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        assert_same([out, *whole], expected)
        attention.verify()
        assert {layer.served_by for layer in attention.layers} == {"sdpa"}
        print("agrees")
dist.destroy_process_group()
"""


def test_ddp_fsdp2_and_accelerate_train_a_plugged_model_as_one_process_does(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, error = worker.communicate(timeout=240)
        assert out.split() == ["agrees"] * 9, error
