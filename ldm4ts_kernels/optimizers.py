"""AdamW as a run may want it: in one launch, with 8-bit states, or within the backward pass."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

FINAL_LEARNING_RATE = 0.1  # of the cosine's start
OPTIMIZERS = ("adamw", "adamw8bit")


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    name: str = "adamw",
    one_by_one: bool = False,
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter, ICLR 2019) for parameters of one device.

    "adamw" has two float32 states a weight, "adamw8bit" two of one byte, quantised by blocks of 256
    (Dettmers et al., ICLR 2022), and rounds an update of a bfloat16 weight up or down at random, so
    that it is right in the mean. On a GPU the rate is a tensor there, so that a CUDA graph can hold
    a step. one_by_one: each parameter is a group of its own, as `step_in_backward` needs it.
    Raises ImportError for "adamw8bit" without torchao.
    """
    device = parameters[0].device
    rate = torch.tensor(learning_rate, device=device) if device.type == "cuda" else learning_rate
    groups: Any = [{"params": [p]} for p in parameters] if one_by_one else parameters
    if name == "adamw8bit":
        return load_8bit()(groups, lr=rate, weight_decay=weight_decay, bf16_stochastic_round=True)
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(
        groups, lr=rate, weight_decay=weight_decay, fused=on_gpu, capturable=on_gpu
    )


def load_8bit() -> Any:
    """Return the class with 8-bit states; ImportError, with what to install, without torchao."""
    try:
        from ldm4ts_kernels.eight_bit import BlockwiseAdamW8bit
    except (ImportError, OSError) as error:
        raise ImportError(
            f"adamw8bit needs torchao (pip install 'ldm4ts-kernels[lean]'): {error}"
        ) from error
    return BlockwiseAdamW8bit


def missing_8bit() -> str | None:
    """Return why there is no 8-bit AdamW here, None where there is."""
    try:
        load_8bit()
    except ImportError as error:
        return f"{error}"
    return None


def learning_rate_at(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Return the rate of optimizer step `step` (from 1): linear warm-up, then a cosine to 0.1."""
    warmup = min(warmup_steps, steps // 10)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all parameters, in place where it is a tensor that a graph reads."""
    filled: set[int] = set()
    for group in optimizer.param_groups:
        current = group["lr"]
        if not isinstance(current, Tensor):
            group["lr"] = rate
        elif id(current) not in filled:
            filled.add(id(current))
            current.fill_(rate)


def step_in_backward(optimizer: torch.optim.Optimizer) -> ExitStack:
    """Update each parameter as soon as its gradient is there, and free the gradient.

    The backward pass then never holds more than a few gradients. It leaves no gradient to clip by
    a common norm, or to accumulate. `optimizer` has one group a parameter. Ends with the context
    that is returned, or its `close`: until then the hooks keep the parameters and their states
    alive, through C++, where Python's collector of cycles does not see it.
    """
    groups = {group["params"][0]: group for group in optimizer.param_groups}

    def update(parameter: Tensor) -> None:
        whole = optimizer.param_groups
        optimizer.param_groups = [groups[parameter]]
        optimizer.step()
        optimizer.param_groups = whole
        parameter.grad = None

    hooks = ExitStack()
    for parameter in groups:
        hooks.callback(parameter.register_post_accumulate_grad_hook(update).remove)
    return hooks


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the states that its first step makes; no weight changes."""
    whole = optimizer.param_groups
    for group in whole:
        rate = group["lr"]
        still = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.param_groups = [{**group, "params": [parameter], "lr": still}]
            optimizer.step()
            parameter.grad = None
    optimizer.param_groups = whole
