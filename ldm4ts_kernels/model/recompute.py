"""What of a U-Net's or autoencoder's activations is recomputed in the backward pass, by name."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm4ts_kernels.checkpointing import save_attention_outputs

# Nothing in these blocks draws random numbers; and a CUDA graph cannot read a generator's state.
_RANDOMLESS: dict[str, Any] = {"preserve_rng_state": False}
recompute: Any = partial(checkpoint, use_reentrant=False, **_RANDOMLESS)  # (function, *arguments)
MODES = {
    "none": None,
    "full": recompute,
    "selective": partial(save_attention_outputs, **_RANDOMLESS),
}


def recompute_activations(module: nn.Module, mode: str | bool) -> None:
    """Set what a diffusers module keeps of a block's activations for the backward pass.

    "none" (False) of them is recomputed; "full" (True): all are, from the block's input;
    "selective": all but attention's output. Raises ValueError for another mode.
    """
    if isinstance(mode, bool):
        mode = "full" if mode else "none"
    if mode not in MODES:
        raise ValueError(f"gradient checkpointing must be one of {list(MODES)}, got {mode!r}")
    function = MODES[mode]
    if function is None:
        module.disable_gradient_checkpointing()  # type: ignore[operator]
    else:
        module.enable_gradient_checkpointing(function)  # type: ignore[operator]
