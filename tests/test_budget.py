"""A budget of memory becomes the cheapest levers that fit it, and says so."""

import logging

import pytest
import torch
from tiny_model import TINY

from ldm4ts_kernels import runs
from ldm4ts_kernels.budget import MARGIN, choose_levers
from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.model.config import resolve_config
from ldm4ts_kernels.process import memory_cap
from ldm4ts_kernels.runs import TrainConfig, plan
from ldm4ts_kernels.training_memory import GIB
from ldm4ts_kernels.vram import LEAN_LEVERS, LEVERS, run_with

# Large enough that each lever saves more than a segment of the allocator.
SMALL = {**TINY, "autoencoder_channels": (8, 16), "unet_channels": (96, 192)}
CONFIG = resolve_config("guide", **SMALL)


def needed(lever_index: int, windows: int, accumulating: bool = False) -> float:
    """Return the budget that a step of so many windows needs with a lever, and no more."""
    run = run_with(LEAN_LEVERS[lever_index], CONFIG, accumulating)
    return sum(run.table(windows).values()) / GIB / (1 - MARGIN) + 1e-9


def choose(vram_gb: float, batch_size: int = 32, levers=LEVERS):
    return choose_levers(vram_gb, batch_size, levers, "guide", SMALL)


def test_plenty_of_memory_needs_no_lever():
    choice = choose(80)
    assert choice.options == {
        "attention_backend": "flash",
        "precision": "fp32",
        "checkpointing": "none",
        "optimizer": "adamw",
        "weights": "fp32",
        "optimizer_in_backward": False,
        "accumulate": 1,
    }
    assert choice.why.startswith("80 GB: 32 windows a step take an estimated ")
    assert "do not fit" not in choice.why


def test_the_first_lever_with_which_the_batch_fits_is_chosen():
    choice = choose(needed(2, 32))
    assert (choice.options["precision"], choice.options["checkpointing"]) == ("fp32", "full")
    assert choice.options["accumulate"] == 1
    assert choice.estimated_gb == pytest.approx(needed(2, 32) * (1 - MARGIN))
    assert choice.why.endswith("; 2 cheaper sets do not fit.")


def test_a_batch_that_fits_with_no_lever_is_split():
    budget = needed(3, 8, accumulating=True)
    choice = choose(budget, 32, LEVERS[3:])
    assert choice.options["accumulate"] == 4
    assert "32 windows a step, in 4 parts of 8" in choice.why
    assert choice.estimated_gb <= budget


def test_too_little_memory_is_an_error_that_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"vram_gb must be at least [01]\.\d\d for one window"):
        choose(0.5)
    with pytest.raises(ValueError, match="vram_gb must be more than 0, got -1"):
        choose(-1)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(runs, "missing_8bit", lambda: "no torchao")


def test_a_plan_with_a_budget_takes_its_levers_and_says_so(gpu, caplog):
    given = {"vram_gb": needed(2, 16), "batch_size": 16, "model_fields": SMALL}
    with caplog.at_level(logging.INFO, "ldm4ts_kernels"):
        config = plan(given)
    assert (config.precision, config.checkpointing, config.batch_size) == ("fp32", "full", 16)
    assert "16 windows a step take an estimated" in caplog.text


def test_what_is_given_is_kept(gpu, caplog):
    given = {"vram_gb": 80, "checkpointing": "selective", "precision": "bf16"}
    with caplog.at_level(logging.INFO, "ldm4ts_kernels"):
        config = plan({**given, "model_fields": SMALL})
    assert (config.precision, config.checkpointing) == ("bf16", "selective")
    assert "Kept as given: checkpointing." in caplog.text


def test_a_budget_without_a_gpu_is_an_error():
    with pytest.raises(OptionError, match=r"vram_gb: needs a GPU \(device cuda\), got device cpu"):
        plan({"vram_gb": 6, "device": "cpu"})
    with pytest.raises(OptionError, match="vram_gb: expected more than 0, got 0"):
        TrainConfig(vram_gb=0)


def test_the_cap_is_the_budget_less_the_drivers_part_and_is_lifted(monkeypatch):
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 100 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with memory_cap("cuda", 6):
        assert 0.05 < fractions[0] < 0.06
    with memory_cap("cpu", 6), memory_cap("cuda", None):
        pass
    assert fractions[1:] == [1.0]


@pytest.mark.gpu
def test_a_capped_process_runs_out_of_memory_where_a_small_card_would():
    with memory_cap("cuda", 3), pytest.raises(torch.OutOfMemoryError):
        torch.empty(3 * GIB, dtype=torch.uint8, device="cuda")
    torch.empty(3 * GIB, dtype=torch.uint8, device="cuda")
