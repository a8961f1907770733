"""Plug transformers' text and vision encoders, through its public registry of attention functions.

transformers switches whole models by name. The function of that name is given the module that
calls it, and finds there the layer, with the policy that this one runs under.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ldm4ts_kernels.plugged_layer import PluggedLayer

NAME = "ldm4ts"
LAYER = "_ldm4ts_layer"  # the attribute of a plugged module


def is_encoder_layer(module: nn.Module) -> bool:
    """Return whether a module of a transformers model calls the registry of attention functions."""
    return "ALL_ATTENTION_FUNCTIONS" in names_used(module)


def names_used(module: nn.Module) -> tuple[str, ...]:
    """Return the global names and attributes that the code of a module's forward mentions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else code.co_names


def refusal(model: Any) -> str | None:
    """Return why a transformers model cannot be switched, or None."""
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} does not use transformers' AttentionInterface"
    return None


def implementations(model: Any) -> dict[str, Any]:
    """Return what to hand to `set_attn_implementation` to bring the present state back."""
    config = model.config
    nested = {
        name: getattr(config, name)._attn_implementation
        for name in config.sub_configs
        if getattr(config, name) is not None
    }
    return {"": config._attn_implementation, **nested}


def switch(model: Any) -> None:
    """Send every attention call of a transformers model to `attention_fn`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, E)
    attention_mask: Tensor | None,  # broadcasts to (B, H, Q, K)
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,  # broadcasts to (B, H, Q, K), added to the scores
    softcap: float | None = None,
    cache: Any = None,
    output_attentions: bool | None = None,
    **unused: Any,  # what the mask already says, such as sliding_window and position_ids
) -> tuple[Tensor, None]:  # (B, Q, H, E)
    """Compute attention for a module of a transformers model, as its registry has it.

    Raises NotImplementedError for a softcap, a paged cache, or attention weights asked for.
    """
    given = {"softcap": softcap, "cache": cache, "output_attentions": output_attentions}
    for name, argument in given.items():
        if argument is not None and argument is not False:
            raise NotImplementedError(f"{name}: ldm4ts_kernels does not serve it in an encoder")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    if position_bias is not None:
        attention_mask = _biased(attention_mask, position_bias, is_causal, query, key)
        is_causal = False
    layer: PluggedLayer = getattr(module, LAYER)
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "is_causal": is_causal,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if not torch.compiler.is_compiling():
        layer.record(query, key, value, attention_mask, **options)
    out = layer.policy.attend(query, key, value, attention_mask, **options)
    return out.transpose(1, 2).contiguous(), None


def _biased(
    attention_mask: Tensor | None,
    position_bias: Tensor,
    is_causal: bool,
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
) -> Tensor:  # broadcasts to (B, H, Q, K)
    """Return one additive mask: the learned bias where a key may be attended, else the least."""
    bias = position_bias.to(query.dtype)
    if is_causal:
        shape = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attention_mask is None:
        return bias
    if attention_mask.dtype == torch.bool:
        return bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
    return bias + attention_mask
