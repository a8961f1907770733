"""The command: exit codes, one-line errors, and a run from training to forecast."""

import dataclasses
import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer
from tiny_run import write_series

from ldm4ts_kernels import __version__, cli, commands, machine_commands
from ldm4ts_kernels.data import DataConfig
from ldm4ts_kernels.run_file import read_run_file
from ldm4ts_kernels.runs import TrainConfig, plan, read_config
from ldm4ts_kernels.vram import Recommendation

TRAIN = shlex.split("""train --data csv --timestamp time --target c --history 24 --horizons 1-3
    --period 6 --device cpu --image-size 32 --steps 2 --autoencoder-steps 2 --batch-size 2
    --eval-windows 2 --eval-samples 2 --sampling-steps 1 --validate-every 2 --checkpoint-every 1""")


@pytest.fixture
def ldm4ts(monkeypatch, capsys):
    """Run the command in this process; return its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldm4ts", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> Path:
    """A directory with series.csv, and a run/ that the command has trained."""
    directory = tmp_path_factory.mktemp("cli")
    path = write_series(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["ldm4ts", *TRAIN, "--data-path", path, "-o", f"{directory}/run"]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    return directory


def test_the_version_is_printed(ldm4ts):
    code, out, _ = ldm4ts("--version")
    assert (code, out.split()[:2]) == (0, ["ldm4ts-kernels", __version__])


def test_help_lists_the_commands(ldm4ts):
    code, out, _ = ldm4ts("--help")
    assert code == 0
    assert all(f" {command} " in out for command in ("train", "forecast", "backends"))


def test_training_writes_the_run_and_its_options(run_directory):
    run = run_directory / "run"
    stored = json.loads((run / "config.json").read_text())
    assert stored["data"]["horizons"] == [1, 2, 3]
    assert stored["model_fields"] == {"image_size": [32, 32]}
    assert (stored["steps"], stored["batch_size"]) == (2, 2)
    assert (run / "model" / "model.safetensors").exists()


def test_every_option_of_a_run_is_a_flag():
    taken = set(inspect.signature(commands.train_command).parameters)
    named = {"model_fields": {"image_size", "model_field"}, "data": set()}
    for options in (TrainConfig, DataConfig):
        for option in dataclasses.fields(options):
            assert named.get(option.name, {option.name}) <= taken


def test_a_file_gives_options_and_flags_win(monkeypatch, ldm4ts, tmp_path):
    planned = []

    def train(config: TrainConfig, _show: object) -> None:
        planned.append(config)
        raise RuntimeError("planned")

    monkeypatch.setattr(commands, "train", train)
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {name: sp500, horizons: 1-3, history: 48}\nmodel_fields: {dropout: 0.3}\n"
        "learning_rate: 1e-4\nsteps: 7\nseed: 5\ncheckpointing: full\ndevice: cpu\n"
    )
    flags = "--steps 9 --seed 0 --history 60 --no-gradient-checkpointing --model-field d_model=64"
    assert ldm4ts("train", "--config", str(file), *flags.split())[0] == 1
    (config,) = planned
    assert (config.steps, config.seed, config.learning_rate) == (9, 0, 1e-4)
    assert (config.data.horizons, config.data.history) == ((1, 2, 3), 60)
    assert config.model_fields == {"dropout": 0.3, "d_model": 64}
    assert config.checkpointing == "none"


def test_a_run_can_be_repeated_from_its_own_configuration(run_directory):
    stored = read_run_file(run_directory / "run" / "config.json")
    assert plan(stored) == read_config(run_directory / "run")


def test_resuming_needs_no_option_but_the_directory_and_prints_the_scores(ldm4ts, run_directory):
    code, out, err = ldm4ts("train", "--output", str(run_directory / "run"), "--resume")
    assert code == 0
    assert "resuming" in err and "forecaster-2" in err
    assert all(name in out for name in ("ldm4ts", "last value", "seasonal naive", "CRPS"))
    assert "2 of 46 test windows" in out


def test_a_forecast_is_a_table_a_picture_and_a_file(ldm4ts, run_directory):
    run = str(run_directory / "run")
    code, out, _ = ldm4ts("forecast", run, "--samples", "3", "--sampling-steps", "1")
    assert code == 0
    assert "q50" in out
    assert (run_directory / "run" / "forecast.png").read_bytes().startswith(b"\x89PNG")
    assert list(pd.read_csv(run_directory / "run" / "forecast.csv")["ahead"]) == [1, 2, 3]


def test_backends_says_what_serves_here_and_why_not_the_others(ldm4ts):
    code, out, _ = ldm4ts("backends", "--tokens", "64")
    lines = out.splitlines()
    assert code == 0
    assert {line.split()[0] for line in lines} == {"exact", "int8"}
    assert sum(line.endswith(" serves") for line in lines) == 2
    assert all(len(line.split()) >= 3 for line in lines)


def test_the_doctor_fits_one_screen_and_ends_with_what_to_do(ldm4ts):
    code, out, _ = ldm4ts("doctor")
    lines = out.splitlines()
    assert code == 0
    assert len(lines) <= 40
    assert any(line.split()[:2] == ["ok", "torch"] for line in lines)
    assert sum(line.startswith("serves") for line in lines) == 2
    assert "To mend or to add:" in lines or lines[-1] == "Nothing to install."


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("doctor", "backends"),
        ("backends --tokens 64", "int8"),
        ("estimate --preset paper --part unet", "total_estimated_gb"),
    ],
)
def test_json_is_all_that_stdout_holds(ldm4ts, command, key):
    code, out, _ = ldm4ts(*command.split(), "--json")
    assert code == 0
    assert key in json.loads(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a GPU")
def test_bench_says_that_nothing_was_measured_without_a_gpu(ldm4ts):
    code, _, err = ldm4ts("bench")
    assert code == 1
    assert "torch finds none: nothing was measured" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("train --data dax", 2, "data: expected one of sp500"),
        ("train --data csv", 2, "data 'csv' needs the path of its CSV file"),
        ("train --preset big", 2, "preset: expected one of paper, guide, got 'big'"),
        ("train --horizons 1;2", 2, "horizons: expected `1,5,20` or `1-96`, got '1;2'"),
        ("train --resume", 2, "resume: name the run's directory"),
        ("train --steps 0", 2, "steps: expected at least 1, got 0"),
        ("train --model-field dropout", 2, "model_field: expected name=value"),
        ("train --config nowhere.yaml", 2, "config: nowhere.yaml is not readable"),
        ("bench 4x8", 2, "shape: expected BxHxQxKxD"),
        ("panel --host 0.0.0.0", 2, "token: --host 0.0.0.0 lets other machines in"),
        ("panel --host 0.0.0.0 --token short", 2, "token: expected at least 8 characters"),
        ("forecast nowhere", 2, "nowhere holds no run"),
        ("forecast nowhere --device tpu", 2, "device: expected one of cpu, cuda, got 'tpu'"),
        ("forecast nowhere --attention x", 2, "attention_backend: expected one of default"),
        ("forecast nowhere --sampling-steps 0", 2, "sampling_steps: expected at least 1"),
        ("forecast", 2, "Missing argument 'run'; `ldm4ts forecast --help` lists"),
        ("train --stepps 3", 2, "No such option: --stepps"),
        ("train --steps x", 2, "Invalid value for '--steps'"),
        ("tarin", 2, "No such command 'tarin'"),
        ("panel --port 99999", 2, "Invalid value for '--port'"),
        ("backends --tokens 0", 2, "Invalid value for '--tokens'"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_a_code(ldm4ts, arguments, code, message):
    ended, _, err = ldm4ts(*arguments.split())
    assert ended == code
    assert err.splitlines()[-1].startswith(f"ldm4ts: {message}")
    assert len([line for line in err.splitlines() if " -> runs/" not in line]) == 1
    assert "Traceback" not in err


def test_the_bare_command_shows_its_help(ldm4ts):
    code, out, err = ldm4ts()
    assert code == 2
    assert "recommend" in out + err


def test_a_bad_file_is_a_failed_run(ldm4ts, tmp_path):
    path = Path(write_series(tmp_path))
    path.write_text(path.read_text().replace("2020-01-01 03:00:00", "later"))
    code, _, err = ldm4ts(*TRAIN, "--data-path", str(path), "-o", str(tmp_path / "run"))
    assert code == 1
    assert err.splitlines()[-1].startswith(f"ldm4ts: {path}, line 5, column 'time'")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ldm4ts", "--debug", "forecast", "nowhere"])
    with pytest.raises(ValueError, match="nowhere holds no run"):
        cli.main()


def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no', name='typer')")
    ended = subprocess.run(
        [sys.executable, "-c", "from ldm4ts_kernels.cli import main; main()", "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        "ldm4ts: typer is not installed; pip install 'ldm4ts-kernels[ldm4ts]'\n"
    )


def test_a_recommendation_is_a_command_that_trains_so():
    lean = {"optimizer": "adamw8bit", "weights": "bf16", "optimizer_in_backward": True}
    found = Recommendation(2, "flash", "bf16", True, 4, 1.9, "", (), **lean)
    words = machine_commands._train_command(found, "guide", 224).split()
    command = typer.main.get_command(commands.app).commands["train"]
    taken = command.make_context("train", words[2:]).params
    assert (taken["batch_size"], taken["image_size"], taken["gradient_clip"]) == (4, 224, 0)
    assert {name: taken[name] for name in lean} == lean


def test_the_panel_names_the_extra_that_it_needs(monkeypatch, ldm4ts):
    for name in [name for name in sys.modules if name.startswith("ldm4ts_kernels.panel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    code, _, err = ldm4ts("panel")
    assert (code, err) == (
        1,
        "ldm4ts: nicegui is not installed; pip install 'ldm4ts-kernels[panel]'\n",
    )


def test_ctrl_c_ends_with_130_and_says_how_to_resume(monkeypatch, ldm4ts, run_directory, tmp_path):
    def stopped(*_: object) -> bool:
        return True

    monkeypatch.setattr("ldm4ts_kernels.progress.TrainingProgress.__call__", stopped)
    path, output = str(run_directory / "series.csv"), str(tmp_path / "run")
    code, _, err = ldm4ts(*TRAIN, "--data-path", path, "-o", output)
    assert code == 130
    assert f"ldm4ts train --output {output} --resume" in err.splitlines()[-1]
