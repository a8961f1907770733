"""What enters a model: checked once, moved to its device, and put in units of the window itself."""

import torch
from torch import Tensor

from ldm4ts_kernels.model.config import LDM4TSConfig

# Relative to the window's largest value: below it a deviation is float32's rounding.
RELATIVE_EPSILON = 1e-5


def as_windows(name: str, value: Tensor, config: LDM4TSConfig, device: torch.device) -> Tensor:
    """Return (B, L, V) float32 on the device from (B, L, V) or (L, V); ValueError for others."""
    expected = (config.history, config.variates)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.ndim not in (2, 3) or value.shape[-2:] != expected or value.numel() == 0:
        raise ValueError(
            f"{name} must have shape (B, {expected[0]}, {expected[1]}) or {expected}, "
            f"got {tuple(value.shape)}"
        )
    windows = value if value.ndim == 3 else value[None]
    return windows.to(device, torch.float32)


def as_futures(future: Tensor, count: int, config: LDM4TSConfig, device: torch.device) -> Tensor:
    """Return (B, T, C) float32 on the device; ValueError for other shapes."""
    expected = (count, len(config.horizons), len(config.targets))
    if tuple(future.shape) != expected:
        raise ValueError(f"future must have shape {expected}, got {tuple(future.shape)}")
    return future.to(device, torch.float32)


def as_prices(
    current_price: Tensor | float, count: int, config: LDM4TSConfig, device: torch.device
) -> Tensor:
    """Return (B, C) float32 on the device from (B, C), (B,) if C = 1, a number if B = C = 1."""
    targets = len(config.targets)
    price = torch.as_tensor(current_price, dtype=torch.float32, device=device)
    allowed: list[tuple[int, ...]] = [(count, targets)]
    if targets == 1:
        allowed.append((count,))
    if count == targets == 1:
        allowed.append(())
    if tuple(price.shape) not in allowed:
        raise ValueError(
            f"current_price must have shape {' or '.join(map(str, allowed))}, "
            f"got {tuple(price.shape)}"
        )
    check_finite("current_price", price)
    return price.reshape(count, targets)


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError, with the index of the first, for NaN or infinity; waits for the device."""
    bad = (~value.isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"{name} must be finite, got {len(bad)} values that are not, the first at index "
            f"{tuple(bad[0].tolist())}"
        )


def standardise(
    history: Tensor,  # (B, L, V)
    targets: Tensor,  # (C,) int64, an index on the device, so that selecting copies nothing to it
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x - last) / (std + eps) per window and variate, and the targets' last and std + eps.

    Shapes (B, L, V), (B, 1, C), (B, 1, C). eps is relative, so that the unit of the input does not
    matter.
    """
    last = history[:, -1:]
    epsilon = RELATIVE_EPSILON * history.abs().amax(dim=1, keepdim=True)
    smallest = torch.finfo(history.dtype).tiny  # a window of zeros
    deviation = history.std(dim=1, correction=0, keepdim=True) + epsilon + smallest
    series = (history - last) / deviation
    return series, last.index_select(-1, targets), deviation.index_select(-1, targets)


def available_device(device: str | torch.device) -> torch.device:
    """Return the device; RuntimeError, with what to do, for "cuda" without a GPU."""
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise RuntimeError(
            f'device="{device}" needs an NVIDIA GPU that PyTorch can use, and there is none here '
            f'(torch {torch.__version__}, built for {built}); pass device="cpu" to run without'
        )
    return resolved


def check_count(name: str, value: int, largest: int | None = None) -> None:
    """Raise ValueError unless value is an integer from 1 to largest, diffusion_steps."""
    if not isinstance(value, int) or value < 1 or (largest is not None and value > largest):
        expected = ">= 1" if largest is None else f"from 1 to diffusion_steps ({largest})"
        raise ValueError(f"{name} must be an integer {expected}, got {value!r}")
