"""Put `attention_fn` into a network of your own, where scaled_dot_product_attention stood.

python examples/plain_pytorch.py --steps 20
"""

import argparse
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm4ts_kernels import attention_fn, explain


class Attention(nn.Module):
    """Self-attention over the pixels of an image, added to it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def project(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (3, B, heads, H·W, D)
        states = self.to_qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).flatten(4)
        return states.movedim(1, 0).transpose(-1, -2).contiguous()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        out = attention_fn(*self.project(x))  # (B, heads, H·W, D)
        return x + self.to_out(out.transpose(-1, -2).reshape(x.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    down, up = nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ConvTranspose2d(32, 1, 4, 2, 1)
    attention = Attention(32, heads=2)
    network = nn.Sequential(down, nn.SiLU(), attention, nn.SiLU(), up).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    image = torch.rand(4, 1, 16, 16, device=device)
    for step in range(steps):
        loss = F.mse_loss(network(image + 0.1 * torch.randn_like(image)), image)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logging.info("step %d: loss %.4f", step + 1, loss.item())
    logging.info("%s", explain(*attention.project(network[:2](image))))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
