"""The Triton kernels against the reference: interpreted without a GPU, at all sizes with one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from ldm4ts_kernels import reference
from ldm4ts_kernels.kernels import flash_forward
from ldm4ts_kernels.kernels.flash import flash_attention
from ldm4ts_kernels.kernels.int8 import int8_attention
from ldm4ts_kernels.kernels.problem import Problem
from tests.assertions import assert_as_accurate_as, cancelled_terms
from tests.cases import AUTOENCODER, LARGE, SMALL, Shape, draw

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def compare(leaves: tuple[Tensor, ...], options: dict, *, keep: Tensor | None = None) -> None:
    """Hold output, LSE and every gradient of the kernel to the reference in float64."""
    seed = options.get("seed")
    plain = {name: value for name, value in options.items() if name != "seed"}
    if keep is not None:
        plain["keep"] = keep
    ours = flash_attention(*leaves, return_lse=True, **options)
    torch.manual_seed(1)
    dout, dlse = torch.randn_like(ours[0]), torch.randn_like(ours[1])

    def results(outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
        out, lse = outputs
        seen = lse > -torch.inf
        total = (out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype))[seen].sum()
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        return [out, lse.masked_fill(~seen, 0.0), *torch.autograd.grad(total, wanted)]

    def recast(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(
            tensor.detach().to(dtype).requires_grad_() if tensor.is_floating_point() else tensor
            for tensor in leaves
        )

    exact_leaves, rounded_leaves = recast(torch.float64), recast(leaves[0].dtype)
    exact = results(reference.attention(*exact_leaves, **plain), exact_leaves)
    rounded = results(reference.attention(*rounded_leaves, **plain), rounded_leaves)
    names = ("out", "lse", "dq", "dk", "dv", "dmask")
    assert seed is None or keep is not None
    # The backward pass forms exp(S - LSE), and float32 rounds LSE itself: a relative error of
    # |LSE| · eps in every weight, which plain torch, keeping the weights, does not have.
    float32 = leaves[0].dtype == torch.float32
    of_lse = max(1.0, exact[1].abs().max().item()) if float32 else 1.0
    # On a GPU a float32 product is three tf32 ones (tf32x3): two operands kept to 2^-22 and the
    # product of their rests left out make 3 · 2^-22 = 6 eps; the output is a product of a product.
    of_product = 12.0 if float32 and leaves[0].is_cuda else 1.0
    cancelled = cancelled_terms(leaves, dout)
    for name, own, near, true in zip(names, results(ours, leaves), rounded, exact, strict=False):
        slack, roundings, terms = 3.0, of_product * of_lse, cancelled
        if name in ("out", "lse"):
            slack, roundings, terms = 2.0, of_product, 0.0
        assert_as_accurate_as(own, near, true, name, slack, roundings, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_output_and_gradients_are_as_accurate_as_plain_torch(shape, dtype, device, poison):
    compare(draw(shape, dtype, device), {})


@pytest.mark.parametrize(
    "shape", [Shape(1, 1, 1, 20, 40, 512), Shape(1, 1, 1, 9, 30, 320)], ids=str
)
def test_head_dims_past_256_are_as_accurate_as_plain_torch(shape, device, poison):
    compare(draw(shape, torch.float16, device), {})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in [*LARGE, *AUTOENCODER] for dtype in DTYPES[1:]]
    + [(shape, torch.float32) for shape in LARGE if shape.D in (24, 64, 160)],
    ids=str,
)
def test_large_shapes_are_as_accurate_as_plain_torch(shape, dtype, device, poison):
    compare(draw(shape, dtype, device), {})


OPTIONS = [
    {"is_causal": True},
    {"is_causal": True, "bottom_right": True},
    {"window": (10, 5)},
    {"window": (None, 3)},
    {"window": (4, None), "is_causal": True},
    {"softcap": 2.0},
    {"scale": -0.3},
    {"scale": 1},
]


@pytest.mark.parametrize("lengths", [(70, 50), (50, 140), (33, 33)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_agree_with_the_reference(lengths, options, device, poison):
    compare(draw(Shape(1, 2, 1, *lengths, 16), torch.float32, device), options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 160])
def test_options_agree_where_rows_are_long_enough_for_tensor_maps(
    head_dim, options, device, poison
):
    compare(draw(Shape(1, 2, 1, 700, 640, head_dim), torch.bfloat16, device), options)


@pytest.mark.parametrize("shape", [(1, 2, 40, 70), (2, 1, 40, 1), (1, 1, 1, 70), (40, 70), (70,)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("keys", [70, 150])
def test_masks_broadcast_and_additive_ones_have_a_gradient(shape, kind, keys, device, poison):
    shape = tuple(keys if size == 70 else size for size in shape)
    leaves = draw(Shape(2, 2, 2, 40, keys, 16), torch.float32, device)
    mask = torch.randn(shape, device=device)
    mask = mask > -0.5 if kind == "boolean" else mask.requires_grad_()
    compare((*leaves, mask), {})


@pytest.mark.parametrize("keys", [50, 150])
def test_a_row_that_sees_no_key_gives_zero_and_sends_no_gradient(keys, device, poison):
    leaves = draw(Shape(1, 2, 2, 20, keys, 16), torch.float32, device)
    mask = torch.ones(20, keys, dtype=torch.bool, device=device)
    mask[3] = mask[19] = False
    out, lse = flash_attention(*leaves, mask, return_lse=True)
    assert (out[:, :, [3, 19]] == 0).all()
    assert (lse[:, :, [3, 19]] == -torch.inf).all()
    compare((*leaves, mask), {})


@pytest.mark.parametrize("keys", [50, 150])
def test_dropout_drops_the_same_weights_forward_and_backward(keys, device, poison):
    shape = Shape(1, 2, 2, 40, keys, 16)
    query, key, _ = draw(shape, torch.float32, device)
    seed = torch.tensor([12345], device=device)
    # With the identity as value the output is the weights themselves, so the drop mask shows.
    identity = torch.eye(keys, device=device).expand(1, 2, keys, keys)
    blocks = identity.split(16, dim=-1)
    weights = [
        flash_attention(query, key, torch.nn.functional.pad(block, (0, 16 - block.shape[-1])),
                        dropout_p=0.3, seed=seed)
        for block in blocks
    ]  # fmt: skip
    keep = torch.cat(weights, -1)[..., :keys].detach() != 0
    assert abs(keep.float().mean().item() - 0.7) < 0.03
    compare(draw(shape, torch.float32, device), {"dropout_p": 0.3, "seed": seed}, keep=keep)


def test_dropout_differs_between_calls_and_repeats_under_a_seed(device):
    leaves = draw(Shape(1, 1, 1, 20, 20, 16), torch.float32, device)
    torch.manual_seed(0)
    first, second = (flash_attention(*leaves, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    again = flash_attention(*leaves, dropout_p=0.5)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_rows_of_any_stride_are_read_and_written_without_a_copy(device, poison):
    shape = Shape(2, 2, 2, 21, 37, 16)
    dense = draw(shape, torch.float32, device)
    packed = [tensor.detach().transpose(1, 2).contiguous() for tensor in dense]
    wide = [torch.cat([tensor, tensor], -1)[..., :16] for tensor in packed]
    strided = tuple(tensor.transpose(1, 2).requires_grad_() for tensor in wide)
    assert not any(tensor.is_contiguous() for tensor in strided)
    dout = torch.randn(2, 21, 2, 16, device=device).transpose(1, 2)
    out = flash_attention(*strided)
    assert out.transpose(1, 2).is_contiguous(), "the output keeps the order of heads and rows"
    expected = flash_attention(*dense)
    assert torch.equal(out, expected)
    ours = torch.autograd.grad(out, strided, dout)
    theirs = torch.autograd.grad(expected, dense, dout.contiguous())
    assert all(map(torch.equal, ours, theirs))
    broadcast = torch.autograd.grad(flash_attention(*dense).sum(), dense)  # stride-0 gradient
    assert all(torch.isfinite(grad).all() for grad in broadcast)


@pytest.mark.parametrize("keys", [40, 150])
def test_the_backward_is_bitwise_deterministic(keys, device):
    leaves = draw(Shape(1, 4, 2, 70, keys, 16), torch.float16, device)
    dout = torch.randn(1, 4, 70, 16, dtype=torch.float16, device=device)
    runs = [torch.autograd.grad(flash_attention(*leaves), leaves, dout) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        Shape(60, 4, 4, 239, 1024, 64),
        Shape(8, 4, 4, 1100, 1024, 64),
        Shape(8, 4, 4, 1023, 1024, 128),
    ],
    ids=str,
)
def test_250_repeats_give_the_same_bits(shape, device):
    leaves = draw(shape, torch.bfloat16, device)
    dout = torch.randn_like(leaves[0])
    first = torch.autograd.grad(flash_attention(*leaves), leaves, dout)
    for _ in range(250):
        again = torch.autograd.grad(flash_attention(*leaves), leaves, dout)
        assert all(map(torch.equal, first, again))


@pytest.fixture
def steady(monkeypatch):
    """Give every forward tiles of 32 keys that keep the maximum of the first."""
    config = Problem.config

    def steady_config(self, stage, **options):
        own = config(self, stage, **options)
        return replace(own, block_k=32, steady=True) if stage == "forward" else own

    flash_forward._plan.cache_clear()
    monkeypatch.setattr(Problem, "config", steady_config)
    yield
    flash_forward._plan.cache_clear()


# With the larger spreads later scores leave float32, and the kernel has to start again.
@pytest.mark.parametrize("spread", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("keys", [32, 50, 150])
def test_a_maximum_that_is_kept_does_not_show(spread, keys, device, poison, steady):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    compare(draw(Shape(1, 2, 1, 40, keys, 16), dtype, device, spread=spread), {})


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("head_dim", [40, 64, 80])
@pytest.mark.parametrize("keys", [640, 2100])
def test_a_maximum_that_is_kept_does_not_show_where_tensor_maps_load(
    spread, head_dim, keys, device, poison
):
    leaves = draw(Shape(1, 2, 1, 700, keys, head_dim), torch.bfloat16, device, spread=spread)
    compare(leaves, {})


def test_a_maximum_that_is_kept_passes_on_what_is_not_finite(device, steady):
    query, key, value = (
        leaf.detach() for leaf in draw(Shape(1, 1, 1, 40, 150, 16), torch.float32, device)
    )
    query[:, :, 7] = torch.nan
    value[:, :, 100, 3] = torch.inf
    out = flash_attention(query, key, value)
    rows = torch.arange(40, device=device) != 7
    assert torch.isnan(out[0, 0, 7]).all()
    assert (out[0, 0, rows, 3] == torch.inf).all()
    exact, _ = reference.attention(query, key, value)
    finite = [column for column in range(16) if column != 3]
    torch.testing.assert_close(out[0, 0, rows][:, finite], exact[0, 0, rows][:, finite])


@pytest.mark.parametrize("attend", [flash_attention, int8_attention])
@pytest.mark.parametrize("lengths", [(5, 0), (0, 5)])
def test_without_keys_or_queries_it_gives_zeros_and_gradients_of_zero(attend, lengths, device):
    leaves = draw(Shape(1, 2, 2, *lengths, 16), torch.float16, device)
    out, lse = attend(*leaves, return_lse=True)
    assert out.shape == leaves[0].shape
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


def test_a_nan_reaches_only_the_rows_it_belongs_to(device):
    query, key, value = draw(Shape(1, 1, 1, 40, 50, 16), torch.float32, device)
    with torch.no_grad():
        query[:, :, 7] = torch.nan
        query[:, :, 9] = torch.inf
    out = flash_attention(query, key, value)
    bad = torch.isnan(out).any(-1)[0, 0]
    assert bad[7]
    assert not bad[[i for i in range(40) if i not in (7, 9)]].any()


def test_many_queries_of_few_keys_are_summed_in_splits(device, poison):
    compare(draw(Shape(1, 1, 1, 900, 20, 16), torch.float32, device), {})


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_the_operators_pass_opcheck_and_differentiate_once(kind, device):
    leaves = draw(SMALL[1], torch.float32, device)
    mask = None
    if kind is not None:
        mask = torch.randn(*SMALL[1][3:5], device=device)
        mask = mask > 0 if kind == torch.bool else mask.requires_grad_()
    options = (mask, None, 0.3, 0.0, None, None, None, False)
    ops = torch.ops.ldm4ts_kernels
    torch.library.opcheck(ops.triton_flash_forward, (*leaves, *options))
    out, lse = ops.triton_flash_forward(*leaves, *options)
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves, create_graph=True)
    plain, plain_lse = flash_attention(*leaves, mask, scale=0.3, return_lse=True)
    theirs = torch.autograd.grad(plain.sum() + plain_lse.sum(), leaves)
    assert all(map(torch.equal, grads, theirs))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grads[0].sum().backward()
    tensors = [tensor.detach() for tensor in (torch.randn_like(out), *leaves, out, lse)]
    options = (None if mask is None else mask.detach(), *options[1:], mask is not None)
    arguments = (tensors[0], None, *tensors[1:], *options)
    torch.library.opcheck(ops.triton_flash_backward, arguments)


def test_it_compiles_as_one_graph_forward_and_backward(device):
    leaves = draw(SMALL[2], torch.float32, device)
    eager = torch.autograd.grad(flash_attention(*leaves).sum(), leaves)
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    assert all(map(torch.equal, eager, ours))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs_and_new_dropout(device):
    leaves = draw(Shape(2, 2, 2, 100, 300, 64), torch.bfloat16, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile outside the capture
        torch.autograd.grad(flash_attention(*leaves, dropout_p=0.1).sum(), leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dropped = flash_attention(*leaves, dropout_p=0.1)
        out = flash_attention(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
    graph.replay()
    first = dropped.clone()
    graph.replay()
    assert not torch.equal(first, dropped)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    expected = flash_attention(*leaves)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.sum(), leaves)))


@pytest.mark.gpu
def test_more_than_2_31_elements_are_addressed(device):
    rows = 2**31 // (4 * 128) + 100
    query = torch.zeros(1, 4, rows, 128, dtype=torch.float16, device=device)
    key, value = torch.randn(2, 1, 4, 64, 128, dtype=torch.float16, device=device)
    query[:, :, -70:] = torch.randn(1, 4, 70, 128, dtype=torch.float16, device=device)
    out = flash_attention(query, key, value)
    exact = reference.attention(query[:, :, -70:].double(), key.double(), value.double())[0]
    assert (out[:, :, -70:].double() - exact).abs().max() < 5e-3
