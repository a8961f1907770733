"""Tensors on a GPU that is not the current one, and streams that are not the default one."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from ldm4ts_kernels import attention_fn, explain, operators
from tests.cases import Shape, draw
from tests.two_processes import TWO_GPUS

SHAPE = Shape(2, 4, 4, 200, 300, 64)
BACKENDS = {
    "native": "exact",
    "triton": "exact",
    "triton_int8": "int8",
    "native_int8": "int8",
    "sageattention": "int8",  # the wheel has no backward pass
}


def attend(backend: str, device: torch.device, late: bool = False) -> list[torch.Tensor]:
    """Return output and gradients, or the output alone where there are none, on the CPU.

    `late` inputs are written at the end of a long wait, on the current stream of their device.
    """
    leaves = draw(SHAPE, torch.bfloat16, device)
    if late:
        copies = [leaf.detach().clone() for leaf in leaves]
        with torch.no_grad(), torch.cuda.device(device):
            for leaf in leaves:
                leaf.zero_()
            torch.cuda._sleep(50_000_000)
            for leaf, copy in zip(leaves, copies, strict=True):
                leaf.copy_(copy)
    options = {"precision": BACKENDS[backend], "backend": backend}
    if backend == "sageattention":
        leaves = tuple(leaf.detach() for leaf in leaves)
    try:
        reasons = explain(*leaves, **options).reasons[backend]
    except ValueError as unknown:  # a backend that this version does not have
        pytest.skip(str(unknown))
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    results = [attention_fn(*leaves, **options)]
    if results[0].requires_grad:
        results += torch.autograd.grad(results[0].square().sum(), leaves)
    assert {result.device for result in results} == {device}
    return [result.detach().cpu() for result in results]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=TWO_GPUS[1])])
@pytest.mark.parametrize("side_stream", [False, True])
def test_it_runs_on_the_device_and_stream_that_it_should(backend, index, side_stream):
    device = torch.device("cuda", index)
    expected = attend(backend, torch.device("cuda", 0))
    if not side_stream:
        found = attend(backend, device)
    else:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream), torch.cuda.device(0):
            found = attend(backend, device, late=True)
    assert torch.cuda.current_device() == 0
    assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("server", operators.SERVERS)
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=TWO_GPUS[1])])
def test_the_backward_operator_goes_by_its_tensors_too(server, index):
    results = []
    for device in (torch.device("cuda", 0), torch.device("cuda", index)):
        query, key, value = (leaf.detach() for leaf in draw(SHAPE, torch.bfloat16, device))
        call = operators.describe_part(query, key, value, False)
        if reasons := operators.SERVERS[server].requires.unmet(call):
            pytest.skip("; ".join(reasons))
        out, lse = operators.forward(server, query, key, value, False, 0.125)
        grads = operators.backward(server, out, query, key, value, out, lse, False, 0.125)
        results.append([tensor.cpu() for tensor in (out, lse, *grads)])
    assert torch.cuda.current_device() == 0
    assert all(map(torch.equal, *results))
