import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="needs triton")

from ldm4ts_kernels import attention_fn, native, operators
from ldm4ts_kernels.kernels import flash, int8  # noqa: F401  before any counter is made

EXACT = {"precision": "exact", "backend": "triton"}
INT8 = {"precision": "int8", "backend": "triton_int8"}
BACKENDS = pytest.mark.parametrize("options", [EXACT, INT8], ids=lambda row: row["backend"])


def random(device, options, *shape):
    dtype = torch.float32 if options is EXACT else torch.bfloat16
    return torch.randn(shape, device=device, dtype=dtype)


@pytest.mark.parametrize("return_lse", [False, True])
@BACKENDS
def test_attention_counts_two_products_forward_and_five_backward(device, options, return_lse):
    query = random(device, options, 2, 4, 5, 16).requires_grad_()
    key, value = (random(device, options, 2, 2, 7, 16) for _ in range(2))
    with FlopCounterMode(display=False) as forward:
        result = attention_fn(query, key, value, enable_gqa=True, **options, return_lse=return_lse)
    with FlopCounterMode(display=False) as backward:
        sum(part.sum() for part in (result if return_lse else [result])).backward()
    product = 2 * 2 * 4 * 5 * 7 * 16
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product


class Block(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options
        self.to_qkv, self.to_out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):  # (B, N, C)
        query, key, value = self.to_qkv(F.gelu(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out = attention_fn(query, key, value, **self.options)
        return x + self.to_out(F.gelu(out.transpose(1, 2).flatten(2)))


class Launches(TorchDispatchMode):
    """Counts the attention operators that really run forward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        self.count += name.startswith("ldm4ts_kernels::") and name.endswith("_forward")
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("counted", [False, True])
@BACKENDS
def test_a_memory_budget_spares_attention_once_it_counts(device, options, counted):
    torch.manual_seed(0)
    x = random(device, options, 1, 128, 32)
    network = nn.Sequential(*[Block(options) for _ in range(2)]).to(device, x.dtype)
    parameters = list(network.parameters())
    expected = torch.autograd.grad(network(x).square().sum(), parameters)
    torch.compiler.reset()
    with config.patch(activation_memory_budget=0.5, is_non_builtin_to_include=counted):
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager_decomp_partition")
        loss = compiled(x).square().sum()
        with Launches() as launches:
            grads = torch.autograd.grad(loss, parameters)
    assert (launches.count == 0) == counted
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).norm() <= (1e-3 if options is EXACT else 2e-2) * theirs.norm()


def test_the_compiled_kernels_are_counted_too():
    if reason := native.load_error():
        pytest.skip(reason)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        query, key = (torch.empty(2, 4, n, 16, dtype=torch.bfloat16) for n in (5, 7))
        out, lse = operators.forward("native", query, key, key, False, 1.0)
        forward = counter.get_total_flops()
        operators.backward("native", out, query, key, key, out, lse, False, 1.0)
    product = 2 * 2 * 4 * 5 * 7 * 16
    assert (forward, counter.get_total_flops()) == (2 * product, 7 * product)
