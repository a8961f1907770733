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
