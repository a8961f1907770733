"""What a backend may require of an attention call, and why a call does not meet it.

A refusal is a sentence; a call is met where there is none. Nothing here knows a backend by name.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

HALF = frozenset({torch.float16, torch.bfloat16})
HALF_OR_SINGLE = HALF | {torch.float32}
R = TypeVar("R")


class Call(NamedTuple):
    """One attention call without its data: all that a backend may decide on. Hashable."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    mask: str | None  # None, "boolean", "additive", or "additive with gradient"
    dropout: bool
    is_causal: bool
    needs_grad: bool
    return_lse: bool
    unit_stride: bool  # the last dimension of query, key and value has stride 1
    default_stream: bool  # the current stream is known to be the device's default one
    transformed: bool = False  # torch.func or forward-mode AD looks at the call


def describe(query: Tensor, key: Tensor, value: Tensor, **features: Any) -> Call:
    """Describe a call of (B, H, N, D) tensors; `features` are the fields that they do not show."""
    return Call(
        device=query.device,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        query_length=query.shape[2],
        key_length=key.shape[2],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        unit_stride=query.stride(3) == key.stride(3) == value.stride(3) == 1,
        **features,
    )


@dataclass(frozen=True, slots=True)
class Requires:
    """What a backend needs of a call. The defaults accept everything but torch's transforms."""

    loads: Callable[[], str | None] | None = None
    module: str | None = None
    major: int | None = None
    device: str | None = None
    capability: tuple[int, int] | None = None
    capabilities: frozenset[tuple[int, int]] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    head_dims: frozenset[int] | None = None
    max_head_dim: int | None = None
    masks: frozenset[str] = frozenset({"boolean", "additive", "additive with gradient"})
    dropout: bool = True
    grad: bool = True
    lse: bool = True
    lse_grad: bool = True
    unequal_causal: bool = True
    unequal_head_dims: bool = True
    any_stride: bool = True
    transforms: bool = False
    extra: tuple[Callable[[Call], str | None], ...] = ()

    def unmet(self, call: Call) -> list[str]:
        """Return every reason this call cannot be served; an empty list means it can."""
        outside = self._installation(call) + self._hardware(call)
        inside = self._tensors(call) + self._features(call)
        if outside:  # the row's own checks may import its module or ask its device
            return outside + inside
        return inside + [reason for reason in [check(call) for check in self.extra] if reason]

    def _installation(self, call: Call) -> list[str]:
        if self.loads and (error := self.loads()):
            return [error]
        if self.module is None:
            return []
        if error := import_error(self.module):
            return [error]
        found = version(self.module)
        if self.major is not None and found.split(".")[0] != str(self.major):
            return [f"needs {self.module} {self.major}.x, found {found}"]
        return []

    def _hardware(self, call: Call) -> list[str]:
        if self.device and call.device.type != self.device:
            return [f"needs a {self.device} device, got {call.device.type}"]
        found = capability(call.device)
        reasons = []
        if self.capability and found < self.capability:
            reasons.append(f"needs sm_{_sm(self.capability)} or later, got sm_{_sm(found)}")
        if self.capabilities and found not in self.capabilities:
            known = ", ".join(f"sm_{_sm(item)}" for item in sorted(self.capabilities))
            reasons.append(f"is built for {known} alone, got sm_{_sm(found)}")
        return reasons

    def _tensors(self, call: Call) -> list[str]:
        reasons = []
        if self.dtypes and call.dtype not in self.dtypes:
            known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
            reasons.append(f"takes {known}, got {str(call.dtype).removeprefix('torch.')}")
        if self.head_dims and call.head_dim not in self.head_dims:
            reasons.append(f"takes head dims {sorted(self.head_dims)}, got {call.head_dim}")
        if self.max_head_dim and max(call.head_dim, call.value_dim) > self.max_head_dim:
            found = max(call.head_dim, call.value_dim)
            reasons.append(f"takes head dims up to {self.max_head_dim}, got {found}")
        if not self.unequal_head_dims and call.head_dim != call.value_dim:
            reasons.append(
                f"needs one head dim, got {call.head_dim} in query and {call.value_dim} in value"
            )
        if not self.any_stride and not call.unit_stride:
            reasons.append("needs stride 1 in the last dimension of query, key and value")
        return reasons

    def _features(self, call: Call) -> list[str]:
        reasons = []
        if call.mask and call.mask not in self.masks:
            reasons.append(f"takes no {call.mask} mask")
        if call.dropout and not self.dropout:
            reasons.append("has no dropout")
        if call.needs_grad and not self.grad:
            reasons.append("has no backward pass")
        if call.return_lse and not self.lse:
            reasons.append("does not return the LSE")
        elif call.return_lse and call.needs_grad and not self.lse_grad:
            reasons.append("returns an LSE that carries no gradient")
        if call.is_causal and not self.unequal_causal and call.query_length != call.key_length:
            reasons.append("has no top-left causal mask for unequal query and key lengths")
        if call.transformed and not self.transforms:
            reasons.append("knows neither torch.func nor forward-mode AD")
        return reasons


# What a wheel raises that was built against other versions of what it imports.
BROKEN_IMPORT = (ImportError, OSError, AttributeError, RuntimeError, TypeError, ValueError)


def constant(function: Callable[..., R]) -> Callable[..., R]:
    """Compute once per arguments, and be a constant to Dynamo, which cannot trace an import."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def look_up(*args: Hashable) -> R:
        return cached(*args)

    # What torch.compiler.assume_constant_result sets; calling it would import all of Dynamo.
    look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return look_up


@constant
def import_error(module: str) -> str | None:
    """Return why `module` does not import, or None. The only place where an import may fail."""
    try:
        importlib.import_module(module)
    except BROKEN_IMPORT as error:
        return f"{module} does not import: {error}"
    return None


@constant
def version(module: str) -> str:
    """Return the version of an importable module; "0" where it does not say."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(module), "__version__", "0"))


@constant
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device; (0, 0) for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@constant  # torch 2.11's Dynamo cannot compare a tuple that a constant function gave it
def is_hopper(found: tuple[int, int]) -> bool:
    """Return whether a compute capability is that of an H100 or H200."""
    return found == (9, 0)


def _sm(found: tuple[int, int]) -> str:
    return f"{found[0]}{found[1]}"
