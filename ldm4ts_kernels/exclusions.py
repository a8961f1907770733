"""Options of a training run that exclude each other."""

import re
from collections.abc import Iterator
from typing import Any

CHECKPOINTING = ("none", "full", "selective")
BUDGET = re.compile(r"budget:(0(\.\d*)?|1(\.0*)?|\.\d+)")


def exclusions(config: Any) -> Iterator[tuple[str, bool, str]]:
    """Yield what a TrainConfig must not have: an option's name, whether it has, what to choose."""
    yield (
        "checkpointing",
        config.checkpointing not in CHECKPOINTING
        and not BUDGET.fullmatch(f"{config.checkpointing}"),
        f"one of {', '.join(CHECKPOINTING)}, or budget:x with x from 0 to 1",
    )
    name = "compile" if config.compile else "checkpointing"
    yield name, config.compiles and config.device != "cuda", "no torch.compile without a GPU"
    yield (
        name,
        config.compiles and config.offload_activations,
        "no torch.compile with offload_activations, whose hooks it does not see",
    )
    yield "ema_decay", not 0 <= config.ema_decay < 1, "a number from 0 to less than 1"
    yield (
        "accumulate",
        config.batch_size % config.accumulate != 0,
        f"a divisor of batch_size ({config.batch_size})",
    )
    yield (
        "gradient_clip",
        config.optimizer_in_backward and config.gradient_clip != 0,
        "0 with optimizer_in_backward, which frees each gradient before a norm of all is known",
    )
    yield (
        "accumulate",
        config.optimizer_in_backward and config.accumulate > 1,
        "1 with optimizer_in_backward, which uses each gradient as it comes",
    )
    yield (
        "weights",
        config.weights == "bf16" and config.optimizer != "adamw8bit",
        "fp32 with optimizer adamw, whose small updates bfloat16 would round away",
    )
    yield (
        "weights",
        config.weights == "bf16" and config.precision != "bf16",
        "fp32 with precision fp32",
    )
    yield (
        "optimizer",
        config.shard_states and config.optimizer != "adamw",
        "adamw with shard_states, whose shares are not whole blocks of 8-bit states",
    )
    yield (
        "channels_last",
        config.shard_states and config.channels_last,
        "False with shard_states, which cuts plain weights alone",
    )
    yield name, config.shard_states and config.compiles, "no torch.compile with shard_states"
    yield (
        "offload_activations",
        config.shard_states and config.offload_activations,
        "False with shard_states, as whole weights would leave the GPU, too",
    )
    yield (
        "vram_gb",
        config.shard_states and config.vram_gb is not None,
        "None with shard_states, which the estimate does not know",
    )
