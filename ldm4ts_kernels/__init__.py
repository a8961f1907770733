"""Fused attention for diffusion models, exact and INT8, and LDM4TS forecasters in little VRAM."""

import importlib
from typing import TYPE_CHECKING, Any

from ldm4ts_kernels.acceleration import accelerate_attention
from ldm4ts_kernels.attention import attention_fn, explain
from ldm4ts_kernels.checkpointing import save_attention_outputs
from ldm4ts_kernels.diffusers_integration import patch_unet_attention
from ldm4ts_kernels.vram import estimate_vram_usage

if TYPE_CHECKING:
    from ldm4ts_kernels.estimator import LDM4TS

__version__ = "0.1.0"
__all__ = [
    "LDM4TS",
    "__version__",
    "accelerate_attention",
    "attention_fn",
    "estimate_vram_usage",
    "explain",
    "patch_unet_attention",
    "save_attention_outputs",
]


def __getattr__(name: str) -> Any:
    """Load LDM4TS when it is asked for: it needs the extra `ldm4ts`, the rest needs torch alone."""
    if name == "LDM4TS":
        return importlib.import_module("ldm4ts_kernels.estimator").LDM4TS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
