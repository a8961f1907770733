"""`ldm4ts bench`: the benchmark suite's own timing of attention, for one shape on this machine."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ldm4ts_kernels.data import OptionError

CLONE = Path(__file__).parents[1]  # of the package, where this is a clone of the project


def time_attention(shape: str, backward: bool) -> Iterator[dict[str, Any]]:
    """Yield a row a contender for the shape B x H x Q x K x D, such as "4x8x784x784x40", in bf16.

    Rows are those of benchmarks/results/attention_speed.csv; nothing is written. Raises OptionError
    for a shape that does not read, ValueError where there is no GPU or no benchmarks/.
    """
    sizes = shape.split("x")
    if len(sizes) != 5 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise OptionError(f"shape: expected BxHxQxKxD, such as 4x8x784x784x40, got {shape!r}")
    if not torch.cuda.is_available():
        raise ValueError("bench needs an NVIDIA GPU, and torch finds none: nothing was measured")
    cases, speed = _suite()
    yield from speed.time_shape(cases.Shape(*map(int, sizes), "ldm4ts bench"), backward)


def _suite() -> tuple[Any, Any]:
    """Import benchmarks/ from the clone; a wheel does not have it."""
    if str(CLONE) not in sys.path:
        sys.path.insert(0, str(CLONE))
    try:
        names = ("benchmarks.cases", "benchmarks.test_attention_speed")
        cases, speed = map(importlib.import_module, names)
    except ImportError as error:
        raise ValueError(
            f"bench runs in a clone of the project, with pip install -e '.[bench,dev]': {error}"
        ) from error
    return cases, speed
