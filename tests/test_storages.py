"""What is reserved for a step: torch's allocator in closed form, and a replay of three steps."""

import pytest

from ldm4ts_kernels.caching_allocator import CachingAllocator
from ldm4ts_kernels.storages import Storages

MIB = 2**20


def test_small_blocks_share_segments_of_two_megabytes():
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert allocator.reserved == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved == 4 * MIB


@pytest.mark.parametrize(
    ("size", "reserved"),
    [(MIB + 1, 20 * MIB), (9 * MIB, 20 * MIB), (10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB)],
)
def test_a_large_block_has_a_segment_of_its_kind(size, reserved):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved == reserved


def test_a_freed_block_is_used_again_and_joined_with_its_neighbours():
    allocator = CachingAllocator()
    parts = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved == 20 * MIB
    for part in (parts[1], parts[3], parts[2]):  # the last one joins both
        allocator.release(part)
    allocator.allocate(15 * MIB)
    assert allocator.reserved == 20 * MIB


def test_what_lies_between_free_blocks_makes_room_useless():
    allocator = CachingAllocator()
    parts = [allocator.allocate(5 * MIB) for _ in range(4)]
    for part in parts[::2]:
        allocator.release(part)
    allocator.allocate(10 * MIB)  # ten are free, but not side by side
    assert allocator.reserved == 30 * MIB


def test_a_rest_of_a_megabyte_stays_with_its_block():
    allocator = CachingAllocator()
    large = allocator.allocate(40 * MIB)
    allocator.release(large)
    assert allocator.allocate(39 * MIB).size == 40 * MIB


def step(*moves: tuple[int, int], before: int = 0, states: frozenset[int] = frozenset()):
    numbers, sizes = zip(*moves, strict=True)
    return Storages(numbers, sizes, before, states, range(len(moves) - 1, len(moves)))


def test_steps_that_are_repeated_use_what_the_first_one_freed():
    moves = [(1, 30 * MIB), (2, 40 * MIB), (2, 0), (3, 40 * MIB), (3, 0)]
    assert step(*moves, before=1).reserved() == 70 * MIB


def test_states_come_in_the_first_step_and_break_up_what_it_freed():
    moves = [(1, 8 * MIB), (2, 30 * MIB), (2, 0), (3, 20 * MIB), (3, 0)]
    assert step(*moves, before=1).reserved() == 50 * MIB
    # beside the last tensor, where the second step's first one had been
    assert step(*moves, before=1, states=frozenset({1})).reserved() == 60 * MIB


def test_libraries_take_what_they_keep_and_what_passes_at_the_peak():
    moves = [(1, 20 * MIB), (2, 20 * MIB), (2, 0), (1, 0)]
    storages = step(*moves)
    assert storages.reserved() == 40 * MIB
    assert storages.reserved(kept=64 * MIB) == 104 * MIB
    assert storages.reserved(passing=10 * MIB) == 50 * MIB


def test_a_graph_has_a_pool_beside_what_the_steps_before_it_keep():
    storages = step((1, 50 * MIB), (2, 30 * MIB), (2, 0), before=1)
    assert storages.reserved() == storages.reserved(graph=True) == 80 * MIB
    # what is left of a step lies in a segment that is not given back: here the optimizer's states
    moves = [(1, 8 * MIB), (2, 30 * MIB), (2, 0), (3, 20 * MIB), (3, 0)]
    storages = step(*moves, before=1, states=frozenset({1}))
    assert storages.reserved() == 60 * MIB
    assert storages.reserved(graph=True) == 60 * MIB  # 30 with the states, and 30 of the pool


def test_only_whole_segments_are_given_back():
    allocator = CachingAllocator()
    kept, freed = allocator.allocate(5 * MIB), allocator.allocate(30 * MIB)
    allocator.release(freed)
    allocator.give_back()
    assert allocator.reserved == 20 * MIB
    allocator.release(kept)
    allocator.give_back()
    assert allocator.reserved == 0
