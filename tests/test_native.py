"""The loader, the fakes and the gradient of the compiled kernels; on a GPU, the kernels too."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldm4ts_kernels import native, reference
from tests.assertions import assert_as_accurate_as, cancelled_terms
from tests.cases import LARGE, Shape, draw

ROOT = Path(__file__).parents[1]
SCHEMAS = [
    "".join(re.findall(r'"([^"]*)"', text))
    for text in re.findall(r"m\.def\((.*?)\);", (ROOT / "csrc/ops.cpp").read_text(), re.DOTALL)
]
LOADED = native.load_error() is None
FUSED = "_scaled_dot_product_fused_attention_overrideable"
TORCHS, OURS = "ScaledDotProductFusedAttentionOverrideableBackward0", "_FlashAttentionBackward"
built = pytest.mark.skipif(not LOADED, reason=f"{native.load_error()}")


@pytest.fixture
def library_at(monkeypatch):
    """Return a function that lets the loader find its library at a path, and says what it says."""

    def load_error_of(path: Path) -> str | None:
        monkeypatch.setattr(native, "LIBRARY", path)
        return native._load()

    return load_error_of


def test_an_install_without_the_library_says_so(library_at, tmp_path):
    assert "not part of this install" in library_at(tmp_path / "_C.so")


def test_a_file_that_is_no_library_is_a_sentence(library_at, tmp_path):
    (tmp_path / "_C.so").write_text("not a library")
    assert re.search(
        "does not load: .*(ELF|file too short|invalid)", library_at(tmp_path / "_C.so")
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
def test_an_undefined_symbol_is_named(library_at, tmp_path):
    source, target = tmp_path / "broken.cpp", tmp_path / "_C.so"
    source.write_text("void from_a_later_torch(); void call() { from_a_later_torch(); }")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    assert "from_a_later_torch" in library_at(target)


def test_calling_kernels_that_do_not_load_raises_the_sentence(monkeypatch):
    monkeypatch.setattr(native, "load_error", lambda: "no kernels here")
    with pytest.raises(RuntimeError, match="no kernels here"):
        native.flash_attention(*[torch.zeros(1, 1, 1, 8)] * 3)


def test_importing_loads_nothing():
    look = """
import torch
import ldm4ts_kernels.native
assert not hasattr(torch.ops.ldm4ts_kernels, "flash_forward")
"""
    subprocess.run([sys.executable, "-c", look], check=True, cwd=ROOT)


@built
def test_the_loaded_schemas_are_those_of_the_source():
    for schema in SCHEMAS:
        name = schema.split("(")[0]
        loaded = getattr(torch.ops.ldm4ts_kernels, name).default._schema
        wanted = torch._C.parse_schema(f"ldm4ts_kernels::{schema}")
        assert str(loaded) == str(wanted)


def forward_on_cpu(query, key, value, attn_mask, is_causal, scale, seed=None, dropout_p=0.0):
    out, lse = reference.attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
    return torch.empty_like(query).copy_(out), lse.float().contiguous()


def backward_on_cpu(dout, query, key, value, out, lse, attn_mask, dlse, is_causal, scale, *_):
    """The formulas of csrc/sm80/flash_bwd.cuh, scores and all; operators run below autograd."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ keys.mT * scale + (0.0 if attn_mask is None else attn_mask)
    p = torch.exp(scores - lse.to(scores.dtype)[..., None])
    p = p.tril() if is_causal else p
    delta = (dout * out).sum(-1, keepdim=True) - (0.0 if dlse is None else dlse[..., None])
    ds = p * (dout @ values.mT - delta) * scale
    wide = [ds @ keys, ds.mT @ query, p.mT @ dout]
    grads = [wide[0], *(x.unflatten(1, (-1, groups)).sum(2) for x in wide[1:])]
    return tuple(
        torch.empty_like(tensor).copy_(grad)
        for tensor, grad in zip((query, key, value), grads, strict=True)
    )


def fused_on_cpu(
    query, key, value, attn_bias=None, dropout_p=0.0, is_causal=False, debug=False, *, scale
):
    assert not dropout_p and not debug
    out, lse = forward_on_cpu(query, key, value, attn_bias, is_causal, scale)
    none = torch.empty(0)
    return out, lse, none, none, 0, 0, none, none, none


def fused_backward_on_cpu(dout, query, key, value, attn_bias, wanted, out, lse, *rest, scale):
    is_causal = rest[5]
    grads = backward_on_cpu(dout, query, key, value, out, lse, attn_bias, None, is_causal, scale)
    return *grads, torch.empty(0)


@pytest.fixture(scope="module")
def cpu_kernels():
    """Plain torch behind the operators' CPU key: what stands around the kernels runs anywhere."""
    library = torch.library.Library("ldm4ts_kernels", "FRAGMENT")
    patch = pytest.MonkeyPatch()
    if not LOADED:
        for schema in SCHEMAS:
            library.define(schema)
        native._register_fakes()
        native._register_autograd()
        patch.setattr(native, "load_error", lambda: None)
    library.impl("flash_forward", forward_on_cpu, "CPU")
    library.impl("flash_backward", backward_on_cpu, "CPU")
    of_torch = torch.library.Library("aten", "IMPL")
    of_torch.impl(FUSED, fused_on_cpu, "CPU")
    of_torch.impl(f"{FUSED}_backward", fused_backward_on_cpu, "CPU")
    yield
    patch.undo()
    library._destroy()
    of_torch._destroy()


def inputs_on_cpu(requires_grad: bool = True) -> list[Tensor]:
    shapes = [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)]
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in drawn]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_the_output_and_of_the_lse_are_the_references(is_causal):
    def weigh(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = native.flash_attention(
            query, key, value, is_causal=is_causal, scale=0.3, return_lse=True
        )
        return out.sum() + (out * out).sum() + lse.double().square().sum()

    found = torch.autograd.grad(weigh(*(given := inputs_on_cpu())), given)

    def weigh_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = reference.attention(query, key, value, is_causal=is_causal, scale=0.3)
        return out.sum() + (out * out).sum() + lse.square().sum()

    expected = torch.autograd.grad(weigh_reference(*given), given)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def node_of(out: Tensor) -> str:
    return out.grad_fn.name()


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_derivative_gives_the_same_gradients(is_causal, masked):
    given = inputs_on_cpu()
    mask = torch.randn(5, 7, dtype=torch.float64) if masked else None
    options = {"attn_mask": mask, "is_causal": is_causal, "scale": 0.3}
    out = native.flash_attention(*given, **options)
    other, _ = native.flash_attention(*given, **options, return_lse=True)
    assert (node_of(out), node_of(other)) == (TORCHS, OURS)
    dout = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(result, given, dout) for result in (out, other))
    assert torch.equal(out, other)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.usefixtures("cpu_kernels")
def test_the_packages_derivative_serves_what_torchs_does_not():
    given = inputs_on_cpu()

    class Tagged(Tensor):
        pass

    tagged = given[0].detach().as_subclass(Tagged).requires_grad_()
    assert node_of(native.flash_attention(tagged, *given[1:])) == OURS
    with FlopCounterMode(display=False) as counter:
        assert node_of(native.flash_attention(*given)) == OURS
    assert counter.get_total_flops() > 0
    torch.use_deterministic_algorithms(True)
    try:
        assert node_of(native.flash_attention(*given)) == OURS
    finally:
        torch.use_deterministic_algorithms(False)
    assert node_of(native.flash_attention(*given)) == TORCHS


@pytest.mark.usefixtures("cpu_kernels")
def test_a_loss_on_the_lse_alone_has_a_gradient():
    query, key, value = inputs_on_cpu()
    native.flash_attention(query, key, value, return_lse=True)[1].sum().backward()
    assert query.grad.abs().sum() > 0
    assert value.grad.abs().sum() == 0


@pytest.mark.usefixtures("cpu_kernels")
def test_the_default_scale_is_that_of_sdpa():
    query, key, value = inputs_on_cpu(requires_grad=False)
    out = native.flash_attention(query, key, value)
    torch.testing.assert_close(out, reference.attention(query, key, value)[0])


@pytest.mark.usefixtures("cpu_kernels")
def test_a_mask_that_wants_a_gradient_is_refused():
    mask = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="attn_mask must not require a gradient"):
        native.flash_attention(*inputs_on_cpu(), mask)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_large_head_dim_is_refused_with_a_gradient_and_then_only():
    query = torch.randn(1, 1, 3, 320, requires_grad=True)
    refusal = "query must have a head dim up to 256 for a gradient, got 320"
    for forward in (native.flash_attention, native.torch.ops.ldm4ts_kernels.flash_forward):
        with pytest.raises(RuntimeError, match=refusal):
            forward(query, query, query, None, False, 1.0)
    with torch.no_grad():
        out = native.flash_attention(query, query, query)
        torch.testing.assert_close(out, reference.attention(query, query, query)[0])


@pytest.mark.usefixtures("cpu_kernels")
def test_training_compiles_without_a_graph_break():
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return native.flash_attention(query, key, value, is_causal=True).square().sum()

    given = inputs_on_cpu()
    wanted = torch.autograd.grad(step(*given), given)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(torch.autograd.grad(compiled(*given), given), wanted, strict=True):
        torch.testing.assert_close(actual, expected)


def hold_to_opcheck(given: list[Tensor], mask: Tensor) -> None:
    """Check both operators, the gradient of the forward one, and that there is no second."""
    ops = torch.ops.ldm4ts_kernels
    torch.library.opcheck(ops.flash_forward.default, (*given, mask, False, 0.3))
    out, lse = ops.flash_forward.default(*given, mask, False, 0.3)
    grads = torch.autograd.grad(out.sum() + lse.sum(), given, create_graph=True)
    plain, plain_lse = native.flash_attention(*given, mask, scale=0.3, return_lse=True)
    theirs = torch.autograd.grad(plain.sum() + plain_lse.sum(), given)
    assert all(map(torch.equal, grads, theirs))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grads[0].sum().backward()
    sent = [tensor.detach() for tensor in (torch.randn_like(out), *given, out, lse)]
    torch.library.opcheck(ops.flash_backward.default, (*sent, mask, None, False, 0.3))


@pytest.mark.usefixtures("cpu_kernels")
def test_operators_pass_opcheck_and_differentiate_once():
    hold_to_opcheck(inputs_on_cpu(), torch.randn(5, 7, dtype=torch.float64))


@pytest.mark.usefixtures("cpu_kernels")
def test_forward_mode_ad_is_refused():
    query = inputs_on_cpu(requires_grad=False)[1]
    with pytest.raises(NotImplementedError, match="know neither"):
        torch.func.jvp(lambda x: native.flash_attention(x, x, x), (query,), (query,))


@pytest.mark.usefixtures("cpu_kernels")
def test_fakes_keep_the_order_of_the_querys_dimensions():
    with FakeTensorMode():
        query = torch.empty(2, 9, 4, 8, dtype=torch.float16, device="cuda").transpose(1, 2)
        out, lse = torch.ops.ldm4ts_kernels.flash_forward.default(
            query, query, query, None, False, 1.0
        )
    assert (out.shape, out.stride(), out.dtype) == (query.shape, query.stride(), query.dtype)
    assert (lse.shape, lse.dtype) == (torch.Size([2, 4, 9]), torch.float32)


# ---- on a GPU


def attend(shape: Shape, dtype: torch.dtype, **options) -> None:
    """Hold output and gradients of one call to the float64 reference."""
    inputs = draw(shape, dtype, torch.device("cuda"))
    results = []
    for call, kind in (
        (native.flash_attention, dtype),
        (reference.attention, dtype),
        (reference.attention, torch.float64),
    ):
        given = [tensor.detach().to(kind).requires_grad_() for tensor in inputs]
        out = call(*given, **options)
        out = out if isinstance(out, Tensor) else out[0]
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out, *torch.autograd.grad(out, given, dout)])
    cancelled = cancelled_terms(given, dout)
    for name, slack, *trio in zip(("out", "dq", "dk", "dv"), (2, 3, 3, 3), *results, strict=True):
        terms = cancelled if name in ("dq", "dk") else 0.0
        assert_as_accurate_as(*trio, name=name, slack=slack, cancelled=terms)


@built
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_kernels_are_as_accurate_as_torch_on_a_gpu(shape, is_causal, dtype):
    attend(shape, dtype, is_causal=is_causal)


@built
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [36, 40, 64, 80, 96, 112, 128, 160])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_blocks_that_add_to_one_dq_are_as_accurate_as_torch(head_dim, is_causal):
    shape = Shape(20, 8, 4, 540, 523, head_dim)  # blocks for most of their waves
    attend(shape, torch.bfloat16, is_causal=is_causal)
    assert backward_workspace(shape) > 4 * 20 * 8 * 540 * head_dim, "float32 sums of dq"


@built
@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_no_block_adds_to_the_dq_of_another_where_that_must_repeat():
    assert backward_workspace(Shape(20, 8, 4, 540, 523, 64)) < 4 * 20 * 8 * 540 * 8


def backward_workspace(shape: Shape) -> int:
    """Return the bytes that a backward takes beyond its gradients."""
    leaves = draw(shape, torch.bfloat16, torch.device("cuda"))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = native.flash_attention(*leaves)
    dout = torch.randn_like(out)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, leaves, dout)
    return torch.cuda.max_memory_allocated() - before - sum(grad.nbytes for grad in grads)


@built
@pytest.mark.gpu
def test_a_seed_drops_the_same_weights_in_triton():
    from ldm4ts_kernels.kernels import flash

    seed = torch.tensor([0x1234_5678_9ABC_DEF], device="cuda")
    given = [tensor.requires_grad_() for tensor in draw(LARGE[0], torch.bfloat16, seed.device)]
    results = []
    for call in (native.flash_attention, flash.flash_attention):
        out = call(*given, dropout_p=0.3, seed=seed)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
    for ours, theirs in zip(*results, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 0.01


@built
@pytest.mark.gpu
def test_dropout_draws_anew_and_keeps_the_mean():
    query, key = (torch.zeros(2, 4, 100, 64, dtype=torch.bfloat16, device="cuda") for _ in "qk")
    value = torch.ones(2, 4, 300, 64, dtype=torch.bfloat16, device="cuda")
    first, second = (native.flash_attention(query, key[:, :, :1].expand_as(value), value,
                                            dropout_p=0.25) for _ in range(2))  # fmt: skip
    assert not torch.equal(first, second)
    assert (first.float().mean() - 1.0).abs() < 0.01


@built
@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16])
def test_masks_are_as_accurate_as_torch_on_a_gpu(kind):
    mask = torch.randn(2, 1, 1, 700, device="cuda")
    attend(
        Shape(2, 4, 4, 500, 700, 80),
        torch.float16,
        attn_mask=(mask > 0) if kind == torch.bool else mask.to(kind),
    )


@built
@pytest.mark.gpu
@pytest.mark.parametrize("length", [239, 1000])
@pytest.mark.usefixtures("deterministic")
def test_no_two_of_250_runs_differ(length):
    shape = Shape(60, 4, 4, length, length, 64)
    query, key, value = draw(shape, torch.float16, torch.device("cuda"))
    first = None
    for _ in range(250):
        out, lse = native.flash_attention(query, key, value, return_lse=True)
        found = [out, lse, *torch.autograd.grad(out.sum(), (query, key, value))]
        first = first or found
        assert all(map(torch.equal, found, first))


@built
@pytest.mark.gpu
@pytest.mark.parametrize("kib", [100, 164])
def test_the_tiles_of_a_gpu_with_less_shared_memory_agree_with_sdpa(kib):
    command = [sys.executable, "-m", "tests.sanitizer_cases", "native"]
    where = {**os.environ, "LDM4TS_SHARED_KIB": str(kib)}
    ran = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "agree with SDPA" in ran.stdout


@built
@pytest.mark.gpu
def test_operators_pass_opcheck_on_a_gpu():
    given = draw(Shape(2, 4, 2, 50, 70, 40), torch.float16, torch.device("cuda"))
    hold_to_opcheck(list(given), torch.randn(50, 70, device="cuda", dtype=torch.float16))


@built
@pytest.mark.gpu
def test_forward_and_backward_replay_from_a_graph():
    given = draw(Shape(2, 4, 4, 300, 300, 64), torch.bfloat16, torch.device("cuda"))

    def step() -> tuple[Tensor, ...]:
        out = native.flash_attention(*given)
        return (out, *torch.autograd.grad(out.square().sum(), given))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in given:
            tensor.normal_()
    graph.replay()
    for actual, wanted in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=1e-2)


@built
@pytest.mark.gpu
def test_bad_arguments_are_named():
    query = torch.zeros(1, 2, 3, 8, dtype=torch.float16, device="cuda")
    for name, given in {
        "query must be float16": (query.float(), query.float(), query.float()),
        "key must have shape": (query, query[..., :4], query),
        "value must be contiguous": (query, query, query.mT.contiguous().mT),
        "key must be on the CUDA device": (query, query.cpu(), query),
        "attn_mask must broadcast": (query, query, query, query.new_zeros(5, 5)),
    }.items():
        with pytest.raises(RuntimeError, match=name):
            native.flash_attention(*given)
