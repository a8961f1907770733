"""Between images and latents: a pretrained autoencoder of diffusers, or a small one trained first.

Stage 1 trains the small one on the encodings alone; `freeze` ends it, and from then on latents have
unit variance, which is what the noise schedules assume.
"""

import copy
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ldm4ts_kernels.model.config import LDM4TSConfig, norm_groups

KL_WEIGHT = 1e-4  # of the mean over latent elements: keeps latents bounded, hardly blurs


def build_small_autoencoder(config: LDM4TSConfig) -> Any:
    """Return an untrained AutoencoderKL that divides the image's sides by 2^(levels - 1)."""
    levels = len(config.autoencoder_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.autoencoder_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=norm_groups(config.autoencoder_channels),
        sample_size=max(config.image_size),
        scaling_factor=1.0,
    )


def load_autoencoder(name: str) -> Any:
    """Return a pretrained AutoencoderKL by hub name or path; ValueError when there is none."""
    try:
        kl = AutoencoderKL.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"autoencoder {name!r} cannot be loaded: {error}") from error
    if kl.config.in_channels != 3:
        raise ValueError(
            f"autoencoder must take 3 channels, {name!r} takes {kl.config.in_channels}"
        )
    return kl


class ImageAutoencoder(nn.Module):
    """Images (B, 3, height, width) in [0, 1] to latents (B, Z, h, w) of unit variance, and back."""

    scale: Tensor
    shift: Tensor
    trained: Tensor

    def __init__(self, config: LDM4TSConfig):
        super().__init__()
        pretrained = config.autoencoder is not None
        self.kl: Any = (
            build_small_autoencoder(config)
            if config.autoencoder is None
            else load_autoencoder(config.autoencoder)
        )
        self.register_buffer("scale", torch.tensor(float(self.kl.config.scaling_factor)))
        self.register_buffer("shift", torch.tensor(float(self.kl.config.shift_factor or 0)))
        # A buffer, so that every kind of checkpoint carries it; `needs_training` mirrors it on the
        # host, where reading costs no synchronisation.
        self.register_buffer("trained", torch.tensor(pretrained))
        self.needs_training = not pretrained
        self.rounded: tuple[Any, ...] = ()  # a copy of the decoder in 16 bits, out of checkpoints
        self.kl.requires_grad_(self.needs_training)
        self.register_load_state_dict_post_hook(_follow_loaded_state)

    @property
    def latent_channels(self) -> int:
        return self.kl.config.latent_channels

    @property
    def reduction(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.kl.config.block_out_channels) - 1)

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (Z, h, w) of an image's latents. Raises ValueError where it cannot be divided."""
        height, width = image_size
        if height % self.reduction or width % self.reduction:
            raise ValueError(
                f"image_size must be a multiple of the autoencoder's reduction {self.reduction}, "
                f"got {image_size}"
            )
        return self.latent_channels, height // self.reduction, width // self.reduction

    def encode(
        self,
        images: Tensor,  # (B, 3, height, width) in [0, 1]
    ) -> Tensor:
        """Return the scaled mean of the posterior, without gradient: (B, Z, h, w) float32."""
        return (self._encode_unscaled(images) - self.shift) * self.scale

    def decode(
        self,
        latents: Tensor,  # (B, Z, h, w), scaled
    ) -> Tensor:
        """Return images (B, 3, height, width), about [0, 1]; the gradient reaches the latents.

        Under autocast it is the rounded decoder that decodes, where there is one.
        """
        latents, kind = latents / self.scale + self.shift, latents.device.type
        if not self.rounded or not torch.is_autocast_enabled(kind):
            images = self.kl.decode(latents, return_dict=False)[0]
        else:
            decoder = self.rounded[0]
            with torch.autocast(kind, enabled=False):
                images = decoder.decode(latents.to(decoder.dtype), return_dict=False)[0]
        return (images + 1) / 2

    def round_decoder(self) -> None:
        """Under autocast, have a copy of a frozen decoder in its dtype, norms included.

        Their float32 images would else be most of a step's memory, and their casts much of its
        time.
        """
        device = self.scale.device
        if self.needs_training or not torch.is_autocast_enabled(device.type):
            return
        dtype = torch.get_autocast_dtype(device.type)
        if not self.rounded or (self.rounded[0].device, self.rounded[0].dtype) != (device, dtype):
            copied: dict[int, Any] = {id(self.kl.encoder): None}  # left out
            for name, parameter in self.kl.named_parameters():
                if not name.startswith("encoder."):
                    rounded = parameter.detach().to(device, dtype)
                    copied[id(parameter)] = nn.Parameter(rounded, requires_grad=False)
            for module in self.kl.modules():  # the report of who serves a layer reads the original
                if (processor := getattr(module, "processor", None)) is not None:
                    copied[id(processor)] = processor
            self.rounded = (copy.deepcopy(self.kl, copied),)

    def reconstruction_loss(
        self,
        images: Tensor,  # (B, 3, height, width) in [0, 1]
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,  # (B, Z, h, w) of z ~ q; None: drawn now
    ) -> Tensor:
        """Return MSE(decode(z), image) + 1e-4 KL(q(z | image) ‖ N(0, 1)), means over elements."""
        pixels = 2 * images - 1
        posterior = self.kl.encode(pixels).latent_dist
        if noise is None:
            latents = posterior.sample(generator=generator)
        else:
            latents = posterior.mean + posterior.std * noise
        restored = self.kl.decode(latents, return_dict=False)[0]
        divergence = posterior.kl().float().mean() / latents[0].numel()
        return F.mse_loss(restored.float(), pixels) + KL_WEIGHT * divergence

    def freeze(
        self,
        images: Tensor,  # (B, 3, height, width) in [0, 1]
    ) -> None:
        """End stage 1: scale latents by 1 / std of these images' own, and stop all training.

        Raises ValueError when the latents of the images do not vary or are not finite.
        """
        deviation = self._encode_unscaled(images).std()
        if not 0 < deviation.item() < float("inf"):
            raise ValueError(
                f"the latents of history must vary and be finite, got std {deviation.item()}"
            )
        self.scale.copy_(1 / deviation)
        self.trained.fill_(True)
        _follow_loaded_state(self)

    @torch.no_grad()
    def _encode_unscaled(self, images: Tensor) -> Tensor:
        return self.kl.encode(2 * images - 1).latent_dist.mean.float()

    def train(self, mode: bool = True) -> Self:
        super().train(mode and self.needs_training)
        return self


def _follow_loaded_state(module: ImageAutoencoder, _incompatible_keys: Any = None) -> None:
    """Train or freeze the autoencoder as its `trained` buffer says."""
    module.needs_training = not module.trained.item()
    module.rounded = ()
    module.kl.requires_grad_(module.needs_training)
    module.train(module.training)
