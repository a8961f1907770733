import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="needs triton")

from ldm4ts_kernels import attention_fn
from ldm4ts_kernels.kernels import (
    flash,
)  # before any counter, which knows the formulas of its birth


@pytest.mark.parametrize("return_lse", [False, True])
def test_triton_attention_counts_two_products_forward_and_five_backward(device, return_lse):
    query = torch.randn(2, 4, 5, 16, device=device, requires_grad=True)
    key, value = (torch.randn(2, 2, 7, 16, device=device) for _ in range(2))
    with FlopCounterMode(display=False) as forward:
        result = attention_fn(
            query, key, value, enable_gqa=True, backend="triton", return_lse=return_lse
        )
    with FlopCounterMode(display=False) as backward:
        sum(part.sum() for part in (result if return_lse else [result])).backward()
    product = 2 * 2 * 4 * 5 * 7 * 16
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):  # (B, N, C)
        query, key, value = self.to_qkv(F.gelu(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out = attention_fn(query, key, value, backend="triton")
        return x + self.to_out(F.gelu(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(("counted", "recomputed"), [(False, 4), (True, 0)])
def test_a_memory_budget_spares_attention_once_it_counts(device, counted, recomputed, monkeypatch):
    launches = []
    plain = flash.flash_forward
    monkeypatch.setattr(flash, "flash_forward", lambda *args: launches.append(None) or plain(*args))
    torch.manual_seed(0)
    network = nn.Sequential(*[Block() for _ in range(4)]).to(device)
    parameters = list(network.parameters())
    x = torch.randn(2, 32, 32, device=device)
    expected = torch.autograd.grad(network(x).square().sum(), parameters)
    torch.compiler.reset()
    with config.patch(activation_memory_budget=0.5, is_non_builtin_to_include=counted):
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager_decomp_partition")
        loss = compiled(x).square().sum()
        launches.clear()
        grads = torch.autograd.grad(loss, parameters)
    assert len(launches) == recomputed
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
