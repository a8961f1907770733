"""`attention_fn` and `explain`: the only door to every backend."""

import logging
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ldm4ts_kernels import inputs
from ldm4ts_kernels.backends import CHAINS, Arguments, Backend
from ldm4ts_kernels.kernels.autograd import is_transformed
from ldm4ts_kernels.requirements import Call, Requires, constant, describe

logger = logging.getLogger("ldm4ts_kernels")


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why each of the others does not.

    `reasons` maps each backend of the chain, in order, to the sentences that speak against it; one
    with none could serve the call. `chosen` is the backend that would run, None where none can.
    """

    call: Call
    precision: str
    reasons: Mapping[str, tuple[str, ...]]
    chosen: str | None

    def __str__(self) -> str:
        width = max(map(len, self.reasons), default=0)
        lines = [f"attention_fn, precision={self.precision!r}: {self.chosen or 'nothing'} serves"]
        for name, reasons in self.reasons.items():
            verdict = "serves" if name == self.chosen else "could serve"
            lines.append(f"  {name:<{width}}  {'; '.join(reasons) or verdict}")
        return "\n".join(lines)


def attention_fn(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, G, K, D)
    value: Tensor,  # (B, G, K, E)
    attn_mask: Tensor | None = None,  # broadcasts to (B, H, Q, K)
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    precision: str = "exact",
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:  # (B, H, Q, E), and with return_lse also (B, H, Q)
    """Compute softmax(scale * query @ keyᵀ + attn_mask) @ value, on the fastest backend that can.

    A drop-in for `torch.nn.functional.scaled_dot_product_attention`: the positional part has its
    order and meaning, the leading dimensions may be fewer or more than (B, H), and under autocast
    the inputs are cast. Under torch.func (grad, vmap, jvp) and forward-mode AD, SDPA serves.

    Args:
        query, key, value: float16, bfloat16, float32 or float64 of one device. Strides are free.
        attn_mask: boolean (True attends), or float32 or of the query's dtype (added to the scores).
        dropout_p: probability of dropping an attention weight, in [0, 1).
        is_causal: query i attends keys j ≤ i. Excludes `attn_mask`.
        scale: factor of the scores; D ** -0.5 when None.
        enable_gqa: H may be a multiple of G; query head h attends key/value head h // (H // G).
        precision: "exact" never quantises; "int8" may quantise query and key (SageAttention,
            arXiv 2410.02367), and ends in SDPA with one warning where nothing else can serve.
        backend: "auto", or a name of `backends.CHAINS[precision]`, which then runs or raises.
        return_lse: also return the log-sum-exp of the scores (natural log, float32).

    Raises:
        ValueError: shapes, dtypes, devices or options disagree; the message names the argument.
        NotImplementedError: no backend, or not the one named, can serve the call; with each reason.
    """
    if query.ndim not in (0, 1, 4):
        result = attention_fn(
            *inputs.fold(query, key, value, attn_mask),
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            precision=precision,
            backend=backend,
            return_lse=return_lse,
        )
        return inputs.unfold(result, query.shape, return_lse)
    query, key, value, attn_mask = inputs.autocast(query, key, value, attn_mask)
    options = (dropout_p, is_causal, enable_gqa, return_lse, precision, backend)
    if torch.compiler.is_compiling():
        chosen = _find(query, key, value, attn_mask, *options)
    else:
        signature = _sign(query, key, value, attn_mask, precision), options
        if (known := _served.get(signature)) is None:
            known = _find(query, key, value, attn_mask, *options)
            _remember(signature, known)
        chosen = known
    return chosen.run(
        Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, return_lse)
    )


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    precision: str = "exact",
    backend: str = "auto",
    return_lse: bool = False,
) -> Explanation:
    """Say, backend by backend, why each would or would not serve this call, and which one would.

    Takes what `attention_fn` takes, runs nothing, and raises ValueError where that would.
    """
    if query.ndim not in (0, 1, 4):
        query, key, value, attn_mask = inputs.fold(query, key, value, attn_mask)
    query, key, value, attn_mask = inputs.autocast(query, key, value, attn_mask)
    inputs.check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    call = _describe(query, key, value, attn_mask, dropout_p, is_causal, return_lse, precision)
    return explain_call(call, precision=precision, backend=backend)


def explain_call(call: Call, *, precision: str = "exact", backend: str = "auto") -> Explanation:
    """Explain a call that is described rather than made: see `explain`."""
    auto = backend == "auto"
    rows = _rows(precision, backend)
    reasons = {row.name: tuple(_reasons(row, call, auto)) for row in rows}
    if auto and _has_one_key(call):
        return Explanation(call, precision, MappingProxyType({"one key": (), **reasons}), "one key")
    row = _choose(rows, call, backend)
    chosen = row.name if row else None
    return Explanation(call, precision, MappingProxyType(reasons), chosen)


def _reasons(row: Backend, call: Call, auto: bool) -> list[str]:
    reasons = row.requires.unmet(call)
    if auto and not reasons and (decline := row.declines(call)):
        reasons.append(decline)
    return reasons


def _choose(rows: tuple[Backend, ...], call: Call, backend: str) -> Backend | None:
    able = [row for row in rows if not row.requires.unmet(call)]
    for row in able:
        if backend != "auto" or row.declines(call) is None:
            return row
    return able[0] if able else None  # one that `auto` would rather not use is better than none


_served: dict[Hashable, Backend] = {}  # by signature: calls that were checked, and who serves them
MOST_SERVED = 4096


def _sign(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, precision: str
) -> Hashable:
    """Return all that `_find` looks at beside a call's options, in a fifth of its time."""
    if query.is_nested or key.is_nested or value.is_nested:
        return None  # has no shape, and is refused
    return (
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        query.stride()[-1:] == key.stride()[-1:] == value.stride()[-1:] == (1,),
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad),
        is_transformed(),
        attn_mask is not None
        and (
            attn_mask.shape,
            attn_mask.dtype,
            attn_mask.device,
            torch.is_grad_enabled() and attn_mask.requires_grad,
        ),
        precision == "int8" and _on_default_stream(query.device),
    )


def _remember(signature: Hashable, row: Backend) -> None:
    if len(_served) >= MOST_SERVED:
        _served.clear()
    _served[signature] = row


def _find(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    return_lse: bool,
    precision: str,
    backend: str,
) -> Backend:
    """Check a call of 4-D tensors and return who serves it."""
    inputs.check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    call = _describe(query, key, value, attn_mask, dropout_p, is_causal, return_lse, precision)
    if backend == "auto" and _has_one_key(call):
        _chain(precision)
        return ONE_KEY
    chosen = _select(call, precision, backend)
    _announce(chosen.name, precision)
    return chosen


def _select(call: Call, precision: str, backend: str) -> Backend:
    rows = _rows(precision, backend)
    chosen = _choose(rows, call, backend)
    if chosen is not None:
        return chosen
    refused = [
        f"{row.name} cannot serve this call: {'; '.join(row.requires.unmet(call))}" for row in rows
    ]
    raise NotImplementedError("\n".join([*refused, f"the call: {call}"]))


def _chain(precision: str) -> tuple[Backend, ...]:
    if precision not in CHAINS:
        raise ValueError(f"precision must be one of {sorted(CHAINS)}, got {precision!r}")
    return CHAINS[precision]


def _rows(precision: str, backend: str) -> tuple[Backend, ...]:
    """Return what may serve: the chain for "auto", else the one row of that name."""
    chain = _chain(precision)
    if backend == "auto":
        return chain
    for row in chain:
        if row.name == backend:
            return (row,)
    known = ["auto", *(row.name for row in chain)]
    raise ValueError(f"backend must be one of {known} for {precision=}, got {backend!r}")


@constant
def _announce(name: str, precision: str) -> None:
    """Log the first use of a backend; warn where int8 was asked for and nothing quantises."""
    logger.info("attention backend in use: %s (precision %s)", name, precision)
    if precision == "int8" and name == "sdpa":
        warnings.warn(
            "precision='int8' is served by sdpa, which does not quantise: no INT8 backend serves"
            " this call; ldm4ts_kernels.explain says why",
            stacklevel=5,
        )


class _OneKey(torch.autograd.Function):
    """Attention over one key: the softmax is 1, the output the value, and no score is formed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.shapes = query.shape, key.shape, value.shape
        groups = query.shape[1] // value.shape[1]
        return (
            value[:, :, None]
            .expand(-1, -1, groups, query.shape[2], -1)
            .reshape(*query.shape[:3], value.shape[-1])
            .contiguous()
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_shape, key_shape, value_shape = ctx.shapes
        zero = grad.new_zeros(())  # the softmax of one score is constant
        dv = grad.unflatten(1, (value_shape[1], -1)).sum((2, 3)).unsqueeze(2)
        return zero.expand(query_shape), zero.expand(key_shape), dv


ONE_KEY = Backend("one key", Requires(), lambda given: _OneKey.apply(*given[:3]))


def _has_one_key(call: Call) -> bool:
    excluded = call.mask or call.dropout or call.return_lse or call.transformed
    return call.key_length == 1 and not excluded


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    return_lse: bool,
    precision: str,
) -> Call:
    mask = None
    if attn_mask is not None:
        mask = "boolean" if attn_mask.dtype == torch.bool else "additive"
        if attn_mask.requires_grad and torch.is_grad_enabled():
            mask = "additive with gradient"
    grads = query.requires_grad or key.requires_grad or value.requires_grad
    return describe(
        query,
        key,
        value,
        mask=mask,
        dropout=dropout_p > 0.0,
        is_causal=is_causal,
        needs_grad=torch.is_grad_enabled() and (grads or mask == "additive with gradient"),
        return_lse=return_lse,
        default_stream=precision == "int8" and _on_default_stream(query.device),
        transformed=is_transformed(),
    )


def _on_default_stream(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
