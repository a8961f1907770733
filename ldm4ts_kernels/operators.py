"""The kernels' forward and backward operators, for whoever drives the gradient itself.

`attention_fn` is the door for everybody else. These run below autograd: forward gives the output
and the natural-log LSE, and backward takes any LSE, so that the keys may come in parts.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels.backends import NATIVE, TRITON
from ldm4ts_kernels.kernels.autograd import below_autograd, within_backward
from ldm4ts_kernels.requirements import Call, describe

SERVERS = {row.name: row for row in (NATIVE, TRITON)}


def describe_part(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Call:
    """Describe a call of (B, H, N, D) tensors that wants an LSE and gradients."""
    return describe(
        query,
        key,
        value,
        mask=None,
        dropout=False,
        is_causal=is_causal,
        needs_grad=True,
        return_lse=True,
        default_stream=False,
    )


@functools.lru_cache(maxsize=4096)
def find_server(call: Call) -> str | None:
    """Return which of `native` and `triton`, in this order, can serve a call; None if neither."""
    return next((name for name, row in SERVERS.items() if not row.requires.unmet(call)), None)


def forward(
    server: str,
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, D)
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (B, H, Q, D), (B, H, Q)
    """Compute softmax(scale * query @ keyᵀ) @ value, and the LSE of the scores."""
    if server == "native":
        operator = torch.ops.ldm4ts_kernels.flash_forward.default
        return below_autograd(operator, query, key, value, None, is_causal, scale)
    operator = torch.ops.ldm4ts_kernels.triton_flash_forward.default
    return below_autograd(operator, query, key, value, *_triton_options(scale, is_causal))


def backward(
    server: str,
    dout: Tensor,  # (B, H, Q, D)
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, D)
    out: Tensor,  # (B, H, Q, D)
    lse: Tensor,  # (B, H, Q)
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # the shapes of query, key and value
    """Compute the gradients of `forward`, with the weights exp(scores - lse)."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    if server == "native":
        operator = torch.ops.ldm4ts_kernels.flash_backward.default
        given = (dout, query, key, value, out, lse, None, None, is_causal, scale)
        return within_backward(operator, *given)
    operator = torch.ops.ldm4ts_kernels.triton_flash_backward.default
    given = (dout, None, query, key, value, out, lse, *_triton_options(scale, is_causal), False)
    return within_backward(operator, *given)[:3]


def _triton_options(scale: float, is_causal: bool) -> tuple[Any, ...]:
    # attn_mask, seed, scale, dropout_p, softcap, left, right, bottom_right
    return None, None, scale, 0.0, None, None, 0 if is_causal else None, False
