"""Configurations: presets, JSON, and what is refused."""

import dataclasses
import json
import math

import pytest
from tiny_model import TINY

from ldm4ts_kernels.model.config import PRESETS, LDM4TSConfig, resolve_config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_json(preset):
    config = resolve_config(preset, horizons=[1, 2])
    assert LDM4TSConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_the_paper_preset_is_the_papers():
    config = resolve_config("paper")
    assert config.image_size == (64, 64)
    assert config.unet_channels == (32, 64, 128)
    assert (config.d_model, config.unet_layers_per_block, config.cross_attention_dim) == (
        256,
        1,
        256,
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": (40, 40)}, r"image_size must be a pair .* multiples of 16, got \(40, 40\)"),
        ({"image_size": 224}, "image_size must be a sequence of integers, got 224"),
        ({"horizons": (4, 4)}, "horizons must be strictly increasing"),
        ({"horizons": (0, 4)}, "horizons must be strictly increasing integers >= 1"),
        ({"targets": (3,)}, "targets must be distinct indices of the 3 variates"),
        ({"history": 4}, "history must be an integer >= 8"),
        ({"history": True}, "history must be an integer"),
        ({"patch_length": 25}, r"patch_length must be at most history \(24\)"),
        ({"sampling_steps": 50}, r"sampling_steps must be at most diffusion_steps \(20\)"),
        ({"unet_heads": 5}, "unet_channels must be at least two positive multiples of 20"),
        ({"d_model": 15}, "d_model must be a multiple of encoder_heads"),
        ({"beta_schedule": "cosine"}, "beta_schedule must be one of"),
        ({"beta_start": 0.5}, "0 < beta_start < beta_end < 1"),
        ({"prediction_weight": math.nan}, "prediction_weight must be a finite number"),
        ({"dropout": 1.0}, "dropout must be a number"),
        ({"latent_clip": 0.0}, "latent_clip must be a number > 0"),
        ({"variates": 0}, "variates must be an integer >= 1, got 0"),
        ({"autoencoder_channels": (8,) * 7}, "autoencoder_channels must be"),
    ],
)
def test_a_bad_configuration_names_the_field_and_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        LDM4TSConfig(**{**TINY, **fields})
