"""Every tile of the Triton kernels: one row a (pass, head dim), by the GPU's shared memory.

`choose` is a pure function of the shape class, so that a launch costs one cached look-up.
"""

import functools
from dataclasses import dataclass

import triton


@dataclass(frozen=True, slots=True)
class Config:
    """The tile of one launch: queries and keys a block, warps a block, loads in flight.

    tma: operands are loaded by Hopper's copy engine, through tensor maps.
    steady: softmax keeps the maximum of the first block of keys, so that later sums need no
        correction, and starts again with one that follows where a row leaves float32 that way.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    steady: bool = False

    def constants(self) -> dict[str, int]:
        """Return what every launch passes to its kernel and to Triton."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Shared memory a block may use: sm_80 163 KiB, sm_86/89/120 99 KiB, sm_90 227 KiB. A GPU takes the
# rows of the largest class that fits it.
SMALL, MEDIUM, LARGE = 99 * 1024, 163 * 1024, 227 * 1024


def shared_memory(capability: tuple[int, int]) -> int:
    """Return the shared memory a block may use, in bytes, as the class it is tuned for."""
    if capability[0] == 9:
        return LARGE
    if capability == (8, 0) or capability[0] in (10, 11):
        return MEDIUM
    return SMALL


def split_head_dim(
    head_dim: int, capability: tuple[int, int] = (8, 0), least: int = 16
) -> tuple[int, int]:
    """Cut a head dim into two powers of two of at least `least`, the second 0 where one covers it.

    40 → (32, 16), 48 → (32, 16), 80 → (64, 16), 96 → (64, 32), 160 → (128, 32), 111 → (128, 0).

    On Hopper the first part is at least 64, so 40 → (64, 0): measured on an H200 at 4 x 8 heads,
    N 4096, bf16, 40 as 32 + 16 took 0.554 ms forward and 1.85 backward, 64 whole 0.352 and 1.07.
    """
    whole = max(least, triton.next_power_of_2(head_dim))
    first = whole // 2
    rest = max(least, triton.next_power_of_2(head_dim - first)) if head_dim > first else 0
    if first < max(least, 64 if capability[0] == 9 else 0) or rest >= first:
        return whole, 0
    return first, rest


def stored_width(head_dim: int) -> int:
    """Return the bytes of a row of INT8 query or key: whole 16, which every load then knows."""
    return triton.cdiv(head_dim, 16) * 16


def int8_parts(head_dim: int) -> tuple[int, int]:
    """Return the split of the head dim for INT8 products, which contract 32 columns at least."""
    return split_head_dim(head_dim, least=32)


# Rows: (largest padded head dim) → (block_q, block_k, num_warps, num_stages), 16-bit elements.
# SMALL and MEDIUM by the offline compiler's registers, spills and shared memory alone, as all rows
# of 512, the autoencoder's single head, which float32 does not fit. LARGE:
# NVIDIA H200, torch 2.11, Triton 3.6, 2026-11-23, by
#     python -m benchmarks.tune --head-dim 40 64 80 128 160 --length 4096
FORWARD = {
    SMALL: {64: (128, 64, 4, 3), 96: (128, 64, 8, 2), 128: (128, 32, 4, 2), 256: (64, 32, 4, 2),
            512: (64, 16, 8, 1)},
    MEDIUM: {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 160: (128, 32, 8, 3), 256: (64, 32, 4, 2),
             512: (64, 16, 8, 1)},
    LARGE: {96: (128, 64, 8, 3), 128: (128, 128, 8, 3), 160: (128, 64, 8, 3), 256: (128, 64, 8, 2),
            512: (64, 32, 8, 2)},
}  # fmt: skip
KEY_GRADIENT = {
    SMALL: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 160: (32, 32, 4, 1), 256: (16, 32, 4, 1),
            512: (16, 16, 8, 1)},
    MEDIUM: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 160: (32, 32, 4, 2), 256: (32, 32, 8, 1),
             512: (16, 32, 8, 1)},
    LARGE: {96: (64, 64, 4, 3), 128: (64, 128, 8, 3), 160: (64, 64, 8, 2), 256: (32, 64, 8, 2),
            512: (16, 32, 8, 1)},
}  # fmt: skip
QUERY_GRADIENT = {
    SMALL: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 160: (32, 32, 4, 1), 256: (32, 16, 4, 1),
            512: (32, 16, 8, 1)},
    MEDIUM: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 160: (32, 32, 4, 2), 256: (32, 32, 8, 1),
             512: (32, 32, 8, 1)},
    LARGE: {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 160: (64, 64, 4, 2), 256: (64, 32, 8, 2),
            512: (32, 32, 8, 1)},
}  # fmt: skip
ONE_BLOCK = {
    SMALL: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 160: (32, 32, 4, 1), 256: (16, 32, 4, 1),
            512: (16, 16, 8, 1)},
    MEDIUM: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 160: (32, 32, 4, 2), 256: (32, 32, 8, 1),
             512: (16, 16, 8, 1)},
    LARGE: {64: (64, 64, 4, 3), 128: (64, 64, 8, 2), 160: (32, 64, 8, 2), 256: (32, 64, 8, 2),
            512: (16, 16, 8, 1)},
}  # fmt: skip
# LARGE: NVIDIA H200, torch 2.11, Triton 3.6, 2026-11-23, bf16, best by graph replay of 7 to 12 rows
# a pass at head dims 40, 64, 80, 128, 160 and 256, N 4096 to 4608; forward at 160 on an H100,
# 2026-11-27, the fastest of five that do not spill, fp16, N 4096. The others as above.
INT8_FORWARD = {
    SMALL: {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 4, 2)},
    MEDIUM: {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 160: (128, 64, 8, 2), 256: (64, 32, 4, 2)},
    LARGE: {64: (64, 64, 4, 3), 128: (128, 64, 4, 3), 256: (128, 64, 8, 3)},
}
INT8_KEY_GRADIENT = {
    SMALL: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 160: (16, 64, 4, 1), 256: (32, 32, 8, 1)},
    MEDIUM: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 160: (16, 64, 4, 2), 256: (32, 32, 8, 1)},
    LARGE: {96: (64, 64, 4, 3), 128: (64, 128, 8, 3), 160: (64, 64, 8, 2), 256: (32, 64, 8, 2)},
}
INT8_QUERY_GRADIENT = {
    SMALL: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 160: (64, 16, 4, 1), 256: (32, 32, 8, 1)},
    MEDIUM: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 160: (64, 16, 4, 2), 256: (32, 32, 8, 1)},
    LARGE: {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 160: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
}
TABLES = {
    "forward": FORWARD,
    "key_gradient": KEY_GRADIENT,
    "query_gradient": QUERY_GRADIENT,
    "one_block": ONE_BLOCK,
    "int8_forward": INT8_FORWARD,
    "int8_key_gradient": INT8_KEY_GRADIENT,
    "int8_query_gradient": INT8_QUERY_GRADIENT,
}
ANY = 2**31
Row = tuple[int, int, int, int] | tuple[int, int, int, int, str]
# Rows for few keys, LARGE, head dims from 16 on and 16-bit elements without a mask, in place of
# those above: (largest padded head dim, most keys) → row, None where that above stays. NVIDIA H100,
# torch 2.11, Triton 3.6, 2026-11-27, bf16, 4 x 8 heads, best by graph replay of 3 to 8 rows a
# shape: forward at 784 tokens of head dim 16, 196 of 32 and 80, 256 of 160, and 784 and 4096
# queries of 77 keys at 40; gradients of keys and queries at the first three; one_block at the two
# of 77 keys; int8_forward at 256, 300 and 500 tokens of 160. Head dims and lengths between them
# take the same row, untimed.
SHORT = {
    "forward": {(160, 64): None, (64, 128): (64, 32, 4, 2), (160, 128): None,
                (16, 1023): (64, 64, 4, 3), (160, 511): (64, 64, 4, 3)},
    "key_gradient": {(16, 511): None, (16, 1023): (64, 128, 4, 3)},
    "query_gradient": {(64, 511): (64, 64, 4, 2), (96, 511): (64, 64, 4, 3)},
    "one_block": {(64, 64): None, (64, 128): (128, 64, 8, 2)},
    "int8_forward": {(128, 511): None, (160, 511): (64, 64, 4, 2)},
}  # fmt: skip
# Rows for Hopper's tensor maps, 16-bit elements, where `problem.takes_tensor_maps`: (largest head
# dim, most keys) → row, None where pointers are faster. A last word keeps a maximum (steady); where
# that may not be, the row of the second table stands in. None has Triton's specialised warps, which
# lose rows where another process shares the GPU (docs/triton.md).
# NVIDIA H100, torch 2.11, Triton 3.6, 2026-11-27, bf16, best by graph replay of 2 to 5 rows a
# shape, pointers among them where none is given: lengths 784 (head dims 40 and 64), 1024 (80),
# 4096 (40, 64, 80 and 160), 4608 (128), 16384 (128) and 17776 (64). Between two of these lengths a
# row changes by guess. `python -m benchmarks.tune` compares such rows at lengths of one's own.
TMA = {
    "forward": {(48, ANY): (128, 64, 4, 3, "steady"), (64, 2047): (64, 64, 4, 2, "steady"),
                (64, ANY): (128, 64, 8, 3, "steady"), (96, ANY): (128, 64, 4, 3, "steady"),
                (128, 8192): (64, 64, 4, 3, "steady"), (128, ANY): (128, 128, 8, 3, "steady"),
                (160, ANY): (128, 32, 4, 3, "steady")},
    "key_gradient": {(48, 2047): None, (64, ANY): (64, 64, 4, 3), (96, ANY): None,
                     (128, ANY): (64, 128, 8, 3), (160, ANY): (32, 64, 4, 3)},
    "query_gradient": {(64, ANY): (128, 64, 8, 3), (96, ANY): (64, 64, 4, 3),
                       (160, ANY): (128, 64, 8, 3)},
    "int8_forward": {(48, ANY): (128, 64, 4, 3, "steady"), (64, 2047): (64, 64, 4, 2, "steady"),
                     (64, 8192): (64, 64, 4, 3, "steady"), (96, ANY): (128, 64, 4, 3, "steady"),
                     (128, ANY): (64, 128, 4, 2, "steady"), (160, ANY): (64, 64, 4, 3, "steady")},
    "int8_key_gradient": {(48, ANY): None, (64, ANY): (64, 64, 4, 3), (96, 2047): None,
                          (96, ANY): (64, 64, 4, 3), (128, ANY): (64, 128, 8, 3),
                          (160, ANY): (32, 64, 4, 3)},
    "int8_query_gradient": {(96, ANY): (64, 64, 4, 3), (160, ANY): (128, 64, 8, 3)},
}  # fmt: skip
TMA_PLAIN = {
    "forward": {(48, ANY): (128, 64, 4, 3), (64, ANY): (64, 128, 4, 2), (96, ANY): (128, 64, 4, 3),
                (128, 8192): (64, 64, 4, 3), (128, ANY): (128, 128, 8, 3),
                (160, ANY): (128, 32, 4, 3)},
    "int8_forward": {(48, ANY): None, (128, ANY): (64, 128, 4, 2), (160, ANY): None},
}  # fmt: skip
TMA_HEAD_DIM = 40  # at least
TMA_LENGTH = 512  # queries and keys, at least
# Rows of query or key that share one INT8 scale. Every tile that a kernel walks over divides it, so
# that it has one scale.
QUANT_ROWS = 128
MEAN_PARTS, MEAN_ROWS = 16, 64  # a head's token mean: parts at most, rows a load
ONE_BLOCK_KEYS = 128  # a backward whose keys fit one block needs one launch


def _row(table: dict[tuple[int, int], Row | None], head_dim: int, key_length: int) -> Row | None:
    """Return the first row of a table that is for the head dim and length; None for none."""
    return next((table[d, n] for d, n in table if head_dim <= d and key_length <= n), None)


@functools.cache
def choose(
    stage: str,
    head_dim: int,
    itemsize: int,
    key_length: int,
    capability: tuple[int, int],
    masked: bool = False,
) -> Config:
    """Return the tile of a pass: a key of `TABLES`."""
    padded = sum(split_head_dim(head_dim, capability))
    table = TABLES[stage][shared_memory(capability)]
    row = next(row for top, row in table.items() if padded <= top)
    if head_dim >= 16 and itemsize == 2 and not masked and shared_memory(capability) == LARGE:
        row = _row(SHORT.get(stage, {}), padded, key_length) or row
    block_q, block_k, warps, stages = row
    if itemsize == 4:  # two warpgroups on 64 float32 rows read past their tile on an H200
        shrink = 2 if padded < 128 else 4  # wider tiles spill
        block_q, block_k = max(16, block_q // shrink), max(16, block_k // shrink)
        warps, stages = 4, 1
    if masked:  # the tiles of the mask take shared memory, too
        block_k, stages = min(block_k, 64), max(1, stages - 1)
    short = max(16, triton.next_power_of_2(key_length))
    if stage == "one_block":
        block_q, block_k, stages = max(16, block_q // (short // block_k or 1)), short, 1
    return Config(block_q, min(block_k, short), warps, stages)


@functools.cache
def choose_tma(
    stage: str, head_dim: int, key_length: int, plain: bool, bfloat16: bool
) -> Config | None:
    """Return a pass's tile with tensor maps; None where pointers are as fast.

    plain: no mask, window, cap or dropout, so that whole blocks of keys need no check.
    bfloat16: weights may be far above 1, as they are where a maximum is kept.
    """
    row = _row(TMA.get(stage, {}), head_dim, key_length)
    if row is None or head_dim < TMA_HEAD_DIM:
        return None
    steady = row[4:] == ("steady",)
    if steady and not (plain and bfloat16):
        row, steady = _row(TMA_PLAIN[stage], head_dim, key_length), False
        if row is None:
            return None
    return Config(*row[:4], tma=True, steady=steady)


def fits_one_block(
    head_dim: int, itemsize: int, key_length: int, capability: tuple[int, int]
) -> bool:
    """Whether the keys and values of a head, and their gradients, fit one block of the backward."""
    short = max(16, triton.next_power_of_2(key_length))
    width = sum(split_head_dim(head_dim, capability))
    return short <= ONE_BLOCK_KEYS and short * width * itemsize <= 16384
