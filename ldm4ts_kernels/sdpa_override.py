"""Serve `scaled_dot_product_attention` itself, for code that calls nothing else.

torch lets a package stand in for its flash attention operators (`register_flash_attention_impl`,
torch ≥ 2.11). This is the widest door and the coarsest: it holds for the whole process.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels import operators
from ldm4ts_kernels.requirements import import_error

NAME = "LDM4TS"
REPLACED = {  # by dispatch key
    "CUDA": "_scaled_dot_product_flash_attention",
    "CPU": "_scaled_dot_product_flash_attention_for_cpu",
}

logger = logging.getLogger("ldm4ts_kernels")


def activate() -> None:
    """Serve every SDPA call for which torch picks FlashAttention with this package's kernels.

    Process-wide, every thread, from now on until `restore`; models need no change. The first of
    `native` and `triton` that can serve a call does, as by name: also where `attention_fn` would
    decline it as not measured. A call that neither can serve (dropout, an unsupported GPU) goes to
    torch's own kernel, and the log says so once at INFO.

    Not caught, as torch never reaches its flash operator there:
      - fp32 on a GPU, an attn_mask, head dims beyond 256, and whatever `sdpa_kernel` forbids
      - calls for which torch prefers cuDNN, as it may on sm_90 and later
      - code with attention of its own: materialised scores, xformers, flex, the flash_attn wheel
      - `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` in their inference fast path

    Nor is there INT8: SDPA says exact. `accelerate_attention` takes all of these per layer.

    Raises RuntimeError where torch is too old.
    """
    import torch.nn.attention as registry

    if not hasattr(registry, "register_flash_attention_impl"):
        raise RuntimeError(
            "sdpa_override needs torch 2.11 or later, which lets flash attention be replaced;"
            f" this is {torch.__version__}"
        )
    registry.register_flash_attention_impl(NAME, register_fn=_Override)
    registry.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Give SDPA its own flash attention back; nothing happens where `activate` does not hold."""
    import torch.nn.attention as registry

    current = getattr(registry, "current_flash_attention_impl", lambda: None)
    if current() == NAME:
        registry.restore_flash_attention_impl()


class _Override:
    """The handle that torch keeps: our operators stand while its library lives."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for key in _keys():
            operator = REPLACED[key]
            self._replace(operator, key, _forward)
            self._replace(f"{operator}_backward", key, _backward)

    def _replace(self, operator: str, key: str, function: Any) -> None:
        own = torch.library.get_kernel(f"aten::{operator}", key)
        assert self.library is not None
        self.library.impl(operator, functools.partial(function, own), key, with_keyset=True)

    def remove(self) -> None:
        self.library = None


def _keys() -> list[str]:
    """Return the dispatch keys at which there is something to replace, and something to serve."""
    keys = ["CUDA"] if torch.backends.cuda.is_built() else []
    if import_error("triton") is None:
        from ldm4ts_kernels.kernels.flash import INTERPRET

        if INTERPRET:  # then the kernels run on the CPU; tests rely on it
            keys.append("CPU")
    return keys


def _forward(
    own: Any,  # torch's kernel
    keys: Any,
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, H, K, D)
    value: Tensor,  # (B, H, K, D)
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    on_cpu = query.device.type == "cpu"
    server = _server(query, key, value, dropout_p, is_causal, attn_mask, return_debug_mask)
    if server == "torch":
        if on_cpu:
            return own.call_boxed(
                keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        rest = (dropout_p, is_causal, return_debug_mask)
        return own.call_boxed(keys, query, key, value, *rest, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = operators.forward(server, query, key, value, is_causal, scale)
    if on_cpu:
        return out, lse
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    nothing = query.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, nothing


def _backward(
    own: Any,  # torch's kernel
    keys: Any,
    dout: Tensor,  # (B, H, Q, D)
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, H, K, D)
    value: Tensor,  # (B, H, K, D)
    out: Tensor,  # (B, H, Q, D)
    lse: Tensor,  # (B, H, Q)
    *rest: Any,  # on CUDA: lengths; dropout_p and is_causal; on CUDA: the seed and its offset
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    on_cpu = query.device.type == "cpu"
    dropout_p, is_causal = rest if on_cpu else rest[4:6]
    server = _server(query, key, value, dropout_p, is_causal, attn_mask)
    if server == "torch":
        mask = {"attn_mask": attn_mask} if on_cpu else {}
        return own.call_boxed(keys, dout, query, key, value, out, lse, *rest, **mask, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return operators.backward(server, dout, query, key, value, out, lse, is_causal, scale)


def _server(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    return_debug_mask: bool = False,
) -> str:
    """Return who serves a call; the backward pass of a call gets the answer of its forward."""
    if dropout_p or attn_mask is not None or return_debug_mask:
        return _announced("torch")
    call = operators.describe_part(query, key, value, is_causal)
    return _announced(operators.find_server(call) or "torch")


@functools.cache
def _announced(server: str) -> str:
    logger.info("scaled_dot_product_attention is served by: %s", server)
    return server
