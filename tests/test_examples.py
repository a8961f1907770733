import logging
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, monkeypatch, caplog, *arguments):
    """Run an example as a script, and return what it logs."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with caplog.at_level(logging.INFO):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["lora_training.py", "plain_pytorch.py"])
def test_a_training_example_lowers_its_loss_and_says_who_served(name, monkeypatch, caplog):
    log = run(name, monkeypatch, caplog, "--steps", 5)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", log)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert "sdpa" in log


def test_the_pipeline_example_writes_an_image_and_a_report(monkeypatch, caplog, tmp_path):
    output = tmp_path / "image.png"
    log = run("diffusers_pipeline.py", monkeypatch, caplog, "--steps", 2, "--output", output)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "unet.mid_block.attentions.0" in log


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short(file):
    assert len(file.read_text().splitlines()) < 60
