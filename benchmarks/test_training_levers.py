"""The guide's tables: memory and speed of a training step, set of levers by set of levers.

    pytest benchmarks/test_training_levers.py --benchmark-only

Batch 2 and 4 at 224 px and batch 4 at 512 px; batch 16 for Default and our fastest. Without a GPU
there is nothing to measure.
"""

import gc

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

from benchmarks.measure import write_rows
from benchmarks.training_levers import COMPILED, GUIDE, OURS, Levers, measure, prepared

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PLAIN, FAST = GUIDE[0], (OURS[1], COMPILED[0])
CASES = [
    *((224, 4, levers) for levers in (*GUIDE, *OURS, *COMPILED)),
    *((224, 2, levers) for levers in (*GUIDE, *OURS)),
    *((512, 4, levers) for levers in (*GUIDE, *OURS)),
    *((224, 16, levers) for levers in (PLAIN, *FAST)),
]  # (px, batch size, levers)
rows: list[dict[str, object]] = []


@pytest.fixture(scope="module", autouse=True)
def results():
    """Write what was measured when the module is done."""
    yield
    if rows:
        write_rows("training_levers", rows)


@pytest.mark.parametrize(
    ("px", "batch_size", "levers"),
    [pytest.param(*case, id=f"{case[0]}px-{case[1]}-{case[2].name}") for case in CASES],
)
def test_training_levers(benchmark, px: int, batch_size: int, levers: Levers):
    if levers.optimizer == "adamw8bit":
        pytest.importorskip("torchao", reason="needs torchao")
    gc.collect()
    torch.cuda.empty_cache()
    with prepared(levers, px, batch_size) as (call, batch):
        found = benchmark.pedantic(measure, (call, batch), rounds=1)
    row = {"px": px, "batch": batch_size, "name": levers.name, "precision": levers.precision}
    rows.append({**row, **found})
    print(*rows[-1].values(), flush=True)
    assert found["captured"] == levers.graph
    assert found["last_loss"] == found["last_loss"], "the loss is not a number"
