"""The CUDA kernels' own sources, compiled for the CPU and held to the float64 oracle.

tests/emulation replaces the two headers that name hardware. Races, reads of copies not yet awaited,
accesses outside shared memory and bank conflicts of ldmatrix fail the test, so a pass says more
than equal numbers; it says nothing about speed.
"""

import ctypes
import functools
import shutil
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm4ts_kernels.reference import attention

ROOT = Path(__file__).parents[1]
HEAD_DIMS = (16, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512)
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
        *(
            (name, ctypes.c_int64)
            for name in ("mask_col", "lse", "dlse", "seed", "statistics", "dq_sums", "partial")
        ),
        *((name, ctypes.c_int64) for name in ("mask_kind", "bfloat16")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads")),
        *((name, ctypes.c_int32) for name in ("q_len", "k_len", "head_dim")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("dropout_p", ctypes.c_float),
        ("repeatable", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
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
    dropout_p: float = 0.0
    layout: str = "BHND"
    processors: int = MANY
    repeatable: bool = False
    growth: float = 1.0  # of the keys, from the first to the last
    shared_kib: int = 163  # of the GPU: those of 8.6 and 8.9 have 99, Hopper 227

    def __str__(self) -> str:
        named = {field.name: field.default for field in fields(self)}
        changed = {
            name: getattr(self, name) for name in named if getattr(self, name) != named[name]
        }
        return " ".join(f"{name}={value}" for name, value in changed.items()).replace("torch.", "")

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


SEED = torch.tensor([0x1234_5678_9ABC_DEF])


def philox(seed: int, *counter: Tensor) -> Tensor:
    """Return the first of the four numbers of Philox-4x32-10 (Salmon et al. 2011), in int64."""
    low = 0xFFFF_FFFF
    first, second, third, fourth = counter
    keys = [seed & low, seed >> 32]
    for _ in range(10):
        pairs = ((first, 0xD251_1F53), (third, 0xCD9E_8D57))
        bottoms = [(x * (f >> 16) << 16) + x * (f & 0xFFFF) & low for x, f in pairs]
        # int64 has a sign: the upper half of a product of 64 bits comes from halves of the factor
        tops = [x * (f >> 16) + (x * (f & 0xFFFF) >> 16) >> 16 for x, f in pairs]
        first, third = tops[1] ^ second ^ keys[0], tops[0] ^ fourth ^ keys[1]
        second, fourth = bottoms[1], bottoms[0]
        keys = [(keys[0] + 0x9E37_79B9) & low, (keys[1] + 0xBB67_AE85) & low]
    return first


def keep_mask(case: Case) -> Tensor | None:  # (B, H, Q, K)
    """Return which weights the kernels keep: csrc/dropout.cuh."""
    if case.dropout_p == 0.0:
        return None
    heads = torch.arange(case.batch * case.heads).view(case.batch, case.heads, 1, 1)
    queries, keys = torch.arange(case.q_len).view(-1, 1), torch.arange(case.k_len)
    shape = (case.batch, case.heads, case.q_len, case.k_len)
    counter = [x.expand(shape) for x in (keys, queries, heads, torch.zeros(1, dtype=torch.int64))]
    bits = philox(int(SEED), *counter)
    bits = torch.where(bits >= 2**31, 2**32 - 1 - bits, bits)
    return bits.float() * 4.6566127342e-10 >= case.dropout_p


def guards_of(tensor: Tensor) -> Tensor:
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return torch.cat([whole[:32], whole[-32:]])


def compile_kernels(root: Path, head_dim: int, target: Path) -> ctypes.CDLL:
    """Compile the kernels of one head dim for the CPU, from the sources under `root`."""
    names = ("fwd_large", "combine") if head_dim > 256 else ("fwd", "bwd", "combine")
    sources = [root / f"csrc/sm80/flash_{name}.cu" for name in names]
    sources += [root / "tests/emulation/entry.cpp"]
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-x", "c++"]
    command += [f"-DLDM_HEAD_DIM={head_dim}", f"-I{root}/tests/emulation", f"-I{root}/csrc"]
    subprocess.run([*command, *map(str, sources), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    for floats in (library.statistics_floats, library.dq_floats, library.plan):
        floats.restype = ctypes.c_int64
    assert library.params_bytes() == ctypes.sizeof(FlashParams)
    return library


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that gives the kernels of a head dim, each compiled once."""
    folder = tmp_path_factory.mktemp("emulated")
    return functools.cache(lambda dim: compile_kernels(ROOT, dim, folder / f"d{dim}.so"))


def launch(library: ctypes.CDLL, backward: bool, params: FlashParams, processors: int) -> None:
    conflicts, error = ctypes.c_int64(), ctypes.c_char_p()
    found = [ctypes.byref(found) for found in (params, conflicts, error)]
    code = library.run(backward, found[0], processors, *found[1:])
    assert not error.value, error.value.decode()
    assert conflicts.value == 0, f"{conflicts.value} bank conflicts"
    assert code == 0


def params_of(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> FlashParams:
    params = FlashParams(q=strided(q), k=strided(k), v=strided(v))
    params.batch, params.heads, params.kv_heads = case.batch, case.heads, case.kv_heads
    params.q_len, params.k_len, params.head_dim = case.q_len, case.k_len, case.head_dim
    params.scale = case.head_dim**-0.5 if case.scale is None else case.scale
    params.causal, params.bfloat16 = case.is_causal, case.dtype == torch.bfloat16
    params.dropout_p, params.seed = case.dropout_p, SEED.data_ptr() if case.dropout_p else 0
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


@dataclass(frozen=True)
class Forward:
    """One emulated forward: what went in, what came out."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    params: FlashParams
    out: Tensor
    lse: Tensor


def run_forward(library: ctypes.CDLL, case: Case) -> Forward:
    torch.manual_seed(0)
    q = case.random(case.heads, case.q_len)
    k = case.random(case.kv_heads, case.k_len, channel_bias=2.0)
    k *= torch.linspace(1.0, case.growth, case.k_len)[:, None]
    v = case.random(case.kv_heads, case.k_len)
    out, mask = case.empty(case.heads, case.q_len), case.make_mask()
    lse = torch.full((case.batch, case.heads, case.q_len), torch.nan)
    params = params_of(case, q, k, v, mask)
    library.share(case.shared_kib * 1024)
    params.o, params.lse = strided(out), lse.data_ptr()
    size = library.plan(ctypes.byref(params), case.processors)
    partial = torch.full((size + 64,), torch.nan)
    params.partial = partial[32:].data_ptr() if size else 0
    launch(library, False, params, case.processors)
    for tensor in (out, partial):
        assert guards_of(tensor).isnan().all()
    return Forward(q, k, v, mask, params, out, lse)


def reference(case: Case, inputs: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the oracle's output and LSE in the dtype of `inputs`."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(inputs[0].dtype)
    return attention(
        *inputs,
        mask,
        is_causal=case.is_causal,
        scale=case.scale,
        keep=keep_mask(case),
        dropout_p=case.dropout_p,
    )


def library_for(kernels, case: Case) -> ctypes.CDLL:
    return kernels(next(dim for dim in HEAD_DIMS if dim >= case.head_dim))


def check_forward(library: ctypes.CDLL, case: Case) -> Forward:
    ran = run_forward(library, case)
    inputs = [ran.q, ran.k, ran.v]
    exact, exact_lse = reference(case, [x.double() for x in inputs], ran.mask)
    rounded, _ = reference(case, inputs, ran.mask)
    assert_as_accurate_as(ran.out, rounded, exact, factor=2)
    torch.testing.assert_close(ran.lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
    return ran


def run_backward(
    library: ctypes.CDLL, case: Case, ran: Forward, dout: Tensor, dlse: Tensor | None = None
) -> list[Tensor]:  # dq, dk, dv
    grads = [case.empty(case.heads, case.q_len)]
    grads += [case.empty(case.kv_heads, case.k_len) for _ in range(2)]
    params = ran.params
    params.repeatable = case.repeatable
    library.share(case.shared_kib * 1024)
    at = ctypes.byref(params)
    sizes = [library.statistics_floats(at), library.dq_floats(at, case.processors)]
    assert (sizes[1] > 0) == (case.processors == FEW and not case.repeatable)
    workspaces = [torch.full((size + 64,), torch.nan) for size in sizes]
    params.statistics, params.dq_sums = (
        workspace[32:].data_ptr() if size else 0
        for size, workspace in zip(sizes, workspaces, strict=True)
    )
    params.d_o = strided(dout)
    params.dlse = 0 if dlse is None else dlse.data_ptr()
    params.dq, params.dk, params.dv = map(strided, grads)
    launch(library, True, params, case.processors)
    for tensor in (*grads, *workspaces):
        assert guards_of(tensor).isnan().all()
    return grads


def check_backward(library: ctypes.CDLL, case: Case, with_dlse: bool = False) -> None:
    """Hold dq, dk and dv to the oracle."""
    ran = run_forward(library, case)
    dout = case.random(case.heads, case.q_len)
    dlse = torch.randn(ran.lse.shape) if with_dlse else None
    grads = run_backward(library, case, ran, dout, dlse)
    wanted = []
    for dtype in (torch.float64, case.dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (ran.q, ran.k, ran.v)]
        out, lse = reference(case, inputs, ran.mask)
        outputs, sent = [out], [dout.to(dtype)]
        if dlse is not None:
            outputs, sent = [out, lse], [*sent, dlse.to(lse.dtype)]
        wanted.append(torch.autograd.grad(outputs, inputs, sent))
    for actual, exact, rounded in zip(grads, *wanted, strict=True):
        assert_as_accurate_as(actual, rounded, exact, factor=3)


BF16 = torch.bfloat16
FORWARD = [
    Case(49, 49, 40),
    Case(77, 77, 64, BF16, is_causal=True),
    Case(130, 77, 64, processors=FEW),
    Case(196, 196, 40, BF16, heads=4, kv_heads=2, layout="BNHD", processors=FEW),
    Case(33, 300, 40, layout="BNHD", batch=2),
    Case(150, 90, 64, is_causal=True, processors=FEW),
    Case(90, 150, 64, BF16, is_causal=True, heads=2, kv_heads=1),
    # wide tiles keep the first slice's maximum, and start again where a row grows out of float32
    Case(130, 170, 64, BF16, processors=FEW),
    Case(130, 170, 64, BF16, processors=FEW, growth=8.0),
    Case(130, 170, 64, BF16, processors=FEW, growth=200.0),
    Case(300, 170, 160, BF16, processors=FEW, is_causal=True, growth=200.0),
    # those of a GPU with more or less shared memory
    Case(130, 170, 64, BF16, processors=FEW, shared_kib=227),
    Case(150, 170, 128, BF16, processors=FEW, shared_kib=227),
    *(
        Case(270, 170, head_dim, BF16, processors=FEW, is_causal=head_dim == 64, shared_kib=99)
        for head_dim in (64, 80, 96, 112, 128, 160)
    ),
    Case(40, 90, 64, mask="bool"),
    Case(40, 90, 64, BF16, mask="float", batch=2, heads=2),
    Case(40, 90, 40, mask="element", is_causal=True),
    Case(20, 30, 64, scale=-0.3),
    Case(20, 30, 64, scale=0.0),
    Case(40, 90, 40, batch=2, heads=2, kv_heads=1, dropout_p=0.3),
    Case(30, 70, 64, BF16, mask="bool", is_causal=True, dropout_p=0.6),
    Case(1, 1, 64),
    Case(5, 0, 64),
    Case(16, 16, 64, BF16, batch=3, heads=2, kv_heads=1, layout="BNHD"),  # one warp a block
    Case(25, 25, 40, is_causal=True, heads=2),
    Case(14, 77, 59, BF16),
    Case(32, 128, 16, heads=2),
    Case(17, 20, 160, BF16, is_causal=True),
    Case(50, 60, 36),  # a head dim of whole 8 bytes
    Case(50, 60, 59, BF16, layout="BNHD"),  # of single elements
    Case(3, 17, 33),
    Case(70, 100, 160),
    Case(130, 100, 160, BF16, processors=FEW),
    Case(30, 40, 192, BF16, mask="bool"),
    Case(70, 100, 256),
    Case(130, 70, 250, processors=FEW),
    Case(70, 100, 512, heads=2, kv_heads=1),
    Case(64, 64, 512, BF16, is_causal=True),
    Case(80, 50, 320, BF16, layout="BNHD", batch=2, heads=2),
    Case(90, 150, 512, BF16, is_causal=True, processors=FEW),
    Case(40, 90, 480, mask="bool", dropout_p=0.3),
    Case(30, 80, 259, BF16, mask="float", is_causal=True),
    Case(20, 30, 512, scale=-0.3),
    Case(5, 0, 512),
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward_is_as_accurate_as_torch_in_its_dtype(kernels, case):
    check_forward(library_for(kernels, case), case)


# Blocks whose keys are shared out: no more blocks than processors, and four shares of keys.
SPLIT = [
    Case(40, 1300, 40, BF16),  # narrow, 4 shares
    Case(77, 1100, 64, heads=2, processors=4),  # wide: as many queries as two narrow tiles
    Case(33, 1024, 64, BF16, heads=2, kv_heads=1, layout="BNHD", batch=2),
    Case(60, 1700, 16, is_causal=True),  # of whose shares all but the first see no key
    Case(910, 910, 80, BF16, is_causal=True, processors=20),
    Case(20, 1300, 40, mask="bool", processors=1),  # two shares
    Case(20, 1030, 64, BF16, mask="float", dropout_p=0.3),
    Case(20, 1100, 59, is_causal=True),
    Case(10, 1400, 33, BF16, scale=-0.3),
    Case(20, 2600, 64),  # more splits than a thread combines at once
    Case(20, 600, 160),
    Case(70, 300, 512, BF16, heads=2),
    Case(65, 400, 300, is_causal=True, layout="BNHD", heads=2),
]


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_keys_that_blocks_share_out_give_the_same(kernels, case):
    library = library_for(kernels, case)
    assert check_forward(library, case).params.splits > 1


def test_keys_are_shared_out_only_where_the_grid_leaves_processors_idle(kernels):
    def splits(case: Case) -> int:
        params = params_of(case, *[torch.empty(1, 1, 1, 1)] * 3, None)
        kernels(64).plan(ctypes.byref(params), case.processors)
        return params.splits

    assert splits(Case(64, 1023, 64)) == 1  # too few keys
    assert splits(Case(64, 65536, 64)) == 64
    assert splits(Case(64, 65536, 64, processors=10)) == 20  # two blocks each
    assert splits(Case(64, 65536, 64, heads=10, processors=10)) == 2
    assert splits(Case(64, 65536, 64, heads=11, processors=10)) == 1
    assert splits(Case(64, 0, 64)) == splits(Case(0, 4096, 64)) == 1


def test_a_split_forward_repeats_bit_for_bit(kernels):
    case = Case(20, 1100, 64)
    first, again = (run_forward(kernels(64), case) for _ in range(2))
    assert torch.equal(first.out, again.out) and torch.equal(first.lse, again.lse)


BACKWARD = [
    Case(49, 49, 40),
    Case(60, 33, 64, BF16, is_causal=True),
    Case(70, 77, 40, BF16, batch=2, heads=4, kv_heads=2, layout="BNHD"),
    Case(40, 64, 64, mask="bool", heads=2),
    Case(20, 40, 64, BF16, mask="float"),
    Case(20, 40, 40, mask="element", is_causal=True),
    Case(20, 30, 64, scale=-0.3),
    Case(40, 70, 40, batch=2, heads=2, kv_heads=1, dropout_p=0.3),
    Case(30, 70, 64, BF16, mask="bool", is_causal=True, dropout_p=0.6),
    Case(1, 1, 64),
    Case(20, 30, 59),
    Case(49, 49, 160),
    Case(40, 20, 256, BF16),
    Case(196, 196, 40),
    Case(150, 200, 64, BF16, is_causal=True, heads=4, kv_heads=2, layout="BNHD"),
    Case(100, 200, 59, mask="bool"),
    Case(70, 100, 160, is_causal=True),
    Case(70, 60, 256, BF16),
    Case(300, 50, 160, BF16, is_causal=True),
    Case(300, 77, 40, heads=2, kv_heads=1),
    Case(40, 270, 64, mask="bool", heads=2),
    Case(40, 70, 256, BF16, is_causal=True),
    Case(150, 130, 128),
    # narrow tiles, where a grid has more blocks than processors: paired ones above, if there are
    Case(150, 200, 64, BF16, is_causal=True, heads=4, kv_heads=2, layout="BNHD", processors=2),
    Case(70, 100, 128, processors=2),
    Case(300, 100, 160, BF16, is_causal=True, processors=2),
    # wide tiles: more keys than kFewKeys (csrc/sm80/tiles.h), more blocks than processors
    *(
        Case(*shape, repeatable=repeatable, processors=FEW, **options)
        for repeatable in (False, True)  # or joint ones
        for shape, options in (
            ((150, 270, 40, BF16), {"heads": 2}),
            ((333, 270, 64), {"is_causal": True, "heads": 2}),
            ((70, 260, 59, BF16), {"heads": 4, "kv_heads": 2, "layout": "BNHD"}),
            ((130, 257, 80), {"heads": 2}),
            ((100, 300, 96, BF16), {"heads": 4}),
            ((40, 270, 112), {"heads": 4}),
            ((70, 290, 160, BF16), {"heads": 4}),
            ((150, 260, 128), {"heads": 4, "kv_heads": 2, "is_causal": True}),
        )
    ),
    *(  # those of a GPU with more or less shared memory
        Case(130, 270, head_dim, dtype, heads=4, processors=FEW, shared_kib=shared_kib)
        for head_dim, dtype, shared_kib in (
            *((head_dim, BF16, 99) for head_dim in (40, 64, 80, 96, 128, 160)),
            *((head_dim, torch.float16, 227) for head_dim in (64, 80, 160)),
        )
    ),
]


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward_is_as_accurate_as_torch_in_its_dtype(kernels, case):
    check_backward(library_for(kernels, case), case)


@pytest.mark.parametrize("q_len", [50, 300])  # statistics by each block, and by a launch before
def test_gradient_of_the_lse_flows(kernels, q_len):
    case = Case(q_len, 90, 40)
    check_backward(library_for(kernels, case), case, with_dlse=True)


def test_backward_repeats_bit_for_bit(kernels):
    case = Case(150, 300, 40, repeatable=True)
    library = library_for(kernels, case)
    ran = run_forward(library, case)
    dout = case.random(1, case.q_len)
    first, again = (run_backward(library, case, ran, dout) for _ in range(2))
    assert all(map(torch.equal, first, again))


FAULTS = {
    "a barrier is missing": (
        ("tile.cuh", "sync_block();\n    start(step + kStages - 1);", "start(step + kStages - 1);"),
        "barrier",
    ),
    "a copy is not awaited": (
        ("tile.cuh", "copy_wait<kStages - 2>();", "copy_wait<kStages - 1>();"),
        "not waited for",
    ),
    "shared memory is not swizzled": (
        ("tile.cuh", "row >> (3 - kSwizzleBits) & kMask", "0"),
        "conflicts",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds(fault, tmp_path):
    (name, right, wrong), wanted = FAULTS[fault]
    for folder in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    source = tmp_path / "csrc/sm80" / name
    assert right in source.read_text()
    source.write_text(source.read_text().replace(right, wrong))
    library = compile_kernels(tmp_path, 64, tmp_path / "faulty.so")
    with pytest.raises(AssertionError) as found:
        run_forward(library, Case(70, 200, 64))
    assert wanted in str(found.value)
