"""LDM4TS: latent diffusion over images of a time series, fused with a patch Transformer.

history -> (image -> latents, noised and denoised by the U-Net under the window's tokens -> image ->
visual head; patches -> Transformer) -> gate -> location and scale of the future.
Ruan et al., "Vision-Enhanced Time Series Forecasting via Latent Diffusion Models",
arXiv 2502.14887.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ldm4ts_kernels.diffusers_integration import patch_unet_attention
from ldm4ts_kernels.graphs import Recorder
from ldm4ts_kernels.model.autoencoder import ImageAutoencoder
from ldm4ts_kernels.model.compiled import TrainingPasses, activation_budget
from ldm4ts_kernels.model.conditioning import Conditioner, TextConditioner
from ldm4ts_kernels.model.config import resolve_config
from ldm4ts_kernels.model.denoiser import (
    DenoisingStep,
    GraphedDenoiser,
    NoiseProcess,
    build_unet,
)
from ldm4ts_kernels.model.pretrained import load_weights, read_config, write_checkpoint
from ldm4ts_kernels.model.recompute import (
    DECODED_PIXELS,
    images_at_once,
    images_within,
    recompute,
    recompute_activations,
)
from ldm4ts_kernels.model.rounding import call_rounded
from ldm4ts_kernels.model.summary import summarise_draws
from ldm4ts_kernels.model.temporal import (
    ForecastHead,
    GatedFusion,
    TemporalEncoder,
    VisualHead,
    gaussian_crps,
)
from ldm4ts_kernels.model.vision import encode_vision
from ldm4ts_kernels.model.windows import (
    as_futures,
    as_prices,
    as_windows,
    available_device,
    check_count,
    check_finite,
    standardise,
)

# Training targets are bounded, in standard deviations of their window: a window that was flat and
# then moves would otherwise outweigh all others together.
TARGET_LIMIT = 20.0


class LDM4TSModel(nn.Module):
    """Forecast the targets' values at the horizons from a window: draws, or their statistics.

    `None` means the preset's value; `config_fields` are those of `LDM4TSConfig`. `device="cuda"`
    without a GPU is a RuntimeError, an unknown field a TypeError, a bad value a ValueError.
    `attention_backend` ("default" | "flash" | "sage" | "auto") serves the U-Net and the
    autoencoder, through `patch_unet_attention`; `enable_gradient_checkpointing` is a bool, or a
    mode of `recompute_activations`: "none", "full" (True) or "selective".
    """

    def __init__(
        self,
        image_size: tuple[int, int] | None = None,
        horizons: tuple[int, ...] | None = None,
        diffusion_steps: int | None = None,
        device: str | torch.device = "cuda",
        attention_backend: str = "flash",
        enable_gradient_checkpointing: bool | str = True,
        preset: str = "guide",
        **config_fields: Any,
    ):
        super().__init__()
        target_device = available_device(device)
        named = {
            "image_size": image_size,
            "horizons": horizons,
            "diffusion_steps": diffusion_steps,
        }
        given = {name: value for name, value in named.items() if value is not None}
        config = resolve_config(preset, **given, **config_fields)
        self.config = config
        self.targets: Tensor
        self.register_buffer("targets", torch.tensor(config.targets), persistent=False)

        self.autoencoder = ImageAutoencoder(config)
        self.latent_shape = self.autoencoder.latent_shape(config.image_size)
        self.unet: Any = build_unet(config, self.latent_shape[0], self.latent_shape[1:])
        self.noise_process = NoiseProcess(config)
        name = config.text_encoder
        text = None if name is None else TextConditioner(name, config)
        self.conditioner = Conditioner(
            config.history, config.variates, config.cross_attention_dim, text
        )
        self.temporal = TemporalEncoder(config)
        self.visual = VisualHead(config)
        self.fusion = GatedFusion(config.fusion_width)
        self.head = ForecastHead(config.fusion_width, len(config.horizons))
        self.configure(attention_backend, enable_gradient_checkpointing)
        self.graphed_denoiser: GraphedDenoiser | None = None
        self.to(target_device)

    @property
    def device(self) -> torch.device:
        return self.head.project.weight.device

    def configure(
        self, attention_backend: str, gradient_checkpointing: bool | str, compiled: bool = False
    ) -> None:
        """Choose how the U-Net and the autoencoder compute, as the constructor does.

        compiled: `loss` runs them by torch.compile, as it does with "budget:x".
        """
        self.attention_backend = attention_backend
        budget = activation_budget(gradient_checkpointing)
        mode = gradient_checkpointing if budget is None else "none"
        for module in (self.unet, self.autoencoder.kl):
            patch_unet_attention(module, attention_backend, enable_gradient_checkpointing=False)
            recompute_activations(module, mode)
        self.autoencoder.rounded = ()  # made anew when it is needed
        self.recomputing = mode in (True, "full")
        self.passes = TrainingPasses(1.0 if compiled and budget is None else budget)

    # Training

    @property
    def needs_autoencoder_training(self) -> bool:
        """True until stage 1 is over; checkpoints carry it."""
        return self.autoencoder.needs_training

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """Return what stage 1 trains."""
        return list(self.autoencoder.parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what stage 2 trains: all but the autoencoder and a text encoder."""
        frozen = {id(parameter) for parameter in self.autoencoder.parameters()}
        if self.conditioner.text is not None:
            frozen |= {id(parameter) for parameter in self.conditioner.text.encoder.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in frozen]

    def encode_vision(
        self,
        history: Tensor,  # (B, L, V)
    ) -> Tensor:
        """Return the three views of each window, in [0, 1]: (B, 3, height, width) float32."""
        return encode_vision(history, self.config.image_size, self.config.period)

    def autoencoder_loss(
        self,
        history: Tensor,  # (B, L, V) or (L, V)
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,  # (B, Z, h, w), of `draw_noise`
    ) -> Tensor:
        """Return stage 1's loss, the reconstruction of the images and a small KL: a scalar."""
        images = self.encode_vision(as_windows("history", history, self.config, self.device))
        return self.autoencoder.reconstruction_loss(images, generator, noise)

    def freeze_autoencoder(
        self,
        history: Tensor,  # (B, L, V) or (L, V), a sample of the training windows
    ) -> None:
        """End stage 1: scale the latents to unit variance over this sample, and stop training."""
        self.autoencoder.freeze(
            self.encode_vision(as_windows("history", history, self.config, self.device))
        )

    def loss(
        self,
        batch: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return L_diff + λ L_pred as "loss", and both parts detached: scalars, float32.

        batch: "history" (B, L, V) and "future" (B, T, C), in the same units, and, where they were
        drawn before, the entries of `draw_noise`, and of `encode_frozen`. L_diff = ‖ε - ε_θ‖²;
        L_pred = (location - y)² + CRPS of the scale around the location detached, in units of the
        window's deviation, targets bounded to ± 20 of them. LDM4TS equation 13 and algorithm 1.
        The gradient of L_pred reaches the U-Net through the frozen decoder. Runs without host
        synchronisation (unless there is a text encoder); values are not checked for NaN.
        Raises RuntimeError before stage 1 is over, ValueError for wrong shapes.
        """
        if self.needs_autoencoder_training:
            raise RuntimeError(
                "the autoencoder is untrained: minimise autoencoder_loss, then call "
                "freeze_autoencoder, before loss"
            )
        history = as_windows("history", batch["history"], self.config, self.device)
        future = as_futures(batch["future"], len(history), self.config, self.device)
        series, last, deviation = standardise(history, self.targets)
        target = ((future - last) / deviation).clamp(-TARGET_LIMIT, TARGET_LIMIT)

        frozen = batch if "latents" in batch else self._encode_series(series)
        clean = frozen["latents"]
        drawn = batch if "noise" in batch else self.draw_noise(len(history), generator)
        noise, timesteps = drawn["noise"], drawn["timesteps"]
        noisy = self.noise_process.add_noise(clean, noise, timesteps)
        tokens = self.conditioner(series, frozen.get("text"))
        predicted = self._predict(noisy, timesteps, tokens).float()
        estimate = self.noise_process.estimate_clean(noisy, predicted, timesteps)
        location, scale = self._read_forecast(estimate, self._encode_targets(series))

        diffusion = F.mse_loss(predicted, noise)
        spread = gaussian_crps(location.detach(), scale, target).mean()
        prediction = F.mse_loss(location, target) + spread
        return {
            "loss": diffusion + self.config.prediction_weight * prediction,
            "diffusion": diffusion.detach(),
            "prediction": prediction.detach(),
        }

    def draw_noise(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what a loss of `count` windows draws: "noise" (B, Z, h, w), "timesteps" (B,)."""
        noise = randn_tensor((count, *self.latent_shape), generator, self.device)
        source = self.device if generator is None else generator.device
        steps = self.config.diffusion_steps
        timesteps = torch.randint(steps, (count,), generator=generator, device=source)
        return {"noise": noise, "timesteps": timesteps.to(self.device)}

    @torch.no_grad()
    def encode_frozen(
        self,
        history: Tensor,  # (B, L, V) or (L, V)
    ) -> dict[str, Tensor]:
        """Return what the frozen parts make of windows: "latents" (B, Z, h, w), "text" (B, 1, E).

        "text" where there is a text encoder. Computed once, it spares each step these parts.
        """
        windows = as_windows("history", history, self.config, self.device)
        return self._encode_series(standardise(windows, self.targets)[0])

    def _encode_series(
        self,
        series: Tensor,  # (B, L, V), normalised
    ) -> dict[str, Tensor]:
        latents = {"latents": self.autoencoder.encode(self.encode_vision(series))}
        text = self.conditioner.text is not None
        return {**latents, "text": self.conditioner.read_text(series)} if text else latents

    # Forecasting

    def graph_sampling(self, recorder: Recorder) -> None:
        """Take the denoising steps of draws by CUDA graphs; weights must stay where they are."""
        step = partial(self.noise_process.denoise, self.unet)
        self.graphed_denoiser = GraphedDenoiser(step, self.device, recorder)

    @torch.no_grad()
    def sample(
        self,
        ohlcv: Tensor,  # (B, L, V) or (L, V)
        num_samples: int,
        sampling_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return draws of the targets' values at the horizons, (S, B, T, C), in units of the input.

        A draw is location(z_0) + scale(z_0) · N(0, 1), z_0 by DDIM from its own noise; a single
        draw is the location itself. The name is the guide's: any V variates serve.
        Raises ValueError for wrong shapes, NaN or infinity, or too many sampling steps.
        """
        return self.draw(ohlcv, num_samples, sampling_steps, generator)[1]

    @torch.no_grad()
    def draw(
        self,
        ohlcv: Tensor,  # (B, L, V) or (L, V)
        num_samples: int,
        sampling_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the draws' locations, and the draws as `sample` does: each (S, B, T, C)."""
        history = as_windows("ohlcv", ohlcv, self.config, self.device)
        check_finite("ohlcv", history)
        check_count("num_samples", num_samples)
        steps = self.config.sampling_steps if sampling_steps is None else sampling_steps
        check_count("sampling_steps", steps, self.config.diffusion_steps)
        series, last, deviation = standardise(history, self.targets)
        with _evaluating(self):
            tokens = self.conditioner(series).repeat(num_samples, 1, 1)  # (S * B, tokens, width)
            noise = randn_tensor((len(tokens), *self.latent_shape), generator, self.device)
            latents = self.noise_process.sample(self._denoising_step(), noise, tokens, steps)
            temporal = self._encode_targets(series).repeat(num_samples, 1, 1)  # (S * B, C, width)
            location, scale = self._read_forecast(latents, temporal)
        draws = location
        if num_samples > 1:
            draws = location + scale * randn_tensor(location.shape, generator, self.device)
        locations, draws = (
            last + deviation * values.unflatten(0, (num_samples, -1))
            for values in (location, draws)
        )
        return locations, draws

    def forward(
        self,
        ohlcv: Tensor,  # (B, L, V) or (L, V)
        current_price: Tensor | float | None = None,
        num_samples: int = 1,
        sampling_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return "mean", "std", "q05", "q50" and "q95" of `num_samples` draws, each (B, T, C).

        current_price, (B,) for one target or (B, C), is a value newer than the window's last: the
        forecast is shifted by the difference. mean is that of the draws' locations, which is the
        draws' own without the noise of the scale; std is the draws' (divided by S, so 0 for one).
        Units, and errors, as for `sample`. No gradient: training goes through `loss`.
        """
        locations, draws = self.draw(ohlcv, num_samples, sampling_steps, generator)
        if current_price is not None:
            history = as_windows("ohlcv", ohlcv, self.config, self.device)
            price = as_prices(current_price, len(history), self.config, self.device)
            shift = (price - history[:, -1, self.targets])[:, None]
            locations, draws = locations + shift, draws + shift
        return summarise_draws(locations, draws)

    # Checkpoints

    def save_pretrained(
        self, directory: str | Path, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write config.json and model.safetensors, and pretrained parts into their own folders.

        weights: by their names, instead of the model's own, which several processes may share out.
        """
        write_checkpoint(self, Path(directory), weights)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        device: str | torch.device = "cuda",
        attention_backend: str = "flash",
        enable_gradient_checkpointing: bool | str = True,
    ) -> "LDM4TSModel":
        """Return the model that `save_pretrained` wrote, in eval mode.

        Raises FileNotFoundError for a missing file, ValueError for another format or version and
        for weights that do not fit.
        """
        path = Path(directory)
        model = cls(
            device=device,
            attention_backend=attention_backend,
            enable_gradient_checkpointing=enable_gradient_checkpointing,
            **read_config(path),
        )
        load_weights(model, path)
        return model.eval()

    def _read_forecast(
        self,
        latents: Tensor,  # (B, Z, h, w), clean
        temporal: Tensor,  # (B, C, width)
    ) -> tuple[Tensor, Tensor]:  # location and scale, each (B, T, C)
        self.autoencoder.round_decoder()
        keeping = torch.is_grad_enabled() and not self.recomputing
        visual = self.passes(self._see)(latents) if keeping else self._see_in_parts(latents)
        return self.head(self.fusion(temporal, visual))

    def _predict(self, *inputs: Tensor) -> Tensor:  # of the U-Net -> (B, Z, h, w)
        if self.passes.budget is None:
            return call_rounded(self.unet, *inputs)
        return self.passes(self.unet)(*inputs, return_dict=False)[0]

    def _see(self, latents: Tensor) -> Tensor:  # (B, Z, h, w) -> (B, C, width)
        return self.visual(self.autoencoder.decode(latents))

    def _see_in_parts(self, latents: Tensor) -> Tensor:  # (B, Z, h, w) -> (B, C, width)
        parts = latents.split(self.images_at_once(torch.is_grad_enabled()))
        return torch.cat([recompute(self.passes(self._see), part) for part in parts])

    def images_at_once(self, training: bool) -> int:
        """Return how many images are decoded together, in a step that recomputes or a forecast."""
        size = self.config.image_size
        if training:
            return images_at_once(size, self.config.decoded_at_once)
        return images_within(DECODED_PIXELS, size)

    def _denoising_step(self) -> DenoisingStep:
        return self.graphed_denoiser or partial(self.noise_process.denoise, self.unet)

    def _encode_targets(self, series: Tensor) -> Tensor:  # (B, L, V) -> (B, C, width)
        return self.temporal(series.index_select(-1, self.targets))


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
