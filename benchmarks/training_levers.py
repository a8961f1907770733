"""What each set of levers takes of a GPU, and how fast it trains: the guide's tables, measured.

    python -m benchmarks.training_levers --measure  # on a GPU, in minutes: the file in results/
    python -m benchmarks.training_levers            # anywhere: the estimates beside its figures

A step is that of `ldm4ts train` (forward, backward, clipping, AdamW) on random windows, with the
latents encoded before but in the guide's own rows. ms: the mean of the steps after the tenth, the
GPU idle at both ends; peak: of `torch.cuda.max_memory_allocated` since before the first step.
"""

import argparse
import csv
import gc
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ldm4ts_kernels.graphs import CudaGraphs, GraphedCall
from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.model.config import resolve_config
from ldm4ts_kernels.model_memory import Step, memory_law
from ldm4ts_kernels.optimizers import build_optimizer, set_learning_rate, step_in_backward
from ldm4ts_kernels.process import accelerator_of_one_run
from ldm4ts_kernels.training_step import StageLoss, TrainingStep
from ldm4ts_kernels.vram import WORKSPACES

RESULTS = Path(__file__).parent / "results" / "training_levers.csv"
COMMAND = "python -m benchmarks.training_levers --measure"
UNTIMED, STEPS = 10, 40


@dataclass(frozen=True)
class Levers:
    """One row: a name and the options of `ldm4ts train` that differ from the plainest."""

    name: str
    attention: str = "flash"
    precision: str = "bf16"
    checkpointing: str = "none"
    optimizer: str = "adamw"
    weights: str = "fp32"
    in_backward: bool = False
    accumulate: int = 1
    graph: bool = True


# The guide's rows are without graph and cached latents; the last two are our fastest and leanest.
GUIDE = (
    Levers("Default", "default", "fp32", graph=False),
    Levers("Default + GC", "default", "fp32", "full", graph=False),
    Levers("Flash", "flash", "fp32", graph=False),
    Levers("Flash + GC", "flash", "fp32", "full", graph=False),
)
OURS = (
    Levers("graph, fp32", precision="fp32"),
    Levers("graph, bf16"),
    Levers("graph, bf16, selective", checkpointing="selective"),
    Levers("graph, bf16, GC", checkpointing="full"),
    Levers("+ in backward", checkpointing="full", in_backward=True),
)
LEAN = (
    Levers("+ 8-bit AdamW", checkpointing="full", optimizer="adamw8bit"),
    Levers("+ bf16 weights", checkpointing="full", optimizer="adamw8bit", weights="bf16"),
    Levers("leanest", "flash", "bf16", "full", "adamw8bit", "bf16", in_backward=True),
)
SETS = {"guide": GUIDE, "ours": OURS, "lean": LEAN}
SHAPES = ((224, 4), (512, 4), (224, 16), (224, 2))  # (px, batch size)


def measure(levers: Levers, px: int, batch_size: int) -> dict[str, Any]:
    """Take STEPS training steps on the GPU and return what they took."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    with accelerator_of_one_run("cuda", levers.precision) as accelerator:
        model = LDM4TSModel(
            image_size=(px, px),
            attention_backend=levers.attention,
            enable_gradient_checkpointing=levers.checkpointing,
        )
        batch = _batch(model, batch_size, encoded=levers.graph)
        step = _step(model, levers, accelerator.prepare(StageLoss(model, "forecaster")).train())
        graphs = CudaGraphs(model.device) if levers.graph else None
        call = GraphedCall(levers.name, step, model.device, graphs)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with model.encoders_off_the_gpu() if levers.graph else nullcontext():
            milliseconds, losses = _time(call, step, batch)
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {
        **asdict(levers),
        "px": px,
        "batch_size": batch_size,
        "captured": call.replay is not None,
        "ms": round(milliseconds, 2),
        "peak_mib": round(peak, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _batch(model: LDM4TSModel, batch_size: int, encoded: bool) -> dict[str, torch.Tensor]:
    config = model.config
    history = torch.randn(batch_size, config.history, config.variates).cumsum(1)
    future = torch.randn(batch_size, len(config.horizons), len(config.targets))
    model.freeze_autoencoder(history[:2])
    batch = {"history": history, "future": future}
    if encoded:
        batch |= {name: value.cpu() for name, value in model.encode_frozen(history).items()}
    return {name: value.pin_memory() for name, value in batch.items()}


def _step(model: LDM4TSModel, levers: Levers, loss: torch.nn.Module) -> TrainingStep:
    parameters = model.trainable_parameters()
    if levers.weights == "bf16":
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
    optimizer = build_optimizer(parameters, 1e-4, 1e-2, levers.optimizer, levers.in_backward)
    if levers.in_backward:
        step_in_backward(optimizer)
    clip = 0.0 if levers.in_backward else 1.0
    return TrainingStep(
        loss, model, parameters, optimizer, levers.accumulate, clip, levers.in_backward
    )


def _time(
    call: GraphedCall, step: TrainingStep, batch: dict[str, torch.Tensor]
) -> tuple[float, list[float]]:
    """Return the milliseconds of a step, and the losses of all."""
    losses, began = [], time.perf_counter()
    for index in range(STEPS):
        if index == UNTIMED:
            torch.cuda.synchronize()
            began = time.perf_counter()
        set_learning_rate(step.optimizer, 1e-4 * min(1.0, (index + 1) / UNTIMED))
        losses.append(call(batch)["loss"].clone())
    torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - began) / (STEPS - UNTIMED)
    return milliseconds, torch.stack(losses).tolist()


def compare() -> None:
    """Print each row of the file with its estimate: of tensors and workspaces, as the peak."""
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    print("px batch_size name ms peak_mib estimate_mib error_%")
    for row in rows:
        px, batch_size, parts = int(row["px"]), int(row["batch_size"]), int(row["accumulate"])
        step = Step(
            config=resolve_config("guide", image_size=(px, px)),
            part="forecaster",
            materialised=row["attention"] == "default",
            gradient_checkpointing=row["checkpointing"],
            precision=row["precision"],
            weights=row["weights"],
            optimizer=row["optimizer"],
            optimizer_in_backward=row["in_backward"] == "True",
            accumulating=parts > 1,
        )
        estimate = (memory_law(step).peak(batch_size // parts).total + WORKSPACES) / 2**20
        peak = float(row["peak_mib"])
        error = f"{100 * (estimate / peak - 1):+.2f}"
        print(px, batch_size, row["name"], row["ms"], peak, f"{estimate:.1f}", error, flush=True)


def measure_all(names: list[str], sides: list[int], add: bool) -> None:
    """Measure sets of levers and write, or add to, the file, a row at a time."""
    rows = list(csv.DictReader(RESULTS.open())) if add and RESULTS.exists() else []
    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "command": COMMAND}
    for px, batch_size in SHAPES:
        for levers in (row for name in names for row in SETS[name] if px in sides):
            found = measure(levers, px, batch_size)
            print(*found.values(), flush=True)
            rows.append({**where, **found})
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


def main() -> None:
    """Measure, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--px", type=int, nargs="*", default=[224, 512])
    parser.add_argument("--add", action="store_true", help="to the file's rows")
    options = parser.parse_args()
    measure_all(options.sets, options.px, options.add) if options.measure else compare()


if __name__ == "__main__":
    main()
