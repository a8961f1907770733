"""Each kernel of a backend on small shapes, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool racecheck python -m tests.sanitizer_cases native
    compute-sanitizer --tool racecheck python -m tests.sanitizer_cases native 3/4  # a part of it

and likewise with memcheck, initcheck or synccheck, and for native_int8, triton and triton_int8. The
shapes are those with which an H100 launches each kind of tile; with LDM4TS_SHARED_KIB=100 or 164 it
takes those of GPUs with less shared memory. Each result is compared with SDPA's, so that a tool
that changes what it watches is seen.
"""

import os
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ldm4ts_kernels import attention_fn


class Call(NamedTuple):
    """Batch, heads, query and key length, head dim; arguments; whether gradients are computed.

    deterministic: whether they must be the same in every run.
    """

    shape: tuple[int, int, int, int, int]
    options: Mapping[str, Any] = MappingProxyType({})
    grads: bool = True
    deterministic: bool = False


def calls(backend: str) -> list[Call]:
    """Return short, masked, split and long problems at narrow, middle and wide head dims."""
    found = []
    for dim in (16, 40, 64, 80, 128, 160, 256):
        # with 300 keys, a wave of the blocks that add to dq, for one GPU's tiles as for another's
        heads = 88 if dim <= 40 else 66 if dim <= 80 else 44
        found += [
            Call((1, 2, 49, 49, dim)),
            Call((1, 2, 100, 203, dim), {"is_causal": True}),
            Call((1, heads, 300, 300, dim)),
            Call((1, 132, 256, 300, dim), grads=False),  # a wave of wide blocks
            Call((1, 1, 20, 1300, dim), grads=False),  # keys that blocks share out
        ]
        # the backward's wide tiles, and narrow ones where the first call has paired ones
        if backend == "native":
            found.append(Call((1, heads, 300, 300, dim), deterministic=True))
            found.append(Call((1, 80, 49, 49, dim)))
        if not backend.endswith("int8"):
            found.append(Call((1, 2, 70, 90, dim), {"attn_mask": 90, "dropout_p": 0.1}))
    found.append(Call((1, 2, 100, 77, 40)))  # few keys
    found.append(Call((2, 4, 16, 16, 64), grads=False))  # one warp
    if "int8" not in backend:
        found.append(Call((1, 2, 70, 200, 512), grads=False))
    if backend.startswith("triton"):  # through tensor maps
        found += [Call((1, 2, 600, 700, dim)) for dim in (40, 64, 80, 128, 160)]
    return found


def run(backend: str, call: Call) -> None:
    """Compute a call's output and gradients, and compare them with SDPA's on the CPU.

    Nothing else runs on the GPU: inputs are copied there, so that initcheck knows them as written,
    and no tool has a peer's kernels to report.
    """
    batch, heads, queries, keys, dim = call.shape
    query, dout = torch.randn(2, batch, heads, queries, dim).bfloat16()
    key, value = torch.randn(2, batch, heads, keys, dim).bfloat16()
    options = dict(call.options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.rand(queries, keys) < 0.8
    exact = attended(
        F.scaled_dot_product_attention,
        call,
        (query, key, value, dout),
        {**options, "dropout_p": 0.0},
    )
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"].cuda()
    options |= {"backend": backend, "precision": "int8" if backend.endswith("int8") else "exact"}
    on_gpu = tuple(x.cuda() for x in (query, key, value, dout))
    torch.use_deterministic_algorithms(call.deterministic)
    mine = attended(attention_fn, call, on_gpu, options)
    allowed = 0.6 if "dropout_p" in options else 0.05  # a tenth of the weights is missing
    for name, found, expected in zip(("out", "dq", "dk", "dv"), mine, exact, strict=False):
        error = ((found.cpu() - expected).float().norm() / expected.float().norm()).item()
        if not error < allowed:
            raise AssertionError(f"{backend} {call}: {name} is off by {error:.2g}")


def attended(
    attend: Callable[..., Tensor], call: Call, tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> list[Tensor]:
    """Return the output and, where the call wants them, the gradients of query, key and value."""
    *inputs, dout = tensors
    leaves = [x.detach().requires_grad_(call.grads) for x in inputs]
    out = attend(*leaves, **options)
    return [out.detach(), *(torch.autograd.grad(out, leaves, dout) if call.grads else ())]


def zeroed_tensor_maps() -> Any:
    """Return a patch with which the memory that Triton writes tensor maps to starts as zeros.

    The machine code writes a map by an atomic exchange, which initcheck takes for a read.
    """
    own = triton.set_allocator
    return mock.patch.object(
        triton, "set_allocator", lambda allocate: own(lambda *sizes: allocate(*sizes).zero_())
    )


def main() -> None:
    """Run every call of the backend that is named, or one part of them: "3/4", the third of 4."""
    backend, *part = sys.argv[1:]
    at, parts = map(int, part[0].split("/")) if part else (1, 1)
    # Each tensor is an allocation of its own, past whose end nothing lies: set before the first.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    torch.utils.deterministic.fill_uninitialized_memory = False  # which initcheck would not see
    torch.manual_seed(0)
    done = calls(backend)[at - 1 :: parts]
    with zeroed_tensor_maps():
        for call in done:
            run(backend, call)
            sys.stdout.write(f"{call.shape} {dict(call.options)}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(done)} calls of {backend} agree with SDPA\n")


if __name__ == "__main__":
    main()
