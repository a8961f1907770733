"""VRAM and time of one training step of the guide's 142 M U-Net, attention by attention.

    pytest benchmarks/test_training_memory.py --benchmark-only

What a forward pass keeps for its backward is counted exactly and needs no GPU. On a GPU a whole
step (forward, backward, fused AdamW) is timed and its peak memory read from the allocator.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import kept_bytes, write_rows
from ldm4ts_kernels import patch_unet_attention

pytest.importorskip("diffusers", reason="needs diffusers")

BATCH = 4
LAYOUTS = [
    pytest.param(px, attention, checkpointing, id=f"{px}px-{attention}-{checkpointing}")
    for px in (224, 512)
    for attention in ("default", "flash")
    for checkpointing in ("kept", "checkpointed")
]
rows: dict[str, list[dict[str, object]]] = {"kept_activations": [], "training_step": []}


@pytest.fixture(scope="module", autouse=True)
def results():
    """Write what was measured when the module is done."""
    yield
    for name, measured in rows.items():
        if measured:
            write_rows(name, measured)


def guide_unet(px: int, attention: str, checkpointing: str) -> nn.Module:
    """Build the U-Net of the original guide, whose latents have an eighth of the image's side."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=px // 8,
        layers_per_block=2,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
    )
    return patch_unet_attention(unet, attention, checkpointing == "checkpointed")


def inputs(px: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = torch.randn(BATCH, 4, px // 8, px // 8, device=device)
    steps = torch.randint(1000, (BATCH,), device=device)
    return latents, steps, torch.randn(BATCH, 8, 768, device=device)


@pytest.mark.parametrize(("px", "attention", "checkpointing"), LAYOUTS)
def test_kept_activations(benchmark, px, attention, checkpointing):
    def count() -> int:
        with FakeTensorMode():
            unet = guide_unet(px, attention, checkpointing)
            latents, steps, context = inputs(px, "cpu")
            return kept_bytes(lambda: unet(latents, steps, context).sample, unet.parameters())

    kept = benchmark.pedantic(count, rounds=1)
    benchmark.extra_info["kept_mib"] = kept / 2**20
    rows["kept_activations"].append(
        {"px": px, "batch": BATCH, "dtype": "fp32", "attention": attention,
         "checkpointing": checkpointing, "kept_mib": round(kept / 2**20, 1)}
    )  # fmt: skip
    assert 0 < kept < 40 * 2**30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("px", "attention", "checkpointing"), LAYOUTS)
def test_training_step(benchmark, px, attention, checkpointing, dtype):
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        unet = guide_unet(px, attention, checkpointing)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    latents, steps, context = inputs(px, "cuda")
    noise = torch.randn_like(latents)

    def step() -> float:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            predicted = unet(latents, steps, context).sample
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return loss.item()

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    loss = benchmark.pedantic(step, rounds=10)
    assert loss == loss, "the loss is not a number"
    rows["training_step"].append(
        {"px": px, "batch": BATCH, "dtype": str(dtype).removeprefix("torch."),
         "attention": attention, "checkpointing": checkpointing,
         "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1),
         "median_ms": round(benchmark.stats.stats.median * 1e3, 2)}
    )  # fmt: skip
