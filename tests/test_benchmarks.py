"""What the benchmarks must hold to on any machine: clean measurements, tables of every row."""

import pytest
import torch

from benchmarks.measure import check_nothing_left
from benchmarks.training_tables import training_gains, training_levers

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
pytest.importorskip("diffusers", reason="needs diffusers")

from benchmarks.test_training_levers import CASES


def test_memory_that_is_left_is_refused_by_its_size(monkeypatch):
    check_nothing_left()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: int(2.5 * 2**20))
    with pytest.raises(RuntimeError, match=r"left 2\.5 MiB on the GPU"):
        check_nothing_left()


def test_every_set_of_levers_is_measured_once_and_has_its_place_in_the_tables():
    measured = {"ms": "20.0", "allocated_mib": "1000.0", "in_all_mib": "2000.0"}
    where = {"gpu": "a GPU", "versions": "torch", "command": "pytest"}
    rows = [
        {"px": f"{px}", "batch": f"{batch}", "name": levers.name, "precision": levers.precision}
        | measured
        | where
        for px, batch, levers in CASES
    ]
    assert len({(row["px"], row["batch"], row["name"]) for row in rows}) == len(CASES)
    head_and_source = 4
    assert len(training_levers(rows)) == len(CASES) + head_and_source
    assert len(training_gains(rows)) > head_and_source
