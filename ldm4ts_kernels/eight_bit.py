"""AdamW with 8-bit states on a GPU: torchao's, its update compiled once for all shapes.

Torchao compiles its update anew for each shape of a parameter, minutes for a U-Net of a hundred.
Its states are quantised by blocks whatever the shape, so that here each parameter is its blocks,
in the order of its memory: a weight in channels_last, and its states, is (O, kh, kw, I).
"""

from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.quant_utils import (
    _fp32_to_bf16_sr,
    dequant_with_qmap,
    quantize_8bit_with_qmap,
    scale_tensor,
)

State = tuple[Tensor, ...]  # codes (n, BLOCK), scales (n), the codes' values (256); or floats (n)


def update_adamw(
    weights: Tensor,  # (n, BLOCK), or (n) with states that are not quantised
    gradient: Tensor,  # as weights
    count: Tensor,  # of steps, this one included
    mean: State,
    square: State,
    rate: Tensor,
    group: tuple[float, float, float, float],  # decay, both betas, epsilon
    rounded: bool,  # at random, to bfloat16
) -> None:
    """Update weights and states in place (Loshchilov & Hutter, ICLR 2019, algorithm 2)."""
    decay, beta1, beta2, epsilon = group
    gradient = gradient.float()
    first = _read(mean).lerp(gradient, 1 - beta1)
    second = _read(square).lerp(gradient.square(), 1 - beta2)
    _write(mean, first)
    _write(square, second)
    exact = weights.float()
    exact = exact - rate * decay * exact
    deviation = second.sqrt() / (1 - beta2**count).sqrt() + epsilon
    exact = exact - rate * (first / (1 - beta1**count)) / deviation
    weights.copy_(_fp32_to_bf16_sr(exact) if rounded else exact)


def _read(state: State) -> Tensor:
    if len(state) == 1:
        return state[0].float()
    codes, scales, values = state
    return dequant_with_qmap(codes, values, scales)


def _write(state: State, exact: Tensor) -> None:
    if len(state) == 1:
        state[0].copy_(exact)
        return
    codes, scales, values = state
    scaled, found = scale_tensor(exact, exact.shape[-1])
    codes.copy_(quantize_8bit_with_qmap(scaled, values))
    scales.copy_(found)


class BlockwiseAdamW8bit(AdamW8bit):
    """AdamW8bit that compiles on a GPU alone, once, and keeps the count of steps there."""

    compiled: Any = staticmethod(torch.compile(update_adamw, fullgraph=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if self.param_groups[0]["params"][0].is_cuda:
            # A graph for each kind of parameter and state, whatever the process compiled before.
            with torch._dynamo.utils.disable_cache_limit():
                self.step_by_blocks()
        else:
            with torch.compiler.set_stance("force_eager"):
                self.step_by_blocks()

    @torch.no_grad()
    def step_by_blocks(self) -> None:
        """Take the step, blocks by blocks, that torchao takes shape by shape."""
        for group in self.param_groups:
            numbers = group["weight_decay"], *group["betas"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                count, mean, square = self._states(parameter)
                count += 1
                shape = mean[0].shape
                axes = _axes_in_memory(parameter)
                weights = parameter.detach().permute(axes).view(shape)
                gradient = parameter.grad.permute(axes).reshape(shape)
                for tensor in (weights, gradient, *mean[:2], *square[:2]):
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
                rounded = self.bf16_stochastic_round and parameter.dtype is torch.bfloat16
                self.compiled(weights, gradient, count, mean, square, group["lr"], numbers, rounded)

    def _states(self, parameter: Tensor) -> tuple[Tensor, State, State]:
        """Return the count of steps and both states, made where there are none yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            plain = parameter.detach().permute(_axes_in_memory(parameter))
            state["exp_avg"] = self._new_buffer(plain, True)
            state["exp_avg_sq"] = self._new_buffer(plain, False)
        return state["step"], self._blocks(state["exp_avg"]), self._blocks(state["exp_avg_sq"])

    def _blocks(self, state: Any) -> State:
        if not hasattr(state, "codes"):
            return (state.view(-1),)
        # Views, as marks for the compiler must not stay with what a checkpoint saves.
        return state.codes.view(-1, self.block_size), state.scale.view(-1), state.qmap


def _axes_in_memory(weight: Tensor) -> tuple[int, ...]:
    """Return the axes in the order of the memory: others than they are in channels_last alone."""
    return tuple(range(weight.ndim)) if weight.is_contiguous() else (0, 2, 3, 1)
