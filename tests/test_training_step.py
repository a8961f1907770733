"""A step is the same step however it is split, deferred or captured."""

from contextlib import nullcontext

import pytest
import torch
from recorders import Rerun
from tiny_model import batch_of, ready

from ldm4ts_kernels.graphs import GraphedCall
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.optimizers import build_optimizer, set_learning_rate, step_in_backward
from ldm4ts_kernels.sharding import Replicas
from ldm4ts_kernels.training_step import StageLoss, TrainingStep, lay_out_weights

CPU = torch.device("cpu")


def step_of(model: LDM4TSModel, rate: float = 1e-2, **levers: object) -> TrainingStep:
    parameters = model.trainable_parameters()
    in_backward = bool(levers.get("in_backward"))
    optimizer = build_optimizer(parameters, rate, 1e-2, one_by_one=in_backward)
    if in_backward:
        step_in_backward(optimizer)
    loss = StageLoss(model, "forecaster").train()
    return TrainingStep(loss, model, Replicas(parameters), optimizer, **levers)


def trained(count: int = 2, recorder: Rerun | None = None, **levers: object):
    """Return the losses and weights of some steps on batches of four windows."""
    model = ready()
    step = step_of(model, **levers)
    call = GraphedCall("the step", step, CPU, recorder)
    torch.manual_seed(3)
    losses = []
    for index in range(count):
        set_learning_rate(step.optimizer, 1e-2 / (1 + index))
        losses.append({name: value.clone() for name, value in call(batch_of(4)).items()})
    return losses, [parameter.detach() for parameter in model.trainable_parameters()]


def gradients_of(**levers: object) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return the losses of a step of four windows, and the gradients that AdamW got."""
    step = step_of(ready(), **levers)
    seen: list[torch.Tensor] = []

    def look(optimizer, args, kwargs):
        seen.extend(parameter.grad.clone() for parameter in step.held.parameters)

    step.optimizer.register_step_pre_hook(look)
    torch.manual_seed(3)
    return step(batch_of(4)), seen


def losses_of(layout: bool, optimizer: str, weights: str, mode: str, precision: torch.dtype):
    """Return the losses of five steps, the last two of them replays, and the model."""
    model = ready()
    model.configure("flash", mode)
    lay_out_weights(model, weights, channels_last=layout)
    in_backward = optimizer == "adamw8bit"
    parameters = model.trainable_parameters()
    adamw = build_optimizer(parameters, 1e-3, 1e-2, optimizer, one_by_one=in_backward)
    step = TrainingStep(
        StageLoss(model, "forecaster").train(),
        model,
        Replicas(parameters),
        adamw,
        in_backward=in_backward,
    )
    call = GraphedCall("the step", step, CPU, Rerun())
    torch.manual_seed(3)
    bf16 = precision == torch.bfloat16
    with (
        step_in_backward(adamw) if in_backward else nullcontext(),
        torch.autocast("cpu", precision, enabled=bf16, cache_enabled=False),
    ):
        return [call(batch_of(4))["loss"].item() for _ in range(5)], model


@pytest.mark.parametrize(
    ("optimizer", "weights", "mode", "precision", "tolerance"),
    [
        ("adamw", "fp32", "none", torch.float32, 1e-4),
        ("adamw", "fp32", "full", torch.float32, 1e-4),
        ("adamw", "fp32", "selective", torch.bfloat16, 2e-2),
        ("adamw", "fp32", "none", torch.bfloat16, 2e-2),
        ("adamw8bit", "fp32", "none", torch.float32, 1e-3),
        ("adamw8bit", "bf16", "full", torch.bfloat16, 2e-2),
    ],
)
def test_channels_last_changes_the_memory_and_not_the_losses(
    optimizer, weights, mode, precision, tolerance
):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
    options = optimizer, weights, mode, precision
    (losses, model), (plain_losses, plain) = losses_of(True, *options), losses_of(False, *options)
    assert losses == pytest.approx(plain_losses, rel=tolerance)
    assert len(set(losses)) == 5
    weight = model.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert plain.unet.conv_in.weight.is_contiguous()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_have_the_gradient_of_the_whole_batch(parts):
    losses, gradients = gradients_of(accumulate=parts)
    whole_losses, whole_gradients = gradients_of()
    assert losses.keys() == whole_losses.keys()
    for name, expected in whole_losses.items():
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levers", [{"offload": True}, {"in_backward": True}])
def test_a_lever_of_memory_alone_changes_no_bit(levers):
    (losses, weights), (plain_losses, plain_weights) = trained(**levers), trained()
    assert losses == plain_losses
    assert all(map(torch.equal, weights, plain_weights))


def test_a_captured_step_trains_as_an_eager_one_does():
    recorder = Rerun()
    (losses, weights), (eager_losses, eager_weights) = trained(6, recorder), trained(6)
    assert recorder.recorded == 1
    assert losses == eager_losses
    assert all(map(torch.equal, weights, eager_weights))


def test_clipping_bounds_the_norm_of_all_gradients_together():
    norms = [torch.nn.utils.get_total_norm(gradients_of(clip=c)[1]).item() for c in (0.0, 1e-3)]
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_no_gradient_outlives_the_step():
    model = ready()
    step_of(model)(batch_of(4))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parts_that_do_not_divide_the_batch_are_an_error():
    with pytest.raises(ValueError, match="accumulate must divide the 3 windows of a batch, got 2"):
        step_of(ready(), accumulate=2)(batch_of(3))
