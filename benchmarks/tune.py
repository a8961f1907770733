"""Time candidate tiles of the Triton kernels on the GPU that is here, and print the best rows.

    python -m benchmarks.tune --head-dim 40 64 80 128 160 --length 784 4096

Candidates are compiled by `--jobs` processes at once, which fills Triton's cache; then each (pass,
head dim, length) is timed with every candidate by graph replay, one at a time. A candidate that
does not fit is skipped by name. The winners go into kernels/tuning.py by hand, under a comment with
GPU, date and this command.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.measure import device_ms, environment
from ldm4ts_kernels.kernels import flash_backward, flash_forward, tuning
from ldm4ts_kernels.kernels.problem import Problem
from ldm4ts_kernels.kernels.tuning import Config

BLOCKS_Q = {"forward": (64, 128), "key_gradient": (32, 64, 128), "query_gradient": (64, 128)}
BLOCKS_K = {"forward": (32, 64, 128), "key_gradient": (64, 128), "query_gradient": (32, 64)}
SCHEDULES = ((4, 2), (4, 3), (8, 2), (8, 3))  # (num_warps, num_stages)


def candidates(stage: str) -> list[Config]:
    """Return every combination of blocks and schedules of a pass."""
    tiles = itertools.product(BLOCKS_Q[stage], BLOCKS_K[stage], SCHEDULES)
    return [Config(q, k, warps, stages) for q, k, (warps, stages) in tiles]


def run_stage(
    stage: str, problem: Problem, config: Config, use: Callable[[Callable[[], None]], float]
) -> float | None:
    """Give `use` the launches of a pass with `config` in place of the table's row.

    Returns what `use` does, None where the tile does not fit.
    """
    shape = (problem.batch, problem.heads, problem.query_length, problem.head_dim)
    query, key, value, dout = torch.randn(4, *shape, dtype=problem.dtype, device="cuda")
    out, lse = torch.empty_like(query), torch.empty(shape[:3], device="cuda")
    grads = [torch.empty_like(query) for _ in range(3)]

    def choose(asked: str, *rest: object) -> Config:
        return config if asked == stage else tuning.choose(asked, *rest)

    def forward() -> None:
        flash_forward.flash_forward(problem, query, key, value, None, None, out, lse)

    def backward() -> None:
        flash_backward.flash_backward(
            problem, query, key, value, None, None, out, lse, dout, None, *grads, None
        )

    with mock.patch("ldm4ts_kernels.kernels.problem.choose", choose):
        try:
            if stage == "forward":
                return use(forward)
            forward()
            return use(backward)
        except OutOfResources as error:
            print(f"skipped {stage} {config}: {error}")
            return None


def _call_once(call: Callable[[], None]) -> float:
    call()
    return 0.0


def compile_stage(job: tuple[str, Problem, Config]) -> None:
    """Compile one candidate by launching it once, in a process of its own."""
    run_stage(*job, _call_once)


def main() -> None:
    """Time every candidate of every pass, and print each pass's best five."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", nargs="*", type=int, default=[40, 64, 80, 128, 160])
    parser.add_argument("--length", nargs="*", type=int, default=[784, 4096])
    parser.add_argument("--stage", nargs="*", choices=list(BLOCKS_Q), default=list(BLOCKS_Q))
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    print(environment())
    capability = torch.cuda.get_device_capability()
    problems = [
        Problem(4, 8, 8, length, length, dim, torch.bfloat16, dim**-0.5, capability)
        for dim, length in itertools.product(options.head_dim, options.length)
    ]
    cases = list(itertools.product(options.stage, problems))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        jobs = [(stage, p, config) for stage, p in cases for config in candidates(stage)]
        list(pool.map(compile_stage, jobs))
    for stage, problem in cases:
        times = {}
        for config in candidates(stage):
            milliseconds = run_stage(stage, problem, config, device_ms)
            if milliseconds is not None:
                times[config] = milliseconds
        print(f"{stage} d={problem.head_dim} n={problem.key_length}", flush=True)
        for config in sorted(times, key=lambda config: times[config])[:5]:
            print(f"  {times[config]:8.4f} ms  {config}", flush=True)


if __name__ == "__main__":
    main()
