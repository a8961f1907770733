"""Training progress on a terminal as bars, one a stage, and elsewhere as a line now and then."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm4ts_kernels.training import StepReport

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows StepReports: `with TrainingProgress(console) as show: train(config, show)`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.next_line = 0.0

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def __call__(self, report: StepReport) -> None:
        text = describe(report)
        if self.console.is_terminal:
            if report.stage not in self.tasks:
                self.tasks[report.stage] = self.bars.add_task(
                    report.stage, total=report.steps, text=""
                )
            self.bars.update(self.tasks[report.stage], completed=report.step, text=text)
        elif time.monotonic() >= self.next_line or report.step == report.steps:
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self._print(f"{report.stage} {report.step}/{report.steps}  {text}".rstrip())
        if report.validation is not None:
            scores = ", ".join(
                f"{name} {score['mse']:.4f} / {score['mae']:.4f}"
                for name, score in report.validation.items()
            )
            self._print(f"validation at step {report.step}, MSE / MAE: {scores}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe(report: StepReport) -> str:
    """Return a step's losses, speed, peak memory and attention backends in one line."""
    parts = [f"{name} {value:.4f}" for name, value in report.losses.items()]
    if report.steps_per_second is not None:
        parts.append(f"{report.steps_per_second:.2f} steps/s")
    if report.peak_gib is not None:
        parts.append(f"peak {report.peak_gib:.2f} GiB")
    if report.attention:
        parts.append(f"attention {report.attention}")
    return "  ".join(parts)
