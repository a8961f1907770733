"""The tracker: bytes in closed form, fakes against real tensors, and the law of the batch."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm4ts_kernels.memory_trace import MemoryLaw, Timeline, fit_law, trace_step

WIDTH = 128  # a row of floats is one block of the allocator
WEIGHT = 4 * WIDTH * WIDTH
STEP_COUNTER = 512  # AdamW's, a scalar a parameter


def trace(module: nn.Module, batch: int) -> Timeline:
    rows = torch.empty(batch, WIDTH)
    return trace_step(module, list(module.parameters()), [rows], lambda: module(rows).sum())


def layers(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)))


def law_of(depth: int) -> MemoryLaw:
    with FakeTensorMode():
        small, large = trace(layers(depth), 2), trace(layers(depth), 8)
    return fit_law(small, 2, large, 8)


def test_a_layer_takes_its_weights_gradients_states_and_activations():
    with FakeTensorMode():
        timeline = trace(layers(1), 4)
    assert timeline.phases[-1] == 2
    last = dict(zip(("weights", "gradients", "states"), timeline.live_bytes[-1], strict=False))
    assert last == {"weights": WEIGHT, "gradients": WEIGHT, "states": 2 * WEIGHT + STEP_COUNTER}


def test_the_forward_pass_keeps_what_the_backward_pass_needs():
    peak = law_of(3).peak(1000)
    # The input, the outputs of two layers, which the weights' gradients need, and of the third,
    # which is being summed.
    rows = 1000 * 4 * WIDTH
    assert peak.phases["forward"] == 9 * WEIGHT + 3 * STEP_COUNTER + 4 * rows + 512
    assert peak.categories["inputs"] == rows


def test_fake_tensors_take_what_real_ones_take():
    real = trace(layers(3), 4)
    with FakeTensorMode():
        fake = trace(layers(3), 4)
    backward = real.phases.index(2)  # where it ends; fakes are clipped one by one, not at once
    assert fake.live_bytes[:backward] == real.live_bytes[:backward]
    assert fake.live_bytes[-1] == real.live_bytes[-1]


def test_the_law_gives_the_peak_of_a_batch_that_was_not_traced():
    with FakeTensorMode():
        other = trace(layers(3), 500)
    assert law_of(3).peak(500).total == max(map(sum, other.live_bytes))


def test_the_peak_moves_with_the_batch_from_the_gradients_to_the_activations():
    small, large = law_of(8).peak(1), law_of(8).peak(10_000)
    assert small.categories["gradients"] > large.categories["gradients"]
    assert large.categories["activations"] > small.categories["activations"]
    assert sum(small.categories.values()) == small.total == max(small.phases.values())


def test_steps_that_differ_have_no_law():
    with pytest.raises(RuntimeError, match="batch sizes 2 and 8 differ"):
        fit_law(trace(layers(1), 2), 2, trace(layers(2), 8), 8)
