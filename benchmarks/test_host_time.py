"""What the host spends on a call of attention, whose result nobody waits for.

    pytest benchmarks/test_host_time.py --benchmark-only

bf16. The contenders launch CALLS calls in turn, again and again, so that a busy host slows them all
alike; the median counts. "least" is what autograd itself takes: torch.exp and its derivative, one
kernel each.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.cases import SHAPES, Shape
from benchmarks.measure import write_rows
from benchmarks.test_attention_speed import both_passes, draw, sdpa, without_grad
from ldm4ts_kernels import attention_fn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CALLS, REPEATS = 30, 60
SMALL = [shape for shape in SHAPES if shape.Q <= 196]
CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "native": partial(attention_fn, backend="native"),
    "auto": attention_fn,
    "triton": partial(attention_fn, backend="triton"),
    "sdpa": F.scaled_dot_product_attention,  # as torch chooses
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
}
rows: list[dict[str, object]] = []


def host_us(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median host time of a call of each, in µs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            if repeat:  # the first one loads and chooses
                times[name].append(1e6 * (time.perf_counter() - start) / CALLS)
    return {name: statistics.median(found) for name, found in times.items()}


@pytest.mark.parametrize("make", [without_grad, both_passes], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_host_time(benchmark, shape: Shape, make):
    tensors = draw(shape)
    runs = {name: make(attend, tensors) for name, attend in CONTENDERS.items()}
    runs["least"] = make(torch.exp, tensors[:1])
    each = "forward" if make is without_grad else "forward+backward"
    for name, found in host_us(runs).items():
        rows.append({"shape": str(shape), "backend": name, "pass": each, "host_us": f"{found:.1f}"})
    write_rows("host_time", rows)
    benchmark.pedantic(runs["native"], rounds=20, warmup_rounds=3)
    assert all(float(row["host_us"]) > 0 for row in rows)
