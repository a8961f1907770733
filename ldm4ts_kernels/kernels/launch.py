"""A kernel launch whose numbers are settled once: later calls go straight to the compiled kernel.

Triton binds and specialises some 60 arguments in 40 to 100 µs a call. All but the tensors follow
from shapes and strides, so a launcher keeps one `Launch` for each of these, and a `Launch` keeps
what Triton compiled for it.
"""

import contextvars
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor


class Launch:
    """A grid, run-time numbers and compile-time constants, to be called with a kernel's tensors.

    With `scratch` the kernel writes tensor maps for the copy engine, which Triton asks memory for.
    """

    __slots__ = ("compiled", "constants", "grid", "numbers", "scratch")

    def __init__(
        self,
        grid: tuple[int, ...],
        numbers: tuple[float, ...],
        constants: Mapping[str, Any],
        scratch: bool = False,
    ) -> None:
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.constants = constants
        self.scratch = scratch
        self.compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch `kernel` on the device of the first tensor; None where it takes no pointer."""
        if self.scratch:  # in a context of its own, so that nobody else's allocator changes
            contextvars.copy_context().run(self._with_scratch, kernel, tensors)
        else:
            self._launch(kernel, tensors)

    def _with_scratch(self, kernel: Any, tensors: tuple[Tensor | None, ...]) -> None:
        device = tensors[0].device
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.uint8, device=device)
        )
        self._launch(kernel, tensors)

    def _launch(self, kernel: Any, tensors: tuple[Tensor | None, ...]) -> None:
        index = tensors[0].device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self._launch(kernel, tensors)
        # What Triton specialises a pointer for: its type, and whether it starts at 16 bytes.
        key = kernel, index, *[t if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors]
        known = self.compiled.get(key)
        if known is not None:
            run, rest = known
            run(*tensors, *rest)
            return None
        compiled = kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            names = kernel.arg_names[len(tensors) + len(self.numbers) :]
            rest = (*self.numbers, *(self.constants[name] for name in names))
            self.compiled[key] = compiled[self.grid], rest
        return None
