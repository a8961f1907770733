"""What leaves the GPU while it is not needed there, as context managers that bring it back."""

from collections.abc import Iterator
from contextlib import contextmanager

from ldm4ts_kernels.model.forecaster import LDM4TSModel


@contextmanager
def kept_on_host(model: LDM4TSModel, stage: str) -> Iterator[None]:
    """Keep in the host's memory what a stage's steps leave alone.

    "autoencoder": the U-Net. "forecaster", with windows that were encoded before: what
    `encode_frozen` alone needs; a text is read there.
    """
    text, device = model.conditioner.text, model.device
    parts = [model.unet]
    if stage == "forecaster":
        parts = [model.autoencoder.kl.encoder, *([] if text is None else [text.encoder])]
    for part in parts:
        part.to("cpu")
    try:
        yield
    finally:
        for part in parts:
            part.to(device)
