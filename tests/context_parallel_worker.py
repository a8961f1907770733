"""One of two processes of tests/test_context_parallel.py: RANK STORE DEVICE, then what to do."""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm4ts_kernels import accelerate_attention, sdpa_override
from ldm4ts_kernels.dispatcher import _member
from ldm4ts_kernels.kernels import flash
from ldm4ts_kernels.native import load_error
from ldm4ts_kernels.plugged_layer import Policy
from tests.families import FAMILIES, Family, build, run

WORLD = 2
DEGREES = (
    {"ring_degree": WORLD, "ulysses_degree": 1},
    {"ring_degree": 1, "ulysses_degree": WORLD},
)


def assert_agrees(ours: Tensor, theirs: Tensor) -> None:
    """Hold float32 to its rounding and bf16 to four of its own, of the largest element."""
    limit = 1e-4 if ours.dtype == torch.float32 else 4 * torch.finfo(ours.dtype).eps
    error = (ours - theirs).abs().max()
    assert error <= limit * theirs.abs().max(), f"error {error:.2e}"


def share_attention(rank: int, device: torch.device) -> None:
    """Compute parts of one attention call, output and gradients, through the dispatcher."""
    mesh = init_device_mesh(device.type, (WORLD,))
    backends = ["triton"]
    if device.type == "cuda" and load_error() is None:
        backends.append("native")
    for backend in backends:
        attend = _AttentionBackendRegistry._backends[_member(Policy("exact", backend))]
        dtype = torch.bfloat16 if backend == "native" else torch.float32
        torch.manual_seed(0)
        whole = [torch.randn(2, 8, 2, 16).to(device, dtype) for _ in range(4)]  # (B, N, H, D)
        query, key, value = (tensor.clone().requires_grad_() for tensor in whole[:3])
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        expected.backward(whole[3])
        for degrees in DEGREES:
            config = SimpleNamespace(
                **degrees, convert_to_fp32=True, ring_anything=False, ulysses_anything=False,
                _ring_mesh=mesh, _ulysses_mesh=mesh, _world_size=WORLD,
                _ring_local_rank=rank, _ulysses_local_rank=rank,
            )  # fmt: skip
            part = [tensor.chunk(WORLD, 1)[rank].clone().requires_grad_() for tensor in whole[:3]]
            out = attend(*part, _parallel_config=SimpleNamespace(context_parallel_config=config))
            out.backward(whole[3].chunk(WORLD, 1)[rank])
            assert_agrees(out, expected.chunk(WORLD, 1)[rank])
            for ours, theirs in zip(part, (query, key, value), strict=True):
                assert_agrees(ours.grad, theirs.grad.chunk(WORLD, 1)[rank])


def share_a_model(family: Family, rank: int, device: torch.device) -> None:
    """Run and train a whole model under `enable_parallelism`."""
    torch.set_default_device(device)
    if device.type == "cpu":  # diffusers asks for an accelerator: pretend that the CPU is one
        torch._C._get_accelerator = lambda: device
        torch.accelerator.device_count = lambda: WORLD
    expected = run(family, build(family))
    for degrees in DEGREES:
        model = build(family)
        attention = accelerate_attention(model, backend="triton")
        model.enable_parallelism(config=diffusers.ContextParallelConfig(**degrees))
        out, *grads = run(family, model)
        attention.verify()
        for grad in grads:
            dist.all_reduce(grad)  # each process has the gradients of its own tokens
        for ours, theirs in zip((out, *grads), expected, strict=True):
            assert_agrees(ours, theirs)


def share_by_torch(rank: int, device: torch.device) -> None:
    """Run torch's own ring, causal and load-balanced, on the operators that the override serves."""
    torch.manual_seed(0)
    whole = [torch.randn(2, 2, 16, 16).to(device) for _ in range(4)]  # (B, H, N, D)
    if device.type == "cuda":
        whole = [tensor.bfloat16() for tensor in whole]
    query, key, value = (tensor.clone().requires_grad_() for tensor in whole[:3])
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    expected.backward(whole[3])
    theirs = [expected, *(tensor.grad for tensor in (query, key, value))]
    sdpa_override.activate()
    launches, plain = [], flash.flash_backward
    flash.flash_backward = lambda *arguments: launches.append(rank) or plain(*arguments)
    ring = ring_of_torch if device.type == "cuda" else ring_of_cpu_operators
    for one, other in zip(ring(rank, whole, device), theirs, strict=True):
        quarters = other.chunk(2 * WORLD, 2)  # each process has one early and one late part
        assert_agrees(one, torch.cat((quarters[rank], quarters[2 * WORLD - 1 - rank]), 2))
    assert launches or device.type == "cuda", "torch's own kernels ran"


def ring_of_torch(rank: int, whole: list[Tensor], device: torch.device) -> list[Tensor]:
    from torch.distributed.tensor.experimental import context_parallel

    tensors = [tensor.clone() for tensor in whole]
    mesh = init_device_mesh("cuda", (WORLD,))
    with (
        context_parallel(
            mesh, buffers=tensors, buffer_seq_dims=[2] * 4, no_restore_buffers={*tensors}
        ),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ):
        for tensor in tensors[:3]:
            tensor.requires_grad_()  # not before: torch cuts the buffers to size
        out = F.scaled_dot_product_attention(*tensors[:3], is_causal=True)
        out.backward(tensors[3])
    return [out, *(tensor.grad for tensor in tensors[:3])]


def ring_of_cpu_operators(rank: int, whole: list[Tensor], device: torch.device) -> list[Tensor]:
    """Call the templates behind `context_parallel` by themselves: on a CPU torch offers no door."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    parts = []
    for tensor in whole:
        quarters = tensor.chunk(2 * WORLD, 2)
        parts.append(torch.cat((quarters[rank], quarters[2 * WORLD - 1 - rank]), 2))
    query, key, value, dout = parts
    group, options = dist.group.WORLD, {"is_causal": True, "dropout_p": 0.0, "scale": None}
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    tensors = {"query": query, "key": key, "value": value}
    out, lse = ring._templated_ring_attention(group, 2, forward, **tensors, **options)[:2]
    grads = ring._templated_ring_attention_backward(
        group, 2, backward, grad_out=dout, grad_out_name="grad_out", out=out, logsumexp=lse,
        **tensors, **options,
    )  # fmt: skip
    return [out, *grads[:3]]


TASKS: dict[str, Callable[[int, torch.device], None]] = {
    "attention": share_attention,
    "torch": share_by_torch,
    **{family.name: partial(share_a_model, family) for family in FAMILIES},
}


def main() -> None:
    rank, store, kind, task = int(sys.argv[1]), *sys.argv[2:5]
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
    )
    TASKS[task](rank, device)
    dist.destroy_process_group()
    sys.stdout.write("agrees\n")


if __name__ == "__main__":
    main()
