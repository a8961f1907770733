"""Memory laws on disk: found by what they depend on, and traced where a file is not whole."""

from dataclasses import replace

import pytest
from tiny_model import TINY

from ldm4ts_kernels import law_store
from ldm4ts_kernels.caches import user_cache
from ldm4ts_kernels.model.config import resolve_config
from ldm4ts_kernels.model_memory import Step, memory_law

STEP = Step(resolve_config("guide", **TINY), "unet", False, "none", "fp32")


@pytest.fixture
def law():
    return memory_law(STEP)


@pytest.fixture
def folder(law, tmp_path, monkeypatch):
    """An empty one, once the law has come from wherever it was."""
    monkeypatch.setenv("LDM4TS_CACHE", f"{tmp_path}")
    return user_cache("laws")


def never() -> None:
    raise AssertionError("traced again")


def test_a_law_is_traced_once(law, folder):
    assert law_store.kept(STEP, lambda: law) is law
    found = law_store.kept(STEP, never)
    assert found.storages == law.storages
    for batch_size in (1, 7, 64):
        assert found.peak(batch_size) == law.peak(batch_size)
        assert found.reserved(batch_size, graph=True) == law.reserved(batch_size, graph=True)
    assert len(list(folder.iterdir())) == 1  # and nothing half written


def test_another_step_or_version_has_another_law(law, folder, monkeypatch):
    law_store.kept(STEP, lambda: law)
    law_store.kept(replace(STEP, precision="bf16"), lambda: law)
    monkeypatch.setattr(law_store, "code_version", lambda: "another")
    law_store.kept(STEP, lambda: law)
    assert len(list(folder.glob("*.law"))) == 3


@pytest.mark.parametrize("content", [b"", b"no law", None])
def test_a_file_that_is_no_law_is_replaced(law, folder, content, caplog):
    law_store.kept(STEP, lambda: law)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with caplog.at_level("INFO", "ldm4ts_kernels"):
        assert law_store.kept(STEP, lambda: law) is law
    assert "is no memory law, and is replaced" in caplog.text
    assert law_store.kept(STEP, never).storages == law.storages


def test_without_a_place_to_write_the_step_is_traced(law, folder, caplog):
    folder.write_text("a file where the folder would be")
    with caplog.at_level("INFO", "ldm4ts_kernels"):
        assert law_store.kept(STEP, lambda: law) is law
    assert "is not kept" in caplog.text


def test_the_longest_unused_laws_go(law, folder, monkeypatch):
    monkeypatch.setattr(law_store, "MOST_FILES", 2)
    for precision in ("fp32", "bf16", "fp16"):
        law_store.kept(replace(STEP, precision=precision), lambda: law)
    assert len(list(folder.glob("*.law"))) == 2


def test_laws_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("LDM4TS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}")
    assert user_cache("laws") == tmp_path / "ldm4ts-kernels" / "laws"
