"""What bounds the attention loops on a GPU that is not here: machine code against its data sheet.

    python -m benchmarks.issue_rates                  # sm_89 and sm_90, head dims 64 and 128

The kernels are compiled for the target, and the instructions of their inner loops counted: products
of 16-bit and of INT8 operands, exponentials, and all that is issued. Divided by the rates of a
multiprocessor they give the clocks that each unit needs for a score. The longest is the least that
a loop can take, their sum what it takes where no two units work at once; a measurement lies
between. Both are models: they know neither memory nor latency.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton.backends.nvidia

from benchmarks.resources import (
    compile_launch,
    launch_exact,
    launch_int8,
    problem_of,
    record_launches,
)
from ldm4ts_kernels.kernels.tuning import Config

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
LOOPS = ("_flash_fwd_kernel", "_flash_dkdv_kernel", "_flash_dq_kernel")


class Rates(NamedTuple):
    """What one multiprocessor does a clock: multiply-adds of each kind, exponentials, issues."""

    half: int  # 16-bit operands, float32 sums
    int8: int
    exponentials: int = 16
    issues: int = 128  # instructions of a thread


# Dense data-sheet rates over multiprocessors and boost clock: RTX 4090 165 TFLOP/s and 661 TOP/s,
# L40S 362 and 733, H200 989 and 1979.
GPUS = {
    "RTX 4090": ((8, 9), Rates(256, 1024)),
    "L40S": ((8, 9), Rates(512, 1024)),
    "H200": ((9, 0), Rates(2048, 4096)),
}


class Counts(NamedTuple):
    """What an inner loop takes for one score."""

    half: float  # multiply-adds
    int8: float  # multiply-adds
    exponentials: float
    issues: float

    def clocks(self, rates: Rates) -> tuple[float, ...]:
        """Return the clocks of a multiprocessor for 1000 scores: tensor cores, exp2, issue."""
        tensor = self.half / rates.half + self.int8 / rates.int8
        exponentials = self.exponentials / rates.exponentials
        return tuple(1000 * c for c in (tensor, exponentials, self.issues / rates.issues))


def machine_code(compiled: Any) -> list[str]:
    """Return the lines of a compiled kernel's machine code, labels among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [TOOLS / "nvdisasm", "-c", cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )


def inner_loops(lines: list[str]) -> Iterator[list[str]]:
    """Yield the instructions of every loop that holds no other."""
    labels: dict[str, int] = {}
    code: list[str] = []
    last = -1  # where the last loop ended
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*(.*?);", line):
            code.append(found[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", found[1])
            if target and labels.get(target[1], -1) > last:
                last = len(code) - 1
                yield code[labels[target[1]] :]


def count(loop: list[str], config: Config, warps: int) -> Counts:
    """Count an inner loop that takes one tile of scores in `warps` warps."""
    threads = 32 * warps / (config.block_q * config.block_k)  # a score
    half = int8 = 0
    for instruction in loop:
        operands = 0
        if found := re.match(r"[HI]GMMA\.(\d+)x(\d+)x(\d+)", instruction):  # of a warpgroup
            operands = int(found[1]) * int(found[2]) * int(found[3]) / 128
        elif found := re.match(r"[HI]MMA\.(\d\d?)(8)(\d\d)\.", instruction):  # of a warp
            operands = int(found[1]) * int(found[2]) * int(found[3]) / 32
        if instruction.startswith("I"):
            int8 += operands
        else:
            half += operands
    exponentials = sum(instruction.startswith("MUFU.EX2") for instruction in loop)
    return Counts(*(threads * n for n in (half, int8, exponentials, len(loop))))


def measure(launch: Any, head_dim: int, capability: tuple[int, int]) -> dict[str, Counts]:
    """Return what the inner loop of each pass takes, of the one that checks no bounds."""
    problem = problem_of(head_dim, 4096)._replace(capability=capability)
    found = {}
    for kernel, args, kwargs in record_launches(launch, problem):
        if kernel.__name__ not in LOOPS:
            continue
        compiled = compile_launch(kernel, args, kwargs, capability)
        config = Config(kwargs["BLOCK_Q"], kwargs["BLOCK_K"], 0, 0)
        loops = [loop for loop in inner_loops(machine_code(compiled)) if "MMA" in " ".join(loop)]
        counts = [count(loop, config, kwargs["num_warps"]) for loop in loops]
        found[kernel.__name__.split("_")[2]] = min(
            (c for c in counts if c.exponentials > 0.5), key=lambda c: c.issues
        )
    return found


def main() -> None:
    """Print the counts and clocks of exact and INT8 attention on each GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", nargs="*", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--head-dim", nargs="*", type=int, default=[64, 128])
    options = parser.parse_args()
    for gpu in options.gpu:
        capability, rates = GPUS[gpu]
        for head_dim in options.head_dim:
            totals = {}
            for name, launch in (("exact", launch_exact), ("int8", launch_int8)):
                passes = measure(launch, head_dim, capability)
                for stage, counts in passes.items():
                    tensor, exponentials, issues = counts.clocks(rates)
                    print(
                        f"{gpu} d {head_dim} {name} {stage}: {counts.half:.0f} 16-bit and "
                        f"{counts.int8:.0f} INT8 multiply-adds, {counts.exponentials:.2f} exp2, "
                        f"{counts.issues:.1f} instructions a score; clocks a thousand scores: "
                        f"tensor {tensor:.0f}, exp2 {exponentials:.0f}, issue {issues:.0f}",
                        flush=True,
                    )
                clocks = [counts.clocks(rates) for counts in passes.values()]
                totals[name] = [
                    (max(c), c[0] + max(c[1:]))
                    for c in (clocks[0], list(map(sum, zip(*clocks, strict=True))))
                ]
            for index, what in enumerate(("forward", "forward and backward")):
                best, worst = (
                    totals["exact"][index][bound] / totals["int8"][index][bound] for bound in (0, 1)
                )
                print(
                    f"{gpu} d {head_dim} {what}: INT8 {best:.2f} times as fast where all units "
                    f"overlap, {worst:.2f} where products and softmax take turns"
                )


if __name__ == "__main__":
    main()
