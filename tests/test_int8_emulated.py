"""The compiled INT8 kernels' own sources on the CPU, held to the quantised oracle.

As tests/test_csrc_emulated.py holds the exact ones: races, stray accesses, copies not awaited and
bank conflicts fail the test too.
"""

import ctypes
import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm4ts_kernels.reference import attention, dequantised, quantised_attention
from tests import test_csrc_emulated as exact_kernels
from tests.test_csrc_emulated import (
    BF16,
    Case,
    FlashParams,
    Strided,
    assert_as_accurate_as,
    guards_of,
    launch,
    params_of,
    strided,
)

ROOT = Path(__file__).parents[1]
HEAD_DIMS = (64, 80, 128, 160, 256)
QUANT_ROWS = 64

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


class Int8Params(ctypes.Structure):
    """csrc/params.h, field by field; params_bytes() tells when they part ways."""

    _fields_ = [
        ("flash", FlashParams),
        *((name, Strided) for name in ("q_rounded", "k_rounded")),
        *((name, ctypes.c_int64) for name in ("k_int8", "k_scale", "k_mean", "k_sums")),
        ("smooth_lse", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("width", "parts")),
    ]


def compile_kernels(root: Path, head_dim: int, target: Path) -> ctypes.CDLL:
    """Compile the INT8 kernels of one head dim for the CPU, from the sources under `root`."""
    sources = [root / "csrc/sm80/int8_fwd.cu", root / "csrc/quantize.cu"]
    sources += [root / "tests/emulation/int8_entry.cpp"]
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-x", "c++"]
    command += [f"-DLDM_INT8_HEAD_DIM={head_dim}", f"-I{root}/tests/emulation", f"-I{root}/csrc"]
    subprocess.run([*command, *map(str, sources), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    assert library.params_bytes() == ctypes.sizeof(Int8Params)
    return library


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that gives the kernels which serve a head dim, each compiled once."""
    folder = tmp_path_factory.mktemp("emulated_int8")
    build = functools.cache(lambda dim: compile_kernels(ROOT, dim, folder / f"d{dim}.so"))
    return lambda head_dim: build(next(dim for dim in HEAD_DIMS if dim >= head_dim))


@dataclass(frozen=True)
class Forward:
    """One emulated forward: what went in, what came out, and what it keeps for the backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    params: Int8Params
    buffers: tuple[Tensor, ...]


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor within a larger one of NaN, or of −1, so that strays are seen."""
    fill = torch.nan if dtype.is_floating_point else -1
    return torch.full((torch.Size(shape).numel() + 64,), fill, dtype=dtype)[32:-32].view(shape)


def untouched(tensor: Tensor) -> bool:
    guards = guards_of(tensor)
    return bool((guards.isnan() if guards.is_floating_point() else guards == -1).all())


def run_forward(library: ctypes.CDLL, case: Case, change=None) -> Forward:
    torch.manual_seed(0)
    q = case.random(case.heads, case.q_len)
    k = case.random(case.kv_heads, case.k_len, channel_bias=4.0)
    v = case.random(case.kv_heads, case.k_len)
    if change:
        change(q, k, v)
    out = case.empty(case.heads, case.q_len)
    lse = guarded(case.batch, case.heads, case.q_len)
    width, parts = -(-case.head_dim // 16) * 16, library.parts(case.k_len)
    heads = (case.batch, case.kv_heads)
    k_int8 = guarded(*heads, case.k_len, width, dtype=torch.int8)
    k_scale = guarded(*heads, -(-case.k_len // QUANT_ROWS))
    k_mean, k_sums = guarded(*heads, width), guarded(*heads, parts, width)
    params = Int8Params(flash=params_of(case, q, k, v, None), width=width, parts=parts)
    params.flash.o, params.flash.lse = strided(out), lse.data_ptr()
    params.k_int8, params.k_scale = k_int8.data_ptr(), k_scale.data_ptr()
    params.k_mean, params.k_sums = k_mean.data_ptr(), k_sums.data_ptr()
    launch(library, False, params, case.processors)
    assert all(map(untouched, (out, lse, k_int8, k_scale, k_mean, k_sums)))
    return Forward(q, k, v, out, lse, params, (k_int8, k_scale, k_mean, k_sums))


def oracle(ran: Forward, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantised_attention(
        *(tensor.to(dtype) for tensor in (ran.q, ran.k, ran.v)),
        is_causal=case.is_causal,
        scale=case.scale,
        block_q=1,
        block_k=QUANT_ROWS,
    )


CASES = [
    Case(49, 49, 64),
    Case(77, 77, 64, BF16, is_causal=True),
    Case(130, 300, 64, BF16, heads=4, kv_heads=2, layout="BNHD"),  # sums in parts
    Case(300, 150, 64, is_causal=True, batch=2),
    Case(150, 300, 80, is_causal=True, heads=2, kv_heads=1),
    Case(33, 200, 96, BF16),
    Case(70, 90, 64, scale=-0.3),
    Case(20, 30, 64, scale=0.0),
    Case(1, 1, 64),
    Case(5, 0, 64),
    Case(50, 70, 40),
    Case(50, 60, 36),  # a head dim of whole 8 bytes
    Case(50, 300, 59, BF16, layout="BNHD"),  # of single elements
    Case(3, 17, 33),
    Case(70, 140, 128),
    Case(70, 100, 160, BF16, is_causal=True),
    Case(40, 100, 250),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_as_accurate_as_the_oracle_in_its_dtype(kernels, case):
    ran = run_forward(kernels(case.head_dim), case)
    exact, exact_lse = oracle(ran, case, torch.float64)
    rounded, _ = oracle(ran, case, case.dtype)
    assert_as_accurate_as(ran.out, rounded, exact, factor=2)
    torch.testing.assert_close(ran.lse.double(), exact_lse, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_output_points_where_exact_attention_does(kernels, head_dim):
    case = Case(130, 600, head_dim, heads=2)
    ran = run_forward(kernels(head_dim), case)
    exact, exact_lse = attention(*(tensor.double() for tensor in (ran.q, ran.k, ran.v)))
    cosine = torch.cosine_similarity(ran.out.double().flatten(), exact.flatten(), 0)
    assert cosine >= 0.9999
    assert (ran.lse - exact_lse).abs().max() < 0.05


def test_keys_are_the_oracles_integers(kernels):
    case = Case(5, 300, 80, heads=2, kv_heads=2)
    ran = run_forward(kernels(80), case)
    k_int8, k_scale, k_mean, _ = ran.buffers
    mean = ran.k.double().mean(2, keepdim=True).float()
    torch.testing.assert_close(k_mean[:, :, None, :80], mean, rtol=1e-5, atol=1e-5)
    smooth = ran.k.float() - mean
    restored = k_int8[..., :80] * k_scale.repeat_interleave(QUANT_ROWS, 2)[:, :, :300, None]
    off = (restored - dequantised(smooth, QUANT_ROWS)).abs() / k_scale.max()
    assert (off > 0.5).double().mean() < 1e-3, "a last bit of the mean may turn a tie"


def test_a_key_of_zeros_gives_the_mean_of_the_values(kernels):
    ran = run_forward(kernels(64), Case(70, 90, 64), lambda q, k, v: (k.zero_(), v.fill_(1.0)))
    assert (ran.out == 1.0).all()
    assert not ran.buffers[0].any()


def test_a_query_of_zeros_and_one_that_is_not_finite_stay_within_their_rows(kernels):
    def change(q: Tensor, k: Tensor, v: Tensor) -> None:
        q[:, :, 3] = 0.0
        q[:, :, 7, 5] = torch.nan

    ran = run_forward(kernels(64), Case(20, 90, 64), change)
    assert ran.out[0, 0, 7].isnan().all()
    assert not ran.out[0, 0, torch.arange(20) != 7].isnan().any()
    torch.testing.assert_close(
        ran.out[0, 0, 3].float(), ran.v[0, 0].float().mean(0), rtol=1e-2, atol=1e-3
    )


def test_a_key_that_is_not_finite_reaches_all_who_see_it(kernels):
    def change(q: Tensor, k: Tensor, v: Tensor) -> None:
        k[:, :, 7, 5] = torch.inf

    ran = run_forward(kernels(64), Case(20, 90, 64), change)
    assert ran.out.isnan().all()


def round_operands(library: ctypes.CDLL, case: Case, ran: Forward) -> tuple[Tensor, ...]:
    """Return query and key as the forward saw them, and the LSE of their scores."""
    q_rounded = case.empty(case.heads, case.q_len)
    k_rounded = case.empty(case.kv_heads, case.k_len)
    smooth_lse = guarded(*ran.lse.shape)
    params = ran.params
    params.q_rounded, params.k_rounded = strided(q_rounded), strided(k_rounded)
    params.smooth_lse = smooth_lse.data_ptr()
    launch(library, True, params, case.processors)
    assert all(map(untouched, (q_rounded, k_rounded, smooth_lse)))
    return q_rounded, k_rounded, smooth_lse


@pytest.mark.parametrize(
    "case",
    [Case(40, 90, 64, heads=2), Case(40, 300, 59, BF16, heads=2, kv_heads=1, layout="BNHD")],
    ids=str,
)
def test_the_backward_is_given_what_the_forward_saw(kernels, case):
    ran = run_forward(kernels(case.head_dim), case)
    q_rounded, k_rounded, smooth_lse = round_operands(kernels(case.head_dim), case, ran)
    assert torch.equal(q_rounded, dequantised(ran.q, 1).to(case.dtype))
    k_int8, k_scale, k_mean, _ = ran.buffers
    restored = k_int8 * k_scale.repeat_interleave(QUANT_ROWS, 2)[:, :, : case.k_len, None]
    assert torch.equal(k_rounded, restored[..., : case.head_dim].to(case.dtype))
    groups = case.heads // case.kv_heads
    mean = k_mean[..., None, : case.head_dim].double().repeat_interleave(groups, 1)
    shift = (ran.q.double() * mean).sum(-1) * case.head_dim**-0.5
    torch.testing.assert_close(smooth_lse.double(), ran.lse - shift, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", [Case(150, 90, 64), Case(60, 150, 64, BF16, is_causal=True)])
def test_the_exact_backward_of_what_the_forward_saw_gives_the_oracles_gradients(
    kernels, case, tmp_path
):
    ran = run_forward(kernels(64), case)
    q_rounded, k_rounded, smooth_lse = round_operands(kernels(64), case, ran)
    params = params_of(case, q_rounded, k_rounded, ran.v, None)
    params.o, params.lse = strided(ran.out), smooth_lse.data_ptr()
    exact = exact_kernels.Forward(q_rounded, k_rounded, ran.v, None, params, ran.out, smooth_lse)
    dout = case.random(case.heads, case.q_len)
    library = exact_kernels.compile_kernels(ROOT, 64, tmp_path / "exact.so")
    grads = exact_kernels.run_backward(library, case, exact, dout)
    wanted = []
    for dtype in (torch.float64, case.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (ran.q, ran.k, ran.v)]
        options = {"is_causal": case.is_causal, "block_q": 1, "block_k": QUANT_ROWS}
        out, _ = quantised_attention(*leaves, **options)
        wanted.append(torch.autograd.grad(out, leaves, dout.to(dtype)))
    for actual, true, rounded in zip(grads, *wanted, strict=True):
        assert_as_accurate_as(actual, rounded, true, factor=3)
