"""Fused attention for diffusion models, exact and INT8, and LDM4TS forecasters in little VRAM."""

from ldm4ts_kernels.acceleration import accelerate_attention
from ldm4ts_kernels.attention import attention_fn, explain
from ldm4ts_kernels.checkpointing import save_attention_outputs
from ldm4ts_kernels.diffusers_integration import patch_unet_attention
from ldm4ts_kernels.vram import estimate_vram_usage

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "accelerate_attention",
    "attention_fn",
    "estimate_vram_usage",
    "explain",
    "patch_unet_attention",
    "save_attention_outputs",
]
