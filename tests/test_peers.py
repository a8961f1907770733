"""Two processes that share each batch train the model that one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_run import tiny_config

from ldm4ts_kernels import peers
from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.peers import Peers
from ldm4ts_kernels.training import train

ROOT = Path(__file__).parents[1]
WORKER = """
import sys
import torch
from ldm4ts_kernels.runs import read_config
from ldm4ts_kernels.training import TrainingInterrupted, train
from dataclasses import replace

torch.set_num_threads(1)
config = replace(read_config(sys.argv[1]), output=sys.argv[2])
stop = lambda report: (report.stage, report.step) == ("forecaster", 2)
try:
    train(config, stop)
except TrainingInterrupted as stopped:
    print(stopped)
result = train(replace(config, resume=True))
print("crps", result.test.scores["ldm4ts"]["crps"])
"""


def losses(directory: Path | str) -> list[dict[str, float]]:
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"] for line in lines]


def test_two_processes_have_the_losses_of_one_and_resume(tmp_path):
    fields = {**tiny_config(tmp_path).model_fields, "dropout": 0.0}
    # In parts, so that its noise is drawn for a whole batch as it is for two processes.
    alone = tiny_config(tmp_path, "alone", model_fields=fields, accumulate=2, eval_windows=2)
    train(alone)
    shared = tmp_path / "shared"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{port}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-W", "ignore", "-c", WORKER, alone.output, str(shared)]
        processes.append(
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
        )
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    assert all("--resume` goes on at forecaster-2" in output for output in outputs)
    assert len({output.split("crps")[1] for output in outputs}) == 1
    found, expected = losses(shared), losses(alone.output)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    weights = load_file(shared / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(OptionError, match="a multiple of 3 processes times accumulate 2, got 16"):
        Peers(0, 3).check(16, 2, in_backward=False)
    with pytest.raises(OptionError, match="optimizer_in_backward: expected one process, got 2"):
        Peers(0, 2).check(16, 1, in_backward=True)
    with pytest.raises(OptionError, match="shard_states: expected two processes or more"):
        Peers().check(16, 1, in_backward=False, shard_states=True)
    with pytest.raises(ValueError, match="a multiple of the 2 processes, got 3"):
        Peers(0, 2).share([1, 2, 3])


def test_shares_are_the_batch():
    batch = list(range(6))
    assert [index for rank in range(3) for index in Peers(rank, 3).share(batch)] == batch


def test_tensors_are_averaged_in_buckets_of_one_dtype(monkeypatch):
    sizes = []
    monkeypatch.setattr(peers, "BUCKET", 40)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: sizes.append(len(flat)) or flat.mul_(2))
    values = [torch.full((2, 3), 1.0), torch.full((4,), 2.0), torch.full((11,), 3.0)]
    values += [torch.full((1,), 4.0, dtype=torch.bfloat16)]
    expected = [value.clone() for value in values]
    Peers(0, 2).average_([*values[:2], None, *values[2:]])
    assert sizes == [10, 11, 1]
    assert all(map(torch.equal, values, expected))


def test_alone_nothing_is_averaged_or_awaited():
    value = torch.ones(2)
    Peers().average_([value, None])
    assert value.tolist() == [1, 1]
    assert Peers().any(True, torch.device("cpu"))
    assert Peers().of_the_first("x") == "x"
