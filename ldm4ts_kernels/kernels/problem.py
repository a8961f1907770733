"""One attention problem as the launchers see it: shapes, options, and the flags that follow."""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ldm4ts_kernels.kernels.tuning import (
    QUANT_ROWS,
    TMA_LENGTH,
    Config,
    choose,
    choose_tma,
    fits_one_block,
    int8_parts,
    split_head_dim,
    stored_width,
)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU


def common_step(strides: tuple[int, ...]) -> int:
    """Return 8, which is 16 bytes of 16-bit elements, if it divides all strides; else 1."""
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def strides_of(
    operands: tuple[Tensor, ...],  # each (B, H, N, D)
    attn_mask: Tensor | None,  # (B, H, Q, K)
) -> tuple[int, ...]:
    """Return the strides of the operands' first three dimensions, then the mask's four or zeros."""
    strides = [stride for tensor in operands for stride in tensor.stride()[:3]]
    return (*strides, *(attn_mask.stride() if attn_mask is not None else (0, 0, 0, 0)))


class Problem(NamedTuple):
    """The shape and options of one attention call; hashable, no data.

    window: keys to the left and right of the diagonal that a query attends; None is unbounded.
    bottom_right: the diagonal ends at the last query and key instead of starting at the first.
    mask: 0 for none, 1 for a boolean one, 2 for one that is added to the scores.
    capability: of the GPU the kernels are tuned for.
    int8: query and key come in INT8, with a scale every QUANT_ROWS rows.
    """

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    capability: tuple[int, int] = (9, 0)
    mask: int = 0
    dropout_p: float = 0.0
    softcap: float | None = None
    window: tuple[int | None, int | None] = (None, None)
    bottom_right: bool = False
    int8: bool = False

    @property
    def scaled(self) -> bool:
        """Whether scores must be scaled before the exponent, rather than by its unit."""
        return self.mask == 2 or self.softcap is not None or self.scale <= 0.0

    def config(self, stage: str, *, tma: bool = False) -> Config:
        """Return the tile of a pass, with tensor maps where `tma` allows and they gain."""
        if self.int8 and stage != "one_block":
            stage = f"int8_{stage}"
        if tma:
            bfloat16 = self.dtype == torch.bfloat16
            fast = choose_tma(stage, self.head_dim, self.key_length, self.plain, bfloat16)
            if fast is not None:
                return fast
        return choose(
            stage,
            self.head_dim,
            self.dtype.itemsize,
            self.key_length,
            self.capability,
            self.mask != 0,
        )

    @property
    def plain(self) -> bool:
        """Whether every query attends every key, by nothing but the softmax of their products."""
        return not (self.mask or self.scaled or self.dropout_p) and self.window == (None, None)

    @property
    def one_block(self) -> bool:
        """Whether the backward holds all keys of a head in one block, and takes one launch."""
        return fits_one_block(self.head_dim, self.dtype.itemsize, self.key_length, self.capability)

    def lengths(self) -> tuple[int, int, int, int]:
        """Return the kernels' run-time sizes: heads, heads a key head, queries and keys."""
        heads_a_group = self.heads // self.kv_heads
        return self.heads, heads_a_group, self.query_length, self.key_length

    def band(self) -> tuple[int, int, int]:
        """Return where the diagonal begins and how far to its left and right queries attend."""
        diagonal = self.key_length - self.query_length if self.bottom_right else 0
        left, right = self.window
        return diagonal, left or 0, right or 0

    def numbers(self) -> tuple[float, ...]:
        """Return the kernels' run-time numbers, in their order: from H to right."""
        return (
            *self.lengths(),
            self.scale,
            math.log2(math.e) * (1.0 if self.scaled else self.scale),
            self.dropout_p,
            1.0 if self.softcap is None else self.softcap,
            *self.band(),
        )

    def flags(self) -> dict[str, int | bool | str]:
        """Return the kernels' compile-time flags."""
        part_0, part_1 = split_head_dim(self.head_dim, self.capability)
        qk_0, qk_1 = int8_parts(self.head_dim) if self.int8 else (part_0, part_1)
        return {
            "D": self.head_dim,
            "PART_0": part_0,
            "PART_1": part_1,
            "QK_D": stored_width(self.head_dim) if self.int8 else self.head_dim,
            "QK_0": qk_0,
            "QK_1": qk_1,
            "QUANT_ROWS": QUANT_ROWS if self.int8 else 0,
            "MASK": self.mask,
            "HAS_DROPOUT": self.dropout_p > 0.0,
            "HAS_CAP": self.softcap is not None,
            "SCALED": self.scaled,
            "HAS_LEFT": self.window[0] is not None,
            "HAS_RIGHT": self.window[1] is not None,
            # float32 inputs keep float32 accuracy: three tf32 products instead of one.
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "tf32",
        }


def start_at_16_bytes(*operands: Tensor) -> bool:
    """Whether every operand's first element lies where 16 bytes can be loaded at once."""
    pointers = 0
    for tensor in operands:
        pointers |= tensor.data_ptr()
    return pointers % 16 == 0


def takes_tensor_maps(problem: Problem, strides: tuple[int, ...], aligned: bool) -> bool:
    """Whether Hopper's copy engine can load such operands, and gains: long rows, 16-byte steps.

    A mask's own tiles take the shared memory that these tiles were measured with.
    """
    return (
        aligned
        and not problem.mask
        and problem.capability[0] == 9
        and problem.dtype.itemsize == 2
        and min(problem.query_length, problem.key_length) >= TMA_LENGTH
        and common_step(strides) == 8
        and not INTERPRET
    )
