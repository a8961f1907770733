"""What `attention_fn` accepts: any leading dimensions, autocast, and the checks, each by name."""

from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels.requirements import constant

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def fold(
    query: Tensor,  # (Q, D), (B, Q, D) or (B, …, H, Q, D)
    key: Tensor,  # of as many dimensions, K for Q
    value: Tensor,  # likewise
    attn_mask: Tensor | None,  # broadcasts to the scores
) -> Inputs:
    """Return the same call in four dimensions: one head where there is none, one batch of many."""
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim != query.ndim:
            raise ValueError(f"{name} must be {query.ndim}-D like query, got {tuple(tensor.shape)}")
        if tensor.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} must start with {tuple(query.shape[:-3])} like query,"
                f" got {tuple(tensor.shape)}"
            )
    lead = query.shape[:-3]
    if attn_mask is not None and attn_mask.ndim > query.ndim:
        raise ValueError(
            f"attn_mask must broadcast to {(*query.shape[:-1], key.shape[-2])},"
            f" got {tuple(attn_mask.shape)}"
        )
    if query.ndim == 3 and attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unsqueeze(1)
    elif attn_mask is not None and attn_mask.ndim > 3:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)

    def folded(tensor: Tensor) -> Tensor:  # (B, H, N, D)
        if tensor.ndim > 3:
            return tensor.flatten(0, -4)
        return tensor.unsqueeze(-3) if tensor.ndim == 3 else tensor[None, None]

    return folded(query), folded(key), folded(value), attn_mask


def unfold(result: Any, shape: torch.Size, return_lse: bool) -> Any:
    """Give the result of a folded call the leading dimensions of its query's `shape`."""
    if return_lse:
        out, lse = result
        return out.reshape(*shape[:-1], out.shape[-1]), lse.reshape(shape[:-1])
    return result.reshape(*shape[:-1], result.shape[-1])


def autocast(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Inputs:
    """Cast as SDPA is cast under autocast: each floating tensor but float64 to its dtype."""
    kind = query.device.type
    if not _may_autocast(kind) or not torch.is_autocast_enabled(kind):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(query), cast(key), cast(value), attn_mask if attn_mask is None else cast(attn_mask)


@constant  # torch 2.11's Dynamo does not know the question
def _may_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """Raise ValueError, naming the argument, where a call of 4-D tensors is none."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_nested:
            raise ValueError(
                f"{name} must be a dense tensor: scaled_dot_product_attention takes nested ones"
            )
    _check_shapes(query, key, value, enable_gqa)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, got {tensor.device}")
    if not query.dtype.is_floating_point or query.dtype.itemsize == 1:
        raise ValueError(f"query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    if attn_mask is not None:
        _check_mask(query, key, attn_mask, is_causal)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape (B, H, N, D), got {tuple(tensor.shape)}")
    B, H, _, D = query.shape
    G, K = key.shape[1], key.shape[2]
    if D == 0:
        raise ValueError(f"query must have a head dim of at least 1, got {tuple(query.shape)}")
    if key.shape != (B, G, K, D):
        raise ValueError(f"key must have shape ({B}, {H}, K, {D}), got {tuple(key.shape)}")
    if value.shape[:3] != (B, G, K):
        raise ValueError(f"value must have shape ({B}, {G}, {K}, E), got {tuple(value.shape)}")
    if H != G and not enable_gqa:
        raise ValueError(
            f"key must have {H} heads like query, got {G}; enable_gqa=True allows less"
        )
    if G == 0 or H % G:
        raise ValueError(f"key must have a number of heads that divides the query's {H}, got {G}")


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on {query.device} like query, got {attn_mask.device}")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(f"attn_mask must be bool, float32 or {query.dtype}, got {attn_mask.dtype}")
    full = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
    if attn_mask.ndim > 4 or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(f"attn_mask must broadcast to {full}, got {tuple(attn_mask.shape)}")
