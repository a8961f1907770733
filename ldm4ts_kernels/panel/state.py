"""What all browsers of a panel share: settings, the run, the child processes."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm4ts_kernels.doctor import Diagnosis, diagnose_elsewhere
from ldm4ts_kernels.model.config import PRESETS, LDM4TSConfig
from ldm4ts_kernels.panel.estimates import Estimates, about_estimate
from ldm4ts_kernels.panel.run_state import RunState, read_run
from ldm4ts_kernels.panel.settings import CARDS_GB, Settings
from ldm4ts_kernels.panel.training_job import TrainingJob
from ldm4ts_kernels.panel.worker import Worker


@dataclass
class PanelState:
    """One panel. `root` holds the runs, a directory each."""

    root: Path
    settings: Settings = field(default_factory=Settings)
    estimates: Estimates = field(default_factory=Estimates)
    forecaster: Worker = field(default_factory=Worker)
    diagnosis: Diagnosis = field(default_factory=diagnose_elsewhere)
    job: TrainingJob = field(init=False)
    shown: RunState | None = None
    changes: int = 0  # of `shown`; a page redraws when it has moved on

    def __post_init__(self) -> None:
        self.job = TrainingJob(self.root)
        if not torch.cuda.is_available():  # as `runs.plan` chooses
            self.settings.preset, self.settings.image_size = "paper", 64

    def look(self) -> None:
        """Read the run that is shown again, if its files have changed."""
        name = self.settings.run
        seen = read_run(self.root / name) if name else None
        if seen != self.shown:
            self.shown = seen
            self.changes += 1

    async def prepare(self) -> None:
        """Trace what will be asked first: the current model with every lever, and the cards."""
        settings = self.settings
        question = settings.estimate_question()
        await self.estimates.ask(question)
        for card_gb in CARDS_GB:
            await self.estimates.ask(settings.card_question(card_gb))
        arguments = dict(question.arguments)
        for precision in ("fp32", "bf16"):
            for backend in ("flash", "default"):
                for checkpointing in ("full", "none"):
                    levers = {
                        "precision": precision,
                        "backend": backend,
                        "gradient_checkpointing": checkpointing,
                    }
                    changed = tuple(sorted({**arguments, **levers}.items()))
                    await self.estimates.ask(question._replace(arguments=changed))

    def estimate_of(self, run: RunState) -> float | None:
        """Return the estimate of a run's VRAM in GiB, where that has been traced already."""
        config = run.config
        size = config.model_fields.get("image_size") or PRESETS[config.preset].get("image_size")
        question = about_estimate(
            preset=config.preset,
            backend="default" if config.attention_backend == "default" else "flash",
            gradient_checkpointing=config.checkpointing,
            precision=config.precision,
            optimizer=config.optimizer,
            optimizer_in_backward=config.optimizer_in_backward,
            weights=config.weights,
            image_size=tuple(size or LDM4TSConfig.image_size),
        )
        known = self.estimates.look_up(question)
        batch = str(config.batch_size)
        return known[batch]["total_estimated_gb"] if known and batch in known else None

    def close(self) -> None:
        """Stop the run, with a checkpoint, and end the child processes."""
        self.job.close()
        self.estimates.close()
        self.forecaster.close()
