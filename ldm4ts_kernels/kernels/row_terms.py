"""What the backward needs of each query, computed once: delta and the LSE as an exponent of 2.

delta = rowsum(dO ∘ O) - dLSE is what the gradient of a row's scores subtracts (FlashAttention-2,
arXiv 2307.08691, section 3.1).
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ldm4ts_kernels.kernels.launch import Launch
from ldm4ts_kernels.kernels.primitives import INFINITY, LOG2_E, aligned, load_parts, row_dot
from ldm4ts_kernels.kernels.problem import Problem, common_step, strides_of

PADDING = 128  # every block of queries divides it: rows of delta and exponent are padded to it
ROW_PADDING = tl.constexpr(PADDING)


@triton.jit
def _delta_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, exponent_ptr, stride_ob, stride_oh, stride_on,
    stride_dob, stride_doh, stride_don, H, Q,
    D: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, HAS_DLSE: tl.constexpr,
    STEP: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Store of each query what its scores' gradient subtracts, and what their exponent does."""
    blocks = padded(Q) // BLOCK_Q
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    head_index = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = head_index // H, head_index % H
    o_ptr += batch * aligned(stride_ob, STEP) + head * aligned(stride_oh, STEP)
    do_ptr += batch * aligned(stride_dob, STEP) + head * aligned(stride_doh, STEP)
    stride_on, stride_don = aligned(stride_on, STEP), aligned(stride_don, STEP)
    rows = first_row + tl.arange(0, BLOCK_Q)
    o = load_parts(o_ptr, first_row, stride_on, Q, BLOCK_Q, PART_0, PART_1, D, True)
    do = load_parts(do_ptr, first_row, stride_don, Q, BLOCK_Q, PART_0, PART_1, D, True)
    delta = row_dot(o, do, PART_1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + head_index * Q + rows, mask=rows < Q, other=0.0)
    tl.store(delta_ptr + head_index * padded(Q) + rows, delta)
    exponent = load_exponent(lse_ptr + head_index * Q, rows, Q)
    tl.store(exponent_ptr + head_index * padded(Q) + rows, exponent)


@triton.jit
def load_exponent(lse_ptr, rows, Q):
    """Load LSE rows in units of log 2; +inf, which makes P zero, for rows that see no key."""
    lse = tl.load(lse_ptr + rows, mask=rows < Q, other=-INFINITY)
    return tl.where(lse == -INFINITY, INFINITY, lse * LOG2_E)


@triton.jit
def padded(Q):
    """Return how many rows `row_terms` stores of a head: up to a multiple of every block."""
    return tl.cdiv(Q, ROW_PADDING) * ROW_PADDING


@triton.jit
def open_row_terms(
    delta_ptr, exponent_ptr, head_index, Q, BLOCK_Q: tl.constexpr, TMA: tl.constexpr
):
    """Return what `load_row_terms` reads delta and exponent of a head from."""
    delta_ptr += head_index * padded(Q)
    exponent_ptr += head_index * padded(Q)
    if TMA:
        return (
            tl.make_tensor_descriptor(delta_ptr, [padded(Q)], [1], [BLOCK_Q]),
            tl.make_tensor_descriptor(exponent_ptr, [padded(Q)], [1], [BLOCK_Q]),
        )
    else:
        return (delta_ptr, exponent_ptr)


@triton.jit
def load_row_terms(source, start, BLOCK_Q: tl.constexpr, TMA: tl.constexpr):
    """Load delta and exponent of a block of rows; rows past the last have a P of 0."""
    if TMA:
        return source[0].load([start]), source[1].load([start])
    else:
        rows = start + tl.arange(0, BLOCK_Q)
        return tl.load(source[0] + rows), tl.load(source[1] + rows)


def row_terms(
    problem: Problem, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:  # (B, H, padded Q) float32, each
    """Launch the kernel of delta, rowsum(dO ∘ O) - dLSE, and of the LSE in units of log 2."""
    rows = -(-problem.query_length // PADDING) * PADDING
    delta, exponent = lse.new_empty(2, problem.batch, problem.heads, rows)
    _row_plan(problem, strides_of((out, dout), None)[:6], dlse is not None)(
        _delta_kernel, out, dout, lse, dlse, delta, exponent
    )
    return delta, exponent


@functools.lru_cache(maxsize=1024)
def _row_plan(problem: Problem, strides: tuple[int, ...], has_dlse: bool) -> Launch:
    flags = problem.flags()
    constants = {name: flags[name] for name in ("D", "PART_0", "PART_1")}
    constants |= {"STEP": common_step(strides), "HAS_DLSE": has_dlse, "BLOCK_Q": 64, "num_warps": 4}
    blocks = triton.cdiv(problem.query_length, PADDING) * (PADDING // 64)
    grid = (blocks * problem.batch * problem.heads,)
    return Launch(grid, (*strides, problem.heads, problem.query_length), constants)
