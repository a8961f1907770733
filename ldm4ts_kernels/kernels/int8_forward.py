"""INT8 attention, forward: softmax(scale · Q Kᵀ + mask) V with Q Kᵀ from INT8 tensor cores.

Query and key come as `quantize.Quantised`; the INT32 products times their two scales are float32
scores in natural units, and softmax, P V and its accumulation are those of exact attention: V keeps
its own 16-bit dtype (SageAttention, arXiv 2410.02367, section 4). The LSE is that of the smoothed
scores, which lack what `quantise` calls the shift.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ldm4ts_kernels.kernels.flash_forward import key_range
from ldm4ts_kernels.kernels.launch import Launch
from ldm4ts_kernels.kernels.primitives import (
    INFINITY,
    LN_2,
    LOG2_E,
    accumulate,
    aligned,
    contract,
    load_parts,
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
from ldm4ts_kernels.kernels.quantize import Quantised, int8_parts, stored_width
from ldm4ts_kernels.kernels.tuning import QUANT_ROWS


# Triton makes a stride of 1 a constant and then lays a tile of head dim 1 out by columns, which its
# version 3.6 multiplies wrongly on an H200 (in the backward pass, with 64 queries a block).
@triton.jit(do_not_specialize=["stride_vn"])
def _int8_fwd_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, mask_ptr, o_ptr, lse_ptr,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_mb, stride_mh, stride_mq, stride_mk,
    H, groups, Q, K, scale, diagonal, left, right,
    D: tl.constexpr, WIDTH: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    QK_0: tl.constexpr, QK_1: tl.constexpr, QUANT_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tl.static_assert(QUANT_ROWS % BLOCK_K == 0, "a block of keys must have one scale")
    blocks = tl.cdiv(Q, BLOCK_Q)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    head_index = (tl.program_id(0) // blocks).to(tl.int64)  # of B · H
    batch, head = head_index // H, head_index % H
    kv_index = batch * (H // groups) + head // groups  # of B · G
    k_ptr += kv_index * K * WIDTH
    k_scale_ptr += kv_index * tl.cdiv(K, QUANT_ROWS)
    v_ptr += batch * aligned(stride_vb, STEP) + (head // groups) * aligned(stride_vh, STEP)
    stride_vn = aligned(stride_vn, STEP)
    if MASK > 0:
        mask_ptr += batch * stride_mb + head * stride_mh

    rows = first_row + tl.arange(0, BLOCK_Q)
    q = load_parts(
        q_ptr + head_index * Q * WIDTH, first_row, WIDTH, Q, BLOCK_Q, QK_0, QK_1, WIDTH, True
    )
    q_scale_ptr += head_index * tl.cdiv(Q, QUANT_ROWS)
    q_scale = scale * tl.load(q_scale_ptr + rows // QUANT_ROWS, mask=rows < Q, other=0.0)
    total = zero_parts(BLOCK_Q, PART_0, PART_1)
    row_max = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    low, whole, high = key_range(
        first_row, Q, K, diagonal, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
    )
    k_rows = open_rows(k_ptr, WIDTH, K, BLOCK_K, QK_0, QK_1, WIDTH, TMA)
    v_rows = open_rows(v_ptr, stride_vn, K, BLOCK_K, PART_0, PART_1, D, TMA)
    for CHECK in tl.static_range(2):
        begin = whole if CHECK == 1 else low
        end = high if CHECK == 1 else whole
        for start in range(begin, end, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_rows(k_rows, start, K, BLOCK_K, QK_0, QK_1, WIDTH, CHECK == 1, TMA)
            k_scale = tl.load(k_scale_ptr + start // QUANT_ROWS)
            factor = q_scale * k_scale
            scores, _ = masked_scores(
                contract(q, k, QK_1, PRECISION), rows[:, None], columns[None, :],
                mask_ptr, stride_mq, stride_mk, Q, K, factor[:, None], 1.0,
                diagonal, left, right, MASK, False, SCALED, HAS_LEFT, HAS_RIGHT, CHECK == 1,
            )  # fmt: skip
            units = tl.full((BLOCK_Q,), LOG2_E, tl.float32) if SCALED else factor * LOG2_E
            weights, rescale, row_max, row_sum = online_softmax(
                scores, units, row_max, row_sum, (MASK > 0) or HAS_LEFT or HAS_RIGHT
            )
            total = scale_parts(total, rescale[:, None], PART_1)
            v = load_rows(v_rows, start, K, BLOCK_K, PART_0, PART_1, D, CHECK == 1, TMA)
            total = accumulate(total, weights, v, PART_1, PRECISION)

    total = scale_parts(total, (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None], PART_1)
    o_ptr += batch * aligned(stride_ob, STEP) + head * aligned(stride_oh, STEP)
    stride_on = aligned(stride_on, STEP)
    store_parts(o_ptr, first_row, stride_on, Q, total, BLOCK_Q, PART_0, PART_1, D)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    lse = tl.where(row_max == -INFINITY, -INFINITY, lse)  # a row that sees no key
    tl.store(lse_ptr + head_index * Q + rows, lse, mask=rows < Q)


def int8_flags(problem: Problem) -> dict[str, int | bool | str]:
    """Return the compile-time flags that the INT8 kernels share."""
    exact = problem.flags()
    part_0, part_1 = int8_parts(problem.head_dim)
    shared = ("D", "PART_0", "PART_1", "MASK", "HAS_LEFT", "HAS_RIGHT", "PRECISION")
    return {name: exact[name] for name in shared} | {
        "WIDTH": stored_width(problem.head_dim),
        "QK_0": part_0,
        "QK_1": part_1,
        "QUANT_ROWS": QUANT_ROWS,
    }


def int8_forward(
    problem: Problem,
    quantised: Quantised,
    value: Tensor,  # (B, G, K, D)
    attn_mask: Tensor | None,  # (B, H, Q, K), broadcast by strides
    out: Tensor,  # (B, H, Q, D)
    lse: Tensor,  # (B, H, Q) float32, contiguous
) -> None:
    """Launch the forward kernel into `out` and `lse`."""
    strides = strides_of((value, out), attn_mask)
    launch = _plan(problem, strides, start_at_16_bytes(value))
    launch(_int8_fwd_kernel, *quantised[:4], value, attn_mask, out, lse)


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, strides: tuple[int, ...], aligned: bool) -> Launch:
    config = problem.config("int8_forward", tma=takes_tensor_maps(problem, strides[:3], aligned))
    blocks = triton.cdiv(problem.query_length, config.block_q)
    return Launch(
        (blocks * problem.batch * problem.heads,),
        (*strides, *problem.lengths(), problem.scale, *problem.band()),
        {
            **int8_flags(problem),
            **config.constants(),
            "SCALED": problem.scaled,
            "TMA": config.tma,
            "STEP": common_step(strides[:6]),
        },
        config.tma,
    )
