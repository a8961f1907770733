"""The estimate of a training step's memory beside what a GPU takes for it.

    python -m benchmarks.vram_accuracy --measure   # on a GPU, in minutes: results/vram_accuracy.csv
    python -m benchmarks.vram_accuracy             # anywhere: the estimates, into the same file

Measured after three steps, launch by launch, in processes side by side: `allocated` is the peak of
what tensors and libraries' workspaces take, `reserved` of what the process holds for them, and
`context` what the driver counts for a process beyond that, measured with one alone.
"""

import argparse
import csv
import gc
import itertools
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.measure import RESULTS, free_memory, write_rows

NAME = "vram_accuracy"
DECODED_AT_ONCE = {128: 2, 224: 1, 512: 1}  # images by their size, where activations are recomputed
AT_ONCE = 10  # processes; of the largest cases, neighbours in CASES, some 70 GiB


@dataclass(frozen=True)
class Case:
    """One configuration: the fields of `model_memory.Step` but for the batch."""

    part: str
    px: int
    batch_size: int
    backend: str = "flash"
    gradient_checkpointing: str = "none"
    precision: str = "bf16"
    optimizer: str = "adamw"
    weights: str = "fp32"
    in_backward: bool = False


LEVERS: tuple[dict[str, Any], ...] = (
    {"backend": "default", "precision": "fp32"},
    {"backend": "default", "precision": "fp32", "gradient_checkpointing": "full"},
    {"backend": "default"},
    {"precision": "fp32"},
    {"precision": "fp32", "gradient_checkpointing": "full"},
    {"precision": "fp32", "gradient_checkpointing": "selective"},
    {},
    {"gradient_checkpointing": "full"},
    {"gradient_checkpointing": "selective"},
    {"backend": "sage"},
    {"backend": "sage", "gradient_checkpointing": "full"},
    {"gradient_checkpointing": "full", "optimizer": "adamw8bit"},
    {"gradient_checkpointing": "full", "optimizer": "adamw8bit", "weights": "bf16"},
    {
        "gradient_checkpointing": "full",
        "optimizer": "adamw8bit",
        "weights": "bf16",
        "in_backward": True,
    },
)
SHAPES = ((512, 4), (224, 16), (224, 4), (224, 1), (128, 8))  # (px, batch size)
AUTOENCODER = tuple(
    {"gradient_checkpointing": mode, "precision": precision}
    for mode, precision in itertools.product(("none", "full"), ("fp32", "bf16"))
)
CASES = [
    *(Case("forecaster", *shape, **levers) for levers in LEVERS for shape in SHAPES),
    *(Case("autoencoder", *shape, **levers) for shape in SHAPES[:3] for levers in AUTOENCODER),
]


def measure(case: Case) -> dict[str, Any]:
    """Take three training steps on the GPU and return what they took, in MiB."""
    from ldm4ts_kernels.model import LDM4TSModel
    from ldm4ts_kernels.model.recompute import autoencoder_parts
    from ldm4ts_kernels.optimizers import step_in_backward
    from ldm4ts_kernels.sharding import Replicas
    from ldm4ts_kernels.training_step import StageLoss, TrainingStep

    free_memory()
    size = (case.px, case.px)
    with torch.device("cuda"):
        model = LDM4TSModel(
            image_size=size,
            attention_backend=case.backend,
            enable_gradient_checkpointing=case.gradient_checkpointing,
            decoded_at_once=DECODED_AT_ONCE[case.px],
        )
        config = model.config
        history = torch.randn(case.batch_size, config.history, config.variates).cumsum(1)
        future = torch.randn(case.batch_size, len(config.horizons), len(config.targets))
    parts = 1
    if case.part == "autoencoder":
        model.unet.to("cpu")
        parts = autoencoder_parts(case.batch_size, size, case.gradient_checkpointing)
    else:
        model.freeze_autoencoder(history[:1])
    loss = StageLoss(model, case.part).train()
    # As Accelerate does it. A cached cast of a weight outlives the block that needs it.
    enabled = case.precision == "bf16"
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=enabled, cache_enabled=False)
    loss.forward = autocast(loss.forward)
    parameters, optimizer = _optimizer(case, model)
    held, clip = Replicas(parameters), 1.0 - case.in_backward
    step = TrainingStep(loss, model, held, optimizer, parts, clip, case.in_backward)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with step_in_backward(optimizer) if case.in_backward else nullcontext():
        for _ in range(3):
            step({"history": history, "future": future})
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / 2**20, 1),
        "context_mib": round((total - free - torch.cuda.memory_reserved()) / 2**20, 1),
    }


def _optimizer(case: Case, model: Any) -> tuple[list[Any], torch.optim.Optimizer]:
    from ldm4ts_kernels.optimizers import build_optimizer

    if case.part == "autoencoder":
        parameters = model.autoencoder_parameters()
    else:
        parameters = model.trainable_parameters()
    if case.weights == "bf16":
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
    return parameters, build_optimizer(
        parameters, 1e-4, 1e-2, case.optimizer, one_by_one=case.in_backward
    )


def estimate(case: Case) -> dict[str, float]:
    """Return the estimate of the same step: allocated, and in all with reserve and context."""
    from ldm4ts_kernels.model.config import resolve_config
    from ldm4ts_kernels.training_memory import TrainingMemory

    size = (case.px, case.px)
    memory = TrainingMemory(
        config=resolve_config("guide", image_size=size, decoded_at_once=DECODED_AT_ONCE[case.px]),
        part=case.part,
        materialised=case.backend == "default",
        gradient_checkpointing=case.gradient_checkpointing,
        precision=case.precision,
        weights=case.weights,
        optimizer=case.optimizer,
        optimizer_in_backward=case.in_backward,
    )
    _, table = memory.stage(case.part, case.batch_size)
    in_all = sum(table.values())
    allocated = in_all - table["allocator"] - table["cuda_context"]
    return {"estimate_mib": round(allocated / 2**20, 1), "in_all_mib": round(in_all / 2**20, 1)}


def measure_all(cases: Iterable[Case]) -> None:
    """Measure every case and write the file."""
    spawn = multiprocessing.get_context("spawn")
    cases, rows = list(cases), []
    with ProcessPoolExecutor(1, mp_context=spawn) as alone:
        context = alone.submit(measure, Case("forecaster", 224, 4)).result()["context_mib"]
    with ProcessPoolExecutor(AT_ONCE, mp_context=spawn) as pool:
        going = {pool.submit(measure, case): case for case in cases}
        for done in as_completed(going):
            case = going[done]
            if error := done.exception():
                print(case, repr(error), flush=True)
                continue
            rows.append({**asdict(case), **done.result(), "context_mib": context})
            print(*rows[-1].values(), flush=True)
    rows.sort(key=lambda row: cases.index(Case(**{name: row[name] for name in asdict(cases[0])})))
    write_rows(NAME, rows)


def compare() -> None:
    """Write each configuration's estimate beside what was measured, and print the errors."""
    with (RESULTS / f"{NAME}.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        kinds = {"px": int, "batch_size": int, "in_backward": "True".__eq__}
        case = Case(**{name: kinds.get(name, str)(row[name]) for name in Case.__annotations__})
        row |= estimate(case)
        print(*(row[name] for name in (*Case.__annotations__, "allocated_mib", "estimate_mib")),
              *(f"{error:+.2f} %" for error in errors(row)), flush=True)  # fmt: skip
    with (RESULTS / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def errors(row: dict[str, Any]) -> tuple[float, float]:
    """Return by how many percent the estimates are off: allocated, and in all."""
    in_all = float(row["reserved_mib"]) + float(row["context_mib"])
    return (
        100 * (float(row["estimate_mib"]) / float(row["allocated_mib"]) - 1),
        100 * (float(row["in_all_mib"]) / in_all - 1),
    )


def main() -> None:
    """Measure, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU")
    measure_all(CASES) if parser.parse_args().measure else compare()


if __name__ == "__main__":
    main()
