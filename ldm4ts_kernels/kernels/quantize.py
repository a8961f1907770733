"""INT8 query and key, a scale every QUANT_ROWS rows, after the key lost its token mean.

    k ← k - mean over tokens of k,   scale = max |x| / 127,   x_int8 = round(x / scale)

The softmax does not see what all keys of a head have in common, but the largest value of a block
does: without its channel bias a key keeps its bits for what tells tokens apart (SageAttention,
arXiv 2410.02367, section 4.2). Two launches: INT8 query, and sums of the key over parts of the
tokens; then mean and INT8 key. Sums have a fixed order, so the result is the same in every run.
Rows are stored in a multiple of 16 bytes, which the loads of every kernel then know.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm4ts_kernels.kernels.launch import Launch
from ldm4ts_kernels.kernels.primitives import (
    add_parts,
    aligned,
    float32_parts,
    load_parts,
    store_parts,
    zero_parts,
)
from ldm4ts_kernels.kernels.problem import Problem, common_step, strides_of
from ldm4ts_kernels.kernels.tuning import (
    MEAN_PARTS,
    MEAN_ROWS,
    QUANT_ROWS,
    int8_parts,
    stored_width,
)

LARGEST = tl.constexpr(127.0)
SMALLEST = tl.constexpr(1e-30)  # its reciprocal is finite; below it a block counts as zeros
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23


class Quantised(NamedTuple):
    """Query and key in INT8: x ≈ int8 · scale[row // QUANT_ROWS]; W is D in whole 16 bytes."""

    query: Tensor  # (B, H, Q, W) int8
    query_scale: Tensor  # (B, H, ⌈Q / QUANT_ROWS⌉) float32
    key: Tensor  # (B, G, K, W) int8, of key - key_mean
    key_scale: Tensor  # (B, G, ⌈K / QUANT_ROWS⌉) float32
    key_mean: Tensor  # (B, G, W) float32


@triton.jit
def _store_row(ptr, row, FIRST: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    columns = FIRST + tl.arange(0, PART)
    tl.store(ptr + columns, row, mask=columns < WIDTH)


@triton.jit
def _mean_part(
    sum_ptr, parts, K, WIDTH: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Return the token mean of one head's key from its partial sums: (PART,) float32."""
    rows = tl.arange(0, MAX_PARTS)[:, None]
    columns = FIRST + tl.arange(0, PART)[None, :]
    inside = (rows < parts) & (columns < WIDTH)
    return tl.sum(tl.load(sum_ptr + rows * WIDTH + columns, mask=inside, other=0.0), 0) / K


@triton.jit
def _load_mean(
    sum_ptr, parts, K, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):  # fmt: skip
    first = _mean_part(sum_ptr, parts, K, WIDTH, 0, QK_0, MAX_PARTS)
    if QK_1 == 0:
        return (first,)
    else:
        return (first, _mean_part(sum_ptr, parts, K, WIDTH, QK_0, QK_1, MAX_PARTS))


@triton.jit
def _largest(x):
    """Return max |x| of a tile; NaN where a value is not finite, which a maximum would hide."""
    return tl.max(tl.max(tl.abs(x), 1), 0) + tl.sum(tl.sum(x * 0.0, 1), 0)


@triton.jit
def _round(x):
    """Return x, half to even, as INT8: the last byte of x + 1.5 · 2^23."""
    return (x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _quantise_and_store(
    ptr, scale_ptr, x, start, length, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    largest = _largest(x[0])
    if QK_1 > 0:
        other = _largest(x[1])
        largest = tl.maximum(largest, other) + (largest + other) * 0.0  # a maximum drops NaN
    largest = tl.where(largest < SMALLEST, SMALLEST, largest)
    # Ties are common in 16 bits: divide with rounding, which a GPU otherwise does not.
    tl.store(scale_ptr + start // BLOCK, tl.div_rn(largest, LARGEST))
    factor = tl.div_rn(LARGEST, largest)
    if QK_1 == 0:
        rounded = (_round(x[0] * factor),)
    else:
        rounded = (_round(x[0] * factor), _round(x[1] * factor))
    store_parts(ptr, start, WIDTH, length, rounded, BLOCK, QK_0, QK_1, WIDTH)


@triton.jit
def _without_mean(k, mean, inside):
    return tl.where(inside[:, None], k.to(tl.float32) - mean[None, :], 0.0)


@triton.jit
def _quantise_query(
    ptr, int8_ptr, scale_ptr, stride_b, stride_h, stride_n, program, H, Q,
    D: tl.constexpr, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK)
    start = (program % blocks) * BLOCK
    head_index = (program // blocks).to(tl.int64)
    ptr += (head_index // H) * aligned(stride_b, STEP)
    ptr += (head_index % H) * aligned(stride_h, STEP)
    q = load_parts(ptr, start, aligned(stride_n, STEP), Q, BLOCK, QK_0, QK_1, D, True)
    _quantise_and_store(
        int8_ptr + head_index * Q * WIDTH, scale_ptr + head_index * blocks,
        float32_parts(q, QK_1), start, Q, WIDTH, QK_0, QK_1, BLOCK,
    )  # fmt: skip


@triton.jit
def _sum_key(
    ptr, sum_ptr, stride_b, stride_h, stride_n, program, kv_heads, K, parts, rows_a_part,
    D: tl.constexpr, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the sum of one head's keys over one part of the tokens."""
    part = program % parts
    head_index = (program // parts).to(tl.int64)
    ptr += (head_index // kv_heads) * aligned(stride_b, STEP)
    ptr += (head_index % kv_heads) * aligned(stride_h, STEP)
    row = aligned(stride_n, STEP)
    low = part * rows_a_part
    high = tl.minimum(K, low + rows_a_part)
    total = zero_parts(ROWS, QK_0, QK_1)
    for start in range(low, high, ROWS):
        k = load_parts(ptr, start, row, high, ROWS, QK_0, QK_1, D, True)
        total = add_parts(total, float32_parts(k, QK_1), QK_1)
    sum_ptr += (head_index * parts + part) * WIDTH
    _store_row(sum_ptr, tl.sum(total[0], 0), 0, WIDTH, QK_0)
    if QK_1 > 0:
        _store_row(sum_ptr, tl.sum(total[1], 0), QK_0, WIDTH, QK_1)


# What a branch on a run-time number sets must have one type in both: strides and lengths of 1 are
# compile-time constants, so each branch is a function of its own.
@triton.jit
def _query_kernel(
    q_ptr, k_ptr, q_int8_ptr, q_scale_ptr, sum_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    H, groups, Q, K, parts, rows_a_part, query_programs,
    D: tl.constexpr, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr, MEAN_ROWS: tl.constexpr,
):  # fmt: skip
    """Quantise one block of the query or, in the programs that follow those, sum keys."""
    program = tl.program_id(0)
    if program < query_programs:
        _quantise_query(
            q_ptr, q_int8_ptr, q_scale_ptr, stride_qb, stride_qh, stride_qn, program, H, Q,
            D, WIDTH, QK_0, QK_1, STEP, BLOCK,
        )  # fmt: skip
    else:
        _sum_key(
            k_ptr, sum_ptr, stride_kb, stride_kh, stride_kn, program - query_programs,
            H // groups, K, parts, rows_a_part, D, WIDTH, QK_0, QK_1, STEP, MEAN_ROWS,
        )  # fmt: skip


@triton.jit
def _quantise_key(
    ptr, sum_ptr, int8_ptr, scale_ptr, mean_ptr, stride_b, stride_h, stride_n, program, kv_heads,
    K, parts, D: tl.constexpr, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr,
    STEP: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK)
    start = (program % blocks) * BLOCK
    head_index = (program // blocks).to(tl.int64)
    ptr += (head_index // kv_heads) * aligned(stride_b, STEP)
    ptr += (head_index % kv_heads) * aligned(stride_h, STEP)
    k = load_parts(ptr, start, aligned(stride_n, STEP), K, BLOCK, QK_0, QK_1, D, True)
    sum_ptr += head_index * parts * WIDTH
    mean = _load_mean(sum_ptr, parts, K, WIDTH, QK_0, QK_1, MAX_PARTS)
    if start == 0:
        _store_row(mean_ptr + head_index * WIDTH, mean[0], 0, WIDTH, QK_0)
        if QK_1 > 0:
            _store_row(mean_ptr + head_index * WIDTH, mean[1], QK_0, WIDTH, QK_1)
    inside = start + tl.arange(0, BLOCK) < K
    if QK_1 == 0:
        k = (_without_mean(k[0], mean[0], inside),)
    else:
        k = (_without_mean(k[0], mean[0], inside), _without_mean(k[1], mean[1], inside))
    _quantise_and_store(
        int8_ptr + head_index * K * WIDTH, scale_ptr + head_index * blocks, k, start, K,
        WIDTH, QK_0, QK_1, BLOCK,
    )  # fmt: skip


@triton.jit
def _store_shift(
    ptr, sum_ptr, shift_ptr, stride_b, stride_h, stride_n, program, H, groups, Q, K, scale, parts,
    D: tl.constexpr, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr,
    STEP: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK)
    start = (program % blocks) * BLOCK
    head_index = (program // blocks).to(tl.int64)
    batch, head = head_index // H, head_index % H
    ptr += batch * aligned(stride_b, STEP) + head * aligned(stride_h, STEP)
    q = load_parts(ptr, start, aligned(stride_n, STEP), Q, BLOCK, QK_0, QK_1, D, True)
    sum_ptr += (batch * (H // groups) + head // groups) * parts * WIDTH
    mean = _load_mean(sum_ptr, parts, K, WIDTH, QK_0, QK_1, MAX_PARTS)
    shift = tl.sum(q[0].to(tl.float32) * mean[0][None, :], 1)
    if QK_1 > 0:
        shift += tl.sum(q[1].to(tl.float32) * mean[1][None, :], 1)
    rows = start + tl.arange(0, BLOCK)
    tl.store(shift_ptr + head_index * Q + rows, shift * scale, mask=rows < Q)


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, sum_ptr, k_int8_ptr, k_scale_ptr, mean_ptr, shift_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    H, groups, Q, K, scale, parts, key_programs,
    D: tl.constexpr, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr,
    STEP: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise one block of the key or, in the programs that follow those, store rows' shift.

    Without a pointer to the shift no such programs follow, and none may be compiled.
    """
    program = tl.program_id(0)
    if program < key_programs:
        _quantise_key(
            k_ptr, sum_ptr, k_int8_ptr, k_scale_ptr, mean_ptr, stride_kb, stride_kh, stride_kn,
            program, H // groups, K, parts, D, WIDTH, QK_0, QK_1, STEP, MAX_PARTS, BLOCK,
        )  # fmt: skip
    else:
        if shift_ptr is not None:
            _store_shift(
                q_ptr, sum_ptr, shift_ptr, stride_qb, stride_qh, stride_qn, program - key_programs,
                H, groups, Q, K, scale, parts, D, WIDTH, QK_0, QK_1, STEP, MAX_PARTS, BLOCK,
            )  # fmt: skip


def empty_quantised(query: Tensor, key: Tensor) -> Quantised:
    """Allocate what `quantise` fills, from query (B, H, Q, D) and key (B, G, K, D)."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    width = stored_width(head_dim)
    float32 = {"dtype": torch.float32}
    return Quantised(
        query.new_empty(batch, heads, queries, width, dtype=torch.int8),
        query.new_empty(batch, heads, triton.cdiv(queries, QUANT_ROWS), **float32),
        key.new_empty(batch, kv_heads, keys, width, dtype=torch.int8),
        key.new_empty(batch, kv_heads, triton.cdiv(keys, QUANT_ROWS), **float32),
        key.new_empty(batch, kv_heads, width, **float32),
    )


def query_strides(problem: Problem) -> tuple[int, int, int]:
    """Return the first three strides of `Quantised.query`."""
    width = stored_width(problem.head_dim)
    head = problem.query_length * width
    return problem.heads * head, head, width


def quantise(
    problem: Problem,
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    result: Quantised,
    lse_shift: Tensor | None,  # (B, H, Q) float32
) -> None:
    """Launch the two kernels that fill `result` and, where given, `lse_shift`.

    The shift, scale · query · key_mean, is what smoothing the key takes from every score of a row,
    and so from its LSE.

    A value that is not finite makes the scale of its block NaN, and in the key the mean of its
    channel: it reaches every row of the block or head, and is never rounded away.
    """
    strides = strides_of((query, key), None)[:6]
    of_query, of_key, shape = _plan(problem, strides, lse_shift is not None)
    sums = key.new_empty(shape, dtype=torch.float32)
    of_query(_query_kernel, query, key, result.query, result.query_scale, sums)
    of_key(_key_kernel, query, key, sums, *result[2:], lse_shift)


@functools.lru_cache(maxsize=1024)
def _plan(
    problem: Problem,
    strides: tuple[int, ...],  # of query and key
    has_shift: bool,
) -> tuple[Launch, Launch, tuple[int, int, int]]:
    """Return the two launches, and the shape of the sums between them."""
    part_0, part_1 = int8_parts(problem.head_dim)
    flags = {
        "D": problem.head_dim,
        "WIDTH": stored_width(problem.head_dim),
        "QK_0": part_0,
        "QK_1": part_1,
        "STEP": common_step(strides),
        "BLOCK": QUANT_ROWS,
        "num_warps": 4 if problem.head_dim <= 64 else 8,
        # x · factor is rounded before ROUNDER is added, as the oracle does.
        "enable_fp_fusion": False,
    }
    rows_a_part = triton.cdiv(triton.cdiv(problem.key_length, MEAN_PARTS), MEAN_ROWS) * MEAN_ROWS
    parts = triton.cdiv(problem.key_length, rows_a_part)
    kv_heads = problem.batch * problem.kv_heads
    of_queries = problem.batch * problem.heads * triton.cdiv(problem.query_length, QUANT_ROWS)
    of_keys = kv_heads * triton.cdiv(problem.key_length, QUANT_ROWS)
    of_query = Launch(
        (of_queries + kv_heads * parts,),
        (*strides, *problem.lengths(), parts, rows_a_part, of_queries),
        {**flags, "MEAN_ROWS": MEAN_ROWS},
    )
    of_key = Launch(
        (of_keys + (of_queries if has_shift else 0),),
        (*strides, *problem.lengths(), problem.scale, parts, of_keys),
        {**flags, "MAX_PARTS": MEAN_PARTS},
    )
    return of_query, of_key, (kv_heads, parts, flags["WIDTH"])
