"""A module under autocast without autocast's casts, which are a third of a small step's kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call


class _Rounded(torch.autograd.Function):
    """Parameters in another dtype, their gradients in their own: one launch for many of each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = parameters[0].dtype
        return _cast(parameters, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *_cast(gradients, ctx.dtype)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return tuple(cast)


def call_rounded(module: Any, *inputs: Tensor) -> Tensor:
    """Return module(*inputs)[0] of a diffusers model, in the dtype of the autocast that is on.

    All of it computes in that dtype, norms included (their sums in float32), where autocast would
    cast each weight, and each norm's input and output, in a kernel of its own. What is recomputed
    looks for its weights in the module again, so that float32 ones are left to autocast there; and
    so are those of which each process holds a share, whole in a layer's own call alone.
    """
    kind, own = inputs[0].device.type, next(module.parameters()).dtype
    rounding = torch.is_autocast_enabled(kind) and torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype(kind) if rounding else own
    shared = any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
    if not rounding or shared or (module.is_gradient_checkpointing and own != dtype):
        return module(*inputs, return_dict=False)[0]
    with torch.autocast(kind, enabled=False):
        given = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
        if own == dtype:
            return module(*given, return_dict=False)[0]
        names, parameters = zip(*module.named_parameters(), strict=True)
        weights = dict(zip(names, _Rounded.apply(dtype, *parameters), strict=True))
        return functional_call(module, weights, given, {"return_dict": False})[0]
