"""A compiled pass is the plain one, and keeps no more for its backward than its budget."""

import pytest
import torch
from tiny_model import batch_of, ready, seeded
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from ldm4ts_kernels.model.compiled import TrainingPasses, activation_budget, compile_pass
from ldm4ts_kernels.runs import OptionError, TrainConfig


def kept_elements(function, given: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(given).sum().backward()
    return sum(kept.values())


def test_a_smaller_budget_keeps_less_and_has_the_same_gradient():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh())]
    network = nn.Sequential(*layers)
    given = torch.randn(256, 32, requires_grad=True)
    network(given).sum().backward()
    expected = given.grad.clone()
    sizes = []
    for budget in (1.0, 0.4, 0.0):
        given.grad = None
        torch._dynamo.reset()
        sizes.append(kept_elements(compile_pass(network, budget, aot_eager), given))
        torch.testing.assert_close(given.grad, expected)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("mode", "budget"), [("budget:0.5", 0.5), ("budget:0", 0.0), ("full", None), (True, None)]
)
def test_a_mode_says_its_budget(mode, budget):
    assert activation_budget(mode) == budget


@pytest.mark.parametrize("mode", ["budget:", "budget:2", "budget:half"])
def test_a_budget_is_a_share(mode):
    with pytest.raises(ValueError, match="from 0 to 1"):
        activation_budget(mode)
    with pytest.raises(OptionError, match="checkpointing: expected one of"):
        TrainConfig(device="cuda", checkpointing=mode)


@pytest.mark.parametrize("options", [{"compile": True}, {"checkpointing": "budget:0.5"}])
def test_compiling_needs_a_gpu_and_no_offloading(options):
    with pytest.raises(OptionError, match="without a GPU"):
        TrainConfig(**options)
    with pytest.raises(OptionError, match="offload_activations"):
        TrainConfig(device="cuda", offload_activations=True, **options)
    assert TrainConfig(device="cuda", **options).compiles


def test_a_model_compiles_its_losses_passes_alone(monkeypatch):
    monkeypatch.setattr("ldm4ts_kernels.model.compiled.compile_pass", fake_compile)
    model, batch = ready(), batch_of()
    batch |= model.encode_frozen(batch["history"]) | model.draw_noise(3, seeded())
    plain = model.eval().loss(batch)["loss"]
    model.configure("flash", "budget:0.5")
    assert isinstance(model.passes, TrainingPasses)
    assert model.loss(batch)["loss"].item() == plain.item()
    assert len(model.passes.compiled) == 2  # the U-Net, and the decoder with its head
    assert not any("compiled" in name for name, _ in model.named_modules())
    model.configure("flash", "none")
    assert model.passes.budget is None


def fake_compile(part, budget):
    assert budget == 0.5
    return lambda *args, **options: part(*args, **options)
