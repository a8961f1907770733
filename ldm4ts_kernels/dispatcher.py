"""Plug layers whose processors call diffusers' attention dispatcher: Flux, Wan, QwenImage, ….

The dispatcher picks a function by a name that each processor carries, out of a closed enum, and
diffusers has no public way to add one. So three of its private names are used here, and checked: a
registry entry per policy under an enum member that the enum itself does not list. Nothing that a
model without our member runs changes.
"""

import copy
import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ldm4ts_kernels.context_parallel import can_share, shared_attention
from ldm4ts_kernels.plugged_layer import PluggedLayer, Policy

_running = threading.local()  # .layer: the plugged layer whose forward pass this thread is in


def is_dispatched(processor: object) -> bool:
    """Return whether a processor calls the dispatcher, under a name of its own."""
    return hasattr(processor, "_attention_backend")


def dispatched_processor(processor: Any, policy: Policy) -> Any:
    """Return a processor like this one whose attention calls follow the policy.

    Raises RuntimeError where this version of diffusers keeps its dispatcher elsewhere.
    """
    # A processor may serve several layers, so each gets its own; one with weights serves its own.
    plugged = processor if isinstance(processor, nn.Module) else copy.copy(processor)
    plugged._attention_backend = _member(policy)
    return plugged


class Announce:
    """A forward pre-hook that tells the dispatcher's function, in eager calls, whose call it is.

    The function is shared by all layers of a policy, so that a compiled block serves every layer.
    """

    def __init__(self, layer: PluggedLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _running.layer = self.layer


@functools.cache
def _member(policy: Policy) -> Any:
    """Register a function for this policy; return the name it goes by."""
    try:
        from diffusers.models.attention_dispatch import (
            AttentionBackendName,
            _AttentionBackendRegistry,
        )

        register = _AttentionBackendRegistry.register
    except (ImportError, AttributeError) as error:
        from diffusers import __version__

        raise RuntimeError(
            f"diffusers {__version__} keeps its attention dispatcher elsewhere than 0.36 to 0.42"
            f" did, so models like Flux cannot be plugged: {error}"
        ) from error
    value = f"ldm4ts:{policy.precision}:{policy.backend}"
    member: Any = str.__new__(AttentionBackendName, value)
    member._name_ = member._value_ = value
    member.__reduce_ex__ = lambda protocol: (_member, (policy,))  # or a load would ask the enum
    register(member, supports_context_parallel=can_share(policy))(_dispatched(policy))
    return member


def _dispatched(policy: Policy) -> Any:
    # diffusers drops every keyword that is not in this signature, so it names all that there are.
    def attend(
        query: Tensor,  # (B, Q, H, D)
        key: Tensor,  # (B, K, G, D)
        value: Tensor,  # (B, K, G, E)
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        window_size: Any = None,
        softcap: float | None = None,
        return_attn_probs: bool | None = None,
        _parallel_config: Any = None,
    ) -> Any:  # (B, Q, H, E), and with return_lse also (B, H, Q)
        _refuse(
            window_size=window_size,
            softcap=softcap,
            return_attn_probs=return_attn_probs,
        )
        if attn_mask is not None:
            attn_mask = _as_mask(attn_mask, query, key)
        if _parallel_config is not None:
            rest = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
            return shared_attention(
                policy, query, key, value, *rest, parallel_config=_parallel_config
            )
        options: dict[str, Any] = {
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
            "return_lse": return_lse,
        }
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        layer = None if torch.compiler.is_compiling() else getattr(_running, "layer", None)
        if layer is not None:  # None where a processor is called without its module
            layer.record(query, key, value, attn_mask, **options)
        result = policy.attend(query, key, value, attn_mask, **options)
        if return_lse:
            return result[0].transpose(1, 2), result[1]
        return result.transpose(1, 2)

    return attend


def _refuse(**arguments: Any) -> None:
    for name, argument in arguments.items():
        if argument not in (None, False, 0, (-1, -1)):
            raise NotImplementedError(f"{name}={argument!r}: ldm4ts_kernels has no such attention")


def _as_mask(
    attn_mask: Any,
    query: Tensor,  # (B, Q, H, D)
    key: Tensor,  # (B, K, G, D)
) -> Tensor:  # broadcasts to (B, H, Q, K)
    if not isinstance(attn_mask, Tensor):
        raise NotImplementedError(
            f"attn_mask must be a tensor, got {type(attn_mask).__name__}: flex attention's masks"
            " are served by its own backend alone"
        )
    if attn_mask.shape == (query.shape[0], key.shape[1]):  # a mask of the keys
        return attn_mask[:, None, None, :]
    return attn_mask
