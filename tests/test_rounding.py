"""The U-Net in 16 bits from end to end is as near the float32 one as autocast's."""

import pytest
import torch
from tiny_model import batch_of, ready, seeded

from ldm4ts_kernels.model import rounding


def gradients(model, batch, monkeypatch=None) -> torch.Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=monkeypatch is not None):
        model.loss(batch)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in model.unet.parameters() if p.grad is not None])


@pytest.fixture
def batch():
    model = ready()
    batch = batch_of()
    return batch | model.encode_frozen(batch["history"]) | model.draw_noise(3, seeded())


def test_gradients_are_as_near_as_under_autocast(batch, monkeypatch):
    model = ready().train()
    model.configure("flash", "none")
    exact = gradients(model, batch)
    rounded = gradients(model, batch, monkeypatch)
    monkeypatch.setattr(
        "ldm4ts_kernels.model.forecaster.call_rounded",
        lambda unet, *inputs: unet(*inputs, return_dict=False)[0],
    )
    cast = gradients(model, batch, monkeypatch)
    assert rounded.dtype == torch.float32
    distance = (rounded - exact).norm() / exact.norm()
    assert distance < 1.5 * (cast - exact).norm() / exact.norm()


@pytest.mark.parametrize(("mode", "calls"), [("none", 1), ("full", 0), ("selective", 0)])
def test_what_is_recomputed_is_left_to_autocast(batch, monkeypatch, mode, calls):
    found = []
    cast = rounding._cast
    monkeypatch.setattr(rounding, "_cast", lambda *a: found.append(a) or cast(*a))
    model = ready().train()
    model.configure("flash", mode)
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(batch)
    assert len(found) == calls
