"""Killed at any moment, or out of disk, a run goes on from its last whole checkpoint."""

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from doomed_run import train_until
from safetensors.torch import load_file
from tiny_run import tiny_config

from ldm4ts_kernels.checkpoints import CheckpointError, find_checkpoints
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.training import TrainingInterrupted, train

CUES = (
    [("write", count) for count in (1, 3, 4, 6, 8, 11, 13)]
    + [("rename", count) for count in (1, 2, 3, 4, 5)]
    + [("step", count) for count in (1, 2, 3)]
)
RANDOM_KILLS = 5


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported, and nothing else of this one's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["doomed_run"])
    with pytest.MonkeyPatch.context() as patch:  # Python before 3.12 preloads from there alone
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        forkserver.ensure_running()
    return context


def run_to_death(processes, config, cue: str, count: int, seconds: float | None = None) -> bool:
    """Return whether the run was killed, rather than over."""
    process = processes.Process(target=train_until, args=(config, cue, count))
    process.start()
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_run_that_is_killed_twenty_times_ends_bit_for_bit_where_an_unbroken_one_does(
    tmp_path, processes
):
    options = {"steps": 20, "checkpoint_every": 1, "validate_every": 20, "eval_windows": 1}
    unbroken = tiny_config(tmp_path, "unbroken", **options)
    train(unbroken)
    config = tiny_config(tmp_path, data=unbroken.data, resume=True, **options)
    killed = 0
    for cue, count in CUES:
        killed += run_to_death(processes, config, cue, count)
        for checkpoint in find_checkpoints(Path(config.output) / "checkpoints"):
            LDM4TSModel.from_pretrained(checkpoint.model_path, device="cpu")
    delays = random.Random(0)
    for _ in range(RANDOM_KILLS):
        killed += run_to_death(processes, config, "", 0, seconds=delays.uniform(0, 0.3))
    assert killed == len(CUES) + RANDOM_KILLS == 20
    train(config)
    expected, got = (
        load_file(Path(run.output) / "model" / "model.safetensors") for run in (unbroken, config)
    )
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    left = [path.name for path in Path(config.output).rglob(".unfinished-*")]
    assert left == []


def test_a_full_disk_leaves_the_checkpoint_before_it_to_go_on_from(tmp_path):
    config = tiny_config(tmp_path, checkpoint_every=1, eval_windows=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(report):
        if (report.stage, report.step) == ("forecaster", 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    try:
        with pytest.raises(CheckpointError, match=r"forecaster-2: not written: .*r-1 is whole"):
            train(config, fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    seen: list[int] = []
    train(replace(config, resume=True), lambda report: seen.append(report.step))
    assert seen[:3] == [2, 3, 4]


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "state.json"])
def test_a_file_of_a_checkpoint_that_was_cut_is_named(tmp_path, name):
    config = tiny_config(tmp_path)
    with pytest.raises(TrainingInterrupted):
        train(config, lambda report: report.stage == "autoencoder")
    (newest,) = find_checkpoints(Path(config.output) / "checkpoints")
    path = newest.path / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=str(path)):
        train(replace(config, resume=True))
