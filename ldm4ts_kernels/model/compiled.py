"""A pass of training as torch.compile makes it, what it keeps for its backward within a budget."""

from collections.abc import Callable
from typing import Any

import torch

PREFIX = "budget:"


def activation_budget(mode: str | bool) -> float | None:
    """Return x of a checkpointing mode "budget:x", 0 to 1; None for any other mode.

    Raises ValueError for an x that is no such number.
    """
    if not isinstance(mode, str) or not mode.startswith(PREFIX):
        return None
    try:
        budget = float(mode.removeprefix(PREFIX))
    except ValueError:
        budget = -1.0
    if not 0 <= budget <= 1:
        raise ValueError(
            f"gradient checkpointing must be budget:x with x from 0 to 1, got {mode!r}"
        )
    return budget


def compile_pass(
    function: Callable[..., Any],
    budget: float = 1.0,
    backend: Callable[..., Any] | None = None,  # what compiles the graph; None: Inductor
) -> Callable[..., Any]:
    """Return the function compiled as one graph, for fixed shapes, at its first call.

    Of the activations that the backward pass would keep if nothing were recomputed but what costs
    nothing, it keeps that share, and recomputes what is cheapest for its size: torch's
    activation_memory_budget. 0 keeps the inputs alone.
    """

    def lower(graph: Any, inputs: Any) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=budget):
            return (backend or compile_fx)(graph, inputs)

    return torch.compile(function, backend=lower, dynamic=False, fullgraph=True)


class TrainingPasses:
    """Give a part of the model as a step with a gradient runs it: compiled once, or as it is.

    budget: of `compile_pass`; None compiles nothing.
    """

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self.compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, part: Callable[..., Any]) -> Callable[..., Any]:
        if self.budget is None or not torch.is_grad_enabled():
            return part
        if part not in self.compiled:
            self.compiled[part] = compile_pass(part, self.budget)
        return self.compiled[part]


def missing_compiler() -> str | None:
    """Return why torch.compile cannot compile for a GPU here, None where it can."""
    from torch.utils._triton import has_triton

    if has_triton():
        return None
    return "torch.compile needs an NVIDIA GPU of sm_70 or later, and Triton"
