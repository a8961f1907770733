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
