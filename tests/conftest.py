"""Without a GPU the Triton kernels run in its interpreter, which must be on before the import."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "LDM4TS_CACHE" not in os.environ:  # pytest-xdist's workers inherit it
    os.environ["LDM4TS_CACHE"] = tempfile.mkdtemp(prefix="ldm4ts-tests-")
    atexit.register(shutil.rmtree, os.environ["LDM4TS_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The device that kernels run on here: a GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poison(monkeypatch):
    """Fill what the kernels allocate with NaN, so that an element nobody writes is found."""
    plain = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = plain(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
