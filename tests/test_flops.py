import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="needs triton")

import ldm4ts_kernels.kernels.flash  # noqa: F401 - a counter knows the formulas of its birth
from ldm4ts_kernels import attention_fn


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
