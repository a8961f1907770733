"""Kernels that other processes interrupt: a GPU shared in time gives the results of a free one."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ldm4ts_kernels import attention_fn

# Small work without end: the GPU turns to it in the middle of the kernels under test.
NEIGHBOUR = """
import torch
x = torch.randn(2048, 2048, device="cuda")
print("ready", flush=True)
while True:
    (x @ x).sum().item()
"""
REPEATS = 25


@pytest.fixture
def start_neighbours():
    """Return a function that starts processes which use the GPU until the test ends."""
    processes = []

    def start() -> None:
        for _ in range(4):
            command = [sys.executable, "-c", NEIGHBOUR]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process in processes:
            assert process.stdout.readline() == "ready\n"

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.gpu
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 160])
@pytest.mark.parametrize("backend", ["native", "native_int8", "triton", "triton_int8"])
def test_results_are_the_same_beside_other_processes(
    backend, head_dim, grads, start_neighbours, deterministic
):
    # a call of 5 ms and more: longer than a time slice
    query, key, value, dout = (
        torch.randn(1, 24, 16384, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    precision = "int8" if backend.endswith("int8") else "exact"

    def results() -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().requires_grad_(grads) for x in (query, key, value))
        out = attention_fn(*leaves, backend=backend, precision=precision)
        return (out, *torch.autograd.grad(out, leaves, dout)) if grads else (out,)

    try:
        alone = results()
    except NotImplementedError as error:  # such as a library that is not built
        pytest.skip(str(error))
    start_neighbours()
    for _ in range(REPEATS):
        assert all(map(torch.equal, alone, results()))
