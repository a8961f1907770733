"""`patch_unet_attention`, the guide's door to `accelerate_attention`, and `served_by`."""

from typing import TypeVar

from torch import nn

from ldm4ts_kernels.plugged_layer import PluggedLayer, Policy
from ldm4ts_kernels.plugs import Plug, Unplugged, find_layers
from ldm4ts_kernels.processors import AttentionProcessor, JointAttentionProcessor

Module = TypeVar("Module", bound=nn.Module)

# The names of the original guide. "auto" is the exact chain, as "flash" is: only "sage" quantises.
ATTENTION_BACKENDS = {
    "default": Policy("exact", "materialised"),
    "flash": Policy("exact"),
    "sage": Policy("int8"),
    "auto": Policy("exact"),
}


def patch_unet_attention(
    unet: Module, backend: str = "flash", enable_gradient_checkpointing: bool = True
) -> Module:
    """Send every attention layer of a diffusers U-Net or autoencoder through `attention_fn`.

    `accelerate_attention` does the same for any model, layer by layer, and can be undone.

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
        NotImplementedError: a layer is of a kind that is not computed here.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"backend must be one of {list(ATTENTION_BACKENDS)}, got {backend!r}")
    found = list(find_layers(unet))
    if not found:
        raise ValueError(f"unet has no diffusers Attention layers: {type(unet).__name__}")
    for item in found:
        if isinstance(item, Unplugged):
            raise NotImplementedError(f"{item.name}: {item.reason}")
    if enable_gradient_checkpointing:
        if not getattr(unet, "_supports_gradient_checkpointing", False):
            raise ValueError(f"{type(unet).__name__} has no gradient checkpointing")
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
    for item in found:
        if isinstance(item, Plug):
            item.install(PluggedLayer(item.name, ATTENTION_BACKENDS[backend]))
    return unet


def served_by(module: nn.Module) -> dict[str, str | None]:
    """Return which backend served each layer of a patched U-Net at its last eager call."""
    return {
        name: layer.processor.layer.served_by
        for name, layer in module.named_modules()
        if isinstance(
            getattr(layer, "processor", None), AttentionProcessor | JointAttentionProcessor
        )
    }
