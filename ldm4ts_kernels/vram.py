"""What training an LDM4TS model takes of a GPU's memory, and the settings with which it fits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ldm4ts_kernels.optimizers import OPTIMIZERS
from ldm4ts_kernels.training_memory import (
    CUDA_CONTEXT,
    GIB,
    PARTS,
    WORKSPACES,
    TrainingMemory,
    largest,
)

BACKENDS = ("default", "flash", "sage", "auto")
PRECISIONS = ("fp32", "bf16")
CHECKPOINTING = (False, True, "none", "full", "selective")
LARGEST_BATCH = 64  # of a recommendation: larger steps are another training, not a saving

# Of a budget, what is left free. Of the 15 steps as CUDA graphs in training_levers.csv, measured on
# an H100, 12 took 1 to 5 % more than estimated, the other three up to 9 %.
MARGIN = 0.05


class Lever(NamedTuple):
    """Settings that may be recommended, and what they cost."""

    precision: str
    gradient_checkpointing: bool
    cost: str
    optimizer: str = "adamw"
    weights: str = "fp32"
    optimizer_in_backward: bool = False


# Least costly first, by what they change and then by the time of a step of the forecaster under a
# CUDA graph on an H200 (224 px, batch 4; 35 ms for the first; the last was not measured). Attention
# is fused in all of them: it costs nothing against materialised scores.
LEVERS = (
    Lever("fp32", False, "nothing: fused attention is exact, and no slower"),
    Lever("bf16", False, "bfloat16's rounding; 0.8 × the time of a step"),
    Lever("fp32", True, "1.5 × the time of a step; the gradients are the same"),
    Lever("bf16", True, "bfloat16's rounding, and the forward pass again in the backward pass"),
)
# Beyond those, with the extra `lean`: the states of a weight, which are most of a small batch.
_LEAN_COST = "AdamW's moments in a byte, bfloat16's rounding, the forward pass again"
LEAN_LEVERS = (
    *LEVERS,
    Lever("bf16", True, _LEAN_COST, "adamw8bit"),
    Lever("bf16", True, f"{_LEAN_COST}, stochastically rounded weights", "adamw8bit", "bf16"),
    Lever(
        "bf16",
        True,
        f"{_LEAN_COST}, stochastically rounded weights, and the clipping of gradients",
        "adamw8bit",
        "bf16",
        True,
    ),
)


@dataclass(frozen=True)
class Option:
    """One set of levers, and the largest batch that fits with it; 0 where not even one does."""

    attention_backend: str
    precision: str
    gradient_checkpointing: bool
    cost: str
    largest_batch: int
    one_window_gb: float
    optimizer: str = "adamw"
    weights: str = "fp32"
    optimizer_in_backward: bool = False


@dataclass(frozen=True)
class Recommendation:
    """Settings with which training fits; `considered` are the sets up to the chosen one."""

    vram_gb: float
    attention_backend: str
    precision: str
    gradient_checkpointing: bool
    batch_size: int
    estimated_gb: float
    why: str
    considered: tuple[Option, ...]
    optimizer: str = "adamw"
    weights: str = "fp32"
    optimizer_in_backward: bool = False


def estimate_vram_usage(
    batch_size: int = 4,
    backend: str = "default",
    gradient_checkpointing: bool | str = False,
    image_size: tuple[int, int] | None = None,
    preset: str = "guide",
    precision: str = "fp32",
    part: str = "model",
    optimizer: str = "adamw",
    weights: str = "fp32",
    optimizer_in_backward: bool = False,
    accumulate: int = 1,
    cuda_graph: bool = False,
    **config_fields: Any,
) -> dict[str, Any]:
    """Return what training takes of a GPU's memory, in units of 2^30 bytes and in a byte table.

    Args:
        batch_size: windows in a step.
        backend: "default" (materialised scores), "flash", "auto" or "sage". INT8 attention keeps
            at most what exact attention keeps, and is estimated as that.
        gradient_checkpointing: "none" (False), "full" (True) or "selective".
        image_size: (height, width) in pixels; None is the preset's.
        precision: "fp32", or "bf16" for autocast.
        optimizer, weights, optimizer_in_backward, accumulate: as in `runs.TrainConfig`; the
            autoencoder's stage has AdamW on fp32 weights whatever they are.
        part: "model", the larger of training's two stages; "unet", a step of the U-Net alone.
        cuda_graph: the step is recorded as a CUDA graph, as `ldm4ts train` does on a GPU; it has
            memory of its own beside what the steps before it took.
        config_fields: fields of LDM4TSConfig, over the preset's.

    Returns:
        total_estimated_gb = base_model_gb (parameters, gradients and optimizer states at the peak)
        + activation_memory_gb (all other tensors) + overhead_gb (what is no tensor);
        savings_vs_default_pct, against backend "default" without checkpointing; "bytes", the
        table behind them: parameters, gradients, optimizer, inputs, activations, temporaries,
        workspaces (cuBLAS, cuDNN), allocator (reserved, not used), cuda_context; "stages", the
        tensors' bytes at each stage's peak; "phases", at the peak of each phase of the largest
        stage; and the arguments.

    The first call for a model takes seconds, whatever the batch; what it traced is kept on disk, in
    $LDM4TS_CACHE, else ldm4ts-kernels in the user's cache.
    Not covered: the scoring between steps, other processes on the GPU, torch.compile.

    Raises ValueError for an unknown name or a value out of range, TypeError for an unknown field.
    """
    _check("backend", backend, BACKENDS)
    _check_count("batch_size", batch_size)
    config = _config(preset, image_size, precision, part, config_fields)
    _check("gradient_checkpointing", gradient_checkpointing, CHECKPOINTING)
    _check("optimizer", optimizer, OPTIMIZERS)
    _check("weights", weights, PRECISIONS)
    _check_count("accumulate", accumulate)
    if batch_size % accumulate:
        raise ValueError(f"accumulate must divide batch_size ({batch_size}), got {accumulate}")
    default = TrainingMemory(config, part, True, False, precision)
    run = TrainingMemory(
        config,
        part,
        backend == "default",
        gradient_checkpointing,
        precision,
        weights,
        optimizer,
        optimizer_in_backward,
        accumulate > 1,
        cuda_graph,
    )
    stages = run.stages(batch_size // accumulate)
    peak, table = largest(stages)
    total = sum(table.values())
    base = sum(table[name] for name in ("parameters", "gradients", "optimizer"))
    overhead = sum(table[name] for name in ("workspaces", "allocator", "cuda_context"))
    return {
        "base_model_gb": base / GIB,
        "activation_memory_gb": (total - base - overhead) / GIB,
        "overhead_gb": overhead / GIB,
        "total_estimated_gb": total / GIB,
        "savings_vs_default_pct": 100 * (1 - total / sum(default.table(batch_size).values())),
        "backend": backend,
        "gradient_checkpointing": gradient_checkpointing,
        "batch_size": batch_size,
        "image_size": config.image_size,
        "preset": preset,
        "precision": precision,
        "optimizer": optimizer,
        "weights": weights,
        "optimizer_in_backward": optimizer_in_backward,
        "accumulate": accumulate,
        "cuda_graph": cuda_graph,
        "part": part,
        "bytes": table,
        "stages": {name: at_peak.total for name, (at_peak, _) in stages.items()},
        "phases": peak.phases,
    }


def recommend(
    vram_gb: float,
    batch_size: int = 4,
    image_size: tuple[int, int] | None = None,
    preset: str = "guide",
    precision: str | None = None,
    lean: bool = False,
    **config_fields: Any,
) -> Recommendation:
    """Return the least costly settings with which training fits into vram_gb · 2^30 bytes.

    They are the first of LEVERS with which batch_size windows a step fit, and the largest batch
    that then fits, up to LARGEST_BATCH. Where batch_size windows fit with none, they are the last
    of LEVERS with the largest batch that fits; `why` says so. precision: None leaves it open.
    lean: LEAN_LEVERS instead, which need torchao.

    Raises ValueError where not even one window fits, and as `estimate_vram_usage` does.
    """
    if not vram_gb > 0:
        raise ValueError(f"vram_gb must be more than 0, got {vram_gb!r}")
    _check_count("batch_size", batch_size, LARGEST_BATCH)
    least = (CUDA_CONTEXT + WORKSPACES) / GIB / (1 - MARGIN)
    if vram_gb < least:  # no trace is needed to say so
        raise ValueError(
            f"vram_gb must be at least {least:.2f} for the CUDA context and workspaces alone, "
            f"got {vram_gb}"
        )
    config = _config(preset, image_size, precision or "fp32", "model", config_fields)
    offered = LEAN_LEVERS if lean else LEVERS
    levers = [lever for lever in offered if precision in (None, lever.precision)]
    considered = []
    for option in _options(config, levers, vram_gb * (1 - MARGIN)):
        considered.append(option)
        if option.largest_batch >= batch_size:
            break
    chosen = considered[-1]
    if not chosen.largest_batch:
        raise ValueError(
            f"vram_gb must be at least {chosen.one_window_gb / (1 - MARGIN):.2f} for one "
            f"window of {config.image_size} a step with every lever, got {vram_gb}"
        )
    lever = levers[len(considered) - 1]
    total = sum(run_with(lever, config).table(chosen.largest_batch).values()) / GIB
    return Recommendation(
        vram_gb=vram_gb,
        attention_backend=chosen.attention_backend,
        precision=chosen.precision,
        gradient_checkpointing=chosen.gradient_checkpointing,
        batch_size=chosen.largest_batch,
        estimated_gb=total,
        why=_explain(considered, batch_size, vram_gb),
        considered=tuple(considered),
        optimizer=lever.optimizer,
        weights=lever.weights,
        optimizer_in_backward=lever.optimizer_in_backward,
    )


def run_with(lever: Lever, config: Any, accumulating: bool = False) -> TrainingMemory:
    """Return the run of an LDM4TSConfig with a lever and fused attention, as a CUDA graph."""
    return TrainingMemory(
        config,
        "model",
        False,
        lever.gradient_checkpointing,
        lever.precision,
        lever.weights,
        lever.optimizer,
        lever.optimizer_in_backward,
        accumulating,
        graph=True,
    )


def largest_batch(run: TrainingMemory, vram_gb: float, most: int = LARGEST_BATCH) -> int:
    """Return how many windows a step of the run may have in vram_gb · 2^30 bytes, 0 .. most."""
    return next((n for n in range(most, 0, -1) if run.fits(n, vram_gb)), 0)


def _options(config: Any, levers: list[Lever], vram_gb: float) -> Iterator[Option]:
    """Yield each set of levers with its largest batch; the next one is traced when asked for."""
    for lever in levers:
        run = run_with(lever, config)
        fitting = largest_batch(run, vram_gb)
        one_window_gb = sum(run.table(1).values()) / GIB
        yield Option(
            "flash",
            lever.precision,
            lever.gradient_checkpointing,
            lever.cost,
            fitting,
            one_window_gb,
            lever.optimizer,
            lever.weights,
            lever.optimizer_in_backward,
        )


def _explain(considered: list[Option], batch_size: int, vram_gb: float) -> str:
    *refused, chosen = considered
    least = f"The least costly settings with which {batch_size} windows a step fit"
    if chosen.largest_batch < batch_size:
        least = f"No settings fit {batch_size} windows a step; these fit the most"
    elif not refused:
        least += ", and no others are needed"
    limit = "the largest batch offered" if chosen.largest_batch == LARGEST_BATCH else (
        f"one window more passes {vram_gb:g} GB"
    )  # fmt: skip
    return f"{least}. They cost {chosen.cost}. {chosen.largest_batch} windows: {limit}."


def _config(
    preset: str,
    image_size: tuple[int, int] | None,
    precision: str,
    part: str,
    config_fields: dict[str, Any],
) -> Any:
    from ldm4ts_kernels.model.config import resolve_config

    _check("precision", precision, PRECISIONS)
    _check("part", part, tuple(PARTS))
    given = config_fields if image_size is None else {**config_fields, "image_size": image_size}
    return resolve_config(preset, **given)


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _check_count(name: str, value: object, largest: int | None = None) -> None:
    above = largest is not None and isinstance(value, int) and value > largest
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or above:
        expected = ">= 1" if largest is None else f"from 1 to {largest}"
        raise ValueError(f"{name} must be an integer {expected}, got {value!r}")
