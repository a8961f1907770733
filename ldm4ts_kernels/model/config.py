"""What an LDM4TS model is made of, as one frozen record; the two presets are rows over it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

IMAGE_MULTIPLE = 16  # 8 of the autoencoder, times the 2 that lets the U-Net downsample once
MIN_HISTORY = 8  # five autocorrelation lags need at least this many rows
CONFIG_FIELDS_AS_TUPLES = (
    "targets",
    "horizons",
    "image_size",
    "unet_channels",
    "autoencoder_channels",
)
POSITIVE_INTEGERS = (
    "variates",
    "period",
    "diffusion_steps",
    "sampling_steps",
    "unet_layers_per_block",
    "unet_heads",
    "cross_attention_dim",
    "d_model",
    "encoder_layers",
    "encoder_heads",
    "d_ff",
    "patch_length",
    "patch_stride",
    "fusion_width",
    "latent_channels",
    "decoded_at_once",
)


@dataclass(frozen=True)
class LDM4TSConfig:
    """Everything that rebuilds a model; `dataclasses.asdict` and `LDM4TSConfig(**json)` round-trip.

    Raises ValueError, naming the field, what was expected and what came.
    """

    # The task
    history: int = 96  # L, rows of the lookback window
    variates: int = 5  # V
    targets: tuple[int, ...] = (3,)  # forecast variates, C = len(targets); 3 = close of OHLCV
    horizons: tuple[int, ...] = (15, 60, 240)  # rows ahead, T = len(horizons)
    # The views
    image_size: tuple[int, int] = (224, 224)  # (height, width)
    period: int = 24  # rows per season, for the segmentation view
    # The diffusion
    diffusion_steps: int = 1000
    sampling_steps: int = 50  # DDIM
    beta_schedule: str = "squaredcos_cap_v2"
    beta_start: float = 0.00085  # unused by squaredcos_cap_v2
    beta_end: float = 0.012
    latent_clip: float = 4.0  # bound of a clean latent, in standard deviations of the latents
    prediction_weight: float = 1.0  # lambda of L_diff + lambda * L_pred
    # The U-Net
    unet_channels: tuple[int, ...] = (128, 256, 512, 512)
    unet_layers_per_block: int = 2
    unet_heads: int = 8
    cross_attention_dim: int = 768
    # The temporal path and the fusion
    d_model: int = 256
    encoder_layers: int = 2
    encoder_heads: int = 8
    d_ff: int = 768
    dropout: float = 0.1
    patch_length: int = 16
    patch_stride: int = 8
    fusion_width: int = 256
    # The frozen parts: a diffusers / transformers name or path, or None
    autoencoder: str | None = None  # None: the small one below, trained first
    autoencoder_channels: tuple[int, ...] = (32, 64, 128, 128)
    latent_channels: int = 4  # of the small autoencoder
    text_encoder: str | None = None
    prompt: str = "A multivariate time series."  # describes the data set to the text encoder
    # Images that a step which recomputes activations decodes together, one if larger than 224 px:
    # the fewer, the less memory, and the longer
    decoded_at_once: int = 2

    def __post_init__(self) -> None:
        for name in CONFIG_FIELDS_AS_TUPLES:  # JSON brings lists
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name in POSITIVE_INTEGERS:
            _expect(name, getattr(self, name), "an integer >= 1", _is_count(getattr(self, name)))
        self._check_task()
        self._check_diffusion()
        self._check_widths()

    def _check_task(self) -> None:
        _expect(
            "history",
            self.history,
            f"an integer >= {MIN_HISTORY}",
            _is_count(self.history) and self.history >= MIN_HISTORY,
        )
        _expect(
            "patch_length",
            self.patch_length,
            f"at most history ({self.history})",
            self.patch_length <= self.history,
        )
        _expect(
            "targets",
            self.targets,
            f"distinct indices of the {self.variates} variates",
            bool(self.targets)
            and len(set(self.targets)) == len(self.targets)
            and all(0 <= target < self.variates for target in self.targets),
        )
        _expect(
            "horizons",
            self.horizons,
            "strictly increasing integers >= 1",
            bool(self.horizons)
            and self.horizons[0] >= 1
            and all(a < b for a, b in zip(self.horizons, self.horizons[1:], strict=False)),
        )
        _expect(
            "image_size",
            self.image_size,
            f"a pair (height, width) of positive multiples of {IMAGE_MULTIPLE}",
            len(self.image_size) == 2
            and all(side > 0 and side % IMAGE_MULTIPLE == 0 for side in self.image_size),
        )

    def _check_diffusion(self) -> None:
        _expect(
            "sampling_steps",
            self.sampling_steps,
            f"at most diffusion_steps ({self.diffusion_steps})",
            self.sampling_steps <= self.diffusion_steps,
        )
        schedules = ("linear", "scaled_linear", "squaredcos_cap_v2")
        _expect(
            "beta_schedule",
            self.beta_schedule,
            f"one of {schedules}",
            self.beta_schedule in schedules,
        )
        _expect(
            "beta_start, beta_end",
            (self.beta_start, self.beta_end),
            "0 < beta_start < beta_end < 1",
            0 < self.beta_start < self.beta_end < 1,
        )
        _expect("latent_clip", self.latent_clip, "a number > 0", self.latent_clip > 0)
        _expect(
            "prediction_weight",
            self.prediction_weight,
            "a finite number >= 0",
            0 <= self.prediction_weight < math.inf,
        )
        _expect("dropout", self.dropout, "a number in [0, 1)", 0 <= self.dropout < 1)

    def _check_widths(self) -> None:
        for name, parts in (("unet_channels", self.unet_heads), ("autoencoder_channels", 1)):
            channels, multiple = getattr(self, name), math.lcm(4, parts)
            _expect(
                name,
                channels,
                f"at least two positive multiples of {multiple} (4, and unet_heads)",
                len(channels) >= 2 and all(c > 0 and c % multiple == 0 for c in channels),
            )
        reduction = 2 ** (len(self.autoencoder_channels) - 1)
        _expect(
            "autoencoder_channels",
            self.autoencoder_channels,
            f"a reduction 2^(levels - 1) that divides image_size {self.image_size}",
            all(side % reduction == 0 for side in self.image_size),
        )
        _expect(
            "d_model",
            self.d_model,
            f"a multiple of encoder_heads ({self.encoder_heads})",
            self.d_model % self.encoder_heads == 0,
        )


PRESETS: dict[str, dict[str, Any]] = {
    # The U-Net of the original guide, 142 M parameters, on 28 x 28 latents.
    "guide": {},
    # The paper's sizes (Table VII, appendix I): 8 x 8 latents; one fewer level of width than SD.
    "paper": {
        "image_size": (64, 64),
        "beta_schedule": "scaled_linear",
        "unet_channels": (32, 64, 128),
        "unet_layers_per_block": 1,
        "unet_heads": 4,
        "cross_attention_dim": 256,
        "autoencoder_channels": (16, 32, 64, 64),
    },
}


def resolve_config(preset: str, **config_fields: Any) -> LDM4TSConfig:
    """Return the preset's configuration with the given fields in place of its own.

    Raises ValueError for an unknown preset or a bad value, TypeError for an unknown field.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {tuple(PRESETS)}, got {preset!r}")
    known = {field.name for field in fields(LDM4TSConfig)}
    for name in config_fields:
        if name not in known:
            raise TypeError(f"unknown configuration field {name!r}; known are {sorted(known)}")
    return LDM4TSConfig(**{**PRESETS[preset], **config_fields})


def norm_groups(channels: tuple[int, ...]) -> int:
    """Return the group norms' number of groups: 32 where it divides, at least 4 channels each."""
    return math.gcd(32, *(width // 4 for width in channels))


def _expect(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _integers(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(type(item) is int for item in value):
        raise ValueError(f"{name} must be a sequence of integers, got {value!r}")
    return tuple(value)
