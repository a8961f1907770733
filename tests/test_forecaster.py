"""The whole model, at a size that trains in milliseconds; each prior defect has a sentence here."""

import copy

import pytest
import torch
from tiny_model import batch_of, futures, ready, seeded, untrained, windows
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm4ts_kernels.diffusers_integration import served_by

BRANCHES = ("unet", "conditioner", "temporal", "visual", "fusion", "head")


# Training


def test_every_trainable_parameter_gets_a_gradient():
    model = ready()
    model.loss(batch_of(), seeded())["loss"].backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(BRANCHES) and (parameter.grad is None or not parameter.grad.any())
    ]
    assert dead == []


def test_after_the_first_step_the_zero_head_lets_the_gradient_through():
    model = untrained()
    model.freeze_autoencoder(windows())
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(batch_of(), seeded())["loss"].backward()
        reached.append(model.temporal.embed.weight.grad.abs().max().item())
        optimizer.step()
    assert reached[0] == 0 and reached[1] > 0


def test_the_prediction_reaches_the_unet_through_the_frozen_decoder():
    gradients = []
    for weight in (0.0, 1.0):
        model = ready(prediction_weight=weight)
        model.loss(batch_of(), seeded())["loss"].backward()
        gradients.append(model.unet.conv_in.weight.grad)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-4


def test_cross_attention_is_alive():
    model = ready()
    model.loss(batch_of(), seeded())["loss"].backward()
    projections = {
        name: parameter
        for name, parameter in model.unet.named_parameters()
        if "attn2.to_q" in name or "attn2.to_k" in name
    }
    assert len(projections) >= 4
    assert all(parameter.grad.abs().max() > 1e-10 for parameter in projections.values())


def test_frozen_parts_get_no_gradient_and_are_not_trainable():
    model = ready()
    model.loss(batch_of(), seeded())["loss"].backward()
    assert all(parameter.grad is None for parameter in model.autoencoder_parameters())
    trainable = {id(parameter) for parameter in model.trainable_parameters()}
    frozen = {id(parameter) for parameter in model.autoencoder_parameters()}
    assert not trainable & frozen
    assert trainable | frozen == {id(parameter) for parameter in model.parameters()}


def test_the_loss_is_the_weighted_sum_of_its_parts():
    losses = ready(prediction_weight=0.25).loss(batch_of(), seeded())
    torch.testing.assert_close(
        losses["loss"].detach(), losses["diffusion"] + 0.25 * losses["prediction"]
    )
    assert losses["loss"].requires_grad and not losses["diffusion"].requires_grad


def test_the_loss_does_not_depend_on_the_units_of_the_input():
    model = ready()
    batch = batch_of()
    rescaled = {name: 1000 * tensor - 3 for name, tensor in batch.items()}
    expected = model.loss(batch, seeded())["loss"]
    torch.testing.assert_close(model.loss(rescaled, seeded())["loss"], expected, rtol=1e-2, atol=0)


def test_a_flat_window_that_then_moves_does_not_drown_the_others():
    model = ready()
    batch = batch_of()
    batch["history"][0] = 100.0
    assert model.loss(batch, seeded())["prediction"] < 20**2


def test_training_on_a_sine_more_than_halves_the_prediction_loss():
    model = untrained()
    time = torch.arange(24 + 4) / 3 + torch.arange(8)[:, None]  # (8, 28)
    series = torch.sin(time)[..., None].expand(-1, -1, 3)
    batch = {"history": series[:, :24], "future": series[:, [24, 27], 2:]}
    model.freeze_autoencoder(batch["history"])
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        losses.append(loss["prediction"].item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_stage_one_must_be_over_before_stage_two():
    model = untrained()
    assert model.needs_autoencoder_training
    with pytest.raises(RuntimeError, match="freeze_autoencoder"):
        model.loss(batch_of())
    model.autoencoder_loss(windows()).backward()
    assert any(parameter.grad is not None for parameter in model.autoencoder_parameters())
    model.freeze_autoencoder(windows())
    assert not model.needs_autoencoder_training


@pytest.mark.parametrize("side", [32, 48, 64, 80])
def test_any_image_size_that_is_a_multiple_of_16_trains_and_forecasts(side):
    model = ready(image_size=(side, 32 if side == 80 else side))
    model.loss(batch_of(1))["loss"].backward()
    assert model(windows(1), sampling_steps=1)["mean"].isfinite().all()


@pytest.mark.parametrize(("windows_in_all", "tolerance"), [(2, 0), (5, 1e-5)])
def test_gradient_checkpointing_does_not_change_the_gradients(windows_in_all, tolerance):
    """Bit for bit; of more than two windows, parts are decoded, whose sums are rounded apart."""
    gradients = []
    for checkpointing in (False, True, "full", "selective"):
        model = ready(enable_gradient_checkpointing=checkpointing)
        assert model.unet.is_gradient_checkpointing == bool(checkpointing)
        model.train().loss(batch_of(windows_in_all), seeded())["loss"].backward()
        gradients.append([parameter.grad for parameter in model.trainable_parameters()])
    for checkpointed in gradients[1:]:
        for with_it, without in zip(checkpointed, gradients[0], strict=True):
            torch.testing.assert_close(with_it, without, rtol=tolerance, atol=tolerance)


def test_an_unknown_checkpointing_is_an_error_that_names_the_modes():
    with pytest.raises(ValueError, match=r"must be one of \['none', 'full', 'selective'\], got"):
        untrained(enable_gradient_checkpointing="some")


def test_attention_backends_agree_and_serve_every_layer():
    losses = []
    for backend in ("default", "flash", "auto"):
        model = ready(attention_backend=backend)
        losses.append(model.loss(batch_of(), seeded())["loss"])
        served = {**served_by(model.unet), **served_by(model.autoencoder.kl)}
        assert len(served) > 2 and None not in served.values()
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_bfloat16_autocast_trains_with_losses_in_float32():
    model = ready()
    expected = model.loss(batch_of(), seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.loss(batch_of(), seeded())
        forecast = model(windows())
    losses["loss"].backward()
    assert losses["loss"].dtype == forecast["mean"].dtype == torch.float32
    torch.testing.assert_close(losses["loss"], expected["loss"], rtol=0.05, atol=0.05)
    assert model.unet.conv_in.weight.grad.isfinite().all()


def test_the_loss_never_waits_for_the_device():
    model = ready()
    # A fake tensor has no value to wait for: reading one is an error.
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = {"history": torch.empty(3, 24, 3), "future": torch.empty(3, 2, 1)}
        assert model.loss(batch)["loss"].shape == ()


def test_the_loss_compiles_into_one_graph():
    model = ready(enable_gradient_checkpointing=False)
    torch.compiler.reset()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    losses = compiled(batch_of())
    assert losses["loss"].isfinite()
    losses["loss"].backward()
    assert model.unet.conv_in.weight.grad.any()


# Forecasting


def test_an_untrained_model_forecasts_the_last_value():
    history = windows()
    forecast = untrained()(history)
    expected = history[:, -1:, 2:].expand(-1, 2, -1)
    assert torch.equal(forecast["mean"], expected)
    assert torch.equal(forecast["q50"], expected)


def test_a_constant_window_is_forecast_as_that_constant():
    for value in (0.0, -7.5):
        forecast = ready()(torch.full((1, 24, 3), value), num_samples=4)
        torch.testing.assert_close(
            forecast["mean"], torch.full((1, 2, 1), value), rtol=1e-3, atol=1e-6
        )


def test_one_window_is_forecast_with_or_without_its_batch_dimension():
    model = ready()
    one = model(windows(1)[0], generator=seeded())
    batch = model(windows(1), generator=seeded())
    assert one["mean"].shape == (1, 2, 1)
    assert all(torch.equal(one[name], batch[name]) for name in one)


def test_one_sample_has_no_spread_and_no_nan():
    forecast = ready()(windows(), num_samples=1)
    assert (forecast["std"] == 0).all()
    assert all(torch.equal(forecast[name], forecast["mean"]) for name in ("q05", "q50", "q95"))


def test_statistics_are_those_of_the_draws_and_the_mean_that_of_their_locations():
    model = ready(targets=(2, 0))
    draws = model.sample(windows(), num_samples=7, generator=seeded())
    locations, _ = model.draw(windows(), 7, None, seeded())
    forecast = model(windows(), num_samples=7, generator=seeded())
    assert draws.shape == (7, 3, 2, 2)
    torch.testing.assert_close(forecast["mean"], locations.mean(dim=0))
    assert not torch.allclose(locations, draws)
    torch.testing.assert_close(forecast["std"], draws.std(dim=0, correction=0))
    for name, level in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
        torch.testing.assert_close(forecast[name], draws.quantile(level, dim=0))
    assert (forecast["q05"] < forecast["q50"]).all() and (forecast["q50"] < forecast["q95"]).all()


def test_draws_of_different_windows_do_not_mix():
    model = ready()
    spread_out = windows() * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    draws = model.sample(spread_out, num_samples=5)
    last = spread_out[:, -1, 2]
    assert (draws / last[:, None, None] - 1).abs().max() < 0.3


def test_current_price_shifts_the_forecast_by_its_difference_to_the_last_value():
    model = ready()
    history = windows()
    plain = model(history, generator=seeded())
    price = history[:, -1, 2] + torch.tensor([1.0, -2.0, 0.0])
    shifted = model(history, current_price=price, generator=seeded())
    difference = (shifted["mean"] - plain["mean"])[..., 0]
    expected = torch.tensor([[1.0, 1.0], [-2.0, -2.0], [0.0, 0.0]])
    torch.testing.assert_close(difference, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(shifted["std"], plain["std"])


def test_a_seeded_forecast_repeats_and_holds_no_graph():
    model = ready().train()
    first = model(windows(), num_samples=3, generator=seeded())
    second = model(windows(), num_samples=3, generator=seeded())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not first["mean"].requires_grad
    assert model.training and not model.autoencoder.training


def test_dropout_is_off_while_forecasting_in_training_mode():
    model = ready(dropout=0.5).train()
    first, second = (model(windows(), generator=seeded())["mean"] for _ in range(2))
    assert torch.equal(first, second)


# Errors


@pytest.mark.parametrize(
    "call, message",
    [
        ({"ohlcv": torch.zeros(2, 23, 3)}, r"ohlcv must have shape \(B, 24, 3\) or \(24, 3\)"),
        ({"ohlcv": torch.zeros(0, 24, 3)}, "ohlcv must have shape"),
        ({"ohlcv": torch.full((1, 24, 3), torch.nan)}, r"ohlcv .* 72 .* index \(0, 0, 0\)"),
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"sampling_steps": 21}, r"sampling_steps .* diffusion_steps \(20\), got 21"),
        ({"current_price": torch.zeros(2)}, r"current_price must have shape \(3, 1\) or \(3,\)"),
        ({"current_price": torch.full((3,), torch.inf)}, "current_price must be finite"),
    ],
)
def test_bad_input_is_an_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        untrained()(**{"ohlcv": windows(), **call})


def test_input_that_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="ohlcv must be a tensor, got ndarray"):
        untrained()(windows().numpy())


def test_a_future_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"future must have shape \(3, 2, 1\), got \(3, 2\)"):
        ready().loss({"history": windows(), "future": futures()[..., 0]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error_that_names_the_way_out():
    with pytest.raises(RuntimeError, match='pass device="cpu"'):
        untrained(device="cuda")


def test_unknown_options_are_errors_that_name_them():
    with pytest.raises(TypeError, match="unknown configuration field 'image_sise'"):
        untrained(image_sise=(32, 32))
    with pytest.raises(ValueError, match=r"preset must be one of .*, got 'papers'"):
        untrained(preset="papers")
    with pytest.raises(ValueError, match="got 'xformers'"):
        untrained(attention_backend="xformers")


def test_a_copy_is_independent_and_equal():
    model = ready()
    copied = copy.deepcopy(model)
    expected = model(windows(), generator=seeded())["mean"]
    assert torch.equal(copied(windows(), generator=seeded())["mean"], expected)
    torch.nn.init.zeros_(copied.head.project.weight)
    assert torch.equal(model(windows(), generator=seeded())["mean"], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_model_moved_to_the_gpu_trains_and_forecasts_there():
    model = ready().to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = model.loss(batch_of())
    losses["loss"].backward()
    forecast = model(windows(), num_samples=3)
    assert model.device.type == forecast["mean"].device.type == "cuda"
    assert forecast["mean"].isfinite().all()
    assert model.unet.conv_in.weight.grad.isfinite().all()
