"""The compiled INT8 attention: fake kernels, a gradient, and one function over csrc/quantize.cu.

Queries have a scale a row, keys one for every QUANT_ROWS rows after they lost their token mean. The
backward pass is the exact compiled one, given query and key as the forward saw them, so that its
weights are those of the forward; query, INT8 key and value are what is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldm4ts_kernels import native
from ldm4ts_kernels.requirements import constant

QUANT_ROWS = 64  # kQuantRows in csrc/sm80/int8_tiles.h
MAX_HEAD_DIM = 256


@constant
def load_error() -> str | None:
    """Load the extension if that has not happened yet; return why it cannot be used, or None."""
    if error := native.load_error():
        return error
    from ldm4ts_kernels.kernels.flops import register_attention_flops  # it imports triton

    _register_fakes()
    operators = torch.ops.ldm4ts_kernels
    register_attention_flops(operators.int8_forward, operators.int8_backward, value_at=5)
    return None


def _register_fakes() -> None:
    """Tell torch.compile and torch.export the outputs' shapes, dtypes and strides."""

    @torch.library.register_fake("ldm4ts_kernels::int8_forward")
    def _int8_forward(
        query: Tensor,  # (B, H, Q, D)
        key: Tensor,  # (B, G, K, D)
        value: Tensor,  # (B, G, K, D)
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, ...]:
        heads, keys, width = key.shape[:2], key.shape[2], -(-key.shape[3] // 16) * 16
        return (
            torch.empty_like(query),
            query.new_empty(query.shape[:-1], dtype=torch.float32),
            key.new_empty((*heads, keys, width), dtype=torch.int8),
            key.new_empty((*heads, -(-keys // QUANT_ROWS), 1), dtype=torch.float32),
            key.new_empty((*heads, 1, width), dtype=torch.float32),
        )

    @torch.library.register_fake("ldm4ts_kernels::int8_backward")
    def _int8_backward(
        dout: Tensor,
        query: Tensor,
        key_int8: Tensor,
        key_scale: Tensor,
        key_mean: Tensor,
        value: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(query), torch.empty_like(value), torch.empty_like(value)


class _Int8Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *kept = torch.ops.ldm4ts_kernels.int8_forward.default(
            query, key, value, is_causal, scale
        )
        ctx.save_for_backward(query, *kept, value, out, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        query, *kept, value, out, lse = ctx.saved_tensors
        if dout is None:  # the loss depends on the LSE alone
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:  # such as the expanded gradient of a sum
            dout = dout.contiguous()
        dq, dk, dv = torch.ops.ldm4ts_kernels.int8_backward.default(
            dout,
            query,
            *kept,
            value,
            out,
            lse,
            dlse if dlse is None else dlse.contiguous(),
            ctx.is_causal,
            ctx.scale,
            torch.are_deterministic_algorithms_enabled(),
        )
        if dlse is not None:
            # the rows of dS sum to dLSE, and the keys lack their mean
            sent = (ctx.scale * dlse).masked_fill(lse == -torch.inf, 0.0)
            groups = query.shape[1] // value.shape[1]
            mean = kept[2][..., : query.shape[-1]].repeat_interleave(groups, 1)  # (B, H, 1, D)
            dq = dq + (sent[..., None] * mean).to(dq.dtype)
        return dq, dk, dv, None, None


def int8_attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, D)
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (B, H, Q, D), (B, H, Q)
    """Compute softmax(scale * Q̂ K̂ᵀ) @ value with query and key rounded to INT8.

    Q̂ is the query, each row rounded to 255 levels of its largest value; K̂ the key without its token
    mean, with 255 levels of the largest value of every 64 rows. Value, weights and sums are not
    rounded. The gradients are those of `reference.quantised_attention` with `block_q=1` and
    `block_k=64`: rounding counts as the identity. float16 and bfloat16 on a CUDA device from sm_80
    on, D ≤ 256, H a multiple of G; no mask. `is_causal` is aligned top left, `scale` is D ** -0.5
    when None, and the natural-log LSE, float32, is that of scores with the mean key and carries a
    gradient. Strides are free but the last, which must be 1.

    The output is the same in every run; so are the gradients under
    `torch.use_deterministic_algorithms`. A value that is not finite makes its row of the query, or
    for a key all that its head computes, NaN.

    Source: SageAttention, arXiv 2410.02367; SageBwd, arXiv 2505.11594 section 4.

    Raises:
        RuntimeError: the extension is not usable (`load_error`), or an argument is not as above:
            the message names it.
    """
    if error := load_error():
        raise RuntimeError(error)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    if needs_grad and torch.is_grad_enabled():
        out, lse = _Int8Attention.apply(query, key, value, is_causal, scale)
    else:
        out, lse, *_ = torch.ops.ldm4ts_kernels.int8_forward.default(
            query, key, value, is_causal, scale
        )
    return (out, lse) if return_lse else out
