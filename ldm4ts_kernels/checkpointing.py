"""Gradient checkpointing that recomputes everything but attention."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# The forward operators of torch's fused attention, and of the flash_attn wheel. Those of this
# package go by a rule: ldm4ts_kernels::…_forward.
ATTENTION_OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
    }
)


def save_attention_outputs(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `module(*args, **kwargs)`, keeping of its activations only what attention gave out.

    `unet.enable_gradient_checkpointing(save_attention_outputs)`, for any diffusers model. The
    backward pass recomputes the module as plain checkpointing does, but finds each attention's
    output and log-sum-exp, (B, H, Q, D) and (B, H, Q), in memory: attention runs once, not twice.

    Attention that is not one operator (SDPA's math path, materialised scores, SageAttention) is
    recomputed like the rest.
    """
    return checkpoint(
        module, *args, use_reentrant=False, context_fn=attention_checkpoint_contexts, **kwargs
    )


def attention_checkpoint_contexts() -> tuple[
    AbstractContextManager[None], AbstractContextManager[None]
]:
    """Return the contexts of the forward pass and of its recomputation, as `checkpoint` wants them.

    For transformers: `model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn":
    attention_checkpoint_contexts})`.
    """
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(
    context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    name = operator.name()
    ours = name.startswith("ldm4ts_kernels::") and name.endswith("_forward")
    if ours or name in ATTENTION_OPERATORS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
