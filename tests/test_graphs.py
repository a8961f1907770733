"""Graphed calls do their work each time, whatever the recorder does."""

import logging

import pytest
import torch
from recorders import Rerun

from ldm4ts_kernels.graphs import WARM_UP_CALLS, CaptureError, CudaGraphs, GraphedCall
from ldm4ts_kernels.process import accelerator_of_one_run

CPU = torch.device("cpu")


class Accumulator:
    """A function with a state, as a training step has one."""

    def __init__(self) -> None:
        self.total = torch.zeros(2)

    def __call__(self, inputs):
        self.total += inputs["x"]
        return {"total": self.total.clone(), "seen": inputs["x"] * inputs.get("scale", 1)}


@pytest.mark.parametrize(
    "recorder", [None, Rerun(), Rerun(CaptureError("no"))], ids=["none", "graph", "failing"]
)
def test_every_call_does_its_work_once(recorder):
    function = Accumulator()
    call = GraphedCall("test", function, CPU, recorder)
    for step in range(1, 9):
        outputs = call({"x": torch.full((2,), float(step))})
        assert torch.equal(outputs["seen"], torch.full((2,), float(step)))
        assert outputs["total"][0] == step * (step + 1) / 2


def test_a_function_is_recorded_once_after_its_warm_up():
    recorder = Rerun()
    call = GraphedCall("test", Accumulator(), CPU, recorder)
    for _ in range(9):
        call({"x": torch.ones(2)})
    assert (recorder.warm_ups, recorder.recorded) == (WARM_UP_CALLS, 1)


def test_other_shapes_and_another_autocast_are_recorded_anew():
    recorder = Rerun()
    call = GraphedCall("test", lambda inputs: {"y": inputs["x"] + 1}, CPU, recorder)
    for size in (2, 3):
        for _ in range(WARM_UP_CALLS + 1):
            assert call({"x": torch.ones(size)})["y"].shape == (size,)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(WARM_UP_CALLS + 1):
            call({"x": torch.ones(3)})
    assert recorder.recorded == 3


def test_a_failed_capture_says_why_and_goes_on(caplog):
    recorder = Rerun(CaptureError("operation not permitted when stream is capturing"))
    call = GraphedCall("the training step", Accumulator(), CPU, recorder)
    with caplog.at_level(logging.WARNING, "ldm4ts_kernels"):
        for _ in range(9):
            call({"x": torch.ones(2)})
    assert recorder.recorded == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the training step runs without a CUDA graph, slower: operation not permitted when stream "
        "is capturing"
    ]


def test_errors_of_the_function_itself_are_not_swallowed():
    def broken(inputs):
        raise ZeroDivisionError("in the step")

    with pytest.raises(ZeroDivisionError, match="in the step"):
        GraphedCall("test", broken, CPU, Rerun())({"x": torch.ones(2)})


@pytest.mark.gpu
def test_a_graph_draws_the_random_numbers_of_plain_calls():
    device = torch.device("cuda")

    def run(recorder):
        torch.manual_seed(0)
        call = GraphedCall(
            "test", lambda inputs: {"y": torch.randn_like(inputs["x"])}, device, recorder
        )
        return torch.stack([call({"x": torch.ones(64)})["y"].clone() for _ in range(8)])

    assert torch.equal(run(None), run(CudaGraphs(device)))


@pytest.mark.gpu
def test_a_run_has_one_stream_for_all_that_it_does():
    default = torch.cuda.default_stream()
    with accelerator_of_one_run("cuda", "fp32") as accelerator:
        stream = torch.cuda.current_stream()
        assert stream != default
        assert CudaGraphs(accelerator.device).stream == stream
    assert torch.cuda.current_stream() == default
    assert CudaGraphs(torch.device("cuda")).stream != default


@pytest.mark.gpu
def test_a_broken_capture_leaves_the_gpu_usable(caplog):
    device = torch.device("cuda")

    def waits_for_the_gpu(inputs):
        noise = torch.randn_like(inputs["x"])
        return {"y": noise * noise.sum().item()}

    def run(recorder):
        torch.manual_seed(0)
        call = GraphedCall("test", waits_for_the_gpu, device, recorder)
        return torch.stack([call({"x": torch.ones(64)})["y"].clone() for _ in range(8)])

    expected = run(None)
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, "ldm4ts_kernels"):
        assert torch.equal(run(CudaGraphs(device)), expected)
    assert "runs without a CUDA graph" in caplog.text
    assert torch.cuda.current_stream() == stream
    graphs = CudaGraphs(device)
    call = GraphedCall("test", lambda inputs: {"y": inputs["x"] * 2}, device, graphs)
    for value in range(8):
        assert call({"x": torch.full((4,), float(value))})["y"].tolist() == [2.0 * value] * 4
