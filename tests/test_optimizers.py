"""AdamW in its forms: the same updates, in less memory where that is asked for."""

import sys

import pytest
import torch
from torch import nn

from ldm4ts_kernels.checkpoints import (
    Position,
    optimizer_tensors,
    restore_training_state,
    save_checkpoint,
)
from ldm4ts_kernels.optimizers import (
    build_optimizer,
    make_states,
    set_learning_rate,
    step_in_backward,
)


class Model(nn.Sequential):
    """Two layers; only the first is large enough for 8-bit states."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
        self.to(dtype)

    def loss(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(16, 64, generator=generator).to(self[0].weight.dtype)
        return (self(inputs) - inputs[:, :8]).square().mean()

    def save_pretrained(self, directory):
        torch.save(self.state_dict(), directory / "weights")


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range, own_step: bool = True):
    for step in steps:
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        loss = model.loss(step)
        loss.backward()
        if own_step:
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_steps_in_the_backward_pass_are_the_same_and_leave_no_gradients():
    plain, fused = Model(), Model()
    train(plain, build_optimizer(list(plain.parameters()), 1.0, 0.1), range(4))
    optimizer = build_optimizer(list(fused.parameters()), 1.0, 0.1, one_by_one=True)
    step_in_backward(optimizer)
    train(fused, optimizer, range(4), own_step=False)
    assert all(map(torch.equal, weights(plain), weights(fused)))
    assert all(parameter.grad is None for parameter in fused.parameters())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_made_states_change_no_weight(name):
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    model = Model()
    before = weights(model)
    optimizer = build_optimizer(list(model.parameters()), 1.0, 0.1, name)
    make_states(optimizer)
    assert all(map(torch.equal, before, weights(model)))
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_restored_optimizer_goes_on_as_if_nothing_had_been(tmp_path, name, one_by_one):
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    model = Model()
    optimizer = build_optimizer(list(model.parameters()), 1.0, 0.1, name, one_by_one)
    train(model, optimizer, range(3))
    states = optimizer_tensors(optimizer)
    checkpoint = save_checkpoint(tmp_path, Position.at("forecaster", 3), model, states, keep=1)
    again = Model()
    again.load_state_dict(model.state_dict())
    train(model, optimizer, range(3, 6))
    fresh = build_optimizer(list(again.parameters()), 1.0, 0.1, name, one_by_one)
    restore_training_state(checkpoint, fresh)
    train(again, fresh, range(3, 6))
    assert all(map(torch.equal, weights(model), weights(again)))


def test_8_bit_states_take_a_quarter_and_train_as_well():
    pytest.importorskip("torchao")
    exact, quantised = Model(), Model()
    optimizer = build_optimizer(list(quantised.parameters()), 1.0, 0.1, "adamw8bit")
    losses = [
        train(exact, build_optimizer(list(exact.parameters()), 1.0, 0.1), range(30)),
        train(quantised, optimizer, range(30)),
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    state = optimizer.state[quantised[0].weight]["exp_avg"]
    assert state.codes.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_by_blocks_is_torchaos(dtype):
    pytest.importorskip("torchao")
    models = Model(dtype), Model(dtype)
    optimizers = [
        build_optimizer(list(model.parameters()), 1e-2, 0.1, "adamw8bit") for model in models
    ]
    with torch.compiler.set_stance("force_eager"):
        for step in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                model.loss(step).backward()
                torch.manual_seed(step)  # of the rounding
                optimizer.step_by_blocks() if optimizer is optimizers[1] else optimizer.step()
                optimizer.zero_grad()
    assert all(map(torch.equal, *map(weights, models)))
    assert not vars(optimizers[1].state[models[1][0].weight]["exp_avg"].scale)  # for a checkpoint


def test_bfloat16_weights_follow_small_updates_by_stochastic_rounding():
    pytest.importorskip("torchao")
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = build_optimizer([model.weight], 1e-4, 0.0, "adamw8bit")
    for _ in range(50):  # updates of 1e-4, where bfloat16's next value below 1 is 4e-3 away
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert model.weight.detach().float().mean().item() == pytest.approx(1 - 50e-4, abs=5e-4)


def test_without_torchao_8_bit_states_say_what_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "ldm4ts_kernels.eight_bit", raising=False)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match=r"adamw8bit needs torchao .pip install"):
        build_optimizer(list(Model().parameters()), 1.0, 0.1, "adamw8bit")
