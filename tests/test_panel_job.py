"""The panel's training run: a child process that starts, pauses, stops, resumes and fails."""

import json
import time

import pytest
from tiny_run import tiny_config

pytest.importorskip("nicegui")

from dataclasses import asdict

from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.panel.run_state import RunState, find_runs, read_run
from ldm4ts_kernels.panel.run_view import describe_facts, describe_position, describe_seconds
from ldm4ts_kernels.panel.training_job import TrainingJob
from ldm4ts_kernels.run_lock import hold


def wait(job: TrainingJob, *states: str, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while job.state not in states and time.monotonic() < end:
        time.sleep(0.05)
    return job.state


def wait_for_step(job: TrainingJob, step: int) -> RunState:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        run = read_run(job.directory)
        if run is not None and run.last is not None and run.last["step"] >= step:
            return run
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {job.error}")


@pytest.fixture
def job(tmp_path):
    job = TrainingJob(tmp_path)
    yield job
    job.close()


def test_a_run_is_paused_continued_stopped_and_resumed_to_its_end(job, tmp_path):
    options = asdict(tiny_config(tmp_path, "run", steps=60, autoencoder_steps=2))
    assert job.state == "idle"
    job.start("run", json.loads(json.dumps(options)))
    wait_for_step(job, 1)
    job.pause()
    assert job.state == "paused"
    time.sleep(0.3)
    before = read_run(job.directory).records
    time.sleep(0.5)
    assert read_run(job.directory).records == before
    job.resume("run")
    assert job.state == "running"
    wait_for_step(job, 3)
    job.stop()
    assert wait(job, "stopped", "finished") == "stopped"
    stopped = read_run(job.directory)
    assert stopped.scores is None and stopped.last["step"] < 60
    job.resume("run")
    assert wait(job, "finished", "failed") == "finished"
    finished = read_run(job.directory)
    assert finished.progress == 1.0
    assert [step for step, _ in finished.curve("forecaster")] == list(range(1, 61))
    assert set(finished.scores["scores"]) == {"ldm4ts", "last value", "seasonal naive"}


def test_a_run_that_fails_says_why(job):
    job.start("bad", {"data": {"name": "csv", "path": "nowhere.csv"}})
    assert wait(job, "failed") == "failed"
    assert job.error.startswith("path: expected a CSV file, got 'nowhere.csv'")


def test_a_run_that_is_killed_says_by_what(job, tmp_path):
    options = asdict(tiny_config(tmp_path, "run", steps=500))
    job.start("run", json.loads(json.dumps(options)))
    wait_for_step(job, 1)
    job.process.kill()
    assert wait(job, "failed") == "failed"
    assert "was killed by SIGKILL" in job.error


@pytest.mark.parametrize("name", ["", "..", ".panel", "a/b"])
def test_a_name_is_no_path(job, name):
    with pytest.raises(OptionError, match="expected a plain name"):
        job.start(name, {})


def test_a_name_that_is_taken_is_refused(job, tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(OptionError, match="resume it or choose another name"):
        job.start("old", {})


def test_what_is_no_run_is_not_offered(tmp_path):
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == []
    assert read_run(tmp_path / "empty") is None


def test_a_half_written_record_is_left_for_the_next_look(tmp_path):
    config = tiny_config(tmp_path)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(asdict(config)))
    record = {"stage": "forecaster", "step": 2, "steps": 4, "losses": {"loss": 0.5}}
    record |= {"steps_per_second": 4.0, "peak_gib": 1.25, "attention": "sdpa ×3"}
    (directory / "metrics.jsonl").write_text(json.dumps(record) + '\n{"stage": "fore')
    run = read_run(directory)
    assert run.records == [record]
    assert run.progress == pytest.approx((3 + 2) / (3 + 4))
    assert describe_position(run, "running") == "Forecaster, step 2 of 4; 0 s left in this stage"
    assert run.state == "stopped"
    with hold(directory):
        assert run.state == "elsewhere"
        assert describe_position(run, run.state).startswith(
            "Forecaster, step 2 of 4, by another process"
        )
    assert run.state == "stopped"
    facts = describe_facts(run, 2.0)
    assert facts["VRAM measured"] == "1.25 GiB allocated"
    assert facts["VRAM estimated"] == "2.00 GiB with context and reserve"
    assert facts["attention"] == "sdpa ×3"


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8 s"), (75, "1 min 15 s"), (3720, "1 h 02 min")]
)
def test_a_time_is_written_as_people_say_it(seconds, text):
    assert describe_seconds(seconds) == text
