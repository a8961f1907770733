"""One optimizer step, as a function from a batch to its losses that a CUDA graph can hold."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ldm4ts_kernels.model import LDM4TSModel
from ldm4ts_kernels.sharding import Replicas, Shards


class StageLoss(nn.Module):
    """A stage's loss as a module's forward, which is what Accelerate wraps and autocasts."""

    def __init__(self, model: LDM4TSModel, stage: str) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stage == "autoencoder":
            noise = batch.get("noise")
            return {"loss": self.model.autoencoder_loss(batch["history"], noise=noise)}
        return self.model.loss(batch)


def lay_out_weights(model: LDM4TSModel, weights: str, channels_last: bool) -> None:
    """Give what the second stage trains its dtype, and the U-Net its layout in memory.

    channels_last: convolutions' weights by (O, kh, kw, I), which their activations follow. The
    parameters stay the same objects.
    """
    if weights == "bf16":
        for parameter in model.trainable_parameters():
            parameter.data = parameter.data.bfloat16()
    if channels_last:
        model.unet.to(memory_format=torch.channels_last)


class TrainingStep:
    """Forward, backward, clipping, AdamW: a batch to its losses, detached.

    accumulate: parts that the batch is split into, whose gradients add up to that of the whole.
    clip: largest norm of all gradients together; 0 leaves them as they are. in_backward: the
    optimizer steps by itself (`step_in_backward`). offload: what the backward pass needs waits in
    the host's memory. held: what this process holds of the weights, alone or among others that
    have shares of the same batch, whose losses and gradients are averaged.
    """

    def __init__(
        self,
        loss: nn.Module,
        model: LDM4TSModel,
        held: Replicas | Shards,
        optimizer: torch.optim.Optimizer,
        accumulate: int = 1,
        clip: float = 0.0,
        in_backward: bool = False,
        offload: bool = False,
    ) -> None:
        self.loss, self.model = loss, model
        self.held, self.peers = held, held.peers
        self.optimizer = optimizer
        self.accumulate, self.clip = accumulate, clip
        self.in_backward, self.offload = in_backward, offload

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)  # what a step that broke off has left
        totals: dict[str, Tensor] = {}
        for part in self._parts(batch):
            with self._kept_elsewhere():
                losses = self.loss(part)
            (losses["loss"] / self.accumulate).backward()
            for name, value in losses.items():
                share = value.detach() / self.accumulate
                totals[name] = totals[name] + share if name in totals else share
        self.peers.average_(totals.values())
        if not self.in_backward:
            self.held.average_gradients()
            if self.clip:
                self.held.clip_gradients(self.clip)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return totals

    def _parts(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield the parts of the batch, with noise that was drawn for the whole."""
        count = len(batch["history"])
        if self.accumulate * self.peers.count > 1:
            first = self.peers.rank * count
            drawn = self.model.draw_noise(count * self.peers.count)
            own = {name: value[first : first + count] for name, value in drawn.items()}
            batch = {**batch, **own}
        size, rest = divmod(count, self.accumulate)
        if rest:
            raise ValueError(
                f"accumulate must divide the {count} windows of a batch, got {self.accumulate}"
            )
        for start in range(0, count, size):
            yield {name: value[start : start + size] for name, value in batch.items()}

    def _kept_elsewhere(self) -> AbstractContextManager[object]:
        if not self.offload:
            return nullcontext()
        on_gpu = self.held.parameters[0].is_cuda
        return torch.autograd.graph.save_on_cpu(pin_memory=on_gpu)
