"""Kernels that another process interrupts: a GPU shared in time gives the results of a free one."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ldm4ts_kernels import attention_fn

# Small work without end: the GPU turns to it in the middle of the kernels under test.
NEIGHBOUR = """
import torch
x = torch.randn(512, 512, device="cuda")
print("ready", flush=True)
while True:
    for _ in range(100):
        x @ x
    torch.cuda.synchronize()
"""
REPEATS = 10
BACKENDS = ("native", "native_int8", "triton", "triton_int8")
CASES = [
    (backend, head_dim, grads)
    for head_dim in (64, 128, 160)
    for backend in BACKENDS
    for grads in (False, True)
]


@pytest.fixture
def start_neighbours():
    """Return a function that starts two processes which use the GPU until the test ends."""
    processes = []

    def start() -> None:
        for _ in range(2):
            command = [sys.executable, "-c", NEIGHBOUR]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process in processes:
            assert process.stdout.readline() == "ready\n"

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def attended(backend: str, head_dim: int, grads: bool) -> list[Tensor]:
    """Return the output, and the gradients, of a call that takes longer than a time slice."""
    torch.manual_seed(0)
    query, key, value, dout = (
        torch.randn(1, 24, 16384, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    leaves = [x.requires_grad_(grads) for x in (query, key, value)]
    precision = "int8" if backend.endswith("int8") else "exact"
    out = attention_fn(*leaves, backend=backend, precision=precision)
    return [out.detach(), *(torch.autograd.grad(out, leaves, dout) if grads else ())]


# One test, so that pytest-xdist does not fill the GPU with neighbours of several.
@pytest.mark.gpu
def test_results_are_the_same_beside_other_processes(start_neighbours, deterministic):
    alone = {}
    for case in CASES:
        try:
            alone[case] = [x.cpu() for x in attended(*case)]
        except NotImplementedError:  # such as a library that is not built
            assert case[0].startswith("native")
    assert alone
    start_neighbours()
    for case, expected in alone.items():
        for _ in range(REPEATS):
            found = attended(*case)
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine, theirs.to(mine.device)), case
