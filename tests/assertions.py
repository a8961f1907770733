"""How close is close enough: error budgets taken from the reference, not from a hand-tuned atol."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_as_accurate_as(
    actual: Tensor,  # the kernel's result
    rounded: Tensor,  # the reference run in the kernel's dtype
    exact: Tensor,  # the reference run in float64
    name: str,
    slack: float = 2.0,
    roundings: float = 1.0,
    cancelled: float = 0.0,
) -> None:
    """Require the error of `actual` to be within `slack` of the reference's own, plus roundings.

    `cancelled` is the size of terms, summed in float32, that cancel in the exact result: their
    rounding stays where the result itself is 0.
    """
    exact = exact.double()
    error = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    own = (rounded.double() - exact).abs().max().item() if exact.numel() else 0.0
    largest = exact.abs().max().item() if exact.numel() else 0.0
    budget = slack * own + roundings * torch.finfo(actual.dtype).eps * largest
    budget += torch.finfo(torch.float32).eps * cancelled
    assert torch.isfinite(actual).all(), f"{name}: non-finite values"
    assert error <= budget, f"{name}: error {error:.2e} exceeds {budget:.2e}"


def cancelled_terms(tensors: Sequence[Tensor], dout: Tensor) -> float:
    """Return the size of what cancels in dQ and dK of a row with one key, where the softmax is 1.

    There dS = dO · V - rowsum(dO ∘ O) is exactly 0, and a kernel leaves the rounding of two float32
    sums of products, times K or Q. With more keys such a rounding is far below the gradient's own.
    """
    query, key, value = (tensor.detach().double().abs() for tensor in tensors[:3])
    if key.shape[2] != 1:
        return 0.0
    sums = dout.detach().double().abs().sum(-1).max() * value.max()
    return (sums * torch.maximum(query.max(), key.max()) * query.shape[-1] ** -0.5).item()
