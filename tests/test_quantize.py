"""The INT8 quantiser against the reference: integers, scales, the token mean, the LSE's shift."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from ldm4ts_kernels import reference
from ldm4ts_kernels.kernels.problem import Problem
from ldm4ts_kernels.kernels.quantize import Quantised, empty_quantised, quantise
from ldm4ts_kernels.kernels.tuning import QUANT_ROWS
from tests.cases import SMALL, Shape, draw

LONG = Shape(1, 1, 1, 1, 1100, 8)  # more than 16 · 64 tokens: every part of the mean is longer


def quantised(query: Tensor, key: Tensor, scale: float = 0.5) -> tuple[Quantised, Tensor]:
    """Return what the kernels make of query and key, and the LSE's shift."""
    problem = Problem(
        *query.shape[:2], key.shape[1], query.shape[2], *key.shape[2:], query.dtype, scale
    )
    result = empty_quantised(query, key)
    lse_shift = query.new_empty(query.shape[:3], dtype=torch.float32)
    quantise(problem, query, key, result, lse_shift)
    return result, lse_shift


@pytest.mark.parametrize("shape", [*SMALL, LONG], ids=str)
def test_integers_and_scales_are_those_of_the_reference(shape, device, poison):
    query, key, _ = (
        tensor.detach() for tensor in draw(shape, torch.float16, device, channel_bias=4.0)
    )
    (q, q_scale, k, k_scale, mean), lse_shift = quantised(query, key)
    width = q.shape[-1]
    assert width % 16 == 0
    assert (q[..., shape.D :] == 0).all()
    assert (k[..., shape.D :] == 0).all()
    expected, expected_scale = reference.quantise(query, QUANT_ROWS)
    assert torch.equal(q[..., : shape.D], expected)
    torch.testing.assert_close(q_scale, expected_scale)
    own_mean = key.double().mean(2)
    torch.testing.assert_close(mean[..., : shape.D].double(), own_mean, rtol=1e-6, atol=1e-6)
    expected, expected_scale = reference.quantise(
        key.float() - own_mean.float()[:, :, None], QUANT_ROWS
    )
    torch.testing.assert_close(k_scale, expected_scale)
    # The mean's last bit is that of another order of sums: a tie may then round the other way.
    differences = (k[..., : shape.D].int() - expected.int()).abs()
    assert differences.max() <= 1
    assert differences.float().mean() < 1e-3
    groups = shape.H // shape.G
    expected = 0.5 * (query.double() * own_mean.repeat_interleave(groups, 1)[:, :, None]).sum(-1)
    torch.testing.assert_close(lse_shift.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_block_of_zeros_is_exactly_zero(device, poison):
    query = torch.zeros(1, 1, QUANT_ROWS + 2, 16, dtype=torch.float16, device=device)
    query[:, :, :QUANT_ROWS] = 1.0
    key = torch.full_like(query, 3.0)  # its token mean is the key itself
    result, _ = quantised(query, key)
    assert (result.query[:, :, QUANT_ROWS:] == 0).all()
    assert (result.query[:, :, :QUANT_ROWS] == 127).all()
    assert (result.key == 0).all()
    assert torch.isfinite(result.query_scale).all()
    assert torch.isfinite(result.key_scale).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 70])
def test_a_value_that_is_not_finite_is_never_rounded_away(bad, column, device):
    query = torch.ones(1, 2, 2 * QUANT_ROWS + 2, 80, dtype=torch.float16, device=device)
    query[0, 1, QUANT_ROWS + 6, column] = bad
    result, _ = quantised(query, query)
    expected = torch.zeros(1, 2, 3, dtype=torch.bool, device=device)
    expected[0, 1, 1] = True
    assert torch.equal(torch.isnan(result.query_scale), expected)
    assert torch.isnan(result.key_scale[0, 1]).all(), "the mean of the head's channel is lost"
    assert torch.isfinite(result.key_scale[0, 0]).all()


def test_rows_of_any_stride_are_read_without_a_copy(device, poison):
    dense = torch.randn(2, 70, 3, 40, device=device).half().transpose(1, 2)
    assert not dense.is_contiguous()
    ours, theirs = (quantised(x, x)[0] for x in (dense, dense.contiguous()))
    assert all(map(torch.equal, ours, theirs))


def test_the_compiler_takes_every_variant():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.quantiser_variants"]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
