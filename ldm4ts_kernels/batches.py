"""The order of the training data, which the seed and the step alone decide."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class SeededBatches(Sampler[list[int]]):
    """Batches `first` .. `last` - 1 of an endless shuffled order that (seed, epoch) alone decide.

    A step's batch depends on nothing drawn before it, so that a run can resume at any step.
    """

    def __init__(self, size: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.size, self.seed, self.first, self.last = size, seed, first, last
        self.batch_size = min(batch_size, size)

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
            yield order[start : start + self.batch_size].tolist()
