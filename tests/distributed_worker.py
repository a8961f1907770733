"""One of two processes of tests/test_distributed.py: RANK STORE DEVICE.

Trains plugged models under DDP, FSDP2, and Accelerate's DDP and FSDP2, two steps each, and holds
outputs and gradients to those of one process.
"""

import functools
import os
import sys
from collections.abc import Callable
from itertools import chain, product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ldm4ts_kernels import accelerate_attention, save_attention_outputs
from ldm4ts_kernels.native import load_error
from tests.context_parallel_worker import assert_agrees
from tests.families import FAMILIES, Family, build, run

WORLD = 2
BLOCKS = {  # what FSDP2 shards by itself, beside the rest of the model
    "UNet2DConditionModel": ["BasicTransformerBlock"],
    "FluxTransformer2DModel": ["FluxTransformerBlock", "FluxSingleTransformerBlock"],
    "ViTModel": ["ViTLayer"],
}
STEPS = 2


class Attention(NamedTuple):
    """Options of `accelerate_attention`, and whether the model runs under autocast to bf16."""

    backend: str
    precision: str = "exact"
    half: bool = False


SDPA = Attention("sdpa")
TRITON = Attention("triton")
INT8 = Attention("triton_int8", "int8", half=True)
NATIVE = Attention("native", half=True)


def train(
    family: Family,
    attention: Attention,
    device: torch.device,
    wrap: Callable[[nn.Module, torch.optim.Optimizer], tuple[nn.Module, torch.optim.Optimizer]],
) -> list[Tensor]:
    """Return output and gradients of each step, whole on every rank, in bf16 where that ran."""
    model = build(family)
    handle = accelerate_attention(model, precision=attention.precision, backend=attention.backend)
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing(save_attention_outputs)
    wrapped, optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    results = []
    for _ in range(STEPS):
        with torch.autocast(device.type, torch.bfloat16, enabled=attention.half):
            step = run(family, wrapped)
        whole = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in step]
        results += [each.bfloat16() if attention.half else each.clone() for each in whole]
        optimizer.step()
    handle.verify()
    assert {layer.served_by for layer in handle.layers} == {attention.backend}
    return results


def alone(model, optimizer):
    return model, optimizer


def by_ddp(model, optimizer):
    return DistributedDataParallel(model, find_unused_parameters=True), optimizer


def by_fsdp2(model, optimizer):
    mesh = init_device_mesh(torch.get_default_device().type, (WORLD,))
    for module in [*model.modules()]:
        if type(module).__name__ in chain.from_iterable(BLOCKS.values()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def by_accelerate(model, optimizer):
    return _accelerator().prepare(model, optimizer)


def by_accelerate_fsdp2(model, optimizer):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=BLOCKS[type(model).__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = _accelerator(fsdp_plugin=plugin)
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate keeps FSDP for accelerators: pretend that the CPU is one.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    model, optimizer = accelerator.prepare(model, optimizer)
    assert len([module for module in model.modules() if isinstance(module, FSDPModule)]) > 1
    return model, optimizer


def _accelerator(**options) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # this process takes several ways
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # an earlier one's plugin would shard this one, too
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    on_cpu = torch.get_default_device().type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[unused], **options)
    assert accelerator.num_processes == WORLD
    return accelerator


WAYS = (by_ddp, by_fsdp2, by_accelerate, by_accelerate_fsdp2)


def cases(device: torch.device) -> list[tuple[str, Attention, Callable[..., Any]]]:
    """Return model, attention and way; the kernels are slow in the interpreter, so once there."""
    kernels = [TRITON, INT8]
    if device.type == "cuda" and load_error() is None:
        kernels.append(NATIVE)
    found = [(name, SDPA, way) for name in BLOCKS for way in WAYS]
    if device.type == "cuda":
        return found + list(product(BLOCKS, kernels, WAYS))
    exact, int8 = kernels
    return [
        *found,
        ("UNet2DConditionModel", exact, by_accelerate_fsdp2),
        ("FluxTransformer2DModel", int8, by_accelerate_fsdp2),
    ]


def main() -> None:
    rank, store, kind = int(sys.argv[1]), *sys.argv[2:4]
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.set_default_device(device)
    torch.backends.cudnn.deterministic = True
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
    )
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1"}
    families = {family.name: family for family in FAMILIES}
    one_process = functools.cache(lambda name, which: train(families[name], which, device, alone))
    for name, which, way in cases(device):
        expected = one_process(name, which)
        for ours, theirs in zip(train(families[name], which, device, way), expected, strict=True):
            assert_agrees(ours, theirs)
        sys.stdout.write(f"{name} {which.backend} {way.__name__}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
