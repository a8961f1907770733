"""A training run in a process of its own that dies at a cue, without a chance to tidy up."""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from ldm4ts_kernels import checkpoints
from ldm4ts_kernels.runs import TrainConfig
from ldm4ts_kernels.training import train


def train_until(config: TrainConfig, cue: str, count: int) -> None:
    """Train, and die at the count-th write to disk, rename or step, as cue says: "" never."""
    torch.set_num_threads(1)
    places: dict[str, tuple[Any, str]] = {
        "write": (checkpoints, "_force_to_disk"),
        "rename": (os, "replace"),
    }
    left = [count]

    def dying(honest: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*args, **options)

        return wrapped

    if cue in places:
        module, name = places[cue]
        setattr(module, name, dying(getattr(module, name)))
    train(config, dying(lambda report: None) if cue == "step" else None)
