"""The guide's tables: memory and speed of a training step, set of levers by set of levers.

    pytest benchmarks/test_training_levers.py --benchmark-only

Batch 2 and 4 at 224 px and batch 4 at 512 px; batch 16 for Default and our fastest. The rows that
say most come first, and each is written as it is measured. Without a GPU there is nothing to
measure.
"""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

from benchmarks.measure import write_rows
from benchmarks.training_levers import CHANNELS_LAST, GUIDE, OURS, Levers, measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PLAIN, FAST, LEAN = GUIDE[0], OURS[1], OURS[-1]
BEST = (PLAIN, FAST, OURS[2], LEAN)
CASES = [
    *((px, 4, levers) for px in (224, 512) for levers in BEST),
    *((px, 4, levers) for px in (224, 512) for levers in CHANNELS_LAST),
    *((224, 16, levers) for levers in (PLAIN, FAST, CHANNELS_LAST[0])),
    *((224, 4, levers) for levers in (*GUIDE, *OURS) if levers not in BEST),
    *((224, 2, levers) for levers in (PLAIN, GUIDE[3], GUIDE[5], LEAN, FAST)),
    *((512, 4, levers) for levers in (*GUIDE, *OURS) if levers not in BEST),
    *((224, 2, levers) for levers in (*GUIDE[1:3], GUIDE[4])),
]  # (px, batch size, levers)
rows: list[dict[str, object]] = []


@pytest.mark.parametrize(
    ("px", "batch_size", "levers"),
    [pytest.param(*case, id=f"{case[0]}px-{case[1]}-{case[2].name}") for case in CASES],
)
def test_training_levers(benchmark, px: int, batch_size: int, levers: Levers):
    if levers.optimizer == "adamw8bit":
        pytest.importorskip("torchao", reason="needs torchao")
    found = benchmark.pedantic(measure, (levers, px, batch_size), rounds=1)
    row = {"px": px, "batch": batch_size, "name": levers.name, "precision": levers.precision}
    rows.append({**row, **found})
    print(*rows[-1].values(), flush=True)
    write_rows("training_levers", rows)
    assert found["captured"] == levers.graph
    assert found["last_loss"] == found["last_loss"], "the loss is not a number"
