"""Exact and INT8 attention in Triton, forward and backward, as Hugging Face's `kernels` loads them.

`flash_attention` and `int8_attention` take (B, H, N, D); `flash_attn_func` takes (B, N, H, D), as
the wheels of FlashAttention do.
"""

from typing import Any

from torch import Tensor

from .flash import flash_attention  # noqa: TID252  a Hub kernel goes by no name of its own
from .int8 import int8_attention  # noqa: TID252

__all__ = ["flash_attention", "flash_attn_func", "int8_attention"]


def flash_attn_func(
    q: Tensor,  # (B, Q, H, D)
    k: Tensor,  # (B, K, G, D)
    v: Tensor,  # (B, K, G, D)
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:  # (B, Q, H, D)
    """Compute `flash_attention` in the layout, the names and the causal mask of the wheels.

    That mask is aligned bottom right: the last query attends every key.
    """
    out: Any = flash_attention(
        *(tensor.transpose(1, 2) for tensor in (q, k, v)),
        dropout_p=dropout_p,
        scale=softmax_scale,
        is_causal=causal,
        bottom_right=causal,
    )
    return out.transpose(1, 2)
