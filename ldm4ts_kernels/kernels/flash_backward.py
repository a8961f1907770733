"""Exact attention, backward: dQ, dK, dV and a mask's gradient from the forward's output and LSE.

With P = exp(S - LSE), dP = dO Vᵀ and delta = rowsum(dO ∘ O) - dLSE:
    dS = P ∘ (dP - delta),  dQ = scale · dS K,  dK = scale · dSᵀ Q,  dV = Pᵀ dO
(FlashAttention-2, arXiv 2307.08691, section 3.1). Each gradient is summed by one program in a fixed
order, so the result is the same in every run: no atomics. Where the keys of a head fit one block,
one launch computes all three gradients; else dK and dV are summed over queries by one kernel and
dQ over keys by another.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ldm4ts_kernels.kernels.flash_forward import key_range
from ldm4ts_kernels.kernels.launch import Launch
from ldm4ts_kernels.kernels.primitives import (
    accumulate,
    aligned,
    contract,
    keep_weights,
    load_parts,
    load_rows,
    load_scale,
    masked_scores,
    open_rows,
    row_dot,
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
from ldm4ts_kernels.kernels.quantize import Quantised, query_strides
from ldm4ts_kernels.kernels.query_splits import part_strides, split_queries, summed_parts
from ldm4ts_kernels.kernels.row_terms import (
    load_exponent,
    load_row_terms,
    open_row_terms,
    row_terms,
)

# Triton makes a stride of 1 a constant and then lays a tile of head dim 1 out by columns, which its
# version 3.6 multiplies wrongly on an H200, with 64 queries a block.
ROW_STRIDES = ["stride_vn", "stride_don"]


@triton.jit
def _drop(weights, keep, dropout_p):
    return tl.where(keep, weights * (1.0 / (1.0 - dropout_p)), 0.0)


@triton.jit(do_not_specialize=ROW_STRIDES)
def _flash_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_int8_ptr, k_int8_ptr, q_scale_ptr, k_scale_ptr, o_ptr, do_ptr, lse_ptr,
    dlse_ptr, delta_ptr, exponent_ptr, mask_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr, dmask_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    stride_dks, stride_dkb, stride_dkh, stride_dkn, stride_dvs, stride_dvb, stride_dvh, stride_dvn,
    stride_mb, stride_mh, stride_mq, stride_mk,
    H, groups, Q, K, scale, unit, dropout_p, cap, diagonal, left, right, rows_a_split,
    D: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, QK_D: tl.constexpr,
    QK_0: tl.constexpr, QK_1: tl.constexpr, QUANT_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    ONE_BLOCK: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_DMASK: tl.constexpr,
    STEP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum dK and dV of one block of keys over the queries of one split; with ONE_BLOCK also dQ."""
    blocks = tl.cdiv(K, BLOCK_K)
    first_key = (tl.program_id(0) % blocks) * BLOCK_K
    kv_heads = H // groups
    batch = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    k_ptr += batch * aligned(stride_kb, STEP) + kv_head * aligned(stride_kh, STEP)
    v_ptr += batch * aligned(stride_vb, STEP) + kv_head * aligned(stride_vh, STEP)
    q_ptr += batch * aligned(stride_qb, STEP)
    o_ptr += batch * aligned(stride_ob, STEP)
    do_ptr += batch * aligned(stride_dob, STEP)
    stride_qh, stride_qn = aligned(stride_qh, STEP), aligned(stride_qn, STEP)
    stride_oh, stride_on = aligned(stride_oh, STEP), aligned(stride_on, STEP)
    stride_doh, stride_don = aligned(stride_doh, STEP), aligned(stride_don, STEP)
    stride_kn, stride_vn = aligned(stride_kn, STEP), aligned(stride_vn, STEP)
    dk_ptr += split.to(tl.int64) * stride_dks + batch * stride_dkb + kv_head * stride_dkh
    dv_ptr += split.to(tl.int64) * stride_dvs + batch * stride_dvb + kv_head * stride_dvh

    columns = first_key + tl.arange(0, BLOCK_K)[:, None]  # the tile lies keys down, queries across
    k = load_parts(k_ptr, first_key, stride_kn, K, BLOCK_K, PART_0, PART_1, D, True)
    v = load_parts(v_ptr, first_key, stride_vn, K, BLOCK_K, PART_0, PART_1, D, True)
    k_scores, k_scale = k, 1.0
    if QUANT_ROWS > 0:
        kv_index = batch * kv_heads + kv_head
        k_scores = load_parts(
            k_int8_ptr + kv_index * K * QK_D, first_key, QK_D, K, BLOCK_K, QK_0, QK_1, QK_D, True
        )
        k_scale = load_scale(k_scale_ptr, kv_index, first_key, K, QUANT_ROWS, BLOCK_K)
    dk = zero_parts(BLOCK_K, PART_0, PART_1)
    dv = zero_parts(BLOCK_K, PART_0, PART_1)
    low = split * rows_a_split
    high = tl.minimum(Q, low + rows_a_split)
    if not ONE_BLOCK:  # which writes every row of dQ, so it visits them all
        if HAS_RIGHT:
            low = tl.maximum(low, (first_key - diagonal - right) // BLOCK_Q * BLOCK_Q)
        if HAS_LEFT:
            high = tl.minimum(high, first_key + BLOCK_K - diagonal + left)
    for member in range(0, groups):
        head = kv_head * groups + member
        head_index = batch * H + head
        mask_head_ptr = mask_ptr
        if MASK > 0:
            mask_head_ptr = mask_ptr + batch * stride_mb + head * stride_mh
        q_rows = open_rows(q_ptr + head * stride_qh, stride_qn, Q, BLOCK_Q, PART_0, PART_1, D, TMA)
        do_rows = open_rows(
            do_ptr + head * stride_doh, stride_don, Q, BLOCK_Q, PART_0, PART_1, D, TMA
        )
        if QUANT_ROWS > 0:
            q_int8_rows = open_rows(
                q_int8_ptr + head_index * Q * QK_D, QK_D, Q, BLOCK_Q, QK_0, QK_1, QK_D, TMA
            )
        if not ONE_BLOCK:
            terms = open_row_terms(delta_ptr, exponent_ptr, head_index, Q, BLOCK_Q, TMA)
        for start in range(low, high, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = load_rows(q_rows, start, Q, BLOCK_Q, PART_0, PART_1, D, True, TMA)
            do = load_rows(do_rows, start, Q, BLOCK_Q, PART_0, PART_1, D, True, TMA)
            q_scores, factor = q, k_scale
            if QUANT_ROWS > 0:
                q_scores = load_rows(q_int8_rows, start, Q, BLOCK_Q, QK_0, QK_1, QK_D, True, TMA)
                factor *= load_scale(q_scale_ptr, head_index, start, Q, QUANT_ROWS, BLOCK_Q)
            if ONE_BLOCK:
                o = load_parts(
                    o_ptr + head * stride_oh, start, stride_on, Q,
                    BLOCK_Q, PART_0, PART_1, D, True,
                )  # fmt: skip
                delta = row_dot(o, do, PART_1)
                if HAS_DLSE:
                    delta -= tl.load(dlse_ptr + head_index * Q + rows, mask=rows < Q, other=0.0)
                exponent = load_exponent(lse_ptr + head_index * Q, rows, Q)
            else:
                delta, exponent = load_row_terms(terms, start, BLOCK_Q, TMA)
            scores, capped = masked_scores(
                contract(k_scores, q_scores, QK_1, PRECISION), rows[None, :], columns,
                mask_head_ptr, stride_mq, stride_mk, Q, K, factor * scale, cap,
                diagonal, left, right, MASK, HAS_CAP, SCALED, HAS_LEFT, HAS_RIGHT,
                ONE_BLOCK or HAS_LEFT or HAS_RIGHT,
            )  # fmt: skip
            p = tl.exp2(scores * (unit if SCALED else factor * unit) - exponent[None, :])
            dropped = p
            if HAS_DROPOUT:
                keep = keep_weights(seed_ptr, head_index, rows[None, :], columns, dropout_p)
                dropped = _drop(p, keep, dropout_p)
            dv = accumulate(dv, dropped, do, PART_1, PRECISION)  # before dP takes registers
            dp = contract(v, do, PART_1, PRECISION)
            if HAS_DROPOUT:
                dp = _drop(dp, keep, dropout_p)
            ds = p * (dp - delta[None, :])
            if ONE_BLOCK and HAS_DMASK:
                _store_dmask(dmask_ptr + head_index * Q * K, rows[None, :], columns, Q, K, ds)
            if HAS_CAP:
                ds *= 1.0 - (capped / cap) * (capped / cap)
            dk = accumulate(dk, ds, q, PART_1, PRECISION)
            if ONE_BLOCK:
                dq = accumulate(
                    zero_parts(BLOCK_Q, PART_0, PART_1), tl.trans(ds), k, PART_1, PRECISION
                )
                store_parts(
                    dq_ptr + batch * stride_dqb + head * stride_dqh, start, stride_dqn, Q,
                    scale_parts(dq, scale, PART_1), BLOCK_Q, PART_0, PART_1, D,
                )  # fmt: skip
    dk = scale_parts(dk, scale, PART_1)
    store_parts(dk_ptr, first_key, stride_dkn, K, dk, BLOCK_K, PART_0, PART_1, D)
    store_parts(dv_ptr, first_key, stride_dvn, K, dv, BLOCK_K, PART_0, PART_1, D)


@triton.jit
def _store_dmask(dmask_ptr, rows, columns, Q, K, ds):
    offsets = rows.to(tl.int64) * K + columns
    tl.store(dmask_ptr + offsets, ds, mask=(rows < Q) & (columns < K))


@triton.jit(do_not_specialize=ROW_STRIDES)
def _flash_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_int8_ptr, q_scale_ptr, k_scale_ptr, do_ptr, delta_ptr, exponent_ptr,
    mask_ptr, seed_ptr, dq_ptr, dmask_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn, stride_mb, stride_mh, stride_mq, stride_mk,
    H, groups, Q, K, scale, unit, dropout_p, cap, diagonal, left, right,
    D: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, QK_D: tl.constexpr,
    QK_0: tl.constexpr, QK_1: tl.constexpr, QUANT_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_DMASK: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum dQ of one block of queries over the keys that they attend."""
    blocks = tl.cdiv(Q, BLOCK_Q)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    head_index = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = head_index // H, head_index % H
    k_ptr += batch * aligned(stride_kb, STEP) + (head // groups) * aligned(stride_kh, STEP)
    v_ptr += batch * aligned(stride_vb, STEP) + (head // groups) * aligned(stride_vh, STEP)
    q_ptr += batch * aligned(stride_qb, STEP) + head * aligned(stride_qh, STEP)
    do_ptr += batch * aligned(stride_dob, STEP) + head * aligned(stride_doh, STEP)
    stride_kn, stride_vn = aligned(stride_kn, STEP), aligned(stride_vn, STEP)
    stride_qn, stride_don = aligned(stride_qn, STEP), aligned(stride_don, STEP)
    if MASK > 0:
        mask_ptr += batch * stride_mb + head * stride_mh

    rows = first_row + tl.arange(0, BLOCK_Q)
    q = load_parts(q_ptr, first_row, stride_qn, Q, BLOCK_Q, QK_0, QK_1, QK_D, True)
    do = load_parts(do_ptr, first_row, stride_don, Q, BLOCK_Q, PART_0, PART_1, D, True)
    terms = open_row_terms(delta_ptr, exponent_ptr, head_index, Q, BLOCK_Q, False)
    delta, exponent = load_row_terms(terms, first_row, BLOCK_Q, False)
    k_rows = open_rows(k_ptr, stride_kn, K, BLOCK_K, PART_0, PART_1, D, TMA)
    v_rows = open_rows(v_ptr, stride_vn, K, BLOCK_K, PART_0, PART_1, D, TMA)
    q_scale = 1.0
    if QUANT_ROWS > 0:
        kv_index = batch * (H // groups) + head // groups
        k_int8_rows = open_rows(
            k_int8_ptr + kv_index * K * QK_D, QK_D, K, BLOCK_K, QK_0, QK_1, QK_D, TMA
        )
        q_scale = load_scale(q_scale_ptr, head_index, first_row, Q, QUANT_ROWS, BLOCK_Q)
    dq = zero_parts(BLOCK_Q, PART_0, PART_1)
    low, whole, high = key_range(
        first_row, Q, K, diagonal, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
    )
    for CHECK in tl.static_range(2):
        begin = whole if CHECK == 1 else low
        end = high if CHECK == 1 else whole
        for start in range(begin, end, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_rows(k_rows, start, K, BLOCK_K, PART_0, PART_1, D, CHECK == 1, TMA)
            v = load_rows(v_rows, start, K, BLOCK_K, PART_0, PART_1, D, CHECK == 1, TMA)
            k_scores, factor = k, q_scale
            if QUANT_ROWS > 0:
                k_scores = load_rows(
                    k_int8_rows, start, K, BLOCK_K, QK_0, QK_1, QK_D, CHECK == 1, TMA
                )
                factor *= load_scale(k_scale_ptr, kv_index, start, K, QUANT_ROWS, BLOCK_K)
            scores, capped = masked_scores(
                contract(q, k_scores, QK_1, PRECISION), rows[:, None], columns[None, :],
                mask_ptr, stride_mq, stride_mk, Q, K, factor * scale, cap, diagonal, left, right,
                MASK, HAS_CAP, SCALED, HAS_LEFT, HAS_RIGHT, CHECK == 1,
            )  # fmt: skip
            p = tl.exp2(scores * (unit if SCALED else factor * unit) - exponent[:, None])
            dp = contract(do, v, PART_1, PRECISION)
            if HAS_DROPOUT:
                keep = keep_weights(
                    seed_ptr, head_index, rows[:, None], columns[None, :], dropout_p
                )
                dp = _drop(dp, keep, dropout_p)
            ds = p * (dp - delta[:, None])
            if HAS_DMASK:
                _store_dmask(
                    dmask_ptr + head_index * Q * K, rows[:, None], columns[None, :], Q, K, ds
                )
            if HAS_CAP:
                ds *= 1.0 - (capped / cap) * (capped / cap)
            dq = accumulate(dq, ds, k, PART_1, PRECISION)
    dq = scale_parts(dq, scale, PART_1)
    store_parts(
        dq_ptr + batch * stride_dqb + head * stride_dqh, first_row, stride_dqn, Q, dq,
        BLOCK_Q, PART_0, PART_1, D,
    )  # fmt: skip


def flash_backward(
    problem: Problem,
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, D)
    attn_mask: Tensor | None,  # (B, H, Q, K), broadcast by strides
    seed: Tensor | None,  # (1,) int64
    out: Tensor,  # (B, H, Q, D)
    lse: Tensor,  # (B, H, Q) float32
    dout: Tensor,  # (B, H, Q, D)
    dlse: Tensor | None,  # (B, H, Q) float32
    dq: Tensor,  # (B, H, Q, D)
    dk: Tensor,  # (B, G, K, D)
    dv: Tensor,  # (B, G, K, D)
    dmask: Tensor | None,  # (B, H, Q, K) float32, zeroed, contiguous
    quantised: Quantised | None = None,
) -> None:
    """Launch the backward kernels into `dq`, `dk`, `dv` and, where given, `dmask`.

    With `quantised`, scores are recomputed from it, and query and key are what it stands for.
    """
    strides = strides_of((query, key, value, out, dout, dq, dk, dv), attn_mask)
    aligned = start_at_16_bytes(query, key, value, dout)
    plan = _plan(problem, strides, aligned, dlse is not None, dmask is not None)
    q_int8 = q_scale = k_int8 = k_scale = None
    if quantised is not None:
        q_int8, q_scale, k_int8, k_scale, _ = quantised
    delta = exponent = None
    if plan.queries:  # else one launch makes all
        delta, exponent = row_terms(problem, out, dout, lse, dlse)
    with summed_parts(dk, dv, plan.splits) as (dk_parts, dv_parts):
        plan.keys(
            _flash_dkdv_kernel, query, key, value, q_int8, k_int8, q_scale, k_scale, out, dout,
            lse, dlse, delta, exponent, attn_mask, seed, dq, dk_parts, dv_parts, dmask,
        )  # fmt: skip
    if plan.queries:
        plan.queries(
            _flash_dq_kernel, query if quantised is None else q_int8, key, value, k_int8, q_scale,
            k_scale, dout, delta, exponent, attn_mask, seed, dq, dmask,
        )  # fmt: skip


class _Plan(NamedTuple):
    """The launches of a backward: of the keys' gradients, and of the queries' where it is another.

    The queries are split among `splits` programs a block of keys.
    """

    keys: Launch
    queries: Launch | None
    splits: int


@functools.lru_cache(maxsize=1024)
def _plan(
    problem: Problem,
    strides: tuple[int, ...],  # of query, key, value, out, dout, dq, dk, dv and the mask
    aligned: bool,
    has_dlse: bool,
    has_dmask: bool,
) -> _Plan:
    tma = takes_tensor_maps(problem, strides[:15], aligned)
    one_block = problem.one_block
    config = problem.config("one_block" if one_block else "key_gradient", tma=tma)
    splits, rows_a_split = split_queries(problem, config.block_q, config.block_k)
    of_keys, of_mask = strides[18:24], strides[24:]
    shared = {**problem.flags(), "HAS_DMASK": has_dmask, "STEP": common_step(strides[:15])}
    keys = Launch(
        (
            triton.cdiv(problem.key_length, config.block_k) * problem.batch * problem.kv_heads,
            splits,
        ),
        (*strides[:18], *part_strides(problem, of_keys, splits), *of_mask, *problem.numbers(),
         rows_a_split),
        {
            **shared, **config.constants(), "TMA": config.tma, "ONE_BLOCK": one_block,
            "HAS_DLSE": has_dlse,
        },
        config.tma,
    )  # fmt: skip
    if one_block:
        return _Plan(keys, None, splits)
    config = problem.config("query_gradient", tma=tma)
    blocks = triton.cdiv(problem.query_length, config.block_q)
    queries = Launch(
        (blocks * problem.batch * problem.heads,),
        (
            *(query_strides(problem) if problem.int8 else strides[:3]),
            *strides[3:9],
            *strides[12:18],
            *of_mask,
            *problem.numbers(),
        ),
        {**shared, **config.constants(), "TMA": config.tma},
        config.tma,
    )
    return _Plan(keys, queries, splits)
