"""The processes that train one model together, each on its share of every batch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ldm4ts_kernels.data import OptionError

BUCKET = 64 * 2**20  # bytes that the processes add up at once: a call for each tensor would wait


@dataclass(frozen=True)
class Peers:
    """This process among `count` of one run; the first one writes, scores and reports."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Peers":
        return cls(accelerator.process_index, accelerator.num_processes)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check(
        self, batch_size: int, accumulate: int, in_backward: bool, shard_states: bool = False
    ) -> None:
        """Raise OptionError for options with which these processes cannot share a batch."""
        if batch_size % (self.count * accumulate):
            raise OptionError(
                f"batch_size: expected a multiple of {self.count} processes times accumulate "
                f"{accumulate}, got {batch_size}"
            )
        if in_backward and self.count > 1:
            raise OptionError(f"optimizer_in_backward: expected one process, got {self.count}")
        if shard_states and self.count == 1:
            raise OptionError(
                "shard_states: expected two processes or more (accelerate launch), got one, which "
                "trains with --no-shard-states"
            )

    def share(self, batch: Sequence[int]) -> list[int]:
        """Return this process' windows of a batch. Raises ValueError if it cannot be divided."""
        size, rest = divmod(len(batch), self.count)
        if rest:
            raise ValueError(
                f"batch_size must be a multiple of the {self.count} processes, got {len(batch)}"
            )
        return list(batch[self.rank * size : (self.rank + 1) * size])

    def average_(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its mean over the processes; a CUDA graph can hold it."""
        if self.count == 1:
            return
        for bucket in _buckets(tensor for tensor in tensors if tensor is not None):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.div_(self.count).split([tensor.numel() for tensor in bucket])
            means = [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)]
            torch._foreach_copy_(bucket, means)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is set in one of the processes; waits for all."""
        if self.count == 1:
            return flag
        votes = torch.tensor(int(flag), device=device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def of_the_first(self, value: Any) -> Any:
        """Return the first process' value in every one; waits for it."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in lists of one dtype, and of no more than BUCKET bytes or one tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        size += tensor.nbytes
        if bucket and (size > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], tensor.nbytes
        bucket.append(tensor)
    if bucket:
        yield bucket
