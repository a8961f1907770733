"""Runs that end, break, resume bit for bit, and never hide a failure."""

import gc
import json
import math
import os
import signal
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config

from ldm4ts_kernels import training
from ldm4ts_kernels.batches import SeededBatches
from ldm4ts_kernels.checkpoints import CheckpointError, find_checkpoints
from ldm4ts_kernels.data import OptionError, load_splits
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.training import (
    StepReport,
    TrainingError,
    TrainingInterrupted,
    learning_rate_at,
    train,
)


def weights(directory: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model" / "model.safetensors")


def records(directory: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").open()]


def stop_at(stage: str, step: int):
    return lambda report: (report.stage, report.step) == (stage, step)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run without a break, and the reports that it gave."""
    reports: list[StepReport] = []
    config = tiny_config(tmp_path_factory.mktemp("whole"))
    result = train(config, reports.append)
    return config, result, reports


def test_a_run_leaves_a_model_a_log_and_test_scores(whole_run):
    config, result, _ = whole_run
    assert result.directory == Path(config.output)
    model = LDM4TSModel.from_pretrained(result.directory / "model", device="cpu")
    assert not model.needs_autoencoder_training
    stored = json.loads((result.directory / "test_metrics.json").read_text())
    assert stored["scores"] == result.test.scores
    assert set(result.test.scores) == {"ldm4ts", "last value", "seasonal naive"}
    assert all(math.isfinite(v) for s in result.test.scores.values() for v in s.values())
    logged = [(record["stage"], record["step"]) for record in records(config.output)]
    assert logged == [("autoencoder", s) for s in (1, 2, 3)] + [
        ("forecaster", s) for s in (1, 2, 3, 4)
    ]
    kept = [
        str(checkpoint.position)
        for checkpoint in find_checkpoints(result.directory / "checkpoints")
    ]
    assert kept == ["forecaster-2", "forecaster-4"]


def test_reports_name_losses_speed_and_the_backend_that_serves(whole_run):
    _, _, reports = whole_run
    forecaster = [report for report in reports if report.stage == "forecaster"]
    assert set(forecaster[0].losses) == {"loss", "diffusion", "prediction"}
    assert "sdpa ×" in str(forecaster[0].attention)
    assert forecaster[0].peak_gib is None and forecaster[0].steps_per_second > 0
    assert forecaster[-1].validation is not None and forecaster[0].validation is None
    assert reports[-1].stage == "test"


@pytest.mark.parametrize(
    ("stage", "step"), [("autoencoder", 1), ("autoencoder", 3), ("forecaster", 3)]
)
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(
    whole_run, tmp_path, stage, step
):
    unbroken = whole_run[0]
    config = tiny_config(tmp_path, data=unbroken.data)
    with pytest.raises(TrainingInterrupted, match=f"--resume` goes on at {stage}-{step}"):
        train(config, stop_at(stage, step))
    torch.rand(5)  # what the process draws in between must not matter
    train(tiny_config(tmp_path, data=unbroken.data, resume=True))
    expected, got = weights(unbroken.output), weights(config.output)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    losses = [[record["losses"] for record in records(c.output)] for c in (unbroken, config)]
    assert losses[0] == losses[1]


def test_a_checkpoint_holds_the_optimizer_of_the_unbroken_run(whole_run, tmp_path):
    unbroken = whole_run[0]
    config = tiny_config(tmp_path, data=unbroken.data)
    with pytest.raises(TrainingInterrupted):
        train(config, stop_at("forecaster", 2))
    train(tiny_config(tmp_path, data=unbroken.data, resume=True))
    last = "checkpoints/forecaster-4"
    for name in ("optimizer.safetensors", "random.safetensors"):
        expected = load_file(Path(unbroken.output) / last / name)
        got = load_file(Path(config.output) / last / name)
        assert all(torch.equal(expected[key], got[key]) for key in expected), name
    states = [Path(c.output, last, "state.json").read_text() for c in (unbroken, config)]
    assert states[0] == states[1]


def test_a_finished_run_can_be_resumed_with_more_steps(tmp_path):
    train(tiny_config(tmp_path))
    seen: list[tuple[str, int]] = []
    longer = tiny_config(tmp_path, resume=True, steps=6)
    train(longer, lambda report: seen.append((report.stage, report.step)))
    assert [step for stage, step in seen if stage == "forecaster"] == [5, 6]
    assert len(records(longer.output)) == 3 + 6


def test_a_used_output_directory_needs_resume(whole_run):
    with pytest.raises(OptionError, match=r"holds a run; resume it \(--resume\)"):
        train(whole_run[0])


@pytest.mark.parametrize("step", [2, 3])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_a_good_checkpoint(
    tmp_path, monkeypatch, step
):
    honest, calls = LDM4TSModel.loss, []

    def poisoned(self, batch, generator=None):
        calls.append(1)
        losses = honest(self, batch, generator)
        return {**losses, "loss": losses["loss"] * (math.nan if len(calls) == step else 1)}

    monkeypatch.setattr(LDM4TSModel, "loss", poisoned)
    config = tiny_config(tmp_path, log_every=10, checkpoint_every=1 if step == 2 else 2)
    with pytest.raises(TrainingError, match=f"not finite at step {step} of the forecaster"):
        train(config)
    monkeypatch.undo()
    last = find_checkpoints(Path(config.output) / "checkpoints")[-1]
    assert last.position.step == step - 1
    model = LDM4TSModel.from_pretrained(last.model_path, device="cpu")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_error_in_a_step_is_not_swallowed(tmp_path, monkeypatch):
    def broken(self, batch, generator=None):
        raise ZeroDivisionError("in the loss")

    monkeypatch.setattr(LDM4TSModel, "loss", broken)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        train(tiny_config(tmp_path))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, kind):
    config = tiny_config(tmp_path, checkpoint_every=100)

    def interrupt(report):
        if (report.stage, report.step) == ("forecaster", 2):
            os.kill(os.getpid(), kind)

    before = signal.getsignal(kind)
    with pytest.raises(TrainingInterrupted, match="--resume"):
        train(config, interrupt)
    assert signal.getsignal(kind) is before
    assert str(find_checkpoints(Path(config.output) / "checkpoints")[-1].position) in (
        "forecaster-2",
        "forecaster-3",
    )


def test_a_run_in_bf16_keeps_float32_weights(tmp_path):
    config = tiny_config(tmp_path, precision="bf16", autoencoder_steps=1, steps=1)
    assert math.isfinite(train(config).test.scores["ldm4ts"]["crps"])
    stored = weights(config.output)
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {
        torch.float32
    }
    train(tiny_config(tmp_path, "other", steps=1))  # this process is not bound to bf16


def test_the_leanest_run_trains_bfloat16_weights_and_resumes(tmp_path):
    pytest.importorskip("torchao")
    levers = {
        "precision": "bf16",
        "weights": "bf16",
        "optimizer": "adamw8bit",
        "optimizer_in_backward": True,
        "gradient_clip": 0,
        "checkpointing": "selective",
    }
    with pytest.raises(TrainingInterrupted):
        train(tiny_config(tmp_path, **levers), stop_at("forecaster", 2))
    result = train(tiny_config(tmp_path, resume=True, **levers))
    assert math.isfinite(result.test.scores["ldm4ts"]["crps"])
    stored = weights(result.directory)
    assert stored["unet.conv_in.weight"].dtype == torch.bfloat16
    assert stored["autoencoder.kl.encoder.conv_in.weight"].dtype == torch.float32


def test_a_run_that_is_over_holds_no_weights(tmp_path, monkeypatch):
    held: list[weakref.ref] = []
    honest = training._build_model

    def watched(*arguments):
        model = honest(*arguments)
        held.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    monkeypatch.setattr(training, "_build_model", watched)
    train(tiny_config(tmp_path, optimizer_in_backward=True, gradient_clip=0))
    gc.collect()
    assert held and not any(parameter() is not None for parameter in held)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_in_channels_last_resumes_with_that_alone(tmp_path, optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
    options = {"channels_last": True, "optimizer": optimizer, "steps": 12, "checkpoint_every": 5}
    options |= {"ema_decay": 0.9}
    unbroken = tiny_config(tmp_path, "unbroken", **options)
    train(unbroken)
    broken = tiny_config(tmp_path, data=unbroken.data, **options)
    with pytest.raises(TrainingInterrupted):
        train(broken, stop_at("forecaster", 11))
    with pytest.raises(OptionError, match=r"channels_last: .* was trained with True, not False"):
        train(replace(broken, resume=True, channels_last=False))
    train(replace(broken, resume=True))
    expected, got = weights(unbroken.output), weights(broken.output)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    model = LDM4TSModel.from_pretrained(Path(broken.output, "model"), device="cpu")
    assert model.unet.conv_in.weight.is_contiguous()


@pytest.mark.parametrize(
    "levers", [{"accumulate": 2}, {"checkpointing": "full"}, {"offload_activations": True}]
)
def test_levers_of_memory_leave_a_run_as_it_is(tmp_path, whole_run, levers):
    unbroken = whole_run[0]
    fields = {**unbroken.model_fields}
    config = tiny_config(tmp_path, data=unbroken.data, model_fields=fields, **levers)
    train(config)
    first = [record["losses"]["loss"] for record in records(config.output)]
    expected = [record["losses"]["loss"] for record in records(unbroken.output)]
    exact = "accumulate" not in levers  # dropout, and the autoencoder's noise, are drawn in parts
    assert first == expected if exact else len(first) == len(expected)


@pytest.mark.parametrize(("steps", "cached"), [(40, True), (2, False)])
def test_windows_are_encoded_once_where_a_run_sees_them_all(tmp_path, monkeypatch, steps, cached):
    passes: list[int] = []
    honest = LDM4TSModel.loss

    def seen(self, batch, generator=None):
        passes.append("latents" in batch)
        return honest(self, batch, generator)

    monkeypatch.setattr(LDM4TSModel, "loss", seen)
    short = {"validate_every": 50, "checkpoint_every": 50, "eval_windows": 1, "eval_samples": 1}
    train(tiny_config(tmp_path, autoencoder_steps=1, steps=steps, **short))
    assert passes == [cached] * steps


def test_the_averaged_weights_are_scored_and_kept_and_resumed(tmp_path):
    options = {"steps": 40, "checkpoint_every": 20, "validate_every": 40, "ema_decay": 0.9}
    unbroken = tiny_config(tmp_path, "unbroken", **options)
    train(unbroken)
    broken = tiny_config(tmp_path, data=unbroken.data, **options)
    with pytest.raises(TrainingInterrupted):
        train(broken, stop_at("forecaster", 23))
    train(replace(broken, resume=True))
    expected, got = weights(unbroken.output), weights(broken.output)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    last = Path(unbroken.output, "checkpoints", "forecaster-40")
    raw = weights(last)["unet.conv_in.weight"]
    assert not torch.equal(raw, expected["unet.conv_in.weight"])
    assert (last / "average.safetensors").exists()


@pytest.mark.gpu
def test_a_run_on_a_gpu_reports_its_peak_and_resumes(tmp_path):
    options = {"device": "cuda", "precision": "bf16", "checkpointing": "full"}
    reports: list[StepReport] = []

    def stop_in_between(report):
        reports.append(report)
        return (report.stage, report.step) == ("forecaster", 2)

    with pytest.raises(TrainingInterrupted):
        train(tiny_config(tmp_path, log_every=2, **options), stop_in_between)
    assert reports[-1].peak_gib > 0
    result = train(tiny_config(tmp_path, log_every=2, resume=True, **options))
    assert math.isfinite(result.test.scores["ldm4ts"]["crps"])
    assert records(result.directory)[-1]["step"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize(("lean", "layout"), [(False, False), (True, False), (True, True)])
def test_a_graphed_run_on_a_gpu_has_the_losses_of_an_eager_one(tmp_path, caplog, lean, layout):
    levers = {"device": "cuda", "checkpointing": "full", "autoencoder_steps": 8, "steps": 12}
    levers |= {"channels_last": layout}
    if lean:
        pytest.importorskip("torchao")
        levers |= {"optimizer": "adamw8bit", "optimizer_in_backward": True, "gradient_clip": 0}
    losses = []
    for graphs in (False, True):
        config = tiny_config(tmp_path, f"graphs-{graphs}", cuda_graphs=graphs, **levers)
        train(config)
        losses.append([record["losses"]["loss"] for record in records(config.output)])
    assert "without a CUDA graph" not in caplog.text
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_training_runs_in_a_thread(tmp_path):
    """As a panel does it: signals are then the main thread's, and on_step stops the run."""
    caught: list[str] = []

    def run():
        try:
            train(tiny_config(tmp_path), stop_at("autoencoder", 2))
        except TrainingInterrupted as stopped:
            caught.append(str(stopped))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "autoencoder-2" in caught[0]


def test_a_truncated_checkpoint_is_named(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(TrainingInterrupted):
        train(config, stop_at("forecaster", 2))
    path = Path(config.output, "checkpoints", "forecaster-2", "optimizer.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: not readable"):
        train(tiny_config(tmp_path, resume=True))


def test_other_data_cannot_resume_a_run(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(TrainingInterrupted):
        train(config, stop_at("autoencoder", 1))
    path = Path(str(config.data.path))
    path.write_text(path.read_text().replace("100.", "101."))
    with pytest.raises(OptionError, match="data: the table differs"):
        train(replace(config, resume=True))


def test_a_bad_model_option_leaves_no_run_behind(tmp_path):
    config = tiny_config(tmp_path, model_fields={"image_size": [30, 30]})
    with pytest.raises(OptionError, match="model: image_size must be"):
        train(config)
    assert not Path(config.output).exists()


def test_batches_depend_on_the_seed_and_the_step_alone():
    whole = list(SeededBatches(10, 4, seed=3, first=0, last=7))
    assert list(SeededBatches(10, 4, seed=3, first=5, last=7)) == whole[5:]
    assert list(SeededBatches(10, 4, seed=4, first=0, last=7)) != whole
    epoch = whole[0] + whole[1]
    assert len(set(epoch)) == 8 and set(epoch) <= set(range(10))


def test_a_batch_is_never_larger_than_the_part():
    assert [sorted(batch) for batch in SeededBatches(3, 8, seed=0, first=0, last=2)] == [
        [0, 1, 2]
    ] * 2


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [learning_rate_at(step, 100, 1.0, warmup_steps=5) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate_at(1, 1, 1.0, warmup_steps=5) == pytest.approx(0.1)


def test_splits_of_the_run_are_those_of_its_data(whole_run):
    config, result, _ = whole_run
    assert result.test.windows_in_all == len(load_splits(config.data).test)
