"""What torch's CUDA caching allocator holds of a GPU for a sequence of allocations, without a GPU.

It takes segments from the driver, cuts blocks off them and joins what is freed with its neighbours,
but gives no segment back by itself: what it has reserved is more than was ever allocated. These are
its rules for one stream and its default settings (c10/cuda/CUDACachingAllocator, torch 2.11).
"""

import bisect
from typing import NamedTuple

ROUNDING = 512  # bytes; a block is a multiple of it
LARGEST_SMALL = 2**20  # larger blocks have segments of their own kind
SMALL_SEGMENT = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20  # for a block that is neither small nor LEAST_OWN
LEAST_OWN = 10 * 2**20  # from here on a segment is as large as the block that it is taken for
OWN_ROUNDING = 2 * 2**20


def rounded(size: int) -> int:
    """Return the bytes of the block that `size` bytes are given."""
    return max(1, -(-size // ROUNDING)) * ROUNDING


class Block:
    """A part of a segment: in use or free, between its neighbours there."""

    __slots__ = ("after", "before", "free", "is_small", "serial", "size")

    def __init__(self, serial: int, size: int, is_small: bool) -> None:
        self.serial, self.size, self.is_small = serial, size, is_small
        self.free = False
        self.before: Block | None = None
        self.after: Block | None = None

    @property
    def is_segment(self) -> bool:
        """Whether it is alone in its segment."""
        return self.before is None and self.after is None


class _Free(NamedTuple):
    """A free block as its pool orders it: by size, then by age."""

    size: int
    serial: int
    block: Block


class CachingAllocator:
    """`reserved`: bytes of all segments, which grow until `give_back` is asked for."""

    def __init__(self) -> None:
        self.reserved = 0
        self._blocks = 0
        self._free: dict[bool, list[_Free]] = {True: [], False: []}  # by whether blocks are small

    def allocate(self, size: int) -> Block:
        """Return the smallest free block that holds `size` bytes, cut to that, or a new one."""
        size = rounded(size)
        is_small = size <= LARGEST_SMALL
        pool = self._free[is_small]
        at = bisect.bisect_left(pool, (size, -1))
        block = pool.pop(at).block if at < len(pool) else self._segment(size, is_small)
        block.free = False
        rest = block.size - size
        if rest >= ROUNDING if is_small else rest > LARGEST_SMALL:
            self._cut(block, size)
        return block

    def release(self, block: Block) -> None:
        """Free a block, as one with the free ones beside it."""
        if block.after is not None and block.after.free:
            self._join(block, block.after, free=block.after)
        if block.before is not None and block.before.free:
            block = self._join(block.before, block, free=block.before)
        self._keep(block)

    def give_back(self) -> None:
        """Return the segments of which nothing is in use, as `torch.cuda.empty_cache` does."""
        for is_small, pool in self._free.items():
            whole = [free for free in pool if free.block.is_segment]
            self.reserved -= sum(free.size for free in whole)
            self._free[is_small] = [free for free in pool if not free.block.is_segment]

    def _segment(self, size: int, is_small: bool) -> Block:
        if is_small:
            taken = SMALL_SEGMENT
        elif size < LEAST_OWN:
            taken = LARGE_SEGMENT
        else:
            taken = -(-size // OWN_ROUNDING) * OWN_ROUNDING
        self.reserved += taken
        return self._block(taken, is_small)

    def _block(self, size: int, is_small: bool) -> Block:
        self._blocks += 1
        return Block(self._blocks, size, is_small)

    def _cut(self, block: Block, size: int) -> None:
        rest = self._block(block.size - size, block.is_small)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._keep(rest)

    def _join(self, first: Block, second: Block, free: Block) -> Block:
        """Return two neighbours as one block, out of its pool; `free` is the one that is in it."""
        pool = self._free[free.is_small]
        pool.pop(bisect.bisect_left(pool, (free.size, free.serial)))
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    def _keep(self, block: Block) -> None:
        block.free = True
        bisect.insort(self._free[block.is_small], _Free(block.size, block.serial, block))
