"""The compiled kernels: loads the extension once, gives it fake kernels and a gradient.

The extension is one shared library on LibTorch's stable ABI (csrc/). Where it is missing or does
not load, `load_error` says why, and everything else in the package works without it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels.kernels.autograd import (
    below_autograd,
    refuse_transforms,
    register_autograd,
    within_backward,
)
from ldm4ts_kernels.requirements import constant

LIBRARY = Path(__file__).with_name("_C.so")
MAX_HEAD_DIM = 512
MAX_GRAD_HEAD_DIM = 256


@constant
def load_error() -> str | None:
    """Load the extension if that has not happened yet; return why it cannot be used, or None."""
    return _load()


def _load() -> str | None:
    if not LIBRARY.exists():
        return "the compiled extension is not part of this install (reinstall where nvcc is found)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:  # torch keeps the loader's own sentence as the cause
        return f"the compiled extension does not load: {error.__cause__ or error}"
    from ldm4ts_kernels.kernels.flops import register_attention_flops  # it imports triton

    _register_fakes()
    _register_autograd()
    operators = torch.ops.ldm4ts_kernels
    register_attention_flops(operators.flash_forward, operators.flash_backward, value_at=3)
    return None


@constant
def device_error(index: int) -> str | None:
    """Return why the loaded kernels cannot run on CUDA device `index`, or None.

    An old driver or a GPU for which the extension holds no machine code, in CUDA's own words.
    """
    reason = torch.ops.ldm4ts_kernels.device_error.default(index)
    return f"the compiled kernels do not run on cuda:{index}: {reason}" if reason else None


def _register_fakes() -> None:
    """Tell torch.compile and torch.export the outputs' shapes, dtypes and strides."""

    @torch.library.register_fake("ldm4ts_kernels::flash_forward")
    def _flash_forward(
        query: Tensor,  # (B, H, Q, D)
        key: Tensor,  # (B, G, K, D)
        value: Tensor,  # (B, G, K, D)
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        seed: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # (B, H, Q, D), (B, H, Q)
        return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)

    @torch.library.register_fake("ldm4ts_kernels::flash_backward")
    def _flash_backward(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _register_autograd() -> None:
    """Let the operators differentiate for who calls them by themselves."""
    operators = torch.ops.ldm4ts_kernels
    register_autograd(
        operators.flash_forward.default,
        operators.flash_backward.default,
        save=_save,
        differentiate=_differentiate,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attn_mask, ctx.is_causal, ctx.scale, seed, ctx.dropout_p = inputs
    if query.shape[-1] > MAX_GRAD_HEAD_DIM:
        raise RuntimeError(
            f"query must have a head dim up to {MAX_GRAD_HEAD_DIM} for a gradient, "
            f"got {query.shape[-1]}"
        )
    ctx.save_for_backward(query, key, value, attn_mask, *output, seed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, attn_mask, out, lse, seed = ctx.saved_tensors
    if dout is None:  # the loss depends on the LSE alone
        dout = torch.zeros_like(out)
    elif dout.stride(-1) != 1:  # such as the expanded gradient of a sum
        dout = dout.contiguous()
    grads = within_backward(
        torch.ops.ldm4ts_kernels.flash_backward.default,
        dout,
        query,
        key,
        value,
        out,
        lse,
        attn_mask,
        dlse if dlse is None else dlse.contiguous(),
        ctx.is_causal,
        ctx.scale,
        seed,
        ctx.dropout_p,
        torch.are_deterministic_algorithms_enabled(),
    )
    return *grads, *[None] * 5


class _FlashAttention(torch.autograd.Function):
    # Outside the operator: register_autograd costs twice as much a call (docs/kernels.md).
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = below_autograd(torch.ops.ldm4ts_kernels.flash_forward.default, *inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


@constant
def _fused() -> Any:
    """Return torch's operator that has these kernels (csrc/fused_ops.h) and a derivative in C++."""
    name = "_scaled_dot_product_fused_attention_overrideable"  # of torch 2.10 to 2.13 at least
    return getattr(torch.ops.aten, name).default if hasattr(torch.ops.aten, name) else None


def _has_plain_gradient(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether that derivative will do: in eager calls of mere tensors.

    Whoever traces a call, counts or replaces its operators finds this package's there.
    """
    return (
        type(query) is type(key) is type(value) is Tensor
        and query.shape[-1] <= MAX_GRAD_HEAD_DIM
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and _fused() is not None
    )


def flash_attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, D)
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Q, K); bool: True attends; float: added
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # (1,) int64
) -> Tensor | tuple[Tensor, Tensor]:  # (B, H, Q, D), (B, H, Q)
    """Compute softmax(scale * query @ keyᵀ + mask) @ value, without the scores in memory.

    float16 and bfloat16 on a CUDA device from sm_80 on, D ≤ 512 (with a gradient 256), H a multiple
    of G; products accumulate in float32. `is_causal` is aligned top left, as SDPA aligns it.
    Strides are free but the last, which must be 1. `scale` is D ** -0.5 when None. The mask is
    bool, float32 or of the query's dtype, and gets no gradient. The natural-log LSE comes as
    float32 and carries a gradient. A row that sees no key gives 0 and LSE -inf. `seed` fixes which
    weights dropout drops, the same as in `kernels.flash`, and is drawn when None.

    The output is the same in every run; so are the gradients of a call that is made under
    `torch.use_deterministic_algorithms`, and else but for the order of float32 sums in that of a
    long query. The gradients have no derivative.

    Source: Dao 2023 (arXiv:2307.08691), algorithms 1 and 2.

    Raises:
        RuntimeError: the extension is not usable (`load_error`), or an argument is not as above:
            the message names it.
        NotImplementedError: torch.func or forward-mode AD looks at the call.
    """
    refuse_transforms()
    if error := load_error():
        raise RuntimeError(error)
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("attn_mask must not require a gradient: these kernels compute none")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**62, (1,), device=query.device)  # graph-safe: torch's own generator
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    if needs_grad and torch.is_grad_enabled():
        if seed is None and not return_lse and _has_plain_gradient(query, key, value):
            return _fused()(query, key, value, attn_mask, 0.0, is_causal, False, scale=scale)[0]
        out, lse = _FlashAttention.apply(
            query, key, value, attn_mask, is_causal, scale, seed, dropout_p
        )
    else:
        forward = torch.ops.ldm4ts_kernels.flash_forward.default
        out, lse = below_autograd(
            forward, query, key, value, attn_mask, is_causal, scale, seed, dropout_p
        )
    return (out, lse) if return_lse else out
