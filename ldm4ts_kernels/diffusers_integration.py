"""Plug `attention_fn` into diffusers' U-Nets and autoencoders."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm4ts_kernels.attention import attention_fn, explain


def materialised_attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, H, K, D)
    value: Tensor,  # (B, H, K, D)
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Q, K), added to the scores
) -> Tensor:  # (B, H, Q, D)
    """Compute attention with its (B, H, Q, K) weights in memory: the baseline of every table.

    As lean as that can be: of the tensors of that shape only the weights are kept for the backward.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


Module = TypeVar("Module", bound=nn.Module)

# The names of the original guide. "auto" is the exact chain, as "flash" is: only "sage" quantises.
ATTENTION_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "default": materialised_attention,
    "flash": partial(attention_fn, precision="exact"),
    "sage": partial(attention_fn, precision="int8"),
    "auto": partial(attention_fn, precision="exact"),
}


class AttentionProcessor:
    """Run a diffusers `Attention` module of a U-Net or autoencoder through one attention function.

    `served_by` names the backend that served the last eager call; None before the first one.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.served_by: str | None = None
        self._served: dict[tuple[object, ...], str | None] = {}

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
        query, key, value = _project(attn, hidden_states, encoder_hidden_states)
        mask = None
        if attention_mask is not None:
            mask = attention_mask if attention_mask.ndim == 3 else attention_mask.unsqueeze(1)
            mask = mask.unsqueeze(1).to(query.dtype)  # (B, 1, 1 or N, K)
        if not torch.compiler.is_compiling():
            self._record(query, key, value, mask)
        out = ATTENTION_BACKENDS[self.backend](query, key, value, mask)
        out = out.transpose(1, 2).flatten(2)  # (B, N, C)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _record(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Note which backend serves this call; a call of a known form costs one look-up."""
        if self.backend == "default":
            self.served_by = "materialised"
            return
        grad = torch.is_grad_enabled() and query.requires_grad
        form = (query.shape, key.shape, query.dtype, query.device, mask is None, grad)
        if form not in self._served:
            precision = ATTENTION_BACKENDS[self.backend].keywords["precision"]  # type: ignore[attr-defined]
            self._served[form] = explain(query, key, value, mask, precision=precision).chosen
        self.served_by = self._served[form]


def _project(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # each (B, H, N or K, D)
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if encoder_hidden_states is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    query, key, value = (
        projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for projection, states in (
            (attn.to_q, hidden_states),
            (attn.to_k, context),
            (attn.to_v, context),
        )
    )
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    return query, key, value


def patch_unet_attention(
    unet: Module, backend: str = "flash", enable_gradient_checkpointing: bool = True
) -> Module:
    """Send every attention layer of a diffusers U-Net or autoencoder through `attention_fn`.

    Args:
        unet: a `UNet2DConditionModel`, `UNet2DModel` or `AutoencoderKL`; changed in place.
        backend: "default" (materialised scores), "flash" or "auto" (exact), or "sage" (INT8).
        enable_gradient_checkpointing: recompute activations in the backward pass instead of
            keeping them; False leaves the model's setting as it is.

    Returns:
        The same module.

    Raises:
        ValueError: an unknown backend, a module without attention layers, or checkpointing asked
            of a module that has none.
        NotImplementedError: a layer is of a kind that these processors do not compute.
    """
    from diffusers.models.attention_processor import Attention

    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"backend must be one of {list(ATTENTION_BACKENDS)}, got {backend!r}")
    layers = [(name, m) for name, m in unet.named_modules() if isinstance(m, Attention)]
    if not layers:
        raise ValueError(f"unet has no diffusers Attention layers: {type(unet).__name__}")
    for name, layer in layers:
        if layer.added_kv_proj_dim is not None or layer.only_cross_attention:
            raise NotImplementedError(f"{name} projects added keys, which is not supported yet")
    if enable_gradient_checkpointing:
        if not getattr(unet, "_supports_gradient_checkpointing", False):
            raise ValueError(f"{type(unet).__name__} has no gradient checkpointing")
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
    for _, layer in layers:
        layer.set_processor(AttentionProcessor(backend))  # type: ignore[arg-type]
    return unet


def served_by(module: nn.Module) -> dict[str, str | None]:
    """Return which backend served each patched attention layer at its last eager call."""
    return {
        name: layer.processor.served_by
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "processor", None), AttentionProcessor)
    }
