"""INT8 attention, backward: dQ, dK and dV from the INT8 query and key that the forward saw.

With S recomputed from INT8 Q and K, and so the P of the forward pass (SageBwd, arXiv 2505.11594,
section 4):
    dP = dO Vᵀ,  dS = P ∘ (dP - delta),  dQ = scale · dS K,  dK = scale · dSᵀ Q,  dV = Pᵀ dO
S is an INT8 product; the other four are products of 16-bit operands with float32 sums, where Q and
K are the dequantised ones and K has no token mean. The rows of dS sum to dLSE, so only an LSE that
is differentiated needs it back: dQ += scale · dLSE · mean (arXiv 2603.02170). dP stays in 16 bits
because its error is what dS amplifies; P, dS and dO in INT8 are left for when a GPU can show that
quantising them pays. Each gradient is summed by one program in a fixed order: no atomics.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ldm4ts_kernels.kernels.flash_backward import part_strides, split_queries, summed_parts
from ldm4ts_kernels.kernels.flash_forward import key_range
from ldm4ts_kernels.kernels.int8_forward import int8_flags
from ldm4ts_kernels.kernels.launch import Launch
from ldm4ts_kernels.kernels.primitives import (
    INFINITY,
    LOG2_E,
    accumulate,
    aligned,
    contract,
    dequantise,
    load_parts,
    masked_scores,
    scale_parts,
    store_parts,
    zero_parts,
)
from ldm4ts_kernels.kernels.problem import Problem, common_step, strides_of
from ldm4ts_kernels.kernels.quantize import Quantised
from ldm4ts_kernels.kernels.row_terms import load_row_terms, row_terms

ROW_STRIDES = ["stride_vn", "stride_don"]  # never constants: see int8_forward


@triton.jit
def _weights_and_score_gradient(
    product, dp, exponent, delta, rows, columns, mask_ptr, stride_mq, stride_mk, Q, K, factor,
    diagonal, left, right, MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Return P and dS of one tile; `factor` makes its INT8 product scores."""
    scores, _ = masked_scores(
        product, rows, columns, mask_ptr, stride_mq, stride_mk, Q, K, factor, 1.0,
        diagonal, left, right, MASK, False, True, HAS_LEFT, HAS_RIGHT, CHECK,
    )  # fmt: skip
    p = tl.exp2(scores * LOG2_E - exponent)
    return p, p * (dp - delta)


@triton.jit(do_not_specialize=ROW_STRIDES)
def _int8_dkdv_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, do_ptr, delta_ptr, exponent_ptr, mask_ptr,
    dk_ptr, dv_ptr,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dks, stride_dkb, stride_dkh, stride_dkn, stride_dvs, stride_dvb, stride_dvh, stride_dvn,
    stride_mb, stride_mh, stride_mq, stride_mk,
    H, groups, Q, K, scale, diagonal, left, right, rows_a_split,
    D: tl.constexpr, WIDTH: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    QK_0: tl.constexpr, QK_1: tl.constexpr, QUANT_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum dK and dV of one block of keys over the queries of one split."""
    tl.static_assert(QUANT_ROWS % BLOCK_Q == 0, "a block of queries must have one scale")
    blocks = tl.cdiv(K, BLOCK_K)
    first_key = (tl.program_id(0) % blocks) * BLOCK_K
    kv_heads = H // groups
    kv_index = (tl.program_id(0) // blocks).to(tl.int64)  # of B · G
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    split = tl.program_id(1)
    v_ptr += batch * aligned(stride_vb, STEP) + kv_head * aligned(stride_vh, STEP)
    do_ptr += batch * aligned(stride_dob, STEP)
    stride_vn, stride_don = aligned(stride_vn, STEP), aligned(stride_don, STEP)
    dk_ptr += split.to(tl.int64) * stride_dks + batch * stride_dkb + kv_head * stride_dkh
    dv_ptr += split.to(tl.int64) * stride_dvs + batch * stride_dvb + kv_head * stride_dvh
    k_scale_ptr += kv_index * tl.cdiv(K, QUANT_ROWS)

    columns = first_key + tl.arange(0, BLOCK_K)[:, None]  # the tile lies keys down, queries across
    k = load_parts(
        k_ptr + kv_index * K * WIDTH, first_key, WIDTH, K, BLOCK_K, QK_0, QK_1, WIDTH, True
    )
    k_scale = scale * tl.load(k_scale_ptr + columns // QUANT_ROWS, mask=columns < K, other=0.0)
    v = load_parts(v_ptr, first_key, stride_vn, K, BLOCK_K, PART_0, PART_1, D, True)
    dk = zero_parts(BLOCK_K, QK_0, QK_1)
    dv = zero_parts(BLOCK_K, PART_0, PART_1)
    low = split * rows_a_split
    high = tl.minimum(Q, low + rows_a_split)
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
        for start in range(low, high, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = load_parts(
                q_ptr + head_index * Q * WIDTH, start, WIDTH, Q, BLOCK_Q, QK_0, QK_1, WIDTH, True
            )
            q_scale = tl.load(
                q_scale_ptr + head_index * tl.cdiv(Q, QUANT_ROWS) + start // QUANT_ROWS
            )
            do = load_parts(
                do_ptr + head * aligned(stride_doh, STEP), start, stride_don, Q,
                BLOCK_Q, PART_0, PART_1, D, True,
            )  # fmt: skip
            delta, exponent = load_row_terms(delta_ptr, exponent_ptr, head_index, rows, Q)
            p, ds = _weights_and_score_gradient(
                contract(k, q, QK_1, PRECISION), contract(v, do, PART_1, PRECISION),
                exponent[None, :], delta[None, :], rows[None, :], columns,
                mask_head_ptr, stride_mq, stride_mk, Q, K,
                k_scale * q_scale, diagonal, left, right,
                MASK, HAS_LEFT, HAS_RIGHT, HAS_LEFT or HAS_RIGHT,
            )  # fmt: skip
            dv = accumulate(dv, p, do, PART_1, PRECISION)
            q = dequantise(q, q_scale, QK_1, v_ptr.dtype.element_ty)
            dk = accumulate(dk, ds, q, QK_1, PRECISION)
    dk = scale_parts(dk, scale, QK_1)
    store_parts(dk_ptr, first_key, stride_dkn, K, dk, BLOCK_K, QK_0, QK_1, D)
    store_parts(dv_ptr, first_key, stride_dvn, K, dv, BLOCK_K, PART_0, PART_1, D)


@triton.jit
def _add_mean(dq, dlse, mean_ptr, WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr):
    """Return dq + dLSE · mean, where dLSE is a column and the mean that of the key's tokens."""
    columns = tl.arange(0, QK_0)
    mean = tl.load(mean_ptr + columns, mask=columns < WIDTH, other=0.0)
    first = dq[0] + dlse * mean[None, :]
    if QK_1 == 0:
        return (first,)
    else:
        columns = QK_0 + tl.arange(0, QK_1)
        mean = tl.load(mean_ptr + columns, mask=columns < WIDTH, other=0.0)
        return (first, dq[1] + dlse * mean[None, :])


@triton.jit(do_not_specialize=ROW_STRIDES)
def _int8_dq_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, mean_ptr, v_ptr, do_ptr, dlse_ptr, delta_ptr,
    exponent_ptr, mask_ptr, dq_ptr,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn, stride_mb, stride_mh, stride_mq, stride_mk,
    H, groups, Q, K, scale, diagonal, left, right,
    D: tl.constexpr, WIDTH: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    QK_0: tl.constexpr, QK_1: tl.constexpr, QUANT_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_DLSE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum dQ of one block of queries over the keys that they attend."""
    tl.static_assert(QUANT_ROWS % BLOCK_K == 0, "a block of keys must have one scale")
    blocks = tl.cdiv(Q, BLOCK_Q)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    head_index = (tl.program_id(0) // blocks).to(tl.int64)  # of B · H
    batch, head = head_index // H, head_index % H
    kv_index = batch * (H // groups) + head // groups  # of B · G
    k_ptr += kv_index * K * WIDTH
    k_scale_ptr += kv_index * tl.cdiv(K, QUANT_ROWS)
    v_ptr += batch * aligned(stride_vb, STEP) + (head // groups) * aligned(stride_vh, STEP)
    do_ptr += batch * aligned(stride_dob, STEP) + head * aligned(stride_doh, STEP)
    stride_vn, stride_don = aligned(stride_vn, STEP), aligned(stride_don, STEP)
    if MASK > 0:
        mask_ptr += batch * stride_mb + head * stride_mh

    rows = first_row + tl.arange(0, BLOCK_Q)
    q = load_parts(
        q_ptr + head_index * Q * WIDTH, first_row, WIDTH, Q, BLOCK_Q, QK_0, QK_1, WIDTH, True
    )
    q_scale_ptr += head_index * tl.cdiv(Q, QUANT_ROWS)
    q_scale = scale * tl.load(q_scale_ptr + rows // QUANT_ROWS, mask=rows < Q, other=0.0)
    do = load_parts(do_ptr, first_row, stride_don, Q, BLOCK_Q, PART_0, PART_1, D, True)
    delta, exponent = load_row_terms(delta_ptr, exponent_ptr, head_index, rows, Q)
    dq = zero_parts(BLOCK_Q, QK_0, QK_1)
    low, whole, high = key_range(
        first_row, Q, K, diagonal, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
    )
    for CHECK in tl.static_range(2):
        begin = whole if CHECK == 1 else low
        end = high if CHECK == 1 else whole
        for start in range(begin, end, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_parts(k_ptr, start, WIDTH, K, BLOCK_K, QK_0, QK_1, WIDTH, CHECK == 1)
            k_scale = tl.load(k_scale_ptr + start // QUANT_ROWS)
            v = load_parts(v_ptr, start, stride_vn, K, BLOCK_K, PART_0, PART_1, D, CHECK == 1)
            _, ds = _weights_and_score_gradient(
                contract(q, k, QK_1, PRECISION), contract(do, v, PART_1, PRECISION),
                exponent[:, None], delta[:, None], rows[:, None], columns[None, :],
                mask_ptr, stride_mq, stride_mk, Q, K,
                (q_scale * k_scale)[:, None], diagonal, left, right,
                MASK, HAS_LEFT, HAS_RIGHT, CHECK == 1,
            )  # fmt: skip
            k = dequantise(k, k_scale, QK_1, v_ptr.dtype.element_ty)
            dq = accumulate(dq, ds, k, QK_1, PRECISION)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + head_index * Q + rows, mask=rows < Q, other=0.0)[:, None]
        # A row that sees no key sends no gradient.
        dlse = tl.where(exponent[:, None] == INFINITY, 0.0, dlse)
        dq = _add_mean(dq, dlse, mean_ptr + kv_index * WIDTH, WIDTH, QK_0, QK_1)
    dq_ptr += batch * stride_dqb + head * stride_dqh
    dq = scale_parts(dq, scale, QK_1)
    store_parts(dq_ptr, first_row, stride_dqn, Q, dq, BLOCK_Q, QK_0, QK_1, D)


def int8_backward(
    problem: Problem,
    quantised: Quantised,
    value: Tensor,  # (B, G, K, D)
    attn_mask: Tensor | None,  # (B, H, Q, K), broadcast by strides
    out: Tensor,  # (B, H, Q, D)
    lse: Tensor,  # (B, H, Q) float32, of the smoothed scores
    dout: Tensor,  # (B, H, Q, D)
    dlse: Tensor | None,  # (B, H, Q) float32
    dq: Tensor,  # (B, H, Q, D)
    dk: Tensor,  # (B, G, K, D)
    dv: Tensor,  # (B, G, K, D)
) -> None:
    """Launch the three backward kernels into `dq`, `dk` and `dv`."""
    strides = strides_of((value, dout, dq, dk, dv), attn_mask)
    keys, queries, splits = _plan(problem, strides, dlse is not None)
    delta, exponent = row_terms(problem, out, dout, lse, dlse)
    with summed_parts(dk, dv, splits) as (dk_parts, dv_parts):
        keys(
            _int8_dkdv_kernel, *quantised[:4], value, dout, delta, exponent, attn_mask,
            dk_parts, dv_parts,
        )  # fmt: skip
    queries(
        _int8_dq_kernel, *quantised[:5], value, dout, dlse, delta, exponent, attn_mask, dq
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _plan(
    problem: Problem,
    strides: tuple[int, ...],  # of value, dout, dq, dk, dv and the mask
    has_dlse: bool,
) -> tuple[Launch, Launch, int]:
    """Return the launches of dK with dV and of dQ, and among how many the first splits queries."""
    of_mask = strides[15:]
    numbers = (*problem.lengths(), problem.scale, *problem.band())
    flags = {**int8_flags(problem), "STEP": common_step(strides[:6])}
    config = problem.config("int8_key_gradient")
    splits, rows_a_split = split_queries(problem, config.block_q, config.block_k)
    blocks = triton.cdiv(problem.key_length, config.block_k)
    keys = Launch(
        (blocks * problem.batch * problem.kv_heads, splits),
        (*strides[:6], *part_strides(problem, strides[9:15], splits), *of_mask, *numbers,
         rows_a_split),
        {**flags, **config.constants()},
    )  # fmt: skip
    config = problem.config("int8_query_gradient")
    blocks = triton.cdiv(problem.query_length, config.block_q)
    queries = Launch(
        (blocks * problem.batch * problem.heads,),
        (*strides[:9], *of_mask, *numbers),
        {**flags, **config.constants(), "HAS_DLSE": has_dlse},
    )
    return keys, queries, splits
