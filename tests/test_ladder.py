"""A full memory costs a lever, and no step."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import batch_of, ready
from tiny_run import tiny_config

from ldm4ts_kernels.graphs import GraphedCall
from ldm4ts_kernels.ladder import LadderedStep, next_rung
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.optimizers import build_optimizer
from ldm4ts_kernels.runs import TrainConfig, read_config
from ldm4ts_kernels.sharding import Replicas
from ldm4ts_kernels.training import train
from ldm4ts_kernels.training_step import StageLoss, TrainingStep


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")


def climb(config: TrainConfig, windows: int = 4) -> list[TrainConfig]:
    """Return what the ladder has above the configuration."""
    found = []
    while (rung := next_rung(config, windows)) is not None:
        config = rung[0]
        found.append(config)
    return found


def test_the_rungs_go_from_free_to_dear():
    rungs = climb(TrainConfig(attention_backend="default", batch_size=4))
    levers = ("attention_backend", "checkpointing", "accumulate", "offload_activations")
    assert [tuple(getattr(rung, name) for name in levers) for rung in rungs] == [
        ("flash", "none", 1, False),
        ("flash", "full", 1, False),
        ("flash", "full", 2, False),
        ("flash", "full", 4, False),
        ("flash", "full", 4, True),
    ]


def test_accumulation_takes_divisors_of_the_windows_alone():
    parts = [rung.accumulate for rung in climb(TrainConfig(checkpointing="full", batch_size=6), 6)]
    assert parts == [2, 3, 6, 6]


def laddered(failing: set[int], config: TrainConfig):
    """Return losses and weights of three steps, of which some attempts run out of memory."""
    model, attempts = ready(), []
    parameters = model.trainable_parameters()
    optimizer = build_optimizer(parameters, 1e-2, 1e-2)

    def build(levers: TrainConfig) -> GraphedCall:
        loss = StageLoss(model, "forecaster").train()
        held = Replicas(parameters)
        step = TrainingStep(loss, model, held, optimizer, levers.accumulate)

        def attempt(batch):
            attempts.append(levers)
            if len(attempts) in failing:
                torch.rand(7)  # a failed attempt has drawn numbers
                sum(p.sum() for p in parameters).backward()  # and has left gradients
                raise full()
            return step(batch)

        return GraphedCall("the step", attempt, torch.device("cpu"), None)

    changes: list[TrainConfig] = []

    def changed(levers: TrainConfig) -> None:
        changes.append(levers)
        model.configure(levers.attention_backend, levers.checkpointing)

    take = LadderedStep(config, build, changed)
    torch.manual_seed(3)
    losses = [take(batch_of(4)) for _ in range(3)]
    return losses, [parameter.detach() for parameter in parameters], changes


def test_a_step_that_ran_out_of_memory_is_taken_again_with_the_same_numbers(caplog):
    config = TrainConfig(batch_size=4)
    plain = laddered(set(), config)
    with caplog.at_level(logging.WARNING, "ldm4ts_kernels"):
        losses, weights, changes = laddered({2}, config)
    assert changes == [replace(config, checkpointing="full")]
    assert losses == plain[0]
    assert all(map(torch.equal, weights, plain[1]))
    assert caplog.records[0].getMessage() == (
        "out of memory; the step is taken again with checkpointing full, which costs the forward "
        "pass again in the backward pass. CUDA out of memory. Tried to allocate 2 GiB."
    )


def test_the_ladder_is_climbed_as_far_as_it_takes():
    losses, _, changes = laddered({1, 2, 3}, TrainConfig(batch_size=4))
    assert [change.accumulate for change in changes] == [1, 2, 4]
    assert len(losses) == 3


def test_above_the_last_rung_the_error_says_what_is_left():
    with pytest.raises(torch.OutOfMemoryError, match=r"Every lever is in use; .*adamw8bit"):
        laddered(set(range(1, 9)), TrainConfig(batch_size=4))


def test_a_step_whose_weights_have_changed_is_not_taken_again():
    config = TrainConfig(batch_size=4, optimizer_in_backward=True, gradient_clip=0)
    with pytest.raises(torch.OutOfMemoryError, match="some weights have changed"):
        laddered({2}, config)


def test_a_run_that_ran_out_of_memory_ends_with_every_step_and_keeps_the_lever(
    tmp_path, monkeypatch
):
    honest, calls = LDM4TSModel.loss, []

    def full_once(self, batch, generator=None):
        calls.append(1)
        if len(calls) == 2:
            raise full()
        return honest(self, batch, generator)

    monkeypatch.setattr(LDM4TSModel, "loss", full_once)
    steps: list[int] = []
    config = tiny_config(tmp_path, autoencoder_steps=1, steps=2, eval_windows=1, eval_samples=1)
    train(config, lambda report: steps.append(report.step))
    assert len(calls) == 3
    assert read_config(Path(config.output)).checkpointing == "full"
