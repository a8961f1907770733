"""Exact attention in Triton as torch operators and one autograd Function.

`torch.ops.ldm4ts_kernels.triton_flash_forward` and `…_backward` are opaque to torch.compile, have
fake kernels, and differentiate once.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels.kernels.autograd import (
    below_autograd,
    refuse_transforms,
    register_autograd,
    within_backward,
)
from ldm4ts_kernels.kernels.flash_backward import flash_backward
from ldm4ts_kernels.kernels.flash_forward import flash_forward
from ldm4ts_kernels.kernels.flops import register_attention_flops
from ldm4ts_kernels.kernels.problem import INTERPRET, Problem

_OPTIONS = (
    "Tensor? attn_mask, Tensor? seed, float scale, float dropout_p, float? softcap, "
    "int? left, int? right, bool bottom_right"
)
_LIBRARY = torch.library.Library("ldm4ts_kernels", "FRAGMENT")
_LIBRARY.define(
    f"triton_flash_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "triton_flash_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, {_OPTIONS}, bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    if needs_float32(query):
        mask = (
            attn_mask.float() if attn_mask is not None and needs_float32(attn_mask) else attn_mask
        )
        out, lse = _forward(query.float(), key.float(), value.float(), mask, seed, *options)
        return out.to(query.dtype), lse
    out, lse = _fake_forward(query, key, value, attn_mask, seed, *options)
    problem = problem_of(query, key, attn_mask, *options)
    flash_forward(problem, query, key, value, expanded(attn_mask, query, key), seed, out, lse)
    return out, lse


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if needs_float32(query):
        mask = (
            attn_mask.float() if attn_mask is not None and needs_float32(attn_mask) else attn_mask
        )
        tensors = (tensor.float() for tensor in (query, key, value, out))
        grads = _backward(dout.float(), dlse, *tensors, lse, mask, seed, *options)
        return tuple(grad.to(query.dtype) for grad in grads)
    *options, mask_gradient = options
    dq, dk, dv = (empty_like(tensor) for tensor in (query, key, value))
    if has_no_scores(query, key):
        dmask = torch.zeros_like(attn_mask) if mask_gradient else query.new_empty(0)
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask
    dmask = None
    if mask_gradient:  # the scores' gradient, summed to the mask's shape below
        dmask = torch.zeros((*query.shape[:3], key.shape[2]), device=query.device)
    flash_backward(
        problem_of(query, key, attn_mask, *options),
        query,
        key,
        value,
        expanded(attn_mask, query, key),
        seed,
        out,
        lse,
        dout if dout.stride(3) == 1 else dout.contiguous(),
        dlse,
        dq,
        dk,
        dv,
        dmask,
    )
    if dmask is None:
        return dq, dk, dv, query.new_empty(0)
    return dq, dk, dv, dmask.sum_to_size(attn_mask.shape).to(attn_mask.dtype)


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmask = torch.empty_like(attn_mask) if options[-1] else query.new_empty(0)
    return empty_like(query), empty_like(key), empty_like(value), dmask


for _device in ("CUDA", "CPU") if INTERPRET else ("CUDA",):
    _LIBRARY.impl("triton_flash_forward", _forward, _device)
    _LIBRARY.impl("triton_flash_backward", _backward, _device)
torch.library.register_fake("ldm4ts_kernels::triton_flash_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("ldm4ts_kernels::triton_flash_backward", _fake_backward, lib=_LIBRARY)
register_attention_flops(
    torch.ops.ldm4ts_kernels.triton_flash_forward,
    torch.ops.ldm4ts_kernels.triton_flash_backward,
    value_at=4,
)


def needs_float32(tensor: Tensor) -> bool:
    # Triton's interpreter multiplies the bits of bfloat16, not its values.
    return INTERPRET and tensor.dtype == torch.bfloat16


def has_no_scores(query: Tensor, key: Tensor) -> bool:
    """Whether there is no query or no key, and so nothing that a gradient comes from."""
    return 0 in (query.shape[2], key.shape[2])


def empty_like(tensor: Tensor) -> Tensor:  # (B, H, N, D)
    """Allocate in the order of heads and rows that the tensor has, without gaps."""
    batch, heads, rows, width = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(batch, rows, heads, width).transpose(1, 2)
    return tensor.new_empty(batch, heads, rows, width)


def expanded(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if attn_mask is None:
        return None
    mask = attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask
    return mask.expand(*query.shape[:3], key.shape[2])  # strides 0 where it broadcasts


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def problem_of(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
    bottom_right: bool,
) -> Problem:
    return Problem(
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        query_length=query.shape[2],
        key_length=key.shape[2],
        head_dim=query.shape[3],
        dtype=query.dtype,
        scale=scale,
        capability=_capability(query.device),
        mask=0 if attn_mask is None else 1 if attn_mask.dtype == torch.bool else 2,
        dropout_p=dropout_p,
        softcap=softcap,
        window=(left, right),
        bottom_right=bottom_right,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attn_mask, seed, *options = inputs
    ctx.save_for_backward(query, key, value, *output, attn_mask, seed)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, attn_mask, seed = ctx.saved_tensors
    mask_gradient = ctx.needs_input_grad[3]
    dq, dk, dv, dmask = within_backward(
        torch.ops.ldm4ts_kernels.triton_flash_backward.default,
        torch.zeros_like(out) if dout is None else dout,
        dlse if dlse is None else dlse.contiguous(),
        query,
        key,
        value,
        out,
        lse,
        attn_mask,
        seed,
        *ctx.options,
        mask_gradient,
    )
    return dq, dk, dv, dmask if mask_gradient else None, None, *[None] * len(ctx.options)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = below_autograd(torch.ops.ldm4ts_kernels.triton_flash_forward.default, *inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


register_autograd(
    torch.ops.ldm4ts_kernels.triton_flash_forward.default,
    torch.ops.ldm4ts_kernels.triton_flash_backward.default,
    save=_save,
    differentiate=_differentiate,
    library=_LIBRARY,
)


def flash_attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, D)
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Q, K)
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # (1,) int64
    is_causal: bool = False,
    bottom_right: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (B, H, Q, D), and with return_lse also (B, H, Q)
    """Compute softmax(scale · query @ keyᵀ + attn_mask) @ value, exactly and differentiably.

    Args:
        query, key, value: float16, bfloat16 or float32; D from 1 to 512 (float32: 256), stride 1
            in the last dimension, others free. H is a multiple of G.
        attn_mask: bool (True attends) or floating (added); its gradient costs (B, H, Q, K) float32.
        dropout_p: probability of dropping a weight; `seed` fixes which, and is drawn when None.
        is_causal, bottom_right, window, softcap, scale: as `reference.attention` defines them.
        return_lse: also return the natural-log LSE, float32; it carries gradients.

    A query that may attend no key gives 0, LSE -inf, and sends no gradient. The backward pass is
    deterministic, and has no derivative. Under torch.func and forward-mode AD it raises
    NotImplementedError. Source: FlashAttention-2, arXiv 2307.08691.
    """
    refuse_transforms()
    left, right = window
    if is_causal:
        right = 0 if right is None else min(right, 0)
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**62, (1,), device=query.device)  # graph-safe: torch's own generator
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    options = (attn_mask, seed, scale, dropout_p, softcap, left, right, bottom_right)
    grads = query.requires_grad or key.requires_grad or value.requires_grad
    grads = grads or (attn_mask is not None and attn_mask.requires_grad)
    if grads and torch.is_grad_enabled():
        out, lse = _FlashAttention.apply(query, key, value, *options)
    else:
        forward = torch.ops.ldm4ts_kernels.triton_flash_forward.default
        out, lse = below_autograd(forward, query, key, value, *options)
    return (out, lse) if return_lse else out
