"""The latent diffusion: the U-Net, the schedule of the noise, and the way back from it."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ldm4ts_kernels.graphs import GraphedCall, Recorder
from ldm4ts_kernels.model.config import LDM4TSConfig, norm_groups

DenoisingStep = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def build_unet(config: LDM4TSConfig, latent_channels: int, latent_size: tuple[int, int]) -> Any:
    """Return the conditional U-Net, Stable Diffusion's shape: no attention at the last level."""
    levels = len(config.unet_channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=config.unet_layers_per_block,
        block_out_channels=config.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        attention_head_dim=config.unet_heads,  # diffusers' name for the number of heads
        cross_attention_dim=config.cross_attention_dim,
        norm_num_groups=norm_groups(config.unet_channels),
    )


class NoiseProcess(nn.Module):
    """z_t = √ᾱ_t z_0 + √(1 - ᾱ_t) ε, forwards for training and backwards for sampling."""

    alphas_cumprod: Tensor

    def __init__(self, config: LDM4TSConfig):
        super().__init__()
        self.clip = config.latent_clip
        self.steps = config.diffusion_steps
        self.schedule: dict[str, Any] = {
            "num_train_timesteps": config.diffusion_steps,
            "beta_schedule": config.beta_schedule,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
            "prediction_type": "epsilon",
            "clip_sample": True,
            "clip_sample_range": config.latent_clip,
        }
        self.forward_process: Any = DDPMScheduler.from_config(self.schedule)
        self.register_buffer(
            "alphas_cumprod", self.forward_process.alphas_cumprod.clone(), persistent=False
        )

    def add_noise(
        self,
        clean: Tensor,  # (B, Z, h, w)
        noise: Tensor,  # (B, Z, h, w)
        timesteps: Tensor,  # (B,) int64
    ) -> Tensor:
        """Return z_t, (B, Z, h, w)."""
        return self.forward_process.add_noise(clean, noise, timesteps)

    def estimate_clean(
        self,
        noisy: Tensor,  # (B, Z, h, w)
        noise: Tensor,  # (B, Z, h, w), as the U-Net predicts it
        timesteps: Tensor | int,  # (B,) int64, or one for all
    ) -> Tensor:
        """Return z_0 = (z_t - √(1 - ᾱ_t) ε) / √ᾱ_t, clamped to ± latent_clip: (B, Z, h, w) float32.

        The one rule of training and sampling. At high t the division multiplies the error of ε by
        up to 1e4 and the decoder would see nonsense; DDIM clamps there, so training clamps too.
        """
        alpha = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        clean = (noisy.float() - (1 - alpha).sqrt() * noise.float()) / alpha.sqrt()
        return clean.clamp(-self.clip, self.clip)

    def sample(
        self,
        denoise: DenoisingStep,
        noise: Tensor,  # (B, Z, h, w)
        tokens: Tensor,  # (B, T, width)
        steps: int,
    ) -> Tensor:
        """Return clean latents from noise, (B, Z, h, w): deterministic DDIM (Song et al., 2021)."""
        timesteps, alpha_before = (row.to(noise.device) for row in self._schedule(steps))
        inputs, clean = {"noisy": noise, "tokens": tokens}, noise
        for step in range(steps):  # slices of one element: a number would wait for the device
            inputs["timestep"] = timesteps[step : step + 1]
            inputs["alpha_before"] = alpha_before[step : step + 1]
            outputs = denoise(inputs)
            inputs["noisy"], clean = outputs["noisy"], outputs["clean"]
        return clean.clone()  # a graph's own is overwritten by its next replay

    def denoise(
        self,
        unet: nn.Module,
        inputs: dict[str, Tensor],  # noisy (B, Z, h, w), tokens (B, T, width), timestep (1,), …
    ) -> dict[str, Tensor]:
        """Return "clean", z_0, and "noisy", √ᾱ_s z_0 + √(1 - ᾱ_s) ε at the time s that follows.

        inputs["alpha_before"], (1,), is ᾱ_s. DDIM (Song et al., 2021), equation 12 with σ = 0.
        """
        noisy, timestep, alpha = inputs["noisy"], inputs["timestep"], inputs["alpha_before"]
        kind = noisy.device.type
        # A weight's cast would be kept where a captured graph cannot rely on it.
        with torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            predicted = unet(noisy, timestep, inputs["tokens"], return_dict=False)[0].float()
        clean = self.estimate_clean(noisy, predicted, timestep)
        return {"clean": clean, "noisy": alpha.sqrt() * clean + (1 - alpha).sqrt() * predicted}

    def _schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return DDIM's times, latest first, and ᾱ at the time that follows each: (steps,) each."""
        # Trailing steps start at the last t, where the latent really is the noise we start from.
        scheduler: Any = DDIMScheduler.from_config(self.schedule, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        before = scheduler.timesteps - self.steps // steps
        alphas = scheduler.alphas_cumprod[before.clamp_min(0)]
        return scheduler.timesteps, alphas.where(before >= 0, scheduler.final_alpha_cumprod)


class GraphedDenoiser:
    """A denoising step as one CUDA graph, as wide as its widest call; narrower ones are padded."""

    def __init__(self, denoise: DenoisingStep, device: torch.device, recorder: Recorder) -> None:
        self.call = GraphedCall("sampling", denoise, device, recorder)
        self.width = 0

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count = len(inputs["noisy"])
        self.width = max(self.width, count)
        wide = {
            name: torch.cat([value, value.new_zeros(self.width - count, *value.shape[1:])])
            for name, value in inputs.items()
            if name in ("noisy", "tokens")
        }
        outputs = self.call({**inputs, **wide})
        return {name: value[:count] for name, value in outputs.items()}
