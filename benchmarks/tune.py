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
from dataclasses import replace
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.measure import device_ms, environment
from ldm4ts_kernels.kernels import (
    flash_backward,
    flash_forward,
    quantize,
    tuning,
)
from ldm4ts_kernels.kernels.problem import Problem
from ldm4ts_kernels.kernels.tuning import Config

# (block_q, block_k, num_warps, num_stages): those that reached half of the best on some head dim.
TILES = {
    "forward": (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 3), (128, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
    ),
    "key_gradient": (
        (32, 64, 4, 3), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2),
        (64, 128, 8, 3), (128, 64, 4, 2),
    ),
    "int8_forward": (
        (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 2),
        (128, 128, 8, 2),
    ),
    "query_gradient": (
        (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2),
        (128, 64, 8, 3), (128, 128, 8, 2),
    ),
}  # fmt: skip
TILES |= {f"int8_{stage}": TILES[stage] for stage in ("key_gradient", "query_gradient")}


def candidates(stage: str, problem: Problem) -> list[Config]:
    """Return the tiles of a pass, on Hopper also with tensor maps and with a kept maximum."""
    configs = [Config(*tile) for tile in TILES[stage]]
    if problem.capability[0] == 9 and problem.key_length >= tuning.TMA_LENGTH:
        maps = [replace(config, tma=True) for config in configs]
        configs += maps
        if stage.endswith("forward") and problem.dtype == torch.bfloat16:
            configs += [replace(config, steady=True) for config in maps]
    return configs


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
    problem = problem._replace(int8=stage.startswith("int8_"))
    scored, quantised = (query, key, None, None), None  # what the scores are products of
    if problem.int8:
        quantised = quantize.empty_quantised(query, key)
        quantize.quantise(problem, query, key, quantised, lse)
        scored = (quantised.query, quantised.key, quantised.query_scale, quantised.key_scale)

    def choose(asked: str, *rest: object) -> Config:
        return config if asked == stage else tuning.choose(asked, *rest)

    def choose_tma(asked: str, *rest: object) -> Config | None:
        if asked == stage:
            return config if config.tma else None
        return tuning.choose_tma(asked, *rest)

    def forward() -> None:
        q, k, *scales = scored
        flash_forward.flash_forward(problem, q, k, value, None, None, out, lse, *scales)

    def backward() -> None:
        flash_backward.flash_backward(
            problem, query, key, value, None, None, out, lse, dout, None, *grads, None, quantised
        )

    for plan in (flash_forward._plan, flash_backward._plan):
        plan.cache_clear()
    chooser = "ldm4ts_kernels.kernels.problem"
    with mock.patch.multiple(chooser, choose=choose, choose_tma=choose_tma):
        try:
            forward()
            return use(forward if stage.endswith("forward") else backward)
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
    parser.add_argument("--stage", nargs="*", choices=list(TILES), default=list(TILES))
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
        jobs = [(stage, p, config) for stage, p in cases for config in candidates(stage, p)]
        list(pool.map(compile_stage, jobs))
    for stage, problem in cases:
        times = {}
        for config in candidates(stage, problem):
            milliseconds = run_stage(stage, problem, config, device_ms)
            if milliseconds is not None:
                times[config] = milliseconds
        print(f"{stage} d={problem.head_dim} n={problem.key_length}", flush=True)
        for config in sorted(times, key=lambda config: times[config])[:5]:
            print(f"  {times[config]:8.4f} ms  {config}", flush=True)


if __name__ == "__main__":
    main()
