"""One denoising step and one training step of U-Nets of real size, attention by attention.

    pytest benchmarks/test_unet_step.py --benchmark-only

Random bf16 weights in the configurations of Stable Diffusion 1.5 (64×64 latents) and SDXL
(128×128). A training step is forward, backward and fused AdamW without checkpointing; the peak is
the allocator's, weights and optimizer states included. What an attention refuses is written down.
Without a GPU a tiny U-Net takes the same steps, and nothing is written.
"""

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="needs diffusers")

from benchmarks.measure import write_rows
from ldm4ts_kernels import accelerate_attention, attention_fn, patch_unet_attention
from ldm4ts_kernels.backends import CHAINS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Model(NamedTuple):
    """A U-Net's configuration, its batch, and what it is published to have."""

    config: dict[str, Any]
    batch: int
    attention_layers: int
    parameters: int


MODELS = {
    "SD1.5": Model(
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "attention_head_dim": 8,  # the number of heads, as diffusers has it
            "cross_attention_dim": 768,
        },
        4,
        32,
        859_520_964,
    ),
    "SDXL": Model(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2,
        140,
        2_567_463_684,
    ),
}
TINY = Model(
    {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
    },
    2,
    8,
    64_772,
)
ATTENTIONS = {  # of `accelerate_attention`; None is what diffusers does by itself
    "eager math": None,
    "sdpa": None,
    "exact, auto": {},
    "exact, triton": {"backend": "triton"},
    "exact, native": {"backend": "native"},
    "int8, triton": {"precision": "int8", "backend": "triton_int8"},
    "sageattention 2": {"precision": "int8", "backend": "sageattention2"},
    "sageattention 1": {"precision": "int8", "backend": "sageattention"},
}
if any(row.name == "native_int8" for row in CHAINS["int8"]):
    ATTENTIONS["int8, native"] = {"precision": "int8", "backend": "native_int8"}
rows: list[dict[str, object]] = []


@pytest.fixture(autouse=True)
def results():
    """Write what has been measured after each test: a run that is cut keeps what it has."""
    yield
    if rows and ON_GPU:
        write_rows("unet_step", rows)


def build(model: Model, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from diffusers import UNet2DConditionModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel(**model.config)
    finally:
        torch.set_default_dtype(before)


def inputs(model: Model, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    side, width = model.config["sample_size"], model.config["cross_attention_dim"]
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    conditions = {
        "text_embeds": torch.randn(model.batch, 1280, **options),
        "time_ids": torch.ones(model.batch, 6, **options),
    }
    return {
        "sample": torch.randn(model.batch, 4, side, side, **options),
        "timestep": torch.full((model.batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(model.batch, 77, width, **options),
        "added_cond_kwargs": conditions if "addition_embed_type" in model.config else None,
    }


def attention_shapes(model: Model) -> list[tuple[int, ...]]:
    """Return (B, H, Q, K, D) of every attention layer, found without computing anything."""
    unet = build(model, "meta")
    with accelerate_attention(unet, backend="sdpa") as attention, torch.no_grad():
        unet(**inputs(model, "meta"))
    return [layer.shape for layer in attention.layers if layer.shape is not None]


def compile_kernels(shape: tuple[int, ...], options: dict[str, str]) -> None:
    """Fill Triton's cache on disk with the kernels of one layer, in the layout of a U-Net."""
    B, H, Q, K, D = shape
    tensors: list[Tensor] = [
        torch.randn(B, length, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for length in (Q, K, K)
    ]
    attention_fn(*tensors, **options)
    attention_fn(*(tensor.requires_grad_() for tensor in tensors), **options).sum().backward()


@pytest.fixture(scope="module")
def compiled():
    """Compile each Triton kernel that is measured in a process of its own, all at once."""
    if not ON_GPU:
        return
    shapes = {shape for model in MODELS.values() for shape in attention_shapes(model)}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(12, mp_context=spawn) as pool:
        for name in ("exact, triton", "int8, triton"):
            for shape in shapes:
                pool.submit(compile_kernels, shape, ATTENTIONS[name])


@pytest.fixture(scope="module", params=MODELS if ON_GPU else ["tiny"])
def subject(request, compiled):
    """Build one U-Net at a time, with its inputs."""
    model = MODELS.get(request.param, TINY)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    yield request.param, model, build(model, DEVICE, dtype), inputs(model, DEVICE, dtype)
    torch.cuda.empty_cache()


def plug(unet: nn.Module, name: str) -> Any:
    """Give a fresh U-Net the attention of that name, as a context manager that takes it away."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor(AttnProcessor2_0())  # type: ignore[operator]
    if name == "eager math":
        patch_unet_attention(unet, "default", enable_gradient_checkpointing=False)
    options = ATTENTIONS[name]
    return nullcontext() if options is None else accelerate_attention(unet, **options)


def denoising(unet: nn.Module, given: dict[str, Any]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def step() -> Tensor:
        return unet(**given).sample

    return step


def training(unet: nn.Module, given: dict[str, Any]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)
    noise = torch.randn_like(given["sample"]).float()

    def step() -> Tensor:
        loss = (unet(**given).sample.float() - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


STEPS = {"denoising": denoising, "training": training}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_unet_step(benchmark, subject, step, attention):
    name, model, unet, given = subject
    row: dict[str, object] = {
        "model": name, "batch": model.batch, "dtype": str(given["sample"].dtype)[6:],
        "step": step, "attention": attention, "median_ms": "", "peak_mib": "", "refusal": "",
    }  # fmt: skip
    rows.append(row)
    gc.collect()  # or the peak holds an earlier optimizer's states
    with plug(unet, attention):
        run = STEPS[step](unet, given)
        try:
            run()
            peak = measure(benchmark, run)
        except (NotImplementedError, torch.OutOfMemoryError) as refusal:
            row["refusal"] = str(refusal).splitlines()[0]
            pytest.skip(str(row["refusal"]))
    row["median_ms"] = round(benchmark.stats.stats.median * 1e3, 2)
    row["peak_mib"] = round(peak / 2**20, 1)


def measure(benchmark: Any, run: Callable[[], Tensor]) -> int:
    """Time a step with the host's work in it, and return the peak of allocated bytes."""

    def timed() -> Tensor:
        result = run()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    if not ON_GPU:
        assert benchmark.pedantic(timed, rounds=1).isfinite().all()
        return 0
    torch.cuda.reset_peak_memory_stats()
    assert benchmark.pedantic(timed, rounds=5).isfinite().all()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("name", [*MODELS, "tiny"])
def test_a_configuration_is_of_the_size_it_is_named_after(name):
    model = MODELS.get(name, TINY)
    assert sum(p.numel() for p in build(model, "meta").parameters()) == model.parameters
    shapes = attention_shapes(model)
    assert len(shapes) == model.attention_layers
    assert {shape[3] for shape in shapes if shape[3] != shape[2]} == {77}
