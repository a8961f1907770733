"""INT8 attention in Triton as torch operators and one autograd Function.

`torch.ops.ldm4ts_kernels.triton_int8_forward` and `…_backward` are opaque to torch.compile, have
fake kernels, and differentiate once. The backward pass needs the INT8 query and key, so they are
what is kept of the two: with value, output and a few numbers a row, 6 bytes an element of a head
instead of the 8 that exact attention keeps. While it runs it has both in 16 bits, too, of one layer
at a time.
"""

from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels.kernels.autograd import (
    below_autograd,
    refuse_transforms,
    register_autograd,
    within_backward,
)
from ldm4ts_kernels.kernels.flash import (
    INTERPRET,
    empty_like,
    expanded,
    has_no_scores,
    needs_float32,
    problem_of,
)
from ldm4ts_kernels.kernels.flash_forward import flash_forward
from ldm4ts_kernels.kernels.flops import register_attention_flops
from ldm4ts_kernels.kernels.int8_backward import int8_backward
from ldm4ts_kernels.kernels.problem import Problem
from ldm4ts_kernels.kernels.quantize import Quantised, empty_quantised, quantise

_OPTIONS = "Tensor? attn_mask, float scale, int? left, int? right, bool bottom_right"
_QUANTISED = ", ".join(f"Tensor {name}" for name in Quantised._fields)
_LIBRARY = torch.library.Library("ldm4ts_kernels", "FRAGMENT")
_LIBRARY.define(
    f"triton_int8_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS}, bool with_shift) -> "
    f"({', '.join(['Tensor'] * (3 + len(Quantised._fields)))})"
)
_LIBRARY.define(
    f"triton_int8_backward(Tensor dout, Tensor? dlse, {_QUANTISED}, Tensor value, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    if needs_float32(query):
        tensors = (tensor.float() for tensor in (query, key, value))
        out, *rest = _forward(*tensors, _as_float32(attn_mask), *options)
        return out.to(query.dtype), *rest
    out, lse, lse_shift, *rest = _fake_forward(query, key, value, attn_mask, *options)
    *options, with_shift = options
    if has_no_scores(query, key):
        return out.zero_(), lse.fill_(-torch.inf), lse_shift.zero_(), *rest
    problem = _int8_problem(query, key, attn_mask, *options)
    quantised = Quantised(*rest)
    quantise(problem, query, key, quantised, lse_shift if with_shift else None)
    flash_forward(
        problem,
        quantised.query,
        quantised.key,
        value,
        expanded(attn_mask, query, key),
        None,
        out,
        lse,
        quantised.query_scale,
        quantised.key_scale,
    )
    return out, lse, lse_shift, *quantised


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, ...]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    lse_shift = torch.empty_like(lse) if options[-1] else lse.new_empty(0)
    return empty_like(query), lse, lse_shift, *empty_quantised(query, key)


def _backward(dout: Tensor, dlse: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *quantised, value, out, lse, attn_mask, scale, left, right, bottom_right = arguments
    options = (scale, left, right, bottom_right)
    if needs_float32(value):
        tensors = (value.float(), out.float(), lse, _as_float32(attn_mask))
        grads = _backward(dout.float(), dlse, *quantised, *tensors, *options)
        return tuple(grad.to(value.dtype) for grad in grads)
    dq, dk, dv = _fake_backward(dout, dlse, *arguments)
    if has_no_scores(out, value):
        return dq.zero_(), dk.zero_(), dv.zero_()
    int8_backward(
        _int8_problem(out, value, attn_mask, *options),
        Quantised(*quantised),
        value,
        expanded(attn_mask, out, value),
        out,
        lse,
        dout if dout.stride(3) == 1 else dout.contiguous(),
        dlse,
        dq,
        dk,
        dv,
    )
    return dq, dk, dv


def _fake_backward(dout: Tensor, dlse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    value, out = arguments[len(Quantised._fields) :][:2]
    return empty_like(out), empty_like(value), empty_like(value)


for _device in ("CUDA", "CPU") if INTERPRET else ("CUDA",):
    _LIBRARY.impl("triton_int8_forward", _forward, _device)
    _LIBRARY.impl("triton_int8_backward", _backward, _device)
torch.library.register_fake("ldm4ts_kernels::triton_int8_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("ldm4ts_kernels::triton_int8_backward", _fake_backward, lib=_LIBRARY)
register_attention_flops(
    torch.ops.ldm4ts_kernels.triton_int8_forward,
    torch.ops.ldm4ts_kernels.triton_int8_backward,
    value_at=2 + len(Quantised._fields),
)


def _as_float32(attn_mask: Tensor | None) -> Tensor | None:
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return attn_mask
    return attn_mask.float()


def _int8_problem(
    query: Tensor,  # (B, H, Q, D), or any tensor of its shape and dtype
    key: Tensor,  # (B, G, K, D), likewise
    attn_mask: Tensor | None,
    scale: float,
    *band: Any,
) -> Problem:
    dropout_p, softcap = 0.0, None
    problem = problem_of(query, key, attn_mask, scale, dropout_p, softcap, *band)
    return problem._replace(int8=True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, value, attn_mask, *options, _ = inputs
    out, lse, _, *quantised = output
    ctx.save_for_backward(*quantised, value, out, lse, attn_mask)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *kept, out, lse, attn_mask = ctx.saved_tensors
    dq, dk, dv = within_backward(
        torch.ops.ldm4ts_kernels.triton_int8_backward.default,
        torch.zeros_like(out) if dout is None else dout,
        dlse if dlse is None else dlse.contiguous(),
        *kept,
        out,
        lse,
        attn_mask,
        *ctx.options,
    )
    return dq, dk, dv, None, *[None] * len(ctx.options)


def _differentiate_operator(ctx: Any, dout: Tensor | None, *others: Tensor | None) -> Any:
    if any(grad is not None for grad in others):
        raise NotImplementedError("of triton_int8_forward only the first output has a gradient")
    return *_differentiate(ctx, dout, None), None


class _Int8Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, return_lse: bool, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        arguments = (*inputs, return_lse)  # the shift is needed where the LSE is
        output = below_autograd(torch.ops.ldm4ts_kernels.triton_int8_forward.default, *arguments)
        _save(ctx, arguments, output)
        out, lse, lse_shift, *_ = output
        return out, lse + lse_shift if return_lse else None

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_differentiate(ctx, dout, dlse)


register_autograd(
    torch.ops.ldm4ts_kernels.triton_int8_forward.default,
    torch.ops.ldm4ts_kernels.triton_int8_backward.default,
    save=_save,
    differentiate=_differentiate_operator,
    library=_LIBRARY,
)


def int8_attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, D)
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Q, K)
    *,
    is_causal: bool = False,
    bottom_right: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (B, H, Q, D), and with return_lse also (B, H, Q)
    """Compute softmax(scale · Q̂ K̂ᵀ + attn_mask) @ value with INT8 query and key; differentiable.

    Q̂ is the query, K̂ the key without its token mean, each rounded to 255 levels of the largest
    value of its 128 rows. Value, weights, sums and gradients are not quantised; the gradients are
    those of `reference.quantised_attention`: rounding counts as the identity.

    Args:
        query, key, value: float16 or bfloat16; D from 1 to 256, stride 1 in the last dimension,
            others free. H is a multiple of G.
        attn_mask: bool (True attends) or floating (added); without gradient.
        is_causal, bottom_right, window, scale: as `reference.attention` defines them.
        return_lse: also return the natural-log LSE, float32; it carries gradients.

    Kept for the backward pass: INT8 query and key, their scales, the key's token mean, value,
    output and LSE; not query and key. It is deterministic. A query that may attend no key gives 0,
    LSE -inf, and sends no gradient. Values that are not finite reach all that share their scale.

    Raises:
        NotImplementedError: `attn_mask` asks for a gradient; torch.func or forward AD.

    Source: SageAttention, arXiv 2410.02367; SageBwd, arXiv 2505.11594 section 4 and 2603.02170.
    """
    refuse_transforms()
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("attn_mask must not require a gradient: INT8 attention has none")
    left, right = window
    if is_causal:
        right = 0 if right is None else min(right, 0)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (query, key, value, attn_mask, scale, left, right, bottom_right)
    grads = query.requires_grad or key.requires_grad or value.requires_grad
    if grads and torch.is_grad_enabled():
        out, lse = _Int8Attention.apply(return_lse, *arguments)
        return (out, lse) if return_lse else out
    forward = torch.ops.ldm4ts_kernels.triton_int8_forward.default
    out, lse, lse_shift, *_ = below_autograd(forward, *arguments, return_lse)
    return (out, lse + lse_shift) if return_lse else out
