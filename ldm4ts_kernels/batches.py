"""The training data: their order, which seed and step alone decide, and what is computed once."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

logger = logging.getLogger("ldm4ts_kernels")

LARGEST_CACHE = 4 * 2**30  # bytes of latents in the host's memory
ENCODED_AT_ONCE = 16  # windows


class SeededBatches(Sampler[list[int]]):
    """Batches `first` .. `last` - 1 of an endless shuffled order that (seed, epoch) alone decide.

    A step's batch depends on nothing drawn before it, so that a run can resume at any step.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        first: int,
        last: int,
        share: Callable[[list[int]], list[int]] = list,  # of a batch, what this process takes
    ) -> None:
        self.size, self.seed, self.first, self.last = size, seed, first, last
        self.batch_size, self.share = min(batch_size, size), share

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.size // self.batch_size
        shuffled_epoch, order = -1, torch.empty(0)
        for step in range(self.first, self.last):
            epoch, position = divmod(step, per_epoch)
            if epoch != shuffled_epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                shuffled_epoch, order = epoch, torch.randperm(self.size, generator=generator)
            start = position * self.batch_size
            yield self.share(order[start : start + self.batch_size].tolist())


class EncodedWindows(Dataset[dict[str, Tensor]]):
    """Windows with what `encode`, {"history": …} to tensors, makes of their histories.

    Kept in the host's memory, for the windows `wanted` alone. They are encoded with their
    neighbours in blocks that depend on nothing else, so that a resumed run gets the same bits.
    """

    def __init__(
        self, windows: Any, encode: Callable[[Tensor], dict[str, Tensor]], wanted: Iterable[int]
    ) -> None:
        self.windows = windows
        self.encoded: dict[str, Tensor] = {}
        for block in sorted({index // ENCODED_AT_ONCE for index in wanted}):
            first = block * ENCODED_AT_ONCE
            last = min(first + ENCODED_AT_ONCE, len(windows))
            history = torch.stack([windows[index]["history"] for index in range(first, last)])
            for name, value in encode(history).items():
                if name not in self.encoded:  # pages that nothing is written to take no memory
                    self.encoded[name] = torch.empty(len(windows), *value.shape[1:])
                self.encoded[name][first:last] = value

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mine = {name: values[index] for name, values in self.encoded.items()}
        return {**self.windows[index], **mine}


def encode_once(
    windows: Any,
    encode: Callable[[Tensor], dict[str, Tensor]],
    latent_shape: tuple[int, ...],
    batches: SeededBatches,
) -> Dataset[dict[str, Tensor]]:
    """Return windows with the latents of those in the batches; without, where they are too many."""
    size = len(windows) * math.prod(latent_shape) * torch.float32.itemsize
    if size > LARGEST_CACHE:
        gib = size / 2**30
        logger.info("each step encodes its windows: all latents would take %.1f GiB", gib)
        return windows
    logger.info("encoding %d windows once, for all steps", len(windows))
    return EncodedWindows(windows, encode, chain.from_iterable(batches))


def load(
    windows: Dataset[dict[str, Tensor]], batches: SeededBatches, device: str
) -> DataLoader[Any]:
    """Return the batches' windows, where the device reads them fastest."""
    # Its own generator: a DataLoader draws a seed when it starts, which resuming must not repeat.
    return DataLoader(
        windows,
        batch_sampler=batches,
        generator=torch.Generator(),
        pin_memory=device == "cuda",
    )
