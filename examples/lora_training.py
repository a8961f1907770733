"""Train low-rank updates of a U-Net's query and value projections, attention computed once a step.

python examples/lora_training.py --steps 20
"""

import argparse
import logging

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm4ts_kernels import accelerate_attention, save_attention_outputs


class LowRank(nn.Module):
    """A frozen linear layer plus a trained update of rank r, 0 at first (arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "block_out_channels": (32,)}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D",), "cross_attention_dim": 32}
    unet = diffusers.UNet2DConditionModel(**blocks, attention_head_dim=2).requires_grad_(False)
    for module in list(unet.modules()):
        if hasattr(module, "to_q"):
            module.to_q, module.to_v = LowRank(module.to_q), LowRank(module.to_v)
    unet.to(device).enable_gradient_checkpointing(save_attention_outputs)
    attention = accelerate_attention(unet)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    latents, context = torch.randn(2, 4, 8, 8, device=device), torch.randn(2, 5, 32, device=device)
    noise, time = torch.randn_like(latents), torch.tensor([10, 500], device=device)
    noisy = diffusers.DDPMScheduler().add_noise(latents, noise, time)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        for step in range(steps):
            loss = F.mse_loss(unet(noisy, time, context).sample.float(), noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logging.info("step %d: loss %.4f", step + 1, loss.item())
    logging.info("%s", attention.report())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
