"""One attention layer of somebody's model: the policy it runs under, and what last ran."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels.attention import Explanation, attention_fn, explain, explain_call
from ldm4ts_kernels.kernels.autograd import is_transformed
from ldm4ts_kernels.requirements import Call


def materialised_attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, H, K, D)
    value: Tensor,  # (B, H, K, D)
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Q, K), added to the scores
) -> Tensor:  # (B, H, Q, D)
    """Compute attention with its (B, H, Q, K) weights in memory: the baseline of every table.

    As lean as that can be: of the tensors of that shape only the weights are kept for the backward.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


@dataclass(frozen=True)
class Policy:
    """What a layer asks of `attention_fn`; the backend "materialised" is the baseline instead."""

    precision: str = "exact"
    backend: str = "auto"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        """Compute attention; the arguments are those of `attention_fn`, less these two."""
        if self.backend == "materialised":
            return materialised_attention(query, key, value, *rest, **options)
        return attention_fn(
            query, key, value, *rest, **options, precision=self.precision, backend=self.backend
        )


class PluggedLayer:
    """A layer's name and policy, the shape of its last eager call, and who served that.

    A call of a form seen before costs one look-up; calls inside a compiled graph leave no record.
    """

    def __init__(self, name: str, policy: Policy) -> None:
        self.name = name
        self.policy = policy
        self.shape: tuple[int, ...] | None = None  # (B, H, Q, K, D)
        self.call: Call | None = None
        self._calls: dict[tuple[object, ...], Call] = {}

    @property
    def explanation(self) -> Explanation | None:
        """Why each backend would or would not serve the last eager call; None before the first."""
        if self.call is None:
            return None
        return explain_call(self.call, precision=self.policy.precision, backend=self.policy.backend)

    @property
    def served_by(self) -> str | None:
        """The backend that served the last eager call; None before the first one."""
        if self.shape is not None and self.policy.backend == "materialised":
            return "materialised"
        explanation = self.explanation
        return None if explanation is None else explanation.chosen

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Compute attention as the policy says, and note who serves it."""
        if not torch.compiler.is_compiling():
            self.record(query, key, value, attn_mask)
        return self.policy.attend(query, key, value, attn_mask)

    def record(
        self,
        query: Tensor,  # (B, H, Q, D)
        key: Tensor,  # (B, G, K, D)
        value: Tensor,  # (B, G, K, E)
        attn_mask: Tensor | None = None,
        **options: Any,  # of `attention_fn`, hashable
    ) -> None:
        """Note the form of this call: all that `attention_fn` picks a backend by."""
        self.shape = (*query.shape[:3], key.shape[2], query.shape[3])
        if self.policy.backend == "materialised":
            return
        kind = query.device.type
        form = (
            *(
                (t.shape, t.dtype, t.device, t.requires_grad, t.stride(-1))
                for t in (query, key, value, attn_mask)
                if t is not None
            ),
            torch.is_grad_enabled(),
            torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind),
            is_transformed(),
            *options.items(),
        )
        if form not in self._calls:
            self._calls[form] = explain(
                query,
                key,
                value,
                attn_mask,
                **options,
                precision=self.policy.precision,
                backend=self.policy.backend,
            ).call
        self.call = self._calls[form]
