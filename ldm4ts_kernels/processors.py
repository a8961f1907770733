"""diffusers' attention processors on `attention_fn`: U-Nets and autoencoders, and SD3's joint one.

A processor owns the whole layer, from the normalised states to the output projection. Models whose
own processors call diffusers' dispatcher need none of these: see `dispatcher`.
"""

from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels.plugged_layer import PluggedLayer, Policy


class AttentionProcessor:
    """Run a diffusers `Attention` module of a U-Net or autoencoder as its layer's policy says.

    Computes what `AttnProcessor2_0` computes. `layer` tells who served the last call. Loading an
    IP-Adapter, diffusers makes one without a layer for each self-attention: that one is exact.
    """

    def __init__(self, layer: PluggedLayer | None = None) -> None:
        self.layer = PluggedLayer("", Policy()) if layer is None else layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, N, C) or (B, C, H, W)
        encoder_hidden_states: Tensor | None = None,  # (B, K, C')
        attention_mask: Tensor | None = None,  # (B, K), (B, 1, K) or (B, N, K), added to the scores
        temb: Tensor | None = None,
    ) -> Tensor:  # the shape of hidden_states
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, H·W, C)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
        key = _heads(attn, attn.to_k(context), attn.norm_k)
        value = _heads(attn, attn.to_v(context), None)
        mask = None
        if attention_mask is not None:
            mask = attention_mask if attention_mask.ndim == 3 else attention_mask.unsqueeze(1)
            mask = mask.unsqueeze(1).to(query.dtype)  # (B, 1, 1 or N, K)
        out = self.layer.attend(query, key, value, mask)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))  # (B, N, C)
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class JointAttentionProcessor:
    """Run an SD3 joint attention layer, image and text tokens in one sequence, as its policy says.

    Computes what `JointAttnProcessor2_0` computes, which knows no mask: one is refused here.
    """

    def __init__(self, layer: PluggedLayer) -> None:
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, N, C)
        encoder_hidden_states: Tensor | None = None,  # (B, K, C)
        attention_mask: Tensor | None = None,
    ) -> Any:  # (B, N, C), and with encoder_hidden_states also (B, K, C)
        if attention_mask is not None:
            raise NotImplementedError("attention_mask: SD3's joint attention layers take no mask")
        query = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
        key = _heads(attn, attn.to_k(hidden_states), attn.norm_k)
        value = _heads(attn, attn.to_v(hidden_states), None)
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            query_c = _heads(attn, attn.add_q_proj(context), attn.norm_added_q)
            key_c = _heads(attn, attn.add_k_proj(context), attn.norm_added_k)
            value_c = _heads(attn, attn.add_v_proj(context), None)
            query = torch.cat((query, query_c), dim=2)  # (B, H, N + K, D)
            key = torch.cat((key, key_c), dim=2)
            value = torch.cat((value, value_c), dim=2)
        out = self.layer.attend(query, key, value).transpose(1, 2).flatten(2)  # (B, N + K, C)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        image, text = out.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(attn: Any, states: Tensor, norm: Any) -> Tensor:  # (B, N, H * D) -> (B, H, N, D)
    states = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return states if norm is None else norm(states)
