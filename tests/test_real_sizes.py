"""Plugged models in bf16 at the sizes of Stable Diffusion 1.5, SDXL, Flux and Wan, against fp32.

SDXL, Flux and Wan keep their widths, head dims and sequences, with fewer layers. Without a GPU tiny
models take the same test, in Triton's interpreter.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("triton", reason="needs triton")

import diffusers

from ldm4ts_kernels import accelerate_attention
from ldm4ts_kernels.native import load_error
from tests.families import FAMILIES, kernels_run_here

# Not cuDNN, PyTorch's choice on Hopper: its backward has a known fault (pytorch/pytorch#196678).
TORCHS_OWN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Call = Callable[[nn.Module, Callable[..., Tensor]], Tensor]


def sd15():
    return diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=8,
        cross_attention_dim=768,
    )


def call_sd15(model, random):
    return model(random(1, 4, 64, 64), 500, random(1, 77, 768)).sample


def sdxl():
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        layers_per_block=1,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
    )


def call_sdxl(model, random):
    return model(random(1, 4, 128, 128), 500, random(1, 77, 2048)).sample


def flux():
    return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)


def call_flux(model, random):
    side = torch.arange(64.0, device=model.device)
    pixels = torch.cartesian_prod(torch.zeros(1, device=model.device), side, side)  # (4096, 3)
    return model(
        hidden_states=random(1, 4096, 64),
        encoder_hidden_states=random(1, 512, 4096),
        pooled_projections=random(1, 768),
        timestep=random(1).abs(),
        img_ids=pixels,
        txt_ids=torch.zeros(512, 3, device=model.device),
    ).sample


def wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1
    )


def call_wan(model, random):
    latents = random(1, 16, 5, 60, 104)  # 7,800 tokens: 17 frames of 480 × 832
    time = torch.tensor([500], device=model.device)
    return model(latents, time, random(1, 512, 4096)).sample


def tiny(name):
    family = next(family for family in FAMILIES if family.name == name)
    skip = pytest.mark.skipif(not kernels_run_here(), reason="needs Triton's interpreter")
    call = lambda model, random: family.call(model)  # noqa: E731  it draws its own inputs
    return pytest.param(family.build, call, id=f"tiny {name}", marks=skip)


SIZES = [
    *(
        pytest.param(build, call, id=build.__name__, marks=pytest.mark.gpu)
        for build, call in (
            (sd15, call_sd15),
            (sdxl, call_sdxl),
            (flux, call_flux),
            (wan, call_wan),
        )
    ),
    tiny("FluxTransformer2DModel"),
    tiny("WanTransformer3DModel"),
]


def step(model: nn.Module, call: Call) -> list[Tensor]:
    """Return the output and the gradient of every parameter that has one, in float32."""
    parameter = next(model.parameters())
    generator = torch.Generator(parameter.device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=parameter.device)
        return tensor.bfloat16().to(parameter.dtype)

    device, dtype = parameter.device.type, parameter.dtype
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = call(model, random)
    out.float().square().mean().backward()
    grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [out.detach().float(), *grads]


@pytest.mark.parametrize(("build", "call"), SIZES)
def test_a_plugged_model_is_as_close_to_fp32_as_sdpa_is(build, call, device):
    torch.manual_seed(0)
    model = build().to(device, torch.bfloat16)
    with sdpa_kernel(TORCHS_OWN):
        exact = step(copy.deepcopy(model).float(), call)
        rounded = step(model, call)
    assert exact[0].norm() > 0
    backends = ["triton"]
    if device.type == "cuda" and load_error() is None:
        backends.append("native")
    for backend in backends:
        with accelerate_attention(model, backend=backend) as handle:
            ours = step(model, call)
        assert {row.served_by for row in handle.report()} == {backend}
        for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
            # One rounding of bf16, 2⁻⁸, beyond twice the error that torch's own bf16 has.
            budget = 2 * (theirs - truth).norm() + truth.norm() / 256
            assert (mine - truth).norm() <= budget
