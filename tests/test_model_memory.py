"""The traced steps of LDM4TS: as real ones, in the precisions of CUDA, leaving nothing behind."""

import pytest
import torch
import torch.nn.functional as F
from tiny_model import TINY, batch_of, ready
from torch import nn

from ldm4ts_kernels.memory_trace import trace_step
from ldm4ts_kernels.model.config import resolve_config
from ldm4ts_kernels.model_memory import Step, _checkpoint, _CudaAutocast, _trace, memory_law


def step(
    part: str = "forecaster",
    materialised: bool = True,
    checkpointing: bool = False,
    precision: str = "fp32",
    **fields: object,
) -> Step:
    config = resolve_config("guide", **{**TINY, **fields})
    return Step(config, part, materialised, checkpointing, precision)


def peak(*args: object, batch: int = 4, **fields: object) -> int:
    return memory_law(step(*args, **fields)).peak(batch).total


def test_a_real_step_takes_what_the_law_says():
    model = ready(attention_backend="default", enable_gradient_checkpointing=False).train()
    batch = batch_of(5)
    real = trace_step(
        model, model.trainable_parameters(), batch.values(), lambda: model.loss(batch)["loss"]
    )
    assert peak(batch=5) == pytest.approx(max(map(sum, real.live_bytes)), rel=0.002)


@pytest.mark.parametrize("part", ["autoencoder", "forecaster", "unet"])
def test_two_traces_give_the_peak_of_every_batch(part):
    traced = max(map(sum, _trace(step(part), 11).live_bytes))
    assert peak(part, batch=11) == pytest.approx(traced, rel=0.002)


def test_each_lever_saves_memory_on_a_large_image():
    pixels = {"image_size": (128, 128), "batch": 8}
    everything = peak("unet", False, True, "bf16", **pixels)
    assert everything < peak("unet", False, True, **pixels) < peak("unet", False, **pixels)
    assert peak("unet", False, **pixels) < peak("unet", **pixels)


def test_the_whole_step_takes_more_than_the_unet_alone():
    assert peak("forecaster") > peak("unet")


def test_autocast_rounds_as_cuda_does():
    rows = torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16), _CudaAutocast():
        assert F.group_norm(rows.bfloat16(), 2).dtype == torch.float32
        assert rows.bfloat16().softmax(-1).dtype == torch.float32
        assert F.linear(rows, torch.ones(3, 8)).dtype == torch.bfloat16
    with _CudaAutocast():
        assert rows.bfloat16().softmax(-1).dtype == torch.bfloat16


def test_what_is_recomputed_rounds_as_the_first_time():
    norm = nn.GroupNorm(2, 4)
    kept = []
    norm.register_forward_hook(lambda module, args, output: kept.append(output.dtype))
    # Recomputing ends with the last tensor that is needed: the input of the second layer.
    block = nn.Sequential(norm, nn.Linear(8, 8))
    rows = torch.randn(2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), _CudaAutocast():
        _checkpoint(block, rows).sum().backward()
    assert kept == [torch.float32, torch.float32]


def test_tracing_draws_no_random_numbers_and_announces_no_backend(caplog):
    before = torch.random.get_rng_state()
    with caplog.at_level("INFO", "ldm4ts_kernels"):
        peak("unet", False, d_ff=48)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert caplog.text == ""


def test_a_text_encoder_is_refused():
    with pytest.raises(ValueError, match="text_encoder must be None for an estimate, got 'bert'"):
        peak(text_encoder="bert")
