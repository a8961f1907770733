"""Queries shared among programs, where the keys' own are too few to fill a GPU."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ldm4ts_kernels.kernels.problem import Problem


@contextlib.contextmanager
def summed_parts(dk: Tensor, dv: Tensor, splits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the splits of the queries write: dK and dV, or float32 parts, summed on exit."""
    if splits == 1:
        yield dk[None], dv[None]
        return
    shares = torch.empty((2, splits, *dk.shape), dtype=torch.float32, device=dk.device)
    yield shares[0], shares[1]
    dk.copy_(shares[0].sum(0))
    dv.copy_(shares[1].sum(0))


def part_strides(problem: Problem, whole: tuple[int, ...], splits: int) -> tuple[int, ...]:
    """Return the four strides of dK and of dV as `summed_parts` yields them, from their three."""
    if splits == 1:
        return 0, *whole[:3], 0, *whole[3:]
    head = problem.key_length * problem.head_dim
    rows = (problem.kv_heads * head, head, problem.head_dim)
    return (problem.batch * rows[0], *rows) * 2


@functools.cache
def split_queries(problem: Problem, block_q: int, block_k: int) -> tuple[int, int]:
    """Return into how many parts, of how many rows, a key block's queries are split to fill a GPU.

    Short keys make few programs (77 keys and 32 heads: 32 on 132 multiprocessors); each split then
    sums its share into float32, and the shares are added in a fixed order.
    """
    programs = triton.cdiv(problem.key_length, block_k) * problem.batch * problem.kv_heads
    blocks = triton.cdiv(problem.query_length, block_q)
    splits = max(1, min(256 // programs, blocks // 4))
    rows_a_split = triton.cdiv(blocks, splits) * block_q
    return triton.cdiv(problem.query_length, rows_a_split), rows_a_split
