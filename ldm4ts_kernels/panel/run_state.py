"""What a run's directory says: how far it is, how fast, how well; whoever trains it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.run_lock import find_holder
from ldm4ts_kernels.runs import TrainConfig, read_config

POINTS_SHOWN = 400  # of a curve; more would not be seen


@dataclass(frozen=True)
class RunState:
    """A run as its files stand; `records` are those of metrics.jsonl, oldest first."""

    directory: Path
    config: TrainConfig
    records: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] | None = None  # of the test part, once the run is finished

    @property
    def last(self) -> dict[str, Any] | None:
        return self.records[-1] if self.records else None

    @property
    def state(self) -> str:
        """Return "elsewhere" while a process trains it, else "finished" or "stopped"."""
        if find_holder(self.directory) is not None:
            return "elsewhere"
        return "stopped" if self.scores is None else "finished"

    @property
    def progress(self) -> float:
        """Return the share of all optimizer steps that are done."""
        done = _done(self.last, self.config)
        return done / (self.config.autoencoder_steps + self.config.steps)

    @property
    def seconds_left(self) -> float | None:
        """Return the time to the end of the current stage at the last measured speed."""
        last = self.last
        if last is None or not last.get("steps_per_second"):
            return None
        return (last["steps"] - last["step"]) / last["steps_per_second"]

    @property
    def peak_gib(self) -> float | None:
        """Return the largest measured peak of the GPU's allocated memory; None on a CPU."""
        peaks = [record["peak_gib"] for record in self.records if record.get("peak_gib")]
        return max(peaks, default=None)

    @property
    def layers(self) -> dict[str, str]:
        """Return which backend served each attention layer last, by stage and layer."""
        found = {}
        for record in self.records:
            if record.get("layers"):
                found[record["stage"]] = record["layers"]
        return {
            f"{stage}: {name}": server for stage in found for name, server in found[stage].items()
        }

    @property
    def validation(self) -> dict[str, dict[str, float]] | None:
        """Return the newest validation scores by forecaster."""
        found = [record["validation"] for record in self.records if record.get("validation")]
        return found[-1] if found else None

    def curve(self, stage: str) -> list[tuple[int, float]]:
        """Return (step, loss) of a stage, thinned to POINTS_SHOWN means of neighbours."""
        points = [(r["step"], r["losses"]["loss"]) for r in self.records if r["stage"] == stage]
        size = math.ceil(len(points) / POINTS_SHOWN) or 1
        chunks = [points[start : start + size] for start in range(0, len(points), size)]
        return [(chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks]


def read_run(directory: Path) -> RunState | None:
    """Read the run in directory; None while it has written no configuration.

    A half-written last line of metrics.jsonl is left for the next look.
    """
    try:
        config = read_config(directory)
    except OptionError:
        return None
    scores = directory / "test_metrics.json"
    return RunState(
        directory,
        config,
        _records(directory / "metrics.jsonl"),
        json.loads(scores.read_text()) if scores.exists() else None,
    )


def find_runs(root: Path) -> list[str]:
    """Return the names of the runs under root, the one that changed last first."""
    found = [path.parent for path in root.glob("*/config.json")]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.name for path in found]


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _done(last: dict[str, Any] | None, config: TrainConfig) -> int:
    if last is None:
        return 0
    before = config.autoencoder_steps if last["stage"] != "autoencoder" else 0
    return before + last["step"]
