"""The fakes and the gradient of the compiled INT8 attention; on a GPU, the kernels too."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="needs Triton")

from ldm4ts_kernels import attention_fn, explain, native_int8, reference
from ldm4ts_kernels.native_int8 import QUANT_ROWS, int8_attention
from tests.assertions import assert_as_accurate_as, cancelled_terms
from tests.cases import LARGE, Shape, draw
from tests.test_int8 import HALVES, NAMES, results
from tests.test_native import SCHEMAS, backward_on_cpu

LOADED = native_int8.load_error() is None
INT8_SCHEMAS = [schema for schema in SCHEMAS if schema.startswith("int8_")]
built = pytest.mark.skipif(not LOADED, reason=f"{native_int8.load_error()}")
gpu = pytest.mark.gpu


def oracle(*leaves: Tensor, **options) -> tuple[Tensor, Tensor]:
    return reference.quantised_attention(*leaves, block_q=1, block_k=QUANT_ROWS, **options)


def attend(*leaves: Tensor, **options) -> tuple[Tensor, Tensor]:
    return int8_attention(*leaves, return_lse=True, **options)


def forward_on_cpu(query, key, value, is_causal, scale):
    mean = key.mean(2, keepdim=True).float()
    int8, key_scale = reference.quantise(key.float() - mean, QUANT_ROWS)
    out, lse = oracle(query, key, value, is_causal=is_causal, scale=scale)
    spare = (0, -key.shape[3] % 16)
    return (
        torch.empty_like(query).copy_(out),
        lse.float().contiguous(),
        torch.nn.functional.pad(int8, spare).contiguous(),
        key_scale[..., None].contiguous(),
        torch.nn.functional.pad(mean, spare).contiguous(),
    )


def int8_backward_on_cpu(
    dout, query, key_int8, key_scale, key_mean, value, out, lse, dlse, is_causal, scale, *_
):
    rows = key_scale.repeat_interleave(QUANT_ROWS, 2)[:, :, : value.shape[2]]
    head_dim = query.shape[3]
    key = (key_int8 * rows)[..., :head_dim].to(query.dtype)
    rounded = reference.dequantised(query, 1).to(query.dtype)
    groups = query.shape[1] // value.shape[1]
    mean = key_mean[..., :head_dim].repeat_interleave(groups, 1)
    smooth = lse - (scale * query * mean).sum(-1)
    return backward_on_cpu(dout, rounded, key, value, out, smooth, None, dlse, is_causal, scale)


@pytest.fixture(scope="module")
def cpu_kernels():
    """Plain torch behind the operators' CPU key: what stands around the kernels runs anywhere."""
    library = torch.library.Library("ldm4ts_kernels", "FRAGMENT")
    patch = pytest.MonkeyPatch()
    if not LOADED:
        for schema in INT8_SCHEMAS:
            library.define(schema)
        native_int8._register_fakes()
        patch.setattr(native_int8, "load_error", lambda: None)
    library.impl("int8_forward", forward_on_cpu, "CPU")
    library.impl("int8_backward", int8_backward_on_cpu, "CPU")
    yield
    patch.undo()
    library._destroy()


def inputs_on_cpu() -> list[Tensor]:
    shapes = [(2, 4, 5, 24), (2, 2, 70, 24), (2, 2, 70, 24)]
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    drawn[1] += 2.0
    return [tensor.requires_grad_() for tensor in drawn]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_the_output_and_of_the_lse_are_the_oracles(is_causal):
    given = tuple(inputs_on_cpu())
    options = {"is_causal": is_causal, "scale": 0.3}
    ours = results(attend, given, torch.float64, **options)
    theirs = results(oracle, given, torch.float64, **options)
    for name, actual, wanted in zip(NAMES, ours, theirs, strict=True):
        torch.testing.assert_close(
            actual.double(), wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
        )


@pytest.mark.usefixtures("cpu_kernels")
def test_a_loss_on_the_lse_alone_has_a_gradient():
    query, key, value = inputs_on_cpu()
    int8_attention(query, key, value, return_lse=True)[1].sum().backward()
    assert query.grad.abs().sum() > 0
    assert value.grad.abs().sum() == 0


@pytest.mark.usefixtures("cpu_kernels")
def test_training_compiles_without_a_graph_break():
    def step(*leaves: Tensor) -> Tensor:
        return int8_attention(*leaves, is_causal=True).square().sum()

    given = inputs_on_cpu()
    wanted = torch.autograd.grad(step(*given), given)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(torch.autograd.grad(compiled(*given), given), wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("cpu_kernels")
def test_operators_pass_opcheck():
    check_operators(*[tensor.detach() for tensor in inputs_on_cpu()])


def check_operators(query: Tensor, key: Tensor, value: Tensor) -> None:
    ops = torch.ops.ldm4ts_kernels
    tests = ("test_schema", "test_faketensor")
    given = (query, key, value, False, 0.3)
    torch.library.opcheck(ops.int8_forward.default, given, test_utils=tests)
    out, lse, *kept = ops.int8_forward.default(*given)
    sent = (torch.randn_like(out), query, *kept, value, out, lse, None, False, 0.3)
    torch.library.opcheck(ops.int8_backward.default, sent, test_utils=tests)


@pytest.mark.usefixtures("cpu_kernels")
def test_fakes_keep_the_order_of_the_querys_dimensions():
    with FakeTensorMode():
        query = torch.empty(2, 9, 4, 40, dtype=torch.float16, device="cuda").transpose(1, 2)
        out, lse, key_int8, *_ = torch.ops.ldm4ts_kernels.int8_forward.default(
            query, query, query, False, 1.0
        )
    assert (out.shape, out.stride(), out.dtype) == (query.shape, query.stride(), query.dtype)
    assert (lse.shape, lse.dtype) == (torch.Size([2, 4, 9]), torch.float32)
    assert (key_int8.shape, key_int8.dtype) == (torch.Size([2, 4, 9, 48]), torch.int8)


def query_gradient_cosines(spread: float) -> tuple[float, float]:
    """Return the cosine of dQ with exact dQ: of operands as the forward saw them, and unrounded."""
    leaves = draw(
        Shape(1, 2, 2, 512, 512, 64), torch.float64, torch.device("cpu"),
        spread=spread, channel_bias=4.0,
    )  # fmt: skip
    dout = torch.randn(
        1, 2, 512, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    (exact,) = torch.autograd.grad(reference.attention(*leaves)[0], leaves[0], dout)
    query, key, value = (leaf.detach() for leaf in leaves)
    scale = 64**-0.5
    out, lse, *kept = forward_on_cpu(query, key, value, False, scale)
    seen = int8_backward_on_cpu(dout, query, *kept, value, out, lse.double(), None, False, scale)[0]
    smooth = key - kept[2].double()[..., :64]
    lse = lse - (scale * query * kept[2].double()).sum(-1)
    plain = backward_on_cpu(dout, query, smooth, value, out, lse, None, None, False, scale)[0]
    return tuple(
        torch.cosine_similarity(dq.flatten(), exact.flatten(), 0).item() for dq in (seen, plain)
    )


def test_the_backward_takes_what_the_forward_saw_since_its_lse_fits_nothing_else():
    seen, plain = query_gradient_cosines(1.0)
    assert 0.9995 < seen < plain
    seen, plain = query_gradient_cosines(5.0)
    assert plain < seen


def test_calling_kernels_that_do_not_load_raises_the_sentence(monkeypatch):
    monkeypatch.setattr(native_int8, "load_error", lambda: "no kernels here")
    with pytest.raises(RuntimeError, match="no kernels here"):
        int8_attention(*[torch.zeros(1, 1, 1, 8)] * 3)


# ---- on a GPU


def compare(leaves: tuple[Tensor, ...], **options) -> None:
    """Hold output, LSE and gradients of the kernels to the quantised oracle in float64."""
    dtype = leaves[0].dtype
    ours = results(attend, leaves, dtype, **options)
    rounded = results(oracle, leaves, dtype, **options)
    exact = results(oracle, leaves, torch.float64, **options)
    cancelled = cancelled_terms(leaves, torch.ones_like(ours[0]))
    for name, *trio in zip(NAMES, ours, rounded, exact, strict=True):
        slack = 2.0 if name in ("out", "lse") else 3.0
        terms = cancelled if name in ("dq", "dk") else 0.0
        assert_as_accurate_as(*trio, name=name, slack=slack, cancelled=terms)


CUDA = torch.device("cuda")


@built
@gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_kernels_agree_with_the_quantised_oracle_on_a_gpu(shape, is_causal, dtype):
    compare(draw(shape, dtype, CUDA, channel_bias=4.0), is_causal=is_causal)


@built
@gpu
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive_agree_with_the_oracle(scale):
    compare(draw(Shape(1, 2, 1, 70, 150, 64), torch.float16, CUDA), scale=scale)


@built
@gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 160])
def test_output_and_gradients_point_where_exact_attention_does(head_dim, dtype):
    leaves = draw(Shape(1, 4, 4, 1024, 1024, head_dim), dtype, CUDA, channel_bias=4.0)
    ours = results(attend, leaves, dtype)
    exact = results(reference.attention, leaves, torch.float64)
    for name, one, other in zip(NAMES, ours, exact, strict=True):
        cosine = torch.cosine_similarity(one.double().flatten(), other.flatten(), 0).item()
        assert cosine >= (0.9999 if name in ("out", "lse") else 0.999), (name, cosine)


@built
@gpu
@pytest.mark.parametrize("length", [239, 1000])
@pytest.mark.usefixtures("deterministic")
def test_no_two_of_250_runs_differ(length):
    leaves = draw(Shape(60, 4, 4, length, length, 64), torch.bfloat16, CUDA)
    first = None
    for _ in range(250):
        out, lse = attend(*leaves)
        found = [out, lse, *torch.autograd.grad(out.sum(), leaves)]
        first = first or found
        assert all(map(torch.equal, found, first))


@built
@gpu
def test_forward_and_backward_replay_from_a_graph():
    leaves = draw(Shape(2, 4, 4, 300, 300, 64), torch.bfloat16, CUDA)

    def step() -> tuple[Tensor, ...]:
        out = int8_attention(*leaves)
        return (out, *torch.autograd.grad(out.square().sum(), leaves))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in leaves:
            tensor.normal_()
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@built
@gpu
def test_it_compiles_as_one_graph_on_a_gpu_and_the_operators_pass_opcheck():
    leaves = draw(Shape(2, 4, 2, 100, 300, 80), torch.float16, CUDA)

    def total(*leaves: Tensor) -> Tensor:
        out, lse = attend(*leaves)
        return out.float().square().sum() + lse.sum()

    wanted = torch.autograd.grad(total(*leaves), leaves)
    compiled = torch.compile(total, fullgraph=True)
    for actual, expected in zip(
        torch.autograd.grad(compiled(*leaves), leaves), wanted, strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    check_operators(*[leaf.detach() for leaf in leaves])


@built
@gpu
def test_rows_of_any_stride_are_read_and_written_without_a_copy():
    dense = draw(Shape(2, 4, 4, 150, 300, 64), torch.float16, CUDA)
    strided = tuple(
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in dense
    )
    out, expected = int8_attention(*strided), int8_attention(*dense)
    assert out.transpose(1, 2).is_contiguous(), "the output keeps the order of heads and rows"
    assert torch.equal(out, expected)
    ours = torch.autograd.grad(out.square().sum(), strided)
    theirs = torch.autograd.grad(expected.square().sum(), dense)
    assert all(map(torch.equal, ours, theirs))


@built
@gpu
def test_attention_fn_runs_it_by_name_and_explains_where_it_does_not_serve():
    leaves = draw(Shape(1, 4, 2, 100, 200, 64), torch.float16, CUDA)
    options = {"enable_gqa": True, "precision": "int8"}
    out, lse = attention_fn(*leaves, **options, backend="native_int8", return_lse=True)
    expected = attend(*leaves)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    mask = torch.ones(100, 200, dtype=torch.bool, device=CUDA)
    assert "takes no boolean mask" in explain(*leaves, mask, **options).reasons["native_int8"]


@built
@gpu
def test_bad_arguments_are_named():
    query = torch.zeros(1, 2, 3, 8, dtype=torch.float16, device=CUDA)
    for name, given in {
        "query must be float16": (query.float(), query.float(), query.float()),
        "key must have shape": (query, query[..., :4], query),
        "value must be contiguous": (query, query, query.mT.contiguous().mT),
    }.items():
        with pytest.raises(RuntimeError, match=name):
            int8_attention(*given)
    out, lse, key_int8, *kept = torch.ops.ldm4ts_kernels.int8_forward(query, query, query, False, 1)
    with pytest.raises(RuntimeError, match="key_int8 must be what int8_forward returned"):
        torch.ops.ldm4ts_kernels.int8_backward(
            out, query, key_int8[:, :1], *kept, query, out, lse, None, False, 1
        )
