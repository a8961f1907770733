"""Training of LDM4TS on Accelerate, in two stages: the small autoencoder, then the forecaster.

`train(TrainConfig(...))` runs a job from its data to its test scores. Resuming is the normal path:
a run continues at its newest checkpoint, and on a CPU ends bit for bit where it would have without
the break. One process, one device.
"""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from ldm4ts_kernels.checkpoints import (
    STAGES,
    Position,
    directory_written_whole,
    find_checkpoints,
    restore_training_state,
    save_checkpoint,
    write_text_whole,
)
from ldm4ts_kernels.data import OptionError, Series, Splits, load_splits
from ldm4ts_kernels.diffusers_integration import served_by
from ldm4ts_kernels.evaluation import Evaluation, evaluate
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.process import StopRequest, accelerator_of_one_run, stop_requests
from ldm4ts_kernels.runs import Run, TrainConfig, open_run

logger = logging.getLogger("ldm4ts_kernels")

FREEZING_WINDOWS = 64  # training windows whose latents set the autoencoder's scale
FINAL_LEARNING_RATE = 0.1  # of the cosine's start


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and what to do."""


class TrainingInterrupted(Exception):
    """The run was asked to stop and did, with a checkpoint to resume from."""


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
    validation: dict[str, dict[str, float]] | None = None  # mse and mae by forecaster


@dataclass(frozen=True)
class TrainResult:
    """A finished run: where it is and how it scores on the test part."""

    directory: Path
    test: Evaluation
    seconds: float  # of this call


OnStep = Callable[[StepReport], bool | None]


class SeededBatches(Sampler[list[int]]):
    """Batches `first` .. `last` - 1 of an endless shuffled order that (seed, epoch) alone decide.

    A step's batch depends on nothing drawn before it, so that a run can resume at any step.
    """

    drop_last = True  # with batch_size, what Accelerate asks of a batch sampler

    def __init__(self, size: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.size, self.seed, self.first, self.last = size, seed, first, last
        self.batch_size = min(batch_size, size)

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.size // self.batch_size
        shuffled_epoch, order = -1, torch.empty(0)
        for step in range(self.first, self.last):
            epoch, position = divmod(step, per_epoch)
            if epoch != shuffled_epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                shuffled_epoch, order = epoch, torch.randperm(self.size, generator=generator)
            start = position * self.batch_size
            yield order[start : start + self.batch_size].tolist()


class _StageLoss(nn.Module):
    """A stage's loss as a module's forward, which is what Accelerate wraps and autocasts."""

    def __init__(self, model: LDM4TSModel, stage: str) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stage == "autoencoder":
            return {"loss": self.model.autoencoder_loss(batch["history"])}
        return self.model.loss(batch)


@dataclass(frozen=True)
class _Job:
    """What the parts of a training run share."""

    run: Run
    config: TrainConfig
    splits: Splits
    model: LDM4TSModel
    accelerator: Accelerator
    on_step: OnStep | None
    stop: StopRequest

    def report(self, report: StepReport) -> None:
        if self.on_step is not None and self.on_step(report):
            self.stop.requested = True

    def raise_if_stopped(self) -> None:
        if self.stop.requested:
            checkpoints = find_checkpoints(self.run.checkpoints)
            where = f"at {checkpoints[-1].position}" if checkpoints else "at its beginning"
            raise TrainingInterrupted(
                f"stopped; `ldm4ts train --output {self.run.directory} --resume` goes on {where}"
            )


def train(config: TrainConfig, on_step: OnStep | None = None) -> TrainResult:
    """Train LDM4TS as config says, test it, and return its scores beside the naive forecasts'.

    Minimises the autoencoder's reconstruction loss, then LDM4TSModel.loss (LDM4TS, arXiv
    2502.14887, algorithm 1) by AdamW under a cosine schedule. Writes config.output: see `runs`.
    on_step gets StepReports; if it returns True, the run stops as on Ctrl-C.

    Raises OptionError for options or a directory that do not fit, DataError for the table,
    CheckpointError for a damaged checkpoint (each a ValueError); TrainingError for a loss that is
    not finite; TrainingInterrupted after Ctrl-C, SIGTERM or on_step's wish, with a checkpoint
    written. A second Ctrl-C does not wait for the step's end.
    """
    started = time.perf_counter()
    splits = load_splits(config.data)
    with (
        stop_requests() as stop,
        accelerator_of_one_run(config.device, config.precision) as accelerator,
    ):
        set_seed(config.seed)
        run = open_run(config, splits.scaler)
        model = _build_model(config, splits.series, run)
        run.begin(config, splits.scaler)
        job = _Job(run, config, splits, model, accelerator, on_step, stop)
        if model.needs_autoencoder_training:
            _run_stage(job, "autoencoder")
            spaced = torch.linspace(0, len(splits.train) - 1, FREEZING_WINDOWS).long().unique()
            windows = [splits.train[index]["history"] for index in spaced.tolist()]
            model.freeze_autoencoder(torch.stack(windows))
        _run_stage(job, "forecaster")
        test = _finish(job)
    return TrainResult(run.directory, test, time.perf_counter() - started)


def model_fields(config: TrainConfig, series: Series) -> dict[str, Any]:
    """Return the LDM4TSConfig fields of a run: those that the data decide, then the user's."""
    return {
        "history": series.history,
        "variates": len(series.columns),
        "targets": series.targets,
        "horizons": series.horizons,
        "period": series.period,
        **config.model_fields,
    }


def _build_model(config: TrainConfig, series: Series, run: Run) -> LDM4TSModel:
    options: dict[str, Any] = {
        "device": config.device,
        "attention_backend": config.attention_backend,
        "enable_gradient_checkpointing": config.gradient_checkpointing,
    }
    if run.checkpoint is None:
        try:
            return LDM4TSModel(preset=config.preset, **options, **model_fields(config, series))
        except (TypeError, ValueError) as error:
            raise OptionError(f"model: {error}") from error
    logger.info("resuming %s at %s", run.directory, run.checkpoint.position)
    return LDM4TSModel.from_pretrained(run.checkpoint.model_path, **options)


def _run_stage(job: _Job, stage: str) -> None:
    """Take a stage's remaining optimizer steps, from the run's checkpoint if it has one here."""
    config, model, checkpoint = job.config, job.model, job.run.checkpoint
    first_stage = stage == STAGES[0]
    steps = config.autoencoder_steps if first_stage else config.steps
    peak = config.autoencoder_learning_rate if first_stage else config.learning_rate
    parameters = model.autoencoder_parameters() if first_stage else model.trainable_parameters()
    resuming = checkpoint is not None and checkpoint.position.stage == stage
    start = checkpoint.position.step if checkpoint is not None and resuming else 0

    # capturable and foreach stay torch's choice; fused is one launch for all parameters.
    optimizer: Any = torch.optim.AdamW(
        parameters, lr=peak, weight_decay=config.weight_decay, fused=config.device == "cuda"
    )
    batches = SeededBatches(len(job.splits.train), config.batch_size, config.seed, start, steps)
    # Its own generator: a DataLoader draws a seed when it starts, which resuming must not repeat.
    loader: Any = DataLoader(
        job.splits.train,
        batch_sampler=batches,
        generator=torch.Generator(),
        pin_memory=config.device == "cuda",
    )
    loss_module, optimizer, loader = job.accelerator.prepare(
        _StageLoss(model, stage), optimizer, loader
    )
    loss_module.train()
    if checkpoint is not None and resuming:
        restore_training_state(checkpoint, optimizer)
    log = _Log(job, stage, steps)
    for step, batch in enumerate(loader, start + 1):
        rate = learning_rate_at(step, steps, peak, config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = loss_module(batch)
        job.accelerator.backward(losses["loss"])
        job.accelerator.clip_grad_norm_(parameters, config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.add(step, rate, losses)
        _keep_books(job, log, stage, step, steps, optimizer)
    del loss_module, optimizer, loader
    job.accelerator.free_memory()


def learning_rate_at(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Return the rate of optimizer step `step` (from 1): linear warm-up, then a cosine to 0.1."""
    warmup = min(warmup_steps, steps // 10)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def _keep_books(
    job: _Job, log: "_Log", stage: str, step: int, steps: int, optimizer: torch.optim.Optimizer
) -> None:
    """After a step: validate, log and checkpoint when it is time to, and stop when asked to."""
    config = job.config
    last = step == steps
    saving = last or step % config.checkpoint_every == 0
    validation = None
    if stage == "forecaster" and (last or step % config.validate_every == 0):
        log.check_finite()
        with log.clock_stopped():
            validation = _validate(job)
    if saving or validation or step % config.log_every == 0 or job.stop.requested:
        job.report(log.flush(validation))
    if saving or job.stop.requested:
        position = Position.at(stage, step)
        with log.clock_stopped():
            save_checkpoint(
                job.run.checkpoints, position, job.model, optimizer, keep=config.keep_checkpoints
            )
    job.raise_if_stopped()


class _Log:
    """Collects losses on the device and reads them in one transfer, as each read waits for it."""

    def __init__(self, job: _Job, stage: str, steps: int) -> None:
        self.job, self.stage, self.steps = job, stage, steps
        self.pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self.since = time.perf_counter()
        if job.config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def add(self, step: int, rate: float, losses: dict[str, Tensor]) -> None:
        self.pending.append((step, rate, {name: loss.detach() for name, loss in losses.items()}))

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
                kept = find_checkpoints(self.job.run.checkpoints)
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
        on_gpu = self.job.config.device == "cuda"
        step, rate, _ = self.pending[-1]
        report = StepReport(
            stage=self.stage,
            step=step,
            steps=self.steps,
            losses=losses,
            learning_rate=rate,
            steps_per_second=len(self.pending) / (now - self.since),
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            attention=_serving(self.job.model),
            validation=validation,
        )
        self.pending.clear()
        self.since = now
        self.job.run.log(asdict(report))
        return report


def _serving(model: LDM4TSModel) -> str:
    """Name the backends that served the model's attention layers, with their numbers of layers."""
    counts = Counter(name for name in served_by(model).values() if name is not None)
    return ", ".join(f"{name} ×{count}" for name, count in counts.most_common())


def _validate(job: _Job) -> dict[str, dict[str, float]]:
    """Score the model's point forecast on the validation part: mse and mae."""
    config = job.config
    with job.accelerator.autocast():
        evaluation = evaluate(
            job.model,
            job.splits.validation,
            count=config.eval_windows,
            samples=1,
            sampling_steps=config.sampling_steps,
            seed=config.seed,
        )
    return {
        name: {score: scores[score] for score in ("mse", "mae")}
        for name, scores in evaluation.scores.items()
    }


def _finish(job: _Job) -> Evaluation:
    """Score the test part, then write test_metrics.json and model/."""

    def on_batch(done: int, count: int) -> None:
        job.report(StepReport("test", done, count, losses={}))
        job.raise_if_stopped()

    config = job.config
    with job.accelerator.autocast():
        test = evaluate(
            job.model,
            job.splits.test,
            count=config.eval_windows,
            samples=config.eval_samples,
            sampling_steps=config.sampling_steps,
            seed=config.seed,
            on_batch=on_batch,
        )
    model_directory = job.run.directory / "model"
    if model_directory.exists():  # of a run that was resumed after its end, with more steps
        model_directory.rename(job.run.directory / ".unfinished-model")
    with directory_written_whole(model_directory) as scratch:
        job.model.save_pretrained(scratch)
    text = json.dumps(asdict(test), indent=1)
    write_text_whole(job.run.directory / "test_metrics.json", text)
    return test
