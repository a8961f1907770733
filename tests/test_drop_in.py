"""`attention_fn` where other people's code called SDPA: it does what that did, or says why not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("triton", reason="needs triton")

from ldm4ts_kernels import attention_fn, explain
from tests.families import kernels_run_here

SDPA = {}
TRITON = {"backend": "triton"}
INT8 = {"precision": "int8", "backend": "triton_int8"}
BACKENDS = pytest.mark.parametrize("options", [SDPA, TRITON, INT8], ids=["auto", "triton", "int8"])
KERNELS = pytest.mark.parametrize("options", [TRITON, INT8], ids=["triton", "int8"])
UNKNOWN = "knows neither torch.func nor forward-mode AD"

pytestmark = pytest.mark.skipif(
    not (kernels_run_here() or torch.cuda.is_available()), reason="needs Triton's interpreter"
)


def random(device, *shape, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def assert_near(ours, theirs, options):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    limit = 4e-2 if options is INT8 else 4e-3
    assert (ours - theirs).norm() <= limit * theirs.norm()


@BACKENDS
@pytest.mark.parametrize(
    "shape", [(5, 16), (2, 5, 16), (3, 2, 2, 5, 16), (2, 1, 3, 2, 5, 16)], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_leading_dimensions_are_free(device, shape, masked, options):
    query, key, value = (random(device, *shape, seed=seed).requires_grad_() for seed in range(3))
    masks = [None]
    if masked:
        masks = [random(device, *shape[start:-1], 5) for start in range(len(shape) - 1)]
        masks.append(random(device, *[1] * (len(shape) - 2), 5, 5))
    for mask in masks:
        ours = attention_fn(query, key, value, mask, **options)
        theirs = F.scaled_dot_product_attention(query, key, value, mask)
        grads = [torch.autograd.grad(out.square().sum(), query) for out in (ours, theirs)]
        assert_near(ours, theirs, options)
        assert_near(*(grad for (grad,) in grads), options)


def test_the_lse_has_the_querys_leading_dimensions(device):
    query = random(device, 3, 2, 2, 5, 16)
    out, lse = attention_fn(query, query, query, **TRITON, return_lse=True)
    assert (out.shape, lse.shape) == (query.shape, query.shape[:-1])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 2, 5, 16), (2, 4, 2, 5, 16)), r"key must start with \(2, 3\) like query"),
        (((5, 16), (1, 5, 16)), "key must be 2-D like query"),
    ],
)
def test_leading_dimensions_that_differ_are_named(shapes, message):
    query, key = (torch.ones(shape) for shape in shapes)
    for function in (attention_fn, explain):
        with pytest.raises(ValueError, match=message):
            function(query, key, key)


@BACKENDS
@pytest.mark.parametrize("kind", ["boolean of keys", "float32"])
def test_a_mask_may_be_of_keys_alone_or_more_exact_than_the_query(device, kind, options):
    query, key, value = (random(device, 2, 2, 5, 16, seed=seed) for seed in range(3))
    mask = torch.arange(5, device=device) < 3
    if kind == "float32":
        mask = random(device, 5, 5, dtype=torch.float32)
    ours = attention_fn(query, key, value, mask, **options)
    theirs = F.scaled_dot_product_attention(
        query, key, value, mask[None] if mask.ndim == 1 else mask.half()
    )
    assert_near(ours, theirs, options)


def test_a_float32_masks_gradient_is_float32(device):
    query = random(device, 2, 2, 5, 16)
    grads = []
    for options in (SDPA, TRITON):
        mask = random(device, 5, 5, dtype=torch.float32).requires_grad_()
        attention_fn(query, query, query, mask, **options).square().sum().backward()
        grads.append(mask.grad)
    assert_near(*grads, TRITON)


@BACKENDS
def test_autocast_casts_each_tensor_by_itself(device, options):
    query, value = (random(device, 2, 2, 5, 16, dtype=torch.float32, seed=seed) for seed in (0, 1))
    key = random(device, 2, 2, 5, 16, dtype=torch.bfloat16, seed=2)
    mask = random(device, 5, 5, dtype=torch.float32)
    query.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        ours = attention_fn(query, key, value, mask, **options)
        theirs = F.scaled_dot_product_attention(query, key, value, mask)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    assert torch.autograd.grad(ours.sum(), query)[0].dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(ValueError, match="dtype of"):
        attention_fn(query.int(), key, value, **options)
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(ValueError, match="dtype of"):
        attention_fn(query.double(), key, value, **options)


def test_empty_inputs_give_empty_outputs(device):
    for batch, queries, keys in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        query = random(device, batch, 2, queries, 16, dtype=torch.float32)
        key = random(device, batch, 2, keys, 16, dtype=torch.float32)
        ours, theirs = (
            attention_fn(query, key, key),
            F.scaled_dot_product_attention(query, key, key),
        )
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_nested_tensors_are_left_to_sdpa(device):
    parts = [torch.randn(n, 2, 16, device=device) for n in (3, 5)]
    query = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    for function in (attention_fn, explain):
        with pytest.raises(ValueError, match="query must be a dense tensor"):
            function(query, query, query)


class Module(nn.Module):
    """Self-attention; a plug for what takes a whole module."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return attention_fn(x, x, x, **self.options)


@BACKENDS
def test_it_exports_with_a_length_that_varies(device, options):
    length = torch.export.Dim("length", min=2, max=64)
    example, longer = (random(device, 2, 2, n, 16) for n in (5, 9))
    exported = torch.export.export(Module(options), (example,), dynamic_shapes={"x": {2: length}})
    assert_near(exported.module()(longer), Module(options)(longer), options)


@BACKENDS
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.trace")
def test_a_trace_runs_other_lengths_too(device, options):
    example, longer = (random(device, 2, 2, n, 16) for n in (5, 9))
    traced = torch.jit.trace(Module(options), (example,))
    assert_near(traced(longer), Module(options)(longer), options)


@BACKENDS
def test_deterministic_algorithms_may_be_asked_for(device, options):
    query, key, value = (
        random(device, 2, 2, 9, 16, seed=seed).requires_grad_() for seed in range(3)
    )
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            out = attention_fn(query, key, value, **options)
            runs.append([out, *torch.autograd.grad(out.square().sum(), (query, key, value))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *runs))


def loss(options):
    return lambda x: attention_fn(x, x, x, **options).square().sum()


def plain_loss(x):
    return F.scaled_dot_product_attention(x, x, x).square().sum()


@pytest.mark.parametrize("keys", [5, 1])
def test_torch_func_differentiates_and_maps_it_as_it_does_sdpa(device, keys):
    batch = random(device, 3, 2, 2, 5, 16, dtype=torch.float32)

    def ours(x):
        return attention_fn(x, x[:, :, :keys], x[:, :, :keys]).square().sum()

    def theirs(x):
        return F.scaled_dot_product_attention(x, x[:, :, :keys], x[:, :, :keys]).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        mine, other = (torch.func.vmap(transform(each))(batch) for each in (ours, theirs))
        torch.testing.assert_close(mine, other)


def test_forward_mode_ad_is_that_of_sdpa(device):
    x, tangent = (random(device, 2, 2, 5, 16, dtype=torch.float32, seed=seed) for seed in (0, 1))
    with sdpa_kernel(SDPBackend.MATH):
        mine, other = (torch.func.jvp(each, (x,), (tangent,)) for each in (loss(SDPA), plain_loss))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            assert explain(dual, dual, dual).chosen == "sdpa"
            assert_near(forward_ad.unpack_dual(loss(SDPA)(dual)).tangent, other[1], SDPA)
    torch.testing.assert_close(mine, other)


@KERNELS
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_asked_for_by_name_refuses_what_it_would_drop_the_tangents_of(
    device, options, compiled
):
    x = random(device, 2, 2, 5, 16)
    transforms = {
        "jvp": lambda x: torch.func.jvp(loss(options), (x,), (x,)),
        "grad": torch.func.grad(loss(options)),
        "vmap": torch.func.vmap(loss(options)),
    }
    for name, transform in transforms.items():
        torch.compiler.reset()
        if compiled:
            transform = torch.compile(transform, backend="aot_eager")
        with pytest.raises(Exception, match=r"torch\.func"):
            transform(x[None] if name == "vmap" else x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=UNKNOWN):
        loss(options)(forward_ad.make_dual(x, x))


@KERNELS
def test_a_kernels_own_function_refuses_them_too(device, options):
    from ldm4ts_kernels.kernels.flash import flash_attention
    from ldm4ts_kernels.kernels.int8 import int8_attention

    function = int8_attention if options is INT8 else flash_attention
    x = random(device, 2, 2, 5, 16)
    with pytest.raises(NotImplementedError, match="forward-mode AD: backend='sdpa' does"):
        torch.func.jvp(lambda x: function(x, x, x), (x,), (x,))


@KERNELS
def test_a_second_derivative_is_refused_and_says_where_there_is_one(device, options):
    x = random(device, 2, 2, 5, 16).requires_grad_()
    (grad,) = torch.autograd.grad(loss(options)(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grad.sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        (grad,) = torch.autograd.grad(loss({"backend": "sdpa"})(x), x, create_graph=True)
        assert torch.autograd.grad(grad.sum(), x)[0].abs().sum() > 0
