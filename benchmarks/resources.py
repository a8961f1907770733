"""Registers, spills and shared memory of every Triton kernel, compiled for GPUs that are not here.

    python -m benchmarks.resources             # all configs × sm_80, 86, 89, 90 → results/*.csv
    python -m benchmarks.resources --capability 90 --head-dim 64 80

The launchers are run on meta tensors with recorders in place of the kernels; what they would have
launched is compiled by Triton for each target, and `cuobjdump` reads the machine code's resources.
"""

import argparse
import contextlib
import csv
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

if not importlib.util.find_spec("triton"):
    sys.exit("python -m benchmarks.resources needs Triton, which torch brings for Linux")
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ldm4ts_kernels.kernels import (
    flash_backward,
    flash_forward,
    int8_backward,
    quantize,
    row_terms,
)
from ldm4ts_kernels.kernels.problem import Problem

RESULTS = Path(__file__).parent / "results" / "triton_resources.csv"
HEAD_DIMS = (16, 32, 40, 64, 80, 96, 128, 160, 192, 256, 512)
SHARED_LIMIT_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}
# Triton writes the same PTX for both, but for the target's name (tests/test_tuning.py).
SAME_PTX = {(8, 9): (8, 6)}
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
MODULES = (flash_forward, row_terms, flash_backward, quantize, int8_backward)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


class Resources(NamedTuple):
    """What one compiled kernel takes: registers a thread, spilled bytes a thread, shared bytes."""

    kernel: str
    capability: str
    dtype: str
    head_dim: int
    key_length: int
    mask: int
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_kib: float
    shared_limit_kib: int


class _Recorder:
    """Stands where a kernel stood and keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


class Tensors(NamedTuple):
    """The operands of a problem, on no device."""

    query: torch.Tensor  # (B, H, Q, D); also of out, dout and dq
    key: torch.Tensor  # (B, G, K, D); also of value, dk and dv
    lse: torch.Tensor  # (B, H, Q) float32; also of a shift
    mask: torch.Tensor | None  # (B, H, Q, K), the same for all heads and queries


def meta_tensors(problem: Problem) -> Tensors:
    """Return tensors of the problem's shapes without data."""
    batch, width = problem.batch, problem.head_dim
    query = (batch, problem.heads, problem.query_length, width)
    key = (batch, problem.kv_heads, problem.key_length, width)
    mask = None
    if problem.mask:
        row = torch.empty(batch, 1, 1, problem.key_length, dtype=problem.dtype, device="meta")
        mask = row.expand(*query[:3], problem.key_length)
    return Tensors(
        torch.empty(query, dtype=problem.dtype, device="meta"),
        torch.empty(key, dtype=problem.dtype, device="meta"),
        torch.empty(query[:3], device="meta"),
        mask,
    )


def launch_exact(problem: Problem) -> None:
    """Launch a forward and backward of exact attention."""
    query, key, lse, mask = meta_tensors(problem)
    flash_forward.flash_forward(problem, query, key, key, mask, None, query, lse)
    flash_backward.flash_backward(
        problem, query, key, key, mask, None, query, lse, query, None, query, key, key, None
    )


def launch_int8(problem: Problem) -> None:
    """Launch a quantisation, forward and backward of INT8 attention."""
    problem = problem._replace(int8=True)
    query, key, lse, mask = meta_tensors(problem)
    quantised = quantize.empty_quantised(query, key)
    quantize.quantise(problem, query, key, quantised, lse)
    flash_forward.flash_forward(
        problem, quantised.query, quantised.key, key, mask, None, query, lse,
        quantised.query_scale, quantised.key_scale,
    )  # fmt: skip
    int8_backward.int8_backward(
        problem, quantised, key, mask, query, lse, query, None, query, key, key
    )


def record_launches(
    launch: Callable[[Problem], None], problem: Problem
) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (kernel, args, kwargs) of each kernel that `launch` starts for `problem`."""
    recorders = []
    with contextlib.ExitStack() as patches:
        for module in MODULES:
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel") and isinstance(kernel, triton.runtime.JITFunction):
                    recorders.append(_Recorder(kernel))
                    patches.enter_context(mock.patch.object(module, name, recorders[-1]))
        launch(problem)
    for recorder in recorders:
        for args, kwargs in recorder.launches:
            yield recorder.kernel, args, kwargs


def source_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ASTSource:
    """Return what Triton compiles for one launch, specialised as Triton would specialise it."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif kernel.params[index].do_not_specialize:
            signature[name] = "i32"
        elif kernel.params[index].is_constexpr or value is None or value == 1:
            signature[name] = "constexpr"
            constants[index,] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: tuple[int, int]
) -> Any:
    """Compile one launch for a GPU of `capability`."""
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(source_of(kernel, args, kwargs), target=target, options=options)


def retarget(ptx: str, capability: tuple[int, int]) -> str:
    """Return PTX with another target's name."""
    return re.sub(r"\.target sm_\d+", ".target sm_{}{}".format(*capability), ptx)


def _machine_code(compiled: Any, capability: tuple[int, int]) -> bytes:
    if capability not in SAME_PTX:
        return bytes(compiled.asm["cubin"])
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(retarget(compiled.asm["ptx"], capability))
        target = "-arch=sm_{}{}".format(*capability)
        subprocess.run([TOOLS / "ptxas", target, ptx, "-o", cubin], check=True)
        return cubin.read_bytes()


def read_resources(machine_code: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes a thread, read from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(machine_code)
        cubin.flush()
        report = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers = int(re.search(r"REG:(\d+)", report)[1])
    return registers, int(re.search(r"STACK:(\d+)", report)[1])


def measure(problem: Problem, capability: tuple[int, int]) -> Iterator[Resources]:
    """Yield the resources of each kernel that a forward and backward of `problem` launches."""
    problem = problem._replace(capability=capability)
    launches = list(record_launches(launch_exact, problem))
    if problem.dtype.itemsize == 2 and problem.head_dim <= 256:
        launches += record_launches(launch_int8, problem)
    for kernel, args, kwargs in launches:
        written = SAME_PTX.get(capability, capability)
        compiled = compile_launch(kernel, args, kwargs, written)
        registers, spilled = read_resources(_machine_code(compiled, capability))
        yield Resources(
            kernel=kernel.__name__.strip("_"),
            capability=f"sm_{capability[0]}{capability[1]}",
            dtype=DTYPES[problem.dtype],
            head_dim=problem.head_dim,
            key_length=problem.key_length,
            mask=problem.mask,
            block_q=kwargs.get("BLOCK_Q", kwargs.get("BLOCK", 0)),
            block_k=kwargs.get("BLOCK_K", 0),
            num_warps=kwargs["num_warps"],
            num_stages=kwargs.get("num_stages", 0),
            registers=registers,
            spilled_bytes=spilled,
            shared_kib=compiled.metadata.shared / 1024,
            shared_limit_kib=SHARED_LIMIT_KIB[capability],
        )


def problem_of(head_dim: int, key_length: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Return the benchmarks' typical problem of a head dim: self-attention, 4 × 8 heads."""
    return Problem(
        batch=4,
        heads=8,
        kv_heads=8,
        query_length=4096 if key_length > 256 else 784,
        key_length=key_length,
        head_dim=head_dim,
        dtype=dtype,
        scale=head_dim**-0.5,
    )


def main() -> None:
    """Compile every config for every target, print the table and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", nargs="*", default=["80", "86", "89", "90"])
    parser.add_argument("--head-dim", nargs="*", type=int, default=HEAD_DIMS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    print(*Resources._fields)
    for capability in [(int(name[:-1]), int(name[-1])) for name in options.capability]:
        for head_dim in options.head_dim:
            # Hopper has rows of its own for lengths between
            lengths = (77, 196, 784, 16384, 4096) if capability == (9, 0) else (77, 4096)
            problems = [problem_of(head_dim, key_length) for key_length in lengths]
            problems += [problems[-1]._replace(mask=2)]
            if head_dim <= 256:  # float32 goes no further
                problems += [problem_of(head_dim, 4096, torch.float32)]
            for row in (row for problem in problems for row in measure(problem, capability)):
                if row not in rows:  # both precisions launch the kernel of delta
                    rows.append(row)
                    print(*row, flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["triton", *Resources._fields])
        writer.writerows([triton.__version__, *row] for row in rows)
    over = [row for row in rows if row.shared_kib > row.shared_limit_kib]
    if over:
        sys.exit(f"over the target's shared memory: {over}")


if __name__ == "__main__":
    main()
