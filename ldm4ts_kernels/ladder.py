"""What a training step does when the GPU's memory is full: the same step again, with less of it."""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ldm4ts_kernels.graphs import GraphedCall
from ldm4ts_kernels.runs import TrainConfig

logger = logging.getLogger("ldm4ts_kernels")


def next_rung(config: TrainConfig, windows: int) -> tuple[TrainConfig, str] | None:
    """Return the configuration with one lever more and what that costs; None after the last one.

    None of them changes what is trained. windows: those of a step, which accumulation splits.
    """
    if config.attention_backend == "default":
        return replace(config, attention_backend="flash"), "nothing: attention is as exact"
    if config.checkpointing != "full":
        return replace(config, checkpointing="full"), "the forward pass again in the backward pass"
    parts = next((n for n in range(config.accumulate + 1, windows + 1) if not windows % n), None)
    if parts is not None:
        return replace(config, accumulate=parts), f"{parts} smaller passes a step"
    if not config.offload_activations:
        changed = replace(config, offload_activations=True, compile=False)
        return changed, "transfers, and the CUDA graph"
    return None


class LadderedStep:
    """Take steps; where one runs out of memory, take it again with the next lever.

    alone: no other process takes a share of the step; with others, the error is left as it is.
    build makes a step of a configuration; changed is told each new one. A step that is taken again
    draws the same random numbers, so that a run is what it would have been with the lever on.
    """

    def __init__(
        self,
        config: TrainConfig,
        build: Callable[[TrainConfig], GraphedCall],
        changed: Callable[[TrainConfig], object],
        alone: bool = True,
    ) -> None:
        self.config, self.build, self.changed, self.alone = config, build, changed, alone
        self.step = build(config)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        while True:
            before = self._random_states() if self.step.replay is None else []
            try:
                return self.step(batch)
            except torch.OutOfMemoryError as error:
                if not self.alone:  # the others are in the middle of the step
                    raise
                reason = f"{error}".partition("\n")[0]
            # Here, so that the error no longer holds the frames, and tensors, of the step.
            self._climb(len(batch["history"]), reason)
            self._set_random_states(before)

    def _climb(self, windows: int, reason: str) -> None:
        if self.config.optimizer_in_backward:
            raise torch.OutOfMemoryError(
                f"{reason} With optimizer_in_backward a step that ran out of memory cannot be taken"
                " again: some weights have changed. Resume with a lever more, or a smaller batch."
            )
        rung = next_rung(self.config, windows)
        if rung is None:
            raise torch.OutOfMemoryError(
                f"{reason} Every lever is in use; what is left are optimizer adamw8bit, smaller "
                "images (--image-size) and a larger GPU."
            )
        config, cost = rung
        name = next(n for n in vars(config) if getattr(config, n) != getattr(self.config, n))
        logger.warning(
            "out of memory; the step is taken again with %s %s, which costs %s. %s",
            name,
            getattr(config, name),
            cost,
            reason,
        )
        self.config = config
        self.step.forget()
        self.changed(config)
        self.step = self.build(config)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _random_states(self) -> list[Tensor]:
        on_gpu = self.step.device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]

    def _set_random_states(self, states: list[Tensor]) -> None:
        host, *device = states
        torch.set_rng_state(host)
        for state in device:
            torch.cuda.set_rng_state(state)
