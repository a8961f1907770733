"""The attention problems that are timed, from U-Nets and diffusion transformers."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Batch, heads, query length, key length, head dim, and where it comes from."""

    B: int
    H: int
    Q: int
    K: int
    D: int
    origin: str

    def __str__(self) -> str:
        return f"{self.B}x{self.H}x{self.Q}x{self.K}x{self.D}"


SHAPES = (
    Shape(4, 8, 784, 784, 16, "LDM4TS guide, 224 px, level 1"),
    Shape(4, 8, 196, 196, 32, "LDM4TS guide, 224 px, level 2"),
    Shape(4, 8, 49, 49, 64, "LDM4TS guide, 224 px, level 3"),
    Shape(4, 8, 784, 784, 40, "Stable Diffusion 1.5, 224 px"),
    Shape(4, 8, 784, 77, 40, "Stable Diffusion 1.5, 224 px, cross"),
    Shape(4, 8, 196, 196, 80, "Stable Diffusion 1.5, 224 px, level 2"),
    Shape(4, 8, 49, 49, 160, "Stable Diffusion 1.5, 224 px, level 3"),
    Shape(16, 5, 784, 784, 64, "SD 2.1 / SVD, 224 px"),
    Shape(4, 8, 4096, 4096, 40, "Stable Diffusion 1.5, 512 px"),
    Shape(4, 8, 1024, 1024, 80, "Stable Diffusion 1.5, 512 px, level 2"),
    Shape(4, 8, 256, 256, 160, "Stable Diffusion 1.5, 512 px, level 3"),
    Shape(4, 8, 4096, 77, 40, "Stable Diffusion 1.5, 512 px, cross"),
    Shape(4, 10, 4096, 4096, 64, "SDXL, 1024 px"),
    Shape(2, 8, 4096, 4096, 160, "head dim 160, long"),
    Shape(1, 24, 4608, 4608, 128, "Flux, 1024 px"),
    Shape(1, 30, 17776, 17776, 64, "CogVideoX"),
    Shape(1, 24, 16384, 16384, 128, "Wan / Hunyuan, 16 k tokens"),
)

# What those shapes leave out: kinds of tiles of the compiled kernels, and head dims between.
TILE_SHAPES = (
    Shape(2, 16, 2048, 2048, 48, "head dim 48"),
    Shape(2, 16, 2048, 2048, 96, "head dim 96"),
    Shape(2, 16, 2048, 2048, 112, "head dim 112"),
    Shape(2, 16, 2048, 2048, 192, "head dim 192"),
    Shape(2, 16, 2048, 2048, 256, "head dim 256"),
    Shape(1, 5, 256, 16384, 64, "split keys"),
    Shape(1, 2, 1024, 65536, 64, "split keys"),
    Shape(1, 1, 4096, 4096, 512, "autoencoder, 512 px"),
    Shape(4, 1, 784, 784, 512, "autoencoder, 224 px"),
    Shape(128, 16, 16, 16, 64, "frames of a video, one warp a block"),
    Shape(4, 8, 100, 100, 64, "paired warps"),
    Shape(4, 8, 49, 49, 128, "paired warps"),
)
