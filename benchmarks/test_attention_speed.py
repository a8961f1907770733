"""Attention against its peers, all in one run: device time by graph replay, and an eager call.

    pytest benchmarks/test_attention_speed.py --benchmark-only -k bf16

Random data with a bias a channel in the key; bf16, of which the tables are made, or fp16, exact
attention alone, in a file of its own. A peer that refuses a shape is written down with its refusal.
`-k tiles` times the compiled kernels' other tiles and head dims beside the peers that need no
compilation. sageattention has no backward pass; 2.x launches on the default stream, which a graph
does not capture, so only its eager time is taken.

LDM4TS_SHARED_KIB=100 (sm_86, sm_89) or 164 (sm_80) times the compiled kernels with the tiles of
such a GPU, and as many blocks an SM, beside FlashAttention-2 with all that this one has.
"""

import os
from collections.abc import Callable, Collection, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import SHAPES, TILE_SHAPES, Shape
from benchmarks.measure import SHARED, device_ms, eager_ms, write_rows
from ldm4ts_kernels import attention_fn
from ldm4ts_kernels.backends import CHAINS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FILES = {"bf16": "attention_speed", "fp16": "attention_speed_fp16"}
PRETENDED = os.environ.get(SHARED)
TILES = "attention_speed_tiles"
TILE_PEERS = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "native")
rows: dict[str, list[dict[str, object]]] = {name: [] for name in (*FILES.values(), TILES)}


def draw(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Draw query, key and value in the layout of a U-Net: (B, N, H, D) in memory."""
    lengths = (shape.Q, shape.K, shape.K)
    tensors = [
        torch.randn(shape.B, length, shape.H, shape.D, device="cuda", dtype=dtype)
        for length in lengths
    ]
    tensors[1] += torch.randn(shape.H, shape.D, device="cuda", dtype=dtype)
    return [tensor.transpose(1, 2).requires_grad_() for tensor in tensors]


def sdpa(kernel: SDPBackend) -> Callable[..., Tensor]:
    def attend(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(*tensors)

    return attend


def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # or a later shape falls back to eager
    return torch.compile(flex_attention, dynamic=False)


def contenders(dtype: str) -> dict[str, Callable[..., Tensor]]:
    """Return the peers, and each of our backends by name."""
    if PRETENDED:
        flash = sdpa(SDPBackend.FLASH_ATTENTION)
        return {"sdpa flash": flash, "native": partial(attention_fn, backend="native")}
    peers: dict[str, Callable[..., Tensor]] = {
        "sdpa": F.scaled_dot_product_attention,  # as torch chooses
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    }
    if dtype == "bf16":
        peers["flex"] = flex()
    for precision, chain in CHAINS.items():
        if (precision, dtype) == ("int8", "fp16"):
            continue
        for row in chain[:-1]:
            peers[row.name] = partial(attention_fn, precision=precision, backend=row.name)
    return peers


def both_passes(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    dout = torch.randn_like(tensors[0])

    def run() -> object:
        return torch.autograd.grad(attend(*tensors), tensors, dout)

    return run


def time_shape(
    shape: Shape, backward: bool, dtype: str = "bf16", names: Collection[str] = ()
) -> Iterator[dict[str, object]]:
    """Yield a row a contender: its times and TFLOP/s, or its refusal; `ldm4ts bench` prints it.

    names: of the contenders; all, where empty.
    """
    tensors = draw(shape, DTYPES[dtype])
    flops = 4 * shape.B * shape.H * shape.Q * shape.K * shape.D * (3.5 if backward else 1.0)
    for name, attend in contenders(dtype).items():
        if names and name not in names:
            continue
        row: dict[str, object] = {
            "shape": str(shape), "origin": shape.origin, "dtype": dtype, "backend": name,
            "pass": "forward+backward" if backward else "forward",
            "device_ms": "", "eager_ms": "", "tflops": "", "refusal": "",
        }  # fmt: skip
        run = both_passes(attend, tensors) if backward else without_grad(attend, tensors)
        try:
            run()
        except (NotImplementedError, RuntimeError) as refusal:
            row["refusal"] = " ".join(str(refusal).split())[:200]
        else:
            row["eager_ms"] = round(eager_ms(run), 4)
            if name != "sageattention2":
                milliseconds = device_ms(run)
                row["device_ms"] = round(milliseconds, 4)
                row["tflops"] = round(flops / milliseconds / 1e9, 1)
        yield row


def keep(name: str, timed: list[dict[str, object]]) -> None:
    """Write a file's rows so far, with these: a run that is cut keeps what it has."""
    rows[name].extend(timed)
    write_rows(f"{name}_{PRETENDED}kib" if PRETENDED else name, rows[name])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(benchmark, dtype, shape, backward):
    timed = list(time_shape(shape, backward, dtype))
    keep(FILES[dtype], timed)
    tensors = draw(shape, DTYPES[dtype])
    benchmark.pedantic(
        both_passes(attention_fn, tensors) if backward else without_grad(attention_fn, tensors),
        rounds=20, warmup_rounds=3,
    )  # fmt: skip
    assert any(row["device_ms"] for row in timed)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", TILE_SHAPES, ids=str)
def test_tiles(benchmark, shape, backward):
    timed = benchmark.pedantic(
        lambda: list(time_shape(shape, backward, names=TILE_PEERS)), rounds=1
    )
    keep(TILES, timed)
    assert any(row["device_ms"] for row in timed)


def without_grad(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    plain = [tensor.detach() for tensor in tensors]
    return lambda: attend(*plain)
