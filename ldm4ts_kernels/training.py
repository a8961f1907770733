"""Training of LDM4TS on Accelerate, in two stages: the small autoencoder, then the forecaster.

`train(TrainConfig(...))` runs a job from its data to its test scores. Resuming is the normal path:
a run continues at its newest checkpoint, and on a CPU ends bit for bit where it would have without
the break. In one process, or in several that share each batch (`accelerate launch`).
"""

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import nn

from ldm4ts_kernels.averages import WeightAverage
from ldm4ts_kernels.batches import EncodedWindows, SeededBatches, encode_once, load
from ldm4ts_kernels.checkpoints import (
    STAGES,
    Position,
    Saveable,
    directory_written_whole,
    find_checkpoints,
    optimizer_tensors,
    read_average,
    restore_training_state,
    save_checkpoint,
    write_text_whole,
)
from ldm4ts_kernels.data import OptionError, Series, Splits, load_splits
from ldm4ts_kernels.diffusers_integration import served_by
from ldm4ts_kernels.evaluation import Evaluation, evaluate
from ldm4ts_kernels.graphs import CudaGraphs, GraphedCall
from ldm4ts_kernels.ladder import LadderedStep
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.model.compiled import missing_compiler
from ldm4ts_kernels.model.placement import kept_on_host
from ldm4ts_kernels.model.recompute import autoencoder_parts
from ldm4ts_kernels.optimizers import (
    build_optimizer,
    learning_rate_at,
    missing_8bit,
    set_learning_rate,
    step_in_backward,
)
from ldm4ts_kernels.peers import Peers
from ldm4ts_kernels.process import (
    StopRequest,
    accelerator_of_one_run,
    memory_cap,
    stop_requests,
)
from ldm4ts_kernels.run_lock import hold
from ldm4ts_kernels.runs import Run, TrainConfig, open_run
from ldm4ts_kernels.sharding import Replicas, Shards
from ldm4ts_kernels.training_log import StepLog, StepReport, TrainingError
from ldm4ts_kernels.training_step import StageLoss, TrainingStep, lay_out_weights

__all__ = [
    "StepReport",
    "TrainResult",
    "TrainingError",
    "TrainingInterrupted",
    "learning_rate_at",
    "train",
]

logger = logging.getLogger("ldm4ts_kernels")

FREEZING_WINDOWS = 64  # training windows whose latents set the autoencoder's scale


class TrainingInterrupted(Exception):
    """The run was asked to stop and did, with a checkpoint to resume from."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run: where it is and how it scores on the test part."""

    directory: Path
    test: Evaluation
    seconds: float  # of this call


OnStep = Callable[[StepReport], bool | None]


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
    peers: Peers

    def report(self, report: StepReport) -> None:
        if self.peers.first and self.on_step is not None and self.on_step(report):
            self.stop.requested = True

    def raise_if_stopped(self) -> None:
        if self.stop.requested:
            checkpoints = find_checkpoints(self.run.checkpoints)
            where = f"at {checkpoints[-1].position}" if checkpoints else "at its beginning"
            raise TrainingInterrupted(
                f"stopped; `ldm4ts train --output {self.run.directory} --resume` goes on {where}"
            )


@dataclass(frozen=True)
class _Stage:
    """What a stage trains, with what, in this process."""

    name: str
    steps: int
    loss: nn.Module
    held: Replicas | Shards
    optimizer: torch.optim.Optimizer
    average: WeightAverage


def train(config: TrainConfig, on_step: OnStep | None = None) -> TrainResult:
    """Train LDM4TS as config says, test it, and return its scores beside the naive forecasts'.

    Minimises the autoencoder's reconstruction loss, then LDM4TSModel.loss (LDM4TS, arXiv
    2502.14887, algorithm 1) by AdamW under a cosine schedule. Writes config.output: see `runs`.
    on_step gets StepReports; if it returns True, the run stops as on Ctrl-C.

    Raises OptionError for options or a directory that do not fit, or in which another process
    trains; DataError for the table,
    CheckpointError for a damaged checkpoint (each a ValueError); TrainingError for a loss that is
    not finite; TrainingInterrupted after Ctrl-C, SIGTERM or on_step's wish, with a checkpoint
    written. A second Ctrl-C does not wait for the step's end.
    """
    started = time.perf_counter()
    if config.optimizer == "adamw8bit" and (reason := missing_8bit()):
        raise OptionError(f"optimizer: {reason}")
    if config.compiles and (reason := missing_compiler()):
        raise OptionError(f"compile: {reason}")
    splits = load_splits(config.data)
    with (
        stop_requests() as stop,
        accelerator_of_one_run(config.device, config.precision) as accelerator,
        memory_cap(config.device, config.vram_gb),
        hold(Path(config.output)) if accelerator.is_main_process else nullcontext(),
    ):
        set_seed(config.seed)
        run = open_run(config, splits.scaler)
        model = _build_model(config, splits.series, run)
        model.configure(config.attention_backend, config.checkpointing, config.compile)
        peers = Peers.of(accelerator)
        peers.check(
            config.batch_size, config.accumulate, config.optimizer_in_backward, config.shard_states
        )
        accelerator.wait_for_everyone()  # all have read the directory before one writes there
        if peers.first:
            run.begin(config, splits.scaler)
        job = _Job(run, config, splits, model, accelerator, on_step, stop, peers)
        if model.needs_autoencoder_training:
            _run_stage(job, "autoencoder")
            spaced = torch.linspace(0, len(splits.train) - 1, FREEZING_WINDOWS).long().unique()
            windows = [splits.train[index]["history"] for index in spaced.tolist()]
            model.freeze_autoencoder(torch.stack(windows))
            broadcast(model.autoencoder.scale)
        stage = _run_stage(job, "forecaster")
        with stage.average.applied():
            saveable = stage.held.saveable(model)
            with stage.held.whole():
                test = peers.of_the_first(_finish(job, saveable) if peers.first else None)
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
        "enable_gradient_checkpointing": config.checkpointing,
    }
    if run.checkpoint is None:
        try:
            return LDM4TSModel(preset=config.preset, **options, **model_fields(config, series))
        except (TypeError, ValueError) as error:
            raise OptionError(f"model: {error}") from error
    logger.info("resuming %s at %s", run.directory, run.checkpoint.position)
    return LDM4TSModel.from_pretrained(run.checkpoint.model_path, **options)


def _run_stage(job: _Job, name: str) -> _Stage:
    """Take a stage's remaining optimizer steps, from the run's checkpoint if it has one here."""
    config, model, checkpoint = job.config, job.model, job.run.checkpoint
    first_stage = name == STAGES[0]
    steps = config.autoencoder_steps if first_stage else config.steps
    peak = config.autoencoder_learning_rate if first_stage else config.learning_rate
    parameters = model.autoencoder_parameters() if first_stage else model.trainable_parameters()
    resuming = checkpoint is not None and checkpoint.position.stage == name
    start = checkpoint.position.step if checkpoint is not None and resuming else 0

    batches = SeededBatches(
        len(job.splits.train), config.batch_size, config.seed, start, steps, job.peers.share
    )
    windows: Any = job.splits.train
    # Of the whole run, so that a resumed one decides alike.
    often_enough = config.steps * config.batch_size >= len(windows)
    if not first_stage and config.cache_latents and often_enough:
        windows = encode_once(windows, model.encode_frozen, model.latent_shape, batches)
    if not first_stage:
        lay_out_weights(model, config.weights, config.channels_last)
    in_backward = config.optimizer_in_backward and not first_stage
    # Autocast is Accelerate's; gradients are averaged in the step, where a CUDA graph holds it.
    loss = job.accelerator.prepare_model(StageLoss(model, name), evaluation_mode=True).train()
    held: Replicas | Shards = Replicas(parameters, job.peers)
    if config.shard_states and not first_stage:
        held = Shards(loss, model, job.peers)
        if config.device == "cuda" and config.cuda_graphs and job.peers.first:
            logger.info("with shared states a step runs launch by launch, not as a CUDA graph")
    optimizer = build_optimizer(
        held.parameters,
        peak,
        config.weight_decay,
        # The first stage is small, and its states exact.
        "adamw" if first_stage else config.optimizer,
        one_by_one=in_backward,
    )
    average = WeightAverage(held.parameters, 0.0 if first_stage else config.ema_decay)
    if checkpoint is not None and resuming:
        restore_training_state(checkpoint, optimizer, held.share)
        if (averaged := read_average(checkpoint)) is not None:
            average.restore(held.share(averaged))
    stage = _Stage(name, steps, loss, held, optimizer, average)
    build = partial(_build_step, job, stage)
    take_step = LadderedStep(config, build, partial(_change_levers, job), job.peers.count == 1)
    log = StepLog(job.run, config.device, name, steps, partial(served_by, model), job.peers.first)
    encoded = isinstance(windows, EncodedWindows)
    with (
        kept_on_host(model, name) if first_stage or encoded else nullcontext(),
        step_in_backward(optimizer) if in_backward else nullcontext(),
    ):
        for step, batch in enumerate(load(windows, batches, config.device), start + 1):
            rate = learning_rate_at(step, steps, peak, config.warmup_steps)
            set_learning_rate(optimizer, rate)
            log.add(step, rate, take_step(batch))
            average.update(step)
            _keep_books(job, log, stage, step)
        take_step.step.forget()
    job.accelerator.free_memory()
    return stage


def _build_step(job: _Job, stage: _Stage, config: TrainConfig) -> GraphedCall:
    """Return the training step of the configuration, and let sampling share its graphs' memory."""
    parts, first_stage = config.accumulate, stage.name == STAGES[0]
    if first_stage:
        windows = min(config.batch_size, len(job.splits.train)) // job.peers.count
        shape = job.model.config.image_size
        parts = math.lcm(parts, autoencoder_parts(windows, shape, config.checkpointing))
    step = TrainingStep(
        stage.loss,
        job.model,
        stage.held,
        stage.optimizer,
        accumulate=parts,
        clip=config.gradient_clip,
        in_backward=not first_stage and config.optimizer_in_backward,
        offload=config.offload_activations,
    )
    device, graphs = job.model.device, None
    recordable = not config.offload_activations and isinstance(stage.held, Replicas)
    if config.device == "cuda" and config.cuda_graphs and recordable:
        graphs = CudaGraphs(device)
        if not first_stage:
            job.model.graph_sampling(graphs)
    return GraphedCall(f"the training step of the {stage.name}", step, device, graphs)


def _change_levers(job: _Job, config: TrainConfig) -> None:
    """Use other levers from now on, and when the run is resumed."""
    job.model.graphed_denoiser = None  # its memory is that of the step's graph
    job.model.configure(config.attention_backend, config.checkpointing, config.compile)
    job.run.write_config(config)


def _keep_books(job: _Job, log: StepLog, stage: _Stage, step: int) -> None:
    """After a step: validate, log and checkpoint when it is time to, and stop when asked to."""
    config = job.config
    last = step == stage.steps
    saving = last or step % config.checkpoint_every == 0
    validating = stage.name == "forecaster" and (last or step % config.validate_every == 0)
    validation = None
    if validating:
        log.check_finite()
        with log.clock_stopped(), stage.average.applied(), stage.held.whole():
            validation = _validate(job) if job.peers.first else None
    logging_now = saving or validating or step % config.log_every == 0
    if logging_now or (job.stop.requested and job.peers.count == 1):
        job.report(log.flush(validation))
        job.stop.requested = job.peers.any(job.stop.requested, job.model.device)
    elif job.peers.count > 1:
        return  # a wish to stop waits for the next reading of losses, where all can agree
    if saving or job.stop.requested:
        with log.clock_stopped():
            _save(job, stage, step)
    if job.stop.requested:
        job.accelerator.wait_for_everyone()  # with the checkpoint written
    job.raise_if_stopped()


def _save(job: _Job, stage: _Stage, step: int) -> None:
    saveable = stage.held.saveable(job.model)
    states = stage.held.gather(optimizer_tensors(stage.optimizer))
    average = stage.held.gather(stage.average.tensors())
    if job.peers.first:
        position, keep = Position.at(stage.name, step), job.config.keep_checkpoints
        save_checkpoint(job.run.checkpoints, position, saveable, states, keep, average)


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


def _finish(job: _Job, model: Saveable) -> Evaluation:
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
        model.save_pretrained(scratch)
    write_text_whole(job.run.directory / "test_metrics.json", json.dumps(asdict(test), indent=1))
    return test
