"""One process trains in a run's directory; the lock ends with it."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys

import pytest
from tiny_run import tiny_config

from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.run_lock import LOCK, find_holder, hold
from ldm4ts_kernels.training import train

HOLDER = """
import sys, time
from pathlib import Path
from ldm4ts_kernels.run_lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / "run"."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_the_directory_and_the_first_ones_number(tmp_path, holder):
    assert find_holder(tmp_path / "run") == holder.pid
    named = f"output: process {holder.pid} is training in {tmp_path / 'run'}; wait"
    with pytest.raises(OptionError, match=named):
        train(tiny_config(tmp_path))
    assert os.listdir(tmp_path / "run") == [LOCK]


def test_the_lock_of_a_killed_process_is_none(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert find_holder(tmp_path / "run") is None
    with hold(tmp_path / "run"):
        assert find_holder(tmp_path / "run") == os.getpid()
    train(tiny_config(tmp_path, steps=1, autoencoder_steps=1))


def test_a_directory_in_which_no_run_began_is_removed_again(tmp_path):
    with pytest.raises(OptionError, match="model: "):
        train(tiny_config(tmp_path, model_fields={"image_size": (100, 100)}))
    assert not (tmp_path / "run").exists()
    assert find_holder(tmp_path / "run") is None
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(OptionError, match="is no run"):
        train(tiny_config(tmp_path, "thesis"))
    assert os.listdir(foreign) == ["thesis.tex"]


def test_a_run_that_is_deleted_under_its_process_ends_without_another_error(tmp_path):
    with hold(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")


def test_where_the_disk_knows_no_locks_a_line_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("INFO"), hold(tmp_path / "run"):
        assert "see to it that one process trains here" in caplog.text
