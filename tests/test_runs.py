"""Options are checked, chosen by machine and preset, and kept with the run."""

import json

import pytest
import torch
from tiny_run import tiny_config

from ldm4ts_kernels.checkpoints import find_checkpoints
from ldm4ts_kernels.data import OptionError, Scaler, load_splits
from ldm4ts_kernels.runs import TrainConfig, open_run, plan, read_config, read_scaler

SCALER = Scaler((0.0,), (1.0,))


def begun(config: TrainConfig, scaler: Scaler = SCALER) -> TrainConfig:
    open_run(config, scaler).begin(config, scaler)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected more than 0, got nan"),
        ({"preset": "huge"}, "preset: expected one of paper, guide, got 'huge'"),
        (
            {"batch_size": 6, "accumulate": 4},
            "accumulate: expected a divisor of batch_size (6), got",
        ),
        ({"optimizer_in_backward": True}, "gradient_clip: expected 0 with optimizer_in_backward"),
        (
            {"optimizer_in_backward": True, "gradient_clip": 0, "accumulate": 2},
            "accumulate: expected 1 with optimizer_in_backward",
        ),
        ({"weights": "bf16"}, "weights: expected fp32 with optimizer adamw"),
        (
            {"weights": "bf16", "optimizer": "adamw8bit"},
            "weights: expected fp32 with precision fp32",
        ),
        (
            {"shard_states": True, "optimizer": "adamw8bit"},
            "optimizer: expected adamw with shard_states",
        ),
        (
            {"shard_states": True, "device": "cuda", "compile": True},
            "compile: expected no torch.compile with shard_states",
        ),
        (
            {"shard_states": True, "channels_last": True},
            "channels_last: expected False with shard_states",
        ),
        (
            {"shard_states": True, "offload_activations": True},
            "offload_activations: expected False with shard_states",
        ),
        (
            {"shard_states": True, "device": "cuda", "vram_gb": 6.0},
            "vram_gb: expected None with shard_states",
        ),
        ({"checkpointing": "half"}, "checkpointing: expected one of none, full, selective"),
        ({"attention_backend": "fast"}, "attention_backend: expected one of default, flash"),
    ],
)
def test_an_option_out_of_range_is_named(changes, message):
    with pytest.raises(OptionError) as caught:
        TrainConfig(**changes)
    assert message in str(caught.value)


def test_an_unknown_option_is_named():
    with pytest.raises(OptionError, match="unknown option stepps"):
        plan({"stepps": 3})
    with pytest.raises(OptionError, match=r"unknown option data\.file"):
        plan({"data": {"file": "x"}})


def test_without_a_gpu_the_preset_is_paper_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = plan({"data": {"name": "nasdaq"}})
    assert (config.preset, config.device, config.precision) == ("paper", "cpu", "fp32")
    assert config.output == "runs/nasdaq"
    assert config.checkpointing == "none"
    with pytest.raises(OptionError, match="--device cpu"):
        plan({"device": "cuda"})


def test_with_a_gpu_the_preset_is_guide_in_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config = plan({"steps": 7})
    assert (config.preset, config.device, config.precision) == ("guide", "cuda", "bf16")
    assert (config.steps, config.autoencoder_steps) == (7, 500)
    assert config.checkpointing == "full"
    assert plan({"gradient_checkpointing": False}).checkpointing == "none"


def test_a_stored_configuration_is_read_back_as_it_was(tmp_path):
    config = begun(tiny_config(tmp_path))
    stored = read_config(config.output)
    assert stored.data == config.data
    assert json.dumps(stored.model_fields) == json.dumps(config.model_fields)
    assert read_scaler(config.output) == SCALER


def test_resuming_takes_the_options_of_the_run_and_then_the_given_ones(tmp_path):
    config = begun(tiny_config(tmp_path))
    resumed = plan({"output": config.output, "resume": True, "steps": 9, "data": {}})
    assert resumed.steps == 9
    assert resumed.data == config.data
    assert resumed.batch_size == config.batch_size
    assert open_run(resumed, SCALER).checkpoint is None


def test_resuming_without_a_directory_is_an_error():
    with pytest.raises(OptionError, match="resume: name the run's directory"):
        plan({"resume": True})


def test_resuming_where_nothing_is_yet_starts_a_run(tmp_path):
    config = plan({"output": str(tmp_path / "new"), "resume": True})
    assert open_run(config, SCALER).checkpoint is None


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 5}, {"seed": 1}, {"preset": "guide"}, {"data": {"history": 30}}],
)
def test_a_run_keeps_what_shapes_its_weights(tmp_path, change):
    config = begun(tiny_config(tmp_path))
    resumed = plan({"output": config.output, "resume": True, **change})
    with pytest.raises(OptionError, match=f"^{next(iter(change))}: .* was trained with"):
        open_run(resumed, SCALER)


def test_a_run_of_other_data_by_name_is_an_error(tmp_path):
    config = begun(tiny_config(tmp_path))
    resumed = plan({"output": config.output, "resume": True, "data": {"name": "sp500"}})
    with pytest.raises(OptionError, match=r"^data: .* was trained with"):
        open_run(resumed, SCALER)


def test_a_moved_file_with_the_same_contents_can_be_resumed(tmp_path):
    config = tiny_config(tmp_path)
    scaler = load_splits(config.data).scaler
    begun(config, scaler)
    moved = tmp_path / "moved.csv"
    moved.write_bytes((tmp_path / "series.csv").read_bytes())
    resumed = plan({"output": config.output, "resume": True, "data": {"path": str(moved)}})
    assert open_run(resumed, load_splits(resumed.data).scaler).checkpoint is None


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OptionError, match="exists and is no run"):
        open_run(TrainConfig(output=str(tmp_path)), SCALER)


def test_what_a_killed_process_left_is_cleared_and_its_log_cut_to_the_checkpoint(tmp_path):
    config = begun(tiny_config(tmp_path))
    run = open_run(tiny_config(tmp_path, resume=True), SCALER)
    for step in (1, 2, 3):
        run.log({"stage": "autoencoder", "step": step})
    with (run.directory / "metrics.jsonl").open("a") as log:
        log.write('{"stage": "autoenc')
    (run.checkpoints / "autoencoder-2").mkdir()
    (run.checkpoints / ".unfinished-abc").mkdir()
    resumed = tiny_config(tmp_path, resume=True)
    open_run(resumed, SCALER).begin(resumed, SCALER)
    assert [str(c.position) for c in find_checkpoints(run.checkpoints)] == ["autoencoder-2"]
    assert not (run.checkpoints / ".unfinished-abc").exists()
    log_lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log_lines] == [1, 2]
    assert config.output == resumed.output
