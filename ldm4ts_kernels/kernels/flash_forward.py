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
def _flash_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_mb, stride_mh, stride_mq, stride_mk,
    H, groups, Q, K, scale, unit, dropout_p, cap, diagonal, left, right,
    D: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_CAP: tl.constexpr, SCALED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    ONE_BLOCK: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr, SPECIALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK_Q)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    head_index = tl.program_id(0) // blocks  # of B · H
    batch, head = (head_index // H).to(tl.int64), (head_index % H).to(tl.int64)
    q_ptr += batch * aligned(stride_qb, STEP) + head * aligned(stride_qh, STEP)
    k_ptr += batch * aligned(stride_kb, STEP) + (head // groups) * aligned(stride_kh, STEP)
    v_ptr += batch * aligned(stride_vb, STEP) + (head // groups) * aligned(stride_vh, STEP)
    o_ptr += batch * aligned(stride_ob, STEP) + head * aligned(stride_oh, STEP)
    stride_qn, stride_kn = aligned(stride_qn, STEP), aligned(stride_kn, STEP)
    stride_vn, stride_on = aligned(stride_vn, STEP), aligned(stride_on, STEP)
    if MASK > 0:
        mask_ptr += batch * stride_mb + head * stride_mh

    rows = first_row + tl.arange(0, BLOCK_Q)
    # For its second group of specialised warps Triton 3.6 adds 64 to the number that places a load,
    # and so to all else made of it. Hence one that has no other use: 0, not known to be a constant.
    zero = tl.program_id(1)
    q_rows = open_rows(
        q_ptr + first_row.to(tl.int64) * stride_qn, stride_qn, Q - first_row,
        BLOCK_Q, PART_0, PART_1, D, TMA,
    )  # fmt: skip
    k_rows = open_rows(k_ptr, stride_kn, K, BLOCK_K, PART_0, PART_1, D, TMA)
    v_rows = open_rows(v_ptr, stride_vn, K, BLOCK_K, PART_0, PART_1, D, TMA)
    q = load_rows(q_rows, zero, Q - first_row, BLOCK_Q, PART_0, PART_1, D, True, TMA)
    total = zero_parts(BLOCK_Q, PART_0, PART_1)
    row_max = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    units = tl.full((BLOCK_Q,), unit, tl.float32)
    low, whole, high = key_range(
        first_row, Q, K, diagonal, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
    )
    # A row may see no key at all, or none in its first blocks: then -inf must not meet -inf.
    MAY_BE_EMPTY: tl.constexpr = (MASK > 0) or HAS_LEFT or HAS_RIGHT
    # Specialised warps, some loading and some computing, take one loop: all blocks are whole.
    for CHECK in tl.static_range(1 if SPECIALISE else 2):
        begin = whole if CHECK == 1 else low
        end = high if CHECK == 1 else whole
        for start in tl.range(begin, end, BLOCK_K, warp_specialize=SPECIALISE):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_rows(k_rows, start, K, BLOCK_K, PART_0, PART_1, D, CHECK == 1, TMA)
            scores, _ = masked_scores(
                contract(q, k, PART_1, PRECISION), rows[:, None], columns[None, :],
                mask_ptr, stride_mq, stride_mk, Q, K, scale, cap, diagonal, left, right,
                MASK, HAS_CAP, SCALED, HAS_LEFT, HAS_RIGHT, CHECK == 1,
            )  # fmt: skip
            weights, rescale, row_max, row_sum = online_softmax(
                scores, units, row_max, row_sum, MAY_BE_EMPTY
            )
            if not ONE_BLOCK:  # where nothing came before, there is nothing to correct
                total = scale_parts(total, rescale[:, None], PART_1)
            if HAS_DROPOUT:
                keep = keep_weights(
                    seed_ptr, head_index, rows[:, None], columns[None, :], dropout_p
                )
                weights = tl.where(keep, weights, 0.0)
            v = load_rows(v_rows, start, K, BLOCK_K, PART_0, PART_1, D, CHECK == 1, TMA)
            total = accumulate(total, weights, v, PART_1, PRECISION)

    divisor = tl.where(row_sum == 0.0, 1.0, row_sum) * (1.0 - dropout_p)
    total = scale_parts(total, (1.0 / divisor)[:, None], PART_1)
    store_parts(o_ptr, first_row, stride_on, Q, total, BLOCK_Q, PART_0, PART_1, D)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    lse = tl.where(row_max == -INFINITY, -INFINITY, lse)  # a row that sees no key
    tl.store(lse_ptr + head_index.to(tl.int64) * Q + rows, lse, mask=rows < Q)


def flash_forward(
    problem: Problem,
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, D)
    attn_mask: Tensor | None,  # (B, H, Q, K), broadcast by strides
    seed: Tensor | None,  # (1,) int64
    out: Tensor,  # (B, H, Q, D)
    lse: Tensor,  # (B, H, Q) float32, contiguous
) -> None:
    """Launch the forward kernel into `out` and `lse`."""
    strides = strides_of((query, key, value, out), attn_mask)
    launch = _plan(problem, strides, start_at_16_bytes(query, key, value))
    launch(_flash_fwd_kernel, query, key, value, attn_mask, seed, out, lse)


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, strides: tuple[int, ...], aligned: bool) -> Launch:
    tma = takes_tensor_maps(problem, strides[:9], aligned)
    config = problem.config("forward", tma=tma)
    blocks = triton.cdiv(problem.query_length, config.block_q)
    constants = {
        **problem.flags(),
        **config.constants(),
        "TMA": config.tma,
        "SPECIALISE": config.specialise,
        "ONE_BLOCK": problem.key_length <= config.block_k,
        "STEP": common_step(strides[:12]),
    }
    numbers = (*strides, *problem.numbers())
    return Launch((blocks * problem.batch * problem.heads,), numbers, constants, config.tma)
