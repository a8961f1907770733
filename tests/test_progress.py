"""Bars on a terminal; elsewhere few lines, and none lost at the end of a stage."""

import io

from rich.console import Console

from ldm4ts_kernels.progress import TrainingProgress, describe
from ldm4ts_kernels.training import StepReport

SCORES = {"ldm4ts": {"mse": 0.25, "mae": 0.5}, "last value": {"mse": 1.0, "mae": 1.0}}


def report(step: int, **changes) -> StepReport:
    return StepReport("forecaster", step, 100, {"loss": 1.5}, **changes)


def shown(terminal: bool, *reports: StepReport) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    with TrainingProgress(console) as show:
        for item in reports:
            show(item)
    return text.getvalue()


def test_a_step_is_described_in_one_line():
    step = report(
        1, learning_rate=1e-3, steps_per_second=2.5, peak_gib=0.75, attention="triton ×16"
    )
    assert describe(step) == "loss 1.5000  2.50 steps/s  peak 0.75 GiB  attention triton ×16"


def test_elsewhere_than_on_a_terminal_lines_are_few_and_the_last_step_is_there():
    lines = shown(False, *(report(step) for step in range(1, 101))).splitlines()
    assert lines == ["forecaster 1/100  loss 1.5000", "forecaster 100/100  loss 1.5000"]


def test_on_a_terminal_each_stage_has_a_bar():
    text = shown(True, StepReport("autoencoder", 3, 3, {"loss": 1.0}), report(100))
    assert "autoencoder" in text and "forecaster" in text and "100/100" in text


def test_validation_is_printed_beside_the_naive_scores():
    text = shown(False, report(1), report(50, validation=SCORES))
    assert "validation at step 50, MSE / MAE: ldm4ts 0.2500 / 0.5000, last value 1.0000" in text
