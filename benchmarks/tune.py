"""Time candidate tiles of the Triton kernels on the GPU that is here, and print the best rows.

    python -m benchmarks.tune --head-dim 40 64 80 128 160 --length 784 4096

Each (pass, head dim, length) is timed with every candidate by graph replay; a candidate that does
not fit is skipped by name. The winners go into kernels/tuning.py by hand, under a comment with GPU,
date and this command.
"""

import argparse
import itertools
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


def time_stage(stage: str, problem: Problem, config: Config) -> float:
    """Return the device time in ms of the pass with `config` in place of the table's row."""
    shape = (problem.batch, problem.heads, problem.query_length, problem.head_dim)
    query, key, value, dout = torch.randn(4, *shape, dtype=problem.dtype, device="cuda")
    out, lse = torch.empty_like(query), torch.empty(shape[:3], device="cuda")
    grads = [torch.empty_like(query) for _ in range(3)]

    def choose(asked: str, *rest: object) -> Config:
        return config if asked == stage else tuning.choose(asked, *rest)

    with mock.patch("ldm4ts_kernels.kernels.problem.choose", choose):
        if stage == "forward":
            return device_ms(
                lambda: flash_forward.flash_forward(
                    problem, query, key, value, None, None, out, lse
                )
            )
        flash_forward.flash_forward(problem, query, key, value, None, None, out, lse)
        return device_ms(
            lambda: flash_backward.flash_backward(
                problem, query, key, value, None, None, out, lse, dout, None, *grads, None
            )
        )


def main() -> None:
    """Time every candidate of every pass, and print each pass's best five."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", nargs="*", type=int, default=[40, 64, 80, 128, 160])
    parser.add_argument("--length", nargs="*", type=int, default=[784, 4096])
    parser.add_argument("--stage", nargs="*", choices=list(BLOCKS_Q), default=list(BLOCKS_Q))
    options = parser.parse_args()
    print(environment())
    capability = torch.cuda.get_device_capability()
    for stage, head_dim, length in itertools.product(
        options.stage, options.head_dim, options.length
    ):
        problem = Problem(
            4, 8, 8, length, length, head_dim, torch.bfloat16, head_dim**-0.5, capability
        )
        times = {}
        for config in candidates(stage):
            try:
                times[config] = time_stage(stage, problem, config)
            except OutOfResources as error:
                print(f"skipped {stage} {config}: {error}")
        print(f"{stage} d={head_dim} n={length}")
        for config in sorted(times, key=lambda config: times[config])[:5]:
            print(f"  {times[config]:8.4f} ms  {config}")


if __name__ == "__main__":
    main()
