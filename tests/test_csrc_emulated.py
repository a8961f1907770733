"""The CUDA kernels' own sources, compiled for the CPU and held to the float64 oracle.

tests/emulation replaces the two headers that name hardware. Races, reads of copies not yet awaited,
accesses outside shared memory and bank conflicts of ldmatrix fail the test, so a pass says more
than equal numbers; it says nothing about speed.
"""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm4ts_kernels.reference import attention

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "csrc/sm80/flash_fwd.cu", ROOT / "tests/emulation/entry.cpp"]
MASK_KINDS = {torch.bool: 1, torch.float16: 2, torch.bfloat16: 2, torch.float32: 3}
FEW, MANY = 1, 10_000  # processors: a grid fills one at once, and never fills the others

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


class Strided(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("data", "batch", "head", "row", "vector")
    ]  # fmt: skip


class FlashParams(ctypes.Structure):
    """csrc/params.h, field by field; params_bytes() tells when they part ways."""

    _fields_ = [
        *((name, Strided) for name in ("q", "k", "v", "o", "d_o", "dq", "dk", "dv", "mask")),
        *((name, ctypes.c_int64) for name in ("mask_col", "lse", "delta", "dlse", "dq_accum")),
        *((name, ctypes.c_int64) for name in ("mask_kind", "dq_mode", "bfloat16", "causal")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads")),
        *((name, ctypes.c_int32) for name in ("q_len", "k_len", "head_dim")),
        ("scale", ctypes.c_float),
        ("fused_delta", ctypes.c_int32),
    ]


def strided(tensor: Tensor) -> Strided:
    steps = [tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in range(3)]
    whole = all(number % 8 == 0 for number in (*steps, tensor.shape[3]))
    return Strided(tensor.data_ptr(), *steps, whole and tensor.data_ptr() % 16 == 0)


@dataclass(frozen=True)
class Case:
    """One call; `layout` is the order in which the query, key, value and output lie in memory."""

    q_len: int
    k_len: int
    head_dim: int
    dtype: torch.dtype = torch.float16
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    is_causal: bool = False
    mask: str | None = None
    scale: float | None = None
    layout: str = "BHND"
    processors: int = MANY

    def empty(self, heads: int, length: int) -> Tensor:
        """Return a (B, H, N, D) view into a larger buffer of NaN, so that strays are seen."""
        shape = (self.batch, heads, length, self.head_dim)
        if self.layout == "BNHD":
            shape = (self.batch, length, heads, self.head_dim)
        buffer = torch.full((torch.Size(shape).numel() + 64,), torch.nan, dtype=self.dtype)
        tensor = buffer[32:-32].view(shape)
        return tensor.transpose(1, 2) if self.layout == "BNHD" else tensor

    def random(self, heads: int, length: int, channel_bias: float = 0.0) -> Tensor:
        tensor = self.empty(heads, length)
        bias = channel_bias * torch.randn(self.head_dim)
        return tensor.copy_(torch.randn(tensor.shape) + bias)

    def make_mask(self) -> Tensor | None:
        visible = torch.rand(self.q_len, self.k_len) < 0.7
        visible[self.q_len // 2] = False  # a row that sees nothing
        additive = torch.randn(self.batch, 1, 1, self.k_len)
        masks = {"bool": visible, "float": additive, "element": additive.to(self.dtype)}
        return masks[self.mask] if self.mask else None


def guards_of(tensor: Tensor) -> Tensor:
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return torch.cat([whole[:32], whole[-32:]])


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that compiles the kernels of one head dim, once."""
    built: dict[int, ctypes.CDLL] = {}

    def library(head_dim: int) -> ctypes.CDLL:
        if head_dim not in built:
            target = tmp_path_factory.mktemp("emulated") / f"d{head_dim}.so"
            command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-x", "c++"]
            command += [f"-DLDM_HEAD_DIM={head_dim}", f"-I{ROOT}/tests/emulation", f"-I{ROOT}/csrc"]
            subprocess.run([*command, *map(str, SOURCES), "-o", str(target)], check=True)
            built[head_dim] = ctypes.CDLL(str(target))
            assert built[head_dim].params_bytes() == ctypes.sizeof(FlashParams)
        return built[head_dim]

    return library


def call(entry, params: FlashParams, processors: int) -> None:
    conflicts, error = ctypes.c_int64(), ctypes.c_char_p()
    code = entry(
        ctypes.byref(params), processors, ctypes.byref(conflicts), ctypes.byref(error)
    )  # fmt: skip
    assert (code, error.value, conflicts.value) == (0, b"", 0)


def params_of(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> FlashParams:
    params = FlashParams(q=strided(q), k=strided(k), v=strided(v))
    params.batch, params.heads, params.kv_heads = case.batch, case.heads, case.kv_heads
    params.q_len, params.k_len, params.head_dim = case.q_len, case.k_len, case.head_dim
    params.scale = case.head_dim**-0.5 if case.scale is None else case.scale
    params.causal, params.bfloat16 = case.is_causal, case.dtype == torch.bfloat16
    if mask is not None:
        wide = mask.expand(case.batch, case.heads, case.q_len, case.k_len)
        params.mask = Strided(mask.data_ptr(), *wide.stride()[:3], 0)
        params.mask_col, params.mask_kind = wide.stride(3), MASK_KINDS[mask.dtype]
    return params


def assert_as_accurate_as(actual: Tensor, rounded: Tensor, exact: Tensor, factor: float) -> None:
    """The largest error is within `factor` of plain torch's in the same dtype, and one rounding."""
    scale = exact.abs().max().item()
    allowed = factor * (rounded.double() - exact).abs().max().item()
    allowed += scale * torch.finfo(actual.dtype).eps + 1e-6
    error = (actual.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def run_forward(library, case: Case) -> tuple[Tensor, ...]:
    q = case.random(case.heads, case.q_len)
    k = case.random(case.kv_heads, case.k_len, channel_bias=2.0)
    v = case.random(case.kv_heads, case.k_len)
    out, mask = case.empty(case.heads, case.q_len), case.make_mask()
    lse = torch.full((case.batch, case.heads, case.q_len), torch.nan)
    params = params_of(case, q, k, v, mask)
    params.o, params.lse = strided(out), lse.data_ptr()
    call(library.forward, params, case.processors)
    assert guards_of(out).isnan().all()
    return q, k, v, mask, out, lse


def check_forward(library, case: Case) -> None:
    torch.manual_seed(0)
    q, k, v, mask, out, lse = run_forward(library, case)
    options = {"is_causal": case.is_causal, "scale": case.scale}
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact, exact_lse = attention(q.double(), k.double(), v.double(), wide, **options)
    rounded, _ = attention(q, k, v, mask, **options)
    assert_as_accurate_as(out, rounded, exact, factor=2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


FORWARD = [
    Case(49, 49, 40),
    Case(77, 77, 64, torch.bfloat16, is_causal=True),
    Case(130, 77, 64, processors=FEW),
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward_is_as_accurate_as_torch_in_its_dtype(kernels, case):
    dims = (16, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256)
    check_forward(kernels(next(dim for dim in dims if dim >= case.head_dim)), case)
