"""What a run changes in its process, as context managers that put it back: signals, Accelerate."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs

from ldm4ts_kernels.training_memory import CUDA_CONTEXT, GIB


@dataclass
class StopRequest:
    """Whether the run was asked to stop at its next step."""

    requested: bool = False


@contextmanager
def accelerator_of_one_run(device: str, precision: str) -> Iterator[Accelerator]:
    """Give an Accelerator for a device and a precision, and take it back afterwards.

    Accelerate keeps one device and one precision a process; without the reset, a second run in
    this process could have no other. A state that the caller set up is left alone. On a GPU the
    block runs on a stream of its own.
    """
    ours = not AcceleratorState._shared_state
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="bf16" if precision == "bf16" else "no",
            # A cached cast of a weight outlives the block that needs it, and a graph's capture.
            kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        )
        with own_stream(accelerator.device):
            yield accelerator
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run a block on a stream of its own, where CUDA graphs can be captured, too.

    cuBLAS keeps a workspace for each stream that it ever served, 32 MiB on Hopper: with one stream
    there is one.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


@contextmanager
def memory_cap(device: str, vram_gb: float | None) -> Iterator[None]:
    """Let the process take vram_gb · 2^30 bytes of the GPU, the driver's part of them included.

    A larger card is then as one of that size. None, or another device than "cuda": no cap.
    """
    if device != "cuda" or vram_gb is None:
        yield
        return
    _, total = torch.cuda.mem_get_info()
    for_tensors = vram_gb * GIB - CUDA_CONTEXT
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, for_tensors / total)))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that is met between steps; a second one is not kept
    waiting. In a thread other than the main one, signals stay as they are."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(_signal: int, _frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = {kind: signal.signal(kind, request) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
