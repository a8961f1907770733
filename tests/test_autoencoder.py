"""Stage 1, what ends it, and autoencoders that others trained."""

import copy

import pytest
import torch

from ldm4ts_kernels.model.autoencoder import ImageAutoencoder, build_small_autoencoder
from ldm4ts_kernels.model.config import LDM4TSConfig
from ldm4ts_kernels.model.vision import encode_vision

TINY = {"image_size": (32, 32), "autoencoder_channels": (8, 16, 16, 16)}


def images(count: int = 4, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return encode_vision(torch.randn(count, 48, 2, generator=generator).cumsum(1), size, 12)


def autoencoder(**fields: object) -> ImageAutoencoder:
    torch.manual_seed(0)
    return ImageAutoencoder(LDM4TSConfig(**{**TINY, **fields}))


def test_stage_one_learns_to_reconstruct():
    model = autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = model.reconstruction_loss(images())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_latents_are_an_eighth_and_images_come_back_whole(size):
    model = autoencoder(image_size=size)
    latents = model.encode(images(2, size))
    assert latents.shape == (2, 4, size[0] // 8, size[1] // 8)
    assert model.decode(latents).shape == (2, 3, *size)
    assert model.reduction == 8


def test_freezing_gives_latents_unit_variance_and_ends_training():
    model = autoencoder()
    assert model.needs_training
    model.freeze(images())
    assert not model.needs_training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.encode(images()).std().item() == pytest.approx(1, rel=1e-4)


def test_the_scale_of_latents_does_not_change_the_decoded_image():
    model = autoencoder()
    before = model.decode(model.encode(images()))
    model.freeze(images())
    torch.testing.assert_close(model.decode(model.encode(images())), before, atol=1e-5, rtol=1e-5)


def test_the_decoder_passes_the_gradient_that_the_encoder_stops():
    model = autoencoder()
    model.freeze(images())
    assert not model.encode(images().requires_grad_()).requires_grad
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    model.decode(latents).sum().backward()
    assert latents.grad.abs().min() > 0


def test_latents_that_do_not_vary_cannot_end_stage_one():
    model = autoencoder()
    with pytest.raises(ValueError, match="must vary and be finite, got std nan"):
        model.freeze(torch.full((2, 3, 32, 32), torch.nan))
    assert model.needs_training


def test_a_state_dict_carries_the_end_of_stage_one():
    trained, fresh = autoencoder(), autoencoder()
    start = copy.deepcopy(fresh.state_dict())
    trained.freeze(images())
    fresh.load_state_dict(trained.state_dict())
    assert not fresh.needs_training
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    assert torch.equal(fresh.encode(images()), trained.encode(images()))
    fresh.load_state_dict(start)
    assert fresh.needs_training
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_a_frozen_autoencoder_stays_in_eval_mode():
    model = autoencoder()
    assert model.train().kl.training
    model.freeze(images())
    assert not model.train().kl.training


def test_a_given_autoencoder_is_frozen_at_once_with_its_own_scaling(tmp_path):
    kl = build_small_autoencoder(LDM4TSConfig(**TINY))
    kl.register_to_config(scaling_factor=0.25, shift_factor=0.5)
    kl.save_pretrained(tmp_path)
    model = autoencoder(autoencoder=str(tmp_path))
    assert not model.needs_training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    mean = kl.eval().encode(2 * images() - 1).latent_dist.mean
    torch.testing.assert_close(model.encode(images()), (mean - 0.5) * 0.25)
    assert model.decode(model.encode(images())).isfinite().all()


def test_an_autoencoder_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"autoencoder '.*nothing' cannot be loaded"):
        autoencoder(autoencoder=str(tmp_path / "nothing"))


def test_an_autoencoder_of_grey_images_is_refused(tmp_path):
    kl = build_small_autoencoder(LDM4TSConfig(**TINY))
    type(kl)(**{**kl.config, "in_channels": 1, "out_channels": 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must take 3 channels"):
        autoencoder(autoencoder=str(tmp_path))


def test_a_frozen_decoder_is_rounded_beside_its_own_weights():
    from tiny_model import ready

    autoencoder = ready().autoencoder
    latents = torch.randn(2, *ready().latent_shape)
    exact, names = autoencoder.decode(latents), list(autoencoder.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        autoencoder.round_decoder()
        rounded = autoencoder.decode(latents)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    assert list(autoencoder.state_dict()) == names
    assert {parameter.dtype for parameter in autoencoder.parameters()} == {torch.float32}
    torch.testing.assert_close(autoencoder.decode(latents), exact)
