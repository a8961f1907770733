"""How the benchmarks measure and where they write: times, memory, the environment of a figure."""

import csv
import gc
import importlib.metadata
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, str]]  # of a file in results/
SHARED = "LDM4TS_SHARED_KIB"  # which the compiled kernels read: csrc/launch.cuh
PACKAGES = ("torch", "triton", "diffusers", "sageattention", "flash-attn")


def environment() -> dict[str, str]:
    """Return what a figure must be quoted with: GPU, versions, command."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    script = Path(sys.argv[0])
    run = f"python -m benchmarks.{script.stem}" if script.parent.name == "benchmarks" else "pytest"
    pretended = [f"{SHARED}={os.environ[SHARED]}"] if SHARED in os.environ else []
    command = " ".join([*pretended, run, *sys.argv[1:]])
    return {"gpu": gpu, "versions": ", ".join(versions), "command": command}


def write_rows(name: str, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write rows as results/name.csv, each with its environment; replaces what was there."""
    where = environment()
    rows = [{**row, **where} for row in rows]
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(name: str) -> Rows:
    """Return the rows of results/name.csv."""
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def source(rows: Rows) -> str:
    """Say where a table's figures come from."""
    return f"*{rows[0]['gpu']}; {rows[0]['versions']}; `{rows[0]['command']}`.*"


MOST_LEFT = 2**20  # bytes


def free_memory() -> None:
    """Give back what an earlier measurement left on the GPU, which the next peak would hold.

    A model goes when its last cycle is collected, cuBLAS's workspace of a stream only when asked.
    Raises RuntimeError, with how much, where more than MOST_LEFT bytes stay.
    """
    gc.collect()
    clear = torch._C._cuda_clearCublasWorkspaces
    probe = torch.zeros((), device="cuda", requires_grad=True)
    probe.register_hook(lambda _: clear())  # in the backward pass's thread, which has its own
    probe.square().backward()
    clear()
    del probe
    torch.cuda.empty_cache()
    check_nothing_left()


def check_nothing_left() -> None:
    """Raise RuntimeError where more than MOST_LEFT bytes are allocated on the GPU."""
    left = torch.cuda.memory_allocated()
    if left > MOST_LEFT:
        raise RuntimeError(
            f"an earlier measurement left {left / 2**20:.1f} MiB on the GPU, which the peak of this"
            " one would hold"
        )


SECONDS = 0.15  # a measurement takes about that long at most, of 5 repeats at least


def device_ms(function: Callable[[], object], repeats: int = 30) -> float:
    """Return the median device time of a call, by replay of a CUDA graph of it.

    A replay holds as many calls as fill about 1 ms, so that launch gaps and the timer's grain
    vanish; the inputs stay in L2 where they fit, as they do inside a network.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    calls = max(1, min(50, int(1.0 / max(_event_ms(function), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return _median_ms(graph.replay, repeats) / calls


def eager_ms(function: Callable[[], object], repeats: int = 30) -> float:
    """Return the median time of one eager call, host included."""
    for _ in range(2):
        function()
    return _median_ms(function, repeats)


def _median_ms(function: Callable[[], object], repeats: int) -> float:
    torch.cuda.synchronize()
    most = int(1e3 * SECONDS / max(_event_ms(function), 1e-3))
    return statistics.median(_event_ms(function) for _ in range(max(5, min(repeats, most))))


def _event_ms(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def kept_bytes(forward: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """Return the bytes that a forward pass keeps for its backward, parameters not counted.

    Exact for the tensors autograd saves, and the same for real and fake tensors; what checkpointed
    segments recompute is not kept, so it does not count.
    """
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in known:
            kept[key] = tensor  # held, so that no later storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total
