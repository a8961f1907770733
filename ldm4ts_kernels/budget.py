"""The levers with which a run's batch fits into a GPU's memory, chosen from the estimate."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ldm4ts_kernels.training_memory import GIB
from ldm4ts_kernels.vram import LARGEST_BATCH, MARGIN, Lever, largest_batch, run_with

MANY_PARTS = 4  # beyond it, a leaner set of levers is taken before a batch is split further


class Choice(NamedTuple):
    """Fields of `runs.TrainConfig` with which a run fits, and why these."""

    options: dict[str, Any]
    estimated_gb: float
    why: str


class _Candidate(NamedTuple):
    lever: Lever
    parts: int
    estimated_gb: float


def choose_levers(
    vram_gb: float,
    batch_size: int,
    levers: Sequence[Lever],
    preset: str,
    model_fields: dict[str, Any],
) -> Choice:
    """Return the first of levers with which batch_size windows fit into vram_gb · 2^30 bytes.

    Where the whole batch fits with none, it is split into the fewest parts whose gradients are
    accumulated: the first lever that needs at most MANY_PARTS, else the one that needs fewest.
    Raises ValueError where a single window does not fit with the last lever, naming what does.
    """
    from ldm4ts_kernels.model.config import resolve_config

    if not vram_gb > 0:
        raise ValueError(f"vram_gb must be more than 0, got {vram_gb!r}")
    config = resolve_config(preset, **model_fields)
    usable = vram_gb * (1 - MARGIN)
    tried: list[Lever] = []
    for lever in levers:
        run = run_with(lever, config)
        if batch_size <= LARGEST_BATCH and run.fits(batch_size, usable):
            total = sum(run.table(batch_size).values()) / GIB
            return _describe(_Candidate(lever, 1, total), tried, batch_size, vram_gb)
        tried.append(lever)
    split = [_split(lever, config, batch_size, usable) for lever in levers]
    fitting = [candidate for candidate in split if candidate is not None]
    if not fitting:
        least = sum(run_with(levers[-1], config).table(1).values()) / GIB / (1 - MARGIN)
        raise ValueError(
            f"vram_gb must be at least {least:.2f} for one window of {config.image_size} a step "
            f"with every lever, got {vram_gb:g}"
        )
    few = [candidate for candidate in fitting if candidate.parts <= MANY_PARTS]
    chosen = few[0] if few else min(fitting, key=lambda candidate: candidate.parts)
    return _describe(chosen, tried[: tried.index(chosen.lever)], batch_size, vram_gb)


def _split(lever: Lever, config: Any, batch_size: int, usable: float) -> _Candidate | None:
    if lever.optimizer_in_backward:
        return None  # its gradients cannot be accumulated
    run = run_with(lever, config, accumulating=True)
    most = largest_batch(run, usable, min(batch_size, LARGEST_BATCH))
    parts = [n for n in range(1, batch_size + 1) if not batch_size % n and batch_size // n <= most]
    if not parts:
        return None
    return _Candidate(lever, parts[0], sum(run.table(batch_size // parts[0]).values()) / GIB)


def _describe(
    chosen: _Candidate, refused: Sequence[Lever], batch_size: int, vram_gb: float
) -> Choice:
    lever, parts, total = chosen
    options: dict[str, Any] = {
        "attention_backend": "flash",
        "precision": lever.precision,
        "checkpointing": "full" if lever.gradient_checkpointing else "none",
        "optimizer": lever.optimizer,
        "weights": lever.weights,
        "optimizer_in_backward": lever.optimizer_in_backward,
        "accumulate": parts,
    }
    if lever.optimizer_in_backward:
        options["gradient_clip"] = 0.0
    named = ", ".join(f"{name} {value}" for name, value in options.items())
    split = "" if parts == 1 else f", in {parts} parts of {batch_size // parts}"
    skipped = f"; {len(refused)} cheaper sets do not fit" if refused else ""
    takes = f"{batch_size} windows a step{split} take an estimated {total:.2f} GiB"
    why = f"{vram_gb:g} GB: {takes} with {named}. It costs {lever.cost}{skipped}."
    return Choice(options, total, why)
