"""The latent diffusion: the U-Net, the schedule of the noise, and the way back from it."""

from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ldm4ts_kernels.model.config import LDM4TSConfig, norm_groups


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
        unet: nn.Module,
        noise: Tensor,  # (B, Z, h, w)
        tokens: Tensor,  # (B, T, width)
        steps: int,
    ) -> Tensor:
        """Return clean latents from noise, (B, Z, h, w): deterministic DDIM (Song et al., 2021)."""
        # Trailing steps start at the last t, where the latent really is the noise we start from.
        scheduler: Any = DDIMScheduler.from_config(self.schedule, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        noisy, clean = noise, noise
        for timestep in scheduler.timesteps.tolist():  # on the host: no synchronisation
            predicted = unet(noisy, timestep, tokens, return_dict=False)[0].float()
            clean = self.estimate_clean(noisy, predicted, timestep)
            noisy = scheduler.step(predicted, timestep, noisy, return_dict=False)[0]
        return clean
