"""What a run says of its steps: losses read in one transfer now and then, speed, peak memory."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ldm4ts_kernels.checkpoints import find_checkpoints
from ldm4ts_kernels.runs import Run


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and what to do."""


@dataclass(frozen=True)
class StepReport:
    """What a step has come to; `on_step` gets one every `log_every` steps, and while testing."""

    stage: str  # "autoencoder" | "forecaster" | "test"
    step: int
    steps: int
    losses: dict[str, float]
    learning_rate: float | None = None
    steps_per_second: float | None = None
    peak_gib: float | None = None  # allocated on the GPU since the stage began; None on a CPU
    attention: str | None = None  # backends that serve, with their numbers of layers
    layers: dict[str, str] | None = None  # backend by attention layer, where it has changed
    validation: dict[str, dict[str, float]] | None = None  # mse and mae by forecaster


class StepLog:
    """Collects losses on the device and reads them in one transfer, as each read waits for it."""

    def __init__(
        self,
        run: Run,
        device: str,
        stage: str,
        steps: int,
        served: Callable[[], dict[str, str | None]],
        writing: bool = True,
    ) -> None:
        self.run, self.stage, self.steps, self.writing = run, stage, steps, writing
        self.on_gpu, self.served = device == "cuda", served
        self.layers: dict[str, str] = {}
        self.pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self.since = time.perf_counter()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def add(self, step: int, rate: float, losses: dict[str, Tensor]) -> None:
        """Remember a step's losses, copied: a graph overwrites its own."""
        copies = {name: loss.detach().clone() for name, loss in losses.items()}
        self.pending.append((step, rate, copies))

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave what the block takes out of the steps per second."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def check_finite(self) -> dict[str, float]:
        """Return the last step's losses; TrainingError if a loss since the flush is not finite."""
        names = list(self.pending[-1][2])
        rows = torch.stack([torch.stack([e[2][n].float() for n in names]) for e in self.pending])
        for (step, _, _), row in zip(self.pending, rows.tolist(), strict=True):
            if not all(map(math.isfinite, row)):
                shown = ", ".join(f"{name} {value}" for name, value in zip(names, row, strict=True))
                kept = find_checkpoints(self.run.checkpoints)
                where = kept[-1].path if kept else "none yet"
                raise TrainingError(
                    f"the loss is not finite at step {step} of the {self.stage} ({shown}); last "
                    f"good checkpoint: {where}; resume with a lower --learning-rate"
                )
        return dict(zip(names, rows[-1].tolist(), strict=True))

    def flush(self, validation: dict[str, dict[str, float]] | None) -> StepReport:
        """Write the last step's record and return its report."""
        losses = self.check_finite()
        now = time.perf_counter()
        step, rate, _ = self.pending[-1]
        before = self.layers
        self.layers = {name: server for name, server in self.served().items() if server}
        counts = Counter(self.layers.values())
        report = StepReport(
            stage=self.stage,
            step=step,
            steps=self.steps,
            losses=losses,
            learning_rate=rate,
            steps_per_second=len(self.pending) / (now - self.since),
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None,
            attention=", ".join(f"{name} ×{count}" for name, count in counts.most_common()),
            layers=self.layers if self.layers != before else None,
            validation=validation,
        )
        self.pending.clear()
        self.since = now
        if self.writing:
            self.run.log(asdict(report))
        return report
