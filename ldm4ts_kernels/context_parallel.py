"""Attention over a sequence that several devices share, on diffusers' ring and Ulysses templates.

diffusers moves the keys between the devices and merges the parts by their LSE; it asks a backend
for two functions, forward and backward over one part, which are here.
"""

from typing import Any

from torch import Tensor

from ldm4ts_kernels import operators
from ldm4ts_kernels.plugged_layer import Policy


def can_share(policy: Policy) -> bool:
    """Return whether layers under this policy can share their sequence among devices."""
    return policy.precision == "exact" and policy.backend in ("auto", *operators.SERVERS)


def shared_attention(policy: Policy, *arguments: Any, parallel_config: Any) -> Any:
    """Compute attention of (B, N, H, D) tensors of which each device holds a part of the N.

    The arguments are those of diffusers' backends, without keywords. Raises NotImplementedError for
    a policy, a mask or a call that `native` and `triton` cannot serve in parts.
    """
    import diffusers
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    if not can_share(policy):
        raise NotImplementedError(
            f"_parallel_config: precision={policy.precision!r}, backend={policy.backend!r} cannot"
            f" share a sequence among devices; precision='exact' on {[*operators.SERVERS]} can"
        )
    if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
        raise NotImplementedError(
            "_parallel_config: sharing a sequence needs diffusers 0.42 or later, whose ring hands"
            f" the backward pass the keys of every device; this is {diffusers.__version__}"
        )
    return _templated_context_parallel_attention(
        *arguments,
        forward_op=_Forward(policy),
        backward_op=_backward_op,
        _parallel_config=parallel_config,
    )


class _Forward:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(
        self,
        ctx: Any,
        query: Tensor,  # (B, Q, H, D)
        key: Tensor,  # (B, K, H, D)
        value: Tensor,  # (B, K, H, D)
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _save_ctx: bool = True,
        _parallel_config: Any = None,
    ) -> Any:  # (B, Q, H, D), and with return_lse also (B, Q, H)
        if attn_mask is not None or dropout_p:
            raise NotImplementedError("attn_mask and dropout_p: a shared sequence takes neither")
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        server = self._server(q, k, v, is_causal)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse = operators.forward(server, q, k, v, is_causal, scale)
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
        if _save_ctx:
            ctx.save_for_backward(query, key, value, out, lse)
            ctx.server, ctx.is_causal, ctx.scale = server, is_causal, scale
        return (out, lse) if return_lse else out

    def _server(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> str:
        call = operators.describe_part(query, key, value, is_causal)
        names = [*operators.SERVERS] if self.policy.backend == "auto" else [self.policy.backend]
        against = {name: operators.SERVERS[name].requires.unmet(call) for name in names}
        for name, reasons in against.items():
            if not reasons:
                return name
        raise NotImplementedError(
            "\n".join(f"{name}: {'; '.join(reasons)}" for name, reasons in against.items())
        )


def _backward_op(
    ctx: Any,
    dout: Tensor,  # (B, Q, H, D)
    *unused: Any,  # the LSE's gradient, which the templates do not carry
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, ...]:  # each (B, N, H, D)
    # The ring hands in another device's keys, and the output and LSE of all; Ulysses hands nothing.
    given = (query, key, value, out, lse)
    whole = [
        (saved if tensor is None else tensor).transpose(1, 2)
        for tensor, saved in zip(given, ctx.saved_tensors, strict=True)
    ]
    q, k, v, o, log_sums = whole  # (B, H, N, D), and (B, H, Q)
    dout = dout.transpose(1, 2)
    grads = operators.backward(ctx.server, dout, q, k, v, o, log_sums, ctx.is_causal, ctx.scale)
    return tuple(grad.transpose(1, 2) for grad in grads)
