"""The shapes that kernels are tested on. New shapes go here, not into new tests."""

from typing import NamedTuple

import torch
from torch import Tensor

from ldm4ts_kernels.requirements import Call


class Shape(NamedTuple):
    """One attention problem: batch, query heads, key heads, query and key length, head dim."""

    B: int
    H: int
    G: int
    Q: int
    K: int
    D: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


CALL = Call(
    device=torch.device("cpu"),
    dtype=torch.float16,
    batch=1,
    heads=2,
    kv_heads=2,
    query_length=5,
    key_length=7,
    head_dim=64,
    value_dim=64,
    mask=None,
    dropout=False,
    is_causal=False,
    needs_grad=False,
    return_lse=False,
    unit_stride=True,
    default_stream=True,
)

# Small enough for the interpreter: every head-dim split, ragged lengths, one and many key blocks.
SMALL = [
    Shape(1, 1, 1, 1, 1, 1),
    Shape(1, 1, 1, 2, 5, 24),
    Shape(2, 2, 2, 33, 47, 16),
    Shape(1, 2, 1, 49, 77, 40),
    Shape(1, 1, 1, 17, 150, 59),
    Shape(1, 4, 2, 40, 130, 64),
    Shape(1, 1, 1, 130, 33, 80),
    Shape(1, 1, 1, 20, 140, 96),
    Shape(1, 1, 1, 20, 40, 111),
    Shape(1, 1, 1, 30, 70, 160),
    Shape(1, 1, 1, 20, 70, 256),
]
# After flash-attention's own tests: every head dim, ragged and equal lengths, real batches.
LENGTHS = ((113, 203), (1023, 1024), (1, 1), (784, 784), (784, 77), (2048, 1000))
LARGE = [
    Shape(2, 4, 4, q, k, d)
    for d in (1, 16, 24, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256)
    for q, k in LENGTHS
] + [Shape(2, 8, g, 500, 700, 64) for g in (1, 2)]
AUTOENCODER = [Shape(2, 1, 1, q, k, 512) for q, k in LENGTHS]  # its single head of all channels


def draw(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    spread: float = 1.0,
    channel_bias: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query, key and value as real ones are: normal, and the key with a bias a channel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    query = normal(shape.B, shape.H, shape.Q, shape.D) * spread
    key = normal(shape.B, shape.G, shape.K, shape.D) * spread
    key = key + channel_bias * normal(1, shape.G, 1, shape.D)
    value = normal(shape.B, shape.G, shape.K, shape.D)
    query, key, value = (tensor.to(dtype).to(device) for tensor in (query, key, value))
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
