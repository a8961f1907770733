"""More than 2^31 elements, forward and backward: the last rows against the same rows alone."""

import gc

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from ldm4ts_kernels.kernels.flash import flash_attention
from ldm4ts_kernels.kernels.int8 import int8_attention

LAST = 128  # rows of the query that are not zero: one block of INT8
NEEDED = 30 * 2**30  # bytes; the INT8 backward takes 24 GB


def compare(attend, keys, device):
    """Attend from 2^31 elements and more, all zero but the last rows, and from those alone."""
    heads, head_dim = 4, 128
    rows = 2**31 // (heads * head_dim) + LAST
    query = torch.zeros(1, heads, rows, head_dim, dtype=torch.bfloat16, device=device)
    dout = torch.zeros_like(query)
    key, value = torch.randn(2, 1, heads, keys, head_dim, dtype=query.dtype, device=device)
    for tensor in (query, dout):
        tensor[:, :, -LAST:] = torch.randn_like(tensor[:, :, -LAST:])

    def results(query, dout):
        leaves = tuple(x.detach().requires_grad_() for x in (query, key, value))
        out = attend(*leaves)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        return out[:, :, -LAST:].clone(), dq[:, :, -LAST:].clone(), dk, dv

    ours = results(query, dout)
    alone = results(*(x[:, :, -LAST:].contiguous() for x in (query, dout)))
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), ours, alone, strict=True):
        error = (mine.float() - theirs.float()).norm()
        assert error <= 0.02 * theirs.float().norm(), f"{name}, {keys} keys"


@pytest.mark.gpu
def test_more_than_2_31_elements_have_their_gradients(device):
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < NEEDED:
        pytest.skip("needs 30 GiB of free GPU memory")
    try:
        for attend in (flash_attention, int8_attention):
            for keys in (64, 640):  # one launch; two, through tensor maps
                compare(attend, keys, device)
    except torch.OutOfMemoryError:
        pytest.skip("needs 30 GiB of GPU memory that nobody else takes")
