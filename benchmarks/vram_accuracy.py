"""The estimate of a training step's memory beside what a GPU takes for it.

    python -m benchmarks.vram_accuracy --measure   # on a GPU, in minutes: results/vram_accuracy.csv
    python -m benchmarks.vram_accuracy             # anywhere: estimates beside the file's figures

Measured after three steps, by the caching allocator: `allocated` is the peak of what tensors and
libraries' workspaces take, `reserved` of what the process holds for them, and `context` what the
driver counts for the process beyond that.
"""

import argparse
import csv
import gc
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.model.config import resolve_config
from ldm4ts_kernels.model_memory import Step, memory_law
from ldm4ts_kernels.vram import WORKSPACES

RESULTS = Path(__file__).parent / "results" / "vram_accuracy.csv"
SHAPES = {
    "forecaster": ((128, 8), (224, 1), (224, 4), (224, 16), (512, 4)),  # (px, batch size)
    "unet": ((224, 4), (224, 16), (512, 4)),
    "autoencoder": ((224, 4), (224, 16)),
}
OPTIONS = tuple(itertools.product(("default", "flash"), (False, True), ("fp32", "bf16")))


def measure(
    part: str, px: int, batch_size: int, backend: str, checkpointing: bool, precision: str
) -> dict[str, Any]:
    """Take three training steps on the GPU and return what they took, in MiB."""
    with torch.device("cuda"):
        model = LDM4TSModel(
            image_size=(px, px),
            attention_backend=backend,
            enable_gradient_checkpointing=checkpointing,
        )
        config = model.config
        history = torch.randn(batch_size, config.history, config.variates).cumsum(1)
        future = torch.randn(batch_size, len(config.horizons), len(config.targets))
        latents = torch.randn(batch_size, *model.latent_shape)
        timesteps = torch.zeros(batch_size, dtype=torch.int64)
        tokens = torch.randn(batch_size, 2 * config.variates, config.cross_attention_dim)
    module, trained = model, model.autoencoder_parameters()
    if part != "autoencoder":
        model.freeze_autoencoder(history[:1])
        trained = model.trainable_parameters()
    if part == "unet":
        module, trained = model.unet, list(model.unet.parameters())
    module.train()

    def loss() -> torch.Tensor:
        if part == "autoencoder":
            return model.autoencoder_loss(history)
        if part == "forecaster":
            return model.loss({"history": history, "future": future})["loss"]
        predicted = module(latents, timesteps, tokens, return_dict=False)[0]
        return F.mse_loss(predicted.float(), torch.zeros_like(latents))

    if part == "unet":
        del model
    optimizer = torch.optim.AdamW(trained, fused=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        # As training does: a cached cast of a weight outlives the block that needs it.
        with torch.autocast(
            "cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
        ):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / 2**20, 1),
        "context_mib": round((total - free - torch.cuda.memory_reserved()) / 2**20, 1),
    }


def measure_all(parts: list[str]) -> None:
    """Measure every configuration of the parts, and write the file with the others as they were."""
    rows: list[dict[str, Any]] = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            rows = [row for row in csv.DictReader(file) if row["part"] not in parts]
    for part in parts:
        for (px, batch_size), (backend, checkpointing, precision) in itertools.product(
            SHAPES[part], OPTIONS
        ):
            row = {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "part": part,
                "px": px,
                "batch_size": batch_size,
                "backend": backend,
                "gradient_checkpointing": checkpointing,
                "precision": precision,
            }
            row |= measure(part, px, batch_size, backend, checkpointing, precision)
            print(*row.values(), flush=True)
            rows.append(row)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def compare() -> None:
    """Print each configuration's estimate beside what was measured."""
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    errors = []
    print("part px batch_size backend gradient_checkpointing precision measured_mib estimate_mib %")
    for row in rows:
        px, batch_size = int(row["px"]), int(row["batch_size"])
        step = Step(
            config=resolve_config("guide", image_size=(px, px)),
            part=row["part"],
            materialised=row["backend"] == "default",
            gradient_checkpointing=row["gradient_checkpointing"] == "True",
            precision=row["precision"],
        )
        estimate = (memory_law(step).peak(batch_size).total + WORKSPACES) / 2**20
        measured = float(row["allocated_mib"])
        errors.append(100 * (estimate / measured - 1))
        named = list(row.values())[2:-3]
        print(*named, measured, f"{estimate:.1f} {errors[-1]:+.2f}", flush=True)
    sizes = sorted(map(abs, errors))
    print(f"{len(rows)} configurations: error {sum(sizes) / len(rows):.2f} % in the mean, "
          f"{sizes[-1]:.2f} % at most, {sum(size <= 3 for size in sizes)} within 3 %")  # fmt: skip


def main() -> None:
    """Measure, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU")
    parser.add_argument("--parts", nargs="*", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    measure_all(options.parts) if options.measure else compare()


if __name__ == "__main__":
    main()
