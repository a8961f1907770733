"""The doctor: what is here, what is missing, and the command that mends it."""

import json

import pytest

from ldm4ts_kernels import doctor
from ldm4ts_kernels.backends import CHAINS
from ldm4ts_kernels.requirements import Requires


@pytest.fixture(scope="module")
def found() -> doctor.Diagnosis:
    return doctor.diagnose(tokens=64)


def test_every_backend_of_every_chain_is_found(found):
    rows = [(row.precision, row.name) for row in found.backends]
    assert rows == [(chain, row.name) for chain, rows in CHAINS.items() for row in rows]


def test_each_chain_has_one_that_serves_and_the_others_say_why_not(found):
    for chain in CHAINS:
        rows = [row for row in found.backends if row.precision == chain]
        assert sum(row.chosen for row in rows) == 1
        before = rows[: [row.chosen for row in rows].index(True)]
        assert all(row.reasons for row in before)


def test_a_backend_that_cannot_train_may_serve_without_a_gradient(found):
    rows = {row.name: row for row in found.backends}
    assert "has no backward pass" in rows["sageattention"].reasons
    assert all(row.infers for row in found.backends if row.trains)


def test_what_a_script_reads_is_plain_json(found):
    read = json.loads(json.dumps(found.as_dict()))
    assert [row["name"] for row in read["machine"]][:2] == ["Python", found.machine[1].name]
    assert doctor.read_diagnosis(read) == found


def test_every_wheel_has_a_command_that_installs_it():
    needed = {row.name for chain in CHAINS.values() for row in chain if row.name != "sdpa"}
    assert needed <= set(doctor.INSTALLS)


@pytest.mark.parametrize(
    ("requires", "missing"),
    [
        (Requires(), False),
        (Requires(module="torch"), False),
        (Requires(module="torch", major=99), True),
        (Requires(module="a_module_that_nobody_has"), True),
        (Requires(loads=lambda: "was not built"), True),
        (Requires(loads=lambda: None), False),
    ],
)
def test_what_an_installation_would_mend_is_told_from_what_it_would_not(requires, missing):
    assert doctor._is_missing(requires) is missing


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"ldm4ts": ("a-package-that-nobody-has",)})
    last = doctor.diagnose(tokens=64).machine[-1]
    assert (last.ok, last.fix) == (False, "pip install 'ldm4ts-kernels[ldm4ts]'")


def test_a_driver_without_a_torch_that_has_cuda_is_mended_by_another_torch(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver_version", lambda: "580.10")
    monkeypatch.setattr(doctor.torch.version, "cuda", None)
    gpu = next(row for row in doctor.diagnose(tokens=64).machine if row.name == "GPU")
    assert gpu.ok is False and "pip install --force-reinstall torch" in gpu.fix
