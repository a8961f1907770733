"""How long a forecast of one series takes: DDIM in 50 steps, its draws in one batch.

    pytest benchmarks/test_sampling_time.py --benchmark-only

The paper's model on ETTh1's shape (96 rows of 7 variates). A step is a CUDA graph, which the first
forecast records. Beside it what the paper states for itself and for CSDI (arXiv 2502.14887, table
XIII; one RTX A6000, samples and steps not stated): other hardware, so no ratio is claimed.
"""

import statistics
import time

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

from benchmarks.measure import write_rows
from ldm4ts_kernels.graphs import CudaGraphs
from ldm4ts_kernels.model import LDM4TSModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

STEPS, REPEATS = 50, 10
PAPER_MS = {96: (76.88, 90.4), 192: (80.31, 142.8), 336: (193.44, 398.9), 720: (192.19, 513.1)}
rows: list[dict[str, object]] = []


@pytest.fixture(scope="module", autouse=True)
def results():
    """Write what was measured when the module is done."""
    yield
    if rows:
        write_rows("sampling_time", rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("samples", [1, 100])
@pytest.mark.parametrize("horizon", PAPER_MS)
def test_sampling_time(benchmark, horizon: int, samples: int, precision: str):
    model = LDM4TSModel(
        preset="paper",
        variates=7,
        targets=tuple(range(7)),
        horizons=tuple(range(1, horizon + 1)),
        enable_gradient_checkpointing=False,
    ).eval()
    series = torch.randn(1, 96, 7, device="cuda").cumsum(1)
    model.freeze_autoencoder(series)
    model.graph_sampling(CudaGraphs(model.device))

    def forecast() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast(
            "cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
        ):
            draws = model.sample(series, samples, STEPS)
        assert draws.isfinite().all()  # waits for the GPU
        return 1e3 * (time.perf_counter() - began)

    forecast()
    found = benchmark.pedantic(lambda: [forecast() for _ in range(REPEATS)], rounds=1)
    paper, csdi = PAPER_MS[horizon]
    rows.append(
        {"horizon": horizon, "samples": samples, "steps": STEPS, "precision": precision,
         "ms": round(statistics.median(found), 2), "paper_ms": paper, "csdi_ms": csdi}
    )  # fmt: skip
    print(*rows[-1].values(), flush=True)
