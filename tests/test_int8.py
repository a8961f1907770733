"""INT8 attention: the kernels against the quantised oracle, that against exact attention."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.resources import SHARED_LIMIT_KIB
from ldm4ts_kernels import attention_fn, backends, explain, reference
from ldm4ts_kernels.kernels import tuning
from ldm4ts_kernels.kernels.flash import flash_attention
from ldm4ts_kernels.kernels.int8 import int8_attention
from tests.assertions import assert_as_accurate_as
from tests.cases import LARGE, SMALL, Shape, draw

NAMES = ("out", "lse", "dq", "dk", "dv")
HALVES = (torch.float16, torch.bfloat16)


def results(attend, leaves: tuple[Tensor, ...], dtype: torch.dtype, *arguments, **options):
    """Return output, LSE and the gradients of both, of `attend` run in `dtype`."""
    leaves = tuple(leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
    out, lse = attend(*leaves, *arguments, **options)
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.device) for x in (out, lse))
    seen = lse > -torch.inf
    total = (out * dout.half().to(out.dtype)).sum() + (lse * dlse.to(lse.dtype))[seen].sum()
    return [out, lse.masked_fill(~seen, 0.0), *torch.autograd.grad(total, leaves)]


def attend_int8(*leaves, **options):
    return int8_attention(*leaves, return_lse=True, **options)


def compare(leaves: tuple[Tensor, ...], *arguments, **options) -> None:
    """Hold output, LSE and gradients of the kernels to the quantised oracle in float64."""
    dtype = leaves[0].dtype
    oracle = reference.quantised_attention
    halves = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
    doubles = [x.double() if x.is_floating_point() else x for x in arguments]
    ours = results(attend_int8, leaves, dtype, *halves, **options)
    rounded = results(oracle, leaves, dtype, *halves, **options)
    exact = results(oracle, leaves, torch.float64, *doubles, **options)
    for name, own, near, true in zip(NAMES, ours, rounded, exact, strict=True):
        assert_as_accurate_as(own, near, true, name, slack=2.0 if name in ("out", "lse") else 3.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_kernels_agree_with_the_quantised_oracle(shape, dtype, device, poison):
    compare(draw(shape, dtype, device, channel_bias=4.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_kernels_agree_with_the_quantised_oracle_at_size(shape, dtype, device, poison):
    compare(draw(shape, dtype, device, channel_bias=4.0))


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [3.0, 20.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [640, 2100])
def test_kernels_agree_where_a_kept_maximum_may_be_left_behind(
    spread, head_dim, keys, device, poison
):
    compare(draw(Shape(1, 2, 1, 700, keys, head_dim), torch.bfloat16, device, spread=spread))


@pytest.mark.parametrize("lengths", [(70, 50), (50, 140)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "bottom_right": True},
        {"window": (10, 5)},
        {"scale": -0.3},
        {"scale": 0.0},
    ],
    ids=str,
)
def test_options_agree_with_the_quantised_oracle(lengths, options, device, poison):
    compare(draw(Shape(1, 2, 1, *lengths, 16), torch.float16, device), **options)


@pytest.mark.parametrize("shape", [(2, 2, 40, 150), (2, 1, 40, 1), (150,)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_agree_with_the_quantised_oracle(shape, kind, device, poison):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2)).half().to(device)
    if kind == "boolean":
        mask = mask > -0.5
    compare(draw(Shape(2, 2, 2, 40, 150, 16), torch.float16, device), mask)


def test_a_row_that_sees_no_key_gives_zero_and_sends_no_gradient(device, poison):
    leaves = draw(Shape(1, 2, 2, 20, 150, 16), torch.float16, device)
    mask = torch.ones(20, 150, dtype=torch.bool, device=device)
    mask[3] = mask[19] = False
    out, lse = int8_attention(*leaves, mask, return_lse=True)
    assert (out[:, :, [3, 19]] == 0).all()
    assert (lse[:, :, [3, 19]] == -torch.inf).all()
    ones = (torch.ones_like(out), torch.ones_like(lse))
    (dq,) = torch.autograd.grad((out, lse), leaves[0], ones)
    assert (dq[:, :, [3, 19]] == 0).all()
    compare(leaves, mask)


def cosines(spread: float, *, smooth: bool = True) -> dict[str, float]:
    """Return the cosine of the oracle's output and gradients with those of exact attention."""
    leaves = draw(
        Shape(1, 2, 2, 512, 512, 64), torch.float64, torch.device("cpu"),
        spread=spread, channel_bias=4.0,
    )  # fmt: skip
    ours = results(reference.quantised_attention, leaves, torch.float64, smooth=smooth)
    exact = results(reference.attention, leaves, torch.float64)
    return {
        name: torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()
        for name, a, b in zip(NAMES, ours, exact, strict=True)
    }


def test_the_oracle_is_within_the_published_error_of_the_method():
    found = cosines(1.0)
    assert found["out"] >= 0.9999
    assert min(found[name] for name in ("dq", "dk", "dv")) >= 0.999


@pytest.mark.parametrize(("spread", "least"), [(3.0, 0.98), (5.0, 0.90)])
def test_the_error_grows_with_the_spread_of_the_scores(spread, least, record_property):
    found = cosines(spread)
    for name, cosine in found.items():
        record_property(f"cosine_{name}_at_sigma_{spread:g}", cosine)
    assert cosines(1.0)["dq"] > found["dq"] > least


def test_smoothing_the_key_helps_where_channels_have_a_bias():
    smooth, rough = cosines(1.0), cosines(1.0, smooth=False)
    assert all(1.0 - smooth[name] < 0.5 * (1.0 - rough[name]) for name in ("out", "dq", "dk"))


def test_a_key_of_zeros_gives_the_mean_of_the_values_exactly(device):
    query, _, value = draw(Shape(1, 2, 2, 70, 64, 16), torch.float16, device)
    key = torch.zeros_like(value)
    out = int8_attention(query, key, torch.ones_like(value))
    assert (out == 1.0).all()
    (dq,) = torch.autograd.grad(int8_attention(query, key, value).sum(), query)
    assert (dq == 0).all()


def test_bfloat16_values_that_float16_cannot_hold_do_not_overflow(device):
    query, key, value = draw(Shape(1, 1, 1, 40, 70, 64), torch.bfloat16, device)
    out = int8_attention(query, key, value * 1e5)
    exact, _ = reference.quantised_attention(query.double(), key.double(), value.double() * 1e5)
    assert out.abs().max() > torch.finfo(torch.float16).max
    assert ((out.double() - exact).abs().max() / exact.abs().max()) < 2**-7


def test_a_value_that_is_not_finite_reaches_the_output(device):
    query, key, value = (x.detach() for x in draw(SMALL[5], torch.float16, device))
    query[0, 1, 3, 5] = torch.nan
    out = int8_attention(query, key, value)
    bad = torch.isnan(out).all(-1)
    assert bad[0, 1].all(), "the rows that share its scale"
    assert not bad[0, [0, 2, 3]].any()


def test_rows_of_any_stride_are_read_and_written_without_a_copy(device, poison):
    dense = draw(Shape(2, 2, 2, 21, 37, 16), torch.float16, device)
    wide = [torch.cat([x.detach().transpose(1, 2)] * 2, -1)[..., :16] for x in dense]
    strided = tuple(x.transpose(1, 2).requires_grad_() for x in wide)
    assert not any(x.is_contiguous() for x in strided)
    out, expected = int8_attention(*strided), int8_attention(*dense)
    assert out.transpose(1, 2).is_contiguous(), "the output keeps the order of heads and rows"
    assert torch.equal(out, expected)
    dout = torch.randn(2, 16, 21, 2, dtype=torch.float16, device=device).permute(0, 3, 2, 1)
    ours = torch.autograd.grad(out, strided, dout)
    theirs = torch.autograd.grad(expected, dense, dout.contiguous())
    assert all(map(torch.equal, ours, theirs))


def test_it_is_bitwise_deterministic(device):
    leaves = draw(Shape(1, 4, 2, 70, 150, 16), torch.float16, device)
    runs = [results(attend_int8, leaves, torch.float16) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.gpu
def test_250_repeats_give_the_same_bits(device):
    leaves = draw(Shape(60, 4, 4, 239, 1024, 64), torch.bfloat16, device)
    first = results(attend_int8, leaves, torch.bfloat16)
    for _ in range(250):
        again = results(attend_int8, leaves, torch.bfloat16)
        assert all(map(torch.equal, first, again))


def saved_bytes(attend, leaves: tuple[Tensor, ...]) -> int:
    """Return the bytes that `attend` keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend(*leaves)
    return sum(kept.values())


@pytest.mark.parametrize(("head_dim", "most"), [(40, 0.82), (64, 0.78), (160, 0.77)])
def test_it_keeps_less_for_the_backward_pass_than_exact_attention(head_dim, most, device):
    leaves = draw(Shape(1, 1, 1, 64, 64, head_dim), torch.float16, device)
    ours, exact = saved_bytes(int8_attention, leaves), saved_bytes(flash_attention, leaves)
    assert ours < most * exact


def test_the_operators_pass_opcheck_and_differentiate_once(device):
    leaves = draw(SMALL[1], torch.float16, device)
    options = (None, 0.3, None, None, False)
    ops = torch.ops.ldm4ts_kernels
    plain = [x.detach() for x in leaves]
    for with_shift in (False, True):
        torch.library.opcheck(ops.triton_int8_forward, (*plain, *options, with_shift))
    out, lse, _, *quantised = ops.triton_int8_forward(*leaves, *options, True)
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    theirs = torch.autograd.grad(int8_attention(*leaves, scale=0.3).sum(), leaves)
    assert all(map(torch.equal, grads, theirs))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grads[0].sum().backward()
    with pytest.raises(NotImplementedError, match="only the first output has a gradient"):
        lse.sum().backward()
    tensors = [x.detach() for x in (torch.randn_like(out), *quantised, leaves[2], out, lse)]
    arguments = (tensors[0], None, *tensors[1:], *options)
    torch.library.opcheck(ops.triton_int8_backward, arguments)


@pytest.mark.parametrize("return_lse", [False, True])
def test_it_compiles_as_one_graph_forward_and_backward(return_lse, device):
    leaves = draw(SMALL[2], torch.float16, device)

    def total(*leaves: Tensor) -> Tensor:
        result = int8_attention(*leaves, return_lse=return_lse)
        return result[0].sum() + result[1].sum() if return_lse else result.sum()

    eager = torch.autograd.grad(total(*leaves), leaves)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, eager, torch.autograd.grad(compiled(*leaves), leaves)))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs(device):
    leaves = draw(Shape(2, 2, 2, 100, 300, 64), torch.bfloat16, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile outside the capture
        torch.autograd.grad(int8_attention(*leaves).sum(), leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = int8_attention(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    expected = int8_attention(*leaves)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.sum(), leaves)))


def test_a_mask_that_asks_for_a_gradient_is_refused_by_name(device):
    leaves = draw(SMALL[0], torch.float16, device)
    mask = torch.zeros(1, 1, dtype=torch.float16, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="attn_mask must not require a gradient"):
        int8_attention(*leaves, mask)


def test_attention_fn_runs_it_by_name_and_explains_where_it_does_not_serve(device):
    leaves = draw(SMALL[5], torch.float16, device)
    options = {"enable_gqa": True, "precision": "int8"}
    out, lse = attention_fn(*leaves, **options, backend="triton_int8", return_lse=True)
    expected = int8_attention(*leaves, return_lse=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    reasons = explain(*leaves, dropout_p=0.1, **options).reasons["triton_int8"]
    assert "has no dropout" in reasons
    single = [leaf.detach().float() for leaf in leaves]
    assert (
        "takes bfloat16, float16, got float32" in explain(*single, **options).reasons["triton_int8"]
    )


def test_auto_declines_it_where_it_is_measured_to_be_slower(monkeypatch):
    call = explain(*draw(SMALL[2], torch.float16, torch.device("cpu")), precision="int8").call
    (row,) = (row for row in backends.CHAINS["int8"] if row.name == "triton_int8")
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    assert "overtakes sdpa" in row.declines(call._replace(needs_grad=False))
    assert "of sdpa's speed" in row.declines(call._replace(needs_grad=True))
    long = {"query_length": 16384, "key_length": 16384, "head_dim": 128}
    assert row.declines(call._replace(needs_grad=False, **long)) is None
    assert row.declines(call._replace(needs_grad=True, **{**long, "head_dim": 160})) is None
    assert "not yet" in row.declines(call._replace(is_causal=True, **long))


@pytest.mark.parametrize("capability", SHARED_LIMIT_KIB)
def test_every_tile_that_a_kernel_walks_over_has_one_scale(capability):
    for head_dim in range(1, 257):
        for key_length in (1, 77, 256, 100_000):
            moving = {
                stage: tuning.choose(f"int8_{stage}", head_dim, 2, key_length, capability)
                for stage in ("forward", "key_gradient", "query_gradient")
            }
            assert tuning.QUANT_ROWS % moving["forward"].block_k == 0
            assert tuning.QUANT_ROWS % moving["key_gradient"].block_q == 0
            assert tuning.QUANT_ROWS % moving["query_gradient"].block_k == 0
