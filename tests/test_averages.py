"""The average follows the weights, takes their place and gives it back."""

import pytest
import torch
from torch import nn

from ldm4ts_kernels.averages import AVERAGED_EVERY, WeightAverage


def moved(parameter: nn.Parameter, average: WeightAverage, updates: int) -> list[float]:
    """Set the weight to 1, 2, 3, …, a value an update; return the values."""
    values = [float(update + 1) for update in range(updates)]
    for update, value in enumerate(values):
        nn.init.constant_(parameter, value)
        average.update((update + 1) * AVERAGED_EVERY)
        average.update((update + 1) * AVERAGED_EVERY + 1)  # not its turn
    return values


def test_the_average_is_the_exponential_one_with_a_warm_up():
    parameter = nn.Parameter(torch.zeros(3))
    average = WeightAverage([parameter], decay=0.99)
    expected = 0.0
    for number, value in enumerate(moved(parameter, average, 6)):
        decay = min(0.99**AVERAGED_EVERY, (1 + number) / (10 + number)) if number else 0.0
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        torch.testing.assert_close(parameter.detach(), torch.full((3,), expected))
    assert parameter.tolist() == [6.0] * 3


def test_weights_come_back_from_an_error():
    parameter = nn.Parameter(torch.ones(3))
    average = WeightAverage([parameter], decay=0.9)
    nn.init.constant_(parameter, 5.0)
    with pytest.raises(ZeroDivisionError), average.applied():
        assert parameter.tolist() == [1.0] * 3
        raise ZeroDivisionError
    assert parameter.tolist() == [5.0] * 3


def test_without_a_decay_there_is_no_average():
    parameter = nn.Parameter(torch.ones(3))
    average = WeightAverage([parameter], decay=0.0)
    nn.init.constant_(parameter, 5.0)
    average.update(AVERAGED_EVERY)
    with average.applied():
        assert parameter.tolist() == [5.0] * 3
    assert average.tensors() == {}


def test_a_restored_average_goes_on_where_it_was():
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    average = WeightAverage([parameter], decay=0.99)
    moved(parameter, average, 3)
    fresh = WeightAverage([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], decay=0.99)
    fresh.restore({name: value.clone() for name, value in average.tensors().items()})
    for one in (average, fresh):
        moved(one.parameters[0], one, 2)
    assert all(torch.equal(fresh.tensors()[name], average.tensors()[name]) for name in "0")
    other = WeightAverage([nn.Parameter(torch.zeros(4))], decay=0.99)
    with pytest.raises(ValueError, match="of another model"):
        other.restore(average.tensors())
