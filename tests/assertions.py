"""How close is close enough: error budgets taken from the reference, not from a hand-tuned atol."""

import torch
from torch import Tensor


def assert_as_accurate_as(
    actual: Tensor,  # the kernel's result
    rounded: Tensor,  # the reference run in the kernel's dtype
    exact: Tensor,  # the reference run in float64
    name: str,
    slack: float = 2.0,
    roundings: float = 1.0,
) -> None:
    """Require the error of `actual` to be within `slack` of the reference's own, plus roundings."""
    exact = exact.double()
    error = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    own = (rounded.double() - exact).abs().max().item() if exact.numel() else 0.0
    largest = exact.abs().max().item() if exact.numel() else 0.0
    budget = slack * own + roundings * torch.finfo(actual.dtype).eps * largest
    assert torch.isfinite(actual).all(), f"{name}: non-finite values"
    assert error <= budget, f"{name}: error {error:.2e} exceeds {budget:.2e}"
