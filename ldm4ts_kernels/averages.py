"""An exponential moving average of the weights, in the host's memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

AVERAGED_EVERY = 10  # steps: an update copies all weights to the host
STEP = "optimization_step"


class WeightAverage:
    """ā ← d ā + (1 - d) w, every tenth step with d to its power; decay 0 is no average at all.

    The first updates weigh more, as diffusers' EMAModel does it: d is at most (1 + n) / (10 + n)
    at the n-th. Takes nothing of the GPU's memory.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.average: EMAModel | None = None
        if decay:
            self.average = EMAModel(self._on_host(), decay=decay**AVERAGED_EVERY)

    def update(self, step: int) -> None:
        """Take the weights after a step, from 1, into the average if it is their turn."""
        if self.average is not None and step % AVERAGED_EVERY == 0:
            self.average.step(self._on_host())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the weights' place, and the weights back afterwards."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of it: nothing without a decay."""
        if self.average is None:
            return {}
        averages = {f"{index}": value for index, value in enumerate(self.average.shadow_params)}
        return {**averages, STEP: torch.tensor(self.average.optimization_step)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave. Raises ValueError for another model's."""
        if self.average is None:
            return
        own = self.tensors()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError("the average is of another model")
        for name, value in tensors.items():
            own[name].copy_(value)
        self.average.optimization_step = int(tensors[STEP])

    def _on_host(self) -> list[nn.Parameter]:
        return [
            nn.Parameter(p.detach().to("cpu", torch.float32, copy=True)) for p in self.parameters
        ]
