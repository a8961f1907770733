"""The path beside the diffusion, and where the two meet: patch Transformer, gate, head."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm4ts_kernels.model.config import LDM4TSConfig

EMBEDDING_STD = 0.02
VISION_PATCH = 16  # pixels a side
VISION_CHANNELS = 16
MIN_SCALE = 1e-3  # of a window's standard deviation


class TemporalEncoder(nn.Module):
    """Z_TE = W · flatten(Transformer(patches of a target's history)): (B, C, width).

    Each target is a sequence of its own with shared weights, as in PatchTST (Nie et al., ICLR
    2023); the other variates speak through the image and the tokens. The end is padded with its
    last value by one stride, so that the newest rows stand in two patches.
    """

    def __init__(self, config: LDM4TSConfig):
        super().__init__()
        self.length, self.stride = config.patch_length, config.patch_stride
        patches = (config.history + self.stride - self.length) // self.stride + 1
        self.embed = nn.Linear(self.length, config.d_model)
        self.position = nn.Parameter(EMBEDDING_STD * torch.randn(patches, config.d_model))
        layer = nn.TransformerEncoderLayer(
            config.d_model,
            config.encoder_heads,
            config.d_ff,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer,
            config.encoder_layers,
            norm=nn.LayerNorm(config.d_model),
            enable_nested_tensor=False,
        )
        self.project = nn.Linear(patches * config.d_model, config.fusion_width)

    def forward(
        self,
        targets: Tensor,  # (B, L, C), normalised
    ) -> Tensor:  # (B, C, width)
        padded = F.pad(targets.mT, (0, self.stride), mode="replicate")
        patches = padded.unfold(-1, self.length, self.stride)  # (B, C, patches, length)
        tokens = self.embed(patches) + self.position
        encoded = self.encoder(tokens.flatten(0, 1))  # (B * C, patches, d_model)
        return self.project(encoded.flatten(1)).unflatten(0, padded.shape[:2])


class VisualHead(nn.Module):
    """Z_VE = W · flatten(16-pixel patches of the decoded image) + e_c: (B, C, width).

    The image is a mean over variates and so the same for every target: e_c, a learned embedding,
    tells them apart.
    """

    def __init__(self, config: LDM4TSConfig):
        super().__init__()
        height, width = (side // VISION_PATCH for side in config.image_size)
        self.patch = nn.Conv2d(3, VISION_CHANNELS, VISION_PATCH, stride=VISION_PATCH)
        self.project = nn.Linear(VISION_CHANNELS * height * width, config.fusion_width)
        self.target = nn.Parameter(
            EMBEDDING_STD * torch.randn(len(config.targets), config.fusion_width)
        )

    def forward(
        self,
        image: Tensor,  # (B, 3, height, width)
    ) -> Tensor:  # (B, C, width)
        patches = F.gelu(self.patch(image)).flatten(1)
        return self.project(patches)[:, None] + self.target


class GatedFusion(nn.Module):
    """Y = g · Z_TE + (1 - g) · Z_VE, with g = sigmoid(MLP([Z_TE; Z_VE])): (B, C, width).

    LDM4TS (arXiv 2502.14887), equations 18 and 19.
    """

    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width), nn.Sigmoid()
        )

    def forward(
        self,
        temporal: Tensor,  # (B, C, width)
        visual: Tensor,  # (B, C, width)
    ) -> Tensor:  # (B, C, width)
        gate = self.gate(torch.cat([temporal, visual], dim=-1))
        return gate * temporal + (1 - gate) * visual


class ForecastHead(nn.Module):
    """location, scale = W · Y: each (B, T, C), float32, in normalised units; scale > 0.

    The layer starts at zero: an untrained model forecasts the last value.
    """

    def __init__(self, width: int, horizons: int):
        super().__init__()
        self.project = nn.Linear(width, 2 * horizons)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(
        self,
        fused: Tensor,  # (B, C, width)
    ) -> tuple[Tensor, Tensor]:
        location, scale = self.project(fused).float().mT.chunk(2, dim=1)  # each (B, T, C)
        return location, F.softplus(scale) + MIN_SCALE


def gaussian_crps(
    location: Tensor,
    scale: Tensor,
    value: Tensor,
) -> Tensor:
    """Return the CRPS of N(location, scale²) at value, σ (z (2Φ(z) - 1) + 2φ(z) - 1/√π).

    Elementwise, in the units of value. Gneiting & Raftery (JASA 2007), equation 21 (as a loss).
    """
    z = (value - location) / scale
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    cumulative = torch.special.ndtr(z)
    return scale * (z * (2 * cumulative - 1) + 2 * density - 1 / math.sqrt(math.pi))
