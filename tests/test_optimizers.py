"""AdamW in its forms: the same updates, in less memory where that is asked for."""

import gc
import sys
import weakref

import pytest
import torch
from torch import nn

from ldm4ts_kernels.checkpoints import (
    CheckpointError,
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
    with step_in_backward(optimizer):
        train(fused, optimizer, range(4), own_step=False)
    assert all(map(torch.equal, weights(plain), weights(fused)))
    assert all(parameter.grad is None for parameter in fused.parameters())


def test_steps_in_the_backward_pass_end_and_then_hold_no_parameter():
    model = Model()
    optimizer = build_optimizer(list(model.parameters()), 1e-2, 0.1, one_by_one=True)
    with step_in_backward(optimizer):
        model.loss(0).backward()
    before = weights(model)
    model.loss(0).backward()
    assert all(map(torch.equal, before, weights(model)))
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, optimizer
    gc.collect()
    assert not any(parameter() is not None for parameter in held)


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
    theirs = super(type(optimizers[0]), optimizers[0]).step
    with torch.compiler.set_stance("force_eager"):
        for step in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                model.loss(step).backward()
                torch.manual_seed(step)  # of the rounding
                optimizer.step() if optimizer is optimizers[1] else theirs()
                optimizer.zero_grad()
    assert all(map(torch.equal, *map(weights, models)))
    assert not vars(optimizers[1].state[models[1][0].weight]["exp_avg"].scale)  # for a checkpoint


@pytest.mark.parametrize("shape", [(16, 32, 3, 3), (4, 8, 3, 3), (32, 1, 3, 3), (64, 64, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_weight_in_channels_last_is_that_of_its_memory(shape, dtype):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    weight.data = weight.data.to(memory_format=torch.channels_last)
    plain = not weight.is_contiguous()
    order = (0, 2, 3, 1) if plain else (0, 1, 2, 3)
    same = nn.Parameter(weight.detach().permute(order).clone().contiguous())
    for parameter in (weight, same):
        torch.manual_seed(1)
        optimizer = build_optimizer([parameter], 1e-2, 0.1, "adamw8bit")
        for _ in range(3):
            gradient = torch.randn(shape, dtype=dtype)  # of another layout than the weight
            parameter.grad = gradient.permute(order).contiguous() if parameter is same else gradient
            optimizer.step()
    assert torch.equal(weight.permute(order), same)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_8_bit_states_of_another_layout_are_not_restored(tmp_path):
    pytest.importorskip("torchao")
    checkpoints = []
    for layout in (torch.channels_last, torch.contiguous_format):
        model = nn.Conv2d(16, 32, 3).to(memory_format=layout)
        model.save_pretrained = lambda directory: None
        optimizer = build_optimizer(list(model.parameters()), 1e-2, 0.1, "adamw8bit")
        make_states(optimizer)
        place = tmp_path / str(layout)
        states = optimizer_tensors(optimizer)
        checkpoints.append(save_checkpoint(place, Position(1, 1), model, states, keep=1))
    restore_training_state(checkpoints[1], optimizer)
    with pytest.raises(CheckpointError, match=r"exp_avg.codes of parameter 0 has shape \(32, 3, 3"):
        restore_training_state(checkpoints[0], optimizer)


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
