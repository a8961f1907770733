"""AdamW as a run may want it: in one launch, or parameter by parameter within the backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    one_by_one: bool = False,
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter, ICLR 2019) for parameters of one device.

    On a GPU it is one launch, and its rate a tensor there, so that a CUDA graph can hold a step.
    one_by_one: each parameter is a group of its own, as `step_in_backward` needs it.
    """
    device = parameters[0].device
    rate: float | Tensor = learning_rate
    if device.type == "cuda":
        rate = torch.tensor(learning_rate, device=device)
    groups = [{"params": [parameter]} for parameter in parameters] if one_by_one else parameters
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(
        groups, lr=rate, weight_decay=weight_decay, fused=on_gpu, capturable=on_gpu
    )


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


def step_in_backward(optimizer: torch.optim.Optimizer) -> None:
    """Update each parameter as soon as its gradient is there, and free the gradient.

    The backward pass then never holds more than a few gradients. It leaves no gradient to clip by
    a common norm, or to accumulate. `optimizer` has one group a parameter.
    """
    groups = {group["params"][0]: group for group in optimizer.param_groups}

    def update(parameter: Tensor) -> None:
        whole = optimizer.param_groups
        optimizer.param_groups = [groups[parameter]]
        optimizer.step()
        optimizer.param_groups = whole
        parameter.grad = None

    for parameter in groups:
        parameter.register_post_accumulate_grad_hook(update)
