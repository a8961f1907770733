"""Start a worker module in two processes, as tests of what several devices share do."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


def outputs(
    module: str, folder: Path, kind: str, *arguments: str, timeout: float
) -> Iterator[tuple[int, str, str]]:
    """Run `module RANK STORE KIND …` for two ranks at once; yield code, stdout and stderr of each.

    `kind` is "cpu", with Triton's interpreter, or "cuda"; `timeout`, in seconds, is each one's.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if kind == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", module),
                *(str(rank), str(folder / "store"), kind, *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, error = worker.communicate(timeout=timeout)
        yield worker.returncode, out, error
