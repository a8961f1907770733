"""How the attention wheels are called: their layouts, names and habits, one adapter each.

A wheel is imported by the call that uses it; what it requires of a call is its row in `backends`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, Tensor]


class Arguments(NamedTuple):
    """The tensors and numbers of one call, as every adapter receives them."""

    query: Tensor  # (B, H, Q, D)
    key: Tensor  # (B, G, K, D)
    value: Tensor  # (B, G, K, E)
    attn_mask: Tensor | None  # broadcasts to (B, H, Q, K)
    dropout_p: float
    is_causal: bool
    scale: float | None
    return_lse: bool


def flash_attn(arguments: Arguments) -> Result:
    from flash_attn import flash_attn_func

    query, key, value, _, dropout_p, is_causal, scale, return_lse = arguments
    result = flash_attn_func(
        query.transpose(1, 2),  # the wheel's layout is (B, Q, H, D)
        key.transpose(1, 2),
        value.transpose(1, 2),
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_attn_probs=return_lse,
    )
    if return_lse:
        return result[0].transpose(1, 2), result[1]
    return result.transpose(1, 2)


def flash_attn4(arguments: Arguments) -> Result:
    from flash_attn.cute import flash_attn_func

    query, key, value, _, _, is_causal, scale, return_lse = arguments
    with _device_of(arguments):
        out, lse = flash_attn_func(
            query.transpose(1, 2),  # its layout is (B, Q, H, D)
            key.transpose(1, 2),
            value.transpose(1, 2),
            softmax_scale=scale,
            causal=is_causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            return_lse=return_lse,
        )
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)


def sageattention(arguments: Arguments) -> Result:
    from sageattention import sageattn

    # 1.x subtracts the token mean of the key in place, in the caller's tensor: smooth a copy here.
    key = arguments.key - arguments.key.mean(dim=2, keepdim=True)
    with _device_of(arguments):
        return sageattn(
            arguments.query,
            key,
            arguments.value,
            tensor_layout="HND",
            is_causal=arguments.is_causal,
            sm_scale=_scale(arguments),
            smooth_k=False,
        )


def sageattention2(arguments: Arguments) -> Result:
    from sageattention import sageattn

    # `sageattn` swallows keywords that it does not know: only those of its signature are passed.
    with _device_of(arguments):
        return sageattn(
            arguments.query,
            arguments.key,
            arguments.value,
            tensor_layout="HND",
            is_causal=arguments.is_causal,
            sm_scale=_scale(arguments),
            return_lse=arguments.return_lse,
        )


def _device_of(arguments: Arguments) -> torch.cuda.device:
    """Make the tensors' device the current one, for wheels that launch on whichever is current."""
    return torch.cuda.device(arguments.query.get_device())


def _scale(arguments: Arguments) -> float:
    return arguments.query.shape[-1] ** -0.5 if arguments.scale is None else arguments.scale
