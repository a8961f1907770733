"""The storages of a training step in their order, and what is reserved for them on a GPU."""

from collections.abc import Iterable
from typing import NamedTuple

from ldm4ts_kernels.caching_allocator import Block, CachingAllocator, rounded


class Storages(NamedTuple):
    """The beginnings and ends of a step's storages: M of both together, in their order."""

    numbers: tuple[int, ...]  # M, the same at a storage's beginning and end
    sizes: tuple[int, ...]  # M: bytes; 0 at an end
    before: int  # of M: the beginnings of what is there before the step
    states: frozenset[int]  # numbers of the optimizer's states, which come in the first step
    states_come: range  # of M: where in it, evenly

    def reserved(self, kept: int = 0, passing: int = 0, *, graph: bool = False) -> int:
        """Return the bytes that the caching allocator has reserved, at most, in three steps.

        kept: bytes that libraries take and keep, half from the first step's beginning on, half from
        its end. passing: bytes that they take at a step's peak, and give back. graph: a fourth step
        is recorded as a CUDA graph, which has a pool of its own.
        """
        before = list(zip(self.numbers, self.sizes, strict=True))[: self.before]
        passes = {self._peak(): passing} if passing else {}
        allocator = CachingAllocator()
        _take(allocator, [size for number, size in before if number not in self.states])
        _take(allocator, [kept // 2])
        self._step(allocator, passes, [size for number, size in before if number in self.states])
        _take(allocator, [kept // 2])
        for _ in range(2):
            self._step(allocator, passes, [])
        most = allocator.reserved
        if graph:
            allocator.give_back()
            pool = CachingAllocator()
            self._step(pool, passes, [])
            most = max(most, allocator.reserved + pool.reserved)
        return most

    def _step(self, allocator: CachingAllocator, passes: dict[int, int], states: list[int]) -> None:
        """Take a step: what is there before it stays, what begins in it has ended afterwards.

        passes: bytes that libraries take for a moment, by where.
        """
        waiting = list(states)
        blocks: dict[int, Block] = {}
        for at in range(self.before, len(self.numbers)):
            number, size = self.numbers[at], self.sizes[at]
            if at in self.states_come:
                left = len(states) * (self.states_come.stop - 1 - at) // len(self.states_come)
                while len(waiting) > left:
                    _take(allocator, [waiting.pop()])
            if size:
                blocks[number] = allocator.allocate(size)
            elif number in blocks:
                allocator.release(blocks.pop(number))
            if at in passes:
                allocator.release(allocator.allocate(passes[at]))
        for block in blocks.values():
            allocator.release(block)

    def _peak(self) -> int:
        """Return at which of the beginnings most bytes are there."""
        live: dict[int, int] = {}
        total = most = at_most = 0
        for at, (number, size) in enumerate(zip(self.numbers, self.sizes, strict=True)):
            total -= live.pop(number, 0)
            if size:
                live[number] = rounded(size)
                total += live[number]
            if total > most:
                most, at_most = total, at
        return at_most


def _take(allocator: CachingAllocator, sizes: Iterable[int]) -> None:
    """Allocate blocks of these sizes, which stay; none for no bytes."""
    for size in sizes:
        if size:
            allocator.allocate(size)
