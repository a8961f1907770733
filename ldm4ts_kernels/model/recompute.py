"""What of a U-Net's or autoencoder's activations is recomputed in the backward pass, by name."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm4ts_kernels.checkpointing import save_attention_outputs

# Nothing in these blocks draws random numbers; and a CUDA graph cannot read a generator's state.
_RANDOMLESS: dict[str, Any] = {"preserve_rng_state": False}
recompute: Any = partial(checkpoint, use_reentrant=False, **_RANDOMLESS)  # (function, *arguments)
# Of an autoencoder's blocks: where their resamplers are, after their residual layers.
_RESAMPLERS = {"UpDecoderBlock2D": "upsamplers", "DownEncoderBlock2D": "downsamplers"}


def layer_by_layer(recompute_one: Any, block: Any, states: Any, *rest: Any) -> Any:
    """Recompute a block; an autoencoder's layer by layer, whose activations are the largest."""
    resamplers = _RESAMPLERS.get(type(block).__name__)
    if resamplers is None:
        return recompute_one(block, states, *rest)
    for layer in block.resnets:
        states = recompute_one(layer, states, None)
    for layer in getattr(block, resamplers) or ():
        states = recompute_one(layer, states)
    return states


MODES = {
    "none": None,
    "full": partial(layer_by_layer, recompute),
    "selective": partial(layer_by_layer, partial(save_attention_outputs, **_RANDOMLESS)),
}


# Pixels of images that are decoded together where activations are recomputed, and in a forecast;
# the autoencoder's own training takes twice as many. All of a batch would else take more than the
# U-Net. In a step no more than `decoded_at_once`: its memory then grows with the batch as a line.
DECODED_PIXELS = 2 * 224 * 224


def images_within(pixels: int, image_size: tuple[int, int]) -> int:
    """Return how many images have so many pixels together, at least one."""
    return max(1, pixels // (image_size[0] * image_size[1]))


def images_at_once(image_size: tuple[int, int], decoded_at_once: int) -> int:
    """Return how many images a step that recomputes decodes together."""
    return min(images_within(DECODED_PIXELS, image_size), decoded_at_once)


def autoencoder_parts(windows: int, image_size: tuple[int, int], mode: str | bool) -> int:
    """Return into how many parts stage 1 splits its step of so many windows in this mode."""
    if mode not in (True, "full"):
        return 1
    fitting = images_within(2 * DECODED_PIXELS, image_size)
    return next(n for n in range(1, windows + 1) if windows % n == 0 and windows // n <= fitting)


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
