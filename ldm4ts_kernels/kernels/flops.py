"""The floating-point operations of an attention operator, counted as torch counts its own.

`torch.utils.flop_counter.FlopCounterMode` reports them, and `activation_memory_budget` of
torch.compile weighs them against the bytes that an output takes before it recomputes anything.
A counter knows the formulas of the time it was made, and a backend loads at its first call: make
the counter after that.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def register_attention_flops(
    forward: torch._ops.OpOverloadPacket, backward: torch._ops.OpOverloadPacket, value_at: int
) -> None:
    """Count 4·B·H·Q·K·D for a forward operator and 10·B·H·Q·K·D for its backward.

    That is two and five matrix products. `forward` starts with query, key and value; `backward`
    starts with the output's gradient and has `value` as its argument number `value_at`, from 0.
    Masks do not lower the count, as they do not for torch's own operators.
    """

    def forward_flops(query: Any, key: Any, *rest: Any, **options: Any) -> int:
        return 2 * _product_flops(query, key)

    def backward_flops(*arguments: Any, **options: Any) -> int:
        return 5 * _product_flops(arguments[0], arguments[value_at])

    register_flop_formula(forward)(forward_flops)
    register_flop_formula(backward)(backward_flops)


def _product_flops(rows: Any, columns: Any) -> int:  # (B, H, Q, D) and (B, G, K, D)
    batch, heads, queries, head_dim = rows
    return 2 * batch * heads * queries * columns[2] * head_dim
