"""The panel's one training run: a child process of `ldm4ts train`, which the page only watches."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from ldm4ts_kernels.data import OptionError

INTERRUPTED = 130  # the command's exit code after it was asked to stop and has checkpointed


class TrainingJob:
    """Starts, pauses, stops and resumes a run; `state` and `error` say how it stands.

    Options and output of the command lie under root/.panel, by the run's name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.paused = self.stopping = False

    @property
    def directory(self) -> Path:
        return self.root / self.name

    @property
    def state(self) -> str:
        """Return "idle", "running", "paused", "stopping", "stopped", "finished" or "failed"."""
        if self.process is None:
            return "idle"
        code = self.process.poll()
        if code is None:
            return "stopping" if self.stopping else "paused" if self.paused else "running"
        return {0: "finished", INTERRUPTED: "stopped"}.get(code, "failed")

    @property
    def is_alive(self) -> bool:
        return self.state in ("running", "paused", "stopping")

    @property
    def error(self) -> str:
        """Return what a failed command said last, or what killed it; else an empty text."""
        if self.process is None or self.state != "failed":
            return ""
        said = self.log.read_text(errors="replace").strip().splitlines()
        errors = [line.removeprefix("ldm4ts: ") for line in said if line.startswith("ldm4ts: ")]
        if errors:
            return errors[-1]
        code = self.process.returncode
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return "\n".join([f"the training process {ended}", *said[-20:]])

    @property
    def log(self) -> Path:
        return self.root / ".panel" / f"{self.name}.log"

    def start(self, name: str, options: dict[str, Any]) -> None:
        """Train a new run. Raises OptionError for a name that is taken or no name."""
        if not name or Path(name).name != name or name.startswith("."):
            raise OptionError(f"name: expected a plain name for the run, got {name!r}")
        if (self.root / name).exists():
            raise OptionError(f"name: {self.root / name} exists; resume it or choose another name")
        self._check_free()
        file = self.root / ".panel" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(options, indent=1))
        self._run(name, ["--config", str(file)])

    def resume(self, name: str) -> None:
        """Go on with a paused or a stopped run; a finished one would only be tested again."""
        if self.process is not None and self.state == "paused" and name == self.name:
            self.process.send_signal(signal.SIGCONT)
            self.paused = False
            return
        self._check_free()
        self._run(name, ["--output", str(self.root / name), "--resume"])

    def pause(self) -> None:
        """Halt the process where it stands; it keeps its memory."""
        if self.process is not None and self.state == "running":
            self.process.send_signal(signal.SIGSTOP)
            self.paused = True

    def stop(self) -> None:
        """Have the run write a checkpoint after its step and end, which frees the memory."""
        if self.process is not None and self.state in ("running", "paused"):
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # a halted process takes no other signal
            self.stopping = True

    def close(self) -> None:
        """Stop the run and wait for its checkpoint; kill it after 60 s."""
        self.stop()
        if self.process is None:
            return
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _check_free(self) -> None:
        if self.is_alive:
            raise OptionError(f"name: {self.name} is still training; stop it first")

    def _run(self, name: str, arguments: list[str]) -> None:
        self.name, self.paused, self.stopping = name, False, False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ldm4ts_kernels.cli", "train", *arguments]
        with self.log.open("wb") as output:
            self.process = _spawn(command, output)


def _spawn(command: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the panel's terminal reaches the panel, which stops the run.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
