"""The bytes that a training step holds, traced under fake tensors: no GPU, nothing computed.

A step's operators are the same for every batch size, and what each finds in memory is a constant
plus a slope times the batch: two traces give the peak of every batch size.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm4ts_kernels.caching_allocator import rounded
from ldm4ts_kernels.optimizers import step_in_backward
from ldm4ts_kernels.storages import Storages

# Allocated in the forward pass; in the backward pass and the optimizer what is no gradient.
CATEGORIES = ("parameters", "gradients", "optimizer", "inputs", "activations", "temporaries")
PHASES = ("forward", "backward", "optimizer")
aten = torch.ops.aten
CONVOLUTIONS = frozenset({aten.convolution.default, aten.convolution_backward.default})
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256  # elements; torchao keeps smaller tensors as they are


@dataclass(frozen=True)
class Timeline:
    """What is live after each allocation of one step, and what begins and ends in it."""

    phases: tuple[int, ...]  # E indices into PHASES
    live_bytes: tuple[tuple[int, ...], ...]  # E rows of len(CATEGORIES)
    storages: Storages


@dataclass(frozen=True)
class Peak:
    """The largest live memory of a step: bytes by category at that moment, and by phase."""

    categories: dict[str, int]
    phases: dict[str, int]

    @property
    def phase(self) -> str:
        """The phase that has the peak."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def total(self) -> int:
        """Bytes: the estimate of `torch.cuda.max_memory_allocated`, without workspaces."""
        return sum(self.categories.values())


@dataclass(frozen=True)
class MemoryLaw:
    """Bytes live after each allocation of a step, as constant + slope · batch size."""

    phases: Tensor  # (E,)
    constant: Tensor  # (E, len(CATEGORIES)) float64, bytes
    slope: Tensor  # (E, len(CATEGORIES)) float64, bytes a window
    storages: Storages  # with the sizes of one of the batches
    size_constant: Tensor  # (M,) float64, bytes
    size_slope: Tensor  # (M,) float64, bytes a window

    def peak(self, batch_size: int) -> Peak:
        """Return the peak of a step of batch_size windows."""
        live = (self.constant + self.slope * batch_size).round().long()  # (E, C)
        totals = live.sum(dim=1)
        at_peak = live[totals.argmax()].tolist()
        by_phase = {
            name: int(totals[self.phases == index].max()) for index, name in enumerate(PHASES)
        }
        return Peak(dict(zip(CATEGORIES, at_peak, strict=True)), by_phase)

    def reserved(
        self, batch_size: int, kept: int = 0, passing: int = 0, *, graph: bool = False
    ) -> int:
        """Return the bytes that are reserved for such steps: see `Storages.reserved`."""
        sizes = self.size_constant + self.size_slope * batch_size
        storages = self.storages._replace(sizes=tuple(sizes.round().long().tolist()))
        return storages.reserved(kept, passing, graph=graph)


def fit_law(small: Timeline, small_batch: int, large: Timeline, large_batch: int) -> MemoryLaw:
    """Return the law through the timelines of two batch sizes.

    Raises RuntimeError where the two steps did not run the same allocations.
    """
    if small.phases != large.phases:
        raise RuntimeError(
            f"the steps of batch sizes {small_batch} and {large_batch} differ: "
            f"{len(small.phases)} and {len(large.phases)} allocations"
        )
    if small.storages.numbers != large.storages.numbers:
        raise RuntimeError(
            f"the steps of batch sizes {small_batch} and {large_batch} free in other orders"
        )

    def line(low: Sequence[Any], high: Sequence[Any]) -> tuple[Tensor, Tensor]:
        first, last = (torch.tensor(values, dtype=torch.float64) for values in (low, high))
        slope = (last - first) / (large_batch - small_batch)
        return first - slope * small_batch, slope

    return MemoryLaw(
        torch.tensor(small.phases),
        *line(small.live_bytes, large.live_bytes),
        small.storages,
        *line(small.storages.sizes, large.storages.sizes),
    )


def trace_step(
    module: nn.Module,
    trained: Sequence[nn.Parameter],
    inputs: Iterable[Tensor],
    loss: Callable[[], Tensor],
    optimizer: str = "adamw",
    in_backward: bool = False,
    parts: int = 1,
) -> Timeline:
    """Record loss → backward → clipping → AdamW → zero_grad, the optimizer's states there.

    Call under FakeTensorMode, with a module and inputs of fake CPU tensors: sizes are those of a
    GPU, and fake CUDA tensors cannot run a backward pass where there is no GPU. optimizer: one of
    `optimizers.OPTIMIZERS`; in_backward: it steps there; parts: how many accumulate their
    gradients, each of the size of the inputs.
    """
    adamw: Any = _AdamW8bit(trained) if optimizer == "adamw8bit" else _adamw(trained, in_backward)
    tracker = _Tracker("backward" if in_backward else "optimizer")
    tracker.hold("parameters", [*module.parameters(), *module.buffers()])
    tracker.hold("optimizer", tree_leaves(list(adamw.state.values())))
    tracker.hold("inputs", inputs)
    tracker.begin()
    hooks = [p.register_post_accumulate_grad_hook(tracker.hold_gradient) for p in trained]
    stepping = step_in_backward(adamw) if in_backward else nullcontext()
    with _no_collection(), stepping, tracker:
        for _ in range(parts):
            tracker.enter("forward")
            value = loss()
            tracker.enter("backward")
            value.backward()
            del value
        tracker.enter("optimizer")
        if not in_backward:
            nn.utils.clip_grad_norm_(trained, 1.0)  # to no matter what
            adamw.step()
        adamw.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return tracker.timeline()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let nothing end but by its last reference: when Python looks for cycles is chance."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _adamw(trained: Sequence[nn.Parameter], one_by_one: bool) -> torch.optim.Optimizer:
    """Return fused AdamW with its states, which come with a step that needs no real gradient."""
    groups: Any = [{"params": [p]} for p in trained] if one_by_one else trained
    adamw = torch.optim.AdamW(groups, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return adamw


class _AdamW8bit:
    """What `eight_bit`'s AdamW holds: fakes cannot run it.

    Its step is one compiled kernel for each parameter, and allocates nothing.
    """

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self.param_groups = [{"params": [parameter]} for parameter in trained]
        self.state = {p: [*self._states(p), *self._states(p)] for p in trained}

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _states(self, parameter: Tensor) -> list[Tensor]:
        """Return a byte an element, and of each block its scale, with the 256 values of a byte."""
        count = parameter.numel()
        if count < SMALLEST_8BIT or count % BLOCK_8BIT:
            return [torch.empty_like(parameter)]
        codes = torch.empty(count, dtype=torch.uint8)
        return [codes, torch.empty(count // BLOCK_8BIT), torch.empty(256)]


class _Tracker(TorchDispatchMode):
    """Follows every storage from the operator that returns it to its end."""

    def __init__(self, stepping_phase: str) -> None:
        """stepping_phase: that in which the optimizer steps, and its states first come."""
        super().__init__()
        self.stepping_phase = stepping_phase
        self.phase = PHASES.index("forward")
        self.live = [0] * len(CATEGORIES)
        self.storages: dict[int, tuple[int, int, int]] = {}  # key: (bytes, category, number)
        self.events: list[tuple[int, tuple[int, ...]]] = []
        self.moves: list[tuple[int, int]] = []  # (number, bytes, 0 at a storage's end)
        self.counted = self.before = self.stepping_from = 0
        self.states: frozenset[int] = frozenset()

    def begin(self) -> None:
        """Say that what is held is there before the step."""
        self.before = len(self.moves)
        optimizer = CATEGORIES.index("optimizer")
        held = self.storages.values()
        self.states = frozenset(number for _, category, number in held if category == optimizer)

    def enter(self, phase: str) -> None:
        self.phase = PHASES.index(phase)
        self._record()
        if phase == self.stepping_phase:
            self.stepping_from = len(self.moves)

    def hold(self, category: str, tensors: Iterable[Any]) -> None:
        """Count what exists before the step, or comes to belong to another category."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._add(tensor, CATEGORIES.index(category))

    def hold_gradient(self, parameter: Tensor) -> None:
        self.hold("gradients", [parameter.grad])

    def timeline(self) -> Timeline:
        phases, live = zip(*self.events, strict=True)
        numbers, sizes = zip(*self.moves, strict=True)
        # In the backward pass states come parameter by parameter, else all at once.
        start = min(self.stepping_from, len(numbers) - 1)
        come = range(start, len(numbers) if self.stepping_phase == "backward" else start + 1)
        storages = Storages(numbers, sizes, self.before, self.states, come)
        return Timeline(phases, live, storages)

    def _record(self, inner_bytes: int = 0) -> None:
        *others, temporaries = self.live
        self.events.append((self.phase, (*others, temporaries + inner_bytes)))
        if inner_bytes:
            self.counted += 1
            self.moves += [(self.counted, inner_bytes), (self.counted, 0)]

    def _add(self, tensor: Tensor, category: int) -> None:
        """Count the tensor's storage under the category."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            size, former, number = self.storages[key]
            self.live[former] -= size
        else:
            size = rounded(storage.nbytes()) if storage.nbytes() else 0
            self.counted = number = self.counted + 1
            if size:
                self.moves.append((number, storage.nbytes()))
            weakref.finalize(storage, self._remove, key)
        self.storages[key] = (size, category, number)
        self.live[category] += size

    def _remove(self, key: int) -> None:
        size, category, number = self.storages.pop(key)
        self.live[category] -= size
        if size:
            self.moves.append((number, 0))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        category = CATEGORIES.index("temporaries" if self.phase else "activations")
        new = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.storages:
                self._add(tensor, category)
                new = True
        if new:
            self._record(_inner_bytes(func, args, result))
        return result


def _inner_bytes(operator: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return what an operator's CUDA kernels allocate and free inside it.

    Measured on an H200, torch 2.11, cuDNN 9.19, 13 convolutions in float32 and bfloat16.
    """
    if operator in CONVOLUTIONS:  # cuDNN copies input, weight and output, to channels last
        tensors = args[:3] if operator is aten.convolution_backward.default else (*args[:2], result)
        return sum(tensor.nbytes for tensor in tensors)
    if operator is aten._softmax_backward_data.default:  # the product of gradient and weights
        return result.nbytes
    return 0
