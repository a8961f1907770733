"""The oracle: attention in plain torch, on any device, in any dtype, with materialised scores.

Glossary of the dimensions used throughout the package:
    B batch, H query heads, G key/value heads (H is a multiple of G), Q query length, K key length,
    D head dim, E value head dim; L history, T horizon, V variates, S image side.

Kernels are held to these functions, run in float64; `attention_backend="default"`, the baseline of
every table, is `attention` in the model's own dtype.
"""

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, E)
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Q, K); bool: True attends; float: added
    *,
    is_causal: bool = False,
    bottom_right: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    scale: float | None = None,
    keep: Tensor | None = None,  # (B, H, Q, K) bool
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # (B, H, Q, E), (B, H, Q)
    """Compute softmax(scale * query @ keyᵀ + mask) @ value and the log-sum-exp of its rows.

    Args:
        is_causal: query i attends keys j ≤ i (top left, as SDPA aligns it).
        bottom_right: align the diagonal of `is_causal` and `window` so that the last query attends
            the last key: j ≤ i + K - Q.
        window: (left, right): key j is attended if i - left ≤ j ≤ i + right; None is unbounded.
        softcap: replace the scaled score s by softcap * tanh(s / softcap).
        scale: factor of the scores; D ** -0.5 when None.
        keep: dropout as an explicit mask; kept probabilities are divided by 1 - dropout_p.

    Returns:
        The output in the dtype of `query`, and the natural-log LSE of the scores before dropout.
        A row that attends no key gives 0 and LSE -inf, and sends no gradient.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-1, -2)  # (B, H, Q, K)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    visible = _visible(scores, is_causal, bottom_right, window)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = attn_mask if visible is None else visible & attn_mask
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if scores.shape[-1] == 0:
        return query @ key.transpose(-1, -2) @ value, scores.sum(-1) - math.inf
    empty = (scores.detach() == -math.inf).all(-1, keepdim=True)  # (B, H, Q, 1)
    probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    if keep is not None:
        probabilities = probabilities * keep / (1.0 - dropout_p)
    return probabilities.to(value.dtype) @ value, lse


def _visible(
    scores: Tensor,  # (B, H, Q, K)
    is_causal: bool,
    bottom_right: bool,
    window: tuple[int | None, int | None],
) -> Tensor | None:  # (Q, K) bool
    """Return which keys each query may attend by position, or None where all may."""
    left, right = window
    if is_causal:
        right = 0 if right is None else min(right, 0)
    if left is None and right is None:
        return None
    Q, K = scores.shape[-2:]
    row = torch.arange(Q, device=scores.device)[:, None] + (K - Q if bottom_right else 0)
    column = torch.arange(K, device=scores.device)[None, :]
    visible = torch.ones(Q, K, dtype=torch.bool, device=scores.device)
    if left is not None:
        visible &= column >= row - left
    if right is not None:
        visible &= column <= row + right
    return visible


def quantised_attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, E)
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Q, K)
    *,
    is_causal: bool = False,
    bottom_right: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    block_q: int = 128,
    block_k: int = 128,
    smooth: bool = True,
) -> tuple[Tensor, Tensor]:  # (B, H, Q, E), (B, H, Q)
    """Compute `attention` of query and key rounded to INT8, and the LSE of its rows.

    Every `block_q` rows of the query and `block_k` rows of the key share one scale, as `quantise`
    says; with `smooth` the key first loses its mean over tokens, which the softmax does not see and
    the LSE is given back. The rounding counts as the identity in the backward pass, so autograd
    computes the gradients of SageBwd (arXiv 2505.11594, section 4) with all products but S exact:
        dQ = scale · dS K̂ (+ scale · dLSE · mean),  dK = scale · dSᵀ Q̂,  dV = Pᵀ dO
    Masks, shapes and the result's dtype are those of `attention`.
    Source: SageAttention, arXiv 2410.02367, section 4.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mean = key.detach().double().mean(2, keepdim=True).float() * float(smooth)  # (B, G, 1, D)
    smoothed = key.detach().float() - mean
    out, lse = attention(
        dequantised(query.detach(), block_q).to(query.dtype) + (query - query.detach()),
        dequantised(smoothed, block_k).to(key.dtype) + (key - key.detach()),
        value,
        attn_mask,
        is_causal=is_causal,
        bottom_right=bottom_right,
        window=window,
        scale=scale,
    )
    mean = mean.to(query.dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    shift = scale * (query * mean).sum(-1)
    return out, lse + shift.masked_fill(lse == -math.inf, 0.0)  # a row that sees no key has none


def quantise(
    tensor: Tensor,  # (B, H, N, D)
    block: int,
) -> tuple[Tensor, Tensor]:  # (B, H, N, D) int8, (B, H, ⌈N / block⌉) float32
    """Compute scale = max |x| / 127 of every `block` rows and round(x / scale), half to even.

    A block of zeros (below 1e-30) gives exact zeros; a value that is not finite a scale of NaN.
    """
    rows = tensor.shape[2]
    blocks = torch.nn.functional.pad(tensor.float(), (0, 0, 0, -rows % block)).unflatten(
        2, (-1, block)
    )  # (B, H, ⌈N / block⌉, block, D)
    largest = blocks.abs().amax((-2, -1)).clamp(min=1e-30)
    steps = torch.full_like(largest, 127.0)  # torch divides by a plain number less exactly
    rounded = (blocks * (steps / largest)[..., None, None]).round()
    return rounded.flatten(2, 3)[:, :, :rows].to(torch.int8), largest / steps * (largest / largest)


def dequantised(tensor: Tensor, block: int) -> Tensor:  # (B, H, N, D) → the same, float32
    """Compute what is left of a tensor after `quantise`."""
    int8, scale = quantise(tensor, block)
    return int8 * scale.repeat_interleave(block, 2)[:, :, : tensor.shape[2], None]
