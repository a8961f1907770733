"""The U-Net's size, and the one rule by which training and sampling undo noise."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from recorders import Rerun

from ldm4ts_kernels.model.config import LDM4TSConfig, resolve_config
from ldm4ts_kernels.model.denoiser import GraphedDenoiser, NoiseProcess, build_unet


def test_the_guides_unet_has_142_million_parameters():
    with torch.device("meta"):
        unet = build_unet(resolve_config("guide"), 4, (28, 28))
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(
        142.24e6, rel=1e-2
    )


@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_training_and_sampling_estimate_the_clean_latent_by_the_same_rule(schedule):
    process = NoiseProcess(LDM4TSConfig(beta_schedule=schedule))
    scheduler = DDIMScheduler.from_config(process.schedule)
    scheduler.set_timesteps(50)
    noisy, noise = torch.randn(2, 3, 4, 4, 4)
    for timestep in (980, 500, 20, 0):
        expected = scheduler.step(noise, timestep, noisy).pred_original_sample
        actual = process.estimate_clean(noisy, noise, torch.full((3,), timestep))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_estimate_inverts_the_noising():
    process = NoiseProcess(LDM4TSConfig())
    clean, noise = torch.randn(2, 5, 4, 4, 4).clamp(-3.9, 3.9)
    timesteps = torch.tensor([0, 100, 500, 700, 900])
    estimate = process.estimate_clean(process.add_noise(clean, noise, timesteps), noise, timesteps)
    torch.testing.assert_close(estimate, clean, rtol=0, atol=1e-4)


class Perfect(torch.nn.Module):
    """Predicts the very noise that separates a latent from `clean`."""

    def __init__(self, process, clean):
        super().__init__()
        self.process, self.clean = process, clean

    def forward(self, noisy, timestep, tokens, return_dict):
        alpha = self.process.alphas_cumprod[timestep]
        return ((noisy - alpha.sqrt() * self.clean) / (1 - alpha).sqrt(),)


@pytest.mark.parametrize("steps", [1, 6, 7, 50, 1000])
def test_sampling_with_a_perfect_denoiser_finds_the_clean_latent(steps):
    process = NoiseProcess(LDM4TSConfig())
    clean = torch.randn(2, 4, 4, 4).clamp(-3, 3)
    step = partial(process.denoise, Perfect(process, clean))
    sampled = process.sample(step, torch.randn(2, 4, 4, 4), torch.zeros(2, 2, 8), steps)
    torch.testing.assert_close(sampled, clean, rtol=0, atol=0.02 if steps > 1 else 3.0)


class Wrong(torch.nn.Module):
    def forward(self, noisy, timestep, tokens, return_dict):
        return ((noisy * 0.7 + tokens.mean() + 0.001 * timestep.reshape(-1, 1, 1, 1)).tanh(),)


@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_sampling_takes_the_steps_of_diffusers_ddim(schedule, steps):
    process = NoiseProcess(LDM4TSConfig(beta_schedule=schedule))
    scheduler = DDIMScheduler.from_config(process.schedule, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    noise, tokens = torch.randn(3, 4, 4, 4), torch.randn(3, 2, 8)
    noisy = noise
    for timestep in scheduler.timesteps:
        predicted = Wrong()(noisy, timestep, tokens, False)[0]
        result = scheduler.step(predicted, timestep, noisy)
        noisy = result.prev_sample
    sampled = process.sample(partial(process.denoise, Wrong()), noise, tokens, steps)
    torch.testing.assert_close(sampled, result.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_a_graphed_denoiser_pads_narrow_calls_to_its_widest():
    process, recorder = NoiseProcess(LDM4TSConfig()), Rerun()
    seen = []

    def denoise(inputs):
        seen.append(len(inputs["noisy"]))
        return {"noisy": inputs["noisy"] / 2, "clean": inputs["noisy"]}

    graphed = GraphedDenoiser(denoise, torch.device("cpu"), recorder)
    for count in (3, 2, 3):
        noise = torch.randn(count, 4, 4, 4)
        sampled = process.sample(graphed, noise, torch.zeros(count, 2, 8), 5)
        torch.testing.assert_close(sampled, noise / 16)
    assert set(seen) == {3}
    assert recorder.recorded == 1
