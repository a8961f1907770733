"""The backends of `attention_fn` as data: what each requires of a call, and how to run it.

`CHAINS` lists, for each precision, the backends in the order `backend="auto"` tries them. To add a
backend, add a row; nothing else branches on a backend's name.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ldm4ts_kernels import native, native_int8, wheels
from ldm4ts_kernels.requirements import (
    HALF,
    HALF_OR_SINGLE,
    Call,
    Requires,
    capability,
    constant,
    is_hopper,
)
from ldm4ts_kernels.wheels import Arguments, Result

# What the adapter passes: its early versions return the LSE unasked, and know no such keyword.
FLASH_ATTN4_KEYWORDS = frozenset({"softmax_scale", "causal", "deterministic", "return_lse"})


@dataclass(frozen=True, slots=True)
class Backend:
    """One row: its name, what it requires, how it runs, and where `auto` declines it."""

    name: str
    requires: Requires
    run: Callable[[Arguments], Result]
    declines: Callable[[Call], str | None] = lambda call: None


def _triton_device(call: Call) -> str | None:
    # Interpreted kernels (TRITON_INTERPRET=1) also run on the CPU; tests rely on it.
    from ldm4ts_kernels.kernels import flash

    if call.device.type in (("cuda", "cpu") if flash.INTERPRET else ("cuda",)):
        return None
    return f"needs a cuda device, got {call.device.type}"


# Device time on an H200, bf16, where sdpa is cuDNN: benchmarks/results/attention_speed.csv.
def _declines_unmeasured(call: Call) -> str | None:
    if call.device.type == "cuda":
        return "is not yet measured on this kind of GPU: ask for it by name"
    return "runs on the CPU in Triton's interpreter, which is for tests: ask for it by name"


def _declines_native(call: Call) -> str | None:
    found = capability(call.device)
    if not is_hopper(found) and found[0] != 8:
        return _declines_unmeasured(call)
    if call.mask or call.dropout:
        return "is not yet measured with a mask or dropout"
    if found[0] == 8:
        return _declines_native_before_hopper(call, found)
    if call.head_dim > native.MAX_GRAD_HEAD_DIM:
        return f"is not yet measured at head dims past {native.MAX_GRAD_HEAD_DIM}"
    if call.head_dim <= 16 and max(call.key_length, call.query_length) <= 784:
        return None
    if call.needs_grad:
        if call.key_length <= 196 and call.head_dim <= 80:
            return None
        one_wave = call.batch * call.heads <= 64 and max(call.key_length, call.query_length) <= 64
        if 112 < call.head_dim <= 160 and one_wave:  # pairs of warps: csrc/sm80/tiles.h
            return None
        return (
            "is measured at 0.5 to 0.9 of sdpa's speed on sm_90 with a gradient past 196 keys, and"
            " past head dim 80 ahead up to 64 tokens of 64 heads at 113 to 160 alone"
        )
    if call.key_length < 256 and call.query_length <= 784:
        return None
    return "is measured at 0.5 to 1.0 of sdpa's speed on sm_90 from 256 keys or 1024 queries on"


# On sm_8x SDPA is FlashAttention-2. The tiles of these GPUs, on an H200 as if it had no more shared
# memory: benchmarks/results/attention_speed_100kib.csv, attention_speed_164kib.csv.
def _declines_native_before_hopper(call: Call, found: tuple[int, int]) -> str | None:
    if call.head_dim > 160:
        return "is not yet measured on this kind of GPU at head dims past 160"
    if 80 < call.head_dim <= 128:
        return "has tiles measured at 0.7 to 1.0 of FlashAttention-2's speed at head dims 81 to 128"
    if call.head_dim > 128 and (call.needs_grad or call.query_length <= 64):
        return (
            "has tiles measured at 0.9 to 1.0 of FlashAttention-2's speed past head dim 128 with a"
            " gradient or up to 64 queries"
        )
    if call.needs_grad and 48 < call.head_dim <= 64 and call.key_length > 1024 and found[1] != 0:
        return (
            "has tiles measured at 0.9 of FlashAttention-2's speed with a gradient past 1024 keys"
        )
    return None


def _declines_triton(call: Call) -> str | None:
    if not is_hopper(capability(call.device)):
        return _declines_unmeasured(call)
    if call.mask or call.is_causal or call.dtype not in HALF:
        return "is not yet measured with masks or in float32"
    length = min(call.query_length, call.key_length)
    wide = call.needs_grad and 128 < call.head_dim <= 160 and length >= 4096
    if wide or (call.head_dim == 64 and length >= 16384):
        return None
    return (
        "is measured at 0.8 to 1.0 of sdpa's speed on sm_90, or ahead by less than a launch takes"
    )


def _declines_int8(call: Call) -> str | None:
    if not is_hopper(capability(call.device)):
        return _declines_unmeasured(call)
    if call.mask or call.is_causal:
        return "is not yet measured with masks"
    length = min(call.query_length, call.key_length)
    if not call.needs_grad:
        if call.head_dim in (64, 128) and length >= 16384:
            return None
        return "overtakes sdpa on sm_90 at about 16000 tokens"
    if 128 < call.head_dim <= 160 and length >= 4096:
        return None
    return "is measured at 0.5 to 1.0 of sdpa's speed on sm_90 with a gradient"


def _declines_sageattention(call: Call) -> str | None:
    if not is_hopper(capability(call.device)):
        return None
    return "is measured at 0.3 to 0.9 of sdpa's speed on sm_90"


def _declines_native_int8(call: Call) -> str | None:
    if not is_hopper(capability(call.device)):
        return _declines_unmeasured(call)
    return "is measured at 0.4 to 0.9 of sdpa's speed on sm_90"


def _native_device(call: Call) -> str | None:
    return native.device_error(call.device.index or 0)


def _native_gradient(call: Call) -> str | None:
    if not call.needs_grad or call.head_dim <= native.MAX_GRAD_HEAD_DIM:
        return None
    return f"has no backward pass past head dim {native.MAX_GRAD_HEAD_DIM}, got {call.head_dim}"


def _default_stream(call: Call) -> str | None:
    if call.default_stream:
        return None
    return "launches on the default stream, and another one is or may be current"


def _flash_attn4_head_dim(call: Call) -> str | None:
    largest = 256 if is_hopper(capability(call.device)) else 128
    if call.head_dim % 8 == 0 and call.head_dim <= largest:
        return None
    return f"takes head dims up to {largest} that 8 divides, got {call.head_dim}"


def _flash_attn4_version(call: Call) -> str | None:
    missing = FLASH_ATTN4_KEYWORDS - _flash_attn4_keywords()
    if not missing:
        return None
    return f"needs a flash-attn-4 whose flash_attn_func knows {', '.join(sorted(missing))}"


@constant
def _flash_attn4_keywords() -> frozenset[str]:
    from flash_attn.cute import flash_attn_func

    return frozenset(inspect.signature(flash_attn_func).parameters)


def _triton_head_dim(call: Call) -> str | None:
    largest = 256 if call.dtype == torch.float32 else 512
    if call.head_dim <= largest:
        return None
    dtype = str(call.dtype).removeprefix("torch.")
    return f"takes head dims up to {largest} in {dtype}, got {call.head_dim}"


def _no_keys(call: Call) -> str | None:
    return "needs at least one key" if call.key_length == 0 else None


def _no_queries(call: Call) -> str | None:
    return "needs at least one query" if 0 in (call.query_length, call.batch) else None


def _native(arguments: Arguments) -> Result:
    query, key, value, attn_mask, dropout_p, is_causal, scale, return_lse = arguments
    return native.flash_attention(
        query, key, value, attn_mask, is_causal, scale, return_lse, dropout_p=dropout_p
    )


def _native_int8(arguments: Arguments) -> Result:
    query, key, value, _, _, is_causal, scale, return_lse = arguments
    return native_int8.int8_attention(query, key, value, is_causal, scale, return_lse)


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


def _triton_int8(arguments: Arguments) -> Result:
    from ldm4ts_kernels.kernels.int8 import int8_attention

    query, key, value, attn_mask, _, is_causal, scale, return_lse = arguments
    return int8_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, return_lse=return_lse
    )


def _sdpa(arguments: Arguments) -> Result:
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = arguments
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, query.dtype):  # its kernels on a GPU take no other
            attn_mask = attn_mask.to(query.dtype)
        if attn_mask.ndim < 2:
            attn_mask = attn_mask.expand(1, key.shape[2])
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=bool(query.shape[1] != key.shape[1]),  # torch.jit.trace makes it a tensor
    )


NATIVE = Backend(
    "native",
    Requires(
        loads=native.load_error,
        device="cuda",
        capability=(8, 0),
        dtypes=HALF,
        max_head_dim=native.MAX_HEAD_DIM,
        masks=frozenset({"boolean", "additive"}),
        unequal_head_dims=False,
        any_stride=False,
        extra=(_no_keys, _no_queries, _native_gradient, _native_device),
    ),
    _native,
    declines=_declines_native,
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
    wheels.flash_attn,
)
TRITON = Backend(
    "triton",
    Requires(
        module="triton",
        dtypes=HALF_OR_SINGLE,
        unequal_head_dims=False,
        any_stride=False,
        extra=(_triton_device, _triton_head_dim, _no_keys, _no_queries),
    ),
    _triton,
    declines=_declines_triton,
)
FLASH_ATTN4 = Backend(
    "flash_attn4",
    Requires(
        module="flash_attn.cute",  # of the wheel flash-attn-4
        device="cuda",
        capabilities=frozenset({(9, 0), (10, 0), (10, 3)}),
        dtypes=HALF,
        masks=frozenset(),
        dropout=False,
        lse_grad=False,
        unequal_causal=False,
        unequal_head_dims=False,
        any_stride=False,
        extra=(_no_keys, _no_queries, _flash_attn4_head_dim, _flash_attn4_version),
    ),
    wheels.flash_attn4,
    declines=_declines_unmeasured,
)
NATIVE_INT8 = Backend(
    "native_int8",
    Requires(
        loads=native_int8.load_error,
        device="cuda",
        capability=(8, 0),
        dtypes=HALF,
        max_head_dim=native_int8.MAX_HEAD_DIM,
        masks=frozenset(),
        dropout=False,
        unequal_head_dims=False,
        any_stride=False,
        extra=(_no_keys, _no_queries, _native_device),
    ),
    _native_int8,
    declines=_declines_native_int8,
)
TRITON_INT8 = Backend(
    "triton_int8",
    Requires(
        module="triton",
        dtypes=HALF,
        max_head_dim=256,
        masks=frozenset({"boolean", "additive"}),
        dropout=False,
        unequal_head_dims=False,
        any_stride=False,
        extra=(_triton_device, _no_keys, _no_queries),
    ),
    _triton_int8,
    declines=_declines_int8,
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
    wheels.sageattention2,
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
    wheels.sageattention,
    declines=_declines_sageattention,
)
SDPA = Backend("sdpa", Requires(lse=False, transforms=True), _sdpa)

CHAINS: dict[str, tuple[Backend, ...]] = {
    "exact": (NATIVE, FLASH_ATTN, TRITON, FLASH_ATTN4, SDPA),
    "int8": (NATIVE_INT8, SAGEATTENTION2, SAGEATTENTION, TRITON_INT8, SDPA),
}
