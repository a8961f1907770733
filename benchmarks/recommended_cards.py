"""The cards of the guide: each trains 50 steps as `recommend` says, held to the card's size.

    python -m benchmarks.recommended_cards   # on a larger GPU: results/recommended_cards.csv

Each card is a process that may take no more than the card has, side by side with the others, so
that nothing here is a time. in_all: what the process' allocator held at most, and the driver's
context as `training_memory.CUDA_CONTEXT` has it.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.measure import write_rows

CARDS_GB = (6, 8, 12, 16)
STEPS = 50


def train_card(vram_gb: int) -> dict[str, object]:
    """Train on sp500 with what is recommended for a card, and return what it took."""
    import torch

    from ldm4ts_kernels.runs import plan
    from ldm4ts_kernels.training import train
    from ldm4ts_kernels.training_memory import CUDA_CONTEXT, GIB
    from ldm4ts_kernels.vram import recommend

    found = recommend(vram_gb)
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        config = plan(
            {
                "data": {"name": "sp500"},
                "output": str(Path(scratch) / "run"),
                "device": "cuda",
                "preset": "guide",
                "vram_gb": vram_gb,
                "attention_backend": found.attention_backend,
                "precision": found.precision,
                "checkpointing": "full" if found.gradient_checkpointing else "none",
                "optimizer": found.optimizer,
                "weights": found.weights,
                "batch_size": found.batch_size,
                "steps": STEPS,
                "autoencoder_steps": STEPS,
                "validate_every": STEPS,
                "eval_windows": 1,
                "eval_samples": 1,
                "sampling_steps": 2,
            }
        )
        train(config, reports.append)
    last = next(report for report in reversed(reports) if report.stage == "forecaster")
    first = next(report for report in reports if report.stage == "forecaster")
    return {
        "card_gb": vram_gb,
        "attention": found.attention_backend,
        "precision": config.precision,
        "checkpointing": config.checkpointing,
        "optimizer": config.optimizer,
        "accumulate": config.accumulate,
        "batch": found.batch_size,
        "steps": last.step,
        "first_loss": round(first.losses["loss"], 4),
        "last_loss": round(last.losses["loss"], 4),
        "estimated_gb": round(found.estimated_gb, 3),
        "in_all_gb": round((torch.cuda.max_memory_reserved() + CUDA_CONTEXT) / GIB, 3),
    }


def main() -> None:
    """Train all cards at once."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(CARDS_GB), mp_context=spawn) as pool:
        rows = list(pool.map(train_card, CARDS_GB))
    for row in rows:
        print(*row.values(), flush=True)
    write_rows("recommended_cards", rows)


if __name__ == "__main__":
    main()
