"""Each kernel of a backend on small shapes, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool racecheck python -m tests.sanitizer_cases native

and likewise with memcheck, initcheck or synccheck, and for native_int8, triton and triton_int8. The
shapes are those with which an H100 launches each kind of tile, but for the backward's wide ones,
which serve where gradients must repeat. Each result is compared with SDPA's, so that a
tool that changes what it watches is seen.
"""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ldm4ts_kernels import attention_fn


class Call(NamedTuple):
    """Batch, heads, query and key length, head dim; arguments; whether gradients are computed."""

    shape: tuple[int, int, int, int, int]
    options: Mapping[str, Any] = MappingProxyType({})
    grads: bool = True


def calls(backend: str) -> list[Call]:
    """Return short, masked, split and long problems at narrow, middle and wide head dims."""
    found = []
    for dim in (16, 40, 64, 80, 128, 160, 256):
        heads = 88 if dim <= 80 else 44  # with 300 keys, a wave of the blocks that add to dq
        found += [
            Call((1, 2, 49, 49, dim)),
            Call((1, 2, 100, 203, dim), {"is_causal": True}),
            Call((1, heads, 300, 300, dim)),
            Call((1, 132, 256, 300, dim), grads=False),  # a wave of wide blocks
            Call((1, 1, 20, 1300, dim), grads=False),  # keys that blocks share out
        ]
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
    """Compute a call's output and gradients, and compare them with SDPA's."""
    batch, heads, queries, keys, dim = call.shape
    query, dout = torch.randn(2, batch, heads, queries, dim, device="cuda").bfloat16()
    key, value = torch.randn(2, batch, heads, keys, dim, device="cuda").bfloat16()
    options = dict(call.options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.rand(queries, keys, device="cuda") < 0.8
    precision = "int8" if backend.endswith("int8") else "exact"
    results = []
    for attend in (
        lambda *x: attention_fn(*x, **options, backend=backend, precision=precision),
        lambda *x: F.scaled_dot_product_attention(*x, **{**options, "dropout_p": 0.0}),
    ):
        leaves = tuple(x.detach().requires_grad_(call.grads) for x in (query, key, value))
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, dout) if call.grads else ()
        results.append((out.detach(), *grads))
    torch.cuda.synchronize()
    allowed = 0.6 if "dropout_p" in options else 0.05  # a tenth of the weights is missing
    for mine, exact in zip(*results, strict=True):
        error = ((mine - exact).float().norm() / exact.float().norm()).item()
        if not error < allowed:
            raise AssertionError(f"{backend} {call}: error {error:.2g}")


def main() -> None:
    """Run every call of the backend that is named."""
    (backend,) = sys.argv[1:]
    torch.manual_seed(0)
    done = calls(backend)
    for call in done:
        run(backend, call)
        sys.stdout.write(f"{call.shape} {dict(call.options)}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(done)} calls of {backend} agree with SDPA\n")


if __name__ == "__main__":
    main()
