"""INT8 attention, backward: dQ, dK and dV from the INT8 query and key that the forward saw.

With S recomputed from INT8 Q and K, and so the P of the forward pass (SageBwd, arXiv 2505.11594,
section 4):
    dP = dO Vᵀ,  dS = P ∘ (dP - delta),  dQ = scale · dS K̂,  dK = scale · dSᵀ Q̂,  dV = Pᵀ dO
The kernels are those of exact attention: S is their only product that takes INT8 operands, the
others take 16-bit ones, because the error of dP is what dS amplifies. Q̂ and K̂ are written once in
16 bits for them, and live no longer than the backward pass of one layer. K̂ has no token mean:
the rows of dS sum to dLSE, so only an LSE that is differentiated sees it (arXiv 2603.02170).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm4ts_kernels.kernels.flash_backward import flash_backward
from ldm4ts_kernels.kernels.launch import Launch
from ldm4ts_kernels.kernels.primitives import (
    add_parts,
    float32_parts,
    load_parts,
    scale_parts,
    store_parts,
)
from ldm4ts_kernels.kernels.problem import Problem
from ldm4ts_kernels.kernels.quantize import Quantised
from ldm4ts_kernels.kernels.tuning import QUANT_ROWS


@triton.jit
def _dequantise_block(
    int8_ptr, scale_ptr, mean_ptr, out_ptr, program, length, WIDTH: tl.constexpr,
    QK_0: tl.constexpr, QK_1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write INT8 rows times their scale, plus the mean where a pointer to it is given."""
    blocks = tl.cdiv(length, BLOCK)
    start = (program % blocks) * BLOCK
    head_index = (program // blocks).to(tl.int64)
    offset = head_index * length * WIDTH
    x = load_parts(int8_ptr + offset, start, WIDTH, length, BLOCK, QK_0, QK_1, WIDTH, True)
    x = scale_parts(float32_parts(x, QK_1), tl.load(scale_ptr + program), QK_1)
    if mean_ptr is not None:
        mean_ptr += head_index * WIDTH
        mean = load_parts(mean_ptr, 0, WIDTH, 1, 1, QK_0, QK_1, WIDTH, True)
        x = add_parts(x, mean, QK_1)
    store_parts(out_ptr + offset, start, WIDTH, length, x, BLOCK, QK_0, QK_1, WIDTH)


@triton.jit
def _dequantise_kernel(
    q_int8_ptr, q_scale_ptr, k_int8_ptr, k_scale_ptr, mean_ptr, q_ptr, k_ptr,
    Q, K, query_programs,
    WIDTH: tl.constexpr, QK_0: tl.constexpr, QK_1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one block of Q̂ or, in the programs that follow those, of K̂."""
    program = tl.program_id(0)
    if program < query_programs:
        _dequantise_block(
            q_int8_ptr, q_scale_ptr, None, q_ptr, program, Q, WIDTH, QK_0, QK_1, BLOCK
        )
    else:
        _dequantise_block(
            k_int8_ptr, k_scale_ptr, mean_ptr, k_ptr, program - query_programs, K,
            WIDTH, QK_0, QK_1, BLOCK,
        )  # fmt: skip


def dequantise(
    problem: Problem,
    quantised: Quantised,
    dtype: torch.dtype,
    with_mean: bool,
) -> tuple[Tensor, Tensor]:  # (B, H, Q, D) and (B, G, K, D)
    """Launch the kernel that returns query and key in `dtype`, the key with its mean on demand."""
    query, key = (
        torch.empty_like(tensor, dtype=dtype) for tensor in (quantised.query, quantised.key)
    )
    mean = quantised.key_mean if with_mean else None
    _dequantise_plan(problem)(_dequantise_kernel, *quantised[:4], mean, query, key)
    return query[..., : problem.head_dim], key[..., : problem.head_dim]


@functools.lru_cache(maxsize=1024)
def _dequantise_plan(problem: Problem) -> Launch:
    flags = problem.flags()
    constants = {"WIDTH": flags["QK_D"], "QK_0": flags["QK_0"], "QK_1": flags["QK_1"]}
    of_queries = problem.batch * problem.heads * triton.cdiv(problem.query_length, QUANT_ROWS)
    of_keys = problem.batch * problem.kv_heads * triton.cdiv(problem.key_length, QUANT_ROWS)
    return Launch(
        (of_queries + of_keys,),
        (problem.query_length, problem.key_length, of_queries),
        {**constants, "BLOCK": QUANT_ROWS, "num_warps": 4 if problem.head_dim <= 64 else 8},
    )


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
    """Launch the backward kernels into `dq`, `dk` and `dv`."""
    query, key = dequantise(problem, quantised, value.dtype, dlse is not None)
    flash_backward(
        problem, query, key, value, attn_mask, None, out, lse, dout, dlse, dq, dk, dv, None,
        quantised,
    )  # fmt: skip
