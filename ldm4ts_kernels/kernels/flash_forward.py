"""Exact attention, forward: softmax(scale · Q Kᵀ + mask) V and its LSE; scores stay on chip.

One program owns a block of queries and walks over the keys it may attend, with the online softmax
of Milakov & Gimelshein (arXiv 1805.02867) as FlashAttention-2 orders it (arXiv 2307.08691).
Scores stay in natural units; `unit` turns a score into an exponent of 2, so that the exponent is
one FMA.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ldm4ts_kernels.kernels.launch import Launch
from ldm4ts_kernels.kernels.primitives import (
    INFINITY,
    LN_2,
    accumulate,
    aligned,
    contract,
    keep_weights,
    load_rows,
    load_scale,
    masked_scores,
    online_softmax,
    open_rows,
    scale_parts,
    store_parts,
    zero_parts,
)
from ldm4ts_kernels.kernels.problem import (
    Problem,
    common_step,
    start_at_16_bytes,
    strides_of,
    takes_tensor_maps,
)


@triton.jit
def key_range(
    first_row, Q, K, diagonal, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Return the first key a block of queries may attend, where checks begin, and the end."""
    low = K * 0
    high = K
    whole = (K // BLOCK_K) * BLOCK_K  # every query of the block sees every key below
    if HAS_RIGHT:
        high = tl.maximum(tl.minimum(K, first_row + BLOCK_Q + diagonal + right), 0)
        seen = tl.maximum(tl.minimum(K, first_row + 1 + diagonal + right), 0)
        whole = (seen // BLOCK_K) * BLOCK_K
    if HAS_LEFT:
        low = tl.maximum(first_row + diagonal - left, 0) // BLOCK_K * BLOCK_K
        whole = low
    return low, tl.minimum(whole, high), high


@triton.jit
def _start_again_if_lost(total, row_max, row_sum, PART_1: tl.constexpr):
    """Return whether a sum left what float32 holds, and then fresh sums instead of the given."""
    lost = tl.sum(tl.sum(total[0] * 0.0, 1), 0)  # NaN where a sum is not finite
    if PART_1 > 0:
        lost += tl.sum(tl.sum(total[1] * 0.0, 1), 0)
    again = (tl.max(row_sum, 0) + lost < 2.0**100) == 0
    row_max = tl.where(again, -INFINITY, row_max)
    row_sum = tl.where(again, 0.0, row_sum)
    first = tl.where(again, 0.0, total[0])
    if PART_1 == 0:
        return again, (first,), row_max, row_sum
    else:
        return again, (first, tl.where(again, 0.0, total[1])), row_max, row_sum


@triton.jit(do_not_specialize=["stride_vn"])
def _flash_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, mask_ptr, seed_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_mb, stride_mh, stride_mq, stride_mk,
    H, groups, Q, K, scale, unit, dropout_p, cap, diagonal, left, right,
    D: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, QK_D: tl.constexpr,
    QK_0: tl.constexpr, QK_1: tl.constexpr, QUANT_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    ONE_BLOCK: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr, STEADY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK_Q)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    head_index = tl.program_id(0) // blocks  # of B · H
    batch, head = (head_index // H).to(tl.int64), (head_index % H).to(tl.int64)
    kv_head = head // groups
    q_ptr += batch * aligned(stride_qb, STEP) + head * aligned(stride_qh, STEP)
    k_ptr += batch * aligned(stride_kb, STEP) + kv_head * aligned(stride_kh, STEP)
    v_ptr += batch * aligned(stride_vb, STEP) + kv_head * aligned(stride_vh, STEP)
    o_ptr += batch * aligned(stride_ob, STEP) + head * aligned(stride_oh, STEP)
    stride_qn, stride_kn = aligned(stride_qn, STEP), aligned(stride_kn, STEP)
    stride_vn, stride_on = aligned(stride_vn, STEP), aligned(stride_on, STEP)
    if MASK > 0:
        mask_ptr += batch * stride_mb + head * stride_mh

    rows = first_row + tl.arange(0, BLOCK_Q)
    q_rows = open_rows(q_ptr, stride_qn, Q, BLOCK_Q, QK_0, QK_1, QK_D, TMA)
    k_rows = open_rows(k_ptr, stride_kn, K, BLOCK_K, QK_0, QK_1, QK_D, TMA)
    v_rows = open_rows(v_ptr, stride_vn, K, BLOCK_K, PART_0, PART_1, D, TMA)
    q = load_rows(q_rows, first_row, Q, BLOCK_Q, QK_0, QK_1, QK_D, True, TMA)
    kv_index = batch * (H // groups) + kv_head  # of B · G
    q_scale = 1.0
    if QUANT_ROWS > 0:
        q_scale = load_scale(
            q_scale_ptr, head_index.to(tl.int64), first_row, Q, QUANT_ROWS, BLOCK_Q
        )
    total = zero_parts(BLOCK_Q, PART_0, PART_1)
    row_max = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    low, whole, high = key_range(
        first_row, Q, K, diagonal, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
    )
    # A row may see no key at all, or none in its first blocks: then -inf must not meet -inf.
    MAY_BE_EMPTY: tl.constexpr = (MASK > 0) or HAS_LEFT or HAS_RIGHT
    # Loop 0 takes the whole blocks of keys, loop 2 what is left, with checks. STEADY leaves all but
    # the first block to loop 1, which keeps its maximum: weights above 1 are as precise, and
    # nothing is corrected. Where they overflow, loop 3 starts again, with a maximum that follows.
    first = tl.minimum(low + BLOCK_K, whole)
    for LOOP in tl.static_range(0, 4, 1 if STEADY else 2):
        begin = whole if LOOP == 2 else first if LOOP == 1 else low
        end = high if LOOP >= 2 else first if STEADY and LOOP == 0 else whole
        if LOOP == 3:
            again, total, row_max, row_sum = _start_again_if_lost(total, row_max, row_sum, PART_1)
            begin = tl.where(again, low, high)
        for start in range(begin, end, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_rows(k_rows, start, K, BLOCK_K, QK_0, QK_1, QK_D, LOOP >= 2, TMA)
            factor = q_scale
            if QUANT_ROWS > 0:
                factor *= load_scale(k_scale_ptr, kv_index, start, K, QUANT_ROWS, BLOCK_K)
            scores, _ = masked_scores(
                contract(q, k, QK_1, PRECISION), rows[:, None], columns[None, :],
                mask_ptr, stride_mq, stride_mk, Q, K, factor * scale, cap, diagonal, left, right,
                MASK, HAS_CAP, SCALED, HAS_LEFT, HAS_RIGHT, LOOP >= 2,
            )  # fmt: skip
            own_unit = unit if SCALED else factor * unit
            if LOOP == 1:
                weights = tl.exp2(scores * own_unit - row_max[:, None])
                row_sum += tl.sum(weights, 1)
            else:
                weights, rescale, row_max, row_sum = online_softmax(
                    scores, own_unit, row_max, row_sum, MAY_BE_EMPTY
                )
                if not ONE_BLOCK:  # where nothing came before, there is nothing to correct
                    total = scale_parts(total, rescale[:, None], PART_1)
            if HAS_DROPOUT:
                keep = keep_weights(
                    seed_ptr, head_index, rows[:, None], columns[None, :], dropout_p
                )
                weights = tl.where(keep, weights, 0.0)
            v = load_rows(v_rows, start, K, BLOCK_K, PART_0, PART_1, D, LOOP >= 2, TMA)
            total = accumulate(total, weights, v, PART_1, PRECISION)

    divisor = tl.where(row_sum == 0.0, 1.0, row_sum) * (1.0 - dropout_p)
    total = scale_parts(total, (1.0 / divisor)[:, None], PART_1)
    store_parts(o_ptr, first_row, stride_on, Q, total, BLOCK_Q, PART_0, PART_1, D)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    lse = tl.where(row_max == -INFINITY, -INFINITY, lse)  # a row that sees no key
    tl.store(lse_ptr + head_index.to(tl.int64) * Q + rows, lse, mask=rows < Q)


def flash_forward(
    problem: Problem,
    query: Tensor,  # (B, H, Q, D); int8: (B, H, Q, W)
    key: Tensor,  # (B, G, K, D); int8: (B, G, K, W)
    value: Tensor,  # (B, G, K, D)
    attn_mask: Tensor | None,  # (B, H, Q, K), broadcast by strides
    seed: Tensor | None,  # (1,) int64
    out: Tensor,  # (B, H, Q, D)
    lse: Tensor,  # (B, H, Q) float32, contiguous
    query_scale: Tensor | None = None,  # int8: (B, H, ⌈Q / QUANT_ROWS⌉) float32
    key_scale: Tensor | None = None,  # int8: (B, G, ⌈K / QUANT_ROWS⌉) float32
) -> None:
    """Launch the forward kernel into `out` and `lse`."""
    strides = strides_of((query, key, value, out), attn_mask)
    launch = _plan(problem, strides, start_at_16_bytes(query, key, value))
    launch(_flash_fwd_kernel, query, key, value, query_scale, key_scale, attn_mask, seed, out, lse)


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, strides: tuple[int, ...], aligned: bool) -> Launch:
    tma = takes_tensor_maps(problem, strides[:9], aligned)
    config = problem.config("forward", tma=tma)
    blocks = triton.cdiv(problem.query_length, config.block_q)
    constants = {
        **problem.flags(),
        **config.constants(),
        "TMA": config.tma,
        "STEADY": config.steady,
        "ONE_BLOCK": problem.key_length <= config.block_k,
        "STEP": common_step(strides[:12]),
    }
    numbers = (*strides, *problem.numbers())
    return Launch((blocks * problem.batch * problem.heads,), numbers, constants, config.tma)
