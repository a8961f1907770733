"""A function of tensors as one CUDA graph: captured once, then replayed on new inputs.

A step of a small model is a thousand kernels, which a host launches more slowly than a GPU runs
them; a replay launches them all at once.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger("ldm4ts_kernels")

WARM_UP_CALLS = 3  # in which cuDNN, cuBLAS and Triton choose and load their kernels


class CaptureError(RuntimeError):
    """A function cannot become a CUDA graph; the message is the reason."""


class Recorder(Protocol):
    """What turns a function without arguments into its own replay."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run it once, as it is."""

    def record(self, run: Callable[[], None]) -> Callable[[], object]:
        """Return its replay, without running it; CaptureError where there can be none."""


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory, so that two take that of the larger.

    What one graph gives out must be read before another one is replayed. Captures are on the
    current stream, or on one of their own where it is the default one, which cannot be captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        current = torch.cuda.current_stream(device)
        is_default = current == torch.cuda.default_stream(device)
        self.stream = torch.cuda.Stream(device) if is_default else current
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run once on the stream of the captures, where lazily made workspaces then are."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], object]:
        """Capture a run into a graph. Raises CaptureError, or OutOfMemoryError."""
        graph = torch.cuda.CUDAGraph()
        # A capture that breaks leaves the generator counting for it; this copy is put in its place.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        try:
            # The outer block restores the stream where the inner one cannot end its capture.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ),
            ):
                run()
        except RuntimeError as error:
            generator.graphsafe_set_state(before)
            self._abandon(graph)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CaptureError(_first_reason(error)) from error
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Give back the pool of a broken capture, which the allocator still fills and holds."""
        with suppress(RuntimeError):
            graph.pool()
            return  # the capture had ended: the graph gives its pool back itself
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # ended already
            torch._C._cuda_endAllocateToPool(device, self.pool)
        with suppress(RuntimeError):
            torch._C._cuda_releasePool(device, self.pool)
        self.pool = torch.cuda.graph_pool_handle()


class GraphedCall:
    """Call `function`, a dict of tensors to another, as one graph from the fourth call on.

    The first calls run the function as it is, then it is recorded over buffers that later calls
    fill; other shapes, dtypes or autocast begin anew. Every call does its work, none twice. What is
    returned is overwritten by the next call. Without a recorder, and where recording fails (said
    once, as a warning), each call runs the function as it is.

    Inputs may be on the host, best in pinned memory; `function` gets them on `device`.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        device: torch.device,
        recorder: Recorder | None,
    ) -> None:
        self.name, self.function, self.device = name, function, device
        self.recorder = recorder
        self.signature: tuple[Any, ...] = ()
        self._begin({}, ())

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.recorder is None:
            on_device = {n: t.to(self.device, non_blocking=True) for n, t in inputs.items()}
            return self.function(on_device)
        signature = self._describe(inputs)
        if signature != self.signature:
            self._begin(inputs, signature)
        for name, value in inputs.items():
            self.buffers[name].copy_(value, non_blocking=True)
        if self.replay is None:
            self._prepare(self.recorder)
        else:
            self.replay()
        return self.outputs

    def forget(self) -> None:
        """Free the graph and its buffers; the next call begins anew."""
        self._begin({}, ())

    def _begin(self, inputs: Mapping[str, Tensor], signature: tuple[Any, ...]) -> None:
        self.signature = signature
        self.buffers = {n: torch.empty_like(t, device=self.device) for n, t in inputs.items()}
        self.outputs: dict[str, Tensor] = {}
        self.warm_ups_left = WARM_UP_CALLS
        self.replay: Callable[[], object] | None = None

    def _prepare(self, recorder: Recorder) -> None:
        """Do one of the calls before the first replay, or record and do that."""
        if self.warm_ups_left:
            self.warm_ups_left -= 1
            recorder.warm_up(self._run)
            return
        try:
            self.replay = recorder.record(self._run)
        except CaptureError as error:
            logger.warning("%s runs without a CUDA graph, slower: %s", self.name, error)
            self.recorder = None
            self._run()
            return
        self.replay()

    def _run(self) -> None:
        self.outputs = self.function(self.buffers)

    def _describe(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        kind = self.device.type
        tensors = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return (*tensors, autocast)


def _first_reason(error: BaseException) -> str:
    """Return the first line of the error that came first: ending a broken capture adds its own."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return f"{error}".partition("\n")[0]
