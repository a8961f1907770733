"""The backends of `attention_fn` as data: what each requires of a call, and how to run it.

`CHAINS` lists, for each precision, the backends in the order `backend="auto"` tries them. To add a
backend, add a row; nothing else branches on a backend's name.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = frozenset({torch.float16, torch.bfloat16})
HALF_OR_SINGLE = HALF | {torch.float32}

R = TypeVar("R")
Result = Tensor | tuple[Tensor, Tensor]


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


@dataclass(frozen=True, slots=True)
class Requires:
    """What a backend needs of a call. The defaults accept everything."""

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
    extra: tuple[Callable[[Call], str | None], ...] = ()

    def unmet(self, call: Call) -> list[str]:
        """Return every reason this call cannot be served; an empty list means it can."""
        outside = self._installation(call) + self._hardware(call)
        inside = self._tensors(call) + self._features(call)
        if outside:  # the row's own checks may import its module or ask its device
            return outside + inside
        return inside + [reason for reason in [check(call) for check in self.extra] if reason]

    def _installation(self, call: Call) -> list[str]:
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
        return reasons


@dataclass(frozen=True, slots=True)
class Backend:
    """One row: its name, what it requires, how it runs, and where `auto` declines it."""

    name: str
    requires: Requires
    run: Callable[[Arguments], Result]
    declines: Callable[[Call], str | None] = lambda call: None


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
    except (ImportError, OSError) as error:
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


def _sm(found: tuple[int, int]) -> str:
    return f"{found[0]}{found[1]}"


def _triton_device(call: Call) -> str | None:
    # Interpreted kernels (TRITON_INTERPRET=1) also run on the CPU; tests rely on it.
    from ldm4ts_kernels.kernels import flash

    if call.device.type in (("cuda", "cpu") if flash.INTERPRET else ("cuda",)):
        return None
    return f"needs a cuda device, got {call.device.type}"


def _declines_interpreted(call: Call) -> str | None:
    if call.device.type == "cuda":
        return None
    return "runs on the CPU in Triton's interpreter, which is for tests: ask for it by name"


def _default_stream(call: Call) -> str | None:
    if call.default_stream:
        return None
    return "launches on the default stream, and another one is or may be current"


def _no_keys(call: Call) -> str | None:
    return "needs at least one key" if call.key_length == 0 else None


def _no_queries(call: Call) -> str | None:
    return "needs at least one query" if 0 in (call.query_length, call.batch) else None


def _triton(arguments: Arguments) -> Result:
    from ldm4ts_kernels.kernels.flash import flash_attention

    query, key, value, attn_mask, dropout_p, is_causal, scale, return_lse = arguments
    return flash_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        return_lse=return_lse,
    )


def _flash_attn(arguments: Arguments) -> Result:
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


def _sageattention(arguments: Arguments) -> Result:
    from sageattention import sageattn

    # 1.x subtracts the token mean of the key in place, in the caller's tensor: smooth a copy here.
    key = arguments.key - arguments.key.mean(dim=2, keepdim=True)
    return sageattn(
        arguments.query,
        key,
        arguments.value,
        tensor_layout="HND",
        is_causal=arguments.is_causal,
        sm_scale=_scale(arguments),
        smooth_k=False,
    )


def _sageattention2(arguments: Arguments) -> Result:
    from sageattention import sageattn

    # `sageattn` swallows keywords that it does not know: only those of its signature are passed.
    return sageattn(
        arguments.query,
        arguments.key,
        arguments.value,
        tensor_layout="HND",
        is_causal=arguments.is_causal,
        sm_scale=_scale(arguments),
        return_lse=arguments.return_lse,
    )


def _scale(arguments: Arguments) -> float:
    return arguments.query.shape[-1] ** -0.5 if arguments.scale is None else arguments.scale


def _sdpa(arguments: Arguments) -> Result:
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = arguments
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


FLASH_ATTN = Backend(
    "flash_attn",
    Requires(
        module="flash_attn",
        major=2,
        device="cuda",
        capability=(8, 0),
        dtypes=HALF,
        max_head_dim=256,
        masks=frozenset(),
        lse_grad=False,
        unequal_causal=False,
        unequal_head_dims=False,
        any_stride=False,
        extra=(_no_keys, _no_queries),
    ),
    _flash_attn,
)
TRITON = Backend(
    "triton",
    Requires(
        module="triton",
        dtypes=HALF_OR_SINGLE,
        max_head_dim=256,
        unequal_head_dims=False,
        any_stride=False,
        extra=(_triton_device, _no_keys, _no_queries),
    ),
    _triton,
    declines=_declines_interpreted,
)
SAGEATTENTION2 = Backend(
    "sageattention2",
    Requires(
        module="sageattention",
        major=2,
        device="cuda",
        capabilities=frozenset({(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)}),
        dtypes=HALF,
        max_head_dim=128,
        masks=frozenset(),
        dropout=False,
        grad=False,
        unequal_causal=False,
        unequal_head_dims=False,
        any_stride=False,
        extra=(_no_keys, _no_queries, _default_stream),
    ),
    _sageattention2,
)
SAGEATTENTION = Backend(
    "sageattention",
    Requires(
        module="sageattention",
        major=1,
        device="cuda",
        capability=(8, 0),
        dtypes=HALF,
        head_dims=frozenset({64, 96, 128}),
        masks=frozenset(),
        dropout=False,
        grad=False,
        lse=False,
        unequal_causal=False,
        unequal_head_dims=False,
        any_stride=False,
        extra=(_no_keys, _no_queries),
    ),
    _sageattention,
)
SDPA = Backend("sdpa", Requires(lse=False), _sdpa)

CHAINS: dict[str, tuple[Backend, ...]] = {
    "exact": (FLASH_ATTN, TRITON, SDPA),
    "int8": (SAGEATTENTION2, SAGEATTENTION, SDPA),
}
